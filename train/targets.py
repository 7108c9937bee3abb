"""The interface of every teacher: a Question ("which distribution at these masked positions?") and
the SoftTargets that answer it.

Sparse and row-aligned: row n belongs to the n-th position asked for (row-major order). Losses do not
know where a target came from; `conditioned_on` says what the distribution is conditioned on.
Shapes: B batch, L length, N positions asked for, M masked positions, K kept tokens, V vocabulary,
W width of the teacher, C chunks of two tokenizations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F

from mdm.config import require
from mdm.errors import TrainingError, check_known
from mdm.fim import FAMILIES

from . import processes

NOT_KEPT = float("-inf")
LOOKED_AT = 256  # whole distributions of a micro-batch whose likeliest token is looked for
FILLS = ("region", "span")
COMP_DEMOS = ("", "bernoulli", "exact")
INFILLS = ("psm", "spm", "few_shot")


@dataclasses.dataclass(frozen=True)
class Question:
    """What a teacher is asked about a batch of masked rows.

    x0_BL            clean tokens; the mask token is never shown to a teacher
    masked_BL        what the student cannot see
    wanted_BL        the masked positions whose distribution is asked for
    document_ids_BL  documents packed into a row; -1 is padding
    keys             one for each row: what is random in an answer is a function of the row's key
    proposals        the student's own distributions at the masked positions (row-major, M rows, at
                     temperature 1, made from xt alone); None if the student was not asked
    copies           of every clean row, which differ in their masks; the first ones come first
    """

    x0_BL: torch.Tensor
    masked_BL: torch.Tensor
    wanted_BL: torch.Tensor
    document_ids_BL: torch.Tensor
    keys: tuple[tuple[int, ...], ...]
    proposals: SoftTargets | None = None
    copies: int = 1

    def __post_init__(self) -> None:
        assert not bool((self.wanted_BL & ~self.masked_BL).any()), "only masks have a target"
        assert len(self.keys) == len(self.x0_BL), "one key for each row"

    def rows(self, chosen: slice) -> Question:
        """The same question about some of the rows."""
        proposals = self.proposals
        if proposals is not None:
            row_M = self.masked_BL.nonzero()[:, 0]
            index_B = torch.arange(len(self.x0_BL), device=row_M.device)
            proposals = proposals.select(torch.isin(row_M, index_B[chosen]))
        return Question(
            self.x0_BL[chosen],
            self.masked_BL[chosen],
            self.wanted_BL[chosen],
            self.document_ids_BL[chosen],
            self.keys[chosen],
            proposals,
        )


@dataclasses.dataclass(frozen=True)
class SoftTargets:
    """A distribution per position over its K most likely tokens, and the mass of all others.

    token_ids_NK    kept tokens, int64; a slot with log-probability -inf is unused
    log_probs_NK    their log-probabilities at `temperature`, float32, nats
    tail_mass_N     probability of all tokens not kept, float32; 0 if renormalised over the kept
    temperature     the distribution is softmax(scores / temperature)
    conditioned_on  "left", or "left+right(…)" with the limits of the right side that was scored
    measures        what the estimator knows of its own quality, (N,) float32 each, NaN where it does
                    not apply; see MEASURES

    A row whose slots are all unused is no answer: the teacher has no counterpart of the position.
    """

    token_ids_NK: torch.Tensor
    log_probs_NK: torch.Tensor
    tail_mass_N: torch.Tensor
    temperature: float
    conditioned_on: str
    measures: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.measures.keys() <= MEASURES.keys(), "a measure without a meaning"
        rows, kept = self.token_ids_NK.shape
        assert self.log_probs_NK.shape == (rows, kept), "one log-probability per kept token"
        assert self.tail_mass_N.shape == (rows,), "one tail mass per row"

    def __len__(self) -> int:
        return len(self.tail_mass_N)

    def select(self, rows: torch.Tensor) -> SoftTargets:
        """These rows of it, by index or by a bool mask."""
        return dataclasses.replace(
            self,
            token_ids_NK=self.token_ids_NK[rows],
            log_probs_NK=self.log_probs_NK[rows],
            tail_mass_N=self.tail_mass_N[rows],
            measures={name: value_N[rows] for name, value_N in self.measures.items()},
        )

    @property
    def answered_N(self) -> torch.Tensor:
        """(N,) bool; no loss where it is false."""
        return (self.log_probs_NK > NOT_KEPT).any(-1)

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The three tensors, in the order in which losses take them."""
        return self.token_ids_NK, self.log_probs_NK, self.tail_mass_N


