"""Losses: functions of tensors, one value per token, nats. Nothing here knows where targets come from.

A divergence compares a sparse teacher distribution (kept tokens + tail mass, see targets.py) with the
student's full softmax. Three named treatments of what the teacher did not keep:

    bucket       one more outcome "any other token"; a true lower bound of the full divergence
                 (data-processing inequality) and equal to it when every token is kept
    renormalise  both sides restricted to the kept tokens and renormalised
    partial      the kept terms of the full sum, as published recipes do; not a divergence: it can
                 exceed the full KL, and it can be negative

Shapes: n tokens, V vocabulary, K kept teacher tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from mdm.errors import ConfigError

Divergence = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def cross_entropy(
    logits_nV: torch.Tensor, target_n: torch.Tensor, *, label_smoothing: float = 0.0
) -> torch.Tensor:
    """(n,) -log softmax(logits)[target]; smoothing spreads its mass over the tokens that can occur.

    Tokens with logit -inf (mask, unused rows) cannot occur and get no share.
    """
    loss_n = F.cross_entropy(logits_nV, target_n, reduction="none")
    if not label_smoothing:
        return loss_n
    possible_nV = logits_nV > float("-inf")
    mean_n = logits_nV.masked_fill(~possible_nV, 0.0).sum(-1) / possible_nV.sum(-1)
    uniform_n = logits_nV.logsumexp(-1) - mean_n
    return (1 - label_smoothing) * loss_n + label_smoothing * uniform_n


def forward_kl(log_p_nK: torch.Tensor, log_q_nK: torch.Tensor) -> torch.Tensor:
    """(n,) KL(p ‖ q) = Σ p (log p - log q), with 0 log 0 = 0. p teacher, q student: covers modes."""
    p_nK = log_p_nK.exp()
    gap_nK = torch.where(p_nK > 0, log_p_nK - log_q_nK, torch.zeros_like(p_nK))
    return (p_nK * gap_nK).sum(-1)


def reverse_kl(log_p_nK: torch.Tensor, log_q_nK: torch.Tensor) -> torch.Tensor:
    """(n,) KL(q ‖ p): seeks modes."""
    return forward_kl(log_q_nK, log_p_nK)


def jsd(log_p_nK: torch.Tensor, log_q_nK: torch.Tensor, *, beta: float) -> torch.Tensor:
    """(n,) generalised JSD: β KL(p ‖ m) + (1-β) KL(q ‖ m), m = β p + (1-β) q (GKD, 2306.13649, eq. 1).

    As the paper has it, JSD_β / β → KL(p ‖ q) for β → 0; at exactly 0 and 1 the forward and the
    reverse KL themselves are returned.
    """
    if beta == 0:
        return forward_kl(log_p_nK, log_q_nK)
    if beta == 1:
        return reverse_kl(log_p_nK, log_q_nK)
    # Where both are -inf the mixture does not count, but its gradient would be NaN.
    neither_nK = (log_p_nK == float("-inf")) & (log_q_nK == float("-inf"))
    log_m_nK = torch.logaddexp(
        log_p_nK + math.log(beta), log_q_nK.masked_fill(neither_nK, 0.0) + math.log1p(-beta)
    )
    return beta * forward_kl(log_p_nK, log_m_nK) + (1 - beta) * forward_kl(log_q_nK, log_m_nK)


def mixed(log_p_nK: torch.Tensor, log_q_nK: torch.Tensor, share_n: torch.Tensor) -> torch.Tensor:
    """(n, K) log r, r ∝ q^(1-λ) p^λ: a target on the way from the student's q to the teacher's p.

    λ is `share_n`, in [0, 1]. Mixing logits is the same, as constants of a row drop out (TAID, 2501.16937;
    TIDE, 2604.26951, of logits / temperature). r is a constant: no gradient flows into it. KL(r ‖ q) is 0
    at λ = 0. float32 or better. Where p and q have no outcome in common r is q: nothing to learn.
    """
    dtype = torch.promote_types(log_q_nK.dtype, torch.float32)
    log_p_nK, log_q_nK = log_p_nK.detach().to(dtype), log_q_nK.detach().to(dtype)
    share_n1 = share_n.detach().to(dtype)[:, None]
    # p^0 and q^0 are 1 for probabilities of 0 too.
    of_p_nK = torch.where(share_n1 > 0, share_n1 * log_p_nK, 0.0)
    of_q_nK = torch.where(share_n1 < 1, (1 - share_n1) * log_q_nK, 0.0)
    log_r_nK = of_p_nK + of_q_nK
    total_n1 = log_r_nK.logsumexp(-1, keepdim=True)
    return torch.where(total_n1 > float("-inf"), log_r_nK - total_n1, log_q_nK)


def distillation(
    logits_nV: torch.Tensor,
    token_ids_nK: torch.Tensor,
    log_probs_nK: torch.Tensor,
    tail_mass_n: torch.Tensor,
    *,
    divergence: Divergence,
    temperature: float,
    tail: str,
) -> torch.Tensor:
    """(n,) divergence between the sparse teacher and softmax(logits / temperature), times T².

    T² keeps the gradient's size independent of T (Hinton et al., 1503.02531, section 2).
    """
    log_p_nK, log_q_nK = TAILS[tail](
        logits_nV / temperature, token_ids_nK, log_probs_nK, tail_mass_n
    )
    return temperature**2 * divergence(log_p_nK, log_q_nK)


def _partial(
    scaled_nV: torch.Tensor, ids_nK: torch.Tensor, log_p_nK: torch.Tensor, _tail_n: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return log_p_nK, _kept(scaled_nV, ids_nK, log_p_nK) - scaled_nV.logsumexp(-1, keepdim=True)


def _renormalise(
    scaled_nV: torch.Tensor, ids_nK: torch.Tensor, log_p_nK: torch.Tensor, _tail_n: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return log_p_nK.log_softmax(-1), _kept(scaled_nV, ids_nK, log_p_nK).log_softmax(-1)


def _bucket(
    scaled_nV: torch.Tensor, ids_nK: torch.Tensor, log_p_nK: torch.Tensor, tail_n: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    log_q_nK = _kept(scaled_nV, ids_nK, log_p_nK) - scaled_nV.logsumexp(-1, keepdim=True)
    rest_n = log1mexp(log_q_nK.logsumexp(-1))
    # The student's rest is never below eps, so the teacher's is not either: a tail that is 0, or
    # rounds to it, would make the reverse KL infinite.
    tail_n = tail_n.clamp(min=torch.finfo(tail_n.dtype).eps)
    return (
        torch.cat([log_p_nK, tail_n.log()[:, None]], dim=-1),
        torch.cat([log_q_nK, rest_n[:, None]], dim=-1),
    )


def _kept(scaled_nV: torch.Tensor, ids_nK: torch.Tensor, log_p_nK: torch.Tensor) -> torch.Tensor:
    """(n, K) the student's logits of the kept tokens, -inf in slots the teacher does not use."""
    return scaled_nV.gather(-1, ids_nK).masked_fill(log_p_nK == float("-inf"), float("-inf"))


