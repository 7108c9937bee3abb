"""A masked batch as a question to an AR teacher, with the student's own distributions if they are needed.

Shapes: B batch, L length, N positions, n some of them, V vocabulary, K kept tokens.
"""

from __future__ import annotations

import torch

from mdm.denoiser import Denoiser

from .masking import MaskedBatch
from .targets import HeadTargets, Question, SoftTargets, TargetSettings, refuse_nan
from .teachers.ar import ARTeacher
from .teachers.kinds import answer, asks_student
from .teachers.left import left_whole


def soft_targets(
    teacher: ARTeacher,
    batch: MaskedBatch,
    settings: TargetSettings,
    temperature: float,
    student: Denoiser | None = None,
) -> SoftTargets:
    """The teacher's answer for the distilled positions of a batch, in the precision of its weights.

    `student` is asked for its own distributions if the target needs them.
    """
    proposals = None
    if asks_student(settings):
        assert student is not None, "this target needs the student"
        proposals = own_distributions(student, batch, max(PROPOSED, settings.student_candidates))
    question = question_of(batch, proposals)
    with torch.autocast(batch.x0_BL.device.type, enabled=False):
        return answer(teacher, question, settings=settings, temperature=temperature)


def whole_targets(teacher: ARTeacher, batch: MaskedBatch) -> HeadTargets:
    """The teacher's whole next-token distributions (target.kind=left, top_k=0)."""
    with torch.autocast(batch.x0_BL.device.type, enabled=False):
        targets = left_whole(teacher, question_of(batch))
    refuse_nan(targets)
    return targets


def question_of(batch: MaskedBatch, proposals: SoftTargets | None = None) -> Question:
    """What a teacher is asked about a batch."""
    return Question(
        batch.x0_BL,
        batch.masked_BL,
        batch.distilled_BL,
        batch.document_ids_BL,
        batch.keys,
        proposals,
        batch.copies,
    )


PROPOSED = 64  # tokens of the student's distribution that are kept


@torch.no_grad()
def own_distributions(student: Denoiser, batch: MaskedBatch, top_k: int) -> SoftTargets:
    """The student's distributions at all masked positions, from xt alone and without gradient."""

    def likeliest(logits_nV: torch.Tensor) -> torch.Tensor:
        log_probs_nK, ids_nK = logits_nV.log_softmax(-1).topk(min(top_k, logits_nV.shape[-1]))
        return torch.cat([log_probs_nK.double(), ids_nK.double()], dim=-1)  # both exact

    was_training, device = student.training, batch.x0_BL.device.type
    student.eval()
    # Without the cache: weights cast in here have no gradient, and the training forward that follows in
    # the same autocast region would use them (seen in torch before 2.10).
    with torch.autocast(
        device,
        dtype=torch.get_autocast_dtype(device),
        enabled=torch.is_autocast_enabled(device),
        cache_enabled=False,
    ):
        found_N2K = student(
            batch.xt_BL,
            batch.masked_BL,
            document_ids_BL=batch.document_ids_BL,
            score=likeliest,
            **batch.clean,
        )
    student.train(was_training)
    log_probs_NK, ids_NK = found_N2K.chunk(2, dim=-1)
    tail_N = (1 - log_probs_NK.exp().sum(-1)).clamp(min=0)
    return SoftTargets(ids_NK.long(), log_probs_NK.float(), tail_N.float(), 1.0, "visible tokens")
