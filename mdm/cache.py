"""Reading a block for a block diffusion model, with keys and values of what is clean already.

No token sees a block that comes later, and a noisy block sees clean tokens of earlier ones (attention.py).
So clean tokens are read once: their keys and values are kept, and one forward reads what became clean
since the last one and, after it, the noisy block. That is exact: it is what one pass over [x_t ; x_0]
gives for this block (BD3LM, arXiv 2503.09573, section 3.1), at any length of the prompt.
What was kept stays as it was: a forward that fails changes nothing (buffers.py).
Shapes: B rows, L length, Q tokens read now, K keys, D width of the model, n positions asked for in a row,
N in all rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch

from . import attention
from .attention import CLEAN, Tokens
from .buffers import Batch, Prefix, places, read, settle
from .denoiser import Denoiser

NOISY = CLEAN + 1  # the stream of the block that is being denoised


@dataclasses.dataclass(frozen=True)
class Row:
    """A row whose block is to be read: ids_L is clean before it, and what stands after it is not read.

    ids_L     tokens, on the host
    block     a block of the model's grid
    wanted_n  positions in it that are asked for, on the host
    prefix    clean tokens before it that have been read
    last      where the last block ends that will be read
    """

    ids_L: torch.Tensor
    block: slice
    wanted_n: torch.Tensor
    prefix: Prefix = Prefix()
    last: int = 0

    @property
    def read(self) -> slice:
        """Positions that a forward has to read."""
        return slice(self.prefix.length, self.block.stop)

    @property
    def new(self) -> int:
        """Clean tokens among them; they come first."""
        return self.block.start - self.prefix.length


@torch.no_grad()
def read_blocks(denoiser: Denoiser, rows: Sequence[Row]) -> tuple[torch.Tensor, list[Prefix]]:
    """(N, D) inputs of the head for the wanted positions, row by row, and the clean tokens as read.

    One forward for all rows, whatever their lengths. The prefix that comes back ends where the block
    begins, and stands for the one in the row from then on.
    """
    assert denoiser.block_size is not None, "not a block diffusion model"
    keys = max(row.block.stop for row in rows)
    # One place more: where padding goes.
    last = max(row.last for row in rows)
    buffer, slots = settle(denoiser, [row.prefix for row in rows], keys + 1, last + 1)
    by_slot = [rows[slots.index(slot)] for slot in range(len(rows))]
    width = max(row.read.stop - row.read.start for row in rows)
    place_BQ, start = places([row.read for row in by_slot], buffer)
    queries, x_BQ = _queries(denoiser, by_slot, width)
    batch = Batch(
        x_BQ,
        queries,
        _keys(denoiser, by_slot, keys),
        functools.partial(
            attention.block_visible, block_size=denoiser.block_size, attention=denoiser.attention
        ),
        _all_visible(denoiser, by_slot),
        place_BQ,
        start,
        keys,
        buffer,
    )
    wanted_N, last_A, kept = _wanted(denoiser, rows, slots, width)
    found_MD = read(denoiser, batch, torch.cat([wanted_N, last_A]), kept)
    ends = iter(found_MD[len(wanted_N) :].unbind())
    prefixes = []
    for row, slot in zip(rows, slots, strict=True):
        last_D = row.prefix.last_D
        if denoiser.shift and row.new:
            last_D = next(ends).clone()
        buffer.filled[slot] = row.block.start
        prefixes.append(Prefix(row.block.start, last_D, buffer, slot))
    return found_MD[: len(wanted_N)], prefixes


# --- what goes in ----------------------------------------------------------------------------------


def _all_visible(denoiser: Denoiser, rows: Sequence[Row]) -> bool:
    """May every token that is read see all keys of the buffer up to the last one read?"""
    alike = len({(row.read.start, row.read.stop) for row in rows}) == 1
    plain = not attention.BLOCK_ATTENTIONS[denoiser.attention].reordered
    return alike and plain and not rows[0].new and not denoiser.always_mask


def _queries(denoiser: Denoiser, rows: Sequence[Row], width: int) -> tuple[Tokens, torch.Tensor]:
    """Where the tokens to be read stand: clean ones, the block, padding; and the tokens (B, Q)."""
    shape = (len(rows), width)
    x_BQ = torch.full(shape, denoiser.vocab.pad_id)
    document_BQ, stream_BQ = torch.full(shape, -1), torch.full(shape, CLEAN)
    position_BQ = torch.zeros(shape, dtype=torch.long)
    for number, row in enumerate(rows):
        own = slice(row.read.stop - row.read.start)
        x_BQ[number, own] = row.ids_L[row.read]
        document_BQ[number, own] = 0
        position_BQ[number, own] = torch.arange(row.read.start, row.read.stop)
        stream_BQ[number, row.new : own.stop] = NOISY
    masked_BQ = (x_BQ == denoiser.mask_id) & (stream_BQ == NOISY)
    return Tokens(document_BQ, position_BQ, stream_BQ, masked_BQ), x_BQ


def _keys(denoiser: Denoiser, rows: Sequence[Row], length: int) -> Tokens:
    """(B, K) what stands in the buffer: clean tokens, then the block; what is behind is of no document."""
    position_BK = torch.arange(length).expand(len(rows), -1)
    stop_B1 = torch.tensor([[row.block.stop] for row in rows])
    start_B1 = torch.tensor([[row.block.start] for row in rows])
    stream_BK = torch.where(position_BK < start_B1, CLEAN, NOISY)
    masked_BK = torch.zeros(len(rows), length, dtype=torch.bool)
    for masked_K, row in zip(masked_BK, rows, strict=True):
        masked_K[row.block] = row.ids_L[row.block] == denoiser.mask_id
    return Tokens((position_BK < stop_B1).long() - 1, position_BK, stream_BK, masked_BK)


# --- what comes out --------------------------------------------------------------------------------


def _wanted(
    denoiser: Denoiser, rows: Sequence[Row], slots: Sequence[int], width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Numbers of the outputs to be read: (N,) for the wanted positions, (A,) at the last new clean tokens;
    and kept inputs of the head, (M, D), that come before all others in this numbering.

    In a shifted model output i - 1 predicts position i; that before the first of a block may be a kept one.
    """
    shift = int(denoiser.shift)
    own = [row.wanted_n - row.read.start - shift for row in rows]
    kept: list[torch.Tensor] = []
    before = sum(bool((place_n < 0).any()) for place_n in own)
    numbers, ends = [], []
    for row, slot, place_n in zip(rows, slots, own, strict=True):
        first = before + slot * width
        number_n = first + place_n
        if (place_n < 0).any():
            assert row.prefix.last_D is not None, "position 0 of a shifted model has no predecessor"
            number_n = torch.where(place_n < 0, len(kept), number_n)
            kept.append(row.prefix.last_D)
        numbers.append(number_n)
        if shift and row.new:
            ends.append(first + row.new - 1)
    return (
        torch.cat(numbers),
        torch.tensor(ends, dtype=torch.long),
        torch.stack(kept) if kept else None,
    )
