"""A recipe carried out: train, measure the deltas, evaluate, report. Resumable.

    RUN/recipe.yaml     the recipe as it was given
    RUN/lock.json       what it resolved to: recipe, inputs and their hashes, finished stages
    RUN/...             the files of the stages (`taia.experiment.stages`)

A recipe with a sweep is carried out cell by cell, each a run of its own:

    RUN/recipe.yaml, RUN/lock.json
    RUN/cells/NAME/     the files of one run; of cells with an equal training part the first
                        trains, the others get its training
    RUN/sweep.json      the scores of all cells
    RUN/report.html     their figure and table

A second call starts at the first stage that is not done. A sweep may be given more values later:
the cells that are there stay.

Without Ray this process carries out one cell after another; with it a cluster does
(`taia.experiment.on_ray`), and the files are the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console

from taia.errors import EvaluationError, RecipeError, TaiaError
from taia.experiment.cell import Cell, check_inputs, check_tasks, make_cell, training_options
from taia.experiment.lock import (
    FOLDER_MEND,
    begin,
    check_folder,
    read_lock,
    remove,
    start_anew,
    write_lock,
)
from taia.experiment.on_ray import carry_out_on_ray, check_address, connected
from taia.experiment.stages import CellTask, carry_out, trained, undone
from taia.files import atomic_write
from taia.recipe import load_recipe
from taia.sweep import Sweep, SweepCell, load_sweep

if TYPE_CHECKING:
    from taia.training.finetune import TrainResult
    from taia.training.preview import Preview

__all__ = ["preview_recipe", "run", "train_recipe"]

SCORED = ("sweep.json", "report.html")
"""What a sweep tells of all its cells together."""


def run(
    recipe: str | Path,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    ray: str | None = None,
) -> Path:
    """Carry out a recipe, or what of it is not done yet, and return the run's folder.

    `out`: runs/NAME under the current folder without it. `overwrite` starts over. `ray`: the
    address of a Ray cluster that carries out the cells, or `local` for one of this machine.
    Raises RecipeError (a recipe that cannot be run, or another one than the folder's),
    OutputError (a folder that is no run), and what the stages raise. Inputs are checked
    before anything is written.
    """
    path = Path(recipe)
    sweep = load_sweep(path)
    folder = Path(out) if out is not None else Path("runs") / sweep.name
    check_folder(folder, overwrite=overwrite)
    text = path.read_text("utf-8")
    if ray is not None:
        check_address(ray)
    tasks, new = _tasks(sweep, text, path.parent, folder, overwrite=overwrite)
    changed = any(undone(task.cell, task.lock) for task in tasks)
    console = Console(stderr=True)
    with connected(ray, sweep.resources, tasks) if ray and changed else nullcontext() as cluster:
        if sweep.axes:
            _begin_sweep(sweep, folder, text, overwrite=overwrite)
        if sweep.axes and changed:
            _forget_scores(folder)
        for task in new:
            start_anew(task.cell.out, task.lock, task.cell.text)
        if cluster is not None:
            carry_out_on_ray(cluster, tasks, sweep.resources, console)
        else:
            for task in tasks:
                carry_out(task, console)
    if sweep.axes:
        _report_sweep(sweep, folder)
    return folder


def train_recipe(
    recipe: str | Path, out: str | Path, *, resume: bool = False, overwrite: bool = False
) -> TrainResult:
    """Carry out the training of a recipe alone, into the folder `out`.

    For several processes (`accelerate launch`), which `run` is not made for. Raises RecipeError
    for a recipe without `train`, and what `taia.finetune` raises.
    """
    from taia.training.finetune import finetune

    cell = _training_cell(Path(recipe), Path(out))
    assert cell.train_data is not None
    options = training_options(cell)
    return finetune(cell.base, cell.train_data, out, resume=resume, overwrite=overwrite, **options)


def preview_recipe(recipe: str | Path) -> Preview:
    """What the training of a recipe would see; nothing is written."""
    from taia.training.preview import preview

    cell = _training_cell(Path(recipe), Path())
    assert cell.train_data is not None
    options = training_options(cell)
    del options["save_steps"], options["report_to"]
    return preview(cell.base, cell.train_data, **options)


def _training_cell(path: Path, out: Path) -> Cell:
    stated = load_recipe(path)
    if stated.train is None:
        raise RecipeError(f"{path}: states no training: it has no field train")
    return make_cell(stated, "", path.parent, out)


def _tasks(
    sweep: Sweep, text: str, beside: Path, folder: Path, *, overwrite: bool
) -> tuple[list[CellTask], list[CellTask]]:
    """Every cell, checked, and those that begin; the faults of all together. Writes nothing."""
    checked: list[tuple[Cell, dict[str, Any], bool]] = []
    told: dict[str, list[TaiaError]] = {}
    for one in sweep.cells:
        out = folder / "cells" / one.name if sweep.axes else folder
        shown = _text_of(sweep, one) if sweep.axes else text
        try:
            if sweep.axes:
                check_folder(out, overwrite=overwrite)
            cell = make_cell(one.recipe, shown, beside, out, one.name if sweep.axes else "")
            inputs = check_inputs(cell)
            lock = begin(cell, inputs, overwrite=overwrite)
            new = overwrite or read_lock(out) is None
            if new:
                check_tasks(cell)
        except TaiaError as error:
            told.setdefault(str(error), []).append(error)
            continue
        checked.append((cell, lock, new))
    if told:
        raise _together(sweep, told)
    owners = _owners((cell, lock) for cell, lock, _ in checked)
    tasks = [CellTask(cell, lock, owners.get(cell.name)) for cell, lock, _ in checked]
    begun = [task for task, (_, _, new) in zip(tasks, checked, strict=True) if new]
    return tasks, begun


def _owners(cells: Iterable[tuple[Cell, dict[str, Any]]]) -> dict[str, Cell]:
    """Cell name -> the cell whose equal training it takes; cells that train are left out.

    The one that trains is the one that has trained already, else the first.
    """
    groups: dict[str, list[tuple[Cell, dict[str, Any]]]] = {}
    for cell, lock in cells:
        if cell.trains:
            groups.setdefault(cell.training, []).append((cell, lock))
    owners: dict[str, Cell] = {}
    for group in groups.values():
        done = [cell for cell, lock in group if trained(cell, lock)]
        owner = done[0] if done else group[0][0]
        owners |= {cell.name: owner for cell, _ in group if cell is not owner}
    return owners


def _together(sweep: Sweep, told: dict[str, list[TaiaError]]) -> TaiaError:
    """One error for those of all cells: the error itself where there is one only."""
    if len(told) == 1:
        return next(iter(told.values()))[0]
    faults = [str(errors[0]).replace("\n", "\n  ") for errors in told.values()]
    return RecipeError(f"{sweep.name}: not all cells can be run", faults)


def _text_of(sweep: Sweep, cell: SweepCell) -> str:
    """recipe.yaml of one cell of a sweep."""
    head = (
        f"# One cell of the sweep {sweep.name}: "
        + ", ".join(f"{axis.name} {label}" for axis, label in zip(sweep.axes, cell.labels,
                                                                  strict=True))
        + ".\n# Relative paths are relative to the folder of the sweep's recipe.\n"
    )  # fmt: skip
    return head + yaml.safe_dump(dict(cell.content), sort_keys=False, allow_unicode=True)


def _begin_sweep(sweep: Sweep, folder: Path, text: str, *, overwrite: bool) -> None:
    """Write RUN/lock.json and RUN/recipe.yaml of a sweep, where they are not there already."""
    names = [cell.name for cell in sweep.cells]
    axes = [{"field": axis.field, "values": list(axis.labels)} for axis in sweep.axes]
    lock = {"recipe": {"name": sweep.name}, "sweep": axes, "cells": names}
    before = None if overwrite else read_lock(folder)
    if before is not None:
        if not isinstance(before.get("cells"), list):
            raise RecipeError(f"{folder}: is a single run, not one of a sweep. {FOLDER_MEND}")
        gone = [name for name in before["cells"] if name not in names]
        if gone:
            raise RecipeError(
                f"{folder}: holds cells that the recipe no longer states. {FOLDER_MEND}", gone
            )
        stored = folder / "recipe.yaml"
        if before == lock and stored.is_file() and stored.read_text("utf-8") == text:
            return
        _forget_scores(folder)  # cells or the figure's axis may be others
        write_lock(folder, lock)
        atomic_write(folder / "recipe.yaml", text)
        return
    start_anew(folder, lock, text)


def _forget_scores(folder: Path) -> None:
    """Remove what is told of all cells: a run that is cut off leaves none of an earlier one."""
    for name in SCORED:
        remove(folder / name)


def _report_sweep(sweep: Sweep, folder: Path) -> None:
    """Write sweep.json and report.html, where they are not there or cannot be read."""
    from taia.sweep_report import report_sweep
    from taia.sweep_scores import read_scores, write_scores

    with suppress(EvaluationError):
        read_scores(folder)
        if all((folder / name).is_file() for name in SCORED):
            return
    write_scores(sweep, folder)
    report_sweep(folder)
