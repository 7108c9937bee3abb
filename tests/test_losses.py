"""Losses against their definitions, in values and gradients."""

import math
from functools import partial

import oracles
import pytest
import torch
import torch.nn.functional as F

from mdm.errors import ConfigError
from mdm.train.losses import (
    DIVERGENCES,
    TAILS,
    check_tail,
    cross_entropy,
    distillation,
    forward_kl,
    jsd,
    linear_ramp,
    log1mexp,
    reverse_kl,
)

N, V = 6, 9
NEVER = 7  # a column of -inf in the student, as the mask token has
BETAS = (0.0, 0.1, 0.3, 0.9, 1.0)
DIVERGENCE = {
    "forward_kl": (forward_kl, oracles.forward_kl),
    "reverse_kl": (reverse_kl, oracles.reverse_kl),
    **{
        f"jsd-{beta}": (
            partial(jsd, beta=beta),
            partial(oracles.generalized_jsd, beta=beta),
        )
        for beta in BETAS
    },
}


def student(dtype=torch.float64, spread=2.0):
    logits_NV = spread * torch.randn(N, V, dtype=torch.float64)
    logits_NV[:, NEVER] = -torch.inf
    return logits_NV.to(dtype).requires_grad_()


def teacher(temperature=1.0, spread=2.0):
    """(N, V) probabilities at the temperature; none on the token that never occurs."""
    scores_NV = spread * torch.randn(N, V, dtype=torch.float64)
    scores_NV[:, NEVER] = -torch.inf
    return (scores_NV / temperature).softmax(-1)


def sparse(p_NV, kept):
    """The teacher's `kept` likeliest tokens and the rest, in the order of SoftTargets."""
    p_NK, ids_NK = p_NV.topk(kept)
    tail_N = p_NV.scatter(1, ids_NK, 0.0).sum(-1)
    return ids_NK, p_NK.log(), tail_N


def loss(logits_NV, p_NV, kept, *, divergence=forward_kl, temperature=1.0, tail="bucket"):
    return distillation(
        logits_NV, *sparse(p_NV, kept), divergence=divergence, temperature=temperature, tail=tail
    )


def gradient(value_N, logits_NV):
    (result,) = torch.autograd.grad(value_N.sum(), logits_NV)
    return result


# --- divergences over everything -----------------------------------------------------------------


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("name", DIVERGENCE)
def test_with_every_token_kept_it_is_the_dense_divergence(name, temperature, tail):
    fast, slow = DIVERGENCE[name]
    logits_NV, p_NV = student(), teacher(temperature)
    found = loss(logits_NV, p_NV, V, divergence=fast, temperature=temperature, tail=tail)
    q_NV = (logits_NV / temperature).softmax(-1)
    expected = temperature**2 * slow(p_NV, q_NV)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    # The same without the column that never occurs, where a naive gradient would be NaN.
    live = [v for v in range(V) if v != NEVER]
    free_NV = logits_NV.detach()[:, live].requires_grad_()
    expected = temperature**2 * slow(p_NV[:, live], (free_NV / temperature).softmax(-1))
    got = gradient(found, logits_NV)
    torch.testing.assert_close(got[:, live], gradient(expected, free_NV), atol=1e-8, rtol=1e-8)
    assert (got[:, NEVER] == 0).all()


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", DIVERGENCE)
@pytest.mark.parametrize("kept", [3, V])
def test_equal_distributions_have_no_divergence(name, kept, tail):
    logits_NV = student(torch.float32)
    p_NV = logits_NV.detach().double().softmax(-1)
    value_N = loss(logits_NV, p_NV.float(), kept, divergence=DIVERGENCE[name][0], tail=tail)
    torch.testing.assert_close(value_N, torch.zeros(N), atol=1e-6, rtol=0)
    got = gradient(value_N, logits_NV)
    if tail != "partial":  # its minimum lies elsewhere
        torch.testing.assert_close(got, torch.zeros(N, V), atol=1e-6, rtol=0)


