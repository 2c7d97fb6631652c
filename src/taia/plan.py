"""What a splice would do: a selection resolved against two concrete models.

Data in: two checkpoints, or a checkpoint and an adapter, read by their headers, and a
selection. Data out: a frozen Plan, one Decision a tensor of the base, and every fault
that forbids carrying it out. Nothing is written here and no weight is read.

A tied output head is stored once, as the embedding, and has one strength: a selection
that would give the two different ones is a fault.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taia.checkpoint import FLOATS, Checkpoint, Tensor, open_checkpoint
from taia.ends import left_over, text_config, tie_setting, untie
from taia.errors import MismatchError
from taia.experts import NO_DELTA, Experts
from taia.kinds import Address, Kind, classify_all
from taia.layouts import align
from taia.quantised import format_faults, is_quantised, is_text, module_faults
from taia.selection import Selection
from taia.sources import Form, Source, resolve

if TYPE_CHECKING:  # what reads adapters is loaded for adapters only
    from taia.adapter import Adapter
    from taia.changes import Shapes

__all__ = ["Decision", "Origin", "Plan", "plan", "shapes_of", "stored_name"]


ENDS = (Kind.EMBEDDING, Kind.HEAD)
"""What has a row for every word of the vocabulary."""


class Origin(StrEnum):
    """Where the bytes of an output tensor come from."""

    BASE = "base"
    TUNED = "tuned"
    BLEND = "blend"


WHOLE = {0.0: Origin.BASE, 1.0: Origin.TUNED}
"""Where a tensor is from at the strengths that copy it."""


@dataclass(frozen=True, slots=True)
class Decision:
    """One output tensor: its address, its strength, and so its source. `bytes` on disk."""

    name: str
    address: Address
    source: Origin
    strength: float
    bytes: int
    parameters: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Every decision of one splice, in the order of the output, and what forbids it.

    `base` and `tuned` are the sources, brought to one layout: the same names and cuts in both,
    which may be views of the files' bytes. `tuned` is an Adapter when its delta is to be merged
    into the base. `notes` tell what was done beyond the selection, `config` the entries of the
    tuned model's config.json that must change.
    """

    selection: Selection
    base: Checkpoint
    tuned: Checkpoint | Adapter
    decisions: tuple[Decision, ...]
    faults: tuple[str, ...]
    notes: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)

    def stored(self, decision: Decision) -> Tensor:
        """The dtype and shape of an output tensor, in the file where it belongs."""
        tensor = self.base.tensors[decision.name]
        if decision.source is not Origin.TUNED or not isinstance(self.tuned, Checkpoint):
            return tensor
        taken = self.tuned.tensors[decision.name]
        return dataclasses.replace(taken, file=tensor.file)

    @property
    def totals(self) -> dict[str, dict[str, int]]:
        """Per kind, and for `all`: tensors, parameters, and bytes by origin."""
        empty = {"tensors": 0, "parameters": 0} | {origin.value: 0 for origin in Origin}
        totals: dict[str, dict[str, int]] = {}
        for decision in self.decisions:
            for key in (decision.address.kind.value, "all"):
                row = totals.setdefault(key, dict(empty))
                row["tensors"] += 1
                row["parameters"] += decision.parameters
                row[decision.source.value] += decision.bytes
        everything = totals.pop("all", empty)
        return totals | {"all": everything}

    def refuse_faults(self) -> None:
        """Raise MismatchError with every fault, if there is one."""
        if self.faults:
            raise MismatchError(
                f"{self.tuned.text} cannot be spliced into {self.base.text}", self.faults
            )

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values, as `taia plan --json` prints it."""
        return {
            "selection": str(self.selection),
            "base": self.base.text,
            "tuned": self.tuned.text,
            "tensors": [_as_json(decision) for decision in self.decisions],
            "totals": self.totals,
            "faults": list(self.faults),
            "notes": list(self.notes),
        }


def plan(
    base: str | Path | Source, tuned: str | Path | Source, keep: str | Selection = "attention"
) -> Plan:
    """Decide, for every tensor of `base`, how much of the delta to `tuned` is kept.

    `tuned` is a checkpoint of the same architecture or a LoRA adapter. Raises a TaiaError
    for what cannot be read or parsed; contradictions between the two are `Plan.faults`.
    """
    selection = Selection.parse(keep)
    first = _open(base)
    found = resolve(tuned, headers_only=True)
    if found.form is Form.ADAPTER:
        from taia.adapter import read_adapter

        adapter = read_adapter(found).of(first.model_type, shapes_of(first))
        return _plan_merge(first, adapter, selection)
    return _plan_pair(first, _open(found), selection)


def _open(source: str | Path | Source) -> Checkpoint:
    """A checkpoint; one in a GGUF file is first unpacked into the cache, once."""
    found = resolve(source, headers_only=True)
    if found.form is not Form.GGUF:
        return open_checkpoint(found)
    from taia.load import materialise

    return dataclasses.replace(open_checkpoint(materialise(found)), text=found.text)


def _plan_pair(base: Checkpoint, tuned: Checkpoint, selection: Selection) -> Plan:
    if base.model_type != tuned.model_type:
        return Plan(selection, base, tuned, (), (
            f"model types differ: base {base.model_type}, tuned {tuned.model_type}",
        ))  # fmt: skip
    faults = format_faults(base, tuned)
    base, tuned, crossed = align(base, tuned)
    base, tuned, notes = untie(base, tuned)
    parted = bool(notes)
    tuned, told, missing = left_over(base, tuned)
    faults += crossed + missing
    addresses = classify_all(base.tensors, base.model_type)
    strengths, tie_faults = _strengths(base, addresses, selection)
    if is_quantised(base):
        faults += module_faults(base.tensors, {n: strengths[a] for n, a in addresses.items()})
    decisions = []
    for name, address in addresses.items():
        tensor, other = base.tensors[name], tuned.tensors.get(name)
        strength = strengths[address]
        if other is None:  # transformers does not load it, or it is one of the faults
            strength = 0.0
        elif tensor.shape != other.shape or tensor.dtype != other.dtype or strength not in (0, 1):
            faults += _tensor_faults(tensor, other, address, strength)
        origin = WHOLE.get(strength, Origin.BLEND)
        stored = other if origin is Origin.TUNED and other is not None else tensor
        decisions.append(_decision(stored, address, origin, strength))
    ends = {addresses[name]: name for name in addresses if addresses[name].kind in ENDS}
    heads = [name for a, name in ends.items() if a.kind is Kind.HEAD and a.tower == "language"]
    parted = parted or len({strengths[address] for address in ends}) > 1
    return Plan(
        selection, base, tuned, tuple(decisions), tuple(faults + tie_faults),
        notes=tuple(notes + told), config=tie_setting(tuned, heads, parted=parted),
    )  # fmt: skip


def _plan_merge(base: Checkpoint, adapter: Adapter, selection: Selection) -> Plan:
    """Tensors that the adapter does not touch are the base's at any strength."""
    from taia.vectors import TokenRows

    addresses = classify_all(base.tensors, base.model_type)
    strengths, tie_faults = _strengths(base, addresses, selection)
    lora = {stored_name(base, m.weight): m for m in adapter.modules.values()}
    whole = {stored_name(base, name): tensor for name, tensor in adapter.whole.items()}
    faults = [_unplaced(name) for name in [*lora, *whole] if name not in base.tensors]
    decisions = []
    for name, address in addresses.items():
        strength, tensor = strengths[address], base.tensors[name]
        origin = Origin.BASE
        if name in lora or name in whole:
            shape = lora[name].shape if name in lora else whole[name].shape
            if strength != 0 or (shape != tensor.shape and address.kind in ENDS):
                tied = not isinstance(lora.get(name), TokenRows)  # those change both ends
                tied = tied and _is_tied(base, tensor, addresses.values())
                faults += _merge_faults(base, tensor, shape, address, tied=tied)
        if strength != 0 and isinstance(lora.get(name), Experts):
            faults.append(f"{name}: {NO_DELTA}")
        if strength != 0 and (name in lora or name in whole):
            exact = name in whole and strength == 1 and whole[name].dtype == tensor.dtype
            origin = Origin.TUNED if exact else Origin.BLEND
        decisions.append(_decision(tensor, address, origin, strength))
    kept = any(decision.source is not Origin.BASE for decision in decisions)
    if any(strengths.values()) and not kept and not faults:
        kinds = sorted({addresses[name].kind.value for name in [*lora, *whole]})
        faults.append(
            f"nothing of the adapter is kept: it changes {', '.join(kinds)}, the selection "
            f"'{selection}' names other parts, and the result would be the base model"
        )
    return Plan(selection, base, adapter, tuple(decisions), tuple(faults + tie_faults))


