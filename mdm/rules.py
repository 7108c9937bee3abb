"""Decoding rules: how many proposals are kept at a denoising step where no schedule says so.

A rule sees the confidences of the open positions, surest first, and how far it may go; whatever it says,
one is kept. All of them bound what is lost by deciding tokens together that depend on each other:

    threshold      every confidence reaches t
                   (Fast-dLLM, arXiv 2505.22618, section 3.3)
    factor         the n-th is so sure that (n + 1)(1 - c) < f; for f <= 1 the tokens are those of greedy
                   decoding one by one, if c is the model's probability (theorem 1 there)
    entropy_bound  entropies of all kept but the largest sum to at most g nats, which bounds what the joint
                   distribution and the product differ by (EB-Sampler, arXiv 2505.24857, section 3)

Margins are a confidence (remasking.py), so `threshold` with `remasking=margin` is the margin rule. A fixed
schedule is no rule: it needs no confidence (schedule.py). Numbers of one row, so plain Python on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .remasking import PROBABILITIES

Rule = Callable[[Sequence[float], float], int]


def threshold(confidences: Sequence[float], least: float) -> int:
    """Confidences >= `least`."""
    return sum(confidence >= least for confidence in confidences)


def factor(confidences: Sequence[float], most: float) -> int:
    """The largest n with (n + 1)(1 - c_n) < `most`."""
    fits = [n for n, c in enumerate(confidences, start=1) if (n + 1) * (1 - c) < most]
    return max(fits, default=0)


def entropy_bound(confidences: Sequence[float], most: float) -> int:
    """The largest n such that the entropies of the n surest but the last sum to <= `most`.

    Confidences are negative entropies in nats.
    """
    total, count = 0.0, 0
    for confidence in confidences:
        if total > most:
            break
        total, count = total - confidence, count + 1
    return count


RULES: dict[str, Rule] = {
    "threshold": threshold,
    "factor": factor,
    "entropy_bound": entropy_bound,
}

# Strategies of remasking whose confidence is what the rule takes it for.
CONFIDENCES: dict[str, tuple[str, ...]] = {
    "threshold": PROBABILITIES,
    "factor": PROBABILITIES,
    "entropy_bound": ("entropy",),
}


def kept(rule: str, parameter: float, confidences: Sequence[float]) -> int:
    """How many of these confidences, highest first, the rule keeps; at least 1."""
    return max(1, RULES[rule](confidences, parameter))
