"""States of rollouts: what of a finished text was masked when, and what is to be learnt there.

A token never changes once it is decided, so the step at which each was decided says what any earlier state
was: before step s the tokens with a step >= s were masks. Blocks see only finished ones before them, so
every block may be in a state of its own. A student without blocks is in one state as a whole row.

    states       masks of a block                                             copies of a row
    round        before one of its steps, uniformly chosen (OPDLM)            1
    complement   that, and a second time masks where there were none          2
    all          before each of its steps, each counting 1 / their number     as many as steps
    random       by the objective, as in text of others (masking.py)          as there

    eos          what of the tokens from a text's first end token on is learnt
    padded       the end token as the teacher has it, then end tokens
    learnt       the end token as the teacher has it, and nothing behind it
    published    nothing, not even the end token (the code of OPDLM)

Everything masked counts 1, whether it was decided next or not; with reduce=rollout, 1 / (what is masked in
its rollout). Shapes: B batch, L length, b rollouts before copies, G groups (blocks), S longest group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from mdm.diffusion import apply_mask, generator, row_uniforms

from .masking import (
    Groups,
    MaskedBatch,
    by_block,
    by_row,
    choose_distilled,
    counted_tokens,
    mask_batch,
    row_keys,
)
from .placement import MaskSettings, counted
from .rows import RowBatch
from .weighting import OTHER

if TYPE_CHECKING:
    from .objective import ObjectiveSettings
    from .on_policy import OnPolicySettings
    from .rollouts import Rollout

GIVEN = -1  # step of a token that was in the prompt
NEVER = 2**31 - 1  # step of a token that was still a mask when its text had ended


@dataclasses.dataclass(frozen=True)
class Trace:
    """Rollouts side by side, padded on the right; what a state is made of.

    tokens_bL        as they were decided
    step_bL          when, from 0; GIVEN in prompts and padding, NEVER if the text ended before
    document_ids_bL  0, and -1 at padding
    after_bL         bool: behind the first end token of the student's own
    end_bL           bool: that end token
    """

    tokens_bL: torch.Tensor
    step_bL: torch.Tensor
    document_ids_bL: torch.Tensor
    after_bL: torch.Tensor
    end_bL: torch.Tensor

    @property
    def written_bL(self) -> torch.Tensor:
        """What the student has written."""
        return self.step_bL != GIVEN


def trace(rollouts: Sequence[Rollout], *, eos_id: int, pad_id: int) -> Trace:
    """These rollouts as rows of one length."""
    length = max(len(rollout.tokens_L) for rollout in rollouts)
    tokens_bL = torch.full((len(rollouts), length), pad_id)
    step_bL = torch.full_like(tokens_bL, GIVEN)
    document_ids_bL = torch.full_like(tokens_bL, -1)
    for row, rollout in enumerate(rollouts):
        own = slice(len(rollout.tokens_L))
        tokens_bL[row, own], step_bL[row, own] = rollout.tokens_L, rollout.step_L
        document_ids_bL[row, own] = 0
    ends_bL = (tokens_bL == eos_id) & (step_bL != GIVEN)
    seen_bL = ends_bL.cumsum(1)
    return Trace(
        tokens_bL,
        step_bL,
        document_ids_bL,
        after_bL=(seen_bL - ends_bL.long() > 0) & (document_ids_bL == 0),
        end_bL=ends_bL & (seen_bL == 1),
    )


# --- which steps a block has, and masks before one ---------------------------------------------------


def steps_of(groups: Groups, step_bL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(G, S) the distinct steps of each group, ascending, NEVER where there are no more; (G,) how many."""
    step_GS = groups.gather(step_bL, GIVEN).sort(dim=1).values
    first_GS = torch.ones_like(step_GS, dtype=torch.bool)
    first_GS[:, 1:] = step_GS[:, 1:] != step_GS[:, :-1]
    decided_GS = first_GS & (step_GS != GIVEN) & (step_GS != NEVER)
    found_GS = step_GS.masked_fill(~decided_GS, NEVER).sort(dim=1).values
    return found_GS, decided_GS.sum(1)