@dataclasses.dataclass(frozen=True)
class StateTargets:
    """A teacher's hidden state per position, which the student's projected state is to come near.

    states_NC       float32; C is the teacher's width
    answered_N      false where the teacher has no counterpart of the position: no loss there
    conditioned_on  as in SoftTargets
    measures        as in SoftTargets
    """

    states_NC: torch.Tensor
    answered_N: torch.Tensor
    conditioned_on: str
    measures: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.answered_N)

    @property
    def tensors(self) -> tuple[torch.Tensor]:
        """What distances take."""
        return (self.states_NC,)


@dataclasses.dataclass(frozen=True)
class HeadTargets:
    """A teacher's whole distributions, kept as what its head makes logits of: width instead of vocabulary.

    rows_NW         inputs of the teacher's head
    logits          (n, W) rows -> (n, V) float32 logits of the first V ids, which mean the same to both;
                    -inf for what the student cannot write
    conditioned_on  as in SoftTargets
    measures        as in SoftTargets
    """

    rows_NW: torch.Tensor
    logits: Callable[[torch.Tensor], torch.Tensor]
    conditioned_on: str
    measures: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows_NW)

    @property
    def answered_N(self) -> torch.Tensor:
        """(N,) bool; every position has an answer."""
        return torch.ones(len(self), dtype=torch.bool, device=self.rows_NW.device)

    @property
    def tensors(self) -> tuple[torch.Tensor]:
        """What losses take."""
        return (self.rows_NW,)


@dataclasses.dataclass(frozen=True)
class ChunkTargets:
    """How likely a teacher with another tokenizer finds the text of each masked chunk.

    log_likelihood_C  Σ log p of its tokens of the chunk, float32, nats, at temperature 1; all of them were
                      masked to it
    chunk_N           the chunk of each masked position, 0 … C - 1; -1 = in none, which has no target
    first_C           the masked position (0 … N - 1) where each chunk begins
    conditioned_on    as in SoftTargets
    measures          as in SoftTargets
    """

    log_likelihood_C: torch.Tensor
    chunk_N: torch.Tensor
    first_C: torch.Tensor
    conditioned_on: str
    measures: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.log_likelihood_C)

    @property
    def tensors(self) -> tuple[torch.Tensor]:
        """What losses take."""
        return (self.log_likelihood_C,)


Targets = SoftTargets | StateTargets | HeadTargets | ChunkTargets


def keep_top(
    scores_NV: torch.Tensor,
    *,
    top_k: int,
    top_p: float,
    temperature: float,
    conditioned_on: str,
    token_ids_NV: torch.Tensor | None = None,
    tail_NV: torch.Tensor | None = None,
) -> SoftTargets:
    """The sparse form of softmax(scores / temperature): at most `top_k` tokens, the rest as tail.

    top_p < 1 keeps the smallest set of likeliest tokens whose mass at temperature 1 reaches top_p and
    renormalises over it (nucleus filter, before the temperature), so the tail is what top_k cuts from
    that set. `token_ids_NV` names the columns of `scores_NV` if they are not 0..V-1. Columns where
    `tail_NV` is true stand for tokens of the tail and are never kept.
    """
    scores_NV = scores_NV.float()
    if top_p < 1:
        scores_NV = _nucleus(scores_NV, top_p)
    log_probs_NV = (scores_NV / temperature).log_softmax(-1)
    kept = min(top_k, log_probs_NV.shape[-1])
    kept_NV = log_probs_NV if tail_NV is None else log_probs_NV.masked_fill(tail_NV, NOT_KEPT)
    log_probs_NK, columns_NK = kept_NV.topk(kept, dim=-1)
    # Summed, not 1 - the kept mass: a small tail would be nothing but rounding.
    tail_N = log_probs_NV.exp().masked_fill(_chosen(log_probs_NK, columns_NK, kept_NV), 0.0).sum(-1)
    ids_NK = columns_NK if token_ids_NV is None else token_ids_NV.gather(-1, columns_NK)
    return SoftTargets(ids_NK, log_probs_NK, tail_N, temperature, conditioned_on)


