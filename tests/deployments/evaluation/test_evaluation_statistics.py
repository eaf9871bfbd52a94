"""Intervals and tests against closed forms."""

import math
from statistics import NormalDist

import numpy as np
import pytest

from deployments.evaluation.statistics import (
    mcnemar_test,
    mean_interval,
    paired_difference,
    paired_ratio,
    permutation_test,
    questions_needed,
)

Z = NormalDist().inv_cdf(0.975)


def binomial_two_sided(better: int, worse: int) -> float:
    n = better + worse
    tail = sum(math.comb(n, k) for k in range(min(better, worse) + 1)) / 2**n
    return min(1.0, 2 * tail)


def test_the_interval_of_a_mean_is_the_normal_one_for_many_values():
    values = np.random.default_rng(3).normal(5, 2, 2_000)
    interval = mean_interval(values.tolist())
    error = values.std() / math.sqrt(len(values))
    assert interval.value == pytest.approx(values.mean(), abs=1e-12)
    assert interval.low == pytest.approx(values.mean() - Z * error, abs=0.05 * error)
    assert interval.high == pytest.approx(values.mean() + Z * error, abs=0.05 * error)


def test_the_interval_of_a_share_is_binomial():
    """100 questions, 30 right: the bootstrap's law is Binomial(100, 0.3) ÷ 100."""
    cumulative, quantiles = 0.0, []
    for k in range(101):
        cumulative += math.comb(100, k) * 0.3**k * 0.7 ** (100 - k)
        while len(quantiles) < 2 and cumulative > (0.025, 0.975)[len(quantiles)]:
            quantiles.append(k / 100)
    interval = mean_interval([1.0] * 30 + [0.0] * 70)
    assert (interval.low, interval.high) == pytest.approx(quantiles, abs=0.0101)
    assert interval.value == pytest.approx(0.3)


def test_what_questions_have_in_common_does_not_widen_a_paired_interval():
    generator = np.random.default_rng(0)
    difficulty = generator.normal(0, 10, 500)
    theirs = difficulty + generator.normal(0, 0.1, 500)
    interval = paired_difference((theirs + 0.5).tolist(), theirs.tolist())
    assert interval == pytest.approx((0.5, 0.5, 0.5))


def test_the_same_seed_draws_the_same_interval_and_another_seed_another():
    values = np.random.default_rng(1).exponential(1, 50).tolist()
    assert mean_interval(values, seed=4) == mean_interval(values, seed=4)
    assert mean_interval(values, seed=4) != mean_interval(values, seed=5)


def test_a_lower_level_has_a_narrower_interval():
    values = np.random.default_rng(1).normal(0, 1, 400).tolist()
    wide, narrow = mean_interval(values), mean_interval(values, level=0.6827)
    assert (wide.high - wide.low) / (narrow.high - narrow.low) == pytest.approx(Z, rel=0.04)


def test_the_interval_of_a_ratio_is_the_log_normal_one():
    generator = np.random.default_rng(8)
    theirs = generator.lognormal(3, 1, 1_000)
    logs = generator.normal(math.log(2), 0.3, 1_000)
    interval = paired_ratio((theirs * np.exp(logs)).tolist(), theirs.tolist())
    error = logs.std() / math.sqrt(1_000)
    assert interval.value == pytest.approx(math.exp(logs.mean()))
    assert interval.low == pytest.approx(math.exp(logs.mean() - Z * error), rel=0.05 * error)
    assert interval.high == pytest.approx(math.exp(logs.mean() + Z * error), rel=0.05 * error)
    assert paired_ratio([2.0, 8.0], [1.0, 1.0]).value == pytest.approx(4)


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (6, 1), (8, 8), (2, 9)])
def test_a_permutation_test_of_equal_steps_is_the_sign_test(better, worse):
    ours = [1.0] * better + [0.0] * worse + [1.0, 0.0, 0.5] * 9
    theirs = [0.0] * better + [1.0] * worse + [1.0, 0.0, 0.5] * 9
    assert permutation_test(ours, theirs) == pytest.approx(binomial_two_sided(better, worse), abs=1e-12)