def _cosine(projected_nD: torch.Tensor, states_nD: torch.Tensor) -> torch.Tensor:
    """(n,) 1 - cosine of the angle between the two: blind to their sizes."""
    return 1 - F.cosine_similarity(projected_nD.float(), states_nD, dim=-1)


def _l2(projected_nD: torch.Tensor, states_nD: torch.Tensor) -> torch.Tensor:
    """(n,) mean squared difference, in units of the teacher's own mean square, so that 1 is "nothing"."""
    size_n1 = states_nD.square().mean(-1, keepdim=True).clamp(min=1e-12)
    return ((projected_nD.float() - states_nD).square() / size_n1).mean(-1)


# Between a student's projected state and a teacher's.
DISTANCES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cosine": _cosine,
    "l2": _l2,
}

TAILS: dict[str, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    "bucket": _bucket,
    "renormalise": _renormalise,
    "partial": _partial,
}

DIVERGENCES: dict[str, Callable[..., torch.Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
}


def log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x <= 0, accurate at both ends; values that round above 0 count as just below.

    Mächler (2012), "Accurately computing log(1 - exp(-|a|))".
    """
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def linear_ramp(step: int, *, ramp_steps: int) -> float:
    """0 → 1 over `ramp_steps` steps; 1 at once if ramp_steps is 0."""
    return 1.0 if ramp_steps == 0 else min(1.0, (step + 1) / ramp_steps)


def check_tail(divergence: str, tail: str, *, truncated: bool) -> None:
    """Refuse the reverse KL to `truncated` targets, which give most tokens no mass at all."""
    if divergence == "reverse_kl" and truncated and tail != "renormalise":
        raise ConfigError(
            "reverse_kl means nothing for targets without mass outside the kept tokens"
            " (target.kind other than left, or target.top_p below 1): by definition it is infinite;"
            " set objective.tail=renormalise or objective.divergence=forward_kl"
        )
