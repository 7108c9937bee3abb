"""What a micro-batch adds to each term of the objective (objective.py).

One forward of the student scores masked positions and, where asked, the clean stream; a term is a sum of
weighted losses of tokens, or of chunks of tokens. Vocabulary-sized tensors exist for a few rows at a time.
Shapes: B batch, b rows of clean tokens, L length, N masked positions, n some of them, V vocabulary,
K teacher tokens, D the student's width, W the teacher's, A clean positions that predict a next token,
C chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from .calm import CHUNK_LOSSES, chunk_log_likelihoods, mixed_likelihood
from .losses import DISTANCES, DIVERGENCES, TAILS, cross_entropy, mixed
from .masking import MaskedBatch
from .objective import ObjectiveSettings
from .targets import ChunkTargets, HeadTargets, StateTargets, Targets


def loss_sums(
    denoiser: nn.Module,
    batch: MaskedBatch,
    targets: Targets | None,
    settings: ObjectiveSettings,
    projection: nn.Module | None = None,
) -> torch.Tensor:
    """(3,) Σ w CE, Σ w T² KL and Σ CE of next tokens of a micro-batch, before division by their D.

    `denoiser` is a Denoiser, or one wrapped for several processes. For a teacher's states the second
    sum is of distances, and `projection`, a part of the denoiser, takes the student's states there; for
    chunks it is of chunk losses.
    """
    masked_BL = batch.masked_BL
    ids_N, ce_weight_N = batch.x0_BL[masked_BL], batch.ce_weight_BL[masked_BL]
    inputs: tuple[torch.Tensor, ...] = (ids_N, ce_weight_N)
    if targets is not None and not isinstance(targets, ChunkTargets):
        spread = partial(_rows_at, batch.distilled_BL[masked_BL])
        share_BL = torch.ones_like(batch.level_BL) if batch.share_BL is None else batch.share_BL
        inputs += (batch.kd_weight_BL[masked_BL], share_BL[masked_BL])
        inputs += tuple(map(spread, (targets.answered_N, *targets.tensors)))
    apart = _apart(targets, settings, projection, mixes=batch.share_BL is not None)

    def score(
        logits_nV: torch.Tensor, states_nD: torch.Tensor, *rows: torch.Tensor
    ) -> torch.Tensor:
        ids_n, ce_weight_n, *kd = rows
        ce_n = cross_entropy(logits_nV, ids_n, label_smoothing=settings.label_smoothing)
        kl_n = torch.zeros_like(ce_n)
        if kd:
            kd_weight_n, share_n, answered_n, *wanted = kd
            on_n = (kd_weight_n > 0) & answered_n
            picked = (tensor[on_n] for tensor in (share_n, *wanted))
            apart_n = apart(logits_nV[on_n], states_nD[on_n], *picked)
            # Without an answer the text's own token is the target.
            kl_n = kd_weight_n * ce_n.masked_scatter(on_n, apart_n)
        found = [ce_weight_n * ce_n, kl_n]
        if isinstance(targets, ChunkTargets):
            found.append(-cross_entropy(logits_nV, ids_n) if settings.label_smoothing else -ce_n)
        return torch.stack(found, dim=-1)

    options = batch.clean
    if settings.ar_weight:
        options["next_bL"] = _predicting(batch)
        inputs = _with_next_tokens(inputs, batch, options["next_bL"])
    scored = denoiser(
        batch.xt_BL,
        masked_BL,
        document_ids_BL=batch.document_ids_BL,
        score=score,
        score_inputs=inputs,
        with_states=True,
        **options,
    )
    own, following = scored[: len(ids_N)], scored[len(ids_N) :]
    sums_3 = torch.stack([own[:, 0].sum(), own[:, 1].sum(), following[:, 0].sum()])
    if isinstance(targets, ChunkTargets):
        sums_3 = sums_3 + _at(1, _chunk_sum(own[:, 2], batch, targets, settings))
    return sums_3


def _predicting(batch: MaskedBatch) -> torch.Tensor:
    """(b, L) bool: clean tokens after which another one of their document is learnt."""
    ids_bL = batch.document_ids_BL[: len(batch.x0_bL)]
    maskable_bL = batch.maskable_BL[: len(batch.x0_bL)]
    found_bL = torch.zeros_like(maskable_bL)
    found_bL[:, :-1] = maskable_bL[:, 1:] & (ids_bL[:, :-1] == ids_bL[:, 1:])
    return found_bL


def next_tokens(batch: MaskedBatch) -> int:
    """How many next tokens the clean stream predicts: the denominator of that term."""
    return int(_predicting(batch).sum())


def _with_next_tokens(
    inputs: tuple[torch.Tensor, ...], batch: MaskedBatch, next_bL: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The inputs of masked positions and, after them, of the clean stream: only a token to predict."""
    ids_A = batch.x0_bL[next_bL.roll(1, dims=1)]
    ids_N, ce_weight_N, *others = inputs
    return (
        torch.cat([ids_N, ids_A]),
        torch.cat([ce_weight_N, ce_weight_N.new_ones(len(ids_A))]),
        *(torch.cat([rows, rows.new_zeros(len(ids_A), *rows.shape[1:])]) for rows in others),
    )


