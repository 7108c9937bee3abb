"""Who sees whom: from document ids and blocks to attention masks and position ids.

`document_ids_BL` numbers the documents packed into a row; -1 is padding. Two positions may see each
other only if they have the same id, so documents and padding never leak. The mask is a float 4-D
tensor because that is what every attention implementation of `transformers` treats alike (a bool
mask is silently *added* as 0/1 by eager attention).

A block diffusion model reads clean tokens and noisy copies of them. Blocks are counted from the start
of a document. A noisy token sees the clean blocks before its own and, of its own block, tokens of its
own copy; a clean token sees clean ones only. What remains is a property of the model:

    attention       a clean token sees                a noisy token sees of its block
    block           its block and all before          all of it      (BD3LM, arXiv 2503.09573; SDAR)
    context_causal  tokens up to itself               all of it           (NBDiff)
    reordered       tokens up to itself               observed tokens before masked ones, each sort from
                                                      left to right, itself included      (WeDLM)

"reordered" is causal attention over a block whose observed tokens were moved in front of its masks.
Shapes: B batch, L length, Q queries, K keys, N tokens.
"""

from __future__ import annotations

import dataclasses

import torch


def visible(document_ids_BL: torch.Tensor, *, causal: bool) -> torch.Tensor:
    """(B, L, L) bool: may query position q see key position k?"""
    same_BLL = document_ids_BL[:, :, None] == document_ids_BL[:, None, :]
    return same_BLL.tril() if causal else same_BLL


def float_mask(visible_BQK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, 1, Q, K) additive mask: 0 where visible, the most negative finite number elsewhere.

    Not -inf: a row that sees nothing would become NaN.
    """
    hidden = torch.finfo(dtype).min
    mask_BQK = torch.zeros(visible_BQK.shape, dtype=dtype, device=visible_BQK.device)
    return mask_BQK.masked_fill_(~visible_BQK, hidden)[:, None]


@dataclasses.dataclass(frozen=True)
class BlockAttention:
    """What the blocks of a model see, see above."""

    clean_causal: bool
    reordered: bool


FULL = "full"  # no blocks: every token sees its whole document
BLOCK_ATTENTIONS = {
    "block": BlockAttention(clean_causal=False, reordered=False),
    "context_causal": BlockAttention(clean_causal=True, reordered=False),
    "reordered": BlockAttention(clean_causal=True, reordered=True),
}
ATTENTIONS = (FULL, *BLOCK_ATTENTIONS)

CLEAN = 0  # the stream of clean tokens; noisy copies are 1, 2 …


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokens of rows, in any order, and where they stand; all (B, N).

    document  documents packed into a row; -1 is padding
    position  from the start of the document
    stream    CLEAN, or the number of the noisy copy
    masked    bool; the mask token stands here
    """

    document: torch.Tensor
    position: torch.Tensor
    stream: torch.Tensor
    masked: torch.Tensor

    def cat(self, other: Tokens) -> Tokens:
        """These tokens and, after them, the others."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Tokens(*(torch.cat(pair, dim=1) for pair in pairs))


def block_visible(queries: Tokens, keys: Tokens, block_size: int, attention: str) -> torch.Tensor:
    """(B, Q, K) bool: may query q see key k, in a model with blocks?"""
    kind = BLOCK_ATTENTIONS[attention]
    block_BQ1 = (queries.position // block_size)[:, :, None]
    block_B1K = (keys.position // block_size)[:, None]
    clean_BQ1, clean_B1K = (queries.stream == CLEAN)[:, :, None], (keys.stream == CLEAN)[:, None]
    if kind.clean_causal:
        among_clean_BQK = keys.position[:, None] <= queries.position[:, :, None]
    else:
        among_clean_BQK = block_B1K <= block_BQ1
    own_BQK = (keys.stream[:, None] == queries.stream[:, :, None]) & (block_B1K == block_BQ1)
    if kind.reordered:
        rank_BQ, rank_BK = (
            tokens.masked * block_size + tokens.position % block_size for tokens in (queries, keys)
        )
        own_BQK &= rank_BK[:, None] <= rank_BQ[:, :, None]
    to_clean_BQK = torch.where(clean_BQ1, among_clean_BQK, block_B1K < block_BQ1)
    seen_BQK = torch.where(clean_B1K, to_clean_BQK, ~clean_BQ1 & own_BQK)
    return seen_BQK & (queries.document[:, :, None] == keys.document[:, None])


def two_stream(document_ids_bL: torch.Tensor, masked_BL: torch.Tensor) -> Tokens:
    """The tokens (b, (C + 1) L) of [x_t ; … ; x_0]: C noisy copies of b rows, then the clean rows.

    B = C · b; the rows of copy 1 come first in `masked_BL`, then those of copy 2 …
    """
    copies = len(masked_BL) // len(document_ids_bL)
    streams = [*range(1, copies + 1), CLEAN]
    clean_bL = torch.zeros_like(masked_BL[: len(document_ids_bL)])
    return Tokens(
        document_ids_bL.repeat(1, copies + 1),
        positions(document_ids_bL).repeat(1, copies + 1),
        torch.cat([torch.full_like(document_ids_bL, stream) for stream in streams], dim=1),
        torch.cat([*masked_BL.chunk(copies), clean_bL], dim=1),
    )


def positions(document_ids_BL: torch.Tensor) -> torch.Tensor:
    """(B, L) position ids that restart at 0 with every document, so packing changes nothing."""
    length = document_ids_BL.shape[1]
    index_L = torch.arange(length, device=document_ids_BL.device)
    new_BL = torch.ones_like(document_ids_BL, dtype=torch.bool)
    new_BL[:, 1:] = document_ids_BL[:, 1:] != document_ids_BL[:, :-1]
    start_BL = torch.where(new_BL, index_L, torch.zeros_like(document_ids_BL))
    return index_L - start_BL.cummax(dim=1).values


def is_one_full_document(document_ids_BL: torch.Tensor) -> bool:
    """True if no row has padding or a second document, so that no mask is needed."""
    return bool((document_ids_BL == document_ids_BL[:, :1]).all()) and bool(
        (document_ids_BL[:, 0] >= 0).all()
    )
