"""The report of a sweep: report.html, its figure, a terminal table, Markdown; all from sweep.json.

The page is the template of a single run with other contents, so that both look alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from taia.errors import OutputError
from taia.files import atomic_write
from taia.report import page_maker
from taia.report_plots import label
from taia.sweep_plots import (
    Entry,
    Table,
    accuracy_table,
    detectable,
    difference_table,
    figure,
    outcome,
    task_table,
)
from taia.sweep_scores import read_scores

if TYPE_CHECKING:
    import rich.table

__all__ = ["draw_sweep", "render_sweep_markdown", "render_sweep_terminal", "report_sweep"]


def report_sweep(folder: Path) -> Path:
    """Write RUN/report.html of a sweep; returns its path.

    Raises EvaluationError (no sweep.json), DependencyError (jinja2 is not installed).
    """
    path = folder / "report.html"
    atomic_write(path, _page(folder))
    return path


def draw_sweep(folder: Path, path: Path) -> None:
    """Write the figure of a sweep to `path`, an SVG that stands alone.

    Raises EvaluationError (no sweep.json), DependencyError (jinja2 is not installed),
    OutputError (`path` cannot be written).
    """
    scores = read_scores(folder)
    drawn = figure(scores)
    wide = 580 if len(drawn.panels) == 1 else 740
    template = page_maker().get_template("sweep_figure.svg.jinja")
    text = template.render(
        what=_what(scores["cells"]), figure=drawn, keys=_keys(drawn.legend, wide)
    )
    try:
        atomic_write(path, text)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error


def _keys(legend: Sequence[tuple[str, str]], wide: int) -> list[tuple[str, str, int, int]]:
    """Name, colour, and the place of each key in pixels, in rows of at most `wide`."""
    keys, x, y = [], 0, 24
    for name, colour in legend:
        size = 42 + 8 * len(label(name))  # the dot, the gaps, and a letter's width at most
        if x and x + size > wide:
            x, y = 0, y + 22
        keys.append((name, colour, x, y))
        x += size
    return keys


def render_sweep_terminal(folder: Path) -> rich.table.Table:
    """The mean accuracies of all cells for a terminal."""
    from rich.table import Table as Shown

    table = accuracy_table(read_scores(folder))
    shown = Shown(caption="accuracy in %, with its 95% interval")
    for head in table.heads:
        shown.add_column(head, no_wrap=True)
    for column in table.columns:
        shown.add_column(column, justify="right", no_wrap=True)
    for row in table.rows:
        texts = [f"{one.value}\n[dim]{one.interval}[/dim]" if one else "" for one in row.entries]
        shown.add_row(*row.labels, *texts)
    return shown


def render_sweep_markdown(folder: Path) -> str:
    """The figures of a sweep as Markdown tables: mean accuracies, then paired differences."""
    scores = read_scores(folder)
    lines = [f"{_what(scores['cells'])} in %, with its 95% interval:", ""]
    lines += _markdown(accuracy_table(scores))
    differences = difference_table(scores)
    if differences is not None:
        told = "Paired differences in points, with their 95% intervals"
        sure = f"bold: p < 5%, by Holm's method over {scores['comparisons']} comparisons"
        lines += ["", f"{told}; {sure}:", "", *_markdown(differences), "", detectable(scores)]
    return "\n".join([*lines, "", *outcome(scores)]) + "\n"


def _page(folder: Path) -> str:
    template = page_maker().get_template("sweep_template.html.jinja")
    scores = read_scores(folder)
    recipe = folder / "recipe.yaml"
    return template.render(
        title=scores["title"] or f"What of the fine-tuning to keep: {scores['name']}",
        expected=scores["expected"] or "",
        outcome=outcome(scores),
        what=_what(scores["cells"]),
        several=any(len(cell["examples"]) > 1 for cell in scores["cells"]),
        figure=figure(scores),
        accuracies=accuracy_table(scores),
        differences=difference_table(scores),
        comparisons=scores["comparisons"],
        detectable=detectable(scores),
        tasks=task_table(scores),
        recipe=recipe.read_text("utf-8") if recipe.is_file() else "",
    )


def _what(cells: list[dict[str, dict[str, int]]]) -> str:
    tasks = {tuple(cell["examples"]) for cell in cells}
    if len(tasks) > 1:
        return "Average accuracy over the tasks of each cell"
    names = next(iter(tasks))
    if len(names) > 1:
        return f"Average accuracy over {len(names)} tasks"
    return f"Accuracy on {names[0]}"


def _markdown(table: Table) -> list[str]:
    lines = [
        "| " + " | ".join([*table.heads, *table.columns]) + " |",
        "|" + "---|" * len(table.heads) + "---:|" * len(table.columns),
    ]
    for row in table.rows:
        texts = [_markdown_entry(one) for one in row.entries]
        lines.append("| " + " | ".join([*row.labels, *texts]) + " |")
    return lines


def _markdown_entry(entry: Entry | None) -> str:
    if entry is None:
        return "–"
    sure = entry.verdict in ("better", "worse")
    return f"{'**' if sure else ''}{entry.value}{'**' if sure else ''} ({entry.interval})"
