"""CompDemo, complementary demasking: a teacher that sees masks answers in two passes, each sees more.

The masked positions are split. In the first pass one part is masked and the other shows its true tokens,
in the second the reverse; every position takes its answer from the pass in which it is masked. Two
forwards instead of one, about half the masks in each (TIDE, arXiv 2604.26951, CompDemo: each position by
a coin of ρ = 0.5). The tokens shown are one sample of what could stand there, the right one.

A part may have no position in some row, or in all: that pass then answers nothing for it.
Random numbers come as an argument. Shapes: B batch, L length, N rows of answers, D what a row holds.
"""

from __future__ import annotations

import torch

from mdm.diffusion import mask_exactly

from .chunk_masks import first_of_chunk


def halves(
    masked_BL: torch.Tensor,
    uniforms_BL: torch.Tensor,
    share: float,
    exact: bool,
    chunk_BL: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(one_BL, other_BL) bool: disjoint, together `masked_BL`; what is masked in the two passes.

    A position is in the first with probability `share`, or with `exact` round(share · m) of a row's m
    are (half to even). With chunks (chunk_masks.py) it is the chunks that are drawn and counted: what is
    masked of a chunk stays together.
    """
    assert 0 <= share <= 1, f"share must be in [0, 1]; got {share}"
    if chunk_BL is None:
        chunk_BL = torch.full_like(masked_BL, -1, dtype=torch.int64)
    first_BL = first_of_chunk(chunk_BL.masked_fill(~masked_BL, -1))
    place_BL = torch.arange(masked_BL.numel(), device=masked_BL.device).view_as(masked_BL)
    leads_BL = masked_BL & (first_BL == place_BL)
    if exact:
        count_B = (share * leads_BL.sum(1).double()).round()
        chosen_BL = mask_exactly(count_B, leads_BL, uniforms_BL)
    else:
        chosen_BL = leads_BL & (uniforms_BL < share)
    one_BL = masked_BL & chosen_BL.flatten()[first_BL]
    return one_BL, masked_BL & ~one_BL


def merge(
    masked_BL: torch.Tensor,
    one_BL: torch.Tensor,
    rows_one_ND: torch.Tensor,
    rows_other_ND: torch.Tensor,
) -> torch.Tensor:
    """(N, …) answers for the masked positions from those of the two passes, all in row-major order.

    `rows_one_ND` are for the positions of one_BL, `rows_other_ND` for the other masked ones; any further
    axes, the same in both.
    """
    in_one_N = one_BL[masked_BL]
    counts = int(in_one_N.sum()), int((~in_one_N).sum())
    assert counts[0] == int(one_BL.sum()), "a position of the first pass is not masked"
    assert (len(rows_one_ND), len(rows_other_ND)) == counts, (
        f"answers for {len(rows_one_ND)} and {len(rows_other_ND)} positions; asked for {counts}"
    )
    assert rows_one_ND.dtype == rows_other_ND.dtype, "the passes answer in different types"
    rows_ND = rows_one_ND.new_empty(len(in_one_N), *rows_one_ND.shape[1:])
    rows_ND[in_one_N], rows_ND[~in_one_N] = rows_one_ND, rows_other_ND
    return rows_ND
