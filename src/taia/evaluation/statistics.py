"""Accuracy, paired differences and their means over tasks, each with how sure it is.

Two variants answer the same examples, so their difference is taken example by example: what
both get right or wrong cancels. 95% intervals, by what the scores are:

    accuracy, right or wrong    Wilson
    accuracy, shares (F1)       Student's t, clipped to 0..1
    difference, right or wrong  bootstrap of the pairs, half a pair added to each cell of the
                                two-by-two table (Agresti and Min 2005), so that few or no
                                disagreements do not give an interval of no width
    difference, shares          bootstrap of the pairs
    mean over tasks             recovered from the tasks' intervals (Zou and Donner 2008)

p values are two-sided: McNemar's exact test where answers are right or wrong, elsewhere the
test that flips the signs of the differences (of which McNemar's is the special case).

Examples of one subject resemble each other. With at least FEW_SUBJECTS subjects, errors are
cluster-robust with as many degrees of freedom as subjects less one, never narrower than those
of independent examples (Wilson: with the number of independent examples that they are worth,
Korn and Graubard 1998), and whole subjects have their signs flipped. With fewer, a robust error
is too small to trust and a test has no power (Cameron and Miller 2015): examples then count as
independent, and the result speaks of these subjects, not of others like them.

Limits: intervals are not corrected for how many there are, `holm` corrects p values; tasks
count as independent and as given. Bootstraps of shares with few examples (below about 30)
are too narrow. Errors over examples say nothing of other training runs.

Miller, Adding Error Bars to Evals, arXiv 2411.00640.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from taia.errors import EvaluationError
from taia.evaluation.power import smallest_difference

__all__ = [
    "FEW_SUBJECTS",
    "Difference",
    "Score",
    "holm",
    "macro_difference",
    "macro_score",
    "paired_difference",
    "score",
]

FEW_SUBJECTS = 10
"""Below so many subjects, examples count as independent."""

CONFIDENCE = 0.95
RESAMPLES = 9_999
"""Of the bootstrap of shares."""

FLIPS = 20_000
"""Random sign patterns of a test; the smallest p value is one in so many."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Score:
    """A mean from 0 to 1, its standard error and 95% interval.

    `subjects`: into how many the examples fell; 0 where they count as independent.
    """

    mean: float
    standard_error: float
    low: float
    high: float
    examples: int
    subjects: int = 0


@dataclass(frozen=True, slots=True)
class Difference:
    """A mean paired difference from -1 to 1, its standard error, 95% interval and p value.

    `detectable`: the smallest true difference that so many examples show in 80% of cases.
    `parts`: what each example, or subject, adds to the mean; they sum to it.
    """

    mean: float
    standard_error: float
    low: float
    high: float
    p: float
    detectable: float
    examples: int
    subjects: int = 0
    parts: Array = field(default_factory=lambda: np.zeros(0), repr=False, compare=False)


def score(values: Sequence[float], subjects: Sequence[str] = ()) -> Score:
    """The mean of scores from 0 to 1, one an example; `subjects` names each example's.

    One example tells nothing of its spread and takes the largest error there is, 0.5; so do
    shares that are all equal.
    Raises EvaluationError for no example, or another number of subjects than of values.
    """
    given = np.asarray(values, float)
    groups = _groups(len(given), subjects)
    mean, count = float(given.mean()), int(groups.max()) + 1 if groups is not None else 0
    error = _standard_error(given, groups, alone=0.5)
    low, high = (
        _wilson(mean, error, len(given), count)
        if _binary(given)
        else _student(mean, error, len(given), count)
    )
    return Score(mean, error, max(0.0, low), min(1.0, high), len(given), count)


