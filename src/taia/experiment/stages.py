"""The stages of one run, each from files of the run to files of the run.

    train       RUN/train/           the adapter or model, with its log
    overlap     RUN/overlap.json     training records that hold something of the tasks' records
    deltas      RUN/deltas.json      where the fine-tuning wrote
    evaluate    RUN/results/         one file a variant and task, and RUN/summary.json
    report      RUN/report.html

A stage is done when its file is there and the lock says so. A training that was cut off goes on
from its last checkpoint, an evaluation from what is complete of it.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from taia.experiment.cell import Cell, held_out_files, training_options
from taia.experiment.lock import finish_stage, forget_after, remove
from taia.files import atomic_write, staged_folder

if TYPE_CHECKING:
    from taia.evaluation.harness import Progress

__all__ = [
    "PARTS",
    "CellTask",
    "Stage",
    "carry_out",
    "evaluation",
    "share_training",
    "stages",
    "trained",
    "undone",
]


PARTS = "parts"
"""Where a run on a cluster keeps what its tasks scored until it is put together."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage: its name, the file that appears when it is done, and what does it."""

    name: str
    product: str
    do: Callable[[Cell, Console], None]


@dataclass(frozen=True, slots=True, eq=False)
class CellTask:
    """A cell with its lock, and the cell whose training it takes, None where it has its own."""

    cell: Cell
    lock: dict[str, Any]
    owner: Cell | None


def stages(cell: Cell) -> list[Stage]:
    """The stages of a cell in their order."""
    trained = [
        Stage("train", "train/train.json", _train),
        Stage("overlap", "overlap.json", _overlap),
    ]
    return (trained if cell.trains else []) + [
        Stage("deltas", "deltas.json", _deltas),
        Stage("evaluate", "summary.json", _evaluate),
        Stage("report", "report.html", _report),
    ]


def undone(cell: Cell, lock: Mapping[str, Any]) -> list[Stage]:
    """The stages that are left: what follows a stage carried out again is carried out again."""
    all_stages = stages(cell)
    for at, stage in enumerate(all_stages):
        if stage.name not in lock["stages"] or not (cell.out / stage.product).is_file():
            return all_stages[at:]
    return []


def trained(cell: Cell, lock: Mapping[str, Any]) -> bool:
    """Whether the training of a cell is done."""
    return "train" in lock["stages"] and (cell.out / "train" / "train.json").is_file()


def carry_out(task: CellTask, console: Console) -> None:
    """Carry out what is left of a cell, one stage after another."""
    cell, lock, owner = task.cell, task.lock, task.owner
    left = undone(cell, lock)
    for stage in stages(cell):
        told = f"{cell.name}: {stage.name}" if cell.name else stage.name
        if stage not in left:
            console.print(f"[bold]{told}[/bold]: done before")
            continue
        console.print(f"[bold]{told}[/bold] ...")
        start = time.monotonic()
        facts: dict[str, Any] = {}
        if stage.name == "train":
            forget_after(cell, lock, "train")
        if stage.name == "train" and owner is not None:
            share_training(owner, cell)
            facts["from"] = owner.name
        else:
            stage.do(cell, console)
        seconds = time.monotonic() - start
        finish_stage(cell, lock, stage.name, facts | {"seconds": round(seconds, 1)})
        console.print(f"[bold]{told}[/bold]: done in {_duration(seconds)}")


def share_training(owner: Cell, cell: Cell) -> None:
    """Give `cell` the finished training of `owner`, as links where the file system has them."""
    source = owner.out / "train"
    with staged_folder(cell.out / "train", overwrite=True) as folder:
        for file in sorted(source.rglob("*")):
            target = folder / file.relative_to(source)
            if file.is_dir():
                target.mkdir()
            else:
                _link(file, target)


def evaluation(cell: Cell) -> dict[str, Any]:
    """The keyword arguments of `taia.evaluate` that a cell states."""
    stated = cell.recipe.evaluate
    return {
        **stated.model_dump(exclude={"data", "seed"}),
        "adapter": cell.change if cell.is_adapter else None,
        "tuned": None if cell.is_adapter else cell.change,
        "data": cell.eval_data,
        "seed": cell.seed,
    }


def _train(cell: Cell, _: Console) -> None:
    from taia.training.finetune import finetune

    assert cell.train_data is not None
    options = training_options(cell)
    finetune(cell.base, cell.train_data, cell.out / "train", resume=True, **options)


def _overlap(cell: Cell, console: Console) -> None:
    """Tell which training records hold something of the tasks' local files; none is left out."""
    from taia.training.corpus import read_data
    from taia.training.mixture import Mixture
    from taia.training.overlap import find_overlap, read_held_out
    from taia.training.settings import Settings

    files = held_out_files(cell)
    options = training_options(cell)
    del options["save_steps"], options["report_to"]
    assert cell.train_data is not None
    read = read_data(Settings(base=cell.base, data=cell.train_data, **options))
    data = cell.train_data
    names = [one.name for one in Mixture.parse(data).sources] if isinstance(data, dict) else [data]
    held_out = read_held_out(files) if files else None
    rows = []
    for name, chats in zip(names, read, strict=True):
        found = find_overlap(chats, held_out) if held_out else {}
        exact = sum(one.exact for one in found.values())
        rows.append({"source": name, "records": len(chats), "exact": exact,
                     "grams": len(found) - exact})  # fmt: skip
        if found:
            console.print(
                f"  {name}: of {len(chats):,} records {exact:,} hold a question of the tasks word "
                f"for word, {len(found) - exact:,} share 13 words in a row with one",
                highlight=False,
            )
    told = {"held_out": [Path(file).name for file in files], "sources": rows}
    atomic_write(cell.out / "overlap.json", json.dumps(told, indent=1) + "\n")


def _deltas(cell: Cell, _: Console) -> None:
    from taia.analysis.deltas import delta_norms, write_deltas
    from taia.load import materialise

    change = cell.change if cell.is_adapter else materialise(cell.change)
    write_deltas(delta_norms(materialise(cell.base), change), cell.out / "deltas.json")


def _evaluate(cell: Cell, console: Console) -> None:
    from taia.evaluation.harness import evaluate

    def told(progress: Progress) -> None:
        if progress.done == progress.total:
            console.print(f"  {progress.variant}: {progress.task}")

    evaluate(cell.base, cell.out, **evaluation(cell), on_progress=told)
    remove(cell.out / PARTS)


def _report(cell: Cell, _: Console) -> None:
    from taia.report import report

    report(cell.out)


def _link(file: Path, target: Path) -> None:
    try:
        os.link(file, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(file, target)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