def _chunk_sum(
    log_prob_N: torch.Tensor,
    batch: MaskedBatch,
    targets: ChunkTargets,
    settings: ObjectiveSettings,
) -> torch.Tensor:
    """() Σ w T² loss of the chunks; a chunk has weight and λ_t of its first token."""
    temperature = settings.kd_temperature
    log_s_C = chunk_log_likelihoods(log_prob_N, targets.chunk_N, len(targets))
    log_t_C = targets.log_likelihood_C
    weight_C = batch.kd_weight_BL[batch.masked_BL][targets.first_C]
    if batch.share_BL is not None:
        share_C = batch.share_BL[batch.masked_BL][targets.first_C]
        log_t_C = mixed_likelihood(log_s_C, log_t_C, share_C, temperature)
    loss_C = CHUNK_LOSSES[settings.chunk_loss](log_s_C, log_t_C, temperature)
    return (weight_C * loss_C).sum() * scale(settings)


def _at(place: int, value: torch.Tensor) -> torch.Tensor:
    """(3,) the value in its place, zeros elsewhere."""
    return torch.stack([value if i == place else torch.zeros_like(value) for i in range(3)])


def scale(settings: ObjectiveSettings) -> float:
    """T², which keeps the gradient's size independent of T (1503.02531, section 2), if it is on."""
    return settings.kd_temperature**2 if settings.temperature_squared else 1.0


def _apart(
    targets: Targets | None,
    settings: ObjectiveSettings,
    projection: nn.Module | None,
    *,
    mixes: bool,
) -> Callable[..., torch.Tensor]:
    """(n,) how far the student's logits or states are from the tensors of the targets.

    With `mixes` the target is a mixture in logit space, λ_t of it the teacher's (TIDAL).
    """
    plain = divergence(settings)

    def compared(
        log_p_nK: torch.Tensor, log_q_nK: torch.Tensor, share_n: torch.Tensor
    ) -> torch.Tensor:
        target_nK = mixed(log_p_nK, log_q_nK, share_n) if mixes else log_p_nK
        return scale(settings) * plain(target_nK, log_q_nK)

    def from_states(
        _logits_nV: torch.Tensor,
        states_nD: torch.Tensor,
        _share_n: torch.Tensor,
        wanted_nW: torch.Tensor,
    ) -> torch.Tensor:
        assert projection is not None, "states need a projection"
        return DISTANCES[settings.distance](projection(states_nD), wanted_nW)

    def from_sparse(
        logits_nV: torch.Tensor,
        _states_nD: torch.Tensor,
        share_n: torch.Tensor,
        *sparse: torch.Tensor,
    ) -> torch.Tensor:
        scaled_nV = logits_nV / settings.kd_temperature
        return compared(*TAILS[settings.tail](scaled_nV, *sparse), share_n)

    def from_heads(
        logits_nV: torch.Tensor,
        _states_nD: torch.Tensor,
        share_n: torch.Tensor,
        rows_nW: torch.Tensor,
    ) -> torch.Tensor:
        assert isinstance(targets, HeadTargets)
        theirs_nV = targets.logits(rows_nW)
        # Over the same tokens: the teacher's mask may be a word of the student's.
        never_nV = theirs_nV == float("-inf")
        ours_nV = logits_nV[:, : theirs_nV.shape[1]].masked_fill(never_nV, float("-inf"))
        temperature = settings.kd_temperature
        return compared(
            (theirs_nV / temperature).log_softmax(-1),
            (ours_nV / temperature).log_softmax(-1),
            share_n,
        )

    kinds = {StateTargets: from_states, HeadTargets: from_heads}
    return kinds.get(type(targets), from_sparse)


def divergence(settings: ObjectiveSettings) -> partial[torch.Tensor]:
    """The divergence of the settings as a function of two log-distributions."""
    options = {"beta": settings.jsd_beta} if settings.divergence == "jsd" else {}
    return partial(DIVERGENCES[settings.divergence], **options)


def _rows_at(at_N: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`rows` placed where `at_N` is true among N rows, zeros elsewhere."""
    result = rows.new_zeros(len(at_N), *rows.shape[1:])
    result[at_N] = rows
    return result
