"""Chunk masks: whole chunks, and what each way of drawing and weighing makes of the bound.

Expectations over t are Gauss-Legendre sums of polynomials in t, so exact; those over masks are enumerated.
The "denoisers" are made-up tables of the cross-entropy of a chunk given which chunks are hidden.
Shapes: B batch, L length.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from mdm.diffusion import mask_by_rate
from mdm.schedule import SCHEDULES
from mdm.train.chunk_masks import (
    any_of_chunk,
    chunk_sizes,
    corrected_weight,
    first_of_chunk,
    published_bias,
    shared_uniforms,
)

# Chunks of 1 to 4 tokens, one that is not in one piece, tokens on their own, numbers in no order.
CHUNKS = torch.tensor([[7, 7, -1, 7, 2, 2], [5, 5, 5, 5, -1, -1], [900, -1, 4, -1, 4, 4]])


def as_groups(chunk_BL):
    """Lists of (row, position), one list for each chunk and each token on its own."""
    groups = {}
    for b, row in enumerate(chunk_BL.tolist()):
        for i, chunk in enumerate(row):
            groups.setdefault(("alone", b, i) if chunk < 0 else chunk, []).append((b, i))
    return list(groups.values())


# --- whole chunks --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_by_definition(dtype):
    chunk_BL = CHUNKS.to(dtype)
    uniforms_BL, masked_BL = torch.rand(3, 6), torch.rand(3, 6) < 0.3
    shared_BL = shared_uniforms(uniforms_BL, chunk_BL)
    spread_BL, sizes_BL = any_of_chunk(masked_BL, chunk_BL), chunk_sizes(chunk_BL)
    first_BL = first_of_chunk(chunk_BL)
    assert spread_BL.dtype == torch.bool
    for group in as_groups(chunk_BL):
        for at in group:
            assert shared_BL[at] == uniforms_BL[group[0]]
            assert spread_BL[at] == any(masked_BL[other] for other in group)
            assert sizes_BL[at] == len(group)
            assert divmod(int(first_BL[at]), 6) == group[0]


def test_any_of_chunk_of_all_masks():
    chunk_BL = torch.tensor([[0, 0, -1, 1, 1, 1]])
    for flags in itertools.product([False, True], repeat=6):
        found = any_of_chunk(torch.tensor([flags]), chunk_BL)[0].tolist()
        assert found == [any(flags[:2])] * 2 + [flags[2]] + [any(flags[3:])] * 3


def test_without_chunks_nothing_changes():
    alone_BL = torch.full((3, 6), -1)
    uniforms_BL, masked_BL = torch.rand(3, 6), torch.rand(3, 6) < 0.5
    assert torch.equal(shared_uniforms(uniforms_BL, alone_BL), uniforms_BL)
    assert torch.equal(any_of_chunk(masked_BL, alone_BL), masked_BL)
    assert (chunk_sizes(alone_BL) == 1).all()


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_no_tokens(shape):
    chunk_BL, uniforms_BL = torch.empty(shape).long(), torch.empty(shape)
    assert shared_uniforms(uniforms_BL, chunk_BL).shape == shape
    assert any_of_chunk(uniforms_BL < 0, chunk_BL).shape == shape
    assert chunk_sizes(chunk_BL).shape == shape


def test_chunks_are_masked_independently_at_the_rate():
    """All combinations of 4 uniforms a token, at rates where each set has an exact share of them."""
    chunk_L = torch.tensor([3, 3, -1, 8, 8])
    u_BL = torch.tensor(list(itertools.product([0.125, 0.375, 0.625, 0.875], repeat=5)))
    chunk_BL = torch.where(chunk_L < 0, -1, chunk_L + 10 * torch.arange(len(u_BL))[:, None])
    shared_BL = shared_uniforms(u_BL, chunk_BL)
    for rate in (0.25, 0.5, 0.75):
        masked_BL = mask_by_rate(
            torch.full((len(u_BL),), rate), torch.ones_like(chunk_BL).bool(), shared_BL
        )
        rows = [tuple(row) for row in masked_BL.tolist()]
        for a, b, c in itertools.product([False, True], repeat=3):
            share = rows.count((a, a, b, c, c)) / len(rows)
            assert share == math.prod(rate if hit else 1 - rate for hit in (a, b, c))


# --- expected weights ----------------------------------------------------------------------------


def points(count=40):
    """Gauss-Legendre points and weights on (0, 1): exact for polynomials of degree below 80."""
    at, weight = np.polynomial.legendre.leggauss(count)
    return torch.tensor((at + 1) / 2), torch.tensor(weight / 2)


def sized(t_B, n):
    """Sizes of a row of one chunk of n tokens, for each t."""
    return torch.full((len(t_B), n), n)


def weight_1_over_t(t_B, sizes_BL):
    return (1 / t_B)[:, None].expand(sizes_BL.shape)


def weight_1_over_rate(t_B, sizes_BL):
    return 1 / (1 - (1 - t_B[:, None]) ** sizes_BL)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 20])
def test_expected_weight_of_a_token(n):
    t_B, dt_B = points()
    hit_B = 1 - (1 - t_B) ** n  # any of n tokens

    def expected(weight, chance_B):
        return float((weight(t_B, sized(t_B, n))[:, 0] * chance_B * dt_B).sum())

    assert expected(weight_1_over_t, t_B) == pytest.approx(1)  # shared uniforms
    assert expected(weight_1_over_t, hit_B) == pytest.approx(published_bias(n))
    assert expected(corrected_weight, hit_B) == pytest.approx(1)
    assert expected(weight_1_over_rate, hit_B) == pytest.approx(1)  # but see the bound below


def test_published_bias_by_hand():
    assert [published_bias(n) for n in (1, 2, 3, 4)] == pytest.approx([1, 3 / 2, 11 / 6, 25 / 12])


def test_corrected_weight_is_the_log_derivative_of_the_rate():
    """m'(t) / m(t) of m = 1 - (1-t)^n; 1/t for tokens on their own; sizes mixed in a row."""
    t_B = torch.tensor([1e-6, 0.01, 0.3, 0.9, 0.999], dtype=torch.float64)
    sizes_BL = torch.tensor([[1, 2, 2, 5]]).expand(5, -1)
    t_BL = t_B[:, None].expand(sizes_BL.shape).clone().requires_grad_()
    rate_BL = -torch.expm1(sizes_BL * torch.log1p(-t_BL))
    (slope_BL,) = torch.autograd.grad(rate_BL.log().sum(), t_BL)
    found_BL = corrected_weight(t_B, sizes_BL)
    torch.testing.assert_close(found_BL, slope_BL)
    torch.testing.assert_close(found_BL[:, 0], 1 / t_B)


