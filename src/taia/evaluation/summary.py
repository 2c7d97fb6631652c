"""summary.json: what the result files of a run add up to.

Every variant's accuracy on every task, the macro mean over tasks, and the paired
difference against `base` and `vanilla` where those were run. Computed from the result
files alone, so it can be made again anywhere.
"""

from __future__ import annotations

from typing import TypedDict

from taia.evaluation.result import Results
from taia.evaluation.statistics import (
    Difference,
    Score,
    macro_difference,
    macro_score,
    paired_difference,
    score,
)

__all__ = ["REFERENCES", "Summary", "summarise"]

REFERENCES = ("base", "vanilla")
"""The variants that the others are compared with, where they were run."""


class Interval(TypedDict):
    """A mean paired difference of accuracies and its 95% interval, each from -1 to 1."""

    mean: float
    low: float
    high: float
    examples: int


class TaskRow(TypedDict):
    """What a task was scored on."""

    examples: int
    metric: str
    source: str
    sha256: str | None


class VariantRow(TypedDict):
    """A variant and the folder of its result files."""

    name: str
    selection: str
    folder: str


class ScoreRow(TypedDict):
    """One variant on one task; accuracies from 0 to 1."""

    variant: str
    task: str
    examples: int
    accuracy: float
    standard_error: float
    differences: dict[str, Interval]


class MeanRow(TypedDict):
    """One variant over all tasks."""

    variant: str
    accuracy: float
    standard_error: float
    differences: dict[str, Interval]


class Summary(TypedDict):
    """The content of summary.json."""

    base: str
    tuned: str | None
    protocol: str
    limit: int | None
    seed: int
    tasks: dict[str, TaskRow]
    variants: list[VariantRow]
    scores: list[ScoreRow]
    means: list[MeanRow]
    versions: dict[str, str]


def summarise(results: Results) -> Summary:
    """The summary of complete results. Pure: the same results give the same summary."""
    names = [variant.name for variant in results.variants]
    scores: list[ScoreRow] = []
    means: list[MeanRow] = []
    for name in names:
        single = [score(results.correct(name, task)) for task in results.tasks]
        pairs = {
            reference: [
                paired_difference(results.correct(name, task), results.correct(reference, task))
                for task in results.tasks
            ]
            for reference in REFERENCES
            if reference in names and reference != name
        }
        for index, task in enumerate(results.tasks):
            against = {reference: _interval(pairs[reference][index]) for reference in pairs}
            scores.append(_row(name, task, single[index], against))
        mean = macro_score(single)
        means.append(
            MeanRow(
                variant=name,
                accuracy=mean.mean,
                standard_error=mean.standard_error,
                differences={key: _interval(macro_difference(pairs[key])) for key in pairs},
            )
        )
    settings = results.settings
    return Summary(
        base=settings.base,
        tuned=settings.tuned,
        protocol=settings.protocol,
        limit=settings.limit,
        seed=settings.seed,
        tasks={
            name: TaskRow(
                examples=task.examples, metric=task.metric, source=task.source, sha256=task.sha256
            )
            for name, task in settings.tasks.items()
        },
        variants=[
            VariantRow(name=one.name, selection=one.selection, folder=one.folder)
            for one in settings.variants
        ],
        scores=scores,
        means=means,
        versions=dict(settings.versions),
    )


def _row(variant: str, task: str, single: Score, against: dict[str, Interval]) -> ScoreRow:
    return ScoreRow(
        variant=variant,
        task=task,
        examples=single.examples,
        accuracy=single.mean,
        standard_error=single.standard_error,
        differences=against,
    )


def _interval(difference: Difference) -> Interval:
    return Interval(
        mean=difference.mean,
        low=difference.low,
        high=difference.high,
        examples=difference.examples,
    )
