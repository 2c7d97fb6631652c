"""Variants of one model on one set of tasks: load once, switch, score, write.

The base is loaded once. With an adapter every variant is a switch on the model in memory
(`taia.attach`); with a fine-tuned checkpoint every variant that is neither of the two is
spliced into a temporary folder and loaded from there.

Examples are appended to a result file's part as they come (`part`), and a complete file made
with the same settings is not computed again, so an interrupted evaluation goes on where it
stopped. A cell, one variant on one task, can be computed alone: `prepare` and `begin` in one
process, `score_cell` in any number of them, `finish` in one when all are there.

Limits: one process and one device a cell.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from taia.errors import EvaluationError
from taia.evaluation.cache import Cache, open_cache, others
from taia.evaluation.catalogue import TaskSource
from taia.evaluation.job import Job, check_options, check_same, prepare
from taia.evaluation.part import open_part, part_of
from taia.evaluation.result import Variant, read_results, read_settings
from taia.evaluation.summary import Summary, summarise
from taia.evaluation.variants import VARIANTS, shared_tokenizer, variant_models
from taia.files import atomic_write

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.models.huggingface import HFLM

__all__ = ["Progress", "begin", "check_options", "evaluate", "finish", "prepare", "score_cell"]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one variant is with one task; `done` of `total` count requests.

    A request is a choice of a question, or a text to write.
    """

    variant: str
    task: str
    done: int
    total: int


Told = Callable[[Progress], None]


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
    batch_size: int | None = None,
    dtype: str = "bfloat16",
    seed: int = 0,
    overwrite: bool = False,
    resume: bool = True,
    cache: bool = True,
    backend: str = "hf",
    on_progress: Told | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Summary:
    """Score variants of `base` and write result files and summary.json into `out`.

    `tasks`: names and groups. `adapter` or `tuned`: the fine-tune, in the form that it has.
    `variants`: presets, selections, or NAME=SELECTION; without a fine-tune only the base.
    `data`: a folder of JSON Lines, None is the hub. `limit`: the first so many records of every
    task. `shots`: few-shot examples before each question. `batch_size`: questions or texts at
    once, at most; None is 32 questions, and as many texts as `taia.generation` chooses.
    `overwrite` starts over; `resume` keeps what the same settings made. `cache`: take and keep
    answers in $TAIA_CACHE/scores. `backend`: hf, or vllm. `on_note` is told what is worth knowing
    and no fault.
    Raises a TaiaError; what was complete by then stays.
    """
    job = prepare(
        base, out, tasks=tasks, adapter=adapter, tuned=tuned, variants=variants, data=data,
        limit=limit, protocol=protocol, shots=shots, batch_size=batch_size, dtype=dtype, seed=seed,
        overwrite=overwrite, resume=resume, cache=cache, backend=backend,
    )  # fmt: skip
    if on_note:
        for note in filter(None, (others() if job.cache else "", job.other_versions())):
            on_note(note)
    wanted = [variant for variant in job.asked.variants if job.missing(variant)]
    if wanted:
        _run(job, wanted, on_progress)
    return finish(job)


def begin(job: Job) -> Job:
    """Write down what is asked; with `overwrite` clear what an earlier evaluation left.

    What it returns is the job to compute cells of. Raises EvaluationError when another evaluation
    was begun there with other settings since the job was prepared.
    """
    if job.overwrite:
        shutil.rmtree(job.out / "results", ignore_errors=True)
    elif (job.out / "settings.json").exists():
        check_same(job, read_settings(job.out), resume=True)
    (job.out / "summary.json").unlink(missing_ok=True)
    atomic_write(job.out / "settings.json", job.asked.to_json())
    return replace(job, overwrite=False)


def score_cell(
    job: Job, variant_name: str, task_name: str, on_progress: Told | None = None
) -> Path:
    """Score one variant on one task into its result file; a file that is complete is kept.

    After `begin`, in any process. Raises a TaiaError, among others when another process is at
    this very cell.
    """
    variants = {one.name: one for one in job.asked.variants}
    tasks = {one.name: one for one in job.tasks}
    if variant_name not in variants or task_name not in tasks:
        raise EvaluationError(f"{job.out}: has no cell of {variant_name} and {task_name}")
    variant, task = variants[variant_name], tasks[task_name]
    if not job.complete(variant, task_name):
        for _, lm in _models(job, [variant]):
            _score(job, lm, variant, task, job.load(task), on_progress)
    return job.file(variant, task_name)


def finish(job: Job) -> Summary:
    """Write summary.json of the complete results, and remove what is left of parts.

    Raises EvaluationError while a cell is missing.
    """
    summary = summarise(read_results(job.out))
    text = json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False)
    atomic_write(job.out / "summary.json", text + "\n")
    for variant in job.asked.variants:
        for task in job.tasks:
            part_of(job.file(variant, task.name)).unlink(missing_ok=True)
    return summary


def _run(job: Job, wanted: list[Variant], on_progress: Told | None) -> None:
    """Score what is missing. Nothing is written or cleared before the first model is ready."""
    missing = {variant: job.missing(variant) for variant in wanted}
    needed = {task.name: task for tasks in missing.values() for task in tasks}
    loaded = {name: job.load(task) for name, task in needed.items()}
    for variant, lm in _models(job, wanted):
        if variant == wanted[0]:
            begin(job)
        for source in missing[variant]:
            _score(job, lm, variant, source, loaded[source.name], on_progress)
        del lm  # or the next model would stand beside it in memory


def _models(job: Job, wanted: list[Variant]) -> Iterator[tuple[Variant, HFLM]]:
    asked = job.asked
    if job.backend == "vllm":
        from taia.evaluation.vllm import vllm_models

        return vllm_models(job.base, job.change, wanted, dtype=asked.dtype, seed=asked.seed)
    tokenizer = shared_tokenizer(job.base, job.change, chat=asked.protocol != "plain")
    return variant_models(
        job.base, job.change, wanted, tokenizer, dtype=asked.dtype, batch_size=asked.batch_size
    )


def _score(
    job: Job,
    lm: HFLM,
    variant: Variant,
    source: TaskSource,
    task: Task,
    on_progress: Told | None,
) -> None:
    from taia.evaluation.scoring import score

    def told(done: int, total: int) -> None:
        if on_progress:
            on_progress(Progress(variant.name, source.name, done, total))

    with open_part(job.file(variant, source.name)) as part, _cache(job, variant, lm) as cache:
        examples = score(
            lm,
            source.name,
            task,
            limit=job.asked.limit,
            protocol=job.asked.protocol,
            seed=job.asked.seed,
            done=part.kept,
            cache=cache,
            on_examples=part.append,
            on_progress=told,
        )
        part.finish(examples)


@contextlib.contextmanager
def _cache(job: Job, variant: Variant, lm: HFLM) -> Iterator[Cache | None]:
    """The answers of earlier runs of this variant; the base's are those of any fine-tune's."""
    if not job.cache:
        yield None
        return
    asked, own = job.asked, variant.selection != "none"
    lent = job.change is not None and lm.tokenizer.name_or_path == str(job.change.path)
    scope = (
        asked.base_identity,
        asked.tuned_identity if own else None,
        asked.tuned_form if own else None,
        variant.selection,
        asked.dtype,
        job.backend if job.backend == "hf" else f"{job.backend} {version(job.backend)}",
        asked.tuned_identity if lent else None,  # its tokenizer reads the base's prompts
    )
    with open_cache(scope) as cache:
        yield cache
