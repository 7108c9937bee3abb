"""Block diffusion, forward: noisy blocks that see the clean blocks before them.

A block sees itself and all earlier blocks; of the earlier ones it sees the clean tokens. So the
clean tokens run once, their keys and values serve any number of noisy copies, and one forward of
R rows applies mask r to every block at the same time: blocks do not see one another's masks.
This is the two-stream layout [x_t ; x_0] of BD3LM (arXiv 2503.09573, section 3.1).
Shapes: L clean tokens, Q noisy positions, R masks of a block, A answer tokens of it, K keys, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from . import attention
from .denoiser import Denoiser
from .grid import BlockGrid

if TYPE_CHECKING:
    from transformers import DynamicCache


def answer_blocks(prompt_length: int, answer_length: int, block_size: int | None) -> list[slice]:
    """The part of each block that belongs to the answer; blocks are counted from position 0."""
    assert block_size is not None, "not a block diffusion model"
    end = prompt_length + answer_length
    grid = BlockGrid(0, end, block_size)
    blocks = (grid.block(i) for i in range(prompt_length // block_size, grid.num_blocks))
    return [slice(max(prompt_length, block.start), block.stop) for block in blocks]


@torch.no_grad()
def block_log_probs(
    denoiser: Denoiser,
    x0_L: torch.Tensor,
    answers: Sequence[slice],
    masks: Sequence[torch.Tensor],
    batch_tokens: int = 4096,
) -> list[torch.Tensor]:
    """For each block, (R, A) float64 log p of its answer tokens where its mask r hides them.

    `answers` are the blocks' answer parts, `masks` their (R, A) masks; R may differ between blocks.
    Elsewhere than under a mask the result is 0.
    """
    size = denoiser.block_size
    assert size is not None, "not a block diffusion model"
    device = denoiser.device
    first = answers[0].start // size * size
    positions_Q = torch.arange(
        first, len(x0_L), device=device
    )  # whole blocks, prompt tail included
    cache, clean_LD = clean_pass(denoiser, x0_L)
    rows = max(len(mask_RA) for mask_RA in masks)
    masked_RQ = torch.zeros(rows, len(positions_Q), dtype=torch.bool, device=device)
    for answer, mask_RA in zip(answers, masks, strict=True):
        masked_RQ[: len(mask_RA), answer.start - first : answer.stop - first] = mask_RA.to(device)
    log_probs_RQ = torch.zeros(masked_RQ.shape, dtype=torch.float64, device=device)
    step = max(1, batch_tokens // len(positions_Q))
    for begin in range(0, rows, step):
        part_rQ = masked_RQ[begin : begin + step]
        log_probs_RQ[begin : begin + step] = _noisy_pass(
            denoiser, x0_L, positions_Q, part_rQ, cache, clean_LD
        )
    return [
        log_probs_RQ[: len(mask_RA), answer.start - first : answer.stop - first].cpu()
        for answer, mask_RA in zip(answers, masks, strict=True)
    ]


def clean_pass(denoiser: Denoiser, x0_L: torch.Tensor) -> tuple[DynamicCache, torch.Tensor]:
    """Keys and values of the clean tokens, and (L, D) inputs of the head at each of them."""
    from transformers import DynamicCache

    cache = DynamicCache()
    positions_L = torch.arange(len(x0_L), device=denoiser.device)
    block_L = positions_L // (denoiser.block_size or 1)
    visible_LL = block_L[:, None] >= block_L[None, :]
    hidden_BLD = _hidden(denoiser, x0_L[None], positions_L, visible_LL, cache)
    return cache, hidden_BLD[0]


def _noisy_pass(
    denoiser: Denoiser,
    x0_L: torch.Tensor,
    positions_Q: torch.Tensor,
    masked_RQ: torch.Tensor,
    cache: DynamicCache,
    clean_LD: torch.Tensor,
) -> torch.Tensor:
    """(R, Q) log p of the masked tokens, 0 elsewhere."""
    size = denoiser.block_size or 1
    block_Q = positions_Q // size
    block_L = torch.arange(len(x0_L), device=positions_Q.device) // size
    visible_QK = torch.cat(
        [block_L[None, :] < block_Q[:, None], block_Q[None, :] == block_Q[:, None]], dim=1
    )
    x0_Q = x0_L[positions_Q]
    xt_RQ = torch.where(masked_RQ, denoiser.mask_id, x0_Q)
    noisy_RQD = _hidden(denoiser, xt_RQ, positions_Q, visible_QK, _shared(cache, len(masked_RQ)))
    if denoiser.shift:
        # Output i - 1 predicts position i; before the first of a block stands a clean block.
        noisy_RQD = noisy_RQD.roll(1, dims=1)
        starts_Q = positions_Q % size == 0
        if starts_Q[0] and positions_Q[0] == 0:
            assert not bool(masked_RQ[:, 0].any()), (
                "position 0 of a shifted model has no predecessor"
            )
        noisy_RQD[:, starts_Q] = clean_LD[positions_Q[starts_Q] - 1]
    log_probs_RQ = torch.zeros(masked_RQ.shape, dtype=torch.float64, device=masked_RQ.device)
    rows_ND, targets_N = noisy_RQD[masked_RQ], x0_Q.expand_as(masked_RQ)[masked_RQ]
    parts = []
    for chunk in denoiser.chunks(len(targets_N)):
        log_probs_nV = denoiser.head(rows_ND[chunk]).log_softmax(-1)
        parts.append(log_probs_nV.gather(1, targets_N[chunk, None])[:, 0])
    log_probs_RQ[masked_RQ] = torch.cat(parts).double()
    return log_probs_RQ


def _hidden(
    denoiser: Denoiser,
    x_BQ: torch.Tensor,
    positions_Q: torch.Tensor,
    visible_QK: torch.Tensor,
    cache: DynamicCache,
) -> torch.Tensor:
    """(B, Q, D) inputs of the head; the cache grows by Q."""
    batch = x_BQ.shape[0]
    visible_BQK = visible_QK.expand(batch, *visible_QK.shape)
    arguments = {
        "attention_mask": attention.float_mask(visible_BQK, denoiser.model.dtype),
        "position_ids": positions_Q.expand(batch, -1),
        "past_key_values": cache,
        "use_cache": True,
    }
    if denoiser.plain_head:
        return denoiser.model.base_model(x_BQ, **arguments)[0]
    return denoiser.model(x_BQ, **arguments).logits


def _shared(cache: DynamicCache, rows: int) -> DynamicCache:
    """The same keys and values for `rows` rows, in a cache of its own."""
    from transformers import DynamicCache

    copy = DynamicCache()
    for index, layer in enumerate(cache.layers):
        keys, values = (part.expand(rows, -1, -1, -1) for part in (layer.keys, layer.values))
        copy.update(keys, values, index)
    return copy
