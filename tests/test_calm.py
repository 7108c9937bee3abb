"""CALM against exact arithmetic: values, gradients, what each loss is smallest at, and the ends.

The references are computed with 60 digits, derivatives too, so that 1 - p is right next to p = 1.
Shapes: C chunks, N tokens, V vocabulary.
"""

import itertools
import math
from decimal import Decimal, localcontext

import oracles
import pytest
import torch

from mdm.train.calm import (
    CHUNK_LOSSES,
    bernoulli_kl,
    chunk_log_likelihoods,
    forward_calm,
    mixed_likelihood,
    reverse_calm,
)

SLOW = {
    "forward_calm": oracles.forward_calm,
    "reverse_calm": oracles.reverse_calm,
    "bernoulli_kl": oracles.bernoulli_kl,
}
TEMPERATURES = (0.5, 1.0, 2.0, 5.0)
LOGS = (-40.0, -12.0, -3.0, -0.7, -0.1, -1e-3, -1e-5)
ENDS = (-1e4, -1e3, -100.0, -20.0, -1.0, -1e-3, -1e-6, -1e-7, -1e-20, 0.0)
EPS = torch.finfo(torch.float32).eps
STEP = Decimal("1e-20")


@pytest.fixture(autouse=True)
def digits():
    with localcontext() as context:
        context.prec = 60
        yield


def pairs(values, dtype=torch.float64):
    """All pairs (student, teacher) of the values; the students' take gradients."""
    both = torch.tensor(list(itertools.product(values, repeat=2)), dtype=dtype).unbind(1)
    return both[0].clone().requires_grad_(), both[1].clone()


def derivative(loss, log_s, *arguments):
    (result,) = torch.autograd.grad(loss(log_s, *arguments).sum(), log_s)
    return result


def slow_derivative(loss, log_s, log_t, temperature):
    """Central difference with respect to the student's log-likelihood."""
    p_t = oracles.coin(log_t, temperature)
    above, below = (
        loss(oracles.coin(Decimal(log_s) + step, temperature), p_t) for step in (STEP, -STEP)
    )
    return float((above - below) / (2 * STEP))


def slowly(function, log_s_C, log_t_C, dtype=torch.float64):
    """(C,) a scalar function of each pair, at the very numbers that the tensors hold."""
    both = zip(log_s_C.tolist(), log_t_C.tolist(), strict=True)
    return torch.tensor([float(function(s, t)) for s, t in both], dtype=dtype)


def logit(p):
    return p.ln() - (1 - p).ln()


# --- definitions ---------------------------------------------------------------------------------


def test_every_loss_has_a_definition():
    assert set(SLOW) == set(CHUNK_LOSSES)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_values_and_gradients_are_those_of_the_definition(name, temperature, dtype, rtol):
    fast, slow = CHUNK_LOSSES[name], SLOW[name]
    log_s, log_t = pairs(LOGS, dtype)
    found = fast(log_s, log_t, temperature)

    def value(s, t):
        return slow(oracles.coin(s, temperature), oracles.coin(t, temperature))

    # What cancels is as large as the entropies: an absolute error of a few roundings is left.
    close = {"rtol": rtol, "atol": 16 * torch.finfo(dtype).eps}
    torch.testing.assert_close(found, slowly(value, log_s, log_t, dtype), **close)
    expected = slowly(lambda s, t: slow_derivative(slow, s, t, temperature), log_s, log_t, dtype)
    torch.testing.assert_close(derivative(fast, log_s, log_t, temperature), expected, **close)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gradients_have_the_closed_forms_of_the_table(temperature):
    """The table of calm.py; T² is not in it."""
    table = {
        "forward_calm": lambda s, t: (s - t) / (1 - s),
        "reverse_calm": lambda s, t: -s * logit(t),
        "bernoulli_kl": lambda s, t: -s * (logit(t) - logit(s)),
    }
    log_s, log_t = pairs(LOGS)
    for name, closed in table.items():

        def expected(s, t, closed=closed):
            coins = oracles.coin(s, temperature), oracles.coin(t, temperature)
            return closed(*coins) / Decimal(temperature)

        found = derivative(CHUNK_LOSSES[name], log_s, log_t, temperature)
        torch.testing.assert_close(
            found, slowly(expected, log_s, log_t), rtol=1e-9, atol=1e-13, msg=name
        )


# --- where they are smallest ---------------------------------------------------------------------


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_equal_coins_have_no_gradient_except_in_the_published_reverse(temperature):
    log_s = torch.tensor([*LOGS, -1e-7, 0.0], requires_grad=True)
    log_t = log_s.detach().clone()
    none = torch.zeros_like(log_t)
    for loss in (forward_calm, bernoulli_kl):
        found = derivative(loss, log_s, log_t, temperature)
        torch.testing.assert_close(found, none, atol=1e-6, rtol=0)
    torch.testing.assert_close(bernoulli_kl(log_s, log_t, temperature), none, atol=1e-9, rtol=0)
    found = derivative(reverse_calm, log_s, log_t, temperature)
    assert (found[1:].abs() > 1e-9).all()  # the first one has p_s = 0, or nearly


