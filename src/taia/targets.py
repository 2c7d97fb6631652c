"""Where the kept deltas of a splice fit into a LoRA adapter, by PEFT's names.

A stored matrix is a module's weight, or a part of the live tensor in which transformers joins
experts that lie one by one. Data in: a plan between two checkpoints. Data out: one Target for
each live tensor that changes, with the stored matrices it is made of; vectors that change,
which an adapter can only hold whole; and a fault for what neither can hold. Weights are read
as far as is needed to know whether they changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from taia.arrays import DTYPES, Array, read_array, widen
from taia.changes import PREFIX
from taia.checkpoint import FLOATS, Checkpoint
from taia.kinds import Kind
from taia.layouts import Place, family_of, is_known, place_of
from taia.lora import is_conv1d
from taia.pieces import Copy, Piece, pieces
from taia.plan import Decision, Origin, Plan
from taia.stacked import IN_OUT_TYPES, NESTED, ORDER

__all__ = [
    "Target",
    "Targets",
    "factor_keys",
    "find_targets",
    "parameters_of",
    "whole_key",
]

EMBEDDINGS = {"relative_attention_bias", "rel_pos_emb", "down_embed", "up_embed"}
"""Embeddings of transformers that are a part of attention or of the feed-forward network."""

UNKNOWN = "PEFT must be told its name in the running model, which is not known for"


@dataclass(frozen=True, slots=True)
class Part:
    """One stored tensor of a target: what the splice makes of it, and its bytes in the base."""

    name: str
    piece: Piece
    base: Copy

    def delta(self) -> Array:
        """What the splice changes, in float32 (float64 of float64)."""
        tensor = self.base.tensor
        if self.piece == self.base:  # whose bytes need not be here
            return widen(np.zeros(tensor.shape, DTYPES[tensor.dtype]))
        raw = b"".join(self.piece.chunks())
        spliced = widen(np.frombuffer(raw, DTYPES[tensor.dtype]).reshape(tensor.shape))
        delta: Array = spliced - widen(read_array(self.base.folder, tensor))
        return delta

    def changes(self) -> bool:
        """Whether a single byte differs; stops at the first that does."""
        if isinstance(self.piece, Copy) and self.piece == self.base:
            return False
        return any(a != b for a, b in zip_longest(_even(self.piece), _even(self.base)))


def _even(piece: Piece) -> Iterator[bytes]:
    """The chunks of a piece cut to one size, so that two of them can be compared."""
    size, kept = 1 << 20, b""
    for chunk in piece.chunks():
        kept += chunk
        while len(kept) >= size:
            yield kept[:size]
            kept = kept[size:]
    yield kept


@dataclass(frozen=True, slots=True)
class Target:
    """A live tensor that LoRA can change.

    items: per expert (one where there are none) the stored tensors that lie one below another.
    form: linear, conv1d (stored as in, out), embedding, or experts (a parameter, stacked).
    """

    name: str
    form: str
    kind: Kind
    dtype: str
    items: tuple[tuple[Part, ...], ...]
    experts: int = 1
    in_out: bool = False

    @property
    def module(self) -> str:
        """The module that PEFT puts its factors beside."""
        return self.name.rpartition(".")[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the delta of one item, as B @ A has it."""
        first = self.items[0][0].base.tensor.shape
        rows = sum(part.base.tensor.shape[-2] for part in self.items[0])
        return (first[-1], rows) if self._turned else (rows, first[-1])

    @property
    def _turned(self) -> bool:
        return self.form in ("conv1d", "embedding") or self.in_out

    def deltas(self) -> Iterator[Array]:
        """The delta of each expert, (out, in), one at a time."""
        for parts in self.items:
            whole = np.concatenate([part.delta() for part in parts], axis=-2)
            for delta in whole if whole.ndim == 3 else [whole]:
                yield delta.T if self._turned else delta


@dataclass(frozen=True, slots=True)
class Targets:
    """What changes: matrices for factors, vectors by live name, and what cannot be held."""

    matrices: tuple[Target, ...]
    whole: dict[str, Part]
    faults: tuple[str, ...]


def find_targets(planned: Plan) -> Targets:
    """The targets of a plan without faults."""
    decisions = {decision.name: decision for decision in planned.decisions}
    groups, faults = _changed(planned)
    matrices: list[Target] = []
    whole: dict[str, Part] = {}
    for live, parts in groups.items():
        decision = decisions[parts[0][1].name]
        try:
            target = _target(live, decision, parts, planned)
            if target is not None and target.form == "experts":
                _refuse_unordered(live, parts[0][1].base.tensor.shape)
        except ValueError as reason:
            faults.append(f"{live}: {reason}")
            continue
        if target is None:
            whole[live] = parts[0][1]
        else:
            matrices.append(target)
    return Targets(tuple(matrices), whole, tuple(faults))


def _changed(planned: Plan) -> tuple[dict[str, list[tuple[Place, Part]]], list[str]]:
    """The stored tensors that change, by live name, and why others cannot be in an adapter."""
    made = pieces(planned, fetched=False)  # of a remote model no more is here than is read
    groups: dict[str, list[tuple[Place, Part]]] = {}
    faults = []
    for decision in planned.decisions:
        name, tensor = decision.name, planned.base.tensors[decision.name]
        part = Part(name, made[name], Copy(planned.base.path, tensor))
        if decision.source is Origin.BASE:
            continue
        if tensor.dtype not in FLOATS:
            faults.append(f"{name}: dtype {tensor.dtype} has no delta")
        elif decision.bytes != tensor.bytes:
            faults.append(f"{name}: the vocabulary was resized, and its new rows have no base")
        elif part.changes():
            live, place = _live(name, planned.base)
            if live is None:
                faults.append(f"{name}: {UNKNOWN} {planned.base.model_type}")
            else:
                groups.setdefault(live, []).append((place, part))
    return groups, faults


