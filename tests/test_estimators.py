"""Masks and weights of the likelihood estimators: unbiased, balanced, and honest about their error.

No model here: log-probabilities come from a table that knows every mask.
"""

import itertools
import math
from collections import Counter
from fractions import Fraction

import oracles
import pytest
import torch

from mdm.diffusion import generator
from mdm.estimators import (
    ESTIMATORS,
    Masks,
    allocate,
    balanced_masks,
    every_mask,
    independent,
    published,
    stratified,
)

SAMPLES = [1, 2, 3, 7, 16, 32, 128]


def codes(masked_RL):
    """Each mask as a number."""
    return (masked_RL.long() << torch.arange(masked_RL.shape[1])).sum(1)


def random_table(length, seed=0):
    """(2^L, L) log-probabilities without any structure."""
    random = torch.Generator().manual_seed(seed)
    return -3 * torch.rand(2**length, length, generator=random, dtype=torch.float64)


def smooth_table(length, noise=0.5, power=-0.3, seed=0):
    """Like a model: tokens differ, more masks make it harder (as l^power), the rest is noise."""
    random = torch.Generator().manual_seed(seed)
    mask_CL = (torch.arange(2**length)[:, None] >> torch.arange(length)) & 1
    hard_C = mask_CL.sum(1, dtype=torch.float64).clamp(min=1) ** power
    hard_C = (hard_C - hard_C.max()) / (hard_C.min() - hard_C.max())
    if power > 0:
        hard_C = 1 - hard_C
    easy_L, steep_L = (torch.rand(2, length, generator=random, dtype=torch.float64)).unbind()
    noise_CL = torch.randn(2**length, length, generator=random, dtype=torch.float64)
    return -(4 * easy_L + 5 * steep_L * hard_C[:, None] + 2) + noise * noise_CL


def bound_of(table_CL):
    """Σ_l mean over masks of l of the mean log-probability, by the definition."""
    length = table_CL.shape[1]
    total = 0.0
    for size in range(1, length + 1):
        means = []
        for chosen in itertools.combinations(range(length), size):
            row = table_CL[sum(1 << i for i in chosen)]
            means.append(math.fsum(float(row[i]) for i in chosen) / size)
        total += math.fsum(means) / len(means)
    return total


def estimate(masks, table_CL):
    return masks.value(table_CL[codes(masks.masked_RL)])


def check_mean(values, expected):
    """The mean is the expected value within 4 of its standard errors."""
    values = torch.tensor(values, dtype=torch.float64)
    std_err = float(values.std()) / len(values) ** 0.5
    assert abs(float(values.mean()) - expected) <= 4 * std_err + 1e-9, (
        float(values.mean()),
        expected,
        std_err,
    )


def drawn(draw, length, samples, seeds):
    return [draw(length, samples, generator("test", seed)) for seed in range(seeds)]


# --- all masks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", range(1, 9))
def test_all_masks_give_the_bound(length):
    masks = every_mask(length, 1, generator(0))
    table_CL = random_table(length)
    assert sorted(codes(masks.masked_RL).tolist()) == list(range(1, 2**length))
    assert estimate(masks, table_CL) == pytest.approx(bound_of(table_CL), rel=1e-12)
    assert ESTIMATORS["exact"].std_err(masks, table_CL[1:]) == 0
    assert not masks.sampled_R.any()


def test_what_is_not_masked_does_not_count():
    masks = every_mask(4, 1, generator(0))
    log_probs_RL = random_table(4)[codes(masks.masked_RL)]
    value = masks.value(log_probs_RL)
    assert masks.value(log_probs_RL.masked_fill(~masks.masked_RL, -math.inf)) == value
    assert masks.value(log_probs_RL.masked_fill(~masks.masked_RL, math.nan)) == value
    assert masks.rows(log_probs_RL.float()).dtype == torch.float64


# --- unbiased: by enumerating all shuffles ---------------------------------------------------------


def every_shuffle(monkeypatch, length, count):
    """Make torch.randperm give every sequence of `count` shuffles in turn; yields once for each."""
    for shuffles in itertools.product(itertools.permutations(range(length)), repeat=count):
        rest = iter(shuffles)
        monkeypatch.setattr(torch, "randperm", lambda n, *, generator: torch.tensor(next(rest)))  # noqa: B023
        yield


