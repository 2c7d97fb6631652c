"""A recipe carried out: train, measure the deltas, evaluate, report. Resumable.

    RUN/recipe.yaml     the recipe as it was given
    RUN/lock.json       what it resolved to: recipe, inputs and their hashes, finished stages
    RUN/train/          the adapter or model, with its log
    RUN/deltas.json     where the fine-tuning wrote
    RUN/results/        one file a variant and task, and what they add up to in summary.json
    RUN/report.html

Each stage reads and writes files of the run only, and is done when its files are there and
the lock says so. A second call starts at the first stage that is not done; a training that
was cut off goes on from its last checkpoint, an evaluation from its last complete file. A
run belongs to one recipe and to the data as they were: anything else is refused, because a
folder with parts of two experiments looks like one.

Limits: one machine, one cell; no names of hosts or users are recorded.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from taia.errors import OutputError, RecipeError
from taia.files import atomic_write, read_json
from taia.receipt import digest_of
from taia.recipe import Recipe, load_recipe, place, place_data

if TYPE_CHECKING:
    from taia.evaluation.harness import Progress
    from taia.training.finetune import TrainResult
    from taia.training.preview import Preview

__all__ = ["preview_recipe", "run", "train_recipe"]

LOCK = "lock.json"
OWN = (
    "recipe.yaml", LOCK, "train", "deltas.json", "settings.json", "results", "summary.json",
    "report.html",
)  # fmt: skip
"""Everything that a run writes, in its order; `overwrite` removes these and nothing else."""

PACKAGES = (
    "taia", "torch", "transformers", "peft", "trl", "accelerate", "lm_eval", "safetensors", "numpy",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cell:
    """A recipe whose paths are filled in, and the folder of its run.

    base: a source; change: the adapter or tuned model, made by the run or given.
    """

    recipe: Recipe
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


def run(recipe: str | Path, out: str | Path | None = None, *, overwrite: bool = False) -> Path:
    """Carry out a recipe, or what of it is not done yet, and return the run's folder.

    `out`: runs/NAME under the current folder without it. `overwrite` starts over.
    Raises RecipeError (a recipe that cannot be run, or another one than the folder's),
    OutputError (a folder that is no run), and what the stages raise. Inputs are checked
    before anything is written.
    """
    path = Path(recipe)
    stated = load_recipe(path)
    folder = Path(out) if out is not None else Path("runs") / stated.name
    cell = _cell(stated, path.parent, folder)
    _check_folder(folder, overwrite=overwrite)
    inputs = _check_inputs(cell)
    lock = _begin(cell, path.read_text("utf-8"), inputs, overwrite=overwrite)
    console = Console(stderr=True)
    stale = False  # what follows a stage that was carried out again is carried out again too
    for name, product, stage in _stages(cell):
        if not stale and name in lock["stages"] and (folder / product).is_file():
            console.print(f"[bold]{name}[/bold]: done before")
            continue
        stale = True
        console.print(f"[bold]{name}[/bold] ...")
        start = time.monotonic()
        if name == "train":  # what follows is of the old fine-tune, if there is anything
            for later in OWN[OWN.index("train") + 1 :]:
                _remove(folder / later)
            lock["stages"].clear()
        stage(cell, console)
        seconds = time.monotonic() - start
        lock["stages"][name] = {"seconds": round(seconds, 1)}
        lock["hashes"] = _hashes(cell, inputs)
        _write_lock(folder, lock)
        console.print(f"[bold]{name}[/bold]: done in {_duration(seconds)}")
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
    options = _training_options(cell)
    return finetune(cell.base, cell.train_data, out, resume=resume, overwrite=overwrite, **options)


def preview_recipe(recipe: str | Path) -> Preview:
    """What the training of a recipe would see; nothing is written."""
    from taia.training.preview import preview

    cell = _training_cell(Path(recipe), Path())
    assert cell.train_data is not None
    options = _training_options(cell)
    del options["save_steps"], options["report_to"]
    return preview(cell.base, cell.train_data, **options)


def _training_cell(path: Path, out: Path) -> Cell:
    stated = load_recipe(path)
    if stated.train is None:
        raise RecipeError(f"{path}: states no training: it has no field train")
    return _cell(stated, path.parent, out)


def _stages(cell: Cell) -> list[tuple[str, str, Callable[[Cell, Console], None]]]:
    """The stages in their order: name, the file that appears when it is done, what does it."""
    training: list[tuple[str, str, Callable[[Cell, Console], None]]] = [
        ("train", "train/train.json", _train)
    ]
    return (training if cell.trains else []) + [
        ("deltas", "deltas.json", _deltas),
        ("evaluate", "summary.json", _evaluate),
        ("report", "report.html", _report),
    ]


def _cell(recipe: Recipe, beside: Path, out: Path) -> Cell:
    train, data = recipe.train, recipe.evaluate.data
    given = recipe.adapter or recipe.tuned
    return Cell(
        recipe=recipe,
        out=out,
        base=place(recipe.base, beside),
        train_data=place_data(train.data, beside) if train else None,
        fisher_data=place(train.fisher_data, beside) if train and train.fisher_data else None,
        validation=place(train.validation, beside) if train and train.validation else None,
        eval_data=str(beside / place(data, beside)) if data is not None else None,
        change=place(given, beside) if given else str(out / "train"),
    )


def _check_folder(out: Path, *, overwrite: bool) -> None:
    """Refuse a folder that is not empty and not a run."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: exists and is not a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / LOCK).is_file():
        mend = "; it is not a run, so --overwrite does not touch it either" if overwrite else ""
        raise OutputError(f"{out}: exists and is not a run; name another folder{mend}")


def _check_inputs(cell: Cell) -> dict[str, str]:
    """What goes in, by name, as a hash. Raises for anything that a later stage would refuse."""
    from taia.evaluation.catalogue import find_tasks
    from taia.evaluation.harness import check_options
    from taia.evaluation.loracl import LORACL
    from taia.evaluation.variants import find_change, identity, parse_variants
    from taia.sources import resolve
    from taia.training.corpus import digest_of_data
    from taia.training.data import digest, read_chats
    from taia.training.loop import check_trackers
    from taia.training.settings import Settings

    stated = cell.recipe
    scoring = stated.evaluate
    check_options(
        scoring.protocol, scoring.limit, scoring.batch_size, scoring.dtype,
        stated.adapter, stated.tuned, scoring.shots,
    )  # fmt: skip
    inputs = {"base": identity(resolve(cell.base))}
    variants = parse_variants(stated.evaluate.variants)
    _check_selections(cell, [one.selection for one in variants if one.selection != LORACL])
    if stated.train is not None:
        assert cell.train_data is not None
        options = _training_options(cell)
        check_trackers(options.pop("report_to"))
        if options.pop("save_steps") < 1:
            raise RecipeError("train.save_steps: at least 1 is needed")
        Settings(base=cell.base, data=cell.train_data, **options).check()
        inputs["training data"] = digest_of_data(cell.train_data, stated.train.max_examples)
        if cell.fisher_data is not None:
            chats = read_chats(cell.fisher_data, max_examples=stated.train.fisher_examples)
            inputs["fisher data"] = digest(cell.fisher_data, chats)
        if cell.validation is not None:
            chats = read_chats(cell.validation)
            inputs["validation data"] = digest(cell.validation, chats)
    else:
        form = {"adapter": cell.change if cell.is_adapter else None}
        form["tuned"] = None if cell.is_adapter else cell.change
        change = find_change(cell.base, form["adapter"], form["tuned"], variants)
        assert change is not None
        if change.path.resolve().is_relative_to(cell.out.resolve()):
            raise RecipeError(f"{cell.out}: {cell.change} is in there; name another folder")
        inputs["adapter" if cell.is_adapter else "tuned"] = identity(change)
    data = Path(cell.eval_data) if cell.eval_data is not None else None
    for task in find_tasks(stated.evaluate.tasks, data):
        inputs[f"evaluation data: {task.name}"] = task.sha256 or task.source
    return inputs


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


def _begin(cell: Cell, text: str, inputs: Mapping[str, str], *, overwrite: bool) -> dict[str, Any]:
    """The run's lock: the one that is there, if of the same recipe and inputs, or a new one."""
    stated = json.loads(cell.recipe.model_dump_json())
    if (cell.out / LOCK).is_file() and not overwrite:
        lock: dict[str, Any] = read_json(cell.out / LOCK)
        if not isinstance(lock, dict) or not isinstance(lock.get("stages"), dict):
            raise RecipeError(f"{cell.out / LOCK}: is not the lock of a run; use --overwrite")
        differing = _differences(lock, {"recipe": stated, "inputs": dict(inputs)})
        if differing:
            raise RecipeError(
                f"{cell.out}: is a run of another recipe, or of other data. Give the recipe "
                "another name, name another folder, or start over with --overwrite",
                differing,
            )
        return lock
    for name in OWN:
        _remove(cell.out / name)
    lock = {
        "recipe": stated,
        "report": stated["report"],
        "inputs": dict(inputs),
        "hashes": {},
        "stages": {},
        "versions": _versions(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }
    _write_lock(cell.out, lock)
    atomic_write(cell.out / "recipe.yaml", text)
    return lock


def _train(cell: Cell, _: Console) -> None:
    from taia.training.finetune import finetune

    assert cell.train_data is not None
    finetune(
        cell.base, cell.train_data, cell.out / "train", resume=True,
        **_training_options(cell),
    )  # fmt: skip


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

    stated = cell.recipe.evaluate
    evaluate(
        cell.base,
        cell.out,
        tasks=stated.tasks,
        adapter=cell.change if cell.is_adapter else None,
        tuned=None if cell.is_adapter else cell.change,
        variants=stated.variants,
        data=cell.eval_data,
        limit=stated.limit,
        protocol=stated.protocol,
        shots=stated.shots,
        batch_size=stated.batch_size,
        dtype=stated.dtype,
        seed=cell.recipe.seed if stated.seed is None else stated.seed,
        on_progress=told,
    )


def _report(cell: Cell, _: Console) -> None:
    from taia.report import report

    report(cell.out)


def _training_options(cell: Cell) -> dict[str, Any]:
    """The keyword arguments of `finetune` that a recipe states."""
    assert cell.recipe.train is not None
    options = cell.recipe.train.model_dump(exclude={"data"})
    if options["seed"] is None:
        options["seed"] = cell.recipe.seed
    places = {"fisher_data": cell.fisher_data, "validation": cell.validation}
    return options | places | {"penalty": options["penalty"] or {}}


def _differences(lock: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for every field of recipe and inputs that is not what the lock holds."""
    before = {part: lock.get(part) for part in now}
    old, new = _flat(before), _flat(now)
    return [
        f"{name}: {old.get(name)!r} before, {new.get(name)!r} now"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Leaves of nested mappings by dotted name."""
    if not isinstance(value, dict):
        return {name: value}
    return {
        key: leaf
        for field, item in value.items()
        for key, leaf in _flat(item, f"{name}.{field}" if name else field).items()
    }


def _hashes(cell: Cell, inputs: Mapping[str, str]) -> dict[str, str]:
    """SHA-256 of the data and of the adapter's weights, for the lock and the report."""
    found = {name: value for name, value in inputs.items() if len(value) == 64}
    weights = Path(cell.change) / "adapter_model.safetensors"
    if weights.is_file():
        found["adapter"] = digest_of(weights)
    return found


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _write_lock(out: Path, lock: Mapping[str, Any]) -> None:
    atomic_write(out / LOCK, json.dumps(lock, indent=1, ensure_ascii=False) + "\n")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
