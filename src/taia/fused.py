"""Which rows of a fused tensor belong to which projection.

Many families compute q, k and v (or gate and up) with one matrix. A selection may still name
one of them: `attention.q`, `ffn.up`. Which rows that is depends on the family: blocks one after
the other, head by head, in groups of heads, interleaved row by row. The table fused.json states
it, and `tools/derive_fused.py`, which writes it, asks each family's own forward pass about every
row.

A family that is not in the table is not guessed at: its fused tensors are kept as a whole, and
a selection that gives their parts different strengths is refused.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from taia.kinds import Address
from taia.layouts import family_of, place_of
from taia.selection import PARTS, Selection

__all__ = ["RULES", "Cut", "Parts", "cut_of", "cut_rule", "part_strengths"]

RULES = ("equal", "interleaved", "blocks", "heads", "groups", "queries", "falcon",
         "bigcode", "codegen")  # fmt: skip
"""How the rows of a fused tensor are shared out.

equal: blocks of one size. interleaved: rows in turn. blocks: all q, all k, all v. heads: q,
k, v of one head after the other. groups: the queries of one key-value head, its key, its value.
queries: blocks, with one key-value head. codegen: q, v, k for each of four devices. falcon,
bigcode: one of those, as switches of the config say.
"""

SWITCHES = {"falcon": ("multi_query", "new_decoder_architecture"), "bigcode": ("multi_query",)}

HEADS = ("num_attention_heads", "n_head", "n_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_n_heads")
PARALLEL = 4
"""CodeGen stores its rows for four tensor-parallel devices, whatever runs them."""

Parts = tuple[tuple[str, float], ...]
"""The strength of each part of a fused tensor."""


@dataclass(frozen=True, slots=True)
class Cut:
    """The rows of a fused tensor: along `axis`, `groups` times the same sequence of parts.

    parts: (projection, rows in one group), in their order.
    """

    axis: int
    groups: int
    parts: tuple[tuple[str, int], ...]

    @property
    def length(self) -> int:
        """Rows in all."""
        return self.groups * sum(rows for _, rows in self.parts)

    def spans(self) -> list[tuple[int, int, str]]:
        """(first row, row behind the last, projection), in order."""
        found, position = [], 0
        for _ in range(self.groups):
            for projection, rows in self.parts:
                found.append((position, position + rows, projection))
                position += rows
        return found

    def mean(self, strengths: Mapping[str, float]) -> float:
        """The mean strength of the rows."""
        rows = sum(count for _, count in self.parts)
        return sum(strengths[part] * count for part, count in self.parts) / rows


def part_strengths(
    selection: Selection, addresses: Collection[Address], layers: int | None = None
) -> tuple[dict[Address, float], dict[Address, Parts]]:
    """The strength of every address, and for fused ones whose parts differ those of the parts.

    A fused address takes part as its projections, so that a term may name one of them. Raises
    SelectionError as `Selection.strengths` does.
    """
    asked: list[Address] = []
    for address in dict.fromkeys(addresses):
        asked += parts_of(address).values() or [address]
    found = selection.strengths(asked, layers)
    whole: dict[Address, float] = {}
    parted: dict[Address, Parts] = {}
    for address in dict.fromkeys(addresses):
        parts = parts_of(address)
        strengths = {found[part] for part in parts.values()} if parts else {found[address]}
        if len(strengths) == 1:
            whole[address] = strengths.pop()
        else:
            parted[address] = tuple((name, found[part]) for name, part in parts.items())
    return whole, parted


def parts_of(address: Address) -> dict[str, Address]:
    """Projection -> address, of what a fused address holds; empty for any other."""
    names: Iterable[str] = PARTS.get(address.projection or "", ())
    return {name: dataclasses.replace(address, projection=name) for name in names}


def cut_of(
    name: str, shape: tuple[int, ...], address: Address, model_type: str, config: Mapping[str, Any]
) -> Cut | None:
    """How a stored fused tensor is cut; None where that is not known.

    name, shape: as stored. config: config.json of its checkpoint.
    """
    place = place_of(name, family_of(model_type, config))
    if place.operations:
        return None
    key = place.lives[0]
    leaf = key.removesuffix(".bias").removesuffix(".weight").rpartition(".")[2]
    dimensions = 2 if key.endswith(".bias") else len(shape)
    rule = _table().get(model_type, {}).get(f"{leaf}/{dimensions}")
    if rule is None:
        return None
    return cut_rule(rule, shape, address, config)


def cut_rule(
    rule: str, shape: tuple[int, ...], address: Address, config: Mapping[str, Any]
) -> Cut | None:
    """A rule of the table ("blocks 0": rule and axis) applied to one tensor.

    None where the config does not state the numbers that the rule needs, or they do not fit.
    """
    name, axis = rule.split()
    tower = config.get("text_config" if address.tower == "language" else "vision_config")
    values = tower if isinstance(tower, dict) else config
    if not all(isinstance(values.get(key), bool) for key in SWITCHES.get(name, ())):
        return None
    multi, grouped = (bool(values.get(key)) for key in ("multi_query", "new_decoder_architecture"))
    if name in SWITCHES:
        name = "groups" if grouped else "queries" if multi else "heads"
    bias = len(shape) == 1
    return _cut(name, 0 if bias else int(axis), shape, address.projection or "", _counts(values))


@lru_cache
def _cut(
    rule: str, axis: int, shape: tuple[int, ...], projection: str, counts: tuple[int, int]
) -> Cut | None:
    names = PARTS[projection]
    heads, kv_heads = counts
    rows = shape[axis] if axis < len(shape) else 0
    if rule == "equal":
        groups, shares = 1, [1] * len(names)
    elif rule == "interleaved":
        groups, shares = rows // len(names), [1] * len(names)
    elif rule == "codegen":
        names, groups, shares = ("q", "v", "k"), PARALLEL, [1, 1, 1]
    elif rule == "heads":
        groups, shares = heads, [1, 1, 1]
    elif rule == "groups":
        groups, shares = kv_heads, [heads // max(kv_heads, 1), 1, 1]
    else:
        groups, shares = 1, [heads, *[1 if rule == "queries" else kv_heads] * 2]
    unit, rest = divmod(rows, max(groups * sum(shares), 1))
    if rest or not unit or groups < 1 or min(shares) < 1 or len(shares) != len(names):
        return None
    return Cut(axis, groups, tuple((n, s * unit) for n, s in zip(names, shares, strict=True)))


def _counts(config: Mapping[str, Any]) -> tuple[int, int]:
    """Query heads and key-value heads of a config; without a number of the latter, as many."""
    nested = config.get("attn_config")
    values = {**config, **nested} if isinstance(nested, dict) else config
    heads = next((values[key] for key in HEADS if isinstance(values.get(key), int)), 0)
    return heads, next((values[key] for key in KV_HEADS if isinstance(values.get(key), int)), heads)


@cache
def _table() -> dict[str, dict[str, str]]:
    text = Path(__file__).with_name("fused.json").read_text(encoding="utf-8")
    table: dict[str, dict[str, str]] = json.loads(text)["models"]
    return table
