"""The scores of a report as plain values: the paper's table, and paired differences.

Pure functions from a summary to small frozen values; the page, the terminal and the Markdown
tables read the same. Accuracies and differences come in as fractions and go out in percentage
points.

A difference counts as shown when its p value is below 5% after Holm's correction over all
comparisons of the run; that an interval excludes zero is less, and is marked as less.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from taia.evaluation.power import LEVEL
from taia.evaluation.summary import REFERENCES
from taia.report_plots import DASH, Axis, nice_axis, number

__all__ = [
    "AVERAGE",
    "Cell",
    "Forest",
    "Group",
    "Interval",
    "Row",
    "ScoreTable",
    "difference_axis",
    "forest",
    "how_asked",
    "ranks",
    "score_table",
]

AVERAGE = "Average"


@dataclass(frozen=True, slots=True)
class Cell:
    """One accuracy: its text, its 95% interval, and its place (1 best, 2 second, else 0).

    `differs`: whether it differs from the first reference, after Holm's correction.
    """

    value: str
    interval: str
    place: int
    differs: bool


@dataclass(frozen=True, slots=True)
class Row:
    """One variant of the table; `unparsed`: how many answers could not be read."""

    name: str
    selection: str
    cells: tuple[Cell, ...]
    unparsed: int


@dataclass(frozen=True, slots=True)
class ScoreTable:
    """The paper's table: variants by tasks, the average last.

    `detectable`: for each column the smallest difference that its examples can show, in points;
    empty where nothing is compared. `unparsed`: whether any answer could not be read. `against`:
    the reference that `differs` of a cell means, or nothing.
    """

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    detectable: tuple[str, ...]
    unparsed: bool
    against: str


@dataclass(frozen=True, slots=True)
class Interval:
    """A paired difference in percentage points; left, width and dot in percent of the axis."""

    variant: str
    text: str
    interval: str
    verdict: str  # better, worse, or open where the interval holds zero
    sure: bool  # still so after Holm's correction
    left: float
    width: float
    dot: float


@dataclass(frozen=True, slots=True)
class Group:
    """The differences on one task, and the smallest that its examples can show, in points."""

    name: str
    detectable: str
    items: tuple[Interval, ...]


@dataclass(frozen=True, slots=True)
class Forest:
    """Paired differences of every other variant from one reference, by task."""

    against: str
    axis: Axis
    zero: float
    groups: tuple[Group, ...]


def ranks(values: Sequence[float]) -> list[int]:
    """1 for the best shown value, 2 for the next one below it, 0 for the rest.

    Equality is that of the shown text (one decimal of a percentage), so equal numbers on
    the page are marked alike: all ties of the best are best, all ties of the second are
    second. A column in which every value is equal, or that has one value, has no marks.
    """
    shown = [round(100 * value, 1) if math.isfinite(value) else -math.inf for value in values]
    distinct = sorted(set(shown) - {-math.inf}, reverse=True)
    if len(distinct) < 2:
        return [0] * len(shown)
    place = {distinct[0]: 1, distinct[1]: 2}
    return [place.get(value, 0) for value in shown]


def score_table(summary: Mapping[str, Any]) -> ScoreTable:
    """Accuracy of every variant on every task, with the average where there are two tasks."""
    tasks = list(summary["tasks"])
    entries = {(row["variant"], row["task"]): row for row in summary["scores"]}
    if len(tasks) > 1:
        entries |= {(row["variant"], AVERAGE): row for row in summary["means"]}
        tasks.append(AVERAGE)
    variants = summary["variants"]
    against = next((name for name in REFERENCES if (name, tasks[0]) in entries), "")
    columns, detectable = [], []
    for task in tasks:
        column = [entries[variant["name"], task] for variant in variants]
        places = ranks([entry["accuracy"] for entry in column])
        columns.append(
            [_cell(entry, place, against) for entry, place in zip(column, places, strict=True)]
        )
        detectable.append(_detectable(one for row in column for one in row["differences"].values()))
    unparsed = {row["variant"]: row["unparsed"] for row in summary["means"]}
    rows = tuple(
        Row(variant["name"], variant["selection"], tuple(cells), unparsed[variant["name"]])
        for variant, cells in zip(variants, zip(*columns, strict=True), strict=True)
    )
    return ScoreTable(
        tuple(tasks), rows, tuple(detectable) if any(detectable) else (),
        any(unparsed.values()), against if any(detectable) else "",
    )  # fmt: skip


def how_asked(summary: Mapping[str, Any]) -> str:
    """Protocol and number of few-shot examples, in words; every table states them."""
    shots = summary["shots"]
    return f"{summary['protocol']} protocol, {shots} shot{'' if shots == 1 else 's'}"


def forest(summary: Mapping[str, Any], against: str, axis: Axis) -> Forest | None:
    """Paired differences from `against`, or None where nothing was compared with it."""
    rows = [(AVERAGE, row) for row in summary["means"]] if len(summary["tasks"]) > 1 else []
    rows += [(row["task"], row) for row in summary["scores"]]
    groups: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for group, row in rows:
        difference = row["differences"].get(against)
        if difference is not None and row["variant"] != against:
            groups.setdefault(group, []).append((row["variant"], difference))
    if not groups:
        return None
    shown = tuple(
        Group(
            name,
            _detectable(difference for _, difference in pairs),
            tuple(_interval(variant, difference, axis) for variant, difference in pairs),
        )
        for name, pairs in groups.items()
    )
    return Forest(against, axis, axis.at(0), shown)


def difference_axis(summary: Mapping[str, Any]) -> Axis:
    """One axis for all differences of a report, so that its plots compare at a glance."""
    ends = [0.0]
    for row in [*summary["scores"], *summary["means"]]:
        for difference in row["differences"].values():
            ends += [100 * difference["low"], 100 * difference["high"]]
    finite = [end for end in ends if math.isfinite(end)]
    return nice_axis(min(*finite, -1.0), max(*finite, 1.0), signed=True)


def _cell(entry: Mapping[str, Any], place: int, against: str) -> Cell:
    bounds = f"{_percent(entry['low'])}{DASH}{_percent(entry['high'])}"
    difference = entry["differences"].get(against)
    differs = difference is not None and difference["p_holm"] < LEVEL
    return Cell(_percent(entry["accuracy"]), bounds, place, differs)


def _detectable(differences: Iterable[Mapping[str, Any]]) -> str:
    """The smallest difference that all of these comparisons could show, in points."""
    found = [difference["detectable"] for difference in differences]
    return _percent(max(found)) if found else ""


def _interval(variant: str, difference: Mapping[str, Any], axis: Axis) -> Interval:
    mean, low, high = (100 * difference[key] for key in ("mean", "low", "high"))
    verdict = "better" if low > 0 else "worse" if high < 0 else "open"
    left, right = axis.at(low), axis.at(high)
    return Interval(
        variant=variant,
        text=number(mean, 1, signed=True),
        interval=f"{number(low, 1, signed=True)} to {number(high, 1, signed=True)}",
        verdict=verdict,
        sure=verdict != "open" and difference["p_holm"] < LEVEL,
        left=left,
        width=round(right - left, 2),
        dot=axis.at(mean),
    )


def _percent(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return DASH
    return f"{100 * value:.1f}"
