"""summary.json: what the result files of a run add up to.

Every variant's accuracy on every task, the mean over tasks, and the paired differences from
`base` and `vanilla` where those were run, each with its interval. p values are corrected by
Holm's method over all comparisons that the run's tables show: every pair of variants on every
task and on average, a pair counted once in whichever order. Computed from the result files
alone, so it can be made again anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from taia.evaluation.result import Results
from taia.evaluation.statistics import (
    Difference,
    Score,
    holm,
    macro_difference,
    macro_score,
    paired_difference,
    score,
)

__all__ = ["REFERENCES", "Interval", "Summary", "interval_row", "subjects", "summarise"]

REFERENCES = ("base", "vanilla")
"""The variants that the others are compared with, where they were run."""

AVERAGE = ""
"""Stands for the mean over tasks where a task is named; no task has an empty name."""

Key = tuple[str, str, str]
"""A comparison: variant, reference, task or AVERAGE."""


class Interval(TypedDict):
    """A mean paired difference of accuracies from -1 to 1, with its 95% interval.

    `p` is two-sided; `p_holm` is corrected for all comparisons of the run. `detectable`: the
    smallest true difference that so many examples show in 80% of cases, before a correction.
    `subjects`: the clusters that errors are taken over; 0 where examples are independent.
    """

    mean: float
    low: float
    high: float
    p: float
    p_holm: float
    detectable: float
    examples: int
    subjects: int


class TaskRow(TypedDict):
    """What a task was scored on. `subjects`: clusters of its statistics; 0 where there are none."""

    examples: int
    metric: str
    source: str
    sha256: str | None
    subjects: int


class VariantRow(TypedDict):
    """A variant and the folder of its result files."""

    name: str
    selection: str
    folder: str


class MeanRow(TypedDict):
    """One variant over all tasks: accuracy from 0 to 1 with its 95% interval.

    `unparsed`: how many answers could not be read; they count as wrong.
    """

    variant: str
    accuracy: float
    standard_error: float
    low: float
    high: float
    unparsed: int
    differences: dict[str, Interval]


class ScoreRow(MeanRow):
    """The same of one variant on one task."""

    task: str
    examples: int


class Summary(TypedDict):
    """The content of summary.json. `comparisons`: over how many p values were corrected."""

    base: str
    tuned: str | None
    protocol: str
    shots: int
    limit: int | None
    seed: int
    tasks: dict[str, TaskRow]
    variants: list[VariantRow]
    scores: list[ScoreRow]
    means: list[MeanRow]
    comparisons: int
    versions: dict[str, str]


def summarise(results: Results) -> Summary:
    """The summary of complete results. Pure: the same results give the same summary."""
    names = [variant.name for variant in results.variants]
    clusters = {task: subjects(results, task) for task in results.tasks}
    single = {
        (name, task): score(results.correct(name, task), clusters[task])
        for name in names
        for task in results.tasks
    }
    found = _differences(results, names, clusters)
    corrected, comparisons = _corrected(found, results.tasks)
    against = {
        (name, task): {
            reference: interval_row(found[name, reference, task], corrected[name, reference, task])
            for reference in REFERENCES
            if (name, reference, task) in found
        }
        for name in names
        for task in (*results.tasks, AVERAGE)
    }
    unparsed = {
        key: sum(not example.parsed for example in examples)
        for key, examples in results.examples.items()
    }
    scores = [
        ScoreRow(
            **_mean_row(name, single[name, task], unparsed[name, task], against[name, task]),
            task=task,
            examples=single[name, task].examples,
        )
        for name in names
        for task in results.tasks
    ]
    means = [
        _mean_row(
            name,
            macro_score([single[name, task] for task in results.tasks]),
            sum(unparsed[name, task] for task in results.tasks),
            against[name, AVERAGE],
        )
        for name in names
    ]
    settings = results.settings
    return Summary(
        base=settings.base,
        tuned=settings.tuned,
        protocol=settings.protocol,
        shots=settings.shots,
        limit=settings.limit,
        seed=settings.seed,
        tasks={
            name: TaskRow(
                examples=task.examples,
                metric=task.metric,
                source=task.source,
                sha256=task.sha256,
                subjects=single[names[0], name].subjects,
            )
            for name, task in settings.tasks.items()
        },
        variants=[
            VariantRow(name=one.name, selection=one.selection, folder=one.folder)
            for one in settings.variants
        ],
        scores=scores,
        means=means,
        comparisons=comparisons,
        versions=dict(settings.versions),
    )


def subjects(results: Results, task: str) -> tuple[str, ...]:
    """The subject of each example of a task; empty where they have none."""
    found = tuple(example.subject for example in results.examples[results.variants[0].name, task])
    return found if any(found) else ()


def interval_row(difference: Difference, corrected: float) -> Interval:
    """A difference and its corrected p value as plain values."""
    return Interval(
        mean=difference.mean,
        low=difference.low,
        high=difference.high,
        p=difference.p,
        p_holm=corrected,
        detectable=difference.detectable,
        examples=difference.examples,
        subjects=difference.subjects,
    )


def _differences(
    results: Results, names: list[str], clusters: dict[str, tuple[str, ...]]
) -> dict[Key, Difference]:
    """Every variant minus every reference, on every task and on average."""
    found: dict[Key, Difference] = {}
    for name in names:
        for reference in REFERENCES:
            if reference not in names or reference == name:
                continue
            for task in results.tasks:
                found[name, reference, task] = paired_difference(
                    results.correct(name, task), results.correct(reference, task), clusters[task]
                )
            found[name, reference, AVERAGE] = macro_difference(
                [found[name, reference, task] for task in results.tasks]
            )
    return found


def _corrected(found: dict[Key, Difference], tasks: Sequence[str]) -> tuple[dict[Key, float], int]:
    """The p values by Holm's method over so many; a pair counts once, one task not as average."""

    def comparison(key: Key) -> tuple[str, ...]:
        return (*sorted(key[:2]), tasks[0] if len(tasks) == 1 else key[2])

    family = {comparison(key): one.p for key, one in found.items()}
    corrected = dict(zip(family, holm(list(family.values())), strict=True))
    return {key: corrected[comparison(key)] for key in found}, len(family)


def _mean_row(variant: str, single: Score, unparsed: int, against: dict[str, Interval]) -> MeanRow:
    return MeanRow(
        variant=variant,
        accuracy=single.mean,
        standard_error=single.standard_error,
        low=single.low,
        high=single.high,
        unparsed=unparsed,
        differences=against,
    )
