"""Approximate caches for models without blocks: keys and values that are some steps old.

In such a model every token sees every other, so what was computed for one token is wrong as soon as another
is decided. Fast-dLLM (arXiv 2505.22618, section 3.2) computes it anew only now and then, and in between
reads part of the canvas against what it had:

    cache    reads between refreshes                   keeps
    prefix   the current block and all behind it       what stands before the block
    dual     the current block                         all that is not in it

A refresh reads the whole canvas and decides, too; there is one at the start of every block and, with
`refresh=n`, after every n steps (n = 1 is exact, and as dear as no cache). A shifted model reads one token
more, since the output before a block predicts its first position.
How far off the logits are: `mdm bench drift`.
Shapes: B rows, L length, N outputs asked for, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from .attention import CLEAN, Tokens
from .buffers import Batch, Prefix, places, read, settle
from .canvas import Canvas
from .denoiser import Denoiser


@dataclasses.dataclass(frozen=True)
class Row:
    """A canvas, part of which is to be read.

    ids_L     all of its tokens, on the host
    read      the part
    wanted_n  positions in it that are asked for, on the host
    prefix    what it keeps; the whole canvas, once it was read
    stamp     block and step of its last refresh; this forward's, if it is one
    """

    ids_L: torch.Tensor
    read: slice
    wanted_n: torch.Tensor
    prefix: Prefix
    stamp: tuple[int, int]


def row_of(
    canvas: Canvas, ids_L: torch.Tensor, wanted_n: torch.Tensor, prefix: Prefix, shift: bool
) -> Row:
    """What the next forward has to read of a canvas by its settings."""
    block, settings = canvas.blocks[0], canvas.settings
    stamp = prefix.stamp
    old = (
        stamp is None
        or stamp[0] != block.start
        or (settings.refresh is not None and canvas.step - stamp[1] >= settings.refresh)
    )
    if stamp is None or old:
        return Row(ids_L, slice(0, len(ids_L)), wanted_n, prefix, (block.start, canvas.step))
    stop = len(ids_L) if settings.cache == "prefix" else block.stop
    return Row(ids_L, slice(block.start - int(shift), stop), wanted_n, prefix, stamp)


@torch.no_grad()
def read_canvases(denoiser: Denoiser, rows: Sequence[Row]) -> tuple[torch.Tensor, list[Prefix]]:
    """(N, D) inputs of the head for the wanted positions, row by row, and what the rows keep now."""
    assert denoiser.block_size is None, "a model with blocks has an exact cache"
    length = max(len(row.ids_L) for row in rows)
    # One place more: where padding goes.
    buffer, slots = settle(denoiser, [row.prefix for row in rows], length + 1, length + 1)
    by_slot = [rows[slots.index(slot)] for slot in range(len(rows))]
    width = max(row.read.stop - row.read.start for row in rows)
    place_BQ, start = places([row.read for row in by_slot], buffer)
    shape = (len(rows), width)
    x_BQ = torch.full(shape, denoiser.vocab.pad_id)
    document_BQ, position_BQ = torch.full(shape, -1), torch.zeros(shape, dtype=torch.long)
    for number, row in enumerate(by_slot):
        own = slice(row.read.stop - row.read.start)
        x_BQ[number, own] = row.ids_L[row.read]
        document_BQ[number, own] = 0
        position_BQ[number, own] = torch.arange(row.read.start, row.read.stop)
    alike = len({(len(row.ids_L), row.read.stop - row.read.start) for row in rows}) == 1
    batch = Batch(
        x_BQ,
        _tokens(document_BQ, position_BQ),
        _keys(by_slot, length),
        _same_document,
        alike and not denoiser.always_mask,
        place_BQ,
        start,
        length,
        buffer,
    )
    first = int(denoiser.shift)
    wanted_N = torch.cat(
        [
            slot * width + row.wanted_n - row.read.start - first
            for row, slot in zip(rows, slots, strict=True)
        ]
    )
    states_ND = read(denoiser, batch, wanted_N)
    prefixes = []
    for row, slot in zip(rows, slots, strict=True):
        buffer.filled[slot] = len(row.ids_L)
        prefixes.append(Prefix(len(row.ids_L), None, buffer, slot, row.stamp))
    return states_ND, prefixes


def _keys(rows: Sequence[Row], length: int) -> Tokens:
    position_BK = torch.arange(length).expand(len(rows), -1)
    length_B1 = torch.tensor([[len(row.ids_L)] for row in rows])
    return _tokens((position_BK < length_B1).long() - 1, position_BK)


def _tokens(document_BN: torch.Tensor, position_BN: torch.Tensor) -> Tokens:
    return Tokens(
        document_BN,
        position_BN,
        torch.full_like(position_BN, CLEAN),
        torch.zeros_like(position_BN, dtype=torch.bool),
    )


def _same_document(queries: Tokens, keys: Tokens) -> torch.Tensor:
    """(B, Q, K) bool: everything of a row sees everything of it."""
    return queries.document[:, :, None] == keys.document[:, None]