def _chosen(
    log_probs_NK: torch.Tensor, columns_NK: torch.Tensor, kept_NV: torch.Tensor
) -> torch.Tensor:
    """(N, V) the columns that were kept; an unused slot has kept none."""
    used_NK = log_probs_NK > NOT_KEPT
    return torch.zeros_like(kept_NV, dtype=torch.bool).scatter(-1, columns_NK, used_NK)


def keep_fills(
    tokens_NK: torch.Tensor,
    log_weights_NK: torch.Tensor,
    *,
    top_k: int,
    top_p: float,
    temperature: float,
    conditioned_on: str,
) -> SoftTargets:
    """The distribution of weighted fills: Σ_k w_k [token_k = v] / Σ_k w_k, equal tokens merged.

    Log-weights need not be normalised. A temperature sharpens the merged distribution.
    """
    equal_NKK = tokens_NK[:, :, None] == tokens_NK[:, None, :]
    merged_NK = torch.where(equal_NKK, log_weights_NK[:, None, :], NOT_KEPT).logsumexp(-1)
    repeated_NK = equal_NKK.tril(-1).any(-1)
    return keep_top(
        merged_NK.masked_fill(repeated_NK, NOT_KEPT),
        top_k=top_k,
        top_p=top_p,
        temperature=temperature,
        conditioned_on=conditioned_on,
        token_ids_NV=tokens_NK,
    )


def refuse_nan(targets: Targets) -> None:
    """Raise TrainingError if an answer is not made of numbers."""
    if any(bool(tensor.isnan().any()) for tensor in targets.tensors):
        raise TrainingError(
            "some of the teacher's answers are NaN; load it with teacher.dtype=fp32"
        )


def with_agreement(targets: Targets, tokens_N: torch.Tensor, own_text: bool) -> Targets:
    """The targets with what they measure of rollouts: is each token, written by the student, the likeliest?

    Unchanged for text of others. Of whole distributions the first few are looked at.
    """
    if not own_text or isinstance(targets, (StateTargets, ChunkTargets)) or not len(targets):
        return targets
    if isinstance(targets, HeadTargets):
        with torch.no_grad():
            likeliest_n = targets.logits(targets.rows_NW[:LOOKED_AT]).argmax(-1)
        agreed_N = torch.full((len(targets),), float("nan"), device=tokens_N.device)
        agreed_N[:LOOKED_AT] = (likeliest_n == tokens_N[:LOOKED_AT]).float()
    else:
        likeliest_N1 = targets.log_probs_NK.argmax(-1, keepdim=True)
        agreed_N = (targets.token_ids_NK.gather(1, likeliest_N1)[:, 0] == tokens_N).float()
    return dataclasses.replace(targets, measures={**targets.measures, "agreed": agreed_N})


def no_targets(device: torch.device, temperature: float, conditioned_on: str) -> SoftTargets:
    """The answer to a question that asks for nothing."""
    ids_NK = torch.empty(0, 1, dtype=torch.long, device=device)
    return SoftTargets(ids_NK, ids_NK.float(), ids_NK[:, 0].float(), temperature, conditioned_on)


