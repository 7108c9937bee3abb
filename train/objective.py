"""The training objective: which terms it has, and how they are weighed.

    loss = (1 - λ) · Σ w_i CE_i / D  +  λ · T² · Σ w_i h_i KL_i / D          (λ = kd_lambda · ramp)

or, with kd_weight, Σ w CE / D + kd_weight · ramp · T² Σ w h KL / D; and ar_weight · the mean
cross-entropy of next tokens on the clean stream of a block diffusion student.

KL_i is CE_i where the teacher has no counterpart of the position (a teacher with another tokenizer).
w_i is the weight of the noise level, the same for both terms, and D the global denominator of the
whole step, so that the result does not depend on micro-batches or processes. h_i corrects for a
chosen subset: with k of a row's m masked positions distilled, each counts m / k times. With chunks
(target.kind=chunks) KL_i stands for a loss per chunk, which has the place of its first token, and tokens in
no chunk (end tokens) have the first term only.

    weight       w_i             D                   what it is
    bound        1/t, or L/l     maskable tokens     the negative likelihood bound per token
    mean_masked  1               masked tokens       plain mean; stresses high noise, no bound

Where masks fall and which are distilled is decided in masking.py and placement.py, which also say what
that does to w_i and h_i. mean_masked takes the masks as they fall: its w_i is always 1.
What a micro-batch adds to the sums is in loss_sums.py.
"""

from __future__ import annotations

import dataclasses

from mdm.config import require
from mdm.errors import check_known
from mdm.schedule import SCHEDULES

from .calm import CHUNK_LOSSES
from .lambdas import MIX_WEIGHTS, MixSettings, target_mix
from .losses import DISTANCES, DIVERGENCES, TAILS, linear_ramp
from .masking import MASKINGS, WEIGHTS, MaskedBatch
from .placement import MEANINGS, MaskSettings


