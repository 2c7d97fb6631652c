"""A cell: one recipe whose paths are filled in, the folder of its run, and what goes in.

Everything that a later stage would refuse is refused here, before anything is written.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taia.errors import RecipeError
from taia.recipe import Recipe, place, place_data

if TYPE_CHECKING:
    from taia.evaluation.catalogue import TaskSource

__all__ = [
    "Cell",
    "check_inputs",
    "check_tasks",
    "held_out_files",
    "make_cell",
    "tasks_of",
    "training_options",
]


@dataclass(frozen=True, slots=True)
class Cell:
    """One run. `base`: a source; `change`: the adapter or tuned model, made by the run or given.

    `name`: how it is told from its neighbours, empty where it is alone. `text`: its recipe.yaml.
    """

    name: str
    recipe: Recipe
    text: str
    out: Path
    base: str
    train_data: str | dict[str, Any] | None
    fisher_data: str | None
    validation: str | None
    eval_data: str | None
    change: str

    @property
    def trains(self) -> bool:
        """Whether the run makes its own fine-tune."""
        return self.recipe.train is not None

    @property
    def is_adapter(self) -> bool:
        """Whether the change is an adapter rather than a whole model."""
        if self.recipe.train is not None:
            return self.recipe.train.method != "full"
        return self.recipe.adapter is not None

    @property
    def seed(self) -> int:
        """The seed of the evaluation."""
        stated = self.recipe.evaluate.seed
        return self.recipe.seed if stated is None else stated

    @property
    def training(self) -> str:
        """The whole training part as text: cells in which it is equal share one training."""
        stated = {"base": self.base, "data": self.train_data} | training_options(self)
        return json.dumps(stated, sort_keys=True)


def make_cell(recipe: Recipe, text: str, beside: Path, out: Path, name: str = "") -> Cell:
    """The cell of a recipe that stands in the folder `beside`. Raises RecipeError."""
    train, data = recipe.train, recipe.evaluate.data
    given = recipe.adapter or recipe.tuned
    return Cell(
        name=name,
        recipe=recipe,
        text=text,
        out=out,
        base=place(recipe.base, beside),
        train_data=place_data(train.data, beside) if train else None,
        fisher_data=place(train.fisher_data, beside) if train and train.fisher_data else None,
        validation=place(train.validation, beside) if train and train.validation else None,
        eval_data=str(beside / place(data, beside)) if data is not None else None,
        change=place(given, beside) if given else str(out / "train"),
    )


def training_options(cell: Cell) -> dict[str, Any]:
    """The keyword arguments of `finetune` that a recipe states."""
    assert cell.recipe.train is not None
    options = cell.recipe.train.model_dump(exclude={"data"})
    if options["seed"] is None:
        options["seed"] = cell.recipe.seed
    places = {"fisher_data": cell.fisher_data, "validation": cell.validation}
    return options | places | {"penalty": options["penalty"] or {}}


def check_inputs(cell: Cell) -> dict[str, str]:
    """What goes in, by name, as a hash. Raises for anything that a later stage would refuse."""
    from taia.evaluation.harness import check_options
    from taia.evaluation.loracl import LORACL
    from taia.evaluation.variants import identity, parse_variants
    from taia.sources import resolve

    stated = cell.recipe
    scoring = stated.evaluate
    check_options(
        scoring.protocol, scoring.limit, scoring.batch_size, scoring.dtype,
        stated.adapter, stated.tuned, scoring.shots,
    )  # fmt: skip
    inputs = {"base": identity(resolve(cell.base))}
    variants = parse_variants(scoring.variants)
    _check_selections(cell, [one.selection for one in variants if one.selection != LORACL])
    inputs |= _training_inputs(cell) if cell.trains else _given_change(cell)
    for task in tasks_of(cell):
        inputs[f"evaluation data: {task.name}"] = task.sha256 or task.source
    return inputs


def check_tasks(cell: Cell) -> None:
    """Raise EvaluationError for tasks that can only be told by their data not to be askable so."""
    scoring = cell.recipe.evaluate
    for task in tasks_of(cell):
        if scoring.shots or task.stated != task.name:  # worked examples, and what is lm-eval's own
            _check_task(task, scoring.protocol, scoring.shots)


@functools.cache
def _check_task(task: TaskSource, protocol: str, shots: int) -> None:
    from taia.evaluation.catalogue import load_task
    from taia.evaluation.examples import primary_metric

    primary_metric(load_task(task, protocol=protocol, shots=shots))


def held_out_files(cell: Cell) -> list[str]:
    """The local files of the tasks: what the training data should not hold."""
    return [task.source for task in tasks_of(cell) if task.sha256]


def tasks_of(cell: Cell) -> tuple[TaskSource, ...]:
    """The tasks that a cell evaluates, found and checked. Raises EvaluationError."""
    from taia.evaluation.catalogue import find_tasks

    data = Path(cell.eval_data) if cell.eval_data is not None else None
    return find_tasks(cell.recipe.evaluate.tasks, data)


def _training_inputs(cell: Cell) -> dict[str, str]:
    from taia.training.corpus import digest_of_data
    from taia.training.data import digest, read_chats
    from taia.training.loop import check_trackers
    from taia.training.settings import Settings

    stated = cell.recipe.train
    assert stated is not None
    assert cell.train_data is not None
    options = training_options(cell)
    check_trackers(options.pop("report_to"))
    if options.pop("save_steps") < 1:
        raise RecipeError("train.save_steps: at least 1 is needed")
    Settings(base=cell.base, data=cell.train_data, **options).check()
    inputs = {"training data": digest_of_data(cell.train_data, stated.max_examples)}
    if cell.fisher_data is not None:
        chats = read_chats(cell.fisher_data, max_examples=stated.fisher_examples)
        inputs["fisher data"] = digest(cell.fisher_data, chats)
    if cell.validation is not None:
        chats = read_chats(cell.validation)
        inputs["validation data"] = digest(cell.validation, chats)
    return inputs


def _given_change(cell: Cell) -> dict[str, str]:
    from taia.evaluation.variants import find_change, identity, parse_variants

    variants = parse_variants(cell.recipe.evaluate.variants)
    adapter = cell.change if cell.is_adapter else None
    tuned = None if cell.is_adapter else cell.change
    change = find_change(cell.base, adapter, tuned, variants)
    assert change is not None
    if change.path.resolve().is_relative_to(cell.out.resolve()):
        raise RecipeError(f"{cell.out}: {cell.change} is in there; name another folder")
    return {"adapter" if cell.is_adapter else "tuned": identity(change)}


def _check_selections(cell: Cell, selections: Sequence[str]) -> None:
    """Raise SelectionError for a term that matches nothing of the base model."""
    from taia.checkpoint import open_checkpoint
    from taia.kinds import classify_all
    from taia.load import materialise
    from taia.selection import Selection

    base = open_checkpoint(materialise(cell.base))
    addresses = classify_all(base.tensors, base.model_type, base.config)
    for selection in selections:
        Selection.parse(selection).strengths(addresses.values())
