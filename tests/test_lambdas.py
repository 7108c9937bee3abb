"""TIDAL: the share of the teacher, the weight of noise levels, and the mixed target they go into.

Shapes: N positions, V vocabulary.
"""

import dataclasses
import math

import numpy as np
import oracles
import pytest
import torch

from mdm.config import build
from mdm.errors import ConfigError
from mdm.train.lambdas import (
    MIX_WEIGHTS,
    MixSettings,
    midrange,
    progress_mix,
    target_mix,
)
from mdm.train.losses import DIVERGENCES, TAILS, distillation, forward_kl, mixed

N, V = 6, 9
TIDAL = MixSettings(first=0.1, last=0.9, by_noise=True)
LEVELS = torch.tensor([[0.0, 0.25], [0.5, 1.0]], dtype=torch.float64)


# --- λ -------------------------------------------------------------------------------------------


def test_the_published_schedule():
    values = [progress_mix(step / 4, 0.1, 0.9) for step in range(5)]
    middle = 0.4 * (1 - math.sqrt(0.5))
    assert values == pytest.approx([0.1, 0.1 + middle, 0.5, 0.9 - middle, 0.9])


@pytest.mark.parametrize(
    ("progress", "expected"), [(-1.0, 0.3), (0.0, 0.3), (1.0, 0.2), (1.5, 0.2)]
)
def test_progress_outside_is_cut(progress, expected):
    assert progress_mix(progress, 0.3, 0.2) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("training", "noise", "expected"),
    [
        (True, True, [[0.5, 0.375], [0.25, 0.0]]),
        (True, False, [[0.5, 0.5], [0.5, 0.5]]),  # TAID
        (False, True, [[0.9, 0.675], [0.45, 0.0]]),
        (False, False, [[0.9, 0.9], [0.9, 0.9]]),
    ],
)
def test_axes_can_be_switched_off(training, noise, expected):
    settings = dataclasses.replace(TIDAL, by_training=training, by_noise=noise)
    found = target_mix(settings, 0.5, LEVELS)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 5), (2, 3, 4)])
def test_the_mix_has_the_shape_and_type_of_the_levels(shape):
    level = torch.rand(shape)
    for settings in (MixSettings(), TIDAL):
        found = target_mix(settings, 0.3, level)
        assert (found.shape, found.dtype) == (level.shape, level.dtype)
    assert (target_mix(MixSettings(), 0.3, level) == 1).all()


def test_active_means_that_the_mix_can_differ_from_the_teacher():
    for first in (0.0, 0.5, 1.0):
        for last in (0.5, 1.0):
            for training in (True, False):
                for noise in (True, False):
                    settings = MixSettings(first, last, training, noise)
                    mixes = [target_mix(settings, p, LEVELS) for p in (0.0, 0.5, 1.0)]
                    assert settings.active == any(bool((mix != 1).any()) for mix in mixes)
    assert not MixSettings(weight="midrange").active  # weighed, not mixed


# --- weights -------------------------------------------------------------------------------------


def points(count=200):
    """Gauss-Legendre points and weights on (0, 1)."""
    at, weight = np.polynomial.legendre.leggauss(count)
    return torch.tensor((at + 1) / 2), torch.tensor(weight / 2)


def test_midrange_is_as_published():
    found = midrange(torch.tensor([0.5, 0.35, 0.65, 0.0, 1.0], dtype=torch.float64))
    side, end = math.exp(-0.5), math.exp(-0.25 / 0.045)
    assert found.tolist() == pytest.approx([1, side, side, end, end])
    assert (MIX_WEIGHTS["midrange"](LEVELS) == midrange(LEVELS)).all()
    assert (MIX_WEIGHTS["none"](LEVELS) == 1).all()


@pytest.mark.parametrize("counting", ["bound", "mean_masked"])
def test_normalised_weights_have_mean_1_over_masked_tokens(counting):
    """t uniform, a token masked with probability t and weighed 1/t (bound) or 1 (mean_masked)."""
    t, dt = points()
    counted = t * (1 / t if counting == "bound" else 1) * dt
    counted = counted / counted.sum()
    means = {name: float((weight(t) * counted).sum()) for name, weight in MIX_WEIGHTS.items()}
    assert means == pytest.approx(
        {"none": 1, "midrange": 0.37567, "midrange_normalised": 1}, rel=1e-5
    )


