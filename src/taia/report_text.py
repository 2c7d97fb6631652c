"""The tables of a run as text: for a terminal, and as Markdown for a page or an issue."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from taia.evaluation.power import LEVEL
from taia.evaluation.summary import REFERENCES
from taia.report_plots import MINUS, label, number
from taia.report_scores import (
    AVERAGE,
    Forest,
    ScoreTable,
    difference_axis,
    forest,
    how_asked,
    score_table,
)

if TYPE_CHECKING:
    from rich.table import Table

    from taia.evaluation.compare import Comparison
    from taia.evaluation.compare import Row as ComparisonRow

__all__ = ["DETECTABLE", "corrected", "render_comparison", "render_markdown", "render_terminal"]

MARKS = {1: "bold", 2: "underline", 0: ""}
"""How a place is shown on a terminal."""

DIFFERS, STAR = "*", "\\*"
DETECTABLE = (
    "the smallest true difference that so many examples show in 80% of cases, for the widest of "
    "a column's comparisons, in points, before that correction"
)


def render_terminal(summary: Mapping[str, Any]) -> Table:
    """The paper's table for a terminal: best bold, second underlined, intervals dim below."""
    from rich.table import Table
    from rich.text import Text

    scores = score_table(summary)
    table = Table(caption=_caption(summary, scores), caption_justify="left")
    table.add_column("variant", no_wrap=True)
    for column in scores.columns:
        table.add_column(column, justify="right")
    if scores.unparsed:
        table.add_column("unread", justify="right")
    for row in scores.rows:
        cells = [
            Text.assemble(
                (cell.value, MARKS[cell.place]),
                DIFFERS if cell.differs else " " if scores.against else "",
                (f"\n{cell.interval}", "dim"),
            )
            for cell in row.cells
        ]
        unread = [Text(f"{row.unparsed:,}")] if scores.unparsed else []
        table.add_row(label(row.name), *cells, *unread)
    if scores.detectable:
        table.add_section()
        table.add_row("detectable", *scores.detectable, style="dim")
    return table


def _caption(summary: Mapping[str, Any], scores: ScoreTable) -> str:
    parts = [
        f"{how_asked(summary)}; accuracy in %, 95% interval below; best bold, second underlined"
    ]
    if scores.against:
        parts.append(
            f"{DIFFERS} differs from {label(scores.against)}: {corrected(summary)}; detectable: "
            f"{DETECTABLE}"
        )
    if scores.unparsed:
        parts.append("unread: answers that could not be read, counted as wrong")
    return "\n".join(parts)


def render_markdown(summary: Mapping[str, Any]) -> str:
    """The paper's table and the paired differences with their 95% intervals, as Markdown."""
    scores = score_table(summary)
    asked = how_asked(summary)
    told = f"Accuracy in %, with its 95% interval ({asked}); best bold, second underlined"
    if scores.against:
        told += f"; {DIFFERS} differs from {label(scores.against)}, {corrected(summary)}"
    lines = [f"{told}:".replace("*", "\\*"), ""]
    lines += _head([*scores.columns, *(["unread"] if scores.unparsed else [])])
    for row in scores.rows:
        cells = [
            f"{_marked(cell.value, cell.place)}{STAR if cell.differs else ''} ({cell.interval})"
            for cell in row.cells
        ]
        cells += [f"{row.unparsed:,}"] if scores.unparsed else []
        lines.append(_row(label(row.name), cells))
    if scores.detectable:
        spare = [""] if scores.unparsed else []
        lines.append(_row("*detectable*", [*scores.detectable, *spare]))
        lines += ["", f"Detectable: {DETECTABLE}."]
    if scores.unparsed:
        lines += ["", "Unread: answers that could not be read; they count as wrong."]
    axis = difference_axis(summary)
    for reference in REFERENCES:
        made = forest(summary, reference, axis)
        if made is not None:
            lines += _differences(summary, made)
    return "\n".join(lines) + "\n"


def _differences(summary: Mapping[str, Any], made: Forest) -> list[str]:
    told = f"Minus {label(made.against)}, in points, paired by example, with a 95% interval"
    lines = ["", f"{told} ({how_asked(summary)}); bold: {corrected(summary)}:", ""]
    lines += _head([group.name for group in made.groups])
    rows: dict[str, list[str]] = {}
    for group in made.groups:
        for one in group.items:
            text = _marked(one.text, 1 if one.sure else 0)
            rows.setdefault(one.variant, []).append(f"{text} ({one.interval})")
    lines += [_row(label(name), cells) for name, cells in rows.items()]
    return [*lines, _row("*detectable*", [group.detectable for group in made.groups])]


def corrected(summary: Mapping[str, Any]) -> str:
    """What a mark on a difference means, in words."""
    count = summary["comparisons"]
    over = f", by Holm's method over {count} comparisons" if count > 1 else ""
    return f"p < 5%{over}"


def render_comparison(comparison: Comparison) -> list[Table | str]:
    """Two runs for a terminal: a table of every pair of variants, then what else to know."""
    from rich import box
    from rich.table import Table

    one, other = (
        f"{side.run} ({how_asked(dataclasses.asdict(side))})" for side in comparison.sides
    )
    parts: list[Table | str] = [f"A: {one}", f"B: {other}"]
    for a, b in dict.fromkeys((row.a, row.b) for row in comparison.rows):
        names = label(a) if a == b else f"{label(a)} (A) and {label(b)} (B)"
        table = Table(title=names, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("task", no_wrap=True)
        for column in ("n", "A %", "B %", f"A {MINUS} B", "95% interval", "p", "detectable"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in comparison.rows:
            if (row.a, row.b) == (a, b):
                table.add_row(*_comparison_row(row), end_section=row.task == "")
        parts.append(table)
    count = len(comparison.rows)
    parts.append(
        f"in points; p by Holm's method over {count} rows, * below 5%; detectable: the smallest "
        "difference that so many examples show in 80% of cases, uncorrected"
    )
    unread = [sum(row.unparsed[side] for row in comparison.rows if row.task) for side in (0, 1)]
    if any(unread):
        parts.append(f"unread answers, counted as wrong: {unread[0]:,} of A, {unread[1]:,} of B")
    return [*parts, *(f"note: {note}" for note in comparison.notes)]


def _comparison_row(row: ComparisonRow) -> list[str]:
    difference = row.difference
    mean, low, high = (
        number(100 * value, 1, signed=True)
        for value in (difference["mean"], difference["low"], difference["high"])
    )
    mark = DIFFERS if difference["p_holm"] < LEVEL else " "
    return [
        row.task or AVERAGE,
        f"{difference['examples']:,}",
        f"{100 * row.first.mean:.1f}",
        f"{100 * row.second.mean:.1f}",
        f"{mean}{mark}",
        f"{low} to {high}",
        "<0.001" if difference["p_holm"] < 0.001 else f"{difference['p_holm']:.3f}",
        f"{100 * difference['detectable']:.1f}",
    ]


def _head(columns: Sequence[str]) -> list[str]:
    return [_row("", columns), "|---|" + "---:|" * len(columns)]


def _row(name: str, cells: Sequence[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"


def _marked(text: str, place: int) -> str:
    return {1: f"**{text}**", 2: f"<u>{text}</u>"}.get(place, text)