def stack_targets(parts: Sequence[SoftTargets]) -> SoftTargets:
    """The rows of all parts, one after the other; missing measures are NaN."""
    width = max(part.token_ids_NK.shape[1] for part in parts)
    pad = [width - part.token_ids_NK.shape[1] for part in parts]
    names = dict.fromkeys(name for part in parts for name in part.measures)
    nothing = [torch.full_like(part.tail_mass_N, float("nan")) for part in parts]
    return SoftTargets(
        torch.cat([F.pad(p.token_ids_NK, (0, n)) for p, n in zip(parts, pad, strict=True)]),
        torch.cat(
            [F.pad(p.log_probs_NK, (0, n), value=NOT_KEPT) for p, n in zip(parts, pad, strict=True)]
        ),
        torch.cat([part.tail_mass_N for part in parts]),
        parts[0].temperature,
        parts[0].conditioned_on,
        {
            name: torch.cat(
                [p.measures.get(name, none) for p, none in zip(parts, nothing, strict=True)]
            )
            for name in names
        },
    )


def _nucleus(scores_NV: torch.Tensor, top_p: float) -> torch.Tensor:
    """Scores with everything outside the nucleus at -inf; the likeliest token always stays."""
    sorted_NV, order_NV = scores_NV.softmax(-1).sort(dim=-1, descending=True, stable=True)
    outside_NV = sorted_NV.cumsum(-1) - sorted_NV >= top_p
    drop_NV = torch.zeros_like(outside_NV).scatter_(-1, order_NV, outside_NV)
    return scores_NV.masked_fill(drop_NV, NOT_KEPT)


# What an estimator can report of each of its answers.
MEASURES = {
    "ess": "effective number of fills, (Σ w)² / Σ w²; between 1 and target.fills",
    "outside": "estimated posterior mass of the tokens that were no candidates",
    "dropped": "posterior mass that candidates had when they were dropped: expected error of pruning",
    "answered": "1 where the teacher, which has another tokenizer, has a counterpart of the position",
    "lost": "its probability of tokens that the student cannot write, before renormalisation",
    "agreed": "on rollouts: 1 where the student's own token is the likeliest",
    "fell_back": "1 where every fill was impossible and the left-only target stands in, else 0",
}


class Measured:
    """Sums of the measures of many answers, over micro-batches and processes."""

    def __init__(self) -> None:
        self._sums_M2 = torch.zeros(len(MEASURES), 2, dtype=torch.float64)

    def add(self, targets: Targets) -> None:
        """Take in the measures of these targets."""
        for place, name in enumerate(MEASURES):
            value_N = targets.measures.get(name)
            if value_N is not None:
                known_N = value_N[~value_N.isnan()].double().cpu()
                self._sums_M2[place] += torch.stack([known_N.sum(), torch.tensor(len(known_N))])

    def means(self, device: torch.device) -> dict[str, float]:
        """`target_ess` and the like: means over all positions that reported one; over all processes."""
        sums_M2 = processes.total(self._sums_M2.to(device)).tolist()
        return {
            f"target_{name}": total / count
            for name, (total, count) in zip(MEASURES, sums_M2, strict=True)
            if count
        }