def test_how_weak_the_published_signal_is():
    """Notes: E over masked tokens of w(t)(1-t) is .171, so times λ_train 2 to 15 % of a plain KL."""
    t, dt = points()
    strength = [
        float((midrange(t) * target_mix(TIDAL, progress, t) * 2 * t * dt).sum())
        for progress in (0.0, 1.0)
    ]
    assert strength == pytest.approx([0.1 * 0.1711, 0.9 * 0.1711], rel=1e-3)


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first": -0.1}, r"mix\.first must be in \[0, 1\]; got -0\.1"),
        ({"last": 1.5}, r"mix\.last must be in \[0, 1\]; got 1\.5"),
        ({"last": float("nan")}, r"mix\.last .* got nan"),
        ({"weight": "midrage"}, r"mix\.weight 'midrage'; did you mean 'midrange'"),
    ],
)
def test_what_is_wrong_is_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        MixSettings(**changes)


def test_settings_come_from_yaml_and_each_is_explained():
    tree = {"first": 0.1, "last": 0.9, "by_noise": True}
    assert build(MixSettings, tree, "mix.") == TIDAL
    lines = [line.split() for line in MixSettings.__doc__.splitlines()]
    starts = {words[0] for words in lines if words}
    assert {field.name for field in dataclasses.fields(MixSettings)} <= starts


# --- the mixed target ----------------------------------------------------------------------------


def logits(dtype=torch.float64):
    return torch.randn(2, N, V, dtype=dtype).mul(3).unbind(0)


def tidal(student_NV, teacher_NV, share_N, temperature):
    """T² KL(r ‖ softmax(s / T)) over the whole vocabulary."""
    log_p_NV = (teacher_NV / temperature).log_softmax(-1)
    log_q_NV = (student_NV / temperature).log_softmax(-1)
    return temperature**2 * forward_kl(mixed(log_p_NV, log_q_NV, share_N), log_q_NV)


def gradient(value_N, logits_NV):
    (result,) = torch.autograd.grad(value_N.sum(), logits_NV)
    return result


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_mixing_probabilities_is_mixing_logits(temperature):
    student_NV, teacher_NV = logits()
    share_N = torch.tensor([0.0, 0.1, 0.45, 0.5, 0.9, 1.0], dtype=torch.float64)
    log_p_NV = (teacher_NV / temperature).log_softmax(-1)
    found = mixed(log_p_NV, (student_NV / temperature).log_softmax(-1), share_N)
    rows = zip(student_NV, teacher_NV, share_N.tolist(), strict=True)
    expected = [oracles.mixed_logits(s_V, u_V, share, temperature) for s_V, u_V, share in rows]
    torch.testing.assert_close(found.exp(), torch.stack(expected))


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_no_share_is_no_loss_and_all_of_it_the_plain_kl(dtype, atol):
    student_NV, teacher_NV = logits(dtype)
    student_NV.requires_grad_()
    none = tidal(student_NV, teacher_NV, torch.zeros(N), 2.0)
    torch.testing.assert_close(none, torch.zeros_like(none), atol=atol, rtol=0)
    torch.testing.assert_close(
        gradient(none, student_NV), torch.zeros_like(student_NV), atol=atol, rtol=0
    )
    p_NV = (teacher_NV / 2).softmax(-1)
    plain = 4 * oracles.forward_kl(p_NV, (student_NV / 2).softmax(-1)).to(dtype)
    whole = tidal(student_NV, teacher_NV, torch.ones(N), 2.0)
    torch.testing.assert_close(whole, plain, atol=10 * atol, rtol=0)
    torch.testing.assert_close(
        gradient(whole, student_NV), gradient(plain, student_NV), atol=atol, rtol=0
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_gradient_is_t_times_the_gap_to_the_target(share, temperature):
    """T (softmax(s/T) - r): in closed form, and by finite differences with r held where it was."""
    student_NV, teacher_NV = logits()
    student_NV.requires_grad_()
    share_N = torch.full((N,), share, dtype=torch.float64)
    found = gradient(tidal(student_NV, teacher_NV, share_N, temperature), student_NV)
    s_NV = student_NV.detach()
    rows = zip(s_NV, teacher_NV, strict=True)
    r_NV = torch.stack([oracles.mixed_logits(s, u, share, temperature) for s, u in rows])
    expected = temperature * ((s_NV / temperature).softmax(-1) - r_NV)
    torch.testing.assert_close(found, expected)
    step, slopes = 1e-5, torch.empty_like(s_NV)
    for v in range(V):
        move = torch.zeros_like(s_NV)
        move[:, v] = step
        above, below = (
            oracles.forward_kl(r_NV, ((s_NV + at) / temperature).softmax(-1))
            for at in (move, -move)
        )
        slopes[:, v] = temperature**2 * (above - below) / (2 * step)
    torch.testing.assert_close(found, slopes, atol=1e-8, rtol=0)


def test_the_gradient_is_proportional_to_a_small_share():
    student_NV, teacher_NV = logits()
    student_NV.requires_grad_()
    one, two = (
        gradient(tidal(student_NV, teacher_NV, torch.full((N,), share), 1.0), student_NV)
        for share in (1e-4, 2e-4)
    )
    torch.testing.assert_close(two, 2 * one, rtol=1e-2, atol=1e-7)


def test_the_target_is_a_constant_in_float32_or_better():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        sides = [side.log_softmax(-1).requires_grad_() for side in logits(dtype)]
        found = mixed(*sides, torch.full((N,), 0.5, requires_grad=True))
        assert not found.requires_grad
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        total = found.exp().sum(-1)
        torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.0, [0.5, 0.25, 0.0, 0.25]),
        (1.0, [0.75, 0.0, 0.25, 0.0]),
        (0.5, [1.0, 0.0, 0.0, 0.0]),
    ],
)
def test_what_one_side_rules_out(share, expected):
    log_p = torch.tensor([[0.75, 0.0, 0.25, 0.0]]).log()
    log_q = torch.tensor([[0.5, 0.25, 0.0, 0.25]]).log()
    found = mixed(log_p, log_q, torch.tensor([share]))
    torch.testing.assert_close(found.exp(), torch.tensor([expected]))
    ruled_out = torch.tensor([[prob == 0 for prob in expected]])
    assert (found[ruled_out] == -torch.inf).all()
    raw = mixed(log_p - 2, log_q + 3, torch.tensor([share]))
    torch.testing.assert_close(raw, found)  # constants drop out


