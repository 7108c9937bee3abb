"""Remasking strategies: which proposals are kept at a denoising step; the rest return to mask.

A strategy gives each proposal a confidence; the highest are kept. It is told the log-probabilities, the
proposals and, for `random`, a uniform number each. Knows nothing of blocks, caches or prompts.
Shapes: n open positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Confidence = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def random(
    log_probs_nV: torch.Tensor, proposals_n: torch.Tensor, uniform_n: torch.Tensor | None
) -> torch.Tensor:
    """The uniform random numbers: every open position is as likely to be kept."""
    assert uniform_n is not None, "random remasking needs random numbers"
    return uniform_n


def low_confidence(
    log_probs_nV: torch.Tensor, proposals_n: torch.Tensor, uniform_n: torch.Tensor | None
) -> torch.Tensor:
    """Probability of the proposal: the *low* ones are remasked (LLaDA, arXiv 2502.09992).

    At a temperature above 0 that favours likely tokens: where another was drawn, it is drawn again. Margin,
    entropy and random look at the distributions alone, and the text is a sample of them
    (docs/on_policy.md).
    """
    return log_probs_nV.gather(-1, proposals_n[:, None])[:, 0].exp()


def margin(
    log_probs_nV: torch.Tensor, proposals_n: torch.Tensor, uniform_n: torch.Tensor | None
) -> torch.Tensor:
    """Probability of the likeliest token minus that of the second (arXiv 2502.06768)."""
    top_n2 = log_probs_nV.topk(2, dim=-1).values.exp()
    return top_n2[:, 0] - top_n2[:, 1]


def entropy(
    log_probs_nV: torch.Tensor, proposals_n: torch.Tensor, uniform_n: torch.Tensor | None
) -> torch.Tensor:
    """Negative entropy of the distribution, nats (Dream, arXiv 2508.15487)."""
    terms_nV = log_probs_nV.exp() * log_probs_nV
    return terms_nV.nan_to_num(0.0).sum(-1)  # 0 · -inf is 0 here


REMASKING: dict[str, Confidence] = {
    "random": random,
    "low_confidence": low_confidence,
    "margin": margin,
    "entropy": entropy,
}

# Strategies whose confidence is a probability or a difference of two, so that a threshold means something.
PROBABILITIES = ("low_confidence", "margin")


def keep_highest(confidence_n: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` highest confidences (all, if there are fewer); ties go to the lowest index."""
    return confidence_n.argsort(descending=True, stable=True)[:count]
