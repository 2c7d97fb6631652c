"""sweep.json: the scores of every cell of a sweep, from the result files of its runs.

    name, title, expected     what the recipe says of itself
    axes                      field, name, labels, numbers (null where a label is none)
    comparisons               how many differences of means there are, a pair counted once
    x                         which axis the figure has along its horizontal axis
    cells                     name, labels, protocol, examples; means and scores of each variant

Accuracies are from 0 to 1 with 95% intervals; differences are paired by example and have the
same form as in summary.json, but `p_holm` is corrected for the means of all cells, which stand in
one table. All of it comes from the cells' result files, so it can be made
again anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from taia.errors import EvaluationError
from taia.files import atomic_write
from taia.sweep import Axis, Sweep, SweepCell

__all__ = ["SCORES", "read_scores", "write_scores"]

SCORES = "sweep.json"


def write_scores(sweep: Sweep, folder: Path) -> Path:
    """Write RUN/sweep.json. Raises EvaluationError where a cell is not complete."""
    cells = [_cell(cell, folder / "cells" / cell.name) for cell in sweep.cells]
    comparisons = _correct(cells)
    told = {
        "name": sweep.name,
        "title": sweep.report.title,
        "expected": sweep.report.expected,
        "axes": [_axis(axis) for axis in sweep.axes],
        "x": _along(sweep),
        "comparisons": comparisons,
        "cells": cells,
    }
    path = folder / SCORES
    atomic_write(path, json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def read_scores(folder: Path) -> dict[str, Any]:
    """RUN/sweep.json. Raises EvaluationError where it is missing or damaged."""
    path = folder / SCORES
    try:
        scores = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise EvaluationError(f"{path}: cannot be read ({error}); run the recipe again") from error
    if not isinstance(scores, dict) or not isinstance(scores.get("cells"), list):
        raise EvaluationError(f"{path}: not the scores of a sweep; run the recipe again")
    if not isinstance(scores.get("comparisons"), int):
        raise EvaluationError(f"{path}: written by an older version; run the recipe again")
    return scores


def _along(sweep: Sweep) -> int:
    """The axis of the figure: the stated one, else the first one of numbers, else the first."""
    fields = [axis.field for axis in sweep.axes]
    if sweep.report.x is not None:
        return fields.index(sweep.report.x)
    numbers = [at for at, axis in enumerate(sweep.axes) if axis.numbers and len(axis.labels) > 1]
    return numbers[0] if numbers else 0


def _axis(axis: Axis) -> dict[str, Any]:
    return {
        "field": axis.field,
        "name": axis.name,
        "labels": list(axis.labels),
        "numbers": list(axis.numbers) if axis.numbers else None,
    }


def _cell(cell: SweepCell, folder: Path) -> dict[str, Any]:
    from taia.evaluation.result import read_results
    from taia.evaluation.summary import summarise

    summary = summarise(read_results(folder))
    return {
        "name": cell.name,
        "labels": list(cell.labels),
        "protocol": summary["protocol"],
        "examples": {name: task["examples"] for name, task in summary["tasks"].items()},
        "means": [
            {"variant": row["variant"], "differences": row["differences"]} | _score(row)
            for row in summary["means"]
        ],
        "scores": [
            {"variant": row["variant"], "task": row["task"]} | _score(row)
            for row in summary["scores"]
        ],
    }


def _correct(cells: list[dict[str, Any]]) -> int:
    """Holm's method over the differences of means of all cells; a pair counts once. How many."""
    from taia.evaluation.statistics import holm

    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for cell in cells:
        for row in cell["means"]:
            for other, difference in row["differences"].items():
                pair = (cell["name"], *sorted((row["variant"], other)))
                found.setdefault(pair, []).append(difference)
    corrected = holm([same[0]["p"] for same in found.values()])
    for p_holm, same in zip(corrected, found.values(), strict=True):
        for difference in same:
            difference["p_holm"] = p_holm
    return len(found)


def _score(row: Mapping[str, Any]) -> dict[str, float]:
    """An accuracy with its 95% interval."""
    return {name: row[name] for name in ("accuracy", "low", "high")}
