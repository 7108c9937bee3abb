"""Suffix-scored targets: q(v) ∝ p(v | left) · p(right | left, v), over the best candidates.

Exact for a single masked token when every token is a candidate and the whole right side is scored
(Bayes' rule). With candidates S the result is q renormalised over S, so its error in total variation
is the posterior mass outside S; `tail_draws` tokens drawn from the others estimate that mass. Other
masked positions hold their true token x0: then this is the full conditional given the other true
tokens, one sample of what the student cannot see. On teacher text (T = 1) that is unbiased, the
Rao-Blackwellised form of the hard target. Nothing is scored where nothing visible stands to the right.

The branch of a candidate is "candidate, then the tokens that follow", on top of the cached prefix; the
true token's branch is the clean text itself and costs nothing.

`prune` > 0 drops candidates early. Over texts drawn from the teacher the posterior mass of a candidate
is a martingale as more of the right side is read (Doob): its expectation at the end is what it is now.
So dropping candidates whose mass is δ in all costs δ of total variation in expectation. The budget is
spread over the rounds, in each of which as much text is read as in all before. On other texts it is a
heuristic; `measures["dropped"]` reports the mass that was dropped.

Shapes: B batch, L length, N positions asked for, C candidates of a position, W branch length, D width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from mdm.diffusion import generator

from ..targets import NOT_KEPT, Question, SoftTargets, TargetSettings, keep_top
from .ar import ARTeacher
from .chunks import in_chunks, token_log_probs
from .evidence import describe, evidence_end
from .fills import inverse_cdf
from .tree import Branch, Tree

FIRST_ROUND = 2  # tokens of a branch in the first round of pruning


@dataclasses.dataclass(frozen=True)
class Candidates:
    """What may stand at each position. A slot with score -inf is unused.

    ids_NC       the tokens
    scores_NC    log p(v | left), float64
    offset_NC    0; for a tail draw, -log of its expected number among the draws
    """

    ids_NC: torch.Tensor
    scores_NC: torch.Tensor
    offset_NC: torch.Tensor


@torch.no_grad()
def suffix_scored(
    teacher: ARTeacher, question: Question, *, settings: TargetSettings, temperature: float
) -> SoftTargets:
    """The suffix-scored distribution at every wanted position."""
    end_BL = evidence_end(question, settings)
    asked_BL = question.wanted_BL | right_sides(question.wanted_BL, end_BL)
    tree = Tree(teacher, question.x0_BL, question.document_ids_BL, asked_BL)
    places = question.wanted_BL.nonzero().tolist()
    found = candidates_of(
        teacher, question, settings, tree.trunk_rows[question.wanted_BL[asked_BL]]
    )
    prior_NC = found.scores_NC.clone()
    clean_BL = clean_log_probs(teacher, question.x0_BL, tree, asked_BL)
    scored = [
        Place(
            n, row, position, int(end_BL[row, position]), found, question.x0_BL[row], clean_BL[row]
        )
        for n, (row, position) in enumerate(places)
    ]
    dropped_N = torch.zeros(len(places), dtype=torch.float64, device=question.x0_BL.device)
    score = score_pruned if settings.prune else score_all
    score(teacher, tree, [place for place in scored if place.length], settings, dropped_N)
    # Where no candidate can be followed by the text, the left side alone has to do.
    impossible_N = found.scores_NC.amax(-1) == NOT_KEPT
    found.scores_NC[impossible_N] = prior_NC[impossible_N]
    tail_NC = torch.zeros_like(found.ids_NC, dtype=torch.bool)
    tail_NC[:, tail_NC.shape[1] - settings.tail_draws :] = True
    best_N1 = found.scores_NC.amax(-1, keepdim=True)  # float32 would round large scores
    targets = keep_top(
        found.scores_NC - best_N1 + temperature * found.offset_NC,
        top_k=settings.top_k,
        top_p=settings.top_p,
        temperature=temperature,
        conditioned_on=describe(settings, others=True),
        token_ids_NV=found.ids_NC,
        tail_NV=tail_NC,
    )
    measures = {"fell_back": impossible_N.float()}
    if settings.tail_draws:
        log_q_NC = (found.scores_NC + found.offset_NC).log_softmax(-1)
        measures["outside"] = log_q_NC.exp().masked_fill(~tail_NC, 0).sum(-1).float()
    if settings.prune:
        measures["dropped"] = dropped_N.float()
    return dataclasses.replace(targets, measures=measures)


# --- candidates -------------------------------------------------------------------------------------


def candidates_of(
    teacher: ARTeacher,
    question: Question,
    settings: TargetSettings,
    rows_ND: torch.Tensor,
) -> Candidates:
    """The teacher's likeliest tokens by the left side, with the true one; the student's; tail draws."""
    kept = min(settings.candidates, teacher.num_tokens)
    students_NS = student_tokens(question, settings.student_candidates, teacher.num_tokens)
    uniforms_NM = _tail_uniforms(question, settings.tail_draws)

    def chosen(
        rows_nD: torch.Tensor, true_n: torch.Tensor, own_nS: torch.Tensor, u_nM: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        log_probs_nV = teacher.head(rows_nD).double().log_softmax(-1)
        best_nK = with_true_token(log_probs_nV.topk(kept, dim=-1).indices, true_n)
        own_nS = torch.where(own_nS < 0, best_nK[:, :1], own_nS)
        ids_nC = torch.cat([best_nK, own_nS], dim=-1)
        scores_nC = log_probs_nV.gather(-1, ids_nC)
        again_nC = (ids_nC[:, :, None] == ids_nC[:, None, :]).tril(-1).any(-1)
        scores_nC = scores_nC.masked_fill(again_nC, NOT_KEPT)
        offset_nC = torch.zeros_like(scores_nC)
        draws = u_nM.shape[1]
        if draws:
            rest_nV = log_probs_nV.scatter(-1, ids_nC, NOT_KEPT)
            drawn_nM = inverse_cdf(rest_nV.exp(), u_nM)
            prior_nM = rest_nV.gather(-1, drawn_nM)  # -inf if there are no others
            expected_nM = prior_nM - rest_nV.logsumexp(-1, keepdim=True) + math.log(draws)
            ids_nC = torch.cat([ids_nC, drawn_nM], dim=-1)
            scores_nC = torch.cat([scores_nC, prior_nM], dim=-1)
            tail_nM = torch.where(prior_nM > NOT_KEPT, -expected_nM, torch.zeros_like(prior_nM))
            offset_nC = torch.cat([offset_nC, tail_nM], dim=-1)
        return ids_nC, scores_nC, offset_nC

    return Candidates(
        *in_chunks(
            chosen,
            2 * teacher.num_tokens,  # float64
            rows_ND,
            question.x0_BL[question.wanted_BL],
            students_NS,
            uniforms_NM,
        )
    )


def with_true_token(ids_nK: torch.Tensor, true_n: torch.Tensor) -> torch.Tensor:
    """Candidates that include the true token: it replaces the last one if it is missing."""
    missing_n = (ids_nK != true_n[:, None]).all(-1)
    ids_nK[:, -1] = torch.where(missing_n, true_n, ids_nK[:, -1])
    return ids_nK


def student_tokens(question: Question, count: int, num_tokens: int) -> torch.Tensor:
    """(N, S) the student's likeliest tokens at the wanted positions, -1 where it has no more."""
    wanted_M = question.wanted_BL[question.masked_BL]
    if not count:
        return torch.empty(int(wanted_M.sum()), 0, dtype=torch.long, device=wanted_M.device)
    assert question.proposals is not None, "the student was not asked"
    ids_NS = question.proposals.token_ids_NK[wanted_M][:, :count]
    unused_NS = question.proposals.log_probs_NK[wanted_M][:, :count] == NOT_KEPT
    return ids_NS.masked_fill(unused_NS | (ids_NS >= num_tokens), -1)


