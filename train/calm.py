"""CALM: teacher and student compared by the likelihood of a chunk, where their tokens differ.

A chunk (alignment.py) is the same text to both, cut into different tokens. Each side's log-likelihood of
it is the sum over its own tokens of log p(true token | what the model saw): every factor given the same
input (but for block edges, chunk_likelihoods.py), so a product of marginals and no joint. What is compared
are two coins, "this text" or "another", with p = exp(log-likelihood / T). With s the student's
log-likelihood:

    loss           definition                              gradient wrt s
    forward_calm   -[p_t log p_s + (1-p_t) log(1-p_s)]     (p_s - p_t) / (T (1-p_s))
    reverse_calm   -[p_s log p_t + (1-p_s) log(1-p_t)]     -(p_s / T) logit p_t
    bernoulli_kl   reverse_calm - H(p_s)                   -(p_s / T) (logit p_t - logit p_s)

forward_calm is KL(p_t ‖ p_s) + H(p_t): smallest at p_s = p_t. reverse_calm is linear in p_s: smallest at
p_s = 1 if p_t > 1/2, else at p_s = 0, and p_s = p_t is nothing special. It is published as KL(p_s ‖ p_t),
but that is bernoulli_kl. Source: TIDE (arXiv 2604.26951), CALM; the coins are those of approximate
likelihood matching (2503.20083). No T² inside: that is the caller's.

All of it is in log space. Float rounds a likelihood near 1 to 1, where log(1-p) is infinite, so p above
1 - eps counts as 1 - eps (eps of the dtype: 1.2e-7), with the gradient of that place, not none. Hence
values and gradients are finite for log-likelihoods from 0 down to at least -1e4, and p_s = p_t has no
gradient at 1 either. 1/(1-p_s) is large there, but wrt logits it meets a factor of at most T (1-p_s).

Shapes: C chunks, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .losses import log1mexp


def forward_calm(log_s_C: torch.Tensor, log_t_C: torch.Tensor, temperature: float) -> torch.Tensor:
    """(C,) cross-entropy of the student's coin under the teacher's."""
    log_p_s_C, log_p_t_C = _tempered(log_s_C, temperature), _tempered(log_t_C, temperature)
    return _cross_entropy(log_p_t_C, log_p_s_C)


def reverse_calm(log_s_C: torch.Tensor, log_t_C: torch.Tensor, temperature: float) -> torch.Tensor:
    """(C,) cross-entropy of the teacher's coin under the student's, as published: no divergence."""
    log_p_s_C, log_p_t_C = _tempered(log_s_C, temperature), _tempered(log_t_C, temperature)
    return _cross_entropy(log_p_s_C, log_p_t_C)


def bernoulli_kl(log_s_C: torch.Tensor, log_t_C: torch.Tensor, temperature: float) -> torch.Tensor:
    """(C,) KL(p_s ‖ p_t) of the two coins: what reverse_calm is said to be."""
    log_p_s_C, log_p_t_C = _tempered(log_s_C, temperature), _tempered(log_t_C, temperature)
    other_gap_C = log1mexp(log_p_s_C) - log1mexp(log_p_t_C)
    return log_p_s_C.exp() * (log_p_s_C - log_p_t_C) - torch.expm1(log_p_s_C) * other_gap_C


# (log_s_C, log_t_C, temperature) -> (C,)
CHUNK_LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {
    "forward_calm": forward_calm,
    "reverse_calm": reverse_calm,
    "bernoulli_kl": bernoulli_kl,
}


def mixed_likelihood(
    log_s_C: torch.Tensor, log_t_C: torch.Tensor, share_C: torch.Tensor, temperature: float
) -> torch.Tensor:
    """(C,) T · log m, m = (1-λ) p_s + λ p_t, λ = `share_C`; a constant.

    Times T, it takes the place of a teacher's log-likelihood: a loss at the same temperature sees m.
    forward_calm towards it is CALM-TIDAL (TIDE), whose gradient is λ times that of forward_calm itself,
    because p_s - m = λ (p_s - p_t): weigh chunks by λ instead and nothing is lost.
    """
    log_p_s_C = _tempered(log_s_C.detach(), temperature)
    log_p_t_C = _tempered(log_t_C.detach(), temperature)
    share_C = share_C.detach().to(log_p_s_C.dtype)
    rest_C = (share_C - 1) * torch.expm1(log_p_s_C) - share_C * torch.expm1(log_p_t_C)
    log_m_C = torch.logaddexp(torch.log1p(-share_C) + log_p_s_C, share_C.log() + log_p_t_C)
    # Near 1 the sum of two probabilities would lose what 1 - m is made of.
    return temperature * torch.where(rest_C < 0.5, torch.log1p(-rest_C), log_m_C)


def chunk_log_likelihoods(
    log_prob_N: torch.Tensor, chunk_N: torch.Tensor, num_chunks: int
) -> torch.Tensor:
    """(C,) sums of the tokens' log-probabilities by chunk, float32 or better; differentiable.

    `chunk_N` is the chunk of each token, from 0, in any order; -1: in none, whatever its log-probability
    is. A chunk without tokens has 0, likelihood 1: leave it out of a loss.
    """
    dtype = torch.promote_types(log_prob_N.dtype, torch.float32)
    # The first sum takes the tokens that are in no chunk, so that nothing has to be selected.
    sums = torch.zeros(num_chunks + 1, dtype=dtype, device=log_prob_N.device)
    return sums.index_add(0, chunk_N + 1, log_prob_N.to(dtype))[1:]


def _tempered(log_likelihood_C: torch.Tensor, temperature: float) -> torch.Tensor:
    """log p = log-likelihood / T, at most -eps; where it is cut the gradient passes as if it were not."""
    log_p_C = log_likelihood_C.to(torch.promote_types(log_likelihood_C.dtype, torch.float32))
    log_p_C = log_p_C / temperature
    eps = torch.finfo(log_p_C.dtype).eps
    return log_p_C.clamp(max=-eps).detach() + (log_p_C - log_p_C.detach())


def _cross_entropy(log_p_C: torch.Tensor, log_q_C: torch.Tensor) -> torch.Tensor:
    """(C,) -[p log q + (1-p) log(1-q)]."""
    return torch.expm1(log_p_C) * log1mexp(log_q_C) - log_p_C.exp() * log_q_C
