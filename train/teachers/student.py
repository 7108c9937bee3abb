"""Monte-Carlo targets with the student's own marginals as proposal: one parallel teacher forward.

K fills of a region are drawn from r = Π r_j, the student's distributions at the masks (each mixed with
a little of the uniform one, so that nothing is impossible to correct), and all K completed texts are
scored at once: w = p(completed region) / r(fill). No sequential decoding. Self-normalised, so consistent
with a bias of order 1/K; with the text's own tokens among the fills (`reference`) it is i-SIR, exactly
unbiased for every K if the text is a teacher sample (fills.py). The weighted cross-entropy is the wake
phase of Reweighted Wake-Sleep (Bornschein and Bengio, 1406.2751). r must depend on xt alone: it is made
without gradient, from the masked rows. What limits it is how strongly the masks depend on one another,
which a product of marginals does not know: see the effective number of fills.
Shapes: K fills, H holes, S tokens the student keeps, W tokens of a branch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..targets import NOT_KEPT, Question, SoftTargets, TargetSettings, no_targets
from .ar import ARTeacher
from .chunks import token_log_probs
from .evidence import Region, describe, in_groups, regions
from .fills import Answers, inverse_cdf, opened, uniforms_LK
from .tree import Tree


@torch.no_grad()
def student_proposed(
    teacher: ARTeacher, question: Question, *, settings: TargetSettings, temperature: float
) -> SoftTargets:
    """The weighted fills of the student at every wanted position."""
    assert question.proposals is not None, "the student was not asked"
    seen = describe(settings, others=settings.fill == "span")
    todo = regions(question, settings)
    if not todo:
        return no_targets(question.x0_BL.device, temperature, seen)
    tree, answers = opened(teacher, question, todo, settings, temperature)
    for group in in_groups(todo, settings):
        fill_at_once(teacher, question, group, tree, settings, answers)
    return answers.result(seen)


def fill_at_once(
    teacher: ARTeacher,
    question: Question,
    todo: Sequence[Region],
    tree: Tree,
    settings: TargetSettings,
    answers: Answers,
) -> None:
    """Propose, score in one forward, and answer for these regions."""
    drawn = [propose(teacher, question, region, settings) for region in todo]
    branches, tokens = [], []
    for region, (tokens_KH, _) in zip(todo, drawn, strict=True):
        start, stop = region.holes[0], region.end  # nothing needs the output of the last token
        text_KW = question.x0_BL[region.row, start:stop].expand(settings.fills, -1).clone()
        inside = [h for h in region.holes if h < stop]
        text_KW[:, [h - start for h in inside]] = tokens_KH[:, : len(inside)]
        if text_KW.shape[1]:
            branches += [tree.branch(region.row, start)] * settings.fills
            tokens += list(text_KW)
    rows = tree.extend(branches, tokens)[1] if branches else []
    for region, (tokens_KH, log_r_KH) in zip(todo, drawn, strict=True):
        count = settings.fills if region.end > region.holes[0] else 0
        own, rows = rows[:count], rows[count:]
        weigh(teacher, question, region, tree, tokens_KH, log_r_KH, own, answers)


def propose(
    teacher: ARTeacher, question: Question, region: Region, settings: TargetSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """(K, H) tokens for the holes of a region, and the log-probability with which each was proposed."""
    proposals = question.proposals
    assert proposals is not None, "the student was not asked"
    masked_L = question.masked_BL[region.row]
    first = int(question.masked_BL[: region.row].sum())
    place_H = first + (masked_L.cumsum(0) - 1)[list(region.holes)]
    ids_HS, log_r_HS = proposals.token_ids_NK[place_H], proposals.log_probs_NK[place_H].double()
    allowed_HS = ids_HS < teacher.num_tokens
    if teacher.mask_id is not None:
        allowed_HS = allowed_HS & (ids_HS != teacher.mask_id)
    log_r_HS = log_r_HS.masked_fill(~allowed_HS, NOT_KEPT).log_softmax(-1)
    # A hole for which the student proposes nothing that may stand there gets uniform draws.
    mix_H = torch.where(allowed_HS.any(-1), settings.uniform_mix, 1.0).double()
    log_r_HS = log_r_HS.nan_to_num(NOT_KEPT, neginf=NOT_KEPT)
    uniforms_KH = uniforms_LK(question, region.row, settings.fills)[list(region.holes)].T
    uniforms_KH = uniforms_KH.to(ids_HS.device)
    tokens_KH = mixture_draws(ids_HS, log_r_HS, uniforms_KH, mix_H, teacher)
    if settings.reference:
        tokens_KH[0] = question.x0_BL[region.row, list(region.holes)]
    same_KHS = tokens_KH[:, :, None] == ids_HS
    r_KH = torch.where(same_KHS, log_r_HS.exp(), 0.0).sum(-1)
    return tokens_KH, ((1 - mix_H) * r_KH + mix_H / num_allowed(teacher)).log()


def num_allowed(teacher: ARTeacher) -> int:
    """Tokens that may stand in a text."""
    return teacher.num_tokens - (teacher.mask_id is not None)


def mixture_draws(
    ids_HS: torch.Tensor,
    log_r_HS: torch.Tensor,
    uniforms_KH: torch.Tensor,
    mix_H: torch.Tensor,
    teacher: ARTeacher,
) -> torch.Tensor:
    """(K, H) draws from (1 - mix) · r + mix · uniform: the first part of [0, 1) is the uniform's."""
    any_KH = (uniforms_KH / mix_H * num_allowed(teacher)).long().clamp(max=num_allowed(teacher) - 1)
    if teacher.mask_id is not None:
        any_KH = any_KH + (any_KH >= teacher.mask_id)
    # Where mix is 1 this part is never used. Below 1, or rounding could choose a slot of probability 0.
    rest_KH = ((uniforms_KH - mix_H) / (1 - mix_H)).nan_to_num(0).clamp(0, 1 - 2**-53)
    slots_HK = inverse_cdf(log_r_HS.exp(), rest_KH.T).clamp(max=ids_HS.shape[1] - 1)
    own_KH = ids_HS.gather(1, slots_HK).T
    return torch.where(uniforms_KH < mix_H, any_KH, own_KH)