def masked_before(groups: Groups, step_bL: torch.Tensor, at_G: torch.Tensor) -> torch.Tensor:
    """(b, L) bool: what was masked before step `at_G` of each group."""
    return (step_bL >= groups.spread(at_G[:, None])) & (step_bL != GIVEN)


@dataclasses.dataclass(frozen=True)
class Masks:
    """Copies of rows in states of their own: (B, L) what is masked, and what it counts before `reduce`."""

    masked_BL: torch.Tensor
    weight_BL: torch.Tensor


# Of a trace and its groups; (G,) uniforms choose.
States = Callable[[Trace, Groups, torch.Tensor], Masks]


def _round(trace: Trace, groups: Groups, u_G: torch.Tensor) -> Masks:
    steps_GS, count_G = steps_of(groups, trace.step_bL)
    chosen_G = (u_G * count_G).long()
    at_G = steps_GS.gather(1, chosen_G[:, None])[:, 0]
    masked_bL = masked_before(groups, trace.step_bL, at_G)
    return Masks(masked_bL, masked_bL.float())


def _complement(trace: Trace, groups: Groups, u_G: torch.Tensor) -> Masks:
    first_bL = _round(trace, groups, u_G).masked_BL
    masked_BL = torch.cat([first_bL, trace.written_bL & ~first_bL])
    return Masks(masked_BL, masked_BL.float())