def _tail_uniforms(question: Question, draws: int) -> torch.Tensor:
    """(N, M) float64 uniforms: functions of the keys and the positions alone."""
    rows = []
    for row, position in question.wanted_BL.nonzero().tolist():
        random = generator("tail", *question.keys[row], position)
        rows.append(torch.rand(draws, dtype=torch.float64, generator=random))
    empty = torch.empty(0, draws, dtype=torch.float64)
    return (torch.stack(rows) if rows else empty).to(question.x0_BL.device)


# --- the right side ---------------------------------------------------------------------------------


def right_sides(wanted_BL: torch.Tensor, end_BL: torch.Tensor) -> torch.Tensor:
    """(B, L) bool: positions after a wanted one, up to the end of its evidence."""
    index_L = torch.arange(wanted_BL.shape[1], device=wanted_BL.device)
    reach_BL = torch.where(wanted_BL, end_BL, torch.full_like(end_BL, -1)).cummax(1).values
    return index_L <= F.pad(reach_BL[:, :-1], (1, 0), value=-1)


def clean_log_probs(
    teacher: ARTeacher, x0_BL: torch.Tensor, tree: Tree, asked_BL: torch.Tensor
) -> torch.Tensor:
    """(B, L) float64 log p(x0 | left) where it was asked for, else 0."""
    clean_BL = torch.zeros(x0_BL.shape, dtype=torch.float64, device=x0_BL.device)
    clean_BL[asked_BL] = token_log_probs(teacher, tree.trunk_rows, x0_BL[asked_BL])
    return clean_BL


