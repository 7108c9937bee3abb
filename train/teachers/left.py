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
    rows_ND = rows_asked(teacher, question)

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

    return HeadTargets(rows_asked(teacher, question), logits, "left")


def rows_asked(teacher: ARTeacher, question: Question) -> torch.Tensor:
    """(N, D) head inputs for the wanted positions; copies of a row are read once, masks do not matter."""
    rows = len(question.x0_BL) // question.copies
    needed_bL = question.wanted_BL.view(question.copies, rows, -1).any(0)
    found_MD = teacher.rows(question.x0_BL[:rows], needed_bL, question.document_ids_BL[:rows])
    number_bL = needed_bL.flatten().cumsum(0).view_as(needed_bL) - 1
    return found_MD[number_bL.repeat(question.copies, 1)[question.wanted_BL]]