def test_jsd_has_the_limits_of_the_paper():
    p_NV, q_NV = teacher(), teacher()
    p_NV, q_NV = (x[:, :NEVER] / x[:, :NEVER].sum(-1, keepdim=True) for x in (p_NV, q_NV))
    small = 1e-5
    ratio_0 = jsd(p_NV.log(), q_NV.log(), beta=small) / small
    ratio_1 = jsd(p_NV.log(), q_NV.log(), beta=1 - small) / small
    torch.testing.assert_close(ratio_0, oracles.forward_kl(p_NV, q_NV), rtol=0.01, atol=0)
    torch.testing.assert_close(ratio_1, oracles.reverse_kl(p_NV, q_NV), rtol=0.01, atol=0)


def test_the_gradient_keeps_its_size_at_high_temperature():
    """T² (Hinton et al.): the gradient tends to (logits difference) / V instead of 0."""
    logits_NV = torch.randn(N, V, dtype=torch.float64).requires_grad_()
    scores_NV = torch.randn(N, V, dtype=torch.float64)
    value_N = loss(logits_NV, (scores_NV / 1e4).softmax(-1), V, temperature=1e4)
    gap_NV = logits_NV - scores_NV
    expected = (gap_NV - gap_NV.mean(-1, keepdim=True)) / V
    torch.testing.assert_close(gradient(value_N, logits_NV), expected, atol=1e-4, rtol=0)


# --- what is not kept ----------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [1, 3, 6])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_tails_of_the_forward_kl(kept, temperature):
    logits_NV, p_NV = student(), teacher(temperature)
    q_NV = (logits_NV / temperature).softmax(-1)
    ids_NK = sparse(p_NV, kept)[0]
    by_definition = {
        "bucket": oracles.bucketed_kl,
        "partial": oracles.partial_kl,
        "renormalise": oracles.renormalised_kl,
    }
    assert set(by_definition) == set(TAILS)
    for tail, slow in by_definition.items():
        found = loss(logits_NV, p_NV, kept, temperature=temperature, tail=tail)
        rows = [slow(p_NV[n], q_NV[n], ids_NK[n]) for n in range(N)]
        expected = temperature**2 * torch.stack(rows)
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9, msg=tail)


@pytest.mark.parametrize("name", DIVERGENCE)
@pytest.mark.parametrize("kept", [1, 4])
def test_a_bucket_is_one_more_outcome(name, kept):
    """Any divergence, values and gradients: merge by hand and compare."""
    fast, slow = DIVERGENCE[name]
    logits_NV, p_NV = student(), teacher()
    ids_NK, log_p_NK, tail_N = sparse(p_NV, kept)
    live = [v for v in range(V) if v != NEVER]
    free_NV = logits_NV.detach()[:, live].requires_grad_()
    padded_NV = F.pad(free_NV.softmax(-1), (1, 1))[:, [1, 2, 3, 4, 5, 6, 7, 0, 8]]
    q_NK = padded_NV.gather(1, ids_NK)
    merged_p = torch.cat([log_p_NK.exp(), tail_N[:, None]], 1)
    merged_q = torch.cat([q_NK, 1 - q_NK.sum(1, keepdim=True)], 1)
    expected = slow(merged_p, merged_q)
    found = loss(logits_NV, p_NV, kept, divergence=fast)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    got = gradient(found, logits_NV)
    torch.testing.assert_close(got[:, live], gradient(expected, free_NV), atol=1e-8, rtol=1e-8)
    assert (found <= slow(p_NV, logits_NV.softmax(-1)) + 1e-9).all()  # data-processing inequality


def test_the_bucket_never_exceeds_the_full_kl_but_the_partial_sum_can():
    p_V = torch.tensor([[0.5, 0.1, 0.4]]).double()
    q_V = torch.tensor([[0.1, 0.5, 0.4]]).double()
    full = oracles.forward_kl(p_V, q_V)
    ids = torch.tensor([[0]])  # the dropped term .1 log(.1 / .5) is negative
    one = (ids, p_V[:, :1].log(), 1 - p_V[:, 0])
    values = {
        tail: distillation(q_V.log(), *one, divergence=forward_kl, temperature=1.0, tail=tail)
        for tail in TAILS
    }
    assert values["partial"] > full > values["bucket"] > 0
    assert values["renormalise"] == 0


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", DIVERGENCE)
def test_unused_slots_do_not_count(name, tail):
    """A nucleus smaller than top_k leaves slots with arbitrary ids and log-probability -inf."""
    fast = DIVERGENCE[name][0]
    logits_NV, p_NV = student(), teacher()
    ids_NK, log_p_NK, _ = sparse(p_NV, 3)
    log_p_NK = log_p_NK.log_softmax(-1)
    spare_NK = torch.tensor([[v for v in range(V) if v not in ids][:2] for ids in ids_NK.tolist()])
    more = torch.cat([ids_NK, spare_NK], 1), F.pad(log_p_NK, (0, 2), value=-torch.inf)
    none_N = torch.zeros(N, dtype=torch.float64)
    options = {"divergence": fast, "temperature": 1.0, "tail": tail}
    without = distillation(logits_NV, ids_NK, log_p_NK, none_N, **options)
    with_spare = distillation(logits_NV, *more, none_N, **options)
    assert with_spare.isfinite().all()
    torch.testing.assert_close(with_spare, without)
    torch.testing.assert_close(gradient(with_spare, logits_NV), gradient(without, logits_NV))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", DIVERGENCE)
