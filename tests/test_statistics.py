"""Intervals, tests and power against published examples, another library, and their laws."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.power import TTestPower

from taia.errors import EvaluationError
from taia.evaluation.power import examples_needed, smallest_difference
from taia.evaluation.statistics import (
    FEW_SUBJECTS,
    Difference,
    Score,
    holm,
    macro_difference,
    macro_score,
    paired_difference,
    score,
)

answers = st.lists(st.integers(0, 1), min_size=1, max_size=60)
pairs = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=60)
shares = st.lists(st.floats(0, 1), min_size=1, max_size=40)


def pair(better: int, worse: int, same: int) -> tuple[list[int], list[int]]:
    """Two lists of answers that differ so often in either direction."""
    return [1] * better + [0] * worse + [1] * same, [0] * better + [1] * worse + [1] * same


# Newcombe 1998 (Statistics in Medicine 17:857), Table I, method 3
NEWCOMBE = [
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0000, 0.1611),
    (1, 29, 0.0061, 0.1718),
]


@pytest.mark.parametrize(("right", "count", "low", "high"), NEWCOMBE)
def test_wilson_as_published(right, count, low, high):
    found = score([1] * right + [0] * (count - right))
    assert found.mean == right / count
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)


@given(answers)
def test_wilson_is_that_of_scipy(values):
    found = score(values)
    peer = stats.binomtest(sum(values), len(values)).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((peer.low, peer.high), abs=1e-12)


# Fagerland, Lydersen and Laake 2013 (BMC Medical Research Methodology 13:91), Tables 1 and 3:
# Bentur et al., Cavo et al.
@pytest.mark.parametrize(("table", "p"), [((1, 7, 13), 0.0703), ((6, 16, 139), 0.0525)])
def test_exact_mcnemar_as_published(table, p):
    assert round(paired_difference(*pair(*table)).p, 4) == p


@given(pairs)
@settings(deadline=None)
def test_mcnemar_is_scipys_sign_test(answers):
    one, other = zip(*answers, strict=True)
    better = sum(a > b for a, b in answers)
    worse = sum(a < b for a, b in answers)
    peer = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert paired_difference(one, other).p == pytest.approx(peer)


def test_flipped_signs_are_scipys_permutation_test():
    random = np.random.default_rng(3)
    one, other = random.random(25), random.random(25) * 0.8
    peer = stats.permutation_test(
        (one - other,), np.mean, permutation_type="samples", n_resamples=20_000,
        rng=np.random.default_rng(0),
    ).pvalue  # fmt: skip
    assert paired_difference(one, other).p == pytest.approx(peer, abs=0.02)
    subjects = [str(index % FEW_SUBJECTS) for index in range(25)]
    totals = np.array([(one - other)[at::FEW_SUBJECTS].sum() for at in range(FEW_SUBJECTS)])
    peer = stats.permutation_test((totals,), np.sum, permutation_type="samples").pvalue
    assert paired_difference(one, other, subjects).p == pytest.approx(peer, abs=0.02)


# Benjamini and Hochberg 1995 (JRSS B 57:289), section 4: 15 endpoints of a thrombolysis trial,
# of which the procedures that control the familywise rate at 5% reject the three smallest
THROMBOLYSIS = [
    0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262,
    0.5719, 0.6528, 0.7590, 1.000,
]  # fmt: skip


def test_holm_as_published():
    assert [p < 0.05 for p in holm(THROMBOLYSIS)] == [True] * 3 + [False] * 12


@pytest.mark.slow
@given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
@settings(deadline=None, max_examples=50)
def test_holm_is_the_closed_test_of_bonferroni(values):
    """Marcus, Peritz and Gabriel 1976: a hypothesis falls when every set that holds it does."""
    sets = [
        chosen
        for size in range(1, len(values) + 1)
        for chosen in itertools.combinations(range(len(values)), size)
    ]
    closed = [
        min(1.0, max(len(s) * min(values[i] for i in s) for s in sets if at in s))
        for at in range(len(values))
    ]
    assert holm(values) == pytest.approx(closed)
    assert holm([]) == []


def test_bootstrap_of_pairs_is_what_resampling_tends_to():
    one, other = pair(30, 12, 258)
    found = paired_difference(one, other)
    counts = np.array([12.5, 259, 30.5])
    draws = np.random.default_rng(0).multinomial(300, counts / 302, 200_000) @ [-1, 0, 1] / 300
    assert (found.low, found.high) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=2e-3)
    peer = stats.bootstrap(
        (np.subtract(one, other),), np.mean, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval  # without the half pairs
    assert (found.low, found.high) == pytest.approx((peer.low, peer.high), abs=5e-3)


def test_robust_error_is_the_sum_over_subjects():
    random = np.random.default_rng(1)
    subjects = [f"s{index}" for index in random.integers(0, 20, 200)]
    level = {name: random.random() for name in set(subjects)}
    values = [float(random.random() < level[name]) for name in subjects]
    found, mean = score(values, subjects), np.mean(values)
    totals = [
        sum(value - mean for value, name in zip(values, subjects, strict=True) if name == one)
        for one in sorted(level)
    ]
    by_hand = math.sqrt(20 / 19 * sum(total**2 for total in totals)) / 200
    assert found.subjects == 20
    assert found.standard_error == pytest.approx(by_hand)
    plain = score(values)
    assert found.low < plain.low < plain.high < found.high


def test_few_subjects_count_as_none():
    values = [0, 1, 1, 0, 1] * 6
    few = [str(index % (FEW_SUBJECTS - 1)) for index in range(30)]
    assert score(values, few) == score(values)
    assert paired_difference(values, values[::-1], few) == paired_difference(values, values[::-1])


def test_subjects_of_equal_answers_are_worth_one_each():
    all_right = score([1] * 100, [str(index % 10) for index in range(100)])
    assert all_right.low == pytest.approx(score([1] * 10).low)
    assert all_right.high == pytest.approx(1)


def test_shares_have_students_interval():
    values = np.random.default_rng(2).beta(2, 5, 40)
    found = score(values)
    peer = stats.t.interval(0.95, 39, values.mean(), stats.sem(values))
    assert (found.low, found.high) == pytest.approx(peer)


def test_means_of_symmetric_intervals_add_their_squares():
    one, other = Score(0.4, 0.03, 0.34, 0.46, 10), Score(0.6, 0.04, 0.52, 0.68, 1000)
    mean = macro_score([one, other])
    assert (mean.mean, mean.examples) == (pytest.approx(0.5), 1010)
    assert mean.standard_error == pytest.approx(0.025)
    assert (mean.low, mean.high) == (pytest.approx(0.45), pytest.approx(0.55))
    assert macro_score([one]) == one


def test_mean_difference_by_hand():
    parts = [paired_difference(*pair(8, 2, 40)), paired_difference(*pair(1, 6, 93))]
    mean = macro_difference(parts)
    assert mean.mean == pytest.approx((6 / 50 - 5 / 100) / 2)
    assert mean.examples == 150
    # every way in which 10 and 7 signs can fall, each as likely
    flips = itertools.product(range(11), range(8))
    chance = sum(
        math.comb(10, a) * math.comb(7, b) / 2**17
        for a, b in flips
        if abs((2 * a - 10) / 100 + (2 * b - 7) / 200) >= mean.mean - 1e-12
    )
    assert mean.p == pytest.approx(chance, abs=0.015)


@pytest.mark.parametrize("examples", [20, 200, 5000])
def test_power_is_that_of_the_t_test(examples):
    error = 0.5 / math.sqrt(examples)
    found = smallest_difference(error, examples)
    power = TTestPower().power(found / 0.5, examples, 0.05)
    assert power == pytest.approx(0.8, abs=0.01)
    assert examples_needed(found, error, examples) == pytest.approx(examples, abs=3)


def test_the_detectable_difference_is_found_in_four_of_five_cases():
    random = np.random.default_rng(5)
    discordance, count = 0.2, 300
    typical = paired_difference(*pair(30, 30, 240)).detectable
    draws = random.multinomial(
        count, [(discordance + typical) / 2, (discordance - typical) / 2, 1 - discordance], 400
    )
    found = np.mean([paired_difference(*pair(*draw)).p < 0.05 for draw in draws])
    assert 0.72 < found < 0.86  # exact tests reject a little less often


def test_nothing_detectable_with_one_example():
    assert smallest_difference(1.0, 1) == 1.0
    assert examples_needed(0, 0.1, 100) is None
    assert examples_needed(1e-5, 0.1, 100) is None
    assert examples_needed(0.9, 0.01, 100) == 1


def test_one_example_tells_nothing():
    assert score([1]).standard_error == 0.5
    alone = paired_difference([1], [0])
    assert (alone.low, alone.high, alone.p, alone.detectable) == (-1, 1, 1, 1)
    assert (score([0.4]).low, score([0.4]).high) == (0, 1)
    share = paired_difference([0.4], [0.1])
    assert (share.low, share.high) == (-1, 1)


def test_equal_answers_are_not_known_to_be_equal():
    same = paired_difference([1, 0] * 50, [1, 0] * 50)
    assert same.mean == 0
    assert same.p == 1
    assert same.low < 0 < same.high
    assert 0 < same.detectable < 0.05


def test_pairing_narrows_the_interval_of_variants_that_agree():
    random = np.random.default_rng(0)
    one = (random.random(500) < 0.5).astype(int)
    other = one.copy()
    other[:10] = 1 - other[:10]
    unpaired = math.hypot(score(one).standard_error, score(other).standard_error)
    assert paired_difference(one, other).standard_error < unpaired / 4


@given(pairs, st.booleans())
@settings(deadline=None)
def test_a_difference_turns_round_with_its_order(answers, clustered):
    one, other = zip(*answers, strict=True)
    subjects = [str(index % 12) for index in range(len(one))] if clustered else ()
    there = paired_difference(one, other, subjects)
    back = paired_difference(other, one, subjects)
    mirrored = (-back.mean, -back.high, -back.low, back.p, back.detectable)
    assert (there.mean, there.low, there.high, there.p, there.detectable) == pytest.approx(mirrored)


@given(shares, st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=40)
def test_intervals_hold_their_mean(values, random):
    other = [random.random() for _ in values]
    subjects = [str(index) for index in range(len(values))]
    for found in (score(values), score(values, subjects)):
        assert 0 <= found.low <= found.mean + 1e-12
        assert found.mean <= found.high + 1e-12
        assert found.high <= 1
    for difference in (
        paired_difference(values, other),
        paired_difference(values, other, subjects),
    ):
        assert -1 <= difference.low <= difference.mean <= difference.high <= 1
        assert 0 < difference.p <= 1
        assert difference.parts.sum() == pytest.approx(difference.mean)


@given(pairs, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_the_order_of_examples_does_not_matter(answers, random):
    shuffled = random.sample(answers, len(answers))
    found = [paired_difference(*zip(*given, strict=True)) for given in (answers, shuffled)]
    assert found[0] == found[1]


def test_more_examples_narrow():
    widths = [
        (lambda found: found.high - found.low)(paired_difference(*pair(3 * k, k, 26 * k)))
        for k in (1, 4, 16)
    ]
    assert widths[0] > widths[1] > widths[2]


def test_nothing_to_score_and_unequal_lengths():
    empty: list[Difference] = []
    for call in (lambda: score([]), lambda: macro_score([]), lambda: macro_difference(empty)):
        with pytest.raises(EvaluationError):
            call()
    with pytest.raises(EvaluationError, match="2 and 3"):
        paired_difference([1, 0], [1, 0, 1])
    with pytest.raises(EvaluationError, match="1 subjects"):
        score([1, 0], ["a"])