class Place:
    """One wanted position with a right side, and how far its candidates have been scored.

    `live` are the columns that are still scored by branches; the true token is scored by the clean text.
    """

    def __init__(
        self,
        index: int,
        row: int,
        position: int,
        end: int,
        found: Candidates,
        x0_L: torch.Tensor,
        clean_L: torch.Tensor,
    ) -> None:
        self.index, self.row, self.position, self.length = index, row, position, end - position
        self.follow_W = x0_L[position + 1 : end + 1]
        self._clean_W = clean_L[position + 1 : end + 1]
        self._scores_C = found.scores_NC[index]
        self._offset_C = found.offset_NC[index]
        self.ids_C = found.ids_NC[index]
        # The first of its kind: tail draws, which are never candidates, come last.
        self.true = int((self.ids_C == x0_L[position]).int().argmax())
        possible_C = self._scores_C > NOT_KEPT
        possible_C[self.true] = False
        self.live = possible_C.nonzero()[:, 0].tolist()
        self.read = 0

    def tokens(self, column: int, first: int, last: int) -> torch.Tensor:
        """Tokens first … last-1 of the branch of a candidate."""
        if first:
            return self.follow_W[first - 1 : last - 1]
        return torch.cat([self.ids_C[column : column + 1], self.follow_W[: last - 1]])

    def add(self, column: int, gain: torch.Tensor) -> None:
        """Take in the log-probability of what a branch has read."""
        self._scores_C[column] += gain

    def advance(self, upto: int) -> None:
        """The right side has been read up to token `upto`: so has the true token's."""
        self._scores_C[self.true] += self._clean_W[self.read : upto].sum()
        self.read = upto

    def drop(self, budget: float) -> float:
        """Drop the least likely candidates, of at most this posterior mass in all; the mass dropped."""
        mass_C = (self._scores_C + self._offset_C)[[*self.live, self.true]].softmax(0)[:-1]
        sorted_C, order_C = mass_C.sort()
        below = int((sorted_C.cumsum(0) <= budget).sum())
        hopeless = [self.live[i] for i in order_C[:below].tolist()]
        self._scores_C[hopeless] = NOT_KEPT
        self.live = [column for column in self.live if column not in hopeless]
        return float(sorted_C[:below].sum())


