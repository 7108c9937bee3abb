"""Hidden states of a teacher with another tokenizer, averaged over the chunk a student token lies in.

The states are those the teacher predicts the chunk's tokens from, so they hold what it knows by the left
side, as its left-only distributions do; both need no token in common.
Shapes: N positions asked for, B batch, L length, M tokens of a reading, C the teacher's width.
"""

from __future__ import annotations

import torch

from ..readings import ReadingBatch, chunks
from ..targets import StateTargets
from .ar import ARTeacher


@torch.no_grad()
def states(
    teacher: ARTeacher,
    reading: ReadingBatch,
    wanted_BL: torch.Tensor,
    document_ids_BL: torch.Tensor,
) -> StateTargets:
    """The mean state of the teacher's chunk at every wanted position; measures: `answered`."""
    device = wanted_BL.device
    chunk_BL, chunk_BM = (found.to(device) for found in chunks(reading, document_ids_BL.cpu()))
    chunk_N = chunk_BL[wanted_BL]
    asked_BM = torch.isin(chunk_BM, chunk_N) & (chunk_BM >= 0)
    rows_TC = teacher.rows(reading.tokens_BM, asked_BM, reading.document_ids_BM).float()
    number = int(chunk_BM.max()) + 1
    sums_KC = rows_TC.new_zeros(max(1, number), rows_TC.shape[1])
    counts_K = rows_TC.new_zeros(len(sums_KC))
    sums_KC.index_add_(0, chunk_BM[asked_BM], rows_TC)
    counts_K.index_add_(0, chunk_BM[asked_BM], torch.ones_like(rows_TC[:, 0]))
    answered_N = chunk_N >= 0
    means_KC = sums_KC / counts_K.clamp(min=1)[:, None]
    states_NC = means_KC[chunk_N.clamp(min=0)] * answered_N[:, None]
    return StateTargets(states_NC, answered_N, "left", {"answered": answered_N.float()})
