"""Variants of one model on one set of tasks: load once, switch, score, write.

The base is loaded once. With an adapter every variant is a switch on the model in memory
(`taia.attach`); with a fine-tuned checkpoint every variant that is neither of the two is
spliced into a temporary folder and loaded from there.

A result file is written as soon as it is complete, and a complete file made with the same
settings is not computed again, so an interrupted evaluation goes on where it stopped.

Limits: one process and one device; large models run faster through lm-eval's vLLM backend
on a sliced adapter, with the same task files.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taia.errors import EvaluationError, OutputError, RecipeError
from taia.evaluation.catalogue import TaskSource, expand_groups, find_tasks, load_task
from taia.evaluation.examples import primary_metric
from taia.evaluation.protocol import check_protocol
from taia.evaluation.result import (
    Example,
    Settings,
    TaskInfo,
    Variant,
    read_examples,
    read_results,
    read_settings,
)
from taia.evaluation.summary import Summary, summarise
from taia.evaluation.variants import (
    VARIANTS,
    find_change,
    identity,
    parse_variants,
    shared_tokenizer,
    variant_models,
)
from taia.files import atomic_write
from taia.load import DTYPES
from taia.sources import Source, resolve

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.models.huggingface import HFLM

__all__ = ["Progress", "check_options", "evaluate"]

RUN_MARKS = ("settings.json", "recipe.yaml", "lock.json", "train")
"""A folder that holds one of these is a run, so results may be added to it."""

PACKAGES = ("taia", "torch", "transformers", "peft", "lm_eval", "datasets")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one variant is with one task; `done` of `total` count (prompt, choice) pairs."""

    variant: str
    task: str
    done: int
    total: int


def evaluate(
    base: str | Path,
    out: str | Path,
    *,
    tasks: Sequence[str],
    adapter: str | Path | None = None,
    tuned: str | Path | None = None,
    variants: Sequence[str] = VARIANTS,
    data: str | Path | None = None,
    limit: int | None = None,
    protocol: str = "chat",
    shots: int = 0,
    batch_size: int = 32,
    dtype: str = "bfloat16",
    seed: int = 0,
    overwrite: bool = False,
    resume: bool = True,
    on_progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """Score variants of `base` and write result files and summary.json into `out`.

    `variants`: presets, selections, or NAME=SELECTION; without `adapter` or `tuned` only
    the base. `data`: a folder of JSON Lines, None is the hub. `limit`: the first so many
    records of every task. `shots`: few-shot examples before each question. `batch_size`
    counts (prompt, choice) pairs. `overwrite` starts over; `resume` keeps complete files that
    the same settings made.
    Raises a TaiaError; what was complete by then stays.
    """
    check_options(protocol, limit, batch_size, dtype, adapter, tuned, shots)
    out, tasks = Path(out), expand_groups(tasks)
    earlier = _earlier(out, overwrite=overwrite)
    named = parse_variants(variants)
    if earlier is not None:  # a run is a full table: what is added, is added for all
        tasks = [*earlier.tasks, *(name for name in tasks if name not in earlier.tasks)]
        mine = {variant.name: variant for variant in named}
        named = (*(mine.pop(one.name, one) for one in earlier.variants), *mine.values())
    change = find_change(base, adapter, tuned, named)
    found = find_tasks(tasks, Path(data) if data is not None else None)
    asked = Settings(
        base=str(base),
        base_identity=identity(resolve(base)),
        tuned=change.text if change else None,
        tuned_form=None if change is None else ("adapter" if adapter is not None else "tuned"),
        tuned_identity=identity(change) if change else None,
        protocol=protocol,
        limit=limit,
        seed=seed,
        dtype=dtype,
        batch_size=batch_size,
        data=str(data) if data is not None else None,
        tasks={},
        variants=named,
        versions=_versions(),
        shots=shots,
    )
    job = Job(out, asked, found, base, change, on_progress)
    if earlier is not None:
        _check_same(job, earlier, resume=resume)
    _run(job, earlier, overwrite=overwrite)
    summary = summarise(read_results(out))
    text = json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False)
    atomic_write(out / "summary.json", text + "\n")
    return summary


@dataclass(frozen=True, slots=True)
class Job:
    """An evaluation that was checked and can run."""

    out: Path
    asked: Settings
    tasks: tuple[TaskSource, ...]
    base: str | Path
    change: Source | None
    on_progress: Callable[[Progress], None] | None

    def file(self, variant: Variant, task: str) -> Path:
        """Where the examples of one variant and task are."""
        return self.out / "results" / variant.folder / f"{task}.jsonl"

    def missing(self, variant: Variant, known: Mapping[str, TaskInfo]) -> list[TaskSource]:
        """The tasks that have no complete file for `variant`."""
        return [
            task for task in self.tasks if not self._complete(variant, known.get(task.name), task)
        ]

    def _complete(self, variant: Variant, info: TaskInfo | None, task: TaskSource) -> bool:
        if info is None:
            return False
        try:
            read_examples(self.file(variant, task.name), expected=info.examples)
        except EvaluationError:
            return False
        return True


