"""AdamW with weight decay on matrices only, learning-rate schedules, and an average of the weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn


def adamw(model: nn.Module, *, weight_decay: float, betas: tuple[float, ...]) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; norms and biases (one dimension) do not decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(betas[0], betas[1]), fused=True)


def _constant(_progress: float, _decay_fraction: float) -> float:
    return 1.0


def _cosine(progress: float, _decay_fraction: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _warmup_stable_decay(progress: float, decay_fraction: float) -> float:
    """Constant, then linear to 0 over the last `decay_fraction` (MiniCPM, arXiv 2404.06395)."""
    return min(1.0, (1 - progress) / decay_fraction) if decay_fraction > 0 else 1.0


LR_SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "constant": _constant,
    "cosine": _cosine,
    "wsd": _warmup_stable_decay,
}


def lr_factor(
    schedule: str, step: int, *, steps: int, warmup_steps: int, decay_fraction: float, floor: float
) -> float:
    """Factor on the peak learning rate at a 0-based step: linear warm-up, then the schedule.

    After the warm-up it runs from 1 to `floor`, which the step after the last would reach.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return floor + (1 - floor) * LR_SCHEDULES[schedule](progress, decay_fraction)


class WeightAverage:
    """Exponential moving average of a model's trainable parameters, by name, in float32."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {
            name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad
        }

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards the model; the decay warms up as (1 + step) / (10 + step)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in model.named_parameters():
            if name in self.values:
                self.values[name].lerp_(parameter, 1 - decay)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the model's weights and the average; calling it twice changes nothing."""
        for name, parameter in model.named_parameters():
            if name in self.values:
                average = self.values[name].clone()
                self.values[name].copy_(parameter)
                parameter.copy_(average)
