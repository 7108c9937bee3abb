"""Settings of objective and target that are each right but do not fit together."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from mdm.attention import BLOCK_ATTENTIONS
from mdm.config import require
from mdm.errors import ConfigError, check_known

from .dataset import DataSettings
from .lambdas import MixSettings
from .losses import check_tail
from .objective import ObjectiveSettings
from .on_policy import OnPolicySettings
from .placement import BY_CHUNK, MaskSettings
from .targets import TargetSettings
from .teachers.denoised import CHUNKS, SEES_MASKS
from .teachers.foreign import FOREIGN
from .teachers.kinds import SAMPLED, TARGETS

_UNIFORM, _UNMIXED, _OFF = MaskSettings(), MixSettings(), OnPolicySettings()


def check_objective(
    objective: ObjectiveSettings,
    target: TargetSettings,
    masks: MaskSettings = _UNIFORM,
    mix: MixSettings = _UNMIXED,
    on_policy: OnPolicySettings = _OFF,
) -> None:
    """Settings that are each right but do not fit together: raise ConfigError."""
    check_known("target.kind", target.kind, (*TARGETS, *FOREIGN, *SEES_MASKS))
    require(
        not objective.complementary or masks.where == "uniform",
        f"objective.complementary with masks.where={masks.where}: only uniform masks have a complement"
        " of the same kind; leave one of them out",
    )
    require(
        objective.masking != "clipped" or masks.where == "uniform",
        f"objective.masking=clipped with masks.where={masks.where}: set masks.where=uniform",
    )
    by_chunk = objective.distils and target.kind == CHUNKS
    require(
        (masks.where in BY_CHUNK) == by_chunk,
        f"masks.where={masks.where} with target.kind={target.kind}: chunks of two tokenizations are"
        f" masked together ({', '.join(BY_CHUNK)}) where a teacher is asked for them, and only there",
    )
    if on_policy.active:
        _check_on_policy(on_policy, objective, target, mix)
    if objective.distils or on_policy.active:
        _check_target(objective, target)
        _check_meaningless(objective, target)
        if mix.active and target.kind in ("embedding", *SAMPLED):
            raise ConfigError(
                f"mix.first={mix.first}, mix.last={mix.last}, mix.by_noise={mix.by_noise} mix"
                f" distributions, which target.kind={target.kind} does not give exactly; leave mix out"
            )
        if mix.active and objective.tail == "partial":
            raise ConfigError(
                "objective.tail=partial takes a part of the distributions, which cannot be mixed; set"
                " objective.tail=bucket, or leave mix out"
            )


def _check_on_policy(
    on_policy: OnPolicySettings,
    objective: ObjectiveSettings,
    target: TargetSettings,
    mix: MixSettings,
) -> None:
    """What does not go with text of the student's own."""
    require(
        target.kind not in (*FOREIGN, CHUNKS) and not target.infill,
        f"target.kind={target.kind}, infill={target.infill!r} with on_policy.fraction="
        f"{on_policy.fraction}: rollouts are judged in the tokens they were written in and as they"
        " stand; set target.kind=left, suffix, smc, student or denoised, without infill",
    )
    require(
        not target.cache,
        f"target.cache={target.cache} with on_policy.fraction={on_policy.fraction}: nobody has asked the"
        " teacher about text that is not written yet; leave target.cache out",
    )
    pinned = target.kind in ("i_sir", "csmc") or (target.kind == "student" and target.reference)
    require(
        not pinned,
        f"target.kind={target.kind} with on_policy.fraction={on_policy.fraction}: it takes the text's own"
        " tokens for a draw of the teacher's, and rollouts are the student's; set target.kind=smc, or"
        " target.kind=student with target.reference=false",
    )
    require(
        not mix.active and mix.weight == MixSettings().weight,
        f"mix.first={mix.first}, mix.weight={mix.weight} with on_policy.fraction={on_policy.fraction}:"
        " rollouts have no noise level; leave mix out",
    )
    require(
        not objective.grow_from,
        f"objective.grow_from={objective.grow_from} with on_policy.fraction={on_policy.fraction}: rollouts"
        " are written in the blocks the student will have; leave grow_from and grow_steps out",
    )


