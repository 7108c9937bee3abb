"""Noise schedules against their definitions, and the transfer schedule."""

import oracles
import pytest
import torch

from mdm.errors import ConfigError
from mdm.schedule import SCHEDULES, shared_steps, tokens_due


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_alpha_is_the_probability_to_be_kept(schedule):
    ends = schedule.alpha(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert torch.allclose(ends, torch.tensor([1.0, 0.0], dtype=torch.float64), atol=1e-12)
    t = torch.linspace(0, 1, 50, dtype=torch.float64)
    assert (schedule.alpha(t).diff() < 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_loss_weight_is_minus_alphas_slope_over_the_mask_probability(schedule):
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(schedule.alpha(t).sum(), t)
    expected = -slope / (1 - schedule.alpha(t))
    assert torch.allclose(schedule.loss_weight(t), expected, rtol=1e-10)


def test_linear_is_the_papers():
    t = torch.tensor([0.25])
    assert SCHEDULES["linear"].alpha(t) == 0.75
    assert SCHEDULES["linear"].loss_weight(t) == 4


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("num_masked", [0, 1, 4, 5, 7, 8])
def test_tokens_due_is_the_published_schedule(num_masked, steps):
    due = tokens_due(num_masked, steps)
    assert due == oracles.llada_transfer_tokens(torch.tensor([num_masked]), steps)[0].tolist()
    assert sum(due) == num_masked


def test_no_steps_is_an_error():
    with pytest.raises(ConfigError, match="steps must be at least 1; got 0"):
        tokens_due(4, 0)


@pytest.mark.parametrize("counts", [(1, 4, 4, 3), (4,), (1, 1, 1), (3, 8, 8, 8, 5), (8, 1)])
def test_steps_are_shared_out_in_proportion(counts):
    for steps in range(len(counts), sum(counts) + 3):
        shares = shared_steps(counts, steps)
        assert sum(shares) == steps
        assert min(shares) >= 1
        for share, count in zip(shares, counts, strict=True):
            even = steps * count / sum(counts)
            assert abs(share - even) < 1.5 or share == 1
    assert shared_steps(counts, sum(counts)) == list(counts)


def test_every_block_needs_a_step():
    with pytest.raises(ConfigError, match=r"steps is 2, but there are 3 blocks .* set steps to 3"):
        shared_steps([4, 4, 4], 2)
    assert shared_steps([], 4) == []
