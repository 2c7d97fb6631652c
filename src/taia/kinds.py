"""The part of a Transformer that a tensor belongs to, from its name and the model type.

A name alone proves little (`c_proj` is attention and feed-forward in GPT-2), so
`classify` looks it up in a table, kinds.json, that `tools/derive_kinds.py` derived
from the module structure of every causal language model of transformers. Both the
names of a live model and those of its files are in it (transformers saves some
families in an older layout), with and without the prefix of the base model.

Limits: only model types that transformers has. Models whose code comes with their
weights are not in the table. Two families (kimi_linear, bailing_hybrid) give an
attention and a linear-attention mixer the same names, layer by layer; there
`classify_all`, which sees the whole checkpoint, tells them apart, and `classify`
refuses to guess.

Nothing here imports torch or transformers. The table is read once, in a few
milliseconds; after that a name costs a few dictionary look-ups.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

from taia.errors import KindError, nearest

__all__ = [
    "Address",
    "Kind",
    "classify",
    "classify_all",
    "classify_by_agreement",
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
    layer: index of the layer in its tower, counted from 0; None outside of layers.
    projection: `q k v o` in attention, `gate up down` in ffn (`gate` also for a gate on
        the output of an attention); None for anything else. Fused tensors have names of
        their own: `qkv`, `kv` (also MLA's kv_a and kv_b), `gate_up`.
    tower: `language`, `vision`, `audio` or `projector`.

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


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of the table. `at`: which integer of the name is the layer, less `offset`."""

    kind: Kind
    projection: str | None
    tower: str
    at: int | None
    offset: int

    def address(self, integers: tuple[int, ...]) -> Address:
        layer = None if self.at is None else integers[self.at] + self.offset
        return Address(self.kind, layer, self.projection, self.tower)


@dataclass(frozen=True, slots=True)
class _Family:
    """The names of one model type: pattern -> row, and what those patterns miss.

    prefix: the base model's attribute, which some files leave out of every name.
    ambiguous: pattern -> [(row, markers)]: a row holds where its layer has a marker.
    extra: expressions for layers behind the last one, which transformers does not load
        (multi-token prediction). They have the names of a layer, and are `other`.
    dropped: expressions for other tensors that transformers does not load.
    hybrid: some of its layers hold a mixer in place of attention.
    """

    prefix: str
    rows: dict[str, _Row]
    ambiguous: dict[str, list[tuple[_Row, list[str]]]]
    extra: tuple[re.Pattern[str], ...]
    dropped: tuple[re.Pattern[str], ...]
    hybrid: bool


INTEGER = re.compile(r"(?<![^.])\d+(?![^.])")
"""A whole part of a dotted name that is a number: a layer, an expert."""

SUFFIX = re.compile(
    r"\.(weight|bias|inv_freq|masked_bias"
    # what quantisers store beside a weight: bitsandbytes, GPTQ, AWQ, FP8, compressed-tensors
    r"|weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+)"
    r"|qweight|qzeros|scales|g_idx|SCB|weight_format"
    r"|weight_(packed|shape|scale|scale_inv|zero_point|g_idx|global_scale|scale_2)"
    r"|(input|output|k|v|q)_(scale|zero_point|global_scale)|activation_scale)$"
)
"""The end of a name that is not part of its module's name. Such tensors share its address."""

BLOCKS = re.compile(r"_(blocks|scales|bias|scale|scale_inv)$")
"""The same for a parameter that its module holds under another name (gpt-oss experts)."""


MAX_LAYERS = 100_000
"""Names come from outside; a layer beyond this would fill the memory with layers."""

NOT_LOADED = Address(Kind.OTHER, None, None, "language")
"""The address of what a file holds and transformers does not load."""


def classify(name: str, model_type: str) -> Address:
    """The address of a tensor, by the name it has in a file or in a live model.

    name: for instance "model.layers.0.mlp.up_proj.weight"; a leading base-model prefix
        ("model.", "transformer.") may be missing.
    model_type: `model_type` of the model's config.json, for instance "llama".

    Raises KindError for a model type or a name that the table does not know, and for a
    name whose kind depends on its layer (see `classify_all`).
    """
    family = _family(model_type)
    found = _find(name, family)
    if found is None:
        raise KindError(_unknown_name(name, model_type, family))
    if isinstance(found, Address):
        return found
    raise KindError(
        f"{name}: in {model_type} this is attention in some layers and a mixer in others. "
        "Classify all names of the checkpoint together, with classify_all"
    )


