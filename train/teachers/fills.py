"""Monte-Carlo targets: fill all masks of a region K times from the teacher and weigh the fills.

    q_i(v) = P(x_i = v | visible) = Σ over fills z with z_i = v of P(z | visible)

A fill is drawn left to right, z_j ~ p(· | what stands to its left). That is not a draw from
P(z | visible), since it is blind to what stands to the right; the weight of a fill is the likelihood of
the visible tokens it runs into, w = Π p(x_j | what stands to its left) over visible j.

    importance   K fresh fills, q̂_i = Σ w_k [z_i^k = v] / Σ w_k: consistent, bias of order 1/K
    smc          the same, and fills are drawn anew by weight when the effective number falls below K/2
    i_sir        K - 1 fresh fills and the text's own tokens. If the text is a teacher sample (T = 1) these
                 are a draw from P(z | visible), and the answer is exactly unbiased for every K ≥ 1:
                 K = 1 is the hard target, K → ∞ the soft one (Andrieu, Lee, Vihola, 1312.6432)
    csmc         i_sir with resampling, in which the text's own tokens always survive (conditional SMC,
                 Andrieu, Doucet, Holenstein 2010); as unbiased, with more of the fills in use
    mc_literal   the mean of the next-token heads over K unweighted fills, as published recipes have it.
                 Biased for every K: the head is blind to the right, and so are the fills. For comparison

Where no visible token stands to the right of i, the weights are final and the heads themselves are
averaged, Σ w_k p(v | x_<i^k): the same expectation with less variance (Rao-Blackwell).
With settings.window the weights of position i take evidence up to i + window.
All fills of all rows advance in the same forwards: a drawn token and the visible tokens up to the next
mask are one chunk of a branch (tree.py).
Shapes: B batch, L length, V vocabulary, K fills, W tokens of a chunk, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from mdm.diffusion import generator
from mdm.errors import TrainingError

from ..targets import (
    Question,
    SoftTargets,
    TargetSettings,
    keep_fills,
    keep_top,
    no_targets,
    stack_targets,
)
from .ar import ARTeacher
from .chunks import token_log_probs
from .evidence import Region, describe, in_groups, regions
from .tree import Branch, Tree


@dataclasses.dataclass(frozen=True)
class Rule:
    """How fills are used: weighed by the evidence, the true tokens among them, drawn anew by weight."""

    weighed: bool = True
    pinned: bool = False
    resampled: bool = False


@torch.no_grad()
def filled(
    teacher: ARTeacher,
    question: Question,
    *,
    settings: TargetSettings,
    temperature: float,
    rule: Rule,
) -> SoftTargets:
    """The Monte-Carlo target at every wanted position, by one of the rules above.

    Where every fill is impossible the left-only target stands in; `measures["fell_back"]` says so.
    """
    seen = describe(settings, others=settings.fill == "span")
    conditioned_on = seen if rule.weighed else "left, masks filled"
    todo = regions(question, settings)
    if not todo:
        return no_targets(question.x0_BL.device, temperature, conditioned_on)
    tree, answers = opened(teacher, question, todo, settings, temperature)
    for group in in_groups(todo, settings):
        fill(
            teacher,
            tree,
            [Filling(region, question, settings, rule, tree) for region in group],
            answers,
        )
    return answers.result(conditioned_on)


def opened(
    teacher: ARTeacher,
    question: Question,
    todo: Sequence[Region],
    settings: TargetSettings,
    temperature: float,
) -> tuple[Tree, Answers]:
    """The clean rows, ready for fills of these regions, and an empty sheet for the answers."""
    asked_BL = question.wanted_BL.clone()  # left-only stands in where every fill is impossible
    for region in todo:
        asked_BL[region.row, region.holes[0]] = True
    tree = Tree(teacher, question.x0_BL, question.document_ids_BL, asked_BL)
    return tree, Answers(teacher, tree, settings, temperature, int(question.wanted_BL.sum()))


def fill(teacher: ARTeacher, tree: Tree, fillings: Sequence[Filling], answers: Answers) -> None:
    """All fillings from their first hole to their last, side by side."""
    step = 0
    while live := [filling for filling in fillings if step < len(filling.holes)]:
        for filling in live:
            filling.draw(step, teacher, answers)
        moving = [filling for filling in live if len(filling.chunk_KW[0])]
        if moving:
            grown, rows = tree.extend(
                [branch for filling in moving for branch in filling.branches],
                [chunk_W for filling in moving for chunk_W in filling.chunk_KW],
            )
            for filling in moving:
                count = len(filling.branches)
                own, grown = grown[:count], grown[count:]
                own_rows, rows = rows[:count], rows[count:]
                filling.advance(step, teacher, own, torch.stack(own_rows), answers)
        step += 1


class Answers:
    """Collects the answers position by position."""

    def __init__(
        self,
        teacher: ARTeacher,
        tree: Tree,
        settings: TargetSettings,
        temperature: float,
        count: int,
    ) -> None:
        self._teacher, self._tree = teacher, tree
        self._options: dict[str, Any] = {
            "top_k": settings.top_k,
            "top_p": settings.top_p,
            "temperature": temperature,
            "conditioned_on": "",
        }
        self._rows: list[SoftTargets | None] = [None] * count

    def mean_of_heads(
        self, index: int, log_probs_KV: torch.Tensor, log_weights_K: torch.Tensor
    ) -> None:
        """Σ w_k p_k(v) / Σ w_k. The weights must not all be 0."""
        share_K = log_weights_K.log_softmax(0)
        mean_1V = (share_K[:, None] + log_probs_KV).logsumexp(0, keepdim=True)
        self._put(index, keep_top(mean_1V, **self._options), ess(log_weights_K))

    def fills(
        self, index: int, row: int, position: int, tokens_K: torch.Tensor, log_w_K: torch.Tensor
    ) -> None:
        """The weighted tokens themselves; left-only if every weight is 0.

        Raises TrainingError if the teacher's probabilities are not numbers.
        """
        if bool(log_w_K.isnan().any()):
            raise TrainingError(
                f"the teacher's log-probabilities are NaN near position {position} of a row; load it"
                " with teacher.dtype=fp32"
            )
        if bool(log_w_K.max() > float("-inf")):
            found = keep_fills(tokens_K[None], log_w_K.log_softmax(0)[None], **self._options)
            self._put(index, found, ess(log_w_K))
        else:
            scores_1V = self._teacher.head(self._tree.trunk(row, position))
            self._put(index, keep_top(scores_1V, **self._options), float("nan"), fell_back=1.0)

    def _put(
        self, index: int, found: SoftTargets, effective: float, *, fell_back: float = 0.0
    ) -> None:
        like_1 = found.tail_mass_N
        measures = {
            "ess": torch.full_like(like_1, effective),
            "fell_back": torch.full_like(like_1, fell_back),
        }
        self._rows[index] = dataclasses.replace(found, measures=measures)

    def result(self, conditioned_on: str) -> SoftTargets:
        """All answers, in the order of the positions asked for."""
        rows = [row for row in self._rows if row is not None]
        assert len(rows) == len(self._rows), "a position without an answer"
        return dataclasses.replace(stack_targets(rows), conditioned_on=conditioned_on)


class Filling:
    """K fills of one region on their way from left to right."""

    def __init__(
        self, region: Region, question: Question, settings: TargetSettings, rule: Rule, tree: Tree
    ) -> None:
        self.holes, self._region, self._rule = region.holes, region, rule
        self._x0_L = question.x0_BL[region.row]
        device, fills = self._x0_L.device, settings.fills
        uniforms = uniforms_LK(question, region.row, fills)
        self._uniforms_HK = uniforms[list(region.holes)].to(device)
        self._resampling = generator("resample", *question.keys[region.row], region.holes[0])
        self.branches: list[Branch] = [tree.branch(region.row, self.holes[0])] * fills
        self._heads_KD = tree.trunk(region.row, self.holes[0]).expand(fills, -1)
        self.chunk_KW: torch.Tensor = torch.empty(fills, 0, dtype=torch.long, device=device)
        self._tokens_KH = torch.zeros(fills, len(self.holes), dtype=torch.long, device=device)
        self._log_w_K = torch.zeros(fills, dtype=torch.float64, device=device)

    def draw(self, step: int, teacher: ARTeacher, answers: Answers) -> None:
        """A token for the next hole in every fill, and the chunk that has to be read for it."""
        hole = self.holes[step]
        first_U, alike_K = distinct(self.branches)  # equal fills have one head
        log_probs_UV = teacher.head(self._heads_KD[first_U]).double().log_softmax(-1)
        log_probs_KV = log_probs_UV[alike_K]
        tokens_K = draw_tokens(log_probs_KV, self._uniforms_HK[step])
        if self._rule.pinned:
            tokens_K[0] = self._x0_L[hole]
        self._tokens_KH[:, step] = tokens_K
        if hole in self._region.wanted:
            index, end = self._region.wanted[hole]
            possible = bool(self._log_w_K.max() > float("-inf"))
            if possible and (end == hole or not self._rule.weighed):
                answers.mean_of_heads(index, log_probs_KV, self._log_w_K)
            elif end == hole:
                answers.fills(index, self._region.row, hole, tokens_K, self._log_w_K)
        last = step + 1 == len(self.holes)
        stop = self._last_needed() if last else self.holes[step + 1]
        follow_W = self._x0_L[hole + 1 : stop].expand(len(tokens_K), -1)
        chunk_KW = torch.cat([tokens_K[:, None], follow_W], dim=1)
        self.chunk_KW = chunk_KW if stop > hole else chunk_KW[:, :0]

    def _last_needed(self) -> int:
        """The position whose prediction is the last one needed; the last hole's own needs nothing more."""
        return self._region.end if self._rule.weighed else self.holes[-1]

    def advance(
        self,
        step: int,
        teacher: ARTeacher,
        branches: Sequence[Branch],
        rows_KWD: torch.Tensor,
        answers: Answers,
    ) -> None:
        """Take in the outputs of the chunk: weigh the visible tokens that were met."""
        self.branches, hole = list(branches), self.holes[step]
        last = step + 1 == len(self.holes)
        scored = rows_KWD.shape[1] - (0 if last else 1)  # the last output is the next hole's head
        self._heads_KD = rows_KWD[:, -1]
        if self._rule.weighed and scored:
            truth_W = self._x0_L[hole + 1 : hole + 1 + scored]
            first_U, alike_K = distinct(self.branches)
            gains_UW = log_probs_of(teacher, rows_KWD[first_U, :scored], truth_W).cumsum(1)
            gains_KW = gains_UW[alike_K]
            for position, (index, end) in self._region.wanted.items():
                if position <= hole < end <= hole + scored:
                    log_w_K = self._log_w_K + gains_KW[:, end - hole - 1]
                    tokens_K = self._tokens_KH[:, self.holes.index(position)]
                    answers.fills(index, self._region.row, position, tokens_K, log_w_K)
            self._log_w_K = self._log_w_K + gains_KW[:, -1]
        if self._rule.resampled and not last:
            self._resample()

    def _resample(self) -> None:
        """Draw the fills anew in proportion to their weights, if few of them carry the weight."""
        fills = len(self._log_w_K)
        possible = bool(self._log_w_K.max() > float("-inf"))
        if not possible or ess(self._log_w_K) >= fills / 2:
            return
        if self._rule.pinned:  # conditional: fill 0 stays, the others are drawn independently
            uniforms_K = torch.rand(fills, dtype=torch.float64, generator=self._resampling)
        else:  # systematic
            u = torch.rand((), dtype=torch.float64, generator=self._resampling)
            uniforms_K = (torch.arange(fills) + u) / fills
        parents_K = inverse_cdf(self._log_w_K.softmax(0), uniforms_K.to(self._log_w_K.device))
        if self._rule.pinned:
            parents_K[0] = 0
        self.branches = [self.branches[parent] for parent in parents_K.tolist()]
        self._tokens_KH = self._tokens_KH[parents_K]
        self._heads_KD = self._heads_KD[parents_K]
        self._log_w_K = torch.zeros_like(self._log_w_K)


