"""Answers with many fills, in two independent halves: what soft targets are compared with.

Shapes: N positions asked for, V teacher vocabulary, K kept tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from mdm.train.targets import Question, SoftTargets, TargetSettings
from mdm.train.teachers.ar import ARTeacher
from mdm.train.teachers.kinds import answer

if TYPE_CHECKING:
    from .targets import TargetsBench

PILOTS = 1  # rounds in which the proposal of the adaptive reference learns
PROPOSED = 256  # tokens a position that it proposes, besides a uniform share


def with_draw(question: Question, draw: int) -> Question:
    """The question with the random numbers of a draw. Estimators have 0, 1, …; references less."""
    return dataclasses.replace(question, keys=tuple((*key, draw) for key in question.keys))


def left_only(teacher: ARTeacher, question: Question) -> torch.Tensor:
    """(N, V) the whole left-only distribution at the wanted positions."""
    whole = TargetSettings(top_k=teacher.num_tokens)
    left = answer(teacher, question, settings=whole, temperature=1.0)
    empty_NV = torch.zeros(len(left), teacher.num_tokens, dtype=torch.float64)
    return empty_NV.scatter_(1, left.token_ids_NK.cpu(), left.log_probs_NK.cpu().double().exp())


def many_fills(
    teacher: ARTeacher,
    question: Question,
    settings: TargetsBench,
    left_NV: torch.Tensor,
    *,
    kind: str,
) -> list[SoftTargets]:
    """Both halves of a reference by one of the estimators. i_sir and csmc put the text into both."""
    target = _reference_settings(teacher, settings, kind=kind)
    return [
        answer(teacher, with_draw(question, draw), settings=target, temperature=1.0)
        for draw in (-1, -2)
    ]


def adaptive(
    teacher: ARTeacher, question: Question, settings: TargetsBench, left_NV: torch.Tensor
) -> list[SoftTargets]:
    """Both halves by importance sampling with a proposal of independent tokens that has learnt.

    It begins as left-only and suffix scoring with the other masks held at the text, one half each; after
    every pilot the pilot's answer has the larger part of it (population Monte Carlo, Cappé et al. 2004).
    Weights are those of kinds.student, w = p / r, without the text among the fills. The proposal may look
    at the text, since weights correct for whatever it is: consistent, with a bias of order 1 / fills.
    """
    scored = TargetSettings(
        kind="suffix", window=0, candidates=settings.candidates, top_k=settings.candidates
    )
    suffix_NV = dense(answer(teacher, question, settings=scored, temperature=1.0), left_NV)
    target = _reference_settings(teacher, settings, kind="student", reference=False)

    def ask_with(proposal_NV: torch.Tensor, draw: int) -> SoftTargets:
        own = likeliest(proposal_NV, question.x0_BL.device)
        asked = dataclasses.replace(with_draw(question, draw), proposals=own)
        return answer(teacher, asked, settings=target, temperature=1.0)

    proposal_NV = 0.5 * suffix_NV + 0.5 * left_NV
    for pilot in range(PILOTS):
        learnt_NV = dense(ask_with(proposal_NV, -3 - pilot), left_NV)
        proposal_NV = 0.6 * learnt_NV + 0.2 * suffix_NV + 0.2 * left_NV
    return [ask_with(proposal_NV, draw) for draw in (-1, -2)]


def likeliest(proposal_NV: torch.Tensor, device: torch.device) -> SoftTargets:
    """The proposal as a question carries it."""
    probs_NK, ids_NK = proposal_NV.topk(min(PROPOSED, proposal_NV.shape[1]))
    tail_N = (1 - probs_NK.sum(-1)).clamp(min=0).float()
    return SoftTargets(
        ids_NK.to(device), probs_NK.log().float().to(device), tail_N.to(device), 1.0, "proposal"
    )


def _reference_settings(
    teacher: ARTeacher, settings: TargetsBench, **change: Any
) -> TargetSettings:
    return TargetSettings(
        top_k=teacher.num_tokens, window=0, fills=settings.reference_fills // 2, **change
    )


REFERENCES: dict[str, Callable[..., list[SoftTargets]]] = {
    "adaptive": adaptive,
    **{kind: partial(many_fills, kind=kind) for kind in ("importance", "smc", "i_sir", "csmc")},
}


def dense(targets: SoftTargets, left_NV: torch.Tensor) -> torch.Tensor:
    """(N, V) float64 on the CPU: the tail is shared among the tokens not kept, as left-only has them."""
    kept_NV = torch.zeros_like(left_NV)
    kept_NV.scatter_add_(1, targets.token_ids_NK.cpu(), targets.log_probs_NK.cpu().double().exp())
    others_NV = left_NV.masked_fill(kept_NV > 0, 0.0)
    share_NV = others_NV / others_NV.sum(-1, keepdim=True).clamp(min=torch.finfo().tiny)
    return kept_NV + targets.tail_mass_N.cpu().double()[:, None] * share_NV