def score_all(
    teacher: ARTeacher,
    tree: Tree,
    places: Sequence[Place],
    settings: TargetSettings,
    _dropped_N: torch.Tensor,
) -> None:
    """Score every candidate of every place by its whole right side."""
    jobs = sorted(
        ((place, column) for place in places for column in place.live),
        key=lambda job: job[0].length,
    )
    for pack in packs(jobs, settings.branch_tokens):
        branches = [tree.branch(place.row, place.position) for place, _ in pack]
        tokens = [place.tokens(column, 0, place.length) for place, column in pack]
        _grown, rows = tree.extend(branches, tokens)
        gain_j = gains(teacher, rows, [place.follow_W for place, _ in pack])
        for (place, column), gain in zip(pack, gain_j, strict=True):
            place.add(column, gain)
    for place in places:
        place.advance(place.length)


def score_pruned(
    teacher: ARTeacher,
    tree: Tree,
    places: Sequence[Place],
    settings: TargetSettings,
    dropped_N: torch.Tensor,
) -> None:
    """The same in rounds of doubling length; after each the hopeless candidates are dropped.

    A few places at a time: the branches that go on keep their keys and values between rounds.
    """
    at_once = max(1, settings.branch_tokens // (8 * settings.candidates))
    for first in range(0, len(places), at_once):
        _score_in_rounds(teacher, tree, places[first : first + at_once], settings, dropped_N)


def _score_in_rounds(
    teacher: ARTeacher,
    tree: Tree,
    places: Sequence[Place],
    settings: TargetSettings,
    dropped_N: torch.Tensor,
) -> None:
    budgets = {}
    for place in places:
        rounds = 1 + max(0, math.ceil(math.log2(place.length / FIRST_ROUND)))
        budgets[place.index] = settings.prune / (rounds + 1)
        dropped_N[place.index] += place.drop(budgets[place.index])  # by the left side alone
    upto, branches = FIRST_ROUND, dict[tuple[int, int], Branch]()
    while any(place.live and place.read < place.length for place in places):
        jobs = [
            (place, column)
            for place in places
            if place.read < place.length
            for column in place.live
        ]
        for pack in packs(jobs, settings.branch_tokens, upto):
            keys = [(place.index, column) for place, column in pack]
            stems = [
                branches.get(key) or tree.branch(place.row, place.position)
                for key, (place, _) in zip(keys, pack, strict=True)
            ]
            spans = [(place.read, min(upto, place.length)) for place, _ in pack]
            tokens = [
                place.tokens(column, *span)
                for (place, column), span in zip(pack, spans, strict=True)
            ]
            grown, rows = tree.extend(stems, tokens)
            if upto < max(place.length for place in places):
                branches.update(zip(keys, grown, strict=True))
            follow = [
                place.follow_W[slice(*span)] for (place, _), span in zip(pack, spans, strict=True)
            ]
            for (place, column), gain in zip(pack, gains(teacher, rows, follow), strict=True):
                place.add(column, gain)
        for place in places:
            if place.live and place.read < place.length:
                place.advance(min(upto, place.length))
                if place.read < place.length:
                    dropped_N[place.index] += place.drop(budgets[place.index])
        live = {(place.index, column) for place in places for column in place.live}
        branches = {key: branch for key, branch in branches.items() if key in live}
        upto *= 2


def packs(
    jobs: Sequence[tuple[Place, int]], branch_tokens: int, upto: int | None = None
) -> Iterator[list[tuple[Place, int]]]:
    """(place, column) in groups that have at most `branch_tokens` tokens to read up to token `upto`."""
    pack: list[tuple[Place, int]] = []
    total = 0
    for place, column in jobs:
        count = (place.length if upto is None else min(upto, place.length)) - place.read
        if pack and total + count > branch_tokens:
            yield pack
            pack, total = [], 0
        pack.append((place, column))
        total += count
    if pack:
        yield pack


def gains(
    teacher: ARTeacher, rows: Sequence[torch.Tensor], follow: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """() log-probability of the tokens that follow, for each branch: one head call for all of them."""
    found_N = token_log_probs(teacher, torch.cat(list(rows)), torch.cat(list(follow)))
    return [part.sum() for part in found_N.split([len(tokens) for tokens in follow])]
