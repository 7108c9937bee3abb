"""Suffix-scored targets: q(v) ∝ p(v | left) · p(right | left, v), over the best candidates.

Exact for a single masked token when every token is a candidate and the whole right side is scored
(Bayes' rule). With candidates S the result is q renormalised over S, so its error in total variation
is the posterior mass outside S. Other masked positions hold their true token x0: then this is the
full conditional given the other true tokens, one sample of what the student cannot see.

One causal pass gives the prefix keys and values of every row. A branch "candidate, then the tokens
that follow" is fed on top of them; the branches of a row share its prefix through a tree mask.
Shapes: B batch, L length, N positions asked for, K candidates, k of them in one forward, W branch
length, Q = k·W branch tokens of a row.
"""

from __future__ import annotations

import torch

from mdm import attention

from ..targets import SoftTargets, TargetSettings, keep_top
from .ar import ARTeacher
from .chunks import in_chunks


@torch.no_grad()
def suffix_scored(
    teacher: ARTeacher,
    x0_BL: torch.Tensor,
    wanted_BL: torch.Tensor,
    document_ids_BL: torch.Tensor,
    *,
    settings: TargetSettings,
    temperature: float,
) -> SoftTargets:
    """The suffix-scored distribution at every wanted position, renormalised over its candidates."""
    from transformers import DynamicCache

    cache = DynamicCache()
    rows_ND = teacher.rows(x0_BL, wanted_BL, document_ids_BL, cache)
    kept = min(settings.candidates, teacher.num_tokens)

    def prior(rows_nD: torch.Tensor, true_n: torch.Tensor) -> tuple[torch.Tensor, ...]:
        log_probs_nV = teacher.head(rows_nD).log_softmax(-1)
        ids_nK = with_true_token(log_probs_nV.topk(kept, dim=-1).indices, true_n)
        return ids_nK, log_probs_nV.gather(-1, ids_nK)

    ids_NK, scores_NK = in_chunks(prior, teacher.num_tokens, rows_ND, x0_BL[wanted_BL])
    last_BL = last_scored(document_ids_BL, settings.window, settings.block)
    # The r-th wanted position of every row goes into one forward.
    rank_BL = wanted_BL.cumsum(1) - 1
    index_BL = torch.full_like(x0_BL, -1)
    index_BL[wanted_BL] = torch.arange(len(rows_ND), device=x0_BL.device)
    for rank in range(int(wanted_BL.sum(1).max()) if len(rows_ND) else 0):
        at_BL = wanted_BL & (rank_BL == rank)
        has_B = at_BL.any(1)
        position_B = at_BL.int().argmax(1)
        rows_B = index_BL.gather(1, position_B[:, None])[:, 0]
        branch_length = int(
            (last_BL.gather(1, position_B[:, None])[:, 0] - position_B)[has_B].max()
        )
        if branch_length == 0:
            continue  # nothing to the right of any of these positions
        size = max(1, settings.branch_tokens // (len(x0_BL) * branch_length))
        for first in range(0, kept, size):
            ids_Bk = ids_NK[rows_B.clamp(min=0)][:, first : first + size]
            gain_Bk = score_branches(
                teacher, cache, x0_BL, document_ids_BL, position_B, last_BL, ids_Bk, branch_length
            )
            scores_NK[rows_B[has_B], first : first + size] += gain_Bk[has_B]
    limits = {"window": settings.window, "block": settings.block}
    stated = ", ".join(f"{name} {value}" for name, value in limits.items() if value)
    return keep_top(
        scores_NK,
        top_k=settings.top_k,
        top_p=settings.top_p,
        temperature=temperature,
        conditioned_on=f"left+right({stated or 'document'})",
        token_ids_NV=ids_NK,
    )


def with_true_token(ids_nK: torch.Tensor, true_n: torch.Tensor) -> torch.Tensor:
    """Candidates that include the true token: it replaces the last one if it is missing."""
    missing_n = (ids_nK != true_n[:, None]).all(-1)
    ids_nK[:, -1] = torch.where(missing_n, true_n, ids_nK[:, -1])
    return ids_nK


def last_scored(document_ids_BL: torch.Tensor, window: int, block: int = 0) -> torch.Tensor:
    """(B, L) last position whose token is evidence for position i.

    The end of its document, or before that i + window, or the end of its block; 0 = no such limit.
    """
    length = document_ids_BL.shape[1]
    index_L = torch.arange(length, device=document_ids_BL.device)
    ends_BL = torch.ones_like(document_ids_BL, dtype=torch.bool)
    ends_BL[:, :-1] = document_ids_BL[:, 1:] != document_ids_BL[:, :-1]
    end_BL = torch.where(ends_BL, index_L, torch.full_like(document_ids_BL, length))
    end_BL = end_BL.flip(1).cummin(1).values.flip(1)
    if window:
        end_BL = end_BL.minimum(index_L + window)
    if block:
        left_in_block_BL = block - 1 - attention.positions(document_ids_BL) % block
        end_BL = end_BL.minimum(index_L + left_in_block_BL)
    return end_BL


def score_branches(
    teacher: ARTeacher,
    cache: object,
    x0_BL: torch.Tensor,
    document_ids_BL: torch.Tensor,
    position_B: torch.Tensor,
    last_BL: torch.Tensor,
    ids_Bk: torch.Tensor,
    branch_length: int,
) -> torch.Tensor:
    """(B, k) log p(x[i+1..last] | x[<i], candidate): what follows, given each candidate at position i.

    A branch feeds the candidate and x[i+1..last-1]: last - i tokens. `cache` holds the clean rows and
    is left as it was.
    """
    (batch, length), candidates = x0_BL.shape, ids_Bk.shape[1]
    device = x0_BL.device
    offset_W = torch.arange(branch_length, device=device)
    source_BW = (position_B[:, None] + offset_W).clamp(max=length - 1)
    tokens_BkW = x0_BL.gather(1, source_BW)[:, None].repeat(1, candidates, 1)
    tokens_BkW[:, :, 0] = ids_Bk
    next_BW = x0_BL.gather(1, (source_BW + 1).clamp(max=length - 1))
    last_B = last_BL.gather(1, position_B[:, None])[:, 0]
    scored_BW = position_B[:, None] + offset_W < last_B[:, None]

    # A branch token sees the prefix of its document and the earlier tokens of its own branch.
    own_document_B = document_ids_BL.gather(1, position_B[:, None])
    prefix_BL = (torch.arange(length, device=device) < position_B[:, None]) & (
        document_ids_BL == own_document_B
    )
    branch_Q = torch.arange(candidates, device=device).repeat_interleave(branch_length)
    offset_Q = offset_W.repeat(candidates)
    tree_QQ = (branch_Q[:, None] == branch_Q) & (offset_Q[:, None] >= offset_Q)
    width = candidates * branch_length
    visible_BQK = torch.cat(
        [prefix_BL[:, None].expand(-1, width, -1), tree_QQ.expand(batch, -1, -1)], dim=-1
    )
    start_B = attention.positions(document_ids_BL).gather(1, position_B[:, None])
    scored_BQ = scored_BW[:, None].expand(-1, candidates, -1).reshape(batch, width)
    rows_ND = teacher.call(
        tokens_BkW.reshape(batch, width),
        scored_BQ,
        cache,
        attention_mask=attention.float_mask(visible_BQK, teacher.model.dtype),
        position_ids=start_B + offset_Q,
    )
    cache.crop(-width)  # type: ignore[attr-defined]
    next_BQ = next_BW[:, None].expand(-1, candidates, -1).reshape(batch, width)

    def log_prob(rows_nD: torch.Tensor, token_n: torch.Tensor) -> tuple[torch.Tensor]:
        logits_nV = teacher.head(rows_nD)
        return (logits_nV.gather(-1, token_n[:, None])[:, 0] - logits_nV.logsumexp(-1),)

    (gain_N,) = in_chunks(log_prob, teacher.num_tokens, rows_ND, next_BQ[scored_BQ])
    gain_BQ = torch.zeros(batch, width, device=device)
    gain_BQ[scored_BQ] = gain_N
    return gain_BQ.reshape(batch, candidates, branch_length).sum(-1)
