"""Statistics against values worked out by hand, and against their defining property by
simulation.
"""

import math
from itertools import combinations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from lab import stats

SAMPLES = st.lists(st.floats(0.1, 1e6), min_size=1, max_size=40)


@given(SAMPLES, st.floats(0.01, 1.0))
def test_quantile_is_the_smallest_seen_value_that_enough_values_do_not_exceed(
    values: list[float], q: float
) -> None:
    found = stats.quantile(values, q)
    assert found in values
    assert sum(v <= found for v in values) >= q * len(values) - 1e-9
    assert sum(v < found for v in values) < q * len(values) + 1e-9


@pytest.mark.parametrize(
    ("n", "ranks", "coverage"),
    [
        # P(1 <= B <= n-1) for B ~ Binomial(n, 1/2)
        (3, (1, 3), 1 - 2 / 8),
        (5, (1, 5), 1 - 2 / 32),
        (6, (1, 6), 1 - 2 / 64),
        # P(2 <= B <= 7) with n = 9: 1 - 2 * (1 + 9) / 512
        (9, (2, 8), 1 - 2 * 10 / 512),
        # P(2 <= B <= 8) with n = 10: 1 - 2 * 11 / 1024
        (10, (2, 9), 1 - 2 * 11 / 1024),
    ],
)
def test_median_interval_uses_the_ranks_of_the_binomial(
    n: int, ranks: tuple[int, int], coverage: float
) -> None:
    values = [float(v) for v in range(1, n + 1)]
    interval = stats.quantile_interval(values)
    assert interval.low == ranks[0]
    assert interval.high == ranks[1]
    assert interval.coverage == pytest.approx(coverage)


def test_few_samples_say_that_the_confidence_is_not_reached() -> None:
    few = stats.quantile_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (few.n, few.coverage) == (5, 0.9375)
    assert few.coverage < few.confidence
    enough = stats.quantile_interval([float(v) for v in range(6)])
    assert enough.coverage >= enough.confidence


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("q", [0.1, 0.5, 0.9, 0.99])
def test_quantile_interval_equals_the_formula_of_its_ranks(q: float, confidence: float) -> None:
    tail = (1 - confidence) / 2
    for n in range(1, 81):
        below = scipy.stats.binom.cdf(np.arange(n + 1), n, q)  # below[k] = P(B <= k)
        lower = max((rank for rank in range(1, n + 1) if below[rank - 1] <= tail), default=1)
        upper = min((rank for rank in range(1, n + 1) if 1 - below[rank - 1] <= tail), default=n)
        interval = stats.quantile_interval([float(v) for v in range(1, n + 1)], q, confidence)
        assert (interval.low, interval.high) == (lower, upper)
        assert interval.coverage == below[upper - 1] - below[lower - 1]


@pytest.mark.parametrize(("q", "n"), [(0.5, 7), (0.5, 20), (0.9, 60), (0.99, 30)])
def test_quantile_interval_covers_the_true_quantile_as_often_as_it_says(q: float, n: int) -> None:
    rng = np.random.default_rng(20)
    hits = 0
    stated = stats.quantile_interval(list(range(n)), q).coverage
    for _ in range(2000):
        interval = stats.quantile_interval(rng.random(n), q)
        hits += interval.low <= q <= interval.high
    # four standard errors of a proportion
    assert hits / 2000 == pytest.approx(stated, abs=4 * math.sqrt(0.25 / 2000))


@pytest.mark.parametrize(("n_a", "n_b"), [(1, 1), (2, 3), (3, 3), (4, 2), (5, 5)])
def test_rank_sum_counts_equal_enumeration(n_a: int, n_b: int) -> None:
    counts = [0] * (n_a * n_b + 1)
    for chosen in combinations(range(n_a + n_b), n_a):
        others = set(range(n_a + n_b)) - set(chosen)
        counts[sum(a > b for a in chosen for b in others)] += 1
    assert stats._rank_sum_counts(n_a, n_b) == counts


def test_permutation_test_of_a_complete_separation_has_the_smallest_possible_p() -> None:
    assert stats.permutation_test([1, 2, 3], [4, 5, 6]) == pytest.approx(2 / 20)
    assert stats.permutation_test([1, 2, 3, 4, 5], [10, 9, 8, 7, 6]) == pytest.approx(2 / 252)


