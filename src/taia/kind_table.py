"""The shipped table of kinds, kinds.jsonl, read a model type at a time, and look-ups in it.

The first line of the file says on which line the table of each model type stands (equal
tables are stored once); only that line is parsed. derivation/family.py says what a table
holds. A look-up turns the integers of a name into `*`, takes off what says nothing about
the module (`.weight`), and asks the table, with and without the base model's prefix.

A pattern is looked up once for a whole checkpoint: its 90,000 names have a few dozen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["Choice", "Family", "Row", "families", "family", "known_types", "read_family"]

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

EXPERT = re.compile(r"(?<![^.])(expert_)\d+(?![^.])")
"""A part that numbers an expert and is no integer (Switch Transformers, NLLB-MoE)."""

LAYER_NUMBER = re.compile(r"\\\.\d+(?:\.\*|\\\.\.\*|\\\.)?$")
"""The number of a layer, and what follows it, in an expression of `extra`."""

DIGITS = 9
"""A longer number in a name is no layer and no expert."""

Table = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table. `at`: which integer of the name is the layer, less `offset`."""

    kind: str
    projection: str | None
    tower: str
    at: int | None
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Choice:
    """A row that holds where the layer of the name also has a tensor of one of `markers`."""

    row: Row
    markers: tuple[str, ...]


Split = tuple[int, dict[int, Row]]
"""Which integer of the name tells, and the row of each of its values."""

Found = Row | Split | list[Choice] | None


@dataclass(frozen=True, slots=True)
class Family:
    """The names of one model type.

    prefix: the base model's attribute, which some files leave out of every name.
    extra: names of the layers behind the last one, which transformers does not load, in the
        sizes that were published first; beyond: those of any layer that may be such a one.
    hybrid: some of its layers hold a mixer in place of attention.
    """

    prefix: str
    rows: dict[str, Row]
    split: dict[str, Split]
    ambiguous: dict[str, list[Choice]]
    extra: re.Pattern[str] | None
    beyond: re.Pattern[str] | None
    dropped: re.Pattern[str] | None
    foreign: tuple[tuple[re.Pattern[str], Row], ...]
    hybrid: bool
    seen: dict[str, Found] = field(default_factory=dict)

    def find(
        self, name: str, *, exact: bool = False, depth: int | None = None
    ) -> tuple[Found, tuple[int, ...]]:
        """What the table says of a name, and its integers.

        exact: as it stands, with no prefix put on or taken off, and nothing dropped.
        depth: how many layers the language model has, where that is known.
        """
        if not exact and self.is_extra(name, depth):
            return NOT_LOADED, ()
        pattern, integers = generalise(name)
        found = self._ask(pattern, exact=True) if exact else self.seen.get(pattern, UNASKED)
        if found is UNASKED:
            found = self.seen[pattern] = self._ask(pattern)
        if found is None and not exact:
            found = self._unlisted(name)
        if isinstance(found, tuple):
            at, by_value = found
            found = by_value.get(integers[at])
        return found, integers

    def is_extra(self, name: str, depth: int | None) -> bool:
        """Whether this is of a layer behind the last one; of the published ones without `depth`."""
        if self.extra is None or self.beyond is None or depth is None:
            return self.extra is not None and bool(self.extra.search(name))
        layer = self.beyond.search(name)
        return layer is not None and int(layer[layer.lastindex or 0]) >= depth

    def _ask(self, pattern: str, *, exact: bool = False) -> Found:
        for key in keys(pattern, "" if exact else self.prefix):
            found = self.rows.get(key) or self.split.get(key) or self.ambiguous.get(key)
            if found is not None:
                return found
        return None

    def _unlisted(self, name: str) -> Row | None:
        if self.dropped is not None and self.dropped.search(name):
            return NOT_LOADED
        return next((row for pattern, row in self.foreign if pattern.search(name)), None)


NOT_LOADED = Row("other", None, "language", None, 0)
"""What a file holds and transformers does not load: multi-token prediction, for one."""

UNASKED = Row("", None, "", None, 0)


def generalise(name: str) -> tuple[str, tuple[int, ...]]:
    """A name with `*` in place of its integers, and the integers."""
    parts = name.split(".")
    integers = []
    for at, part in enumerate(parts):
        if part.isdecimal() and len(part) <= DIGITS:
            integers.append(int(part))
            parts[at] = "*"
    pattern = ".".join(parts)
    if "expert_" in pattern:
        pattern = EXPERT.sub(r"\1*", pattern)
    return pattern, tuple(integers)


def keys(pattern: str, prefix: str) -> list[str]:
    """The table keys that a pattern may have, most specific first."""
    stems = [pattern]
    for suffix in (SUFFIX, BLOCKS):
        stem = suffix.sub("", pattern)
        if stem != pattern:
            stems.insert(0, stem)
    if prefix:
        stems += [f"{prefix}.{stem}" for stem in stems] + [
            stem.removeprefix(f"{prefix}.") for stem in stems if stem.startswith(f"{prefix}.")
        ]
    return stems


@cache
def _lines() -> list[str]:
    text = Path(__file__).with_name("kinds.jsonl").read_text(encoding="utf-8")
    return text.split("\n")


@cache
def _index() -> dict[str, int]:
    index: dict[str, int] = json.loads(_lines()[0])["models"]
    return index


def known_types() -> dict[str, int]:
    """Model type -> the line of the file that holds its table."""
    return _index()


@cache
def family(line: int) -> Family:
    """The family on a line of the file."""
    return read_family(json.loads(_lines()[line]))


def families() -> Iterator[tuple[str, Family]]:
    """One model type a table (equal tables are stored once), with its family."""
    owners: dict[int, str] = {}
    for model_type, line in _index().items():
        owners.setdefault(line, model_type)
    for line, owner in owners.items():
        yield owner, family(line)


def read_family(table: Table) -> Family:
    """A family from its table."""
    row = cache(_row)
    split = {
        key: (told["at"], {int(value): row(text) for value, text in told["rows"].items()})
        for key, told in table.get("split", {}).items()
    }
    ambiguous = {
        key: [Choice(row(text), tuple(markers)) for text, markers in choices.items()]
        for key, choices in table.get("ambiguous", {}).items()
    }
    return Family(
        prefix=table["prefix"],
        rows={key: row(text) for text, listed in table["rows"].items() for key in listed},
        split=split,
        ambiguous=ambiguous,
        extra=_any_of(table.get("extra", [])),
        beyond=_any_of(
            [LAYER_NUMBER.sub(r"\\.(\\d{1,9})\\.", text) for text in table.get("extra", [])],
            start=r"(?:^|\.)",
        ),
        dropped=_any_of(table.get("dropped", [])),
        foreign=tuple((re.compile(k), row(v)) for k, v in table.get("foreign", {}).items()),
        hybrid=any(text.startswith("mixer/") for text in table["rows"]),
    )


def _any_of(expressions: list[str], start: str = "") -> re.Pattern[str] | None:
    if not expressions:
        return None
    return re.compile("|".join(f"{start}(?:{text})" for text in dict.fromkeys(expressions)))


def _row(text: str) -> Row:
    """A row from "kind/projection/tower/at/offset", where absent parts are empty."""
    kind, projection, tower, at, offset = text.split("/")
    return Row(kind, projection or None, tower, int(at) if at else None, int(offset or 0))
