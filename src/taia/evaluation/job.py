"""An evaluation that was asked for, checked against itself and against what is there.

Everything here reads; nothing is written and no model is loaded. A `Job` is plain data, so it can
be sent to another process, which then computes some of its cells.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taia.errors import EvaluationError, OutputError, RecipeError
from taia.evaluation.catalogue import TaskSource, expand_groups, find_tasks, load_task
from taia.evaluation.examples import primary_metric
from taia.evaluation.foreign import stated_as
from taia.evaluation.protocol import check_protocol
from taia.evaluation.result import (
    Settings,
    TaskInfo,
    Variant,
    read_examples,
    read_settings,
)
from taia.evaluation.variants import VARIANTS, find_change, identity, parse_variants
from taia.load import DTYPES
from taia.sources import Source, resolve

if TYPE_CHECKING:
    from lm_eval.api.task import Task

__all__ = ["BACKENDS", "Job", "check_options", "check_same", "prepare"]

BACKENDS = ("hf", "vllm")
"""What computes: transformers in this process, or vLLM."""

RUN_MARKS = ("settings.json", "recipe.yaml", "lock.json", "train")
"""A folder that holds one of these is a run, so results may be added to it."""

PACKAGES = ("taia", "torch", "transformers", "peft", "lm_eval", "datasets")


@dataclass(frozen=True, slots=True)
class Job:
    """An evaluation that was checked and can run; `asked` is its settings.json.

    `overwrite`: clear what an earlier evaluation left. `cache`: use the scores of earlier runs.
    """

    out: Path
    asked: Settings
    tasks: tuple[TaskSource, ...]
    base: str | Path
    change: Source | None
    overwrite: bool
    cache: bool
    backend: str

    def file(self, variant: Variant, task: str) -> Path:
        """Where the examples of one variant and task are."""
        return self.out / "results" / variant.folder / f"{task}.jsonl"

    def missing(self, variant: Variant) -> list[TaskSource]:
        """The tasks that have no complete file for `variant`."""
        return [task for task in self.tasks if not self.complete(variant, task.name)]

    def complete(self, variant: Variant, task: str) -> bool:
        """Whether the file of one variant and task is there and whole."""
        if self.overwrite or task not in self.asked.tasks:
            return False
        try:
            read_examples(self.file(variant, task), expected=self.asked.tasks[task].examples)
        except EvaluationError:
            return False
        return True

    def other_versions(self) -> str:
        """What is to be told of results that other versions made; empty where there are none."""
        if self.overwrite or not (self.out / "settings.json").is_file():
            return ""
        then, now = read_settings(self.out).versions, self.asked.versions
        changed = [f"{name} {then[name]} then, {now.get(name, 'none')} now"
                   for name in then if then[name] != now.get(name)]  # fmt: skip
        if not changed:
            return ""
        return f"{self.out}: what is there was made with other versions: {', '.join(changed)}"

    def load(self, task: TaskSource) -> Task:
        """lm-eval's task object."""
        return load_task(task, protocol=self.asked.protocol, shots=self.asked.shots)


def prepare(
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
    batch_size: int | None = None,
    dtype: str = "bfloat16",
    seed: int = 0,
    overwrite: bool = False,
    resume: bool = True,
    cache: bool = True,
    backend: str = "hf",
) -> Job:
    """Check what is asked, as for `evaluate`; tasks and variants that `out` has are added to.

    Raises a TaiaError. Nothing is written.
    """
    check_options(protocol, limit, batch_size, dtype, adapter, tuned, shots, backend)
    out, tasks = Path(out), expand_groups(tasks)
    earlier = _earlier(out, overwrite=overwrite)
    named = parse_variants(variants)
    folder = Path(data) if data is not None else None
    if earlier is not None:  # a run is a full table: what is added, is added for all
        there = [stated_as(name, info.source) for name, info in earlier.tasks.items()]
        asked_for = [task.stated for task in find_tasks(tasks, folder)]
        tasks = [*there, *(name for name in asked_for if name not in there)]
        mine = {variant.name: variant for variant in named}
        named = (*(mine.pop(one.name, one) for one in earlier.variants), *mine.values())
    change = find_change(base, adapter, tuned, named)
    found = find_tasks(tasks, folder)
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
        tasks=earlier.tasks if earlier is not None else {},
        variants=named,
        versions=_versions(),
        shots=shots,
        backend=backend,
    )
    job = Job(out, asked, found, base, change, overwrite, cache, backend)
    if earlier is not None:
        check_same(job, earlier, resume=resume)
    return _with_tasks(job)


def _with_tasks(job: Job) -> Job:
    """The job with what each of its tasks is scored on; a task that is complete is not loaded."""
    infos = {}
    for task in job.tasks:
        info = job.asked.tasks.get(task.name)
        if info is None or not all(job.complete(one, task.name) for one in job.asked.variants):
            info = _task_info(job, task)
        infos[task.name] = info
    return replace(job, asked=replace(job.asked, tasks=infos))


def _task_info(job: Job, source: TaskSource) -> TaskInfo:
    task = job.load(source)
    count = len(task.eval_docs)
    examples = count if job.asked.limit is None else min(count, job.asked.limit)
    return TaskInfo(examples, primary_metric(task), source.source, source.sha256 or None)


def check_options(
    protocol: str,
    limit: int | None,
    batch_size: int | None,
    dtype: str,
    adapter: str | Path | None,
    tuned: str | Path | None,
    shots: int = 0,
    backend: str = "hf",
) -> None:
    """Raise RecipeError with every option that no evaluation can have."""
    faults = []
    if dtype not in DTYPES:
        faults.append(f"dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    faults += check_protocol(protocol, shots)
    if backend not in BACKENDS:
        faults.append(f"backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    if backend == "vllm" and find_spec("vllm") is None:
        faults.append("backend vllm: vLLM is not installed (pip install vllm, with a CUDA device); "
                      "without it leave the backend out")  # fmt: skip
    if limit is not None and limit < 1:
        faults.append(f"limit {limit}: at least 1 example, or leave it out for all")
    if batch_size is not None and batch_size < 1:
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


def check_same(job: Job, before: Settings, *, resume: bool) -> None:
    """Raise when the results in `out` were made with other settings, or are not to be used."""
    if not resume:
        raise OutputError(f"{job.out}: was evaluated before; use --overwrite to start over")
    now = job.asked
    ignored = {"tasks", "variants", "versions", "batch_size", "data", "base", "tuned"}
    if not before.backend:
        ignored.add("backend")
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


def _versions() -> dict[str, str]:
    found: dict[str, Any] = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
