"""Accuracy, paired differences and macro means against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from taia.errors import EvaluationError
from taia.evaluation.statistics import (
    Z95,
    Difference,
    Score,
    macro_difference,
    macro_score,
    paired_difference,
    score,
)


def test_accuracy_by_hand():
    # mean 3/4; deviations 1/4, 1/4, 1/4, -3/4: squares sum 12/16, over n-1 = 3: 1/4; s = 1/2
    result = score([1, 1, 1, 0])
    assert result == Score(0.75, pytest.approx(0.25), 4)


def test_paired_difference_by_hand():
    # differences 0, 1, 1, -1: mean 1/4; squares of deviations sum 44/16, over 3: 11/12
    result = paired_difference([1, 1, 1, 0], [1, 0, 0, 1])
    assert result.mean == pytest.approx(0.25)
    assert result.standard_error == pytest.approx(math.sqrt(11 / 12) / 2)
    assert result.low == pytest.approx(0.25 - Z95 * math.sqrt(11 / 12) / 2)
    assert result.high == pytest.approx(0.25 + Z95 * math.sqrt(11 / 12) / 2)


def test_pairing_narrows_the_interval_of_variants_that_agree():
    rng = np.random.default_rng(0)
    one = (rng.random(500) < 0.5).astype(int)
    other = one.copy()
    other[:10] = 1 - other[:10]
    paired = paired_difference(one.tolist(), other.tolist()).standard_error
    unpaired = math.hypot(score(one.tolist()).standard_error, score(other.tolist()).standard_error)
    assert paired < unpaired / 4


def test_difference_changes_sign_with_its_order():
    there = paired_difference([1, 0, 1, 1], [0, 0, 1, 0])
    back = paired_difference([0, 0, 1, 0], [1, 0, 1, 1])
    assert (there.mean, there.low) == (-back.mean, -back.high)


def test_identical_answers_differ_by_nothing():
    same = paired_difference([1, 0, 1], [1, 0, 1])
    assert (same.mean, same.low, same.high) == (0, 0, 0)


def test_macro_mean_by_hand():
    # mean of 0.4 and 0.6; variances 0.03^2 + 0.04^2 = 0.05^2, over 2^2
    result = macro_score([Score(0.4, 0.03, 10), Score(0.6, 0.04, 1000)])
    assert (result.mean, result.examples) == (pytest.approx(0.5), 1010)
    assert result.standard_error == pytest.approx(0.025)
    other = macro_difference([Difference(0.1, 0.03, 10), Difference(-0.3, 0.04, 20)])
    assert (other.mean, other.standard_error) == (pytest.approx(-0.1), pytest.approx(0.025))


def test_one_example_has_the_largest_error_there_is():
    assert score([1]) == Score(1.0, 0.5, 1)
    assert paired_difference([1], [0]) == Difference(1.0, 1.0, 1)


def test_nothing_to_score_and_unequal_lengths():
    for call in (lambda: score([]), lambda: macro_score([]), lambda: macro_difference([])):
        with pytest.raises(EvaluationError):
            call()
    with pytest.raises(EvaluationError, match="2 and 3"):
        paired_difference([1, 0], [1, 0, 1])


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(1)
    repeats, examples, truths = 1000, 200, (0.10, -0.05)
    covered = 0
    for _ in range(repeats):
        parts = []
        for truth in truths:
            other = rng.random(examples) < 0.5
            switched = rng.random(examples) < 2 * abs(truth)
            one = np.where(switched, truth > 0, other)
            parts.append(paired_difference(one.tolist(), other.tolist()))
        macro = macro_difference(parts)
        covered += macro.low <= sum(truths) / 2 <= macro.high
    assert 0.93 < covered / repeats < 0.97
