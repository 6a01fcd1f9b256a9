"""Statistics that need no assumption about shapes: order statistics, rank tests, boots as samples.

Nothing here averages latencies.  A sample is one boot; faults of one boot are not independent and
are never pooled into an interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats as scipy_stats

# Up to here every relabelling is tried; beyond it a seeded sample of them is.
EXACT_PERMUTATIONS = 50_000
SAMPLED_PERMUTATIONS = 20_000


def quantile(values: npt.ArrayLike, q: float) -> float:
    """The smallest value that at least a share `q` of the values does not exceed: always a
    value that was seen.
    """
    return float(np.quantile(np.asarray(values), q, method="inverted_cdf"))


def median(values: npt.ArrayLike) -> float:
    """The middle value, or the middle of the two middle values."""
    return float(np.median(np.asarray(values, dtype=np.float64)))


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An interval, the confidence asked for and the coverage it really has (at least, for
    continuous values).
    """

    low: float
    high: float
    confidence: float
    coverage: float
    n: int


def quantile_interval(
    values: Sequence[float] | npt.NDArray[np.float64], q: float = 0.5, confidence: float = 0.95
) -> Interval:
    """Confidence interval for a quantile from order statistics, assuming only independent samples.

    The number of samples below the true quantile is binomial (n, q), so the interval from the
    l-th to the u-th smallest sample covers it with probability P(l <= B <= u - 1).  l is the
    largest and u the smallest rank that leave at most half of 1 - confidence on their side.  With
    few samples one side may have no such rank: then it is the extreme sample, and `coverage` says
    what that is worth (n = 5: lowest to highest covers the median with 93.75 %).

    Raises ValueError without samples.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    n = len(ordered)
    if n == 0:
        raise ValueError("an interval needs at least one sample")
    # Of the ranks themselves, because the coverage needs them; nan where no rank leaves so little.
    # scipy-stubs takes the interval for a number.
    ranks: Any = scipy_stats.quantile_test(np.arange(1, n + 1), p=q).confidence_interval(confidence)
    lower = 1 if math.isnan(ranks.low) else int(ranks.low)
    upper = n if math.isnan(ranks.high) else int(ranks.high)
    coverage = float(np.diff(scipy_stats.binom.cdf([lower - 1, upper - 1], n, q))[0])
    return Interval(
        low=float(ordered[lower - 1]),
        high=float(ordered[upper - 1]),
        confidence=confidence,
        coverage=coverage,
        n=n,
    )


def _rank_sum_counts(n_a: int, n_b: int) -> list[int]:
    """Number of the C(n_a + n_b, n_a) equally likely interleavings that have U = 0, 1, ...,
    n_a * n_b.
    """
    # U counts pairs (a, b) with a > b.  Adding the largest value: if it is an a it beats all b,
    # if a b it beats nothing.
    table: dict[tuple[int, int], list[int]] = {}
    for a in range(n_a + 1):
        for b in range(n_b + 1):
            counts = [0] * (a * b + 1)
            if a == 0 or b == 0:
                counts[0] = 1
            else:
                for u, ways in enumerate(table[a - 1, b]):
                    counts[u + b] += ways
                for u, ways in enumerate(table[a, b - 1]):
                    counts[u] += ways
            table[a, b] = counts
    return table[n_a, n_b]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """B against A: ratio of medians b/a with an interval (None where a sample is not positive), p
    of the permutation test.
    """

    median_a: float
    median_b: float
    n_a: int
    n_b: int
    ratio: float | None
    interval: Interval | None
    p: float
    smallest_p: float
    confidence: float

    @property
    def delta(self) -> float:
        return self.median_b - self.median_a

    @property
    def caveat(self) -> str:
        """Why the numbers should not be leaned on; empty when nothing is known against them."""
        if self.smallest_p > 1 - self.confidence:
            return (
                f"n={self.n_a} and {self.n_b} are too few: "
                f"even a complete separation gives p={self.smallest_p:.2g}"
            )
        return ""


def ratio_interval(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Interval:
    """Confidence interval for the factor between A and B, from all pairwise ratios b/a of
    positive samples.

    If B is distributed as a constant times A, the number of pairwise ratios below that constant
    is distributed as the rank-sum statistic U of two equal populations; so the interval between
    the l-th smallest and l-th largest ratio has a known coverage at any sample size.  It agrees
    with `permutation_test` on ranks.

    Raises ValueError without samples or when a sample is not positive.
    """
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if len(x) == 0 or len(y) == 0 or np.any(x <= 0) or np.any(y <= 0):
        raise ValueError("a ratio needs positive samples on both sides")
    ratios = np.sort((y[:, None] / x[None, :]).ravel())
    counts = _rank_sum_counts(len(x), len(y))
    total = sum(counts)
    tail = (1 - confidence) / 2
    drop, cumulated = 0, 0  # drop = ratios cut off on each side; P(U < drop) = cumulated / total
    while drop < (len(ratios) - 1) // 2 and (cumulated + counts[drop]) / total <= tail:
        cumulated += counts[drop]
        drop += 1
    if drop == 0:
        # All ratios: the factor lies outside only when U is at its extremes.
        low, high, coverage = ratios[0], ratios[-1], 1 - 2 * counts[0] / total
    else:
        low, high, coverage = ratios[drop - 1], ratios[-drop], 1 - 2 * cumulated / total
    return Interval(
        low=float(low),
        high=float(high),
        confidence=confidence,
        coverage=coverage,
        n=min(len(x), len(y)),
    )


def permutation_test(a: Sequence[float], b: Sequence[float], *, seed: int = 1) -> float:
    """Two-sided p that A and B come from one distribution, by relabelling the boots.

    The statistic is the difference of the mean ranks, so one wild boot cannot carry the result.
    Every relabelling is tried when there are at most 50 000, else 20 000 seeded ones (p is then
    never reported below 1/20 001).

    Raises ValueError without samples.
    """
    n_a, n_b = len(a), len(b)
    if n_a == 0 or n_b == 0:
        raise ValueError("a test needs samples on both sides")
    ranks = scipy_stats.rankdata(
        np.concatenate([np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)])
    )
    mean_rank = (n_a + n_b + 1) / 2
    if min(n_a, n_b) == 1:  # scipy asks for two on each side; a single boot can have any rank
        lone = ranks[0] if n_a == 1 else ranks[-1]
        return float(np.mean(np.abs(ranks - mean_rank) >= abs(lone - mean_rank)))

    def distance(
        chosen: npt.NDArray[np.float64], _others: npt.NDArray[np.float64], axis: int
    ) -> npt.NDArray[np.float64]:
        found: npt.NDArray[np.float64] = np.abs(chosen.sum(axis=axis) - n_a * mean_rank)
        return found

    every = math.comb(n_a + n_b, n_a) <= EXACT_PERMUTATIONS
    result = scipy_stats.permutation_test(
        (ranks[:n_a], ranks[n_a:]),
        distance,
        # The distance has no sign: both sides are in it.
        alternative="greater",
        n_resamples=EXACT_PERMUTATIONS if every else SAMPLED_PERMUTATIONS,
        vectorized=True,
        rng=seed,
    )
    return float(result.pvalue)


def compare(
    a: Sequence[float], b: Sequence[float], *, confidence: float = 0.95, seed: int = 1
) -> Comparison:
    """B against A over boots: medians, ratio b/a with interval, permutation p.

    The ratio and its interval are None when a sample is not positive.

    Raises ValueError without samples.
    """
    positive = min(a, default=0) > 0 and min(b, default=0) > 0
    p = permutation_test(a, b, seed=seed)
    median_a, median_b = median(a), median(b)
    return Comparison(
        median_a=median_a,
        median_b=median_b,
        n_a=len(a),
        n_b=len(b),
        ratio=median_b / median_a if positive else None,
        interval=ratio_interval(a, b, confidence) if positive else None,
        p=p,
        smallest_p=2 / math.comb(len(a) + len(b), len(a)),
        confidence=confidence,
    )


def check_stability(values: Sequence[float]) -> list[str]:
    """Reasons to distrust a set of boots, as sentences; empty when there are none.

    Few samples (under 5), a spread from lowest to highest of more than half the median, a trend
    with the order of measurement (rank correlation at p < 0.05, from 8 samples on).
    """
    reasons = []
    n = len(values)
    if n < 5:
        reasons.append(f"only {n} boot{'s' if n != 1 else ''}")
    if n >= 2 and median(values) > 0:
        spread = (max(values) - min(values)) / median(values)
        if spread > 0.5:
            reasons.append(f"lowest to highest is {spread:.0%} of the median")
    if n >= 8 and len(set(values)) > 1:
        trend = scipy_stats.kendalltau(np.arange(n), np.asarray(values))
        if float(trend.pvalue) < 0.05:
            reasons.append("drifts with the order of measurement")
    return reasons
