"""Masks that never cut a chunk: all tokens of a chunk are masked, or none.

Needed where teacher and student have different tokens for a text (alignment.py, calm.py): a chunk half
hidden from one of them would be a different question to the other. Two ways, and what the expected weight
of a token becomes, ∫ P(masked at t) w(t) dt, which is 1 in the likelihood bound:

    masks                          P(n tokens masked)  weight              expected weight
    `shared_uniforms`              t                   1/t                 1
    `any_of_chunk`, as published   1 - (1-t)^n         1/t                 H_n = 1 + 1/2 + … + 1/n
    `any_of_chunk`, corrected      1 - (1-t)^n         `corrected_weight`  1

H_n counts the tokens of long chunks more than once. 1 / (1 - (1-t)^n) would have expected weight 1 too,
but integrates over t, not over the mask probability m of the chunk: only m'(t) / m(t) (MDLM, arXiv
2406.07524, eq. 10) is the chain rule over random orders of the chunks. Both forms with expected weight 1
in the table are the bound of a decoder that fills a chunk at once, its tokens independently. It is told the
chunks: where they end was read off the text, and masks show it, so for a decoder that does not know
them this is no bound. `any_of_chunk` with 1/t is what TIDE's code does (arXiv 2604.26951).

`chunk_BL` are the chunks of the tokens, any numbers >= 0, another one in each row; -1: on its own.
Shapes: B batch, L length.
"""

from __future__ import annotations

import torch


def first_of_chunk(chunk_BL: torch.Tensor) -> torch.Tensor:
    """(B, L) int64 the place, in the flattened batch, of the first token of each token's chunk."""
    chunk_N, index_N = chunk_BL.flatten(), torch.arange(chunk_BL.numel(), device=chunk_BL.device)
    alone_N = -1 - index_N  # a number of its own for each token that is in no chunk
    ids, segment_N = torch.where(chunk_N < 0, alone_N, chunk_N).unique(return_inverse=True)
    first = torch.full_like(ids, chunk_BL.numel()).scatter_reduce(0, segment_N, index_N, "amin")
    return first[segment_N].view_as(chunk_BL)


def shared_uniforms(uniforms_BL: torch.Tensor, chunk_BL: torch.Tensor) -> torch.Tensor:
    """(B, L) every token has the uniform of the first one of its chunk: chunks are masked as one token."""
    return uniforms_BL.flatten()[first_of_chunk(chunk_BL)]


def any_of_chunk(masked_BL: torch.Tensor, chunk_BL: torch.Tensor) -> torch.Tensor:
    """(B, L) bool: masked, or in one chunk with a masked token; as published."""
    first_BL = first_of_chunk(chunk_BL)
    hit_N = torch.zeros(masked_BL.numel(), dtype=torch.bool, device=masked_BL.device)
    hit_N[first_BL[masked_BL]] = True
    return hit_N[first_BL]


def chunk_sizes(chunk_BL: torch.Tensor) -> torch.Tensor:
    """(B, L) int64 the number of tokens in each token's chunk; 1 for a token on its own."""
    first_BL = first_of_chunk(chunk_BL)
    return first_BL.flatten().bincount()[first_BL]


def published_bias(n: int) -> float:
    """H_n: how often a token of an n-token chunk counts with `any_of_chunk` and the weight 1/t."""
    return sum(1 / k for k in range(1, n + 1))


def corrected_weight(t_B: torch.Tensor, sizes_BL: torch.Tensor) -> torch.Tensor:
    """(B, L) weight of the bound with `any_of_chunk`: n (1-t)^(n-1) / (1 - (1-t)^n), 1/t for n = 1.

    t in (0, 1] is the probability that a token is drawn itself, sizes are of `chunk_sizes`. Where t is
    not the noise level but a function of it (another schedule than linear), multiply by its derivative.
    """
    t_B1 = t_B[:, None]
    masked_BL = -torch.expm1(sizes_BL * torch.log1p(-t_B1))  # 1 - (1-t)^n, exact for small t
    return sizes_BL * (1 - t_B1) ** (sizes_BL - 1) / masked_BL
