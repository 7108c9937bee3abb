"""What a model proposes at open positions: a token, how sure it is, and its log-probability.

Everything of vocabulary size stays on the device, float32, a chunk of positions at a time; three numbers a
position come back. Random numbers are made on the host, one a position, so that a row draws the same in any
batch. Shapes: n positions, V vocabulary, C chunks of W tokens.
"""

from __future__ import annotations

import torch

from .canvas import SamplerSettings
from .remasking import REMASKING

CHUNK_TOKENS = 512  # of a vocabulary, for finding a token by its uniform number


def propose(
    logits_nV: torch.Tensor,
    settings: SamplerSettings,
    eos_id: int,
    uniforms_2n: torch.Tensor | None = None,
) -> torch.Tensor:
    """(3, n) float32: tokens, confidences that decide which are kept, log-probabilities at temperature 1.

    `uniforms_2n` in [0, 1): the first decides the token, the second is for random remasking.
    """
    if settings.suppress_eos:
        logits_nV = logits_nV.clone()
        logits_nV[:, eos_id] = float("-inf")
    log_probs_nV = logits_nV.log_softmax(-1)
    if settings.temperature > 0:
        assert uniforms_2n is not None, "a temperature needs random numbers"
        tokens_n = draw(logits_nV, uniforms_2n[0], settings.temperature, settings.top_p)
    else:
        tokens_n = logits_nV.argmax(-1)
    random_n = None if uniforms_2n is None else uniforms_2n[1]
    confidence_n = REMASKING[settings.remasking](log_probs_nV, tokens_n, random_n)
    if settings.eos_last:
        confidence_n = confidence_n.masked_fill(tokens_n == eos_id, float("-inf"))
    log_prob_n = log_probs_nV.gather(-1, tokens_n[:, None])[:, 0]
    # Ids are exact in float32 up to 2^24.
    return torch.stack([tokens_n.float(), confidence_n.float(), log_prob_n])


def uniforms(settings: SamplerSettings, count: int, generator: torch.Generator) -> torch.Tensor:
    """(2, count) float64 random numbers for `propose` with these settings; zeros where it needs none."""
    drawn_2n = torch.zeros(2, count, dtype=torch.float64)
    if settings.temperature > 0:
        drawn_2n[0] = torch.rand(count, dtype=torch.float64, generator=generator)
    if settings.remasking == "random":
        drawn_2n[1] = torch.rand(count, dtype=torch.float64, generator=generator)
    return drawn_2n


def needs_uniforms(settings: SamplerSettings) -> bool:
    """Does anything random happen with these settings?"""
    return settings.temperature > 0 or settings.remasking == "random"


def draw(
    logits_nV: torch.Tensor, uniform_n: torch.Tensor, temperature: float, top_p: float = 1.0
) -> torch.Tensor:
    """A sample of softmax(logits / temperature) in the nucleus: the token at which the sum exceeds u.

    32-bit noise for every token would cut the tail, which acts as a lower temperature (arXiv 2409.02908).
    Here the cumulative sums, over chunks of the vocabulary and inside one, are float64, on n · C and n · W
    numbers; what a chunk holds is summed in float32, so probabilities are right to 1e-7 of their chunk's.
    """
    probs_nV = (nucleus(logits_nV, temperature, top_p) / temperature).softmax(-1)
    padding = -probs_nV.shape[1] % CHUNK_TOKENS
    probs_nCW = torch.nn.functional.pad(probs_nV, (0, padding)).unflatten(1, (-1, CHUNK_TOKENS))
    mass_nC = probs_nCW.sum(-1).double()
    chunk_n, rest_n = _reached(mass_nC, uniform_n * mass_nC.sum(-1))
    inside_nW = probs_nCW[torch.arange(len(chunk_n), device=chunk_n.device), chunk_n].double()
    token_n = chunk_n * CHUNK_TOKENS + _reached(inside_nW, rest_n)[0]
    return token_n.clamp(max=probs_nV.shape[1] - 1)  # of NaN, too


def _reached(mass_nC: torch.Tensor, at_n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the cumulative mass first exceeds `at`, and how much of `at` is left there."""
    sum_nC = mass_nC.cumsum(-1)
    # Rounding may lead to the very end, behind which nothing has any mass.
    at_n1 = torch.minimum(at_n, sum_nC[:, -1] * (1 - 2**-52))[:, None]
    index_n1 = torch.searchsorted(sum_nC, at_n1, right=True)
    index_n1 = index_n1.clamp(max=mass_nC.shape[1] - 1)  # of NaN; whoever rates the token sees it
    before_n1 = sum_nC.gather(1, index_n1) - mass_nC.gather(1, index_n1)
    return index_n1[:, 0], (at_n1 - before_n1)[:, 0].clamp(min=0)


def nucleus(logits_nV: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """Logits with -inf outside the fewest tokens that hold `top_p` at this temperature.

    The likeliest token always stays (Holtzman et al. 2020, nucleus sampling).
    """
    if top_p >= 1:
        return logits_nV
    probs_nV, order_nV = (logits_nV / temperature).softmax(-1).sort(-1, descending=True)
    before_nV = probs_nV.cumsum(-1) - probs_nV
    dropped_nV = torch.zeros_like(before_nV, dtype=torch.bool)
    dropped_nV.scatter_(-1, order_nV, before_nV >= top_p)
    return logits_nV.masked_fill(dropped_nV, float("-inf"))


def guide(
    conditional_nV: torch.Tensor, unconditional_nV: torch.Tensor, scale: float
) -> torch.Tensor:
    """Classifier-free guidance (1+s)·conditional - s·unconditional; -inf stays -inf."""
    guided_nV = unconditional_nV + (scale + 1) * (conditional_nV - unconditional_nV)
    return guided_nV.masked_fill(conditional_nV == float("-inf"), float("-inf"))