def paired_difference(
    one: Sequence[float], other: Sequence[float], subjects: Sequence[str] = ()
) -> Difference:
    """`one` minus `other`, scores of the same examples in the same order.

    Raises EvaluationError for no example, or lists of different lengths.
    """
    if len(one) != len(other):
        raise EvaluationError(
            f"a paired difference needs the same examples: {len(one)} and {len(other)} are given"
        )
    first, second = np.asarray(one, float), np.asarray(other, float)
    values = first - second
    groups = _groups(len(values), subjects)
    binary = bool(np.isin(values, (-1.0, 0.0, 1.0)).all())
    count = int(groups.max()) + 1 if groups is not None else 0
    mean = float(values.mean())
    plain = _smoothed_error(values) if binary else _standard_error(values, None, alone=1.0)
    if groups is None:
        error, parts = plain, values / len(values)
        low, high = _bootstrap_pairs(values) if binary else _bootstrap(values)
        p = _mcnemar(values) if binary else _sign_flip(parts)
    else:
        error = max(plain, _standard_error(values, groups, alone=1.0))
        parts = np.bincount(groups, values) / len(values)
        low, high = _student(mean, error, len(values), count)
        p = _sign_flip(parts)
    return Difference(
        mean, error, max(-1.0, min(low, mean)), min(1.0, max(high, mean)), p,
        smallest_difference(error, count or len(values)), len(values), count, parts,
    )  # fmt: skip


def macro_score(scores: Sequence[Score]) -> Score:
    """The mean over tasks, every task counting the same; variances add, over k squared."""
    if len(scores) == 1:
        return scores[0]
    mean, error, low, high = _macro(scores)
    return Score(mean, error, low, high, sum(one.examples for one in scores))


def macro_difference(differences: Sequence[Difference]) -> Difference:
    """The mean over tasks of paired differences, every task counting the same."""
    if len(differences) == 1:
        return differences[0]
    mean, error, low, high = _macro(differences)
    parts = np.concatenate([one.parts for one in differences]) / len(differences)
    units = sum(one.subjects or one.examples for one in differences)
    return Difference(
        mean, error, low, high, _sign_flip(parts), smallest_difference(error, units),
        sum(one.examples for one in differences), 0, parts,
    )  # fmt: skip


def holm(p_values: Sequence[float]) -> list[float]:
    """P values corrected for being so many (Holm 1979), in the order given."""
    if not p_values:
        return []
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(p_values, method="holm")[1]]


def _groups(examples: int, subjects: Sequence[str]) -> npt.NDArray[np.int64] | None:
    """The number of each example's subject; None where examples count as independent."""
    if not examples:
        raise EvaluationError("there is no example to score")
    if len(subjects) not in (0, examples):
        raise EvaluationError(f"{examples} examples have {len(subjects)} subjects")
    numbers = np.unique(np.asarray(subjects, str), return_inverse=True)[1]
    if not len(subjects) or numbers.max() + 1 < FEW_SUBJECTS:
        return None
    return numbers.astype(np.int64)


def _binary(values: Array) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())


def _standard_error(values: Array, groups: npt.NDArray[np.int64] | None, *, alone: float) -> float:
    """Of the mean: s / sqrt(n), or the cluster-robust error where that is larger."""
    if len(values) == 1 or (np.ptp(values) == 0 and not _binary(values)):  # no spread to be seen
        return alone
    independent = float(values.std(ddof=1)) / math.sqrt(len(values))
    if groups is None:
        return independent
    from statsmodels.regression.linear_model import OLS

    fitted = OLS(values, np.ones(len(values))).fit(cov_type="cluster", cov_kwds={"groups": groups})
    return max(independent, float(fitted.bse[0]))


def _smoothed_error(values: Array) -> float:
    """The standard error of -1, 0, 1 differences with half a pair added to each cell."""
    steps, shares = _smoothed(values)
    variance = float(shares @ steps**2 - (shares @ steps) ** 2)
    return math.sqrt(variance / len(values))


def _smoothed(values: Array) -> tuple[Array, Array]:
    """-1, 0, 1 and their shares, half a pair added to each cell of the two-by-two table."""
    better, worse = float((values > 0).sum()), float((values < 0).sum())
    counts = np.array([worse + 0.5, len(values) - better - worse + 1, better + 0.5])
    return np.array([-1.0, 0.0, 1.0]), counts / counts.sum()