@pytest.mark.parametrize("sizes", [[1, 2], [2, 2], [2, 1, 2], [1, 1, 1, 2], [3, 1, 2], [2, 3]])
def test_a_dealt_mask_is_uniform_among_those_of_its_size(monkeypatch, sizes):
    found = [Counter() for _ in sizes]
    for _ in every_shuffle(monkeypatch, 3, 3):
        for row, code in enumerate(codes(balanced_masks(3, sizes, generator(0))).tolist()):
            found[row][code] += 1
    for counter, size in zip(found, sizes, strict=True):
        assert {code.bit_count() for code in counter} == {size}
        assert len(counter) == math.comb(3, size)
        assert len(set(counter.values())) == 1


@pytest.mark.parametrize("samples", [3, 4, 5, 6, 7])
def test_stratified_is_unbiased_over_all_shuffles(monkeypatch, samples):
    table_CL = random_table(3)
    values = []
    for _ in every_shuffle(monkeypatch, 3, 3):
        values.append(estimate(stratified(3, samples, generator(0)), table_CL))
    assert math.fsum(values) / len(values) == pytest.approx(bound_of(table_CL), rel=1e-12)
    assert (max(values) - min(values) > 1e-9) == (samples < 7)


def test_independent_is_unbiased_over_all_draws(monkeypatch):
    table_CL = random_table(3)
    values = []
    for sizes in itertools.product((1, 2, 3), repeat=2):
        monkeypatch.setattr(
            torch,
            "randint",
            lambda low, high, shape, *, generator: torch.tensor(sizes),  # noqa: B023
        )
        for _ in every_shuffle(monkeypatch, 3, 2):
            values.append(estimate(independent(3, 2, generator(0)), table_CL))
    assert math.fsum(values) / len(values) == pytest.approx(bound_of(table_CL), rel=1e-12)


# --- unbiased: over seeds --------------------------------------------------------------------------


@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("length", range(1, 9))
def test_stratified_has_the_bound_as_its_mean(length, samples):
    table_CL = random_table(length, seed=length)
    seeds = 200 if samples < 2**length - 1 else 2
    values = [estimate(masks, table_CL) for masks in drawn(stratified, length, samples, seeds)]
    check_mean(values, bound_of(table_CL))


@pytest.mark.parametrize(("length", "samples"), [(1, 1), (2, 3), (4, 8), (6, 5), (7, 16)])
def test_independent_has_the_bound_as_its_mean(length, samples):
    table_CL = random_table(length)
    values = [estimate(masks, table_CL) for masks in drawn(independent, length, samples, 400)]
    check_mean(values, bound_of(table_CL))


@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("length", range(1, 21))
def test_every_size_has_its_share_of_the_weight(monkeypatch, length, samples):
    # E Σ_{r of size l} weight_r = 1 / l: that, and uniform masks, make an estimate unbiased.
    expected_l = 1 / torch.arange(1, length + 1, dtype=torch.float64)
    weights, heaviest = [], 0.0
    grid = (torch.arange(100, dtype=torch.float64) + 0.5) / 100  # the one uniform that is drawn
    for u in grid if samples < length else grid[:2]:
        monkeypatch.setattr(torch, "rand", lambda *_, u=u, **__: u)
        masks = stratified(length, samples, generator(0))
        assert len(masks.weight_R) == len(masks.masked_RL) == len(masks.sampled_R)
        weight_l = torch.zeros(length + 1, dtype=torch.float64)
        weight_l.index_add_(0, masks.masked_RL.sum(1), masks.weight_R)
        weights.append(weight_l[1:])
        heaviest = max(heaviest, float(masks.weight_R.max()))
        if samples < length:
            assert len(masks.weight_R) == samples
        else:
            assert length <= len(masks.weight_R) <= samples
            assert torch.allclose(weight_l[1:], expected_l, rtol=1e-12)
    # The number of masks of a size jumps twice, by one, as u goes from 0 to 1.
    error_l = (torch.stack(weights).mean(0) - expected_l).abs()
    assert float(error_l.max()) <= 2 / 100 * heaviest


def test_masks_of_few_samples_are_uniform_given_their_size():
    found = Counter()
    for masks in drawn(stratified, 4, 3, 3000):
        found.update(codes(masks.masked_RL).tolist())
    for size in (1, 2, 3):
        counts = [found[code] for code in range(16) if code.bit_count() == size]
        expected = sum(counts) / len(counts)
        chi_square = sum((count - expected) ** 2 / expected for count in counts)
        assert chi_square < 25, (size, counts)  # at most 5 degrees of freedom: 25 is 1 in 7,000