def _check_target(objective: ObjectiveSettings, target: TargetSettings) -> None:
    if target.kind in FOREIGN and target.infill:
        raise ConfigError(
            f"target.infill={target.infill} with target.kind={target.kind}: a teacher with another"
            " tokenizer reads the text from the left only; leave target.infill out"
        )
    if target.kind in SAMPLED:
        _check_sampled(objective, target.kind)
    if target.comp_demo and target.kind not in SEES_MASKS:
        raise ConfigError(
            f"target.comp_demo={target.comp_demo} with target.kind={target.kind}: this teacher does not"
            f" see masks; set target.kind to one of {', '.join(SEES_MASKS)}, or leave comp_demo out"
        )
    if target.kind in SEES_MASKS:
        for name, value in dataclasses.asdict(target).items():
            if name not in _OF_MASKS and value != getattr(TargetSettings(), name):
                raise ConfigError(
                    f"target.{name}={value} means nothing with target.kind={target.kind}, which asks a"
                    " diffusion model once and for whole distributions; leave it out"
                )
    elif target.kind != "embedding":
        # `mapped` leaves a single token where only one can go on, with nothing outside.
        truncated = target.kind != "left" or target.top_p < 1
        check_tail(objective.divergence, objective.tail, truncated=truncated)
    if target.kind == CHUNKS:
        require(
            objective.kd_lambda < 1,
            f"objective.kd_lambda=1 with target.kind={CHUNKS} leaves nothing for tokens that lie in no"
            " chunk, end tokens among them; set it below 1, or use objective.kd_weight",
        )
        require(
            objective.noise == "row"
            and objective.kd_positions == 0
            and not objective.complementary,
            f"target.kind={CHUNKS} masks whole chunks of a row and distils all of them: set"
            " objective.noise=row, kd_positions=0 and complementary=false",
        )


# Settings of a target that a diffusion teacher is asked by.
_OF_MASKS = ("kind", "comp_demo", "comp_demo_share")

# Settings that go with some ways of comparing only, and what else compares.
_OTHERS = {
    "embedding": (
        ("divergence", "jsd_beta", "tail", "kd_temperature", "temperature_squared", "chunk_loss"),
        "compares states by objective.distance",
    ),
    CHUNKS: (
        ("divergence", "jsd_beta", "tail", "distance"),
        "compares likelihoods by objective.chunk_loss",
    ),
    "denoised": (("tail", "distance", "chunk_loss"), "compares whole distributions"),
}


def _check_meaningless(objective: ObjectiveSettings, target: TargetSettings) -> None:
    """States have a distance, distributions a divergence, chunks a loss of their own."""
    names, compares = _OTHERS.get(
        target.kind, (("distance", "chunk_loss"), "compares distributions")
    )
    for name in names:
        value = getattr(objective, name)
        if value != getattr(ObjectiveSettings(), name):
            raise ConfigError(
                f"objective.{name}={value} means nothing with target.kind={target.kind}, which"
                f" {compares}; leave it out"
            )


class Layout(Protocol):
    """What of a student says how it reads: a Denoiser, or what is known of one without its weights."""

    @property
    def block_size(self) -> int | None: ...
    @property
    def attention(self) -> str: ...
    @property
    def shift(self) -> bool: ...


def check_blocks(objective: ObjectiveSettings, data: DataSettings, student: Layout) -> None:
    """Settings that need a student with blocks, or other blocks: raise ConfigError."""
    block_size, attention, shift = student.block_size, student.attention, student.shift
    eos_block = data.eos_block if data.eos_padding == "document" else 0
    wants = {
        "noise": objective.noise == "block",
        "ar_weight": objective.ar_weight > 0,
        "grow_from": objective.grow_from > 0,
    }
    if block_size is None:
        asked = [name for name, wanted in wants.items() if wanted]
        require(
            not asked,
            f"objective.{asked[0] if asked else ''} is for block diffusion students, and this one"
            " reads the full canvas; set student.kind=bd3lm, or leave it out",
        )
        return
    require(
        eos_block % block_size == 0,
        f"data.eos_block={eos_block} ends documents inside a block of {block_size} tokens; make it a"
        " multiple of student.block_size, or set data.eos_padding=none",
    )
    doublings = block_size / max(1, objective.grow_from)
    require(
        not objective.grow_from or doublings in (2**k for k in range(1, 24)),
        f"objective.grow_from={objective.grow_from} does not become the block size {block_size} by"
        " doubling",
    )
    causal = BLOCK_ATTENTIONS[attention].clean_causal
    require(
        not objective.ar_weight or (shift and causal),
        f"objective.ar_weight={objective.ar_weight} trains clean tokens to predict the next one, which"
        f" needs student.shift=true and an attention that is causal there (context_causal); got"
        f" shift={shift}, attention={attention}",
    )


def _check_sampled(objective: ObjectiveSettings, kind: str) -> None:
    """A random target is right on average, so the loss has to be linear in it."""
    if objective.kd_temperature != 1:
        raise ConfigError(
            f"objective.kd_temperature={objective.kd_temperature} with target.kind={kind}: the mean of"
            " tempered draws is not the tempered mean, so the student would learn something else; set"
            " objective.kd_temperature=1, or target.kind to left or suffix"
        )
    if objective.divergence != "forward_kl" or objective.tail == "renormalise":
        raise ConfigError(
            f"objective.divergence={objective.divergence} and tail={objective.tail} with"
            f" target.kind={kind}: its draws are right on average only in a loss that is linear in them;"
            " set objective.divergence=forward_kl and objective.tail=bucket"
        )