def test_permutation_test_of_equal_samples_is_one() -> None:
    assert stats.permutation_test([1, 2, 3], [1, 2, 3]) == 1.0
    assert stats.permutation_test([7, 7], [7, 7]) == 1.0


@given(st.lists(st.integers(0, 5), min_size=2, max_size=11), st.data())
def test_permutation_test_equals_the_count_over_every_relabelling(
    values: list[int], data: st.DataObject
) -> None:
    n_a = data.draw(st.integers(1, len(values) - 1))
    ranks = scipy.stats.rankdata(values)
    centre = ranks.sum() * n_a / len(ranks)
    seen = abs(ranks[:n_a].sum() - centre)
    sums = np.array([ranks[list(chosen)].sum() for chosen in combinations(range(len(ranks)), n_a)])
    p = stats.permutation_test(values[:n_a], values[n_a:])
    assert p == pytest.approx(np.mean(np.abs(sums - centre) >= seen - 1e-9))


def test_sampled_permutations_are_repeatable_and_close_to_the_exact_answer() -> None:
    rng = np.random.default_rng(5)
    a, b = list(rng.normal(0, 1, 30)), list(rng.normal(0.8, 1, 30))
    p = stats.permutation_test(a, b, seed=3)
    assert p == stats.permutation_test(a, b, seed=3)
    assert 0 < p < 0.05


@given(SAMPLES, SAMPLES)
def test_permutation_test_does_not_care_which_side_is_which(a: list[float], b: list[float]) -> None:
    a, b = a[:6], b[:6]
    assert stats.permutation_test(a, b) == pytest.approx(stats.permutation_test(b, a))


@given(SAMPLES, st.sampled_from([0.25, 0.5, 2.0, 8.0]))
def test_ratio_of_a_scaled_copy_is_the_factor_and_lies_in_the_interval(
    a: list[float], factor: float
) -> None:
    a = a[:8]
    result = stats.compare(a, [factor * v for v in a])
    assert result.ratio == pytest.approx(factor)
    assert result.interval is not None
    assert result.ratio is not None
    assert result.interval.low <= result.ratio * (1 + 1e-12)
    assert result.interval.high >= result.ratio * (1 - 1e-12)


@pytest.mark.parametrize(
    ("n", "coverage"), [(3, 1 - 2 / 20), (4, 1 - 2 / 70), (5, 1 - 4 * 2 / 252)]
)
def test_ratio_interval_states_the_coverage_of_the_rank_sum(n: int, coverage: float) -> None:
    values = [float(2**k) for k in range(n)]
    interval = stats.ratio_interval(values, values)
    assert interval.coverage == pytest.approx(coverage)


def test_ratio_interval_covers_the_true_factor_as_often_as_it_says() -> None:
    rng = np.random.default_rng(11)
    hits, stated = 0, 0.0
    for _ in range(2000):
        a, b = rng.lognormal(0, 1, 5), 3 * rng.lognormal(0, 1, 5)
        interval = stats.ratio_interval(list(a), list(b))
        stated = interval.coverage
        hits += interval.low <= 3 <= interval.high
    assert hits / 2000 == pytest.approx(stated, abs=4 * math.sqrt(stated * (1 - stated) / 2000))


def test_comparison_of_three_boots_says_that_they_are_too_few() -> None:
    assert "too few" in stats.compare([1, 2, 3], [4, 5, 6]).caveat
    assert stats.compare([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]).caveat == ""


def test_ratio_refuses_what_has_no_ratio() -> None:
    with pytest.raises(ValueError, match="positive"):
        stats.ratio_interval([0.0, 1.0], [1.0])
    with pytest.raises(ValueError, match="positive"):
        stats.ratio_interval([], [1.0])


def test_stability_names_few_boots_wide_spread_and_drift() -> None:
    assert stats.check_stability([10.0, 10.1, 9.9, 10.0, 10.2]) == []
    assert stats.check_stability([10.0]) == ["only 1 boot"]
    assert any("median" in r for r in stats.check_stability([1.0, 2.0, 10.0, 2.0, 2.0]))
    assert any("drift" in r for r in stats.check_stability([10 + 0.1 * k for k in range(10)]))


def test_comparison_without_a_ratio_still_has_a_difference_and_a_p() -> None:
    result = stats.compare([0.0, 0.0, 0.0], [1.0, 2.0, 3.0])
    assert result.ratio is None
    assert result.interval is None
    assert result.delta == 2.0
    assert result.p == pytest.approx(2 / 20)