def _live(name: str, base: Checkpoint) -> tuple[str | None, Place]:
    """The live name of a stored tensor, where the rules tell it, and its place in that tensor.

    PEFT finds modules by their live names, and passes over factors that have any other.
    """
    family = family_of(base.model_type, base.config)
    place = place_of(name, family)
    if not is_known(base.model_type) or family.is_unsure(name):
        return None, place
    return family.live(place.lives[0]), place


def _target(
    live: str, decision: Decision, parts: list[tuple[Place, Part]], planned: Plan
) -> Target | None:
    """The target of a live tensor; None for a vector. Raises ValueError with the reason if none."""
    kind, model_type = decision.address.kind, planned.base.model_type
    tensor = parts[0][1].base.tensor
    if kind in (Kind.EMBEDDING, Kind.HEAD) and _is_tied(planned):
        raise ValueError(
            "the base ties embedding and head, and LoRA would change one of them; leave them out: "
            "'- embedding - head'"
        )
    if parts[0][0].operations:
        return _joined(live, kind, parts, planned)
    if len(tensor.shape) == 1 and live.endswith((".weight", ".bias")):
        return None
    single = ((parts[0][1],),)
    if len(tensor.shape) == 3 and kind in (Kind.FFN, Kind.ATTENTION):
        in_out = model_type in IN_OUT_TYPES
        return Target(live, "experts", kind, tensor.dtype, single, tensor.shape[0], in_out)
    if len(tensor.shape) != 2 or not live.endswith(".weight"):
        raise ValueError(f"{list(tensor.shape)} is no matrix of a module, which LoRA could change")
    form, leaf = "linear", live.split(".")[-2]
    if leaf.endswith("norm"):
        raise ValueError("a norm of several rows, which LoRA does not change; leave it out")
    if kind is Kind.EMBEDDING or leaf in EMBEDDINGS:
        form = "embedding"
    elif kind is Kind.ROUTER:
        form = "experts"  # a parameter of its module, as stacked experts are
    elif is_conv1d(live.rpartition(".")[0], model_type):
        form = "conv1d"
    return Target(live, form, kind, tensor.dtype, single)


def _refuse_unordered(live: str, shape: tuple[int, ...]) -> None:
    """Raise ValueError for a parameter whose place among PEFT's nested wrappers is not known.

    Three dimensions alone make no experts: XLNet's attention is (width, heads, size of a head).
    """
    if live.rpartition(".")[2] not in ORDER:
        raise ValueError(f"{list(shape)} is no parameter of an expert module of transformers")


def _joined(live: str, kind: Kind, changed: list[tuple[Place, Part]], planned: Plan) -> Target:
    """Experts that are stored one by one; all of them, changed or not."""
    other = {o for place, _ in changed for o in place.operations} - {"stack 0", "concatenate 1"}
    if other:
        raise ValueError(
            f"loading it takes {' and '.join(sorted(other))}, so its delta in the file is not that "
            "of the module; leave it out"
        )
    made = pieces(planned, fetched=False)
    family = family_of(planned.base.model_type, planned.base.config)
    wanted = changed[0][0].lives[0]
    items: dict[int, list[tuple[int, Part]]] = {}
    for name, tensor in planned.base.tensors.items():
        place = place_of(name, family)
        if place.lives[0] == wanted:
            part = Part(name, made[name], Copy(planned.base.path, tensor))
            items.setdefault(place.item, []).append((place.source, part))
    ordered = [tuple(p for _, p in sorted(items[i], key=lambda x: x[0])) for i in sorted(items)]
    shapes = {tuple(part.base.tensor.shape for part in item) for item in ordered}
    if len(shapes) != 1 or any(len(shape) != 2 for shape in next(iter(shapes))):
        raise ValueError("its experts do not have one shape")
    dtype = ordered[0][0].base.tensor.dtype
    return Target(live, "experts", kind, dtype, tuple(ordered), len(ordered))


def _is_tied(planned: Plan) -> bool:
    """Whether the base stores one tensor for its embedding and its head."""
    ends: dict[Kind, set[tuple[str, int]]] = {Kind.EMBEDDING: set(), Kind.HEAD: set()}
    for decision in planned.decisions:
        if decision.address.kind in ends and decision.address.tower == "language":
            tensor = planned.base.tensors[decision.name]
            ends[decision.address.kind].add((tensor.file, tensor.start))
    return not ends[Kind.HEAD] or bool(ends[Kind.HEAD] & ends[Kind.EMBEDDING])


def parameters_of(targets: Targets) -> dict[str, list[str]]:
    """The parameters that change, by module."""
    parameters: dict[str, list[str]] = {}
    for target in targets.matrices:
        parameters.setdefault(target.module, []).append(target.name.rpartition(".")[2])
    return parameters


def factor_keys(target: Target, parameters: dict[str, list[str]]) -> tuple[str, str]:
    """PEFT's names of A and B."""
    stem = f"{PREFIX}{target.module}"
    if target.form == "embedding":
        return f"{stem}.lora_embedding_A", f"{stem}.lora_embedding_B"
    if target.form == "experts":  # the parameter registered last has the outermost wrapper
        names = sorted(parameters[target.module], key=ORDER.index)
        stem += NESTED * (len(names) - 1 - names.index(target.name.rpartition(".")[2]))
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def whole_key(live: str, targets: Targets) -> str:
    """A bias stands in the base layer of a module with factors; else the module is whole."""
    module, _, part = live.rpartition(".")
    if part == "bias" and any(target.module == module for target in targets.matrices):
        return f"{PREFIX}{module}.base_layer.bias"
    return f"{PREFIX}{live}"