def _unplaced(name: str) -> str:
    """The fault of a changed weight that the base does not store."""
    if name.rpartition(".")[0].endswith(("lm_head", "embed_out")):
        return f"{name}: the base's head is tied to its embedding; untie it before merging"
    if name.endswith(".bias"):
        return f"{name}: changed by the adapter, and the base has no such bias; slice or attach it"
    return f"{name}: changed by the adapter, not stored in the base: it was made for another model"


def _is_tied(base: Checkpoint, tensor: Tensor, addresses: Collection[Address]) -> bool:
    """Whether `tensor` is the token embedding of a base that stores no head of its own."""
    words = base.config.get("vocab_size", text_config(base.config).get("vocab_size", 0))
    heads = any(address.kind is Kind.HEAD for address in addresses)
    return not heads and tensor.shape[:1] == (words,)


def stored_name(base: Checkpoint, name: str) -> str:
    """The name under which `base` stores a weight; it may lack, or add, the leading module."""
    if name in base.tensors:
        return name
    _, _, rest = name.partition(".")
    candidates = [rest, *(f"{first}.{name}" for first in ("model", "transformer", "gpt_neox"))]
    return next((candidate for candidate in candidates if candidate in base.tensors), name)


def shapes_of(base: Checkpoint) -> Shapes:
    """The shape under which `base` stores a weight, by the name that an adapter gives it."""

    def shape(name: str) -> tuple[int, ...] | None:
        tensor = base.tensors.get(stored_name(base, name))
        return None if tensor is None else tensor.shape

    return shape


