"""The part of a Transformer that a tensor belongs to, from its name and the model type.

A name alone proves little (`c_proj` is attention and feed-forward in GPT-2), so
`classify` looks it up in a table, kinds.jsonl, that `tools/derive_kinds.py` derived
from the module structure of every model of transformers that has a text decoder. Both
the names of a live model and those of its files are in it (transformers saves some
families in an older layout), with and without the prefix of the base model.
docs/kinds.md states the rules.

A model type that the table does not know is derived on the spot, from the checkpoint's
config.json, where the installed transformers knows it; else the message says what to
install. Code that comes with weights is never run.

Limits: a few families (kimi_linear, bailing_hybrid) give an attention and a
linear-attention mixer the same names, layer by layer; there `classify_all`, which sees
the whole checkpoint, tells them apart, and `classify` refuses to guess.

Nothing here imports torch or transformers unless a model type is derived. One line of
the table is parsed for a model type; after that a name costs a few microseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any

from taia.errors import FAULTS_SHOWN, KindError, nearest
from taia.kind_table import (
    SUFFIX,
    Family,
    Row,
    families,
    family,
    generalise,
    keys,
    known_types,
    read_family,
)

__all__ = [
    "Address",
    "Kind",
    "classify",
    "classify_all",
    "classify_by_agreement",
    "is_extra_layer",
    "model_types",
]


class Kind(StrEnum):
    """The part of a Transformer that a tensor belongs to.

    A norm inside an attention module (`q_norm`, `kv_a_layernorm`) is attention; a
    router is a router wherever it stands.
    """

    ATTENTION = "attention"
    FFN = "ffn"
    ROUTER = "router"
    NORM = "norm"
    EMBEDDING = "embedding"
    HEAD = "head"
    MIXER = "mixer"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Address:
    """Where a tensor stands. A bias has the address of its weight.

    kind: the part of the model.
    layer: index of the layer in its tower, counted from 0; None outside of its layers.
    projection: `q k v o` in attention, `gate up down` in ffn (`gate` also for a gate on
        the output of an attention); None for anything else. Fused tensors have names of
        their own: `qkv`, `kv` (also MLA's kv_a and kv_b), `gate_up`.
    tower: `language`, `encoder` (of an encoder-decoder over text), `vision`, `audio`,
        `projector` (what carries one tower's states into another) or `generator` (what
        makes sound, images or actions). A layer of a tower is one place in the model: where
        a tower has several stacks of layers, only the largest is numbered.

    Addresses sort by tower, layer (none first), kind and projection.
    """

    kind: Kind
    layer: int | None
    projection: str | None
    tower: str

    def __lt__(self, other: Address) -> bool:
        return self._order() < other._order()

    def _order(self) -> tuple[str, int, str, str]:
        layer = -1 if self.layer is None else self.layer
        return (self.tower, layer, self.kind.value, self.projection or "")


MAX_LAYERS = 100_000
"""Names come from outside; a layer beyond this would fill the memory with layers."""


def classify(name: str, model_type: str, config: Mapping[str, Any] | None = None) -> Address:
    """The address of a tensor, by the name it has in a file or in a live model.

    name: for instance "model.layers.0.mlp.up_proj.weight"; a leading base-model prefix
        ("model.", "transformer.") may be missing.
    model_type: `model_type` of the model's config.json, for instance "llama".
    config: the config.json, which tells how many layers are real.

    Raises KindError for a model type or a name that the table does not know, and for a
    name whose kind depends on its layer (see `classify_all`).
    """
    table = _family(model_type, None)
    found, integers = table.find(name, depth=_depth(config))
    if isinstance(found, Row):
        return _address(found, integers)
    if found is None:
        raise KindError(_unknown_name(name, model_type, table))
    raise KindError(
        f"{name}: in {model_type} this is attention in some layers and a mixer in others. "
        "Classify all names of the checkpoint together, with classify_all"
    )


def classify_all(
    names: Iterable[str], model_type: str, config: Mapping[str, Any] | None = None
) -> dict[str, Address]:
    """The addresses of all tensors of one checkpoint, in the order given.

    Names that mean different things in different layers are told apart by what else
    their layer holds.

    config: the checkpoint's config.json. It tells how many layers the model has; and where
        the shipped table does not know the model type, or not all of the names, the table is
        derived from it, if transformers is installed.

    Raises KindError with every name that is not known.
    """
    listed = list(names)
    table = _family(model_type, config)
    depth = _depth(config)
    found = _addresses(listed, table, depth)
    asked = ""
    if None in found.values() and config and model_type in known_types():
        told = _derive(model_type, config)
        if isinstance(told, str):
            asked = f". {told}"
        else:
            again = _addresses(listed, told, depth)
            found = {name: again[name] if at is None else at for name, at in found.items()}
    lost = [name for name, address in found.items() if address is None]
    far = [
        f"{name}: layer {address.layer:,}; no model has {MAX_LAYERS:,} layers"
        for name, address in found.items()
        if address is not None and address.layer is not None and address.layer >= MAX_LAYERS
    ]
    if far:
        raise KindError(f"{len(far)} of {len(listed)} tensor names are unknown", far)
    if lost:
        hinted = [_unknown_name(name, model_type, table) for name in lost[:FAULTS_SHOWN]]
        rest = [f"{name}: not the name of a tensor of {model_type}" for name in lost[FAULTS_SHOWN:]]
        raise KindError(
            f"{len(lost)} of {len(listed)} tensor names are unknown{asked}", hinted + rest
        )
    return {name: address for name, address in found.items() if address is not None}


def is_extra_layer(name: str, model_type: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor is of a layer behind the last one, which transformers does not load.

    Raises KindError for a model type that the table does not know.
    """
    return _family(model_type, None).is_extra(name, _depth(config))


def classify_by_agreement(name: str) -> Address:
    """The address of a tensor when the model type is not known.

    Returns it where every model type that has this name gives the same address. Hybrid
    model types, which give linear-attention mixers the names of attention (`q_proj`),
    are asked only about names that no other type has.
    Raises KindError where none has the name, or where they differ.
    """
    answers: dict[bool, dict[Address, str]] = {False: {}, True: {}}
    for model_type, table in families():
        found, integers = table.find(name, exact=True)
        if isinstance(found, Row):
            answers[table.hybrid].setdefault(_address(found, integers), model_type)
    asked = answers[False] or answers[True]
    if len(asked) == 1:
        return next(iter(asked))
    if not asked:
        raise KindError(f"{name}: no known model type has a tensor of this name")
    told = ", ".join(
        f"{address.projection or address.kind} in {owner}" for address, owner in asked.items()
    )
    raise KindError(f"{name}: model types differ on it ({told}). Give the base model")


def model_types() -> tuple[str, ...]:
    """Every model type of the shipped table, sorted."""
    return tuple(sorted(known_types()))


def _addresses(
    names: list[str], table: Family, depth: int | None = None
) -> dict[str, Address | None]:
    """The address of each name; None for one that the family does not have."""
    present = _present(names, table) if table.ambiguous else frozenset()
    found: dict[str, Address | None] = {}
    for name in names:
        row, integers = table.find(name, depth=depth)
        if isinstance(row, list):
            held = [
                choice.row
                for choice in row
                if any((marker, integers) in present for marker in choice.markers)
            ]
            row = held[0] if len(held) == 1 else None
        found[name] = _address(row, integers) if isinstance(row, Row) else None
    return found


def _present(names: list[str], table: Family) -> frozenset[tuple[str, tuple[int, ...]]]:
    """Every key that a name may have, with its integers."""
    generalised = [generalise(name) for name in names]
    asked = {pattern: keys(pattern, table.prefix) for pattern, _ in generalised}
    return frozenset((key, integers) for pattern, integers in generalised for key in asked[pattern])


def _address(row: Row, integers: tuple[int, ...]) -> Address:
    return _shared(row, None if row.at is None else integers[row.at] + row.offset)


@lru_cache(maxsize=65536)
def _shared(row: Row, layer: int | None) -> Address:
    """One value for all tensors of one address: a checkpoint has a hundred for each."""
    return Address(Kind(row.kind), layer, row.projection, row.tower)


def _family(model_type: str, config: Mapping[str, Any] | None) -> Family:
    line = known_types().get(model_type)
    if line is not None:
        return family(line)
    told = _derive(model_type, config)
    if isinstance(told, Family):
        return told
    raise KindError(
        f"{model_type}: not a model type of taia's table{nearest(model_type, known_types())} {told}"
    )


def _depth(config: Mapping[str, Any] | None) -> int | None:
    """How many layers the language model has; None where its config does not tell."""
    for part in ((config or {}).get("text_config"), config):
        depth = part.get("num_hidden_layers") if isinstance(part, Mapping) else None
        if isinstance(depth, int) and not isinstance(depth, bool) and depth > 0:
            return depth
    return None


def _derive(model_type: str, config: Mapping[str, Any] | None) -> Family | str:
    """The family as transformers builds it, or what stands against that and how to mend it."""
    from taia.derivation.spot import derived_table

    told = derived_table(model_type, config)
    return told if isinstance(told, str) else read_family(told)


def _unknown_name(name: str, model_type: str, table: Family) -> str:
    stem = SUFFIX.sub("", generalise(name)[0])
    hint = nearest(stem, [*table.rows, *table.split, *table.ambiguous])
    return f"{name}: not the name of a tensor of {model_type}{hint}"
