"""Left-only targets: q(v) = p(v | clean tokens to the left). One causal pass, whatever the masks.

Unbiased for the posterior of a masked token only where no visible token lies to its right.
Shapes: N positions asked for, n a chunk of them, D width.
"""

from __future__ import annotations

import torch

from ..targets import HeadTargets, Question, SoftTargets, TargetSettings, keep_top
from .ar import ARTeacher
from .chunks import in_chunks


@torch.no_grad()
def left_only(
    teacher: ARTeacher, question: Question, *, settings: TargetSettings, temperature: float
) -> SoftTargets:
    """The teacher's next-token distribution at every wanted position."""
    rows_ND = teacher.rows(question.x0_BL, question.wanted_BL, question.document_ids_BL)

    def target(rows_nD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return keep_top(
            teacher.head(rows_nD),
            top_k=settings.top_k,
            top_p=settings.top_p,
            temperature=temperature,
            conditioned_on="left",
        ).tensors

    ids_NK, log_probs_NK, tail_N = in_chunks(target, teacher.num_tokens, rows_ND)
    return SoftTargets(ids_NK, log_probs_NK, tail_N, temperature, "left")


@torch.no_grad()
def left_whole(teacher: ARTeacher, question: Question) -> HeadTargets:
    """The same, all of it: as inputs of the teacher's head, which is called in its own precision."""

    def logits(rows_nD: torch.Tensor) -> torch.Tensor:
        with torch.autocast(rows_nD.device.type, enabled=False):
            return teacher.head(rows_nD)

    rows_ND = teacher.rows(question.x0_BL, question.wanted_BL, question.document_ids_BL)
    return HeadTargets(rows_ND, logits, "left")
