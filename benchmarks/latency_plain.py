"""The sampler that a published script has: the baseline a user of it starts from.

LLaDA's loop at temperature 0 (arXiv 2502.09992, algorithm 5 with low-confidence remasking): blocks from
left to right; every step reads the whole canvas, computes logits of all positions and keeps the surest
of the block. No cache, no head on fewer rows. Written for the bare `transformers` model, without mdm's
sampler. A block diffusion model is read bidirectionally here, which is not what it was trained for: its
text means nothing then, its time does.
Shapes: L length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch


@torch.no_grad()
def plain_text(
    model: Any,
    prompt: Sequence[int],
    *,
    length: int,
    tokens_per_step: int,
    mask_id: int,
    never: torch.Tensor,
    shift: bool,
    block_length: int,
    most_steps: int | None = None,
) -> tuple[list[int], list[torch.Tensor]]:
    """(tokens after the prompt, positions kept in each step); `never` are ids that are never proposed.

    Stops after `most_steps`, however far it is. `shift`: position i is read from the output at i - 1.
    """
    device = never.device
    x_1L = torch.tensor([[*prompt, *[mask_id] * length]], device=device)
    kept: list[torch.Tensor] = []
    for start, due in block_steps(len(prompt), length, block_length, tokens_per_step):
        if len(kept) == most_steps:
            break
        logits_LV = model(x_1L, use_cache=False).logits[0]
        if shift:
            logits_LV = torch.cat([logits_LV[:1], logits_LV[:-1]])
        logits_LV[:, never] = float("-inf")
        tokens_L = logits_LV.argmax(-1)
        probabilities_LV = logits_LV.float().softmax(-1)
        confidence_L = probabilities_LV.gather(-1, tokens_L[:, None])[:, 0]
        confidence_L[x_1L[0] != mask_id] = float("-inf")
        confidence_L[start + block_length :] = float("-inf")
        chosen_k = confidence_L.topk(due).indices
        x_1L[0, chosen_k] = tokens_L[chosen_k]
        kept.append(chosen_k)
    return x_1L[0, len(prompt) :].tolist(), kept


def block_steps(
    start: int, length: int, block_length: int, tokens_per_step: int
) -> Iterator[tuple[int, int]]:
    """(where the block begins, tokens to keep) of every step; as even as possible within a block."""
    for first in range(0, length, block_length):
        masks = min(block_length, length - first)
        steps = -(-masks // tokens_per_step)
        base, more = divmod(masks, steps)
        for step in range(steps):
            yield start + first, base + (step < more)
