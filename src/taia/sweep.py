"""A sweep: one recipe that states many runs, its cells, as the product of lists of values.

    sweep:
      train.data.replace: [0, 0.25, 0.5]              # values of one field, by its dotted path
      train.method: [lora, molora]
      train.data: {alpaca: a.jsonl, flan: b.jsonl}    # whole parts, each with a name

Every cell is a recipe of its own: the rest of the file with its values put in. Shorter paths are
put in first, so that a field within a swept part can be swept too. A cell is named after its
values (`alpaca_replace-0.25_method-lora`), which is also the name of its folder.

`load_sweep` reads any recipe; one without `sweep` is a sweep of one cell without axes. All faults
of the file are told at once, one that several cells share only once.

Limits: a product, without exceptions; the variants and tasks of a cell are lists of their own.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from taia.errors import RecipeError, nearest
from taia.recipe import Evaluate, Recipe, Report, Resources, Train, read_stated, validate

__all__ = ["Axis", "Sweep", "SweepCell", "load_sweep"]

SWEPT = ("base", "train", "adapter", "tuned", "evaluate", "seed")
"""The fields of a recipe that decide what comes out; the others are of the sweep as a whole."""

PARTS: dict[str, type[BaseModel]] = {"train": Train, "evaluate": Evaluate}
LABEL = re.compile(r"[^A-Za-z0-9.]+")
MOST_CELLS = 1000
LONGEST_NAME = 120
"""Characters of a cell's name; file systems end at 255 bytes."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One swept field: its dotted path, its short name, and the label of each value.

    `named`: whether the labels are names that the recipe gives, or the values themselves.
    """

    field: str
    name: str
    labels: tuple[str, ...]
    values: tuple[Any, ...]
    named: bool

    @property
    def numbers(self) -> tuple[float, ...] | None:
        """The values as numbers, where every one of them is a number."""
        try:
            numbers = tuple(float(label) for label in self.labels)
        except ValueError:
            return None
        return numbers if all(map(math.isfinite, numbers)) else None


@dataclass(frozen=True, slots=True)
class SweepCell:
    """One cell: its name, the label of its value on each axis, and its recipe."""

    name: str
    labels: tuple[str, ...]
    recipe: Recipe
    content: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Sweep:
    """All cells of a recipe, the first axis slowest. Without axes there is one cell."""

    name: str
    axes: tuple[Axis, ...]
    cells: tuple[SweepCell, ...]
    report: Report
    resources: Resources


def load_sweep(path: Path) -> Sweep:
    """Read a recipe with or without `sweep`. Raises RecipeError with every fault of the file."""
    content = dict(read_stated(path))
    if "sweep" not in content:
        return _single(path, content)
    faults: list[str] = []
    axes = _axes(content.pop("sweep"), faults)
    cells = _cells(content, axes, faults)
    if cells and not faults:
        faults += _same_names(cells)
        faults += _figure(cells[0].recipe.report, axes)
    if faults:
        raise RecipeError(f"{path}: not a recipe that can be run", faults)
    first = cells[0].recipe
    return Sweep(first.name, axes, cells, first.report, first.resources)


def _single(path: Path, content: Mapping[str, Any]) -> Sweep:
    recipe, faults = validate(content)
    if recipe is not None and recipe.report.x is not None:
        faults = ["report.x: names a swept field, and the recipe has no sweep"]
    if recipe is None or faults:
        raise RecipeError(f"{path}: not a recipe that can be run", faults)
    cell = SweepCell(recipe.name, (), recipe, content)
    return Sweep(recipe.name, (), (cell,), recipe.report, recipe.resources)


def _axes(stated: Any, faults: list[str]) -> tuple[Axis, ...]:
    if not isinstance(stated, Mapping) or not stated:
        faults.append(
            "sweep: a mapping of fields to their values is needed, as in "
            "sweep: {train.rank: [4, 16]}"
        )
        return ()
    found = []
    fields = [str(field) for field in stated]
    for field, values in stated.items():
        fault = _no_field(str(field)) or _no_values(values)
        if fault:
            faults.append(f"sweep.{field}: {fault}")
            continue
        named = isinstance(values, Mapping)
        labels = tuple(_text(one) for one in values)
        listed = tuple(values.values()) if isinstance(values, Mapping) else tuple(values)
        found.append(Axis(str(field), _short_name(str(field), fields), labels, listed, named))
    cells = math.prod(len(axis.labels) for axis in found)
    if cells > MOST_CELLS:
        faults.append(f"sweep: states {cells:,} cells; at most {MOST_CELLS:,} are carried out")
        return ()
    return tuple(found)


def _no_field(field: str) -> str | None:
    """Why a recipe has no such field to sweep; None where it has, or its part will tell."""
    first, *rest = field.split(".")
    if first not in SWEPT:
        inner = [f"{part}.{first}" for part in PARTS if first in PARTS[part].model_fields]
        near = f"; did you mean {' or '.join(map(repr, inner))}?" if inner else ""
        near = near or nearest(field, SWEPT) or f"; there are {', '.join(SWEPT)}"
        return f"not a field that can be swept{near}"
    if not rest:
        return None
    if first not in PARTS:
        return f"{first} has no fields"
    known = list(PARTS[first].model_fields)
    if rest[0] not in known:
        near = nearest(rest[0], known) or f"; there are {', '.join(known)}"
        return f"unknown field {rest[0]!r} of {first}{near}"
    return None


def _no_values(values: Any) -> str | None:
    """Why these are not the values of a field."""
    if not isinstance(values, Mapping | list) or not values:
        return "a list of values is needed, or a mapping of names to values"
    if isinstance(values, list) and any(isinstance(one, list | Mapping) for one in values):
        return "give every value that is a list or a mapping a name: {NAME: VALUE, ...}"
    labels = Counter(_slug(_text(one)) for one in values)
    twice = [label for label, count in labels.items() if count > 1]
    if twice:
        return f"two values are both called {' and '.join(map(repr, twice))}; name them apart"
    if not all(labels):
        return "a value without letters or digits; give it a name: {NAME: VALUE, ...}"
    return None


def _short_name(field: str, fields: Sequence[str]) -> str:
    """The last parts of a path, as few as tell it from the other swept ones."""
    parts = field.split(".")
    for count in range(1, len(parts)):
        short = parts[-count:]
        if sum(other.split(".")[-count:] == short for other in fields) == 1:
            return ".".join(short)
    return field


def _cells(
    content: Mapping[str, Any], axes: Sequence[Axis], faults: list[str]
) -> tuple[SweepCell, ...]:
    """Every cell that states something runnable; what is wrong with the others is told once."""
    cells = []
    told: dict[str, list[str]] = {}
    total = 0
    for places in itertools.product(*(range(len(axis.labels)) for axis in axes)):
        total += 1
        name = _cell_name(axes, places)
        own, wrong = _put_in(content, axes, places)
        recipe, more = validate(own)
        for fault in wrong or more:
            told.setdefault(fault, []).append(name)
        if recipe is not None and not wrong:
            labels = tuple(axis.labels[at] for axis, at in zip(axes, places, strict=True))
            cells.append(SweepCell(name, labels, recipe, own))
    for fault, names in told.items():
        faults.append(fault if len(names) == total else f"{_some(names)}: {fault}")
    return tuple(cells)


def _put_in(
    content: Mapping[str, Any], axes: Sequence[Axis], places: Sequence[int]
) -> tuple[dict[str, Any], list[str]]:
    """The fields of one cell, and the paths that could not be followed."""
    own, faults = copy.deepcopy(dict(content)), []
    pairs = sorted(zip(axes, places, strict=True), key=lambda pair: pair[0].field.count("."))
    for axis, at in pairs:
        *parts, last = axis.field.split(".")
        inner: Any = own
        for part in parts:
            if isinstance(inner, dict) and inner.get(part) is None:
                inner[part] = {}
            inner = inner.get(part) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            inner[last] = copy.deepcopy(axis.values[at])
        else:
            faults.append(f"sweep.{axis.field}: {'.'.join(parts)} is not a mapping of fields")
    return own, faults


def _cell_name(axes: Sequence[Axis], places: Sequence[int]) -> str:
    parts = []
    for axis, at in zip(axes, places, strict=True):
        label = _slug(axis.labels[at])
        parts.append(label if axis.named else f"{_slug(axis.name)}-{label}")
    return "_".join(parts)


def _same_names(cells: Sequence[SweepCell]) -> list[str]:
    """Faults of names; a file system may not tell capitals apart."""
    counts = Counter(cell.name.lower() for cell in cells)
    faults = [f"sweep: {count} cells are called {name}; name their values apart"
              for name, count in counts.items() if count > 1]  # fmt: skip
    faults += [
        f"sweep: {cell.name[:40]}...: too long for a folder's name; name the values: "
        "{NAME: VALUE, ...}"
        for cell in cells
        if len(cell.name) > LONGEST_NAME
    ]
    return faults


def _figure(report: Report, axes: Sequence[Axis]) -> list[str]:
    fields = [axis.field for axis in axes]
    if report.x is None or report.x in fields:
        return []
    return [f"report.x: {report.x!r} is not swept; there are {', '.join(fields)}"]


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _text(value: Any) -> str:
    """A value as people write it in YAML."""
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _slug(text: str) -> str:
    """`text` as a part of a folder's name; a minus before a digit stays."""
    sign = "minus" if re.match(r"-[0-9.]", text) else ""
    return sign + LABEL.sub("-", text).strip("-.")
