"""How much of the teacher is in a mixed target, and how noise levels are weighed: λ and w of TIDAL.

    r ∝ q^(1-λ) p^λ        (`mixed` of losses.py; p teacher, q student)
    λ   = λ_train · (1 - t)
    λ_train = first + (last - first) · (1 - cos πs) / 2

with t the noise level of the row or of the block (1 is all masks; a block of one token has no other, and
so no signal) and s the part of the training that is done. Early in training, and where much is hidden, the
student is taught by something close to itself. Source: TIDE (arXiv 2604.26951, TIDAL), first 0.1, last
0.9; without the factor 1 - t it is TAID (2501.16937) with a cosine for its adaptive schedule.

The gradient of KL(r ‖ q) is proportional to λ to first order, so mixing also makes the term weaker; so does
the published weight "midrange", whose mean is .38 and not 1. Together: the mean of w·(1 - t) over masked
tokens is .17. Compare with a plain divergence at equal strength, or use "midrange_normalised".
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch

from mdm.config import require
from mdm.errors import check_known

_CENTRE, _WIDTH = 0.5, 0.15  # of the midrange weight, as published
# ∫ exp(-(t - .5)² / (2 · .15²)) dt over (0, 1) = .3757
_MIDRANGE_MEAN = _WIDTH * math.sqrt(2 * math.pi) * math.erf(_CENTRE / (_WIDTH * math.sqrt(2)))


@dataclasses.dataclass(frozen=True)
class MixSettings:
    """Distil towards a mixture of teacher and student (TIDAL, TAID); see train/lambdas.py.

    first        share λ of the teacher at the start of training
    last         at the end; first=1 and last=1: the teacher alone, nothing is mixed
    by_training  λ goes from first to last in a cosine; false: it is last all the time
    by_noise     λ is multiplied by 1 - t: less of the teacher where much is masked
    weight       of noise level t in the distillation term: "none"; "midrange": high around t = 0.5, as
                 published, which weakens the term to .38; "midrange_normalised": the same with mean 1
    """

    first: float = 1.0
    last: float = 1.0
    by_training: bool = True
    by_noise: bool = False
    weight: str = "none"

    def __post_init__(self) -> None:
        for name in ("first", "last"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"mix.{name} must be in [0, 1]; got {value}")
        check_known("mix.weight", self.weight, MIX_WEIGHTS)

    @property
    def active(self) -> bool:
        """Whether λ can differ from 1, so that the target is not the teacher's alone."""
        return self.by_noise or self.last != 1 or (self.by_training and self.first != 1)


def progress_mix(progress: float, first: float, last: float) -> float:
    """λ_train after `progress` of the training (step / steps, cut to [0, 1]), on a cosine."""
    done = min(max(progress, 0.0), 1.0)
    return first + (last - first) * (1 - math.cos(math.pi * done)) / 2


def target_mix(settings: MixSettings, progress: float, level_BL: torch.Tensor) -> torch.Tensor:
    """λ of each position, in the shape of the noise levels; `progress` as in `progress_mix`."""
    first = settings.first if settings.by_training else settings.last
    now = progress_mix(progress, first, settings.last)
    return now * (1 - level_BL) if settings.by_noise else torch.full_like(level_BL, now)


def midrange(level_BL: torch.Tensor) -> torch.Tensor:
    """exp(-(t - .5)² / (2 · .15²)): 1 at t = .5, .004 at both ends."""
    return (-((level_BL - _CENTRE) ** 2) / (2 * _WIDTH**2)).exp()


def _midrange_normalised(level_BL: torch.Tensor) -> torch.Tensor:
    """Mean 1 over masked tokens, for t uniform on (0, 1), whichever way tokens are counted.

    Of small blocks with masking=exact, whose levels are few, it is a little less; not for schedule=cosine.

    Weighed by 1/t (the bound), masked tokens lie uniformly in t, and the mean of w is ∫ w dt. In a plain
    mean their density is 2t, and 2 ∫ t w dt is the same, because w is symmetric around 1/2.
    """
    return midrange(level_BL) / _MIDRANGE_MEAN


# Of the noise levels, any shape, to the weights of the distillation term.
MIX_WEIGHTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": torch.ones_like,
    "midrange": midrange,
    "midrange_normalised": _midrange_normalised,
}
