"""One variant on one task as a piece of work of its own, for several processes at once.

A part is scored in a folder of its own, RUN/parts/VARIANT/TASK, which is a small run. `gather`
moves the result files of all parts to where one evaluation of everything writes them; what lies
there is then the same, byte for byte. A part that is complete is not scored again.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from taia.experiment.cell import Cell, tasks_of
from taia.experiment.lock import remove
from taia.experiment.stages import PARTS, evaluation
from taia.files import atomic_write

__all__ = ["PARTS", "gather", "parts_of", "score_part"]


def parts_of(cell: Cell) -> list[tuple[str, str]]:
    """Every variant, as the recipe states it, with every task by the name that finds it."""
    tasks = [task.stated for task in tasks_of(cell)]
    return [(variant, task) for variant in cell.recipe.evaluate.variants for task in tasks]


def score_part(cell: Cell, variant: str, task: str) -> None:
    """Score one variant on one task into the part's folder, as far as it is not done."""
    from taia.evaluation.harness import evaluate

    options = evaluation(cell) | {"variants": (variant,), "tasks": (task,)}
    evaluate(cell.base, _folder(cell, variant, task), **options)


def gather(cell: Cell) -> None:
    """Put the parts of a cell together: its settings.json and all of its result files."""
    from taia.evaluation.result import read_settings
    from taia.evaluation.variants import parse_variants

    parts = parts_of(cell)
    found = {part: read_settings(_folder(cell, *part)) for part in parts}
    tasks = {name: info for settings in found.values() for name, info in settings.tasks.items()}
    variants = parse_variants(cell.recipe.evaluate.variants)
    first = next(iter(found.values()))
    remove(cell.out / "results")
    for part in parts:
        for file in (_folder(cell, *part) / "results").rglob("*.jsonl"):
            atomic_write(
                cell.out / "results" / file.parent.name / file.name, file.read_text("utf-8")
            )
    whole = replace(first, tasks=tasks, variants=variants)
    atomic_write(cell.out / "settings.json", whole.to_json())


def _folder(cell: Cell, variant: str, task: str) -> Path:
    from taia.evaluation.foreign import name_of
    from taia.evaluation.variants import parse_variants

    return cell.out / PARTS / parse_variants([variant])[0].folder / name_of(task)