@dataclasses.dataclass(frozen=True)
class ObjectiveSettings:
    """What is minimised.

    masking         "rate": each token masked with probability 1 - alpha(t); "exact": exactly l tokens;
                    "clipped": as rate with t in [1/B, 1] for blocks of B, one mask at least (no bound)
    noise           what shares a noise level: "row", or "block" of a block diffusion student
    complementary   every row twice, masked where the other is not, against one clean stream
    schedule        noise schedule of masking=rate: linear or cosine
    min_t           smallest noise level drawn; the weight 1/t is at most 1/min_t
    weight          "bound": 1/t or L/l, the likelihood bound per token; "mean_masked": plain mean over
                    masked tokens, which stresses high noise and is no bound
    label_smoothing of the cross-entropy; 0 = off
    kd_lambda       weight of distillation in (1-λ)·CE + λ·T²·KL; 0 = no teacher is loaded
    kd_weight       weight of distillation in CE + kd_weight·T²·KL, instead of kd_lambda; null = off
    kd_reduce       "same": distillation is weighed as the cross-entropy; "mean_masked": it is a plain mean
                    over masked tokens (or chunks), as published for TIDE, whatever `weight` is
    kd_ramp_steps   steps over which λ grows linearly from 0; 0 = at once
    kd_temperature  of teacher and student in the distillation term
    temperature_squared  whether that term is multiplied by T²; published chunk losses are not
    kd_positions    masked positions distilled per row, chosen by masks.distilled; 0 = all
    ce_positions    cross-entropy on "all" masked positions, or only on the "rest" not distilled (rows with
                    no more masks than kd_positions then have none)
    divergence      forward_kl, reverse_kl or jsd
    chunk_loss      target.kind=chunks, in place of a divergence: forward_calm, reverse_calm (as published),
                    or bernoulli_kl (what that is said to be)
    jsd_beta        of divergence=jsd; 0 = forward KL, 1 = reverse KL
    tail            treatment of tokens the teacher did not keep: bucket, renormalise or partial
    distance        target.kind=embedding, in place of a divergence: cosine or l2
    ar_weight       weight of the next-token loss on the clean stream of a block diffusion student; 0 = off
    grow_from       block size at the start, doubled until it is the student's; 0 = no growth
    grow_steps      steps over which it grows
    """

    masking: str = "rate"
    noise: str = "row"
    complementary: bool = False
    schedule: str = "linear"
    min_t: float = 0.01
    weight: str = "bound"
    label_smoothing: float = 0.0
    kd_lambda: float = 0.5
    kd_weight: float | None = None
    kd_reduce: str = "same"
    kd_ramp_steps: int = 0
    kd_temperature: float = 1.0
    temperature_squared: bool = True
    kd_positions: int = 0
    ce_positions: str = "all"
    divergence: str = "forward_kl"
    chunk_loss: str = "forward_calm"
    jsd_beta: float = 0.5
    tail: str = "bucket"
    distance: str = "cosine"
    ar_weight: float = 0.0
    grow_from: int = 0
    grow_steps: int = 0

    def __post_init__(self) -> None:
        check_known("masking", self.masking, MASKINGS)
        check_known("schedule", self.schedule, SCHEDULES)
        check_known("weight", self.weight, WEIGHTS)
        check_known("divergence", self.divergence, DIVERGENCES)
        check_known("tail", self.tail, TAILS)
        check_known("distance", self.distance, DISTANCES)
        check_known("chunk_loss", self.chunk_loss, CHUNK_LOSSES)
        check_known("noise", self.noise, ("row", "block"))
        check_known("kd_reduce", self.kd_reduce, ("same", "mean_masked"))
        check_known("ce_positions", self.ce_positions, ("all", "rest"))
        require(0 < self.min_t < 1, f"objective.min_t must be in (0, 1); got {self.min_t}")
        for name in ("kd_lambda", "jsd_beta"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"objective.{name} must be in [0, 1]; got {value}")
        require(
            0 <= self.label_smoothing < 1,
            f"objective.label_smoothing must be in [0, 1); got {self.label_smoothing}",
        )
        require(
            self.kd_temperature > 0,
            f"objective.kd_temperature must be positive; got {self.kd_temperature}",
        )
        for name in (
            "kd_positions", "kd_ramp_steps", "kd_weight", "ar_weight", "grow_from", "grow_steps"
        ):  # fmt: skip
            value = getattr(self, name)
            require(value is None or value >= 0, f"objective.{name} must be >= 0; got {value}")
        require(
            self.kd_weight is None or self.kd_lambda == ObjectiveSettings.kd_lambda,
            f"objective.kd_weight={self.kd_weight} takes the place of kd_lambda={self.kd_lambda}; set"
            " one of them only",
        )
        require(
            bool(self.grow_from) == bool(self.grow_steps),
            f"objective.grow_from={self.grow_from} and grow_steps={self.grow_steps} go together",
        )
        self._check_masking()
        require(
            self.ce_positions == "all" or self.kd_positions > 0 or not self.distils,
            "objective.ce_positions=rest leaves nothing for the cross-entropy when all masked"
            " positions are distilled; set objective.kd_positions to 1 or more",
        )

    def _check_masking(self) -> None:
        if self.masking == "clipped":
            require(
                self.noise == "block" and not self.complementary and self.schedule == "linear",
                "objective.masking=clipped is for blocks, each with masks of its own: set"
                " objective.noise=block, schedule=linear, and leave complementary off",
            )
        if self.complementary:
            require(
                self.schedule == "linear" and self.min_t < 0.5,
                f"objective.complementary masks a share 1 - t the second time: it needs"
                f" schedule=linear and min_t below 0.5; got {self.schedule}, {self.min_t}",
            )

    @property
    def distils(self) -> bool:
        """Is there a teacher?"""
        return (self.kd_lambda if self.kd_weight is None else self.kd_weight) > 0


def loss_meaning(settings: ObjectiveSettings, masks: MaskSettings) -> str:
    """What the loss estimates, in words for the log and the record."""
    if settings.weight == "mean_masked":
        return "a mean over masked tokens, no likelihood bound"
    if settings.masking == "clipped":
        return "no likelihood bound, as low noise levels are left out"
    return MEANINGS[masks.where]


def term_weights(settings: ObjectiveSettings, step: int, *, teacher: bool) -> tuple[float, ...]:
    """Weights of the terms (cross-entropy, distillation, next token) at this optimizer step (0-based)."""
    ramp = linear_ramp(step, ramp_steps=settings.kd_ramp_steps) if teacher else 0.0
    if settings.kd_weight is not None:
        return 1.0, settings.kd_weight * ramp, settings.ar_weight
    share = settings.kd_lambda * ramp
    return 1 - share, share, settings.ar_weight


def with_mix(batch: MaskedBatch, mix: MixSettings, progress: float) -> MaskedBatch:
    """The batch with λ_t of its mixed targets, and distillation weighed by noise level (lambdas.py)."""
    weight_BL = MIX_WEIGHTS[mix.weight](batch.level_BL)
    return dataclasses.replace(
        batch,
        share_BL=target_mix(mix, progress, batch.level_BL) if mix.active else None,
        kd_weight_BL=batch.kd_weight_BL * weight_BL,
    )
