"""One of lm-eval's samples as one line of a result file.

Multiple choice, generated answers, and any other task of lm-eval that scores its examples
one by one. Limits: a metric that only a whole data set has (perplexity, a corpus BLEU) is no
score of an example, and a task that has no other is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from taia.errors import EvaluationError
from taia.evaluation.result import Example

if TYPE_CHECKING:
    from lm_eval.api.task import Task

__all__ = ["example", "example_id", "primary_metric"]

OF_A_SET = frozenset({
    "perplexity", "weighted_perplexity", "bits_per_byte", "f1_score", "matthews_corrcoef", "bleu",
    "chrf", "chrfpp", "ter", "brier_score", "bypass_agg",
})  # fmt: skip
"""lm-eval's functions that make a score of a whole data set out of what is no score."""

UNREAD = "[invalid]"
"""What lm-eval's filters make of a text in which they find no answer."""


def primary_metric(task: Task) -> str:
    """The metric that a table shows: the one a task of ours names, else lm-eval's first.

    Raises EvaluationError for a task that has no metric of single examples.
    """
    metadata = task.config.metadata
    if isinstance(metadata, dict) and "primary_metric" in metadata:
        return str(metadata["primary_metric"])
    metrics = {str(name): how for name, how in task.aggregation().items()}
    for name, how in metrics.items():
        if getattr(how, "__name__", "") not in OF_A_SET:
            return name
    raise EvaluationError(
        f"{task.config.task}: {', '.join(metrics)} is of a whole data set and no score of an "
        "example; run the task with lm-eval itself"
    )


def example(name: str, task: Task, sample: Mapping[str, Any]) -> Example:
    """A line of the result file of the task `name`.

    `sample`: as lm-eval logs it: doc, doc_id, target, filtered_resps, prompt_hash, and every
    metric under its name. Raises EvaluationError for broken numbers and scores of no example.
    """
    metric = primary_metric(task)
    doc = sample["doc"]
    responses = sample["filtered_resps"]
    metrics = {key: _number(sample[key]) for key in sample["metrics"] if key != "parsed"}
    metrics = {key: value for key, value in metrics.items() if value is not None}
    correct = metrics.get(metric)
    if correct is None or not 0 <= correct <= 1:
        raise EvaluationError(
            f"{name}: {metric} is {sample.get(metric)!r} for one example, not a score from 0 to 1; "
            "run the task with lm-eval itself"
        )
    chosen = task.OUTPUT_TYPE == "multiple_choice"
    values = [float(value) for value, _ in responses] if chosen else []
    number = example_id(doc, sample["doc_id"])
    if not all(math.isfinite(value) for value in values):
        raise EvaluationError(
            f"{name}: example {number}: the model's log-likelihoods are {values}. Its weights "
            "or activations overflow: try --dtype float32, or look at the fine-tuning"
        )
    prediction = _choice(task, doc, metric, values) if chosen else _text(responses[0])
    parsed = bool(sample["parsed"]) if "parsed" in sample["metrics"] else prediction != UNREAD
    return Example(
        task=name,
        id=number,
        prompt_hash=sample["prompt_hash"][:16],
        prediction=prediction,
        target=_target(sample["target"]),
        correct=correct if parsed else 0.0,
        metric=metric,
        metrics={key: value for key, value in metrics.items() if value is not None},
        loglikelihoods=tuple(round(value, 6) for value in values),
        parsed=parsed,
        subject=str(doc.get("subject") or ""),
    )


def example_id(doc: Mapping[str, Any], number: int) -> str:
    """The record's own id where the task is ours, else its number in the data set."""
    ours = isinstance(doc.get("id"), str) and "subject" in doc
    return str(doc["id"]) if ours else str(number)


def _choice(task: Task, doc: Mapping[str, Any], metric: str, values: list[float]) -> int:
    lengths = [1] * len(values)
    if metric == "acc_norm":
        lengths = [len(choice) for choice in task.doc_to_choice(doc)]
    ranked = [value / length for value, length in zip(values, lengths, strict=False)]
    return ranked.index(max(ranked))


def _target(target: object) -> int | str:
    if isinstance(target, bool) or not isinstance(target, int | str):
        return str(target)
    return target


def _text(response: object) -> str:
    return response if isinstance(response, str) else str(response)


def _number(value: object) -> float | None:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