@dataclasses.dataclass(frozen=True)
class TargetSettings:
    """Which soft target a teacher computes.

    kind         which estimator, see teachers/kinds.py and docs/targets.md; denoised and chunks ask a
                 diffusion model, see docs/tide.md
    top_k        tokens kept per position; left: 0 = the whole distribution, as the input of the
                 teacher's head
    top_p        nucleus filter at temperature 1; 1 = off
    window       tokens of the right side that are evidence; 0 = to the end of the document. With infill
                 all of it is in the prompt
    block        the right side ends with the block of this many tokens (counted from the start of the
                 document), as a block-wise student sees it; 0 = no blocks
    candidates   suffix: candidates a position (the teacher's likeliest by the left side, the true token)
    student_candidates  suffix: the student's likeliest tokens, candidates too; 0 = it is not asked
    tail_draws   suffix: tokens drawn from the others, to estimate the mass outside; 0 = taken as 0
    prune        suffix: posterior mass that may be dropped early with hopeless candidates; 0 = exact
    fills        importance, smc, i_sir, csmc, student, mc_literal: ways to fill the masks (K)
    fill         which masks are filled: "region" (all up to the end of the evidence) or "span" (the run of
                 neighbours; masks elsewhere hold their true tokens)
    uniform_mix  student: share of a uniform distribution in its proposals
    reference    student: the true tokens are one of the fills
    infill       the teacher is asked through a prompt: "" = no, psm or spm = its fill-in-the-middle
                 marks, few_shot = examples (for instruction models)
    family       of the marks; "" = told by the tokenizer
    branch_tokens  most tokens of branches (candidates or fills) that the teacher works on at once; bounds
                   memory
    cache        left, mapped: folder of answers written by `mdm data cache-targets`; no teacher is loaded
    comp_demo    denoised, chunks: two passes, each shows the teacher the true tokens of the masks that the
                 other asks for: "bernoulli" (each mask by chance), "exact" (a share of a row's), "" = off
    comp_demo_share  share of the masks that the first pass asks for
    """

    kind: str = "left"
    top_k: int = 64
    top_p: float = 1.0
    window: int = 16
    block: int = 0
    candidates: int = 8
    student_candidates: int = 0
    tail_draws: int = 0
    prune: float = 0.0
    fills: int = 8
    fill: str = "region"
    uniform_mix: float = 0.05
    reference: bool = True
    infill: str = ""
    family: str = ""
    branch_tokens: int = 4096
    cache: str = ""
    comp_demo: str = ""
    comp_demo_share: float = 0.5

    def __post_init__(self) -> None:
        require(self.top_k >= 0, f"target.top_k must be >= 0; got {self.top_k}")
        whole = self.kind == "left" and self.top_p == 1 and not (self.infill or self.cache)
        require(
            self.top_k >= 1 or whole,
            f"target.top_k=0 (the whole distribution) with kind={self.kind}, top_p={self.top_p},"
            f" infill={self.infill!r}, cache={self.cache!r}: only target.kind=left keeps all of it, without"
            " these; set target.top_k to 1 or more",
        )
        require(0 < self.top_p <= 1, f"target.top_p must be in (0, 1]; got {self.top_p}")
        for name in ("candidates", "fills", "branch_tokens"):
            value = getattr(self, name)
            require(value >= 1, f"target.{name} must be >= 1; got {value}")
        for name in ("window", "block", "student_candidates", "tail_draws"):
            value = getattr(self, name)
            require(value >= 0, f"target.{name} must be >= 0; got {value}")
        require(0 <= self.prune < 1, f"target.prune must be in [0, 1); got {self.prune}")
        require(
            0 < self.uniform_mix <= 1,
            f"target.uniform_mix must be in (0, 1]: without it a token that the student never proposes"
            f" could not be corrected; got {self.uniform_mix}",
        )
        check_known("target.fill", self.fill, FILLS)
        check_known("target.comp_demo", self.comp_demo, COMP_DEMOS)
        require(
            0 < self.comp_demo_share < 1,
            f"target.comp_demo_share must be between 0 and 1; got {self.comp_demo_share}",
        )
        if self.infill:
            check_known("target.infill", self.infill, INFILLS)
        if self.family:
            check_known("target.family", self.family, FAMILIES)
            require(
                self.infill in ("psm", "spm"),
                f"target.family={self.family} names fill-in-the-middle marks; set target.infill to psm"
                f" or spm, got {self.infill!r}",
            )
        require(
            not (self.tail_draws and self.top_p < 1),
            f"target.tail_draws estimates a mass that target.top_p={self.top_p} cuts off; set one"
            " of them only",
        )