def test_corrected_weight_of_another_schedule_takes_its_derivative():
    """The derivative of the rate is rate · loss_weight; the expected weight is 1 again."""
    level_B, dt_B = points()
    cosine = SCHEDULES["cosine"]
    rate_B = 1 - cosine.alpha(level_B)
    weight_B = corrected_weight(rate_B, sized(rate_B, 3))[:, 0]
    expected = weight_B * rate_B * cosine.loss_weight(level_B) * (1 - (1 - rate_B) ** 3) * dt_B
    assert float(expected.sum()) == pytest.approx(1)


def test_corrected_weight_at_the_ends():
    sizes_BL = torch.tensor([[1, 2, 30]])
    assert corrected_weight(torch.tensor([1.0]), sizes_BL).tolist() == [[1.0, 0.0, 0.0]]
    # 1 - (1-t)^n in float32, where t is tiny, would be all rounding.
    found = corrected_weight(torch.tensor([1e-6]), sizes_BL)
    torch.testing.assert_close(found, torch.tensor([[1e6, 1e6, 1e6]]), rtol=1e-4, atol=0)


# --- the bound -----------------------------------------------------------------------------------


def expected_loss(sizes, weight, ce, *, shared):
    """∫ Σ_masks P(mask | t) Σ_masked tokens w · CE dt, of one row with two chunks, through the functions.

    `ce(chunk, hidden chunks)` is the sum over the tokens of a chunk; each token gets an equal part.
    """
    chunk_L = [0] * sizes[0] + [1] * sizes[1]
    length = len(chunk_L)
    chunk_BL = torch.tensor([chunk_L])
    sizes_BL = chunk_sizes(chunk_BL)
    t_B, dt_B = points(20)
    total = 0.0
    for flags in itertools.product([False, True], repeat=2 if shared else length):
        # shared: one coin for a chunk, which is that of its first token
        tokens = [flags[chunk] for chunk in chunk_L] if shared else flags
        masked_L = any_of_chunk(torch.tensor([tokens]), chunk_BL)[0]
        assert not shared or masked_L.tolist() == tokens
        hits = sum(flags)
        chance_B = t_B**hits * (1 - t_B) ** (len(flags) - hits)
        hidden = {chunk for chunk, hit in zip(chunk_L, masked_L.tolist(), strict=True) if hit}
        weight_BL = weight(t_B, sizes_BL.expand(len(t_B), -1))
        for i in masked_L.nonzero()[:, 0].tolist():
            part = ce(chunk_L[i], hidden) / sizes[chunk_L[i]]
            total += part * float((chance_B * weight_BL[:, i] * dt_B).sum())
    return total