def test_a_permutation_test_of_three_unlike_differences_by_hand():
    """Of the eight sums of ±1 ±2 ±4 only two are as far from 0 as 7, and four as far as 5."""
    assert permutation_test([1, 2, 4], [0, 0, 0]) == 2 / 8
    assert permutation_test([3, 2, 0], [0, 0, 4]) == 1  # the sum is 1, and ±9, ±5, ±3, ±1 are all as far
    assert permutation_test([2, 4, 0], [0, 0, 1]) == 4 / 8


def test_a_permutation_test_of_many_is_near_the_binomial_and_never_zero():
    ours, theirs = [1.0] * 60 + [0.0] * 40, [0.0] * 60 + [1.0] * 40
    assert permutation_test(ours, theirs) == pytest.approx(binomial_two_sided(60, 40), abs=0.01)
    assert permutation_test([1.0] * 200, [0.0] * 200) == 1 / 10_001


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (5, 0), (15, 5), (7, 7), (30, 52)])
def test_mcnemar_is_the_binomial_of_what_differs(better, worse):
    ours = [1] * better + [0] * worse + [1] * 20 + [0] * 9
    theirs = [0] * better + [1] * worse + [1] * 20 + [0] * 9
    assert mcnemar_test(ours, theirs) == pytest.approx(binomial_two_sided(better, worse), rel=1e-12)


def test_questions_needed_is_the_textbook_formula():
    """Differences 0 and 1 in turns: mean 1/2 and s² = 1/4 · n/(n-1). (1.959964 + 0.841621)² is 7.84888."""
    ours, theirs = [0.0, 1.0] * 500, [0.0, 0.0] * 500
    assert questions_needed(ours, theirs) == math.ceil(7.848879734 * 1000 / 999) == 8
    assert questions_needed([1.0, 0.0, 1.0, 0.0], [0.0] * 4) == math.ceil(7.848879734 * 4 / 3) == 11
    small = [0.05, -0.03] * 500  # mean 0.01, deviation 0.04
    assert questions_needed(small, [0.0] * 1000) == math.ceil(7.848879734 * 16 * 1000 / 999) == 126
    assert questions_needed(small, [0.0] * 1000, power=0.9) == math.ceil(10.507416 * 16 * 1000 / 999)


def test_that_many_questions_find_the_difference_eight_times_in_ten():
    generator = np.random.default_rng(2)
    needed = questions_needed(*_differing(generator, 20_000))
    found = 0
    for _ in range(400):
        ours, theirs = _differing(generator, needed)
        differences = np.subtract(ours, theirs)
        error = differences.std(ddof=1) / math.sqrt(needed)
        found += abs(differences.mean()) > Z * error
    assert found / 400 == pytest.approx(0.8, abs=0.06)


def _differing(generator, number):
    theirs = generator.normal(0, 1, number)
    return (theirs + generator.normal(0.2, 1, number)).tolist(), theirs.tolist()


def test_no_number_of_questions_tells_equals_apart():
    assert questions_needed([1.0, 0.0], [0.0, 1.0]) is None
    assert questions_needed([0.5, 0.5], [0.5, 0.5]) is None


@pytest.mark.parametrize("test", [paired_difference, paired_ratio, permutation_test, mcnemar_test, questions_needed])
def test_values_of_unlike_questions_are_refused(test):
    with pytest.raises(ValueError, match="same questions"):
        test([1.0, 1.0], [1.0])
    with pytest.raises(ValueError):
        test([], [])


def test_values_outside_a_tests_domain_are_refused():
    with pytest.raises(ValueError, match="0 or 1"):
        mcnemar_test([0.5], [1.0])
    with pytest.raises(ValueError, match="above 0"):
        paired_ratio([0.0], [1.0])
    with pytest.raises(ValueError, match="two questions"):
        questions_needed([1.0], [0.0])