def test_the_numbers_of_the_notes():
    """p_s = p_t = .0025 at T = 2: forward 0, reverse +.0075, so a step makes p_s smaller still."""
    log_s = torch.tensor([2 * math.log(0.0025)], dtype=torch.float64, requires_grad=True)
    log_t = log_s.detach().clone()
    assert derivative(forward_calm, log_s, log_t, 2.0).item() == pytest.approx(0, abs=1e-15)
    assert derivative(bernoulli_kl, log_s, log_t, 2.0).item() == pytest.approx(0, abs=1e-15)
    found = derivative(reverse_calm, log_s, log_t, 2.0).item()
    assert found == pytest.approx(-0.0025 / 2 * math.log(0.0025 / 0.9975))
    assert found == pytest.approx(0.0075, abs=5e-5)


@pytest.mark.parametrize("p_t", [0.01, 0.3, 0.49, 0.51, 0.9])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_published_reverse_is_linear_in_the_students_probability(p_t, temperature):
    p_s = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    log_s, log_t = temperature * p_s.log(), torch.full_like(p_s, temperature * math.log(p_t))
    values = {name: loss(log_s, log_t, temperature) for name, loss in CHUNK_LOSSES.items()}
    slope = values["reverse_calm"].diff() / p_s.diff()
    expected = torch.full_like(slope, math.log(1 - p_t) - math.log(p_t))
    torch.testing.assert_close(slope, expected)
    assert p_s[values["reverse_calm"].argmin()] == (0.99 if p_t > 0.5 else 0.01)
    for name in ("forward_calm", "bernoulli_kl"):
        assert p_s[values[name].argmin()].item() == pytest.approx(p_t), name


def test_the_published_reverse_is_not_the_bernoulli_kl():
    """What is missing is exactly the entropy of the student's coin; forward CALM lacks a constant only."""
    for temperature in TEMPERATURES:
        log_s, log_t = pairs(LOGS)
        gap = reverse_calm(log_s, log_t, temperature) - bernoulli_kl(log_s, log_t, temperature)
        of_student = slowly(
            lambda s, t, at=temperature: oracles.coin_entropy(oracles.coin(s, at)), log_s, log_t
        )
        torch.testing.assert_close(gap, of_student, rtol=1e-9, atol=1e-12)
        assert gap.max() > 0.5
        gap = forward_calm(log_s, log_t, temperature) - bernoulli_kl(log_t, log_s, temperature)
        of_teacher = slowly(
            lambda s, t, at=temperature: oracles.coin_entropy(oracles.coin(t, at)), log_s, log_t
        )
        torch.testing.assert_close(gap, of_teacher, rtol=1e-9, atol=1e-12)


# --- CALM-TIDAL ----------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_calm_tidal_is_forward_calm_times_the_share(share, temperature, dtype, rtol):
    log_s, log_t = pairs((*LOGS, 0.0), dtype)
    mixed = mixed_likelihood(log_s, log_t, torch.full_like(log_t, share), temperature)
    assert not mixed.requires_grad
    assert mixed.dtype == dtype
    found = derivative(forward_calm, log_s, mixed, temperature)
    expected = share * derivative(forward_calm, log_s, log_t, temperature)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=20 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_mixed_likelihood_is_a_mixture_of_coins(temperature):
    log_s, log_t = pairs(LOGS)
    share = torch.linspace(0, 1, len(log_t), dtype=torch.float64)
    found = mixed_likelihood(log_s, log_t, share, temperature)
    for s, t, part, got in zip(*(x.tolist() for x in (log_s, log_t, share, found)), strict=True):
        part = Decimal(part)
        p_s, p_t = oracles.coin(s, temperature), oracles.coin(t, temperature)
        m = (1 - part) * p_s + part * p_t
        assert got == pytest.approx(float(Decimal(temperature) * m.ln()), rel=1e-12, abs=0)


def test_a_mixed_likelihood_at_the_ends():
    log_s, log_t = pairs(ENDS, torch.float32)
    one, none = torch.ones_like(log_t), torch.zeros_like(log_t)
    lowest = torch.full_like(log_t, -2 * EPS)  # nothing counts as nearer to certain
    torch.testing.assert_close(
        mixed_likelihood(log_s, log_t, none, 2.0), torch.minimum(log_s.detach(), lowest)
    )
    torch.testing.assert_close(
        mixed_likelihood(log_s, log_t, one, 2.0), torch.minimum(log_t, lowest)
    )
    assert mixed_likelihood(log_s, log_t, one / 3, 2.0).isfinite().all()


# --- the ends ------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", CHUNK_LOSSES)
def test_everything_is_finite(name, temperature):
    log_s, log_t = pairs(ENDS, torch.float32)
    log_t.requires_grad_()
    value = CHUNK_LOSSES[name](log_s, log_t, temperature)
    assert value.isfinite().all()
    assert (value >= -1e-6).all()
    for gradient in torch.autograd.grad(value.sum(), (log_s, log_t)):
        assert gradient.isfinite().all()


