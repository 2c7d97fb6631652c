"""The tables of a run as text: for a terminal, and as Markdown for a page or an issue."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from taia.report_plots import difference_axis, forest, label, score_table

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["render_markdown", "render_terminal"]

MARKS = {1: "bold", 2: "underline", 0: ""}
"""How a place is shown on a terminal."""


def render_terminal(summary: Mapping[str, Any]) -> Table:
    """The paper's table for a terminal: best bold, second underlined, standard errors dim."""
    from rich.table import Table
    from rich.text import Text

    scores = score_table(summary)
    table = Table(caption="accuracy in %, ± one standard error; best bold, second underlined")
    table.add_column("variant", no_wrap=True)
    for column in scores.columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in scores.rows:
        cells = [
            Text.assemble((cell.value, MARKS[cell.place]), (f" ±{cell.error}", "dim"))
            for cell in row.cells
        ]
        table.add_row(label(row.name), *cells)
    return table


def render_markdown(summary: Mapping[str, Any]) -> str:
    """The paper's table and the paired differences with their 95% intervals, as Markdown."""
    scores = score_table(summary)
    lines = ["Accuracy in %, ± one standard error; best bold, second underlined:", ""]
    lines += _head(scores.columns)
    for row in scores.rows:
        cells = [f"{_marked(cell.value, cell.place)} ± {cell.error}" for cell in row.cells]
        lines.append(f"| {label(row.name)} | " + " | ".join(cells) + " |")
    axis = difference_axis(summary)
    for reference in ("base", "vanilla"):
        made = forest(summary, reference, axis)
        if made is None:
            continue
        columns = [task for task, _ in made.groups]
        told = f"Minus {label(reference)}, in points, paired by example, with a 95% interval"
        lines += ["", f"{told}; bold where it excludes zero:", "", *_head(columns)]
        rows: dict[str, list[str]] = {}
        for _, intervals in made.groups:
            for one in intervals:
                text = _marked(one.text, 1 if one.verdict != "open" else 0)
                rows.setdefault(one.variant, []).append(f"{text} ({one.interval})")
        lines += [f"| {label(name)} | " + " | ".join(row) + " |" for name, row in rows.items()]
    return "\n".join(lines) + "\n"


def _head(columns: list[str] | tuple[str, ...]) -> list[str]:
    return ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]


def _marked(text: str, place: int) -> str:
    return {1: f"**{text}**", 2: f"<u>{text}</u>"}.get(place, text)
