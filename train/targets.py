"""SoftTargets: what a teacher answers to "for these masked positions, which distribution?".

Sparse and row-aligned: row n belongs to the n-th position asked for (row-major order). Losses do not
know where a target came from; `conditioned_on` says what the distribution is conditioned on.
Shapes: N positions asked for, K kept tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses

import torch

from mdm.config import require

NOT_KEPT = float("-inf")


@dataclasses.dataclass(frozen=True)
class SoftTargets:
    """A distribution per position over its K most likely tokens, and the mass of all others.

    token_ids_NK    kept tokens, int64; a slot with log-probability -inf is unused
    log_probs_NK    their log-probabilities at `temperature`, float32, nats
    tail_mass_N     probability of all tokens not kept, float32; 0 if renormalised over the kept
    temperature     the distribution is softmax(scores / temperature)
    conditioned_on  "left", or "left+right(…)" with the limits of the right side that was scored
    """

    token_ids_NK: torch.Tensor
    log_probs_NK: torch.Tensor
    tail_mass_N: torch.Tensor
    temperature: float
    conditioned_on: str

    def __post_init__(self) -> None:
        rows, kept = self.token_ids_NK.shape
        assert self.log_probs_NK.shape == (rows, kept), "one log-probability per kept token"
        assert self.tail_mass_N.shape == (rows,), "one tail mass per row"

    def __len__(self) -> int:
        return len(self.tail_mass_N)

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The three tensors, in the order in which losses take them."""
        return self.token_ids_NK, self.log_probs_NK, self.tail_mass_N


def keep_top(
    scores_NV: torch.Tensor,
    *,
    top_k: int,
    top_p: float,
    temperature: float,
    conditioned_on: str,
    token_ids_NV: torch.Tensor | None = None,
) -> SoftTargets:
    """The sparse form of softmax(scores / temperature): at most `top_k` tokens, the rest as tail.

    top_p < 1 keeps the smallest set of likeliest tokens whose mass at temperature 1 reaches top_p and
    renormalises over it (nucleus filter, before the temperature), so the tail is what top_k cuts from
    that set. `token_ids_NV` names the columns of `scores_NV` if they are not 0..V-1.
    """
    scores_NV = scores_NV.float()
    if top_p < 1:
        scores_NV = _nucleus(scores_NV, top_p)
    log_probs_NV = (scores_NV / temperature).log_softmax(-1)
    kept = min(top_k, log_probs_NV.shape[-1])
    log_probs_NK, columns_NK = log_probs_NV.topk(kept, dim=-1)
    # Summed, not 1 - the kept mass: a small tail would be nothing but rounding.
    tail_N = log_probs_NV.scatter(-1, columns_NK, NOT_KEPT).exp().sum(-1)
    ids_NK = columns_NK if token_ids_NV is None else token_ids_NV.gather(-1, columns_NK)
    return SoftTargets(ids_NK, log_probs_NK, tail_N, temperature, conditioned_on)


def _nucleus(scores_NV: torch.Tensor, top_p: float) -> torch.Tensor:
    """Scores with everything outside the nucleus at -inf; the likeliest token always stays."""
    sorted_NV, order_NV = scores_NV.softmax(-1).sort(dim=-1, descending=True, stable=True)
    outside_NV = sorted_NV.cumsum(-1) - sorted_NV >= top_p
    drop_NV = torch.zeros_like(outside_NV).scatter_(-1, order_NV, outside_NV)
    return scores_NV.masked_fill(drop_NV, NOT_KEPT)


@dataclasses.dataclass(frozen=True)
class TargetSettings:
    """Which soft target a teacher computes.

    kind         "left": the teacher's next-token distribution; "suffix": that times the likelihood
                 of what follows, for the best candidates
    top_k        tokens kept per position
    top_p        nucleus filter at temperature 1; 1 = off
    candidates   suffix: candidates scored per position (its likeliest tokens and the true one)
    window       suffix: tokens of the right side that are scored; 0 = to the end of the document
    block        suffix: the right side ends with the block of this many tokens (counted from the start of
                 the document), as a block-wise student sees it; 0 = no blocks
    branch_tokens suffix: most branch tokens in one teacher forward, bounds memory
    """

    kind: str = "left"
    top_k: int = 64
    top_p: float = 1.0
    candidates: int = 8
    window: int = 16
    block: int = 0
    branch_tokens: int = 2048

    def __post_init__(self) -> None:
        require(self.top_k >= 1, f"target.top_k must be at least 1; got {self.top_k}")
        require(0 < self.top_p <= 1, f"target.top_p must be in (0, 1]; got {self.top_p}")
        require(self.candidates >= 1, f"target.candidates must be >= 1; got {self.candidates}")
        require(self.window >= 0, f"target.window must be >= 0 (0 = no limit); got {self.window}")
        require(self.block >= 0, f"target.block must be >= 0 (0 = no blocks); got {self.block}")
        require(
            self.branch_tokens >= 1, f"target.branch_tokens must be >= 1; got {self.branch_tokens}"
        )