# --- what stratified promises ------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [*SAMPLES, 40, 127, 255, 1000])
@pytest.mark.parametrize("length", [*range(1, 13), 20, 33])
def test_allocation(length, samples):
    if samples < length:
        with pytest.raises(AssertionError):
            allocate(length, samples)
        return
    counts = allocate(length, samples)
    most = [math.comb(length, l) for l in range(1, length + 1)]
    assert len(counts) == length
    assert all(1 <= count <= limit for count, limit in zip(counts, most, strict=True))
    # What rounding leaves over: less than one mask, unless all masks are taken.
    assert min(samples, 2**length - 1) - 1 <= sum(counts) <= samples
    # In proportion to l^-1/2 between the limits, rounding apart: one factor explains all counts.
    sizes = list(enumerate(counts, start=1))
    at_most = [(count + 1) * l**0.5 for l, count in sizes if count < most[l - 1]]
    at_least = [(count - 1) * l**0.5 for l, count in sizes if count > 1]
    assert not at_most or not at_least or max(at_least) < min(at_most)


@pytest.mark.parametrize("length", range(1, 9))
def test_enough_samples_take_every_mask_once(length):
    masks = stratified(length, 2**length - 1, generator(0))
    assert sorted(codes(masks.masked_RL).tolist()) == list(range(1, 2**length))
    table_CL = random_table(length)
    assert estimate(masks, table_CL) == pytest.approx(bound_of(table_CL), rel=1e-12)
    log_probs_RL = table_CL[codes(masks.masked_RL)]
    assert ESTIMATORS["stratified"].std_err(masks, log_probs_RL) == 0


@pytest.mark.parametrize(("length", "samples"), [(4, 8), (6, 32), (8, 64), (10, 128), (16, 100)])
def test_a_size_with_few_subsets_has_each_once(length, samples):
    masks = stratified(length, samples, generator(3))
    counts = allocate(length, samples)
    size_R = masks.masked_RL.sum(1)
    whole = [l for l in range(1, length + 1) if counts[l - 1] == math.comb(length, l)]
    assert length in whole
    for l in range(1, length + 1):
        found = codes(masks.masked_RL[size_R == l]).tolist()
        assert len(found) == counts[l - 1]
        assert masks.sampled_R[size_R == l].tolist() == [l not in whole] * len(found)
        if l in whole:
            assert len(set(found)) == math.comb(length, l)
    # So a table that differs within other sizes only is summed without an error.
    table_CL = random_table(length)
    every_C = torch.arange(2**length)
    bits_C = sum((every_C >> i) & 1 for i in range(length))
    for l in range(1, length + 1):
        if l not in whole:
            table_CL[bits_C == l] = -1.0
    expected = bound_of(table_CL) if length <= 10 else None
    first, second = (estimate(m, table_CL) for m in drawn(stratified, length, samples, 2))
    assert first == pytest.approx(second, rel=1e-12)
    assert expected is None or first == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("length", "sizes"), [(5, [2] * 20), (7, [1, 5, 3, 7, 2, 2]), (4, [3, 3])])
def test_positions_are_dealt_equally_often(length, sizes):
    for seed in range(20):
        masked_RL = balanced_masks(length, sizes, generator(seed))
        assert masked_RL.sum(1).tolist() == sizes
        times_L = masked_RL.sum(0)
        assert int(times_L.max() - times_L.min()) <= 1


@pytest.mark.parametrize(("length", "samples"), [(9, 32), (16, 64), (20, 128), (33, 16)])
def test_positions_of_stratified_masks_are_balanced(length, samples):
    for masks in drawn(stratified, length, samples, 10):
        times_L = masks.masked_RL.sum(0)
        # Whole sizes are balanced by themselves.
        assert int(times_L.max() - times_L.min()) <= 1


