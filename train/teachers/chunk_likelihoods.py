"""A diffusion teacher with another tokenizer: how likely it finds the text of each masked chunk (CALM).

A chunk is the shortest run of bytes on whose ends both tokenizations agree (alignment.py). The student's
masks cover whole chunks (masks.where=chunks…); the teacher reads the same text in its own tokens with
the same chunks masked, and answers with the sum of log p(true token | what it saw) over its tokens of each.
Tokens of the text that lie in no chunk, cut by the edge of a piece, are always masked to it, and so is its
end token: they could tell of what the student cannot see. What of the student's is in no chunk (its end
token) has no target and is learnt from the cross-entropy alone, as in TIDE (arXiv 2604.26951).
Where teacher or student has blocks, a chunk over the edge of a block is not scored under one input: its
tokens behind the edge see those before it clean. And as the two have grids of their own, what is masked
in the student's block can stand clean in an earlier block of the teacher's. Both lie in the method.
Shapes: B batch, L the student's length, M the teacher's, N the student's masked positions, C masked chunks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mdm.denoiser import Denoiser
from mdm.diffusion import apply_mask

from ..comp_demo import halves
from ..masking import MaskedBatch
from ..readings import ReadingBatch, Readings, chunks
from ..targets import ChunkTargets, TargetSettings, refuse_nan
from .denoised import DiffusionTeacher, conditioned_on, demo_uniforms

NO_CHUNK = -1
IMPOSSIBLE = -1e4  # nats; a token the teacher never writes (its mask, spelt out in a text) has -inf


def ask_chunks(
    teacher: DiffusionTeacher, readings: Readings, settings: TargetSettings
) -> Callable[[MaskedBatch, Denoiser | None], ChunkTargets]:
    """How a step asks a teacher that reads the rows of a batch in its own tokens."""

    def ask(batch: MaskedBatch, _student: Denoiser | None) -> ChunkTargets:
        assert batch.chunk_BL is not None, "masks by chunk number the chunks"
        device = batch.x0_BL.device
        reading = ReadingBatch(*(tensor.to(device) for tensor in readings.batch(batch.rows)))
        _, chunk_BM = chunks(reading, batch.document_ids_BL.cpu())
        targets = chunk_targets(teacher.denoiser, batch, reading, chunk_BM.to(device), settings)
        refuse_nan(targets)
        return targets

    return ask


def chunk_targets(
    denoiser: Denoiser,
    batch: MaskedBatch,
    reading: ReadingBatch,
    chunk_BM: torch.Tensor,
    settings: TargetSettings,
) -> ChunkTargets:
    """The teacher's log-likelihoods of the masked chunks of a batch; `chunk_BM` numbers its tokens'."""
    assert batch.chunk_BL is not None
    chunk_N = batch.chunk_BL[batch.masked_BL]
    ids_C, number_N = chunk_N.unique(return_inverse=True)
    if len(ids_C) and ids_C[0] == NO_CHUNK:
        ids_C, number_N = ids_C[1:], number_N - 1
    index_N = torch.arange(len(number_N), device=number_N.device)
    inside_N = number_N >= 0
    first_C = torch.full_like(ids_C, len(number_N)).scatter_reduce(
        0, number_N[inside_N], index_N[inside_N], "amin"
    )
    likelihood_C = torch.zeros(len(ids_C), device=chunk_BM.device)
    always_BM = _always_masked(reading, chunk_BM)
    for part_C in _parts(batch, settings, ids_C):
        asked_BM = torch.isin(chunk_BM, ids_C[part_C])
        log_prob_K = _log_probs(denoiser, reading, asked_BM | always_BM, asked_BM)
        place_K = torch.searchsorted(ids_C, chunk_BM[asked_BM])
        likelihood_C.index_add_(0, place_K, log_prob_K)
    return ChunkTargets(
        likelihood_C.clamp(min=IMPOSSIBLE),
        number_N,
        first_C,
        conditioned_on(denoiser, settings),
        {"answered": inside_N.float()},
    )


def _parts(batch: MaskedBatch, settings: TargetSettings, ids_C: torch.Tensor) -> list[torch.Tensor]:
    """(C,) bool for each pass: the chunks it asks for; with CompDemo the others show their text."""
    if not settings.comp_demo:
        return [torch.ones_like(ids_C, dtype=torch.bool)]
    assert batch.chunk_BL is not None
    exact, share = settings.comp_demo == "exact", settings.comp_demo_share
    parts = halves(batch.masked_BL, demo_uniforms(batch), share, exact, batch.chunk_BL)
    return [torch.isin(ids_C, batch.chunk_BL[part_BL]) for part_BL in parts]


def _always_masked(reading: ReadingBatch, chunk_BM: torch.Tensor) -> torch.Tensor:
    """(B, M) bool: text in no chunk, and the end token that stands behind a text."""
    text_BM = reading.starts_BM >= 0
    behind_BM = torch.zeros_like(text_BM)
    same_BM = reading.document_ids_BM[:, 1:] == reading.document_ids_BM[:, :-1]
    behind_BM[:, 1:] = text_BM[:, :-1] & ~text_BM[:, 1:] & same_BM
    return (text_BM & (chunk_BM == NO_CHUNK)) | behind_BM


@torch.no_grad()
def _log_probs(
    denoiser: Denoiser, reading: ReadingBatch, masked_BM: torch.Tensor, asked_BM: torch.Tensor
) -> torch.Tensor:
    """(K,) log p of the true tokens asked for, float32."""
    tokens_BM = reading.tokens_BM
    xt_BM = apply_mask(tokens_BM, masked_BM, denoiser.mask_id)

    def score(logits_nV: torch.Tensor, token_n: torch.Tensor) -> torch.Tensor:
        return logits_nV.gather(1, token_n[:, None])[:, 0] - logits_nV.logsumexp(-1)

    with torch.autocast(tokens_BM.device.type, enabled=False):
        return denoiser(
            xt_BM,
            asked_BM,
            x0_bL=None if denoiser.block_size is None else tokens_BM,
            document_ids_BL=reading.document_ids_BM,
            score=score,
            score_inputs=(tokens_BM[asked_BM],),
        )