def check_options(
    protocol: str,
    limit: int | None,
    batch_size: int,
    dtype: str,
    adapter: str | Path | None,
    tuned: str | Path | None,
    shots: int = 0,
) -> None:
    """Raise RecipeError with every option that no evaluation can have."""
    faults = []
    if dtype not in DTYPES:
        faults.append(f"dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    faults += check_protocol(protocol, shots)
    if limit is not None and limit < 1:
        faults.append(f"limit {limit}: at least 1 example, or leave it out for all")
    if batch_size < 1:
        faults.append(f"batch size {batch_size}: at least 1")
    if adapter is not None and tuned is not None:
        faults.append("adapter and tuned: give one of them, the form in which the tuning is stored")
    if faults:
        raise RecipeError("the evaluation cannot be run:", faults)


def _earlier(out: Path, *, overwrite: bool) -> Settings | None:
    """The settings of an evaluation in `out` that is to be added to; None starts a new one."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: exists and is not a folder")
    if not out.exists() or not any(out.iterdir()):
        return None
    if (out / "config.json").exists() or (out / "adapter_config.json").exists():
        raise OutputError(f"{out}: is a model; name another folder for the results")
    if (out / "settings.json").exists():
        before = read_settings(out)
        return None if overwrite else before
    if overwrite and (out / "results").exists() and not (out / "summary.json").exists():
        raise OutputError(f"{out}: exists and is not a run, so it is not overwritten")
    if (out / "results").exists() and not overwrite:
        raise EvaluationError(
            f"{out}: has results but no settings.json, so what made them is not known. "
            "Use --overwrite to evaluate again, or name another folder"
        )
    if not any((out / mark).exists() for mark in RUN_MARKS):
        raise OutputError(f"{out}: exists and is not a run; name another folder")
    return None


def _begin(out: Path, settings: Settings, *, overwrite: bool) -> None:
    """Write down what is asked; with `overwrite` clear what an earlier evaluation left."""
    if overwrite:
        shutil.rmtree(out / "results", ignore_errors=True)
    (out / "summary.json").unlink(missing_ok=True)
    atomic_write(out / "settings.json", settings.to_json())


def _check_same(job: Job, before: Settings, *, resume: bool) -> None:
    """Raise when the results in `out` were made with other settings, or are not to be used."""
    if not resume:
        raise OutputError(f"{job.out}: was evaluated before; use --overwrite to start over")
    now = job.asked
    ignored = {"tasks", "variants", "versions", "batch_size", "data", "base", "tuned"}
    differing = [
        f"{field.name}: {getattr(before, field.name)!r} then, {getattr(now, field.name)!r} now"
        for field in fields(Settings)
        if field.name not in ignored and getattr(before, field.name) != getattr(now, field.name)
    ]
    for task in job.tasks:
        info = before.tasks.get(task.name)
        if info is None:
            continue
        for what, then, today in (
            ("data", info.source, task.source),
            ("sha256 of the data", info.sha256 or "", task.sha256),
        ):
            if then != today and (what != "data" or not (info.sha256 and task.sha256)):
                differing.append(f"{what} of {task.name}: {then!r} then, {today!r} now")
    selections = {one.name: one.selection for one in before.variants}
    differing += [
        f"variant {one.name}: {selections[one.name]!r} then, {one.selection!r} now"
        for one in now.variants
        if selections.get(one.name, one.selection) != one.selection
    ]
    if differing:
        raise EvaluationError(
            f"{job.out}: its results were made with other settings. Name another folder, or use "
            "--overwrite to evaluate again",
            differing,
        )


def _run(job: Job, earlier: Settings | None, *, overwrite: bool) -> None:
    """Score what is missing and write every file when it is there.

    Nothing is written or cleared before the first model is ready.
    """
    known = earlier.tasks if earlier is not None else {}
    missing = {variant: job.missing(variant, known) for variant in job.asked.variants}
    needed = {task.name: task for tasks in missing.values() for task in tasks}
    if not needed:
        return
    loaded = {
        name: load_task(task, protocol=job.asked.protocol, shots=job.asked.shots)
        for name, task in needed.items()
    }
    infos = {
        task.name: _task_info(job, task, loaded[task.name])
        if task.name in loaded
        else known[task.name]
        for task in job.tasks
    }
    settings = replace(job.asked, tasks=infos)
    tokenizer = shared_tokenizer(job.base, job.change, chat=settings.protocol != "plain")
    wanted = [variant for variant in settings.variants if missing[variant]]
    for variant, lm in variant_models(
        job.base,
        job.change,
        wanted,
        tokenizer,
        dtype=settings.dtype,
        batch_size=settings.batch_size,
    ):
        if variant == wanted[0]:
            _begin(job.out, settings, overwrite=overwrite)
        for source in missing[variant]:
            examples = _score(job, lm, variant, source, loaded[source.name])
            text = "".join(f"{example.to_json()}\n" for example in examples)
            atomic_write(job.file(variant, source.name), text)
        del lm  # or the next model would stand beside it in memory


def _task_info(job: Job, source: TaskSource, task: Task) -> TaskInfo:
    count = len(task.eval_docs)
    examples = count if job.asked.limit is None else min(count, job.asked.limit)
    return TaskInfo(examples, primary_metric(task), source.source, source.sha256 or None)


def _score(job: Job, lm: HFLM, variant: Variant, source: TaskSource, task: Task) -> list[Example]:
    from taia.evaluation.scoring import score

    def told(done: int, total: int) -> None:
        if job.on_progress:
            job.on_progress(Progress(variant.name, source.name, done, total))

    return score(
        lm,
        source.name,
        task,
        limit=job.asked.limit,
        protocol=job.asked.protocol,
        seed=job.asked.seed,
        on_progress=told,
    )


def _versions() -> dict[str, str]:
    found: dict[str, Any] = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