def test_a_long_answer_with_many_samples():
    # The number of subsets of 550 of 1100 is beyond a float.
    masks = stratified(1100, 1200, generator(0))
    assert 1100 <= len(masks.weight_R) <= 1200
    assert float((masks.weight_R * masks.masked_RL.sum(1)).sum()) == pytest.approx(1100)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_draws_depend_on_the_generator_alone(name):
    draw = ESTIMATORS[name].draw
    one = draw(6, 16, generator("a"))
    torch.manual_seed(5)
    same, other = draw(6, 16, generator("a")), draw(6, 16, generator("b"))
    assert one.masked_RL.equal(same.masked_RL)
    assert one.weight_R.equal(same.weight_R)
    assert (name == "exact") == one.masked_RL.equal(other.masked_RL)
    assert one.weight_R.dtype == torch.float64
    assert one.masked_RL.any(1).all()


# --- the published estimator -------------------------------------------------------------------------


def sizes_by_start(length, samples=8):
    """k -> sizes of the first round, for every k; k is the first number of the generator."""
    found = {}
    for seed in itertools.count():
        k = int(torch.randint(1, length + 1, (), generator=generator("k", seed)))
        if k not in found:
            masks = published(length, samples, generator("k", seed))
            found[k] = masks.masked_RL.sum(1).tolist()
        if len(found) == length:
            return found


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8, 10, 12, 20, 24])
def test_published_sizes_are_those_of_the_oracle(length):
    for k, sizes in sizes_by_start(length).items():
        assert sizes == oracles.llada_mask_sizes(k, length)


def test_published_sizes_are_biased():
    # Golden vector: of 4 tokens even sizes get 3 times the weight of odd ones.
    counts = Counter(size for sizes in sizes_by_start(4).values() for size in sizes)
    assert [Fraction(counts[l], 32) for l in (1, 2, 3, 4)] == oracles.llada_size_law(4)
    assert [counts[l] / 32 for l in (1, 2, 3, 4)] == [w / 4 for w in (0.5, 1.5, 0.5, 1.5)]
    assert oracles.llada_size_law(12)[:4] == [Fraction(w, 24) for w in (1, 3, 1, 3)]
    assert oracles.llada_size_law(8) == [Fraction(1, 8)] * 8
    assert oracles.llada_size_law(16) == [Fraction(1, 16)] * 16
    assert oracles.llada_size_law(4, 1) == [Fraction(1, 4)] * 4


@pytest.mark.parametrize("length", [4, 8])
def test_published_is_wrong_by_what_its_sizes_predict(length):
    table_CL = smooth_table(length, noise=0)
    law = oracles.llada_size_law(length)
    predicted = 0.0
    for size in range(1, length + 1):
        rows = [r for r in range(2**length) if r.bit_count() == size]
        mean = sum(float(table_CL[r][i]) for r in rows for i in range(length) if r >> i & 1)
        predicted += float(law[size - 1]) * length / size * mean / len(rows)
    values = [estimate(masks, table_CL) for masks in drawn(published, length, 16, 400)]
    check_mean(values, predicted)
    spread = float(torch.tensor(values).std()) / len(values) ** 0.5
    exact = bound_of(table_CL)
    assert (abs(predicted - exact) > 8 * spread) == (length == 4)
    if length == 8:
        assert predicted == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize(
    ("samples", "rows"), [(1, 1), (5, 5), (8, 8), (15, 8), (20, 16), (128, 128)]
)
def test_published_drops_what_fills_no_round(samples, rows):
    masks = published(6, samples, generator(0))
    assert len(masks.masked_RL) == rows
    size_R = masks.masked_RL.sum(1)
    assert torch.allclose(masks.weight_R, 6 / (size_R.double() * rows))
    # Masks of one size differ.
    assert rows < 16 or len(set(codes(masks.masked_RL).tolist())) > 6


# --- standard errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["independent", "llada"])
def test_standard_error_of_independent_parts(name):
    table_CL = smooth_table(8)
    values, squares = [], []
    for masks in drawn(ESTIMATORS[name].draw, 8, 64, 300):
        log_probs_RL = table_CL[codes(masks.masked_RL)]
        values.append(masks.value(log_probs_RL))
        squares.append(ESTIMATORS[name].std_err(masks, log_probs_RL) ** 2)
    spread = float(torch.tensor(values).var())
    assert sum(squares) / len(squares) == pytest.approx(spread, rel=0.25)


