"""One training objective: draw masks, ask the teacher, score the student, weigh every term alike.

    loss = (1 - λ) · Σ w_i CE_i / D  +  λ · T² · Σ w_i h_i KL_i / D          (λ = kd_lambda · ramp)

KL_i is CE_i where the teacher has no counterpart of the position (a teacher with another tokenizer).
w_i is the weight of the noise level, the same for both terms, and D the global denominator of the
whole step, so that the result does not depend on micro-batches or processes. h_i corrects for a
chosen subset: with k of a row's m masked positions distilled, each counts m / k times.

    weight       w_i             D                   what it is
    bound        1/t, or L/l     maskable tokens     the negative likelihood bound per token
    mean_masked  1               masked tokens       plain mean; stresses high noise, no bound

Where masks fall and which are distilled is decided in placement.py, which also says what that does to
w_i and h_i. mean_masked takes the masks as they fall: its w_i is always 1.
Shapes: B batch, L length, N masked positions, n a chunk of them, V vocabulary, K teacher tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from mdm.config import require
from mdm.denoiser import Denoiser
from mdm.diffusion import apply_mask, mask_by_rate, mask_exactly, row_uniforms, spread_uniforms
from mdm.errors import check_known
from mdm.schedule import SCHEDULES

from .losses import (
    DISTANCES,
    DIVERGENCES,
    TAILS,
    cross_entropy,
    distillation,
    linear_ramp,
)
from .placement import (
    CHOICES,
    MEANINGS,
    PLACES,
    Ground,
    MaskSettings,
    Noise,
    Uniforms,
    class_weights,
    counted,
)
from .targets import Question, SoftTargets, StateTargets, Targets, TargetSettings
from .teachers.ar import ARTeacher
from .teachers.kinds import answer, asks_student


@dataclasses.dataclass(frozen=True)
class ObjectiveSettings:
    """What is minimised.

    masking         "rate": each token masked with probability 1 - alpha(t); "exact": exactly l tokens
    schedule        noise schedule of masking=rate: linear or cosine
    min_t           smallest noise level drawn; the weight 1/t is at most 1/min_t
    weight          "bound": 1/t or L/l, the likelihood bound per token; "mean_masked": plain mean over
                    masked tokens, which stresses high noise and is no bound
    label_smoothing of the cross-entropy; 0 = off
    kd_lambda       weight of distillation in (1-λ)·CE + λ·T²·KL; 0 = no teacher is loaded
    kd_ramp_steps   steps over which λ grows linearly from 0; 0 = at once
    kd_temperature  of teacher and student in the distillation term
    kd_positions    masked positions distilled per row, chosen by masks.distilled; 0 = all
    ce_positions    cross-entropy on "all" masked positions, or only on the "rest" not distilled (rows with
                    no more masks than kd_positions then have none)
    divergence      forward_kl, reverse_kl or jsd
    jsd_beta        of divergence=jsd; 0 = forward KL, 1 = reverse KL
    tail            treatment of tokens the teacher did not keep: bucket, renormalise or partial
    distance        target.kind=embedding, in place of a divergence: cosine or l2
    """

    masking: str = "rate"
    schedule: str = "linear"
    min_t: float = 0.01
    weight: str = "bound"
    label_smoothing: float = 0.0
    kd_lambda: float = 0.5
    kd_ramp_steps: int = 0
    kd_temperature: float = 1.0
    kd_positions: int = 0
    ce_positions: str = "all"
    divergence: str = "forward_kl"
    jsd_beta: float = 0.5
    tail: str = "bucket"
    distance: str = "cosine"

    def __post_init__(self) -> None:
        check_known("masking", self.masking, MASKINGS)
        check_known("schedule", self.schedule, SCHEDULES)
        check_known("weight", self.weight, WEIGHTS)
        check_known("divergence", self.divergence, DIVERGENCES)
        check_known("tail", self.tail, TAILS)
        check_known("distance", self.distance, DISTANCES)
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
        for name in ("kd_positions", "kd_ramp_steps"):
            value = getattr(self, name)
            require(value >= 0, f"objective.{name} must be >= 0; got {value}")
        require(
            self.ce_positions == "all" or self.kd_positions > 0 or self.kd_lambda == 0,
            "objective.ce_positions=rest leaves nothing for the cross-entropy when all masked"
            " positions are distilled; set objective.kd_positions to 1 or more",
        )


@dataclasses.dataclass(frozen=True)
class MaskedBatch:
    """A micro-batch after the forward process, on the CPU.

    `weight_BL` is w_i at masked positions; `distilled_BL` the positions the teacher is asked for;
    `ce_weight_BL` and `kd_weight_BL` include the subset corrections. `keys` are (seed, step, sample) of
    each row: whatever else is random about a row is a function of them. `rows` are the rows' places in the
    training data, if they come from there.
    """

    x0_BL: torch.Tensor
    xt_BL: torch.Tensor
    document_ids_BL: torch.Tensor
    masked_BL: torch.Tensor
    distilled_BL: torch.Tensor
    ce_weight_BL: torch.Tensor
    kd_weight_BL: torch.Tensor
    denominator: float
    keys: tuple[tuple[int, ...], ...]
    rows: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens in the batch, padding left out."""
        return int((self.document_ids_BL >= 0).sum())

    def to(self, device: torch.device) -> MaskedBatch:
        """The same batch on another device."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        moved: dict[str, Any] = {
            name: value.to(device)
            for name, value in values.items()
            if isinstance(value, torch.Tensor)
        }
        return dataclasses.replace(self, **moved)


def _by_rate(settings: ObjectiveSettings, level_B: torch.Tensor, total_B: torch.Tensor) -> Noise:
    t_B = settings.min_t + (1 - settings.min_t) * level_B
    schedule = SCHEDULES[settings.schedule]
    share_B = 1 - schedule.alpha(t_B)
    least = 1 - float(schedule.alpha(torch.tensor(settings.min_t, dtype=torch.float64)))

    def mask(maskable_BL: torch.Tensor, u_BL: torch.Tensor, taken: int) -> torch.Tensor:
        return mask_by_rate(share_B, maskable_BL, u_BL)

    return Noise(share_B, schedule.loss_weight(t_B), mask, least)


def _exactly(settings: ObjectiveSettings, level_B: torch.Tensor, total_B: torch.Tensor) -> Noise:
    count_B = (level_B * total_B).long() + 1  # uniform on 1..L: level < 1
    count_B = torch.minimum(count_B, total_B)

    def mask(maskable_BL: torch.Tensor, u_BL: torch.Tensor, taken: int) -> torch.Tensor:
        return mask_exactly(count_B - taken, maskable_BL, u_BL)

    return Noise(count_B / total_B.clamp(min=1), total_B / count_B.clamp(min=1), mask, None)


MASKINGS = {"rate": _by_rate, "exact": _exactly}
WEIGHTS = ("bound", "mean_masked")


def mask_batch(
    settings: ObjectiveSettings,
    tokens_BL: torch.Tensor,
    document_ids_BL: torch.Tensor,
    maskable_BL: torch.Tensor,
    classes_BL: torch.Tensor,
    *,
    masks: MaskSettings,
    mask_id: int,
    seed: int,
    step: int,
    samples: Sequence[int],
    samples_per_step: int,
    rows: Sequence[int] = (),
) -> MaskedBatch:
    """Masks and weights of the samples with these indices in the step; depends on nothing else."""
    uniforms = partial(
        row_uniforms, seed=seed, step=step, samples=samples, length=tokens_BL.shape[1]
    )
    level_B = spread_uniforms("noise level", seed, step, samples, samples_per_step)
    noise = MASKINGS[settings.masking](settings, level_B, maskable_BL.sum(1))
    c_BL = class_weights(masks, classes_BL) * maskable_BL
    ground = Ground(maskable_BL, document_ids_BL, c_BL)
    masked_BL, weight_BL = PLACES[masks.where](masks, noise, ground, uniforms)
    bound = settings.weight == "bound"
    weight_BL = masked_BL * (weight_BL if bound else 1.0)
    distilled_BL, inclusion_BL = _distilled(settings, masks, masked_BL, c_BL, uniforms)
    ce_weight_BL = weight_BL
    if settings.ce_positions == "rest":
        # Choosing uniformly never makes a position of the rest count more than kd_positions + 1 times.
        left_BL = (1 - inclusion_BL).clamp(min=1 / (settings.kd_positions + 1))
        ce_weight_BL = weight_BL * counted(masked_BL & ~distilled_BL, left_BL)
    return MaskedBatch(
        x0_BL=tokens_BL,
        xt_BL=apply_mask(tokens_BL, masked_BL, mask_id),
        document_ids_BL=document_ids_BL,
        masked_BL=masked_BL,
        distilled_BL=distilled_BL,
        ce_weight_BL=ce_weight_BL,
        kd_weight_BL=weight_BL * counted(distilled_BL, inclusion_BL),
        denominator=float((maskable_BL if bound else masked_BL).sum()),
        keys=tuple((seed, step, sample) for sample in samples),
        rows=tuple(rows),
    )


def _distilled(
    settings: ObjectiveSettings,
    masks: MaskSettings,
    masked_BL: torch.Tensor,
    c_BL: torch.Tensor,
    uniforms: Uniforms,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions the teacher is asked for, and the probability of each masked one to be chosen."""
    if settings.kd_lambda == 0:
        return torch.zeros_like(masked_BL), torch.zeros(masked_BL.shape)
    if settings.kd_positions == 0:
        return masked_BL, masked_BL.float()
    return CHOICES[masks.distilled](masked_BL, c_BL, settings.kd_positions, uniforms)