def _all(trace: Trace, groups: Groups, u_G: torch.Tensor) -> Masks:
    steps_GS, count_G = steps_of(groups, trace.step_bL)
    masked_BL = torch.cat(
        [
            # A group that has had fewer steps is shown as it was in the end.
            masked_before(groups, trace.step_bL, steps_GS[:, number])
            & groups.spread((number < count_G)[:, None])
            for number in range(max(1, int(count_G.max())))
        ]
    )
    share_bL = groups.spread(1 / count_G.clamp(min=1)[:, None])
    return Masks(masked_BL, masked_BL * share_bL.repeat(len(masked_BL) // len(share_bL), 1))


# random is not made of steps, but by mask_batch.
STATES: dict[str, States | None] = {
    "round": _round,
    "complement": _complement,
    "all": _all,
    "random": None,
}

# Of a trace: (b, L) what may be learnt, and where the teacher is asked; elsewhere the end token is right.
EOS_RULES: dict[str, Callable[[Trace], tuple[torch.Tensor, torch.Tensor]]] = {
    "padded": lambda t: (t.written_bL, t.written_bL & ~t.after_bL),
    "learnt": lambda t: (t.written_bL & ~t.after_bL, t.written_bL & ~t.after_bL),
    "published": lambda t: (
        t.written_bL & ~t.after_bL & ~t.end_bL,
        t.written_bL & ~t.after_bL & ~t.end_bL,
    ),
}


# --- a micro-batch -----------------------------------------------------------------------------------


def state_batch(
    settings: OnPolicySettings,
    objective: ObjectiveSettings,
    rollouts: Sequence[Rollout],
    *,
    mask_id: int,
    eos_id: int,
    pad_id: int,
    seed: int,
    step: int,
    samples: Sequence[int],
    samples_per_step: int,
    block_size: int = 0,
) -> MaskedBatch:
    """Rollouts in states of a step, with weights; depends on nothing but the arguments.

    `samples` are their places among the step's rows. The text itself is not learnt: where the teacher is
    asked nothing, the target is an end token.
    """
    found = trace(rollouts, eos_id=eos_id, pad_id=pad_id)
    learnt_bL, asked_bL = EOS_RULES[settings.eos](found)
    # No random number of a rollout is one of the row of other text in its place.
    step = -1 - step
    make = STATES[settings.states]
    if make is None:
        batch = _random_masks(
            objective, found, mask_id, eos_id, seed, step, samples, samples_per_step, block_size
        )
        learnt_BL, asked_BL = (part.repeat(batch.copies, 1) for part in (learnt_bL, asked_bL))
        return dataclasses.replace(
            batch,
            distilled_BL=batch.distilled_BL & asked_BL,
            ce_weight_BL=torch.zeros_like(batch.ce_weight_BL),
            kd_weight_BL=batch.kd_weight_BL * learnt_BL,
            kd_denominator=float((counted_tokens(objective, batch) & learnt_BL).sum()),
            own_text=True,
        )
    x0_bL = found.tokens_bL.masked_fill(found.after_bL, eos_id)
    groups = by_row(found.document_ids_bL)
    if block_size:
        groups = by_block(found.document_ids_bL, block_size)
    masks = make(found, groups, _uniforms(groups, seed, step, samples))
    masked_BL = masks.masked_BL
    copies = len(masked_BL) // len(x0_bL)

    def repeated(rows_bL: torch.Tensor) -> torch.Tensor:
        return rows_bL.repeat(copies, 1)

    learnt_BL = masked_BL & repeated(learnt_bL)
    weight_BL = masks.weight_BL * learnt_BL
    if settings.reduce == "rollout":
        of_row_b1 = weight_BL.view(copies, *x0_bL.shape).sum((0, 2))[:, None]
        weight_BL = weight_BL / repeated(of_row_b1.clamp(min=1e-9))
    total = float(weight_BL.sum())
    distilled_BL, inclusion_BL = choose_distilled(
        objective,
        MaskSettings(),
        learnt_BL,
        learnt_BL.float(),
        lambda name: repeated(row_uniforms(name, seed, step, samples, x0_bL.shape[1])),
    )
    size_GS = groups.gather(found.written_bL).sum(1, keepdim=True).clamp(min=1)
    level_BL = torch.cat(
        [
            groups.spread(groups.gather(part_bL).sum(1, keepdim=True) / size_GS)
            for part_bL in masked_BL.chunk(copies)
        ]
    )
    return MaskedBatch(
        x0_BL=repeated(x0_bL),
        xt_BL=apply_mask(repeated(found.tokens_bL), masked_BL, mask_id),
        document_ids_BL=repeated(found.document_ids_bL),
        maskable_BL=repeated(found.written_bL),
        masked_BL=masked_BL,
        distilled_BL=distilled_BL & repeated(asked_bL),
        ce_weight_BL=torch.zeros_like(weight_BL),
        kd_weight_BL=weight_BL * counted(distilled_BL, inclusion_BL),
        level_BL=level_BL,
        denominator=total,
        kd_denominator=total,
        keys=row_keys(seed, step, samples, copies),
        copies=copies,
        block_size=block_size,
        own_text=True,
    )


def _random_masks(
    objective: ObjectiveSettings,
    found: Trace,
    mask_id: int,
    eos_id: int,
    seed: int,
    step: int,
    samples: Sequence[int],
    samples_per_step: int,
    block_size: int,
) -> MaskedBatch:
    """Masks by the objective, also of what stands behind the end: seen, it would give the end away."""
    x0_bL = found.tokens_bL.masked_fill(found.after_bL, eos_id)
    classes_bL = torch.full(x0_bL.shape, OTHER, dtype=torch.uint8)
    return mask_batch(
        objective,
        *RowBatch(x0_bL, found.document_ids_bL, found.written_bL, classes_bL),
        masks=MaskSettings(),
        mask_id=mask_id,
        seed=seed,
        step=step,
        samples=samples,
        samples_per_step=samples_per_step,
        block_size=block_size,
    )


def _uniforms(groups: Groups, seed: int, step: int, samples: Sequence[int]) -> torch.Tensor:
    """(G,) a uniform for each group: a function of its row's sample and its place in the row."""
    u_G = torch.empty(len(groups.row_G), dtype=torch.float64)
    for row, sample in enumerate(samples):
        own_G = groups.row_G == row
        random = generator("state", seed, step, sample)
        u_G[own_G] = torch.rand(int(own_G.sum()), dtype=torch.float64, generator=random)
    return u_G
