"""The part of a model that a tensor of a GGUF file belongs to, from its name.

llama.cpp has one set of names for all architectures (`blk.7.attn_q.weight`), so one table,
gguf_kinds.json, holds them. `tools/derive_gguf_kinds.py` derives it from the constants of the
gguf library, with one rule a tensor, so that a selection means what it means on the checkpoint
that the file was made from. `attn_norm` and `ffn_norm` are norms, `attn_q_norm` is attention,
`ffn_gate_inp` is a router; the factors of rotary embeddings (`rope_freqs`) are attention.

Hybrid models call the projections of a linear-attention mixer `attn_qkv` and `attn_gate`;
there a layer that holds `ssm_a` is a mixer's. Where `ffn_up` holds the rows of gate and up it is
`gate_up`.

Limits: architectures and names that the library knows. Neither numpy nor the library itself is
imported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from taia.errors import KindError, nearest
from taia.kinds import Address, Kind

__all__ = ["architectures", "classify_gguf", "quantisation_types"]

INTEGER = re.compile(r"(?<![^.])\d{1,9}(?![^.])")
SUFFIX = re.compile(r"\.(weight|bias|scale|input_scale)$")
EXPERT = re.compile(r"(?<=\.ffn_(?:gate|down))\.\*$|(?<=\.ffn_up)\.\*$")
"""Older files number the experts, where newer ones stack them."""

MARKER = "blk.*.ssm_a"
"""What every layer with such a mixer holds, and no layer with attention."""

UP = "blk.*.ffn_up"


@dataclass(frozen=True, slots=True)
class _Row:
    kind: Kind
    projection: str | None
    tower: str
    layered: bool


def classify_gguf(
    names: Iterable[str], architecture: str, *, layers: int | None = None
) -> dict[str, Address]:
    """The addresses of all tensors of one GGUF file, in the order given.

    `architecture` is `general.architecture`. `layers`: how many of its blocks the model runs;
    those behind them predict further tokens, and are `other`. None: all.
    Raises KindError for an unknown architecture, and with every unknown name.
    """
    if architecture not in architectures():
        raise KindError(
            f"{architecture}: not an architecture of llama.cpp that taia knows"
            f"{nearest(architecture, architectures())}"
        )
    listed = list(names)
    mixed = frozenset(_table()["mixed"].get(architecture, ()))
    mixers = {_layer(name) for name in listed if mixed and _stem(name) == MARKER}
    fused = architecture in _table()["fused"]
    found: dict[str, Address] = {}
    faults: list[str] = []
    for name in listed:
        stem = _stem(name)
        row = _rows().get(stem)
        if row is None:
            hint = nearest(stem, _rows())
            faults.append(f"{name}: not the name of a tensor of llama.cpp{hint}")
            continue
        layer = _layer(name) if row.layered else None
        if layers is not None and layer is not None and layer >= layers:
            found[name] = Address(Kind.OTHER, None, None, "language")
        elif stem in mixed and layer in mixers:
            found[name] = Address(Kind.MIXER, layer, None, row.tower)
        else:
            projection = "gate_up" if fused and stem == UP else row.projection
            found[name] = Address(row.kind, layer, projection, row.tower)
    if faults:
        raise KindError(f"{len(faults)} of {len(listed)} tensor names are unknown", faults)
    return found


def architectures() -> tuple[str, ...]:
    """Every architecture of the table, sorted."""
    return tuple(_table()["architectures"])


@cache
def quantisation_types() -> dict[int, tuple[str, int, int]]:
    """Type number -> name, elements a block, bytes a block."""
    types: dict[str, tuple[str, int, int]] = _table()["types"]
    return {int(number): (name, block, width) for number, (name, block, width) in types.items()}


def _stem(name: str) -> str:
    """The name as the table has it: numbers as stars, without the suffix."""
    pattern = INTEGER.sub("*", name)
    return pattern if pattern in _rows() else EXPERT.sub("", SUFFIX.sub("", pattern))


def _layer(name: str) -> int | None:
    number = INTEGER.search(name)
    return int(number[0]) if number else None


@cache
def _table() -> dict[str, Any]:
    text = resources.files("taia").joinpath("gguf_kinds.json").read_text(encoding="utf-8")
    table: dict[str, Any] = json.loads(text)
    return table


@cache
def _rows() -> dict[str, _Row]:
    return {name: _row(text) for text, names in _table()["tensors"].items() for name in names}


def _row(text: str) -> _Row:
    """A row from "kind/projection/tower/layer", where absent parts are empty."""
    kind, projection, tower, layered = text.split("/")
    return _Row(Kind(kind), projection or None, tower, bool(layered))