def loss_meaning(settings: ObjectiveSettings, masks: MaskSettings) -> str:
    """What the loss estimates, in words for the log and the record."""
    if settings.weight == "mean_masked":
        return "a mean over masked tokens, no likelihood bound"
    return MEANINGS[masks.where]


def kd_lambda_at(settings: ObjectiveSettings, step: int) -> float:
    """λ at this optimizer step (0-based)."""
    return settings.kd_lambda * linear_ramp(step, ramp_steps=settings.kd_ramp_steps)


def soft_targets(
    teacher: ARTeacher,
    batch: MaskedBatch,
    settings: TargetSettings,
    temperature: float,
    student: Denoiser | None = None,
) -> SoftTargets:
    """The teacher's answer for the distilled positions of a batch, in the precision of its weights.

    `student` is asked for its own distributions if the target needs them.
    """
    proposals = None
    if asks_student(settings):
        assert student is not None, "this target needs the student"
        proposals = own_distributions(student, batch, max(PROPOSED, settings.student_candidates))
    question = Question(
        batch.x0_BL,
        batch.masked_BL,
        batch.distilled_BL,
        batch.document_ids_BL,
        batch.keys,
        proposals,
    )
    with torch.autocast(batch.x0_BL.device.type, enabled=False):
        return answer(teacher, question, settings=settings, temperature=temperature)


