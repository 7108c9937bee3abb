"""The forward process, once: which tokens of x0 are masked in xt.

Both forms take the random numbers as an argument, one uniform per position, so that masks depend on
(seed, step, sample) alone: not on the batch, the number of processes or a global generator.
Shapes: B batch, L length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded from a key such as ("mask", seed, step, sample)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def row_uniforms(
    name: str, seed: int, step: int, samples: Sequence[int], length: int
) -> torch.Tensor:
    """(B, L) uniforms in [0, 1): row b depends on (name, seed, step, samples[b]) and nothing else."""
    rows = [torch.rand(length, generator=generator(name, seed, step, s)) for s in samples]
    return torch.stack(rows) if rows else torch.empty(0, length)


def spread_uniforms(
    name: str, seed: int, step: int, samples: Sequence[int], count: int
) -> torch.Tensor:
    """(B,) uniforms, evenly spread over the `count` samples of a step: (u + sample / count) mod 1.

    Each is uniform on [0, 1) by itself; together they cover the noise levels with low variance
    (Variational Diffusion Models, arXiv 2107.00630, appendix I.1).
    """
    u = torch.rand((), generator=generator(name, seed, step), dtype=torch.float64)
    index_B = torch.tensor(samples, dtype=torch.float64)
    return ((u + index_B / count) % 1.0).float().clamp_(max=1 - 2**-24)


def mask_by_rate(
    mask_prob_B: torch.Tensor, maskable_BL: torch.Tensor, uniforms_BL: torch.Tensor
) -> torch.Tensor:
    """(B, L) bool: each maskable position masked independently with probability mask_prob."""
    return maskable_BL & (uniforms_BL < mask_prob_B[:, None])


def mask_exactly(
    count_B: torch.Tensor, maskable_BL: torch.Tensor, uniforms_BL: torch.Tensor
) -> torch.Tensor:
    """(B, L) bool: exactly `count` maskable positions of each row, uniformly chosen.

    They are the ones with the smallest uniforms, so a larger count masks a superset.
    """
    order_BL = uniforms_BL.masked_fill(~maskable_BL, 2.0).argsort(dim=1, stable=True)
    rank_BL = torch.empty_like(order_BL)
    index_L = torch.arange(order_BL.shape[1], device=order_BL.device)
    rank_BL.scatter_(1, order_BL, index_L.expand_as(order_BL))
    return maskable_BL & (rank_BL < count_B[:, None])


def apply_mask(x0_BL: torch.Tensor, masked_BL: torch.Tensor, mask_id: int) -> torch.Tensor:
    """xt: x0 with the masked positions replaced by the mask token."""
    return torch.where(masked_BL, torch.full_like(x0_BL, mask_id), x0_BL)