def published(log_s, log_t, temperature):
    """Forward CALM with the clamp of TIDE's code."""
    p_s, p_t = ((x / temperature).exp().clamp(1e-7, 1 - 1e-7) for x in (log_s, log_t))
    return -(p_t * p_s.log() + (1 - p_t) * (1 - p_s).log())


@pytest.mark.parametrize(("log_s", "log_t"), [(-1e4, -1.0), (-60.0, -1e-3), (0.0, -1.0)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_clamp_has_no_gradient_outside_and_ours_has(log_s, log_t, temperature):
    log_s, log_t = torch.tensor([log_s], requires_grad=True), torch.tensor([log_t])
    assert derivative(published, log_s, log_t, temperature) == 0
    found = derivative(forward_calm, log_s, log_t, temperature)
    p_s, p_t = ((x.detach().double() / temperature).exp() for x in (log_s, log_t))
    expected = (p_s.clamp(max=1 - EPS) - p_t) / (temperature * (1 - p_s).clamp(min=EPS))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", CHUNK_LOSSES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_certain_is_as_likely_as_float_can_tell_from_certain(name, temperature):
    """A log-likelihood of exactly 0 counts as -eps·T: value and gradient of that place."""
    loss, others = CHUNK_LOSSES[name], torch.tensor([*ENDS])
    certain = torch.zeros_like(others)
    for fixed in (certain, torch.full_like(certain, -1e-12)):
        nearly = torch.full_like(certain, -EPS * temperature)
        for as_student in (True, False):
            found, expected = [], []
            for result, end in ((found, fixed), (expected, nearly)):
                both = (end, others) if as_student else (others, end)
                log_s, log_t = (x.clone().requires_grad_() for x in both)
                value = loss(log_s, log_t, temperature)
                result += [value, *torch.autograd.grad(value.sum(), (log_s, log_t))]
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("spread", [1.0, 10.0, 100.0])
def test_gradients_of_logits_stay_small_though_those_of_likelihoods_do_not(temperature, spread):
    """Forward CALM: at most |p_s - p_t| times 2, the L1 norm of onehot - softmax being 2 (1 - p)."""
    logits_NV = (spread * torch.randn(300, 7)).requires_grad_()
    token_N = logits_NV.argmax(-1)  # mostly certain
    log_prob_N = logits_NV.log_softmax(-1).gather(1, token_N[:, None])[:, 0]
    log_s = chunk_log_likelihoods(log_prob_N, torch.arange(300) // 3, 100)
    log_t = -torch.rand(100) * 5
    (found,) = torch.autograd.grad(forward_calm(log_s, log_t, temperature).sum(), logits_NV)
    assert found.isfinite().all()
    assert found.abs().sum(-1).max() <= 2.1
    if spread == 100:
        assert derivative(forward_calm, log_s, log_t, temperature).max() > 1e5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_taken_to_float32(dtype):
    log_s, log_t = pairs((-9.0, -0.5, -0.25), dtype)
    for loss in CHUNK_LOSSES.values():
        value = loss(log_s, log_t, 2.0)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, loss(log_s.float(), log_t.float(), 2.0))
    mixed = mixed_likelihood(log_s, log_t, torch.full_like(log_t, 0.5), 2.0)
    assert mixed.dtype == torch.float32
    assert chunk_log_likelihoods(log_t, torch.zeros(9).long(), 1).dtype == torch.float32


def test_no_chunks():
    none = torch.empty(0, requires_grad=True)
    for loss in CHUNK_LOSSES.values():
        assert loss(none, none, 2.0).shape == (0,)
    assert mixed_likelihood(none, none, none, 2.0).shape == (0,)


# --- likelihoods of chunks -----------------------------------------------------------------------


def test_likelihoods_are_sums_by_chunk():
    log_prob_N = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0, -torch.inf], requires_grad=True)
    chunk_N = torch.tensor([2, 0, 2, -1, 0, -1])  # in any order; chunk 1 and 3 have no tokens
    found = chunk_log_likelihoods(log_prob_N, chunk_N, 4)
    assert found.tolist() == [-18.0, 0.0, -5.0, 0.0]
    (gradient,) = torch.autograd.grad(found @ torch.tensor([1.0, 10.0, 100.0, 1e3]), log_prob_N)
    assert gradient.tolist() == [100.0, 1.0, 100.0, 0.0, 1.0, 0.0]


def test_likelihoods_of_nothing():
    none, no_ids = torch.empty(0), torch.empty(0).long()
    assert chunk_log_likelihoods(none, no_ids, 2).tolist() == [0.0, 0.0]
    assert chunk_log_likelihoods(none, no_ids, 0).shape == (0,)
    assert chunk_log_likelihoods(torch.ones(3), torch.full((3,), -1), 0).shape == (0,)


@pytest.mark.parametrize("chunk", [2, 3, -2])
def test_a_chunk_that_is_not_there_is_an_error(chunk):
    with pytest.raises(IndexError):
        chunk_log_likelihoods(torch.ones(2), torch.tensor([0, chunk]), 2)
