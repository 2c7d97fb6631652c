"""The report of a training folder alone: its loss, the shares of its mixture, how it was made.

For folders of `taia train`, which hold no results; the report of a run shows the same among the
rest. The page is that of `taia.report`, with other contents.
"""

from __future__ import annotations

import json
from pathlib import Path

from taia.errors import DataError
from taia.files import atomic_write, read_json
from taia.report import facts_of_training, page_maker
from taia.report_plots import loss_curve
from taia.report_shares import share_charts

__all__ = ["is_training", "report_training"]


def is_training(folder: Path) -> bool:
    """Whether this is a finished training, and not a run with results beside it."""
    return (folder / "train.json").is_file() and not (folder / "results").exists()


def report_training(folder: Path) -> Path:
    """Write report.html into a training folder; returns its path. Raises DataError for a broken
    log, DependencyError without jinja2.
    """
    training = read_json(folder / "train.json")
    try:
        lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
        log = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / 'log.jsonl'}: not the log of a training ({error})") from error
    page = (
        page_maker()
        .get_template("report_training.html.jinja")
        .render(
            title=f"The training {folder.resolve().name}",
            curve=loss_curve(log),
            shares=share_charts(log, training),
            training=facts_of_training(training),
            versions=sorted((training.get("versions") or {}).items()),
        )
    )
    atomic_write(folder / "report.html", page)
    return folder / "report.html"