def _wilson(mean: float, error: float, examples: int, subjects: int) -> tuple[float, float]:
    """Wilson's interval; of clustered examples, with as many as they are worth."""
    from statsmodels.stats.proportion import proportion_confint

    worth = float(examples)
    if subjects and 0 < mean < 1:
        wider = _quantile() / _quantile(subjects - 1)
        worth = min(worth, mean * (1 - mean) / error**2 * wider**2)
    elif subjects:  # all right or all wrong: how alike a subject's examples are is not seen
        worth = float(subjects)
    low, high = proportion_confint(mean * worth, worth, alpha=1 - CONFIDENCE, method="wilson")
    return float(low), float(high)


def _student(mean: float, error: float, examples: int, subjects: int) -> tuple[float, float]:
    if examples == 1:
        return -1.0, 1.0
    half = _quantile((subjects or examples) - 1) * error
    return mean - half, mean + half


@lru_cache(maxsize=1024)
def _quantile(freedom: int | None = None) -> float:
    """The two-sided quantile of the t distribution, of the normal one without `freedom`."""
    from scipy import stats

    level = (1 + CONFIDENCE) / 2
    return float(stats.norm.ppf(level) if freedom is None else stats.t.ppf(level, freedom))


def _bootstrap_pairs(values: Array) -> tuple[float, float]:
    """The percentile bootstrap of -1, 0, 1 differences with infinitely many resamples.

    The sum of a resample is one of n independent steps, whose distribution is a power of
    one step's Fourier transform.
    """
    count = len(values)
    length = 2 * count + 1
    chances = np.fft.irfft(np.fft.rfft(_smoothed(values)[1], length) ** count, length)
    tail = (1 - CONFIDENCE) / 2
    sums = np.arange(-count, count + 1)
    low = sums[np.cumsum(chances) >= tail][0]
    high = sums[np.cumsum(chances[::-1])[::-1] >= tail][-1]
    return float(low) / count, float(high) / count


def _bootstrap(values: Array) -> tuple[float, float]:
    """The percentile bootstrap of any differences; with a fixed seed."""
    if np.ptp(values) == 0:  # one example, or no spread to be seen
        return -1.0, 1.0
    from scipy import stats

    sign = -1.0 if values.mean() < 0 else 1.0  # so that turning the two round turns the interval
    found = stats.bootstrap(
        (sign * values,), np.mean, n_resamples=RESAMPLES, confidence_level=CONFIDENCE,
        method="percentile", batch=max(1, 4_000_000 // len(values)),
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    low, high = sorted((sign * float(found.low), sign * float(found.high)))
    return low, high


def _mcnemar(values: Array) -> float:
    from statsmodels.stats.contingency_tables import mcnemar

    better, worse = int((values > 0).sum()), int((values < 0).sum())
    return float(mcnemar([[0, better], [worse, 0]], exact=True).pvalue)


def _sign_flip(parts: Array) -> float:
    """How often random signs give a sum as far from 0 as the one seen; with a fixed seed.

    Parts of one size are drawn together, as a binomial number of plus signs.
    """
    sizes, counts = np.unique(np.abs(parts[parts != 0]), return_counts=True)
    if not len(sizes):
        return 1.0
    random = np.random.default_rng(0)
    seen = abs(float(parts.sum())) * (1 - 1e-9)  # sums in another order differ in last digits
    beyond, block = 0, max(1, 4_000_000 // len(sizes))
    for start in range(0, FLIPS, block):
        shape = (min(block, FLIPS - start), len(sizes))
        sums = (2 * random.binomial(counts, 0.5, shape) - counts) @ sizes
        beyond += int((np.abs(sums) >= seen).sum())
    return (beyond + 1) / (FLIPS + 1)


def _macro(parts: Sequence[Any]) -> tuple[float, float, float, float]:
    """Mean, standard error and interval of a mean over independent tasks."""
    if not parts:
        raise EvaluationError("there is no task to take a mean over")
    count = len(parts)
    mean = sum(one.mean for one in parts) / count
    error = math.sqrt(sum(one.standard_error**2 for one in parts)) / count
    below = math.sqrt(sum((one.mean - one.low) ** 2 for one in parts)) / count
    above = math.sqrt(sum((one.high - one.mean) ** 2 for one in parts)) / count
    return mean, error, mean - below, mean + above