def _strengths(
    base: Checkpoint, addresses: Mapping[str, Address], selection: Selection
) -> tuple[dict[Address, float], list[str]]:
    """The strength of every address, and the fault of a tied head with two strengths.

    A head that is not stored is tied to the embedding, and takes part under its own name.
    """
    there = list(dict.fromkeys(addresses.values()))
    embedding = next((a for a in there if a.kind is Kind.EMBEDDING and a.tower == "language"), None)
    tied = embedding is not None and all(a.kind is not Kind.HEAD for a in there)
    if embedding is None or not tied:
        return selection.strengths(there), []
    head = dataclasses.replace(embedding, kind=Kind.HEAD)
    strengths = selection.strengths([*there, head])
    if strengths[head] == strengths[embedding]:
        return strengths, []
    return strengths, [
        f"{base.text}: the output head is tied to the embedding, one tensor for both, and the "
        "selection gives it two strengths; name both alike, as in 'all - embedding - head'"
    ]


def _tensor_faults(base: Tensor, tuned: Tensor, address: Address, strength: float) -> list[str]:
    """What forbids to take `strength` of a delta between tensors that are not alike."""
    faults = []
    resized = address.kind in ENDS and base.shape[1:] == tuned.shape[1:]
    allowed = (resized and strength == 1) or (is_text(base.name) and strength in (0, 1))
    if base.shape != tuned.shape and not allowed:
        faults.append(
            f"{base.name}: shapes differ: base {list(base.shape)}, tuned {list(tuned.shape)}"
        )
        if resized:
            faults[-1] += (
                "; the vocabulary was resized, and its new rows have no base. Keep all of it, as "
                "in 'attention + embedding + head', or resize the base's alike"
            )
    if base.dtype != tuned.dtype:
        faults.append(
            f"{base.name}: dtypes differ: base {base.dtype}, tuned {tuned.dtype}; "
            "save both in one dtype"
        )
    elif strength not in (0, 1) and base.dtype not in FLOATS:
        faults.append(f"{base.name}: dtype {base.dtype} is taken whole, not at {strength:g}")
    return faults


def _merge_faults(
    base: Checkpoint, tensor: Tensor, shape: tuple[int, ...], address: Address, *, tied: bool
) -> list[str]:
    faults = []
    if shape != tensor.shape:
        faults.append(
            f"{tensor.name}: shapes differ: base {list(tensor.shape)}, adapter {list(shape)}"
        )
    if tensor.dtype not in FLOATS or base.config.get("quantization_config"):
        faults.append(
            f"{tensor.name}: a delta cannot be added to quantised weights, dtype {tensor.dtype}"
        )
    if address.kind is Kind.EMBEDDING and tied:
        faults.append(
            f"{tensor.name}: input and output share this tensor, the adapter changes one of them; "
            "untie them before merging"
        )
    return faults


def _decision(tensor: Tensor, address: Address, origin: Origin, strength: float) -> Decision:
    return Decision(tensor.name, address, origin, strength, tensor.bytes, tensor.parameters)


def _as_json(decision: Decision) -> dict[str, Any]:
    address = decision.address
    return {
        "name": decision.name,
        "kind": address.kind.value,
        "layer": address.layer,
        "projection": address.projection,
        "tower": address.tower,
        "source": decision.source.value,
        "strength": decision.strength,
        "bytes": decision.bytes,
    }