def classify_all(names: Iterable[str], model_type: str) -> dict[str, Address]:
    """The addresses of all tensors of one checkpoint, in the order given.

    Names that mean different things in different layers are told apart by what else
    their layer holds. Raises KindError with every name that the table does not know.
    """
    family = _family(model_type)
    listed = list(names)
    present = {(key, integers) for name in listed for key, integers in _keys(name, family.prefix)}
    found: dict[str, Address] = {}
    faults: list[str] = []
    for name in listed:
        address = _find(name, family)
        if isinstance(address, list):
            held = [
                row.address(integers)
                for row, markers, integers in address
                if any((marker, integers) in present for marker in markers)
            ]
            address = held[0] if len(held) == 1 else None
        if address is None:
            faults.append(_unknown_name(name, model_type, family))
        elif address.layer is not None and address.layer >= MAX_LAYERS:
            faults.append(f"{name}: layer {address.layer:,}; no model has {MAX_LAYERS:,} layers")
        else:
            found[name] = address
    if faults:
        raise KindError(f"{len(faults)} of {len(listed)} tensor names are unknown", faults)
    return found


def classify_by_agreement(name: str) -> Address:
    """The address of a tensor when the model type is not known.

    Returns it where every model type that has this name gives the same address. Hybrid
    model types, which give linear-attention mixers the names of attention (`q_proj`),
    are asked only about names that no other type has.
    Raises KindError where none has the name, or where they differ.
    """
    answers: dict[bool, dict[Address, str]] = {False: {}, True: {}}
    for model_type, family in _families().items():
        found = _find(name, family, exact=True)
        if isinstance(found, Address):
            answers[family.hybrid].setdefault(found, model_type)
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
    """Every model type of the table, sorted."""
    return tuple(sorted(_table()["models"]))


def _find(
    name: str, family: _Family, *, exact: bool = False
) -> Address | list[tuple[_Row, list[str], tuple[int, ...]]] | None:
    """An address, the alternatives of an ambiguous name, or None."""
    if not exact and any(pattern.search(name) for pattern in family.extra):
        return NOT_LOADED
    for key, integers in _keys(name, "" if exact else family.prefix):
        row = family.rows.get(key)
        if row is not None:
            return row.address(integers)
        if key in family.ambiguous:
            return [(row, markers, integers) for row, markers in family.ambiguous[key]]
    if not exact and any(pattern.search(name) for pattern in family.dropped):
        return NOT_LOADED
    return None


def _keys(name: str, prefix: str) -> list[tuple[str, tuple[int, ...]]]:
    """The table keys that a name may have, most specific first, with its integers."""
    integers = tuple(int(number) for number in INTEGER.findall(name))
    pattern = INTEGER.sub("*", name)
    stems = [pattern]
    for suffix in (SUFFIX, BLOCKS):
        stem = suffix.sub("", pattern)
        if stem != pattern:
            stems.insert(0, stem)
    if prefix:
        stems += [f"{prefix}.{stem}" for stem in stems] + [
            stem.removeprefix(f"{prefix}.") for stem in stems if stem.startswith(f"{prefix}.")
        ]
    return [(stem, integers) for stem in stems]


@cache
def _table() -> dict[str, Any]:
    text = Path(__file__).with_name("kinds.json").read_text(encoding="utf-8")
    table: dict[str, Any] = json.loads(text)
    return table


def _family(model_type: str) -> _Family:
    index = _table()["models"].get(model_type)
    if index is None:
        raise KindError(
            f"{model_type}: not a model type that taia knows"
            f"{nearest(model_type, _table()['models'])} "
            f"It knows {len(_table()['models'])} causal language models of transformers"
        )
    return _read_family(index)


def _families() -> dict[str, _Family]:
    """One model type a table entry (equal tables are stored once)."""
    owners: dict[int, str] = {}
    for model_type, index in _table()["models"].items():
        owners.setdefault(index, model_type)
    return {owner: _read_family(index) for index, owner in owners.items()}


@cache
def _read_family(index: int) -> _Family:
    entry = _table()["families"][index]
    rows = {key: _row(text) for text, keys in entry["rows"].items() for key in keys}
    ambiguous = {
        key: [(_row(text), markers) for text, markers in choices.items()]
        for key, choices in entry.get("ambiguous", {}).items()
    }
    extra = tuple(re.compile(text) for text in entry.get("extra", ()))
    dropped = tuple(re.compile(text) for text in entry.get("dropped", ()))
    hybrid = any(text.startswith("mixer/") for text in entry["rows"])
    return _Family(entry["prefix"], rows, ambiguous, extra, dropped, hybrid)


def _row(text: str) -> _Row:
    """A row from "kind/projection/tower/at/offset", where absent parts are empty."""
    kind, projection, tower, at, offset = text.split("/")
    return _Row(Kind(kind), projection or None, tower, int(at) if at else None, int(offset or 0))


def _unknown_name(name: str, model_type: str, family: _Family) -> str:
    stem = SUFFIX.sub("", INTEGER.sub("*", name))
    hint = nearest(stem, [*family.rows, *family.ambiguous])
    return f"{name}: not the name of a tensor of {model_type}{hint}"