def order_bound(sizes, ce, first):
    """Chain rule over the two orders; `first` is the probability that chunk 0 is decoded first."""
    return first * (ce(0, {0, 1}) + ce(1, {1})) + (1 - first) * (ce(1, {0, 1}) + ce(0, {0}))


def made_up(chunk, hidden):
    return {0: {1: 0.7, 2: 2.9}, 1: {1: 0.2, 2: 1.3}}[chunk][len(hidden)]


@pytest.mark.parametrize("sizes", [(1, 1), (1, 2), (3, 1), (2, 3)])
def test_shared_uniforms_and_corrected_weights_are_bounds_over_orders_of_chunks(sizes):
    """With a coin per chunk both orders are equally likely; else longer chunks are decoded later."""
    found = expected_loss(sizes, weight_1_over_t, made_up, shared=True)
    assert found == pytest.approx(order_bound(sizes, made_up, 1 / 2))
    found = expected_loss(sizes, corrected_weight, made_up, shared=False)
    # Chunk 0 is masked before t with probability 1 - (1-t)^n: the smallest of n uniforms.
    assert found == pytest.approx(order_bound(sizes, made_up, sizes[1] / sum(sizes)))


@pytest.mark.parametrize("sizes", [(1, 2), (3, 1), (2, 3)])
def test_the_other_weights_are_no_bound(sizes):
    """Neither lies between the two orders' losses of an exact model, which are both -log p(text)."""
    p_0, p_1, p_both = 0.8, 0.8, 0.05  # the two texts are likely, but hardly ever together

    def exact(chunk, hidden):
        alone = (p_0, p_1)[chunk]
        return -math.log(alone if len(hidden) == 2 else p_both / (p_0, p_1)[1 - chunk])

    def loss(weight, shared=False):
        return expected_loss(sizes, weight, exact, shared=shared)

    truth = -math.log(p_both)
    assert loss(weight_1_over_t, shared=True) == pytest.approx(truth)
    assert loss(corrected_weight) == pytest.approx(truth)
    # E[weight] = 1, and yet below -log p: by the pointwise mutual information times a number above 0.
    n, m = sizes
    pointwise = math.log(p_both / (p_0 * p_1))
    expected = truth + (n / (n + 1) + m / (m + 1) - 1) * pointwise
    assert loss(weight_1_over_rate) == pytest.approx(expected)
    assert expected < truth - 0.1
    assert loss(weight_1_over_t) > truth * 1.1  # H_n times too much


def test_two_tokens_on_their_own_have_one_bound_whatever_the_weight():
    for weight in (weight_1_over_t, weight_1_over_rate, corrected_weight):
        found = expected_loss((1, 1), weight, made_up, shared=False)
        assert found == pytest.approx(order_bound((1, 1), made_up, 1 / 2))
