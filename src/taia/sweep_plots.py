"""What the report of a sweep shows, as plain values: panels of lines, tables, sentences.

Pure functions from the contents of sweep.json. As in `taia.report_plots`, positions are
percentages of a chart's width or height, and accuracies go out in percentage points.

A figure has the values of one axis along x and mean accuracy along y, a line a variant with the
band of its 95% interval, and one panel for every combination of the other axes. Numbers that
span a factor of eight or more stand on a logarithmic scale; values that are no numbers stand
side by side, as dots with bars and no line between them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from taia.evaluation.power import LEVEL
from taia.report_plots import Axis, label, nice_axis, number

__all__ = [
    "Figure",
    "Line",
    "Panel",
    "Table",
    "accuracy_table",
    "detectable",
    "difference_table",
    "figure",
    "outcome",
    "task_table",
]

REFERENCES = ("base", "vanilla")
LOGARITHMIC_FROM = 8
MARGIN = 4.0
"""Percent of the width left free at both sides, for the dots."""

MINUS = "\N{MINUS SIGN}"
COLOURS = {"base": "base", "vanilla": "vanilla", "taia": "taia", "taif": "taif"}
SPARE = ("e", "f", "g", "h")


@dataclass(frozen=True, slots=True)
class Dot:
    """One accuracy: its place, the ends of its interval (in percent), and its words."""

    x: float
    y: float
    low: float
    high: float
    title: str


@dataclass(frozen=True, slots=True)
class Line:
    """One variant: SVG points of the line and of its band in a box of 1000 by 300."""

    variant: str
    colour: str
    points: str
    band: str
    dots: tuple[Dot, ...]


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart; `title` names the values of the other axes, empty where there is none."""

    title: str
    lines: tuple[Line, ...]