def test_it_is_never_nan():
    """Nothing in common leaves the student's own; slots that nobody uses stay out."""
    log_p = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).log().expand(5, -1)
    log_q = torch.tensor([[0.0, 0.0, 0.25, 0.75]]).log().expand(5, -1)
    share = torch.tensor([0.0, 1e-30, 0.5, 1 - 1e-7, 1.0])
    found = mixed(log_p, log_q, share)
    torch.testing.assert_close(found, torch.cat([log_q[:4], log_p[:1]]))
    empty = torch.full((3, 2), -torch.inf)
    assert not mixed(empty, empty, torch.tensor([0.0, 0.5, 1.0])).isnan().any()
    log_q = torch.tensor([[0.0, -1e5]]).log_softmax(-1).expand(2, -1)
    assert not mixed(log_q.flip(1), log_q, torch.tensor([0.5, 0.9])).isnan().any()


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_it_mixes_what_a_tail_makes_of_sparse_targets(tail, name):
    """As the objective does it; λ = 1 is `distillation` itself, at λ = 0 there is nothing to learn."""
    divergence = DIVERGENCES[name]
    student_NV, teacher_NV = logits()
    student_NV.requires_grad_()
    p_NK, ids_NK = teacher_NV.softmax(-1).topk(3)
    sparse = (ids_NK, p_NK.log(), 1 - p_NK.sum(-1))
    log_p_NK, log_q_NK = TAILS[tail](student_NV, *sparse)
    plain = distillation(student_NV, *sparse, divergence=divergence, temperature=1.0, tail=tail)
    whole = divergence(mixed(log_p_NK, log_q_NK, torch.ones(N)), log_q_NK)
    torch.testing.assert_close(whole, plain)
    none = divergence(mixed(log_p_NK, log_q_NK, torch.zeros(N)), log_q_NK)
    torch.testing.assert_close(none, torch.zeros_like(none), atol=1e-12, rtol=0)
    found = gradient(none, student_NV)
    torch.testing.assert_close(found, torch.zeros_like(found), atol=1e-12, rtol=0)


def test_no_rows():
    none = torch.empty(0, V)
    assert mixed(none, none, torch.empty(0)).shape == (0, V)