def weigh(
    teacher: ARTeacher,
    question: Question,
    region: Region,
    tree: Tree,
    tokens_KH: torch.Tensor,
    log_r_KH: torch.Tensor,
    rows: list[torch.Tensor],
    answers: Answers,
) -> None:
    """Answer the wanted positions of a region from its scored fills."""
    fills, start, row = len(tokens_KH), region.holes[0], region.row
    x0_L = question.x0_BL[row]
    heads = [tree.trunk(row, start).expand(fills, 1, -1)]
    heads += [torch.stack(rows)] if rows else []
    heads_KWD = torch.cat(heads, dim=1)
    text_KW = x0_L[start : region.end + 1].expand(fills, -1).clone()
    text_KW[:, [h - start for h in region.holes]] = tokens_KH
    log_p_N = token_log_probs(teacher, heads_KWD.flatten(0, 1), text_KW.flatten())
    log_p_KW = log_p_N.reshape(text_KW.shape)
    log_r_KW = torch.zeros_like(log_p_KW)
    log_r_KW[:, [h - start for h in region.holes]] = log_r_KH
    log_w_KW = F.pad((log_p_KW - log_r_KW).cumsum(1), (1, 0))  # column w: of the first w tokens
    for position, (index, end) in region.wanted.items():
        before_K = log_w_KW[:, position - start]
        if end == position and bool(before_K.max() > NOT_KEPT):
            log_probs_KV = teacher.head(heads_KWD[:, position - start]).double().log_softmax(-1)
            answers.mean_of_heads(index, log_probs_KV, before_K)
        else:
            tokens_K = tokens_KH[:, region.holes.index(position)]
            answers.fills(index, row, position, tokens_K, log_w_KW[:, end - start + 1])
