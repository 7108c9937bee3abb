"""Block diffusion, scored: noisy blocks that see the clean blocks before them.

A noisy block sees itself and the clean tokens of all earlier blocks; attention.py has the details. So the
clean tokens run once, their keys and values serve any number of noisy copies, and one forward of
R rows applies mask r to every block at the same time: blocks do not see one another's masks.
This is the two-stream layout [x_t ; x_0] of BD3LM (arXiv 2503.09573, section 3.1).
Shapes: L clean tokens, Q noisy positions, R masks of a block, A answer tokens of it, D width,
E whole blocks of clean tokens, N masked tokens, M outputs that are needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from . import attention
from .attention import CLEAN, Tokens
from .cache import NOISY
from .denoiser import Denoiser
from .errors import CheckpointError
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
    *_, (_, found) = block_log_prob_steps(denoiser, x0_L, answers, masks, batch_tokens)
    assert found is not None, "the last forward has the result"
    return found


@torch.no_grad()
def block_log_prob_steps(
    denoiser: Denoiser,
    x0_L: torch.Tensor,
    answers: Sequence[slice],
    masks: Sequence[torch.Tensor],
    batch_tokens: int = 4096,
) -> Iterator[tuple[int, list[torch.Tensor] | None]]:
    """`block_log_probs` by forwards: the rows of each, and with the last one the result.

    The first forward reads the clean tokens. In the others every row has keys and values of the clean
    tokens to itself, so these count towards `batch_tokens`, too.
    """
    size = denoiser.block_size
    assert size is not None, "not a block diffusion model"
    device = denoiser.device
    first = answers[0].start // size * size
    # whole blocks, prompt tail included
    positions_Q = torch.arange(first, len(x0_L), device=device)
    cache, ends_ED = clean_pass(denoiser, x0_L)
    yield 1, None
    rows = max(len(mask_RA) for mask_RA in masks)
    masked_RQ = torch.zeros(rows, len(positions_Q), dtype=torch.bool, device=device)
    for answer, mask_RA in zip(answers, masks, strict=True):
        masked_RQ[: len(mask_RA), answer.start - first : answer.stop - first] = mask_RA.to(device)
    log_probs_RQ = torch.zeros(masked_RQ.shape, dtype=torch.float64, device=device)
    step = rows_of_forward(batch_tokens, len(x0_L), len(positions_Q))
    for begin in range(0, rows, step):
        part_rQ = masked_RQ[begin : begin + step]
        log_probs_RQ[begin : begin + step] = _noisy_pass(
            denoiser, x0_L, positions_Q, part_rQ, cache, ends_ED
        )
        if begin + step < rows:
            yield len(part_rQ), None
    yield (
        len(part_rQ),
        [
            log_probs_RQ[: len(mask_RA), answer.start - first : answer.stop - first].cpu()
            for answer, mask_RA in zip(answers, masks, strict=True)
        ],
    )


def rows_of_forward(batch_tokens: int, clean: int, noisy: int) -> int:
    """Noisy rows of a forward: each has `noisy` tokens and keys of the `clean` ones."""
    return max(1, batch_tokens // (clean + noisy))


def clean_pass(denoiser: Denoiser, x0_L: torch.Tensor) -> tuple[DynamicCache, torch.Tensor]:
    """Keys and values of the clean tokens, and (E, D) inputs of the head at the last of each block."""
    positions_L = torch.arange(len(x0_L), device=denoiser.device)
    clean = _tokens(positions_L, CLEAN, torch.zeros_like(x0_L, dtype=torch.bool)[None])
    ends_L = (positions_L + 1) % (denoiser.block_size or 1) == 0
    cache = cache_of(())
    return cache, outputs(denoiser, x0_L[None], clean, clean, cache, ends_L[None])


def _noisy_pass(
    denoiser: Denoiser,
    x0_L: torch.Tensor,
    positions_Q: torch.Tensor,
    masked_RQ: torch.Tensor,
    cache: DynamicCache,
    ends_ED: torch.Tensor,
) -> torch.Tensor:
    """(R, Q) log p of the masked tokens, 0 elsewhere."""
    x0_Q = x0_L[positions_Q]
    noisy = _tokens(positions_Q, NOISY, masked_RQ)
    nothing_RL = torch.zeros(len(masked_RQ), len(x0_L), dtype=torch.bool, device=x0_L.device)
    clean = _tokens(torch.arange(len(x0_L), device=x0_L.device), CLEAN, nothing_RL)
    rows_ND = _predictors(
        denoiser,
        torch.where(masked_RQ, denoiser.mask_id, x0_Q),
        noisy,
        clean.cat(noisy),
        _shared(cache, len(masked_RQ)),
        ends_ED,
    )
    log_probs_RQ = torch.zeros(masked_RQ.shape, dtype=torch.float64, device=masked_RQ.device)
    targets_N = x0_Q.expand_as(masked_RQ)[masked_RQ]
    parts = []
    for chunk in denoiser.chunks(len(targets_N)):
        log_probs_nV = denoiser.head(rows_ND[chunk]).log_softmax(-1)
        parts.append(log_probs_nV.gather(1, targets_N[chunk, None])[:, 0])
    log_probs_RQ[masked_RQ] = torch.cat(parts).double()
    return log_probs_RQ


def _predictors(
    denoiser: Denoiser,
    xt_RQ: torch.Tensor,
    noisy: Tokens,
    keys: Tokens,
    cache: DynamicCache,
    ends_ED: torch.Tensor,
) -> torch.Tensor:
    """(N, D) inputs of the head from which the masked tokens are read."""
    if not denoiser.shift:
        return outputs(denoiser, xt_RQ, noisy, keys, cache, noisy.masked)
    # Output i - 1 predicts position i; before the first of a block stands a clean block.
    size = denoiser.block_size or 1
    first_RQ = noisy.masked & (noisy.position % size == 0)
    assert bool((noisy.position[first_RQ] > 0).all()), (
        "position 0 of a shifted model has no predecessor"
    )
    needed_RQ = (noisy.masked & ~first_RQ).roll(-1, dims=1)
    outputs_MD = outputs(denoiser, xt_RQ, noisy, keys, cache, needed_RQ)
    rows_ND = outputs_MD.new_empty(int(noisy.masked.sum()), outputs_MD.shape[1])
    first_N = first_RQ[noisy.masked]
    rows_ND[first_N] = ends_ED[noisy.position[first_RQ] // size - 1]
    rows_ND[~first_N] = outputs_MD
    return rows_ND


def _tokens(positions_Q: torch.Tensor, stream: int, masked_RQ: torch.Tensor) -> Tokens:
    """Tokens of R copies of one text, as they stand."""
    position_RQ = positions_Q.expand_as(masked_RQ)
    return Tokens(
        document=torch.zeros_like(position_RQ),
        position=position_RQ,
        stream=torch.full_like(position_RQ, stream),
        masked=masked_RQ,
    )


def _shared(cache: DynamicCache, rows: int) -> DynamicCache:
    """The same keys and values for `rows` rows, in a cache of its own."""
    return cache_of(
        (layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1))
        for layer in cache.layers
    )


def outputs(
    denoiser: Denoiser,
    x_BQ: torch.Tensor,
    queries: Tokens,
    keys: Tokens,
    cache: DynamicCache,
    needed_BQ: torch.Tensor,
) -> torch.Tensor:
    """(M, D) inputs of the head where they are needed; (M, V) logits if the head is not plain.

    `keys` are the tokens of the cache and, after them, `queries`; the cache grows by the latter. Raises
    CheckpointError if it does not: a model with its own code may ignore it.
    """
    assert denoiser.block_size is not None, "not a block diffusion model"
    visible_BQK = attention.block_visible(queries, keys, denoiser.block_size, denoiser.attention)
    arguments = {
        "attention_mask": attention.float_mask(visible_BQK, denoiser.model.dtype),
        "position_ids": queries.position,
        "past_key_values": cache,
        "use_cache": True,
    }
    if denoiser.plain_head:
        found_MD = denoiser.model.base_model(x_BQ, **arguments)[0][needed_BQ]
    else:
        found_MD = denoiser.model(x_BQ, logits_to_keep=needed_BQ, **arguments).logits
    require_kept(denoiser, cache, keys.position.shape[1])
    return found_MD


def require_kept(denoiser: Denoiser, cache: DynamicCache, length: int) -> None:
    """Raise CheckpointError unless a forward has left keys of `length` tokens in every layer it knows."""
    kept = {cache.get_seq_length(index) for index in range(len(cache.layers))}
    if kept != {length}:
        raise CheckpointError(
            f"{type(denoiser.model).__name__} cannot be read block by block: its code keeps no"
            " DynamicCache (the argument past_key_values) of keys and values"
        )


def cache_of(layers: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> DynamicCache:
    """A cache that begins with these keys and values, of any number of rows; they are not copied."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for index, (keys, values) in enumerate(layers):
        cache.update(keys[:, :, :0], values[:, :, :0], index)  # makes the layer; copies nothing
        cache.layers[index].keys, cache.layers[index].values = keys, values
    return cache
