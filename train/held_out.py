"""The likelihood bound on held-out rows, whole and by noise level, with standard errors.

Each row is masked with exactly l tokens, l spread evenly over 1..L across rows and draws. The mean
cross-entropy of the masked tokens of such a row is an unbiased estimate of its bound per token
(LLaDA, arXiv 2502.09992, eq. 14), so one pass gives the bound and its profile over noise levels.
The masks depend on (seed, draw, row) alone: before and after training the same ones are used.
Shapes: B batch, L length, R rows times draws, N masked positions.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import TYPE_CHECKING, Any

import torch

from mdm.denoiser import Denoiser
from mdm.diffusion import (
    apply_mask,
    generator,
    mask_exactly,
    row_uniforms,
    spread_uniforms,
)

from . import processes

if TYPE_CHECKING:
    from .rows import Rows

LEVELS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """One evaluation; columns of `values_R4`: noise level, CE of masked tokens, accuracy, tokens."""

    values_R4: torch.Tensor
    draws: int

    def summary(self) -> dict[str, Any]:
        """The bound in nats per token and the profile by noise level, each with a standard error."""
        level_R, ce_R, hit_R, tokens_R = self.values_R4.unbind(-1)
        nelbo, std_err = _weighted_mean(*self._per_row(ce_R, tokens_R))
        profile = []
        for low, high in itertools.pairwise(LEVELS):
            at_R = (level_R > low) & (level_R <= high)
            if not bool(at_R.any()):
                continue
            masked_R = (level_R * tokens_R)[at_R]
            ce, ce_std_err = _weighted_mean(ce_R[at_R], masked_R)
            accuracy, accuracy_std_err = _weighted_mean(hit_R[at_R], masked_R)
            profile.append(
                {
                    "t_low": low,
                    "t_high": high,
                    "cross_entropy": ce,
                    "cross_entropy_std_err": ce_std_err,
                    "accuracy": accuracy,
                    "accuracy_std_err": accuracy_std_err,
                    "masked_tokens": int(masked_R.sum().round()),
                }
            )
        return {
            "nelbo": nelbo,
            "nelbo_std_err": std_err,
            "unit": "nats per token",
            "rows": len(self.values_R4) // self.draws,
            "draws": self.draws,
            "by_noise_level": profile,
        }

    def improvement(self, after: HeldOut) -> tuple[float, float]:
        """Fall of the bound from self to `after` on the same masks, and its paired standard error."""
        fall_R = self.values_R4[:, 1] - after.values_R4[:, 1]
        return _weighted_mean(*self._per_row(fall_R, self.values_R4[:, 3]))

    def _per_row(
        self, value_R: torch.Tensor, tokens_R: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Means over the draws of a row, and its tokens: rows are independent, draws are not."""
        return value_R.view(self.draws, -1).mean(0), tokens_R.view(self.draws, -1)[0]


@torch.no_grad()
def held_out_bound(
    denoiser: Denoiser, rows: Rows, *, num_rows: int, draws: int, batch_rows: int, seed: int
) -> HeldOut:
    """Evaluate the first `num_rows` rows (fewer if there are fewer), `draws` masks each."""
    count = min(num_rows, len(rows))
    values_R4 = torch.zeros(draws * count, 4, dtype=torch.float64)
    was_training = denoiser.training
    denoiser.eval()
    jobs = [(d, range(f, min(f + batch_rows, count)))
            for d in range(draws) for f in range(0, count, batch_rows)]  # fmt: skip
    # All processes call the model equally often, which a sharded one needs: who has no job left does the
    # last one once more, and it is not counted.
    for first_job in range(0, len(jobs), processes.world_size()):
        job = first_job + processes.rank()
        draw, batch = jobs[min(job, len(jobs) - 1)]
        found_B4 = _evaluate(denoiser, rows, list(batch), draw, draws, count, seed)
        if job < len(jobs):
            first = draw * count + batch.start
            values_R4[first : first + len(batch)] = found_B4
    denoiser.train(was_training)
    moved_R4 = processes.total(values_R4.to(denoiser.device))
    return HeldOut(moved_R4.cpu(), draws)


def _evaluate(
    denoiser: Denoiser, rows: Rows, batch: list[int], draw: int, draws: int, count: int, seed: int
) -> torch.Tensor:
    data = rows.batch(batch)
    # The draws of a row fall into different parts of 1..L; rows are shuffled, or neighbours, which come
    # from one file, would share a noise level.
    order = torch.randperm(count, generator=generator("held-out order", seed)).tolist()
    samples = [draw * count + order[row] for row in batch]
    level_B = spread_uniforms("held-out level", seed, 0, samples, count * draws)
    total_B = data.maskable_BL.sum(1)
    count_B = torch.minimum((level_B * total_B).long() + 1, total_B)
    uniforms_BL = row_uniforms("held-out mask", seed, draw, batch, data.tokens_BL.shape[1])
    masked_BL = mask_exactly(count_B, data.maskable_BL, uniforms_BL)
    xt_BL = apply_mask(data.tokens_BL, masked_BL, denoiser.mask_id)

    def score(logits_nV: torch.Tensor, token_n: torch.Tensor) -> torch.Tensor:
        ce_n = logits_nV.logsumexp(-1) - logits_nV.gather(-1, token_n[:, None])[:, 0]
        return torch.stack([ce_n, (logits_nV.argmax(-1) == token_n).float()], dim=-1)

    device = denoiser.device
    scored_N2 = denoiser(
        xt_BL.to(device),
        masked_BL.to(device),
        x0_bL=None if denoiser.block_size is None else data.tokens_BL.to(device),
        document_ids_BL=data.document_ids_BL.to(device),
        score=score,
        score_inputs=(data.tokens_BL[masked_BL].to(device),),
    ).cpu()
    sums_B2 = torch.zeros(len(batch), 2, dtype=torch.float64)
    row_N = masked_BL.nonzero()[:, 0]
    sums_B2.index_add_(0, row_N, scored_N2.double())
    means_B2 = sums_B2 / count_B[:, None].clamp(min=1)
    return torch.stack(
        [count_B / total_B.double(), means_B2[:, 0], means_B2[:, 1], total_B.double()], dim=-1
    )


def _weighted_mean(value_N: torch.Tensor, weight_N: torch.Tensor) -> tuple[float, float]:
    """Weighted mean and its standard error (linearised ratio of independent rows)."""
    share_N = weight_N / weight_N.sum()
    mean = (share_N * value_N).sum()
    n = len(value_N)
    spread = (share_N * (value_N - mean)).square().sum()
    factor = n / (n - 1) if n > 1 else math.nan
    return float(mean), float((spread * factor).sqrt())
