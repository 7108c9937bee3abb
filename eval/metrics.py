"""Numbers and how sure they are: pass@k, means, intervals, paired comparisons.

Items are taken as independent draws from the population a benchmark stands for; where several come
from one source (the holes of one program), the sources are, and `clustered_std_err` says so.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

Z95 = 1.959964


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Unbiased estimate of P(at least one of k samples passes), given `passed` of `samples`.

    1 - C(n-c, k) / C(n, k) (Chen et al., arXiv 2107.03374, eq. 1). Needs samples >= k.
    """
    assert samples >= k >= 1, (samples, k)
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


def mean_and_std_err(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; NaN for the error of fewer than two values."""
    assert values, "no values"
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return mean, math.nan
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return mean, math.sqrt(variance / n)


def clustered_std_err(values: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """Standard error of the mean when values of one cluster are not independent; NaN for one cluster.

    sqrt(G/(G-1) · Σ over the G clusters of (sum of its deviations)²) / n, which is the ordinary
    standard error if each cluster has one value (Liang and Zeger 1986; Miller, arXiv 2411.00640).
    """
    assert values, "no values"
    mean = math.fsum(values) / len(values)
    sums: dict[Hashable, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value - mean
    if len(sums) < 2:
        return math.nan
    squares = math.fsum(deviation**2 for deviation in sums.values())
    return math.sqrt(len(sums) / (len(sums) - 1) * squares) / len(values)


def ratio_std_err(totals: Sequence[float], sizes: Sequence[float]) -> float:
    """Standard error of Σ totals / Σ sizes over items of different size; NaN for fewer than two."""
    assert len(totals) == len(sizes)
    n = len(totals)
    if n < 2:
        return math.nan
    size = math.fsum(sizes)
    ratio = math.fsum(totals) / size
    squares = math.fsum((t - ratio * s) ** 2 for t, s in zip(totals, sizes, strict=True))
    return math.sqrt(n / (n - 1) * squares) / size


def paired_ratios(
    a: Sequence[tuple[float, float]],
    b: Sequence[tuple[float, float]],
    clusters: Sequence[Hashable],
) -> tuple[float, float, float]:
    """Σ totals / Σ sizes of a and of b over the same items (total, size), and the standard error of
    their difference; NaN for one cluster.

    Linearised: an item moves a ratio by (total - ratio · size) / mean size.
    """
    assert len(a) == len(b)
    ratios, moves = [], []
    for items in (a, b):
        size = math.fsum(own for _, own in items)
        ratio = math.fsum(total for total, _ in items) / size
        ratios.append(ratio)
        moves.append([(total - ratio * own) * len(items) / size for total, own in items])
    steps = [y - x for x, y in zip(*moves, strict=True)]
    return ratios[0], ratios[1], clustered_std_err(steps, clusters)


def wilson_interval(passed: float, n: int) -> tuple[float, float]:
    """95 % interval of a proportion; sensible at 0 and 1, where mean ± 2 SE is not (Wilson 1927)."""
    assert n > 0, n
    assert 0 <= passed <= n, (passed, n)
    p, z2 = passed / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    low = 0.0 if passed == 0 else max(0.0, centre - half)  # exact: rounding leaves 5e-17
    high = 1.0 if passed == n else min(1.0, centre + half)
    return low, high


def paired_difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Mean of b - a over the same items, and its standard error."""
    assert len(a) == len(b)
    return mean_and_std_err([y - x for x, y in zip(a, b, strict=True)])


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p value that two models are right equally often.

    `only_a`, `only_b`: items that just one of them gets right; the others say nothing (McNemar 1947).
    """
    n = only_a + only_b
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1)) / 2**n
    return min(1.0, 2 * tail)