def distinct(branches: Sequence[Branch]) -> tuple[list[int], list[int]]:
    """Places of the distinct branches, and for each branch its number among them."""
    first: dict[int, int] = {}
    for place, branch in enumerate(branches):
        first.setdefault(id(branch), place)
    number = {key: n for n, key in enumerate(first)}
    return list(first.values()), [number[id(branch)] for branch in branches]


def uniforms_LK(question: Question, row: int, fills: int) -> torch.Tensor:
    """(L, K) float64 uniforms for the fills of a row: a function of the row's key alone."""
    random = generator("fill", *question.keys[row])
    return torch.rand(question.x0_BL.shape[1], fills, dtype=torch.float64, generator=random)


def draw_tokens(log_probs_KV: torch.Tensor, uniforms_K: torch.Tensor) -> torch.Tensor:
    """(K,) a token from each row of probabilities."""
    return inverse_cdf(log_probs_KV.exp(), uniforms_K[:, None])[:, 0]


def inverse_cdf(probs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Indices drawn by uniforms in [0, 1) from (unnormalised) probabilities in the last dimension.

    Never an index of probability 0.
    """
    cdf = probs.cumsum(-1).contiguous()
    found = torch.searchsorted(cdf, (uniforms * cdf[..., -1:]).contiguous(), right=True)
    return found.clamp(max=probs.shape[-1] - 1)


def ess(log_weights_K: torch.Tensor) -> float:
    """Effective sample size (Σ w)² / Σ w², between 1 and K (Kong 1992)."""
    return float((2 * log_weights_K.logsumexp(0) - (2 * log_weights_K).logsumexp(0)).exp())


def log_probs_of(
    teacher: ARTeacher, rows_KWD: torch.Tensor, tokens_W: torch.Tensor
) -> torch.Tensor:
    """(K, W) log-probability of token w under output w of every branch."""
    fills, width = rows_KWD.shape[:2]
    tokens_N = tokens_W.expand(fills, -1).reshape(-1)
    return token_log_probs(teacher, rows_KWD.flatten(0, 1), tokens_N).reshape(fills, width)
