"""Noise schedules: how much is masked at noise level t, what that weighs, and tokens due per step.

t = 0 is clean, t = 1 is all mask. alpha(t) is the probability that a token is still kept, so
alpha(0) = 1 and alpha(1) = 0; the mask probability is 1 - alpha(t). The weight of the likelihood
bound is -alpha'(t) / (1 - alpha(t)) (MDLM, arXiv 2406.07524, eq. 10), which is 1/t for `linear`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch

from .errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Two functions of the noise level t in [0, 1], any shape."""

    alpha: Callable[[torch.Tensor], torch.Tensor]
    loss_weight: Callable[[torch.Tensor], torch.Tensor]


def _cosine_alpha(t: torch.Tensor) -> torch.Tensor:
    return 1 - torch.cos(math.pi / 2 * (1 - t))


def _cosine_weight(t: torch.Tensor) -> torch.Tensor:
    return math.pi / 2 * torch.tan(math.pi / 2 * (1 - t))


SCHEDULES: dict[str, Schedule] = {
    "linear": Schedule(alpha=lambda t: 1 - t, loss_weight=lambda t: 1 / t),
    "cosine": Schedule(alpha=_cosine_alpha, loss_weight=_cosine_weight),
}


def shared_steps(counts: Sequence[int], steps: int) -> list[int]:
    """`steps` denoising steps shared out over blocks with these numbers of masks, at least 1 each.

    In proportion, rounded; they sum to `steps`. Raises ConfigError if there are too few.
    """
    if steps < len(counts):
        raise ConfigError(
            f"steps is {steps}, but there are {len(counts)} blocks to denoise, which take a step each at"
            f" least; set steps to {len(counts)} or more"
        )
    shares, left, masks = [], steps, sum(counts)
    for place, count in enumerate(counts):
        even = (2 * left * count + masks) // (2 * masks)
        others = len(counts) - place - 1
        shares.append(min(max(1, even), left - others))
        left, masks = left - shares[-1], masks - count
    return shares


def tokens_due(num_masked: int, steps: int) -> list[int]:
    """How many of `num_masked` tokens each of `steps` denoising steps commits; sums to num_masked.

    As even as possible, the remainder first: (5, 3) → [2, 2, 1] (LLaDA's transfer schedule).
    """
    if steps < 1:
        raise ConfigError(f"steps must be at least 1; got {steps}")
    base, extra = divmod(num_masked, steps)
    return [base + 1] * extra + [base] * (steps - extra)