@pytest.mark.parametrize(
    ("name", "samples", "known"),
    [
        ("exact", 1, True),
        ("independent", 1, False),
        ("independent", 2, True),
        ("llada", 8, False),
        ("llada", 15, False),
        ("llada", 16, True),
        ("stratified", 1, False),
        ("stratified", 2, False),
        ("stratified", 24, True),
    ],
)
def test_an_error_that_cannot_be_told_is_nan(name, samples, known):
    masks = ESTIMATORS[name].draw(8, samples, generator(8))
    error = ESTIMATORS[name].std_err(masks, random_table(8)[codes(masks.masked_RL)])
    assert math.isnan(error) is not known
    assert not known or error >= 0


def exact_sum(table_CL):
    """`bound_of` for many tokens: the same sum over all masks at once."""
    length = table_CL.shape[1]
    mask_CL = ((torch.arange(2**length)[:, None] >> torch.arange(length)) & 1).bool()
    weight_C = [0.0] + [1 / (l * math.comb(length, l)) for l in mask_CL.sum(1).tolist()[1:]]
    sums_C = table_CL.masked_fill(~mask_CL, 0).sum(1)
    return float((sums_C * torch.tensor(weight_C, dtype=torch.float64)).sum())


def values_and_errors(table_CL, samples, seeds):
    values, errors = [], []
    for masks in drawn(stratified, table_CL.shape[1], samples, seeds):
        log_probs_RL = table_CL[codes(masks.masked_RL)]
        values.append(masks.value(log_probs_RL))
        errors.append(ESTIMATORS["stratified"].std_err(masks, log_probs_RL))
    return torch.tensor(values), torch.tensor(errors)


COVERED = [(8, 128, 0.3), (12, 36, 0.6), (12, 100, 1.0), (14, 64, 0.3), (14, 128, 0.3)]


@pytest.mark.parametrize(("length", "samples", "noise"), COVERED)
def test_stratified_interval_covers_and_is_narrow(length, samples, noise):
    table_CL = smooth_table(length, noise)
    exact = exact_sum(table_CL)
    values, errors = values_and_errors(table_CL, samples, 300)
    check_mean(values.tolist(), exact)
    covered = ((values - exact).abs() <= 1.96 * errors).double().mean()
    assert 0.88 <= covered <= 0.999
    assert float(errors.mean()) == pytest.approx(float(values.std()), rel=0.25)
    others = torch.tensor([estimate(m, table_CL) for m in drawn(published, length, samples, 100)])
    assert errors.mean() <= 0.6 * others.std()


def test_fitting_does_not_make_the_error_smaller():
    # Nothing to fit: residuals must be as large as what they are the residuals of.
    values, errors = values_and_errors(random_table(12), 36, 300)
    assert 0.95 < float(errors.square().mean().sqrt() / values.std()) < 1.2


def test_the_interval_is_rather_too_wide_where_the_trend_is_another():
    # Growing with l and nearly free of noise: the fitted l^-1/2 leaves some of the trend over.
    table_CL = smooth_table(12, 0.3, power=0.8)
    values, errors = values_and_errors(table_CL, 48, 150)
    assert ((values - exact_sum(table_CL)).abs() <= 1.96 * errors).double().mean() >= 0.97
    assert values.std() < errors.mean() < 4 * values.std()


def test_exact_sum_is_the_bound():
    assert exact_sum(random_table(6)) == pytest.approx(bound_of(random_table(6)), rel=1e-12)


def test_residual_error_ignores_what_cancels():
    # Token means and their trend in l^-1/2 alone: the spread that is left is none.
    length, samples = 10, 60
    masks = stratified(length, samples, generator(1))
    size_R = masks.masked_RL.sum(1).double()
    mean_L, slope_L = torch.rand(2, length, dtype=torch.float64).unbind()
    log_probs_RL = mean_L + slope_L * size_R[:, None] ** -0.5
    error = ESTIMATORS["stratified"].std_err
    assert error(masks, log_probs_RL) == pytest.approx(0, abs=1e-9)
    noisy_RL = log_probs_RL + torch.randn(log_probs_RL.shape, dtype=torch.float64)
    assert error(masks, noisy_RL) > 0.05
    # Twice the noise, twice the error; nothing missing, no error.
    wilder_RL = log_probs_RL + 2 * (noisy_RL - log_probs_RL)
    assert error(masks, wilder_RL) == pytest.approx(2 * error(masks, noisy_RL), rel=1e-9)
    complete = Masks(masks.masked_RL, masks.weight_R, torch.zeros_like(masks.sampled_R))
    assert error(complete, noisy_RL) == 0