PROPOSED = 64  # tokens of the student's distribution that are kept


@torch.no_grad()
def own_distributions(student: Denoiser, batch: MaskedBatch, top_k: int) -> SoftTargets:
    """The student's distributions at all masked positions, from xt alone and without gradient."""

    def likeliest(logits_nV: torch.Tensor) -> torch.Tensor:
        log_probs_nK, ids_nK = logits_nV.log_softmax(-1).topk(min(top_k, logits_nV.shape[-1]))
        return torch.cat([log_probs_nK.double(), ids_nK.double()], dim=-1)  # both exact

    was_training, device = student.training, batch.x0_BL.device.type
    student.eval()
    # Without the cache: weights cast in here have no gradient, and the training forward that follows in
    # the same autocast region would use them (seen in torch before 2.10).
    with torch.autocast(
        device,
        dtype=torch.get_autocast_dtype(device),
        enabled=torch.is_autocast_enabled(device),
        cache_enabled=False,
    ):
        found_N2K = student(
            batch.xt_BL, batch.masked_BL, document_ids_BL=batch.document_ids_BL, score=likeliest
        )
    student.train(was_training)
    log_probs_NK, ids_NK = found_N2K.chunk(2, dim=-1)
    tail_N = (1 - log_probs_NK.exp().sum(-1)).clamp(min=0)
    return SoftTargets(ids_NK.long(), log_probs_NK.float(), tail_N.float(), 1.0, "visible tokens")