@pytest.mark.parametrize("spread", [1.0, 30.0, 300.0])
def test_extremes_are_finite(name, tail, spread, dtype):
    """Confident teachers and students, in both directions, and a tail that rounds to 0."""
    logits_NV = student(dtype, spread)
    p_NV = teacher(spread=spread).to(dtype)
    value_N = loss(logits_NV, p_NV, 3, divergence=DIVERGENCE[name][0], tail=tail)
    got = gradient(value_N, logits_NV)
    if name not in ("reverse_kl", "jsd-1.0") or spread < 100:  # there log p itself is -inf
        assert value_N.isfinite().all()
        assert got.isfinite().all()
    assert not value_N.isnan().any()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_no_rows(name):
    empty = torch.empty(0, V, requires_grad=True)
    sparse_0 = (torch.empty(0, 3).long(), torch.empty(0, 3), torch.empty(0))
    call = partial(jsd, beta=0.3) if name == "jsd" else DIVERGENCES[name]
    for tail in TAILS:
        value = distillation(empty, *sparse_0, divergence=call, temperature=1.0, tail=tail)
        assert value.shape == (0,)
        value.sum().backward()


# --- cross-entropy -------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_cross_entropy_smooths_over_the_tokens_that_can_occur(smoothing):
    logits_NV = student()
    target_N = torch.tensor([0, 1, 2, 6, 8, 0])
    found = cross_entropy(logits_NV, target_N, label_smoothing=smoothing)
    live = [v for v in range(V) if v != NEVER]
    free_NV = logits_NV.detach()[:, live].requires_grad_()
    expected = torch.stack(
        [
            oracles.label_smoothed_cross_entropy(free_NV[n], live.index(int(v)), smoothing)
            for n, v in enumerate(target_N)
        ]
    )
    torch.testing.assert_close(found, expected)
    got = gradient(found, logits_NV)
    torch.testing.assert_close(got[:, live], gradient(expected, free_NV))
    assert (got[:, NEVER] == 0).all()


# --- small pieces --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log1mexp_is_accurate_at_both_ends(dtype):
    eps = torch.finfo(dtype).eps
    x = torch.tensor([-eps, -1e-6, -1e-3, -0.5, -0.69, -0.70, -2.0, -20.0, -80.0], dtype=dtype)
    expected = [
        math.log(-math.expm1(v)) if v > -1 else math.log1p(-math.exp(v)) for v in x.tolist()
    ]
    found = log1mexp(x)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=dtype), rtol=8 * eps, atol=0)


def test_log1mexp_at_the_ends_themselves():
    x = torch.tensor([-torch.inf, 0.0, 1e-7, -1e-3], requires_grad=True)
    y = log1mexp(x)
    floor = math.log(torch.finfo(torch.float32).eps)
    assert y[0] == 0
    assert y[1:3].tolist() == pytest.approx([floor, floor], rel=1e-5)
    y.sum().backward()
    assert x.grad.isfinite().all()


def test_linear_ramp():
    assert [linear_ramp(s, ramp_steps=4) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert linear_ramp(0, ramp_steps=0) == 1


def test_reverse_kl_needs_mass_everywhere():
    for divergence in DIVERGENCES:
        for tail in TAILS:
            check_tail(divergence, tail, truncated=False)
            if divergence == "reverse_kl" and tail != "renormalise":
                with pytest.raises(ConfigError, match=r"objective\.tail=renormalise"):
                    check_tail(divergence, tail, truncated=True)
            else:
                check_tail(divergence, tail, truncated=True)
