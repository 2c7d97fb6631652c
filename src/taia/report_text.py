"""The tables of a run as text: for a terminal, and as Markdown for a page or an issue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from taia.evaluation.summary import REFERENCES
from taia.report_plots import label
from taia.report_scores import (
    Forest,
    ScoreTable,
    difference_axis,
    forest,
    how_asked,
    score_table,
)

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["DETECTABLE", "corrected", "render_markdown", "render_terminal"]

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


def _head(columns: Sequence[str]) -> list[str]:
    return [_row("", columns), "|---|" + "---:|" * len(columns)]


def _row(name: str, cells: Sequence[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"


def _marked(text: str, place: int) -> str:
    return {1: f"**{text}**", 2: f"<u>{text}</u>"}.get(place, text)
