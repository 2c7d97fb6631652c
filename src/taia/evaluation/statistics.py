"""Accuracy, paired differences and macro means, each with how sure it is.

Two variants answer the same examples, so their difference is taken example by example:
what both get right or wrong cancels, and the interval is narrower than that of two
separate runs. Intervals are the normal approximation, 95%.

Limits: with few examples (below about 30), or where the variants almost never differ, the
normal interval is too narrow; identical answers give the interval [0, 0]. Examples of a
task count as independent, and so do tasks. Many comparisons in one table are not corrected.

Miller, Adding Error Bars to Evals, arXiv 2411.00640.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from taia.errors import EvaluationError

__all__ = ["Difference", "Score", "macro_difference", "macro_score", "paired_difference", "score"]

Z95 = 1.959963984540054
"""The 97.5% point of the standard normal distribution."""


@dataclass(frozen=True, slots=True)
class Score:
    """A mean and the standard error of that mean; `examples` is how many went into it."""

    mean: float
    standard_error: float
    examples: int


@dataclass(frozen=True, slots=True)
class Difference:
    """A mean paired difference, its standard error and its 95% interval."""

    mean: float
    standard_error: float
    examples: int

    @property
    def low(self) -> float:
        """The lower end of the interval."""
        return self.mean - Z95 * self.standard_error

    @property
    def high(self) -> float:
        """The upper end of the interval."""
        return self.mean + Z95 * self.standard_error


def score(correct: Sequence[float]) -> Score:
    """Accuracy of 0/1 answers, with s / sqrt(n) (s over n - 1) as its standard error.

    One example tells nothing of its spread and takes the largest there is, 0.5.
    """
    mean, error = _mean_and_error(correct, alone=0.5)
    return Score(mean, error, len(correct))


def paired_difference(one: Sequence[float], other: Sequence[float]) -> Difference:
    """`one` minus `other`, answers to the same examples in the same order.

    One example alone takes the largest standard error there is, 1.
    """
    if len(one) != len(other):
        raise EvaluationError(
            f"a paired difference needs the same examples: {len(one)} and {len(other)} are given"
        )
    differences = [float(a) - float(b) for a, b in zip(one, other, strict=True)]
    mean, error = _mean_and_error(differences, alone=1.0)
    return Difference(mean, error, len(one))


def macro_score(scores: Sequence[Score]) -> Score:
    """The mean over tasks, every task counting the same; variances add, over k squared."""
    mean, error = _macro([(one.mean, one.standard_error) for one in scores])
    return Score(mean, error, sum(one.examples for one in scores))


def macro_difference(differences: Sequence[Difference]) -> Difference:
    """The mean over tasks of paired differences; variances add, over k squared."""
    mean, error = _macro([(one.mean, one.standard_error) for one in differences])
    return Difference(mean, error, sum(one.examples for one in differences))


def _mean_and_error(values: Sequence[float], *, alone: float) -> tuple[float, float]:
    if not values:
        raise EvaluationError("there is no example to score")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, alone
    return mean, statistics.stdev(map(float, values)) / math.sqrt(len(values))


def _macro(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    if not parts:
        raise EvaluationError("there is no task to take a mean over")
    mean = sum(part for part, _ in parts) / len(parts)
    return mean, math.sqrt(sum(error**2 for _, error in parts)) / len(parts)
