"""A 95% interval holds the truth in 93 to 97% of 2,000 simulated sets."""

from __future__ import annotations

import numpy as np
import pytest

from taia.evaluation import statistics
from taia.evaluation.statistics import (
    macro_difference,
    macro_score,
    paired_difference,
    score,
)

SETS = 2_000


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few flips and resamples: p values are not looked at, and these many make the time."""
    monkeypatch.setattr(statistics, "FLIPS", 10)
    monkeypatch.setattr(statistics, "RESAMPLES", 499)


def covered(found, truth):
    return np.mean([one.low <= truth <= one.high for one in found])


def honest(share):
    return 0.93 <= share <= 0.97


@pytest.mark.parametrize(("truth", "examples"), [(0.5, 60), (0.25, 300), (0.9, 200)])
def test_wilson(truth, examples):
    draws = np.random.default_rng(0).random((SETS, examples)) < truth
    assert honest(covered([score(one) for one in draws], truth))


@pytest.mark.parametrize("examples", [40, 300])
def test_student_of_shares(examples):
    draws = np.random.default_rng(0).beta(1.2, 2.4, (SETS, examples))
    assert honest(covered([score(one) for one in draws], 1 / 3))


def answers(random, truth, discordance, examples):
    """Pairs of answers: `discordance` of them differ, and `truth` is the mean difference."""
    kind = random.random((SETS, examples))
    common = random.random((SETS, examples)) < 0.4
    better, worse = kind < (discordance + truth) / 2, kind > 1 - (discordance - truth) / 2
    return np.where(better, 1, np.where(worse, 0, common)), np.where(
        better, 0, np.where(worse, 1, common)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("truth", "discordance", "examples"), [(0, 0.2, 300), (0.05, 0.1, 300), (-0.1, 0.3, 60)]
)
def test_bootstrap_of_pairs(truth, discordance, examples):
    one, other = answers(np.random.default_rng(1), truth, discordance, examples)
    found = [paired_difference(a, b) for a, b in zip(one, other, strict=True)]
    assert honest(covered(found, truth))


@pytest.mark.slow
def test_bootstrap_of_shares():
    random = np.random.default_rng(2)
    one, other = random.beta(2, 3, (SETS, 100)), random.beta(2, 2, (SETS, 100))
    found = [paired_difference(a, b) for a, b in zip(one, other, strict=True)]
    assert honest(covered(found, 0.4 - 0.5))


def clustered(random, count, size, spread):
    """Subjects that differ in difficulty: answers of two variants, and each one's subject."""
    names = [str(index // size) for index in range(count * size)]
    level = np.clip(0.5 + spread * random.standard_normal((SETS, count, 1)), 0.05, 0.95)
    effect = np.clip(level + 0.1 * random.standard_normal((SETS, count, 1)), 0.05, 0.95)
    one = (random.random((SETS, count, size)) < level).reshape(SETS, -1)
    other = (random.random((SETS, count, size)) < effect).reshape(SETS, -1)
    return names, one, other


@pytest.mark.slow
@pytest.mark.parametrize(("count", "size"), [(10, 30), (27, 10), (57, 5)])
def test_clustered_by_subject(count, size):
    names, one, other = clustered(np.random.default_rng(4), count, size, 0.15)
    assert honest(covered([score(values, names) for values in one], 0.5))
    found = [paired_difference(a, b, names) for a, b in zip(one, other, strict=True)]
    assert honest(covered(found, 0.0))
    if count == 57:
        return
    assert covered([score(values) for values in one], 0.5) < 0.9  # what it is good for


@pytest.mark.slow
def test_means_over_tasks():
    random = np.random.default_rng(6)
    truths, sizes = (0.3, 0.55, 0.9), (60, 300, 120)
    single = [
        [score(one) for one in random.random((SETS, size)) < truth]
        for truth, size in zip(truths, sizes, strict=True)
    ]
    means = [macro_score(scores) for scores in zip(*single, strict=True)]
    assert honest(covered(means, np.mean(truths)))

    effects = (0.05, -0.02, 0.0)
    pairs = [
        [paired_difference(a, b) for a, b in zip(*answers(random, effect, 0.15, size), strict=True)]
        for effect, size in zip(effects, sizes, strict=True)
    ]
    means = [macro_difference(parts) for parts in zip(*pairs, strict=True)]
    assert honest(covered(means, np.mean(effects)))
