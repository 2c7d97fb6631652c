"""What the commands print: tables, JSON, one line about an output, a progress bar."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taia.explain import Explanation
    from taia.extract import Extraction
    from taia.plan import Plan
    from taia.receipt import Receipt
    from taia.splice import Progress

__all__ = [
    "bytes_progress",
    "is_sweep",
    "print_explanation",
    "print_extraction",
    "print_json",
    "print_plan",
    "print_receipt",
    "print_summary",
    "read_summary",
]


STRANGE = 20
"""Tensors that are told one by one."""


def print_json(value: Any) -> None:
    """Print plain values as JSON."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def print_plan(planned: Plan) -> None:
    """Print a plan's totals, one kind a row."""
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    from taia.errors import printable

    table = Table(title=f"keep: {planned.selection}", title_justify="left")
    table.add_column("kind")
    for column in ("tensors", "parameters", "from base", "from tuned", "blended"):
        table.add_column(column, justify="right")
    totals = planned.totals
    for kind, row in totals.items():
        if kind == "all":
            table.add_section()
        sizes = [decimal(row[key]) if row[key] else "" for key in ("base", "tuned", "blend")]
        table.add_row(kind, f"{row['tensors']:,}", f"{row['parameters']:,}", *sizes)
    console = Console()
    console.print(table)
    for note in planned.notes:
        console.print(f"note: {printable(note)}", markup=False, highlight=False, soft_wrap=True)


def print_explanation(explained: Explanation) -> None:
    """Print what an unknown checkpoint is made of: one kind a row, then its blends."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from taia.errors import printable

    totals = explained.totals
    columns = [name for name, count in totals["all"].items() if count]
    table = Table(title=f"tensors of {escape(explained.out)}", title_justify="left")
    table.add_column("kind")
    for column in columns:
        table.add_column(column, justify="right")
    for kind, row in totals.items():
        if kind == "all":
            table.add_section()
        table.add_row(kind, *[f"{row[column]:,}" if row[column] else "" for column in columns])
    Console().print(table)
    strange = [part for part in explained.parts if part.match in ("neither", "missing", "added")]
    for part in strange[:STRANGE]:
        best = "" if part.strength is None else (
            f"; the nearest blend is {part.strength:.3g}, {part.residual:.1%} of the delta away"
        )  # fmt: skip
        print(f"{part.match.value}: {printable(part.name)}{best}")
    if len(strange) > STRANGE:
        print(f"and {len(strange) - STRANGE} more; --json lists all")
    if explained.selection is None:
        print(f"no selection of these two models gives it: {printable(explained.reason)}")
    else:
        print(f"the same as --keep '{explained.selection}'")


def print_receipt(receipt: Receipt, out: Path, done: str, as_json: bool) -> None:
    """Print what was written or verified: one line, or the receipt as JSON."""
    if as_json:
        print_json(receipt.to_json())
        return
    origins = [entry.origin for entry in receipt.tensors]
    counts = ", ".join(
        f"{origins.count(origin)} {label}"
        for origin, label in (("base", "from base"), ("tuned", "from tuned"), ("blend", "blended"))
        if origin in origins
    )
    print(f"{out}: {done}, keeping '{receipt.selection}': {len(origins)} tensors, {counts}")


def print_extraction(extraction: Extraction, out: Path, as_json: bool) -> None:
    """Print how well an extracted adapter fits: every matrix, and all together."""
    if as_json:
        print_json(extraction.to_json())
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("matrix", "kind", "shape", "relative error")
    for row in extraction.matrices:
        shape = " x ".join(f"{size:,}" for size in row.shape)
        table.add_row(row.name, row.kind, shape, f"{row.error:.4f}")
    Console().print(table)
    whole = f", {len(extraction.whole)} vectors whole" if extraction.whole else ""
    print(
        f"{out}: written, keeping '{extraction.receipt.selection}': {len(extraction.matrices)} "
        f"matrices at rank {extraction.rank}{whole}; relative error {extraction.error:.4f}"
    )


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary.json of a run."""
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return summary


def is_sweep(folder: Path) -> bool:
    """Whether a run's folder is that of a sweep."""
    return (folder / "sweep.json").is_file()


def print_summary(folder: Path, as_json: bool) -> None:
    """Print the table of a run, or of all cells of a sweep."""
    if is_sweep(folder):
        _print_sweep(folder, as_json)
        return
    summary = read_summary(folder)
    if as_json:
        print_json(summary)
        return
    from rich.console import Console

    from taia.report_text import render_terminal

    Console().print(render_terminal(summary))


def _print_sweep(folder: Path, as_json: bool) -> None:
    from rich.console import Console

    from taia.sweep_report import render_sweep_terminal
    from taia.sweep_scores import read_scores

    if as_json:
        print_json(read_scores(folder))
    else:
        Console().print(render_sweep_terminal(folder))


@contextmanager
def bytes_progress() -> Iterator[Progress | None]:
    """A progress bar for bytes on a terminal; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("splice")
        yield lambda done, total: progress.update(task, completed=done, total=total)