def loss_sums(
    denoiser: nn.Module,
    batch: MaskedBatch,
    targets: Targets | None,
    settings: ObjectiveSettings,
    projection: nn.Module | None = None,
) -> torch.Tensor:
    """(2,) Σ w CE and Σ w T² KL of a micro-batch, before division by D.

    `denoiser` is a Denoiser, or one wrapped for several processes. For a teacher's states the second
    sum is of distances, and `projection`, a part of the denoiser, takes the student's states there.
    """
    masked_BL = batch.masked_BL
    ids_N, ce_weight_N = batch.x0_BL[masked_BL], batch.ce_weight_BL[masked_BL]
    kd_weight_N = batch.kd_weight_BL[masked_BL]
    inputs: tuple[torch.Tensor, ...] = (ids_N, ce_weight_N)
    if targets is not None:
        spread = partial(_rows_at, batch.distilled_BL[masked_BL])
        inputs += (kd_weight_N, *map(spread, (targets.answered_N, *targets.tensors)))
    apart = _apart(targets, settings, projection)

    def score(
        logits_nV: torch.Tensor, states_nD: torch.Tensor, *chunk: torch.Tensor
    ) -> torch.Tensor:
        ids_n, ce_weight_n, *kd = chunk
        ce_n = cross_entropy(logits_nV, ids_n, label_smoothing=settings.label_smoothing)
        kl_n = torch.zeros_like(ce_n)
        if kd:
            kd_weight_n, answered_n, *wanted = kd
            on_n = (kd_weight_n > 0) & answered_n
            apart_n = apart(logits_nV[on_n], states_nD[on_n], *(tensor[on_n] for tensor in wanted))
            # Without an answer the text's own token is the target.
            kl_n = kd_weight_n * ce_n.masked_scatter(on_n, apart_n)
        return torch.stack([ce_weight_n * ce_n, kl_n], dim=-1)

    scored_N2 = denoiser(
        batch.xt_BL,
        masked_BL,
        document_ids_BL=batch.document_ids_BL,
        score=score,
        score_inputs=inputs,
        with_states=True,
    )
    return scored_N2.sum(0)


def _apart(
    targets: Targets | None, settings: ObjectiveSettings, projection: nn.Module | None
) -> Callable[..., torch.Tensor]:
    """(n,) how far the student's logits or states are from the tensors of the targets."""

    def from_states(
        _logits_nV: torch.Tensor, states_nD: torch.Tensor, wanted_nC: torch.Tensor
    ) -> torch.Tensor:
        assert projection is not None, "states need a projection"
        return DISTANCES[settings.distance](projection(states_nD), wanted_nC)

    def from_distributions(
        logits_nV: torch.Tensor, _states_nD: torch.Tensor, *sparse: torch.Tensor
    ) -> torch.Tensor:
        return distillation(
            logits_nV,
            *sparse,
            divergence=divergence(settings),
            temperature=settings.kd_temperature,
            tail=settings.tail,
        )

    return from_states if isinstance(targets, StateTargets) else from_distributions


def divergence(settings: ObjectiveSettings) -> partial[torch.Tensor]:
    """The divergence of the settings as a function of two log-distributions."""
    options = {"beta": settings.jsd_beta} if settings.divergence == "jsd" else {}
    return partial(DIVERGENCES[settings.divergence], **options)


def _rows_at(at_N: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`rows` placed where `at_N` is true among N rows, zeros elsewhere."""
    result = rows.new_zeros(len(at_N), *rows.shape[1:])
    result[at_N] = rows
    return result