@dataclass(frozen=True, slots=True)
class Figure:
    """All panels over the same axes. `x`: (position, label) of each value."""

    name: str
    x: tuple[tuple[float, str], ...]
    y: Axis
    joined: bool
    logarithmic: bool
    panels: tuple[Panel, ...]
    legend: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """One number of a table with its interval; verdict: better, worse or open, or empty."""

    value: str
    interval: str
    verdict: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One row: the labels that name it, the folder of its cell, and its numbers."""

    labels: tuple[str, ...]
    cell: str
    entries: tuple[Entry | None, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """A table of cells; `heads` stand over the labels, `columns` over the numbers."""

    heads: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def figure(scores: Mapping[str, Any]) -> Figure:
    """Mean accuracy over the swept values, a line a variant, a panel for the other axes."""
    along, axes = scores["x"], scores["axes"]
    places, logarithmic = _places(axes[along])
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for cell in scores["cells"]:
        others = tuple(text for at, text in enumerate(cell["labels"]) if at != along)
        groups.setdefault(others, []).append(cell)
    means = [row for cell in scores["cells"] for row in cell["means"]]
    ends = [100 * row[key] for row in means for key in ("low", "high")]
    y = nice_axis(max(0.0, min(ends)), min(100.0, max(ends)))
    colours = _colours(_variants(scores))
    names = [axis["name"] for at, axis in enumerate(axes) if at != along]
    panels = tuple(
        Panel(_named(names, others), _lines(cells, along, places, y, colours))
        for others, cells in groups.items()
    )
    labels = axes[along]["labels"]
    ticks = sorted((places[text], text) for text in labels)
    joined = axes[along]["numbers"] is not None
    return Figure(
        axes[along]["name"], tuple(ticks), y, joined, logarithmic, panels, tuple(colours.items())
    )


def accuracy_table(scores: Mapping[str, Any]) -> Table:
    """Mean accuracy of every variant in every cell, with its interval."""
    variants = _variants(scores)
    rows = []
    for cell in scores["cells"]:
        means = {row["variant"]: row for row in cell["means"]}
        rows.append(_row(cell, [_accuracy(means.get(name)) for name in variants]))
    return Table(_heads(scores), tuple(map(label, variants)), tuple(rows))


def difference_table(scores: Mapping[str, Any]) -> Table | None:
    """Paired differences of the means from base and from vanilla; None where there is none."""
    pairs = _pairs(scores)
    if not pairs:
        return None
    rows = []
    for cell in scores["cells"]:
        means = {row["variant"]: row["differences"] for row in cell["means"]}
        rows.append(
            _row(cell, [_difference(means.get(one, {}).get(other)) for one, other in pairs])
        )
    columns = tuple(f"{label(one)} {MINUS} {label(other)}" for one, other in pairs)
    return Table(_heads(scores), columns, tuple(rows))


def detectable(scores: Mapping[str, Any]) -> str:
    """The true differences of means that so many examples show, from the best cell to the worst."""
    found = [
        100 * difference["detectable"]
        for cell in scores["cells"]
        for row in cell["means"]
        for difference in row["differences"].values()
    ]
    if not found:
        return ""
    ends = [f"{end:.1f}" for end in (min(found), max(found))]
    told = ends[0] if ends[0] == ends[1] else " to ".join(ends)
    return (
        f"So many examples show a true difference of {told} points, depending on the pair, in 80% "
        "of cases; a smaller one is likelier missed than found."
    )


def task_table(scores: Mapping[str, Any]) -> Table:
    """Accuracy of every variant on every task of every cell."""
    variants = _variants(scores)
    rows = []
    for cell in scores["cells"]:
        entries = {(row["task"], row["variant"]): row for row in cell["scores"]}
        for task in cell["examples"]:
            found = tuple(_accuracy(entries.get((task, name))) for name in variants)
            rows.append(Row((*cell["labels"], task), cell["name"], found))
    return Table((*_heads(scores), "task"), tuple(map(label, variants)), tuple(rows))


def outcome(scores: Mapping[str, Any]) -> list[str]:
    """What came out, by the same rules whichever way it went."""
    cells = scores["cells"]
    total = len(cells)
    sentences = [_course(scores)] if _course(scores) else []
    for one, other in _pairs(scores):
        found = [
            row["differences"][other]
            for cell in cells
            for row in cell["means"]
            if row["variant"] == one and other in row["differences"]
        ]
        above, below = ([row for row in found if sign * row["mean"] > 0] for sign in (1, -1))
        sure_above, sure_below = (sum(map(_sure, rows)) for rows in (above, below))
        sentences.append(
            f"{label(one)} is above {label(other)} in {len(above)} of {total} cells "
            f"({sure_above} with p < 5%) and below in {len(below)} ({sure_below})."
        )
    return sentences


def _course(scores: Mapping[str, Any]) -> str:
    """How the means go from the lowest to the highest value, where there is one panel."""
    axis = scores["axes"][scores["x"]]
    if len(scores["axes"]) > 1 or axis["numbers"] is None or len(scores["cells"]) < 2:
        return ""
    cells = [cell for _, cell in sorted(zip(axis["numbers"], scores["cells"], strict=True),
                                        key=lambda pair: pair[0])]  # fmt: skip
    first, last = ({row["variant"]: row["accuracy"] for row in cell["means"]}
                   for cell in (cells[0], cells[-1]))  # fmt: skip
    told = [
        f"{label(name)} from {100 * first[name]:.1f}% to {100 * last[name]:.1f}%"
        for name in first
        if name in last
    ]
    start, end = cells[0]["labels"][0], cells[-1]["labels"][0]
    return f"From {axis['name']} {start} to {end}: {', '.join(told)}."


def _places(axis: Mapping[str, Any]) -> tuple[dict[str, float], bool]:
    """Where each value stands, in percent of the width, and whether logarithmically."""
    labels, numbers = axis["labels"], axis["numbers"]
    logarithmic = bool(numbers) and min(numbers) > 0 and (
        max(numbers) / min(numbers) >= LOGARITHMIC_FROM
    )  # fmt: skip
    values = numbers or list(range(len(labels)))
    if logarithmic:
        values = [math.log(value) for value in values]
    low, high = min(values), max(values)
    margin = MARGIN if numbers else 50 / len(labels)
    span = high - low
    return {
        text: round(margin + (100 - 2 * margin) * (value - low) / span, 2) if span else 50.0
        for text, value in zip(labels, values, strict=True)
    }, logarithmic


def _lines(
    cells: Sequence[Mapping[str, Any]],
    along: int,
    places: Mapping[str, float],
    y: Axis,
    colours: Mapping[str, str],
) -> tuple[Line, ...]:
    lines = []
    for name, colour in colours.items():
        dots = sorted(
            (
                _dot(places[cell["labels"][along]], cell["labels"][along], row, y)
                for cell in cells
                for row in cell["means"]
                if row["variant"] == name
            ),
            key=lambda dot: dot.x,
        )
        if dots:
            edge = [(dot.x, dot.high) for dot in dots]
            edge += [(dot.x, dot.low) for dot in reversed(dots)]
            points = _points([(dot.x, dot.y) for dot in dots])
            lines.append(Line(name, colour, points, _points(edge), tuple(dots)))
    return tuple(lines)


def _dot(x: float, value: str, row: Mapping[str, Any], y: Axis) -> Dot:
    mean, low, high = (100 * row[key] for key in ("accuracy", "low", "high"))
    title = f"{label(row['variant'])} at {value}: {mean:.1f}% ({low:.1f} to {high:.1f})"
    return Dot(x, y.at(mean), y.at(low), y.at(high), title)


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{10 * x:.1f},{300 - 3 * y:.1f}" for x, y in places)


def _colours(variants: Sequence[str]) -> dict[str, str]:
    """The colour class of every variant: the presets have their own."""
    others = iter(SPARE * (1 + len(variants) // len(SPARE)))
    return {name: COLOURS[name] if name in COLOURS else next(others) for name in variants}


def _variants(scores: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["variant"] for cell in scores["cells"] for row in cell["means"]))


def _pairs(scores: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Variant and reference, for every comparison that a cell holds."""
    found = {
        (other, row["variant"])
        for cell in scores["cells"]
        for row in cell["means"]
        for other in row["differences"]
        if row["variant"] != "base"
    }
    names = _variants(scores)
    return [(one, other) for other in REFERENCES for one in names if (other, one) in found]


def _heads(scores: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(axis["name"] for axis in scores["axes"])


def _named(names: Sequence[str], labels: Sequence[str]) -> str:
    return ", ".join(f"{name} {text}" for name, text in zip(names, labels, strict=True))


def _row(cell: Mapping[str, Any], entries: Sequence[Entry | None]) -> Row:
    return Row(tuple(cell["labels"]), cell["name"], tuple(entries))


def _accuracy(row: Mapping[str, Any] | None) -> Entry | None:
    if row is None:
        return None
    mean, low, high = (number(100 * row[key], 1) for key in ("accuracy", "low", "high"))
    return Entry(mean, f"{low} to {high}")


def _sure(difference: Mapping[str, Any]) -> bool:
    return bool(difference["p_holm"] < LEVEL)


def _difference(row: Mapping[str, Any] | None) -> Entry | None:
    if row is None:
        return None
    verdict = ("better" if row["mean"] > 0 else "worse") if _sure(row) else "open"
    mean, low, high = (number(100 * row[key], 1, signed=True) for key in ("mean", "low", "high"))
    return Entry(mean, f"{low} to {high}", verdict)
