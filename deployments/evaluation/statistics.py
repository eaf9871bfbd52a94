"""What can be told apart: intervals and tests for strategies that answered the same questions.

Everything here is paired: the n-th value of one strategy and the n-th of the other belong to the same question. What is
drawn at random is drawn by a seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
_EXACT = 16  # questions that differ: up to here all 2^n signs are tried
_BLOCK = 1 << 22  # random numbers that are held at once

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """An estimate, and the ends of its confidence interval."""

    value: float
    low: float
    high: float


def mean_interval(values: Sequence[float], *, seed: int = 0, level: float = 0.95) -> Interval:
    """The mean of ``values``, with the percentile interval of its bootstrap.

    Raises:
        ValueError: ``values`` is empty.
    """
    array = _array(values)
    low, high = _percentiles(_resampled_means(array, seed), level)
    return Interval(float(array.mean()), low, high)


def paired_difference(
    ours: Sequence[float], theirs: Sequence[float], *, seed: int = 0, level: float = 0.95
) -> Interval:
    """The mean of ``ours`` − ``theirs``, with the percentile interval of the paired bootstrap: questions are resampled.

    Raises:
        ValueError: the two are empty, or not as long as each other.
    """
    return mean_interval(_differences(ours, theirs).tolist(), seed=seed, level=level)


def paired_ratio(ours: Sequence[float], theirs: Sequence[float], *, seed: int = 0, level: float = 0.95) -> Interval:
    """The geometric mean of ``ours`` ÷ ``theirs``, with the paired bootstrap's interval: how many times as fast.

    Raises:
        ValueError: the two are empty, not as long as each other, or hold a value that is not above 0.
    """
    first, second = _array(ours), _array(theirs)
    if (first <= 0).any() or (second <= 0).any():
        raise ValueError("a ratio needs values above 0")
    logs = mean_interval(_differences(np.log(first).tolist(), np.log(second).tolist()).tolist(), seed=seed, level=level)
    return Interval(*(math.exp(value) for value in logs))


def permutation_test(ours: Sequence[float], theirs: Sequence[float], *, seed: int = 0) -> float:
    """The two-sided p of the paired permutation test: how often |mean difference| is as large under random signs.

    It is exact where at most 16 questions differ. Else signs are drawn 10,000 times, and the p is at least 1/10,001.

    Raises:
        ValueError: the two are empty, or not as long as each other.
    """
    differences = _differences(ours, theirs)
    differences = differences[differences != 0]
    seen = abs(float(differences.sum())) * (1 - 1e-12)  # the same sum in another order counts as equal
    if not len(differences):
        return 1.0
    if len(differences) <= _EXACT:
        bits = np.arange(1 << len(differences))[:, None] >> np.arange(len(differences)) & 1
        return float((abs((2 * bits - 1) @ differences) >= seen).mean())
    generator = np.random.default_rng(seed)
    as_large = 0
    for size in _blocks(len(differences)):
        signs = generator.choice([-1.0, 1.0], (size, len(differences)))
        as_large += int((abs(signs @ differences) >= seen).sum())
    return (as_large + 1) / (RESAMPLES + 1)


def mcnemar_test(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The two-sided p of McNemar's exact test, for answers that are right (1) or wrong (0).

    Raises:
        ValueError: the two are empty, not as long as each other, or hold another value than 0 and 1.
    """
    differences = _differences(ours, theirs)
    if not np.isin(_array(ours), (0, 1)).all() or not np.isin(_array(theirs), (0, 1)).all():
        raise ValueError("McNemar's test needs values that are 0 or 1")
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    tail = sum(math.comb(better + worse, k) for k in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / (1 << (better + worse)))


def questions_needed(
    ours: Sequence[float], theirs: Sequence[float], *, power: float = 0.8, level: float = 0.95
) -> int | None:
    """How many questions a paired test needs to find a difference of the seen size and spread.

    n = ((z₁₋α⁄₂ + z_power) · s ÷ d)², with d the mean and s the standard deviation of the differences. None: the two do
    not differ in the mean, so that no number would do.

    Raises:
        ValueError: there are fewer than two questions, or the two are not as long as each other.
    """
    differences = _differences(ours, theirs)
    if len(differences) < 2:
        raise ValueError("the spread of the differences needs at least two questions")
    mean, deviation = abs(float(differences.mean())), float(differences.std(ddof=1))
    if mean <= 1e-12 * max(1.0, deviation):
        return None
    normal = NormalDist()
    quantiles = normal.inv_cdf((1 + level) / 2) + normal.inv_cdf(power)
    return max(2, math.ceil((quantiles * deviation / mean) ** 2))


def _array(values: Sequence[float]) -> Floats:
    if not len(values):
        raise ValueError("there is no question that was answered")
    return np.asarray(values, dtype=np.float64)


def _differences(ours: Sequence[float], theirs: Sequence[float]) -> Floats:
    if len(ours) != len(theirs):
        raise ValueError(f"paired values must belong to the same questions; these are {len(ours)} and {len(theirs)}")
    return _array(ours) - _array(theirs)


def _resampled_means(array: Floats, seed: int) -> Floats:
    """[RESAMPLES]: the mean of as many values, drawn with replacement."""
    generator = np.random.default_rng(seed)
    means = [
        array[generator.integers(len(array), size=(size, len(array)))].mean(axis=1) for size in _blocks(len(array))
    ]
    return np.concatenate(means)


def _percentiles(resampled: Floats, level: float) -> tuple[float, float]:
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _blocks(num_values: int) -> list[int]:
    """RESAMPLES in parts that need little memory for ``num_values`` each."""
    edges = [*range(0, RESAMPLES, max(1, _BLOCK // num_values)), RESAMPLES]
    return [end - start for start, end in pairwise(edges)]
