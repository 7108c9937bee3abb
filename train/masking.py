"""The forward process of a training step: which tokens are masked, how much each counts, in what blocks.

Noise is drawn for a group of tokens, a row or a block of a document (objective.noise); to the forward
process a block is a row of its own, so everything placement.py does is done within each group. A masked
token counts with the weight of its group's noise level, the same for both terms of the loss, unless
objective.kd_reduce says otherwise. Both kinds of noise give the same bound: a uniformly random set of l
tokens, l uniform, is one in each of its blocks.

    masking   masks of a group of m tokens                          weight   level t
    rate      each with probability 1 - alpha(t), t uniform          1/t      t
    exact     exactly l, l uniform on 1..m                           m/l      l/m
    clipped   as rate, t uniform on [1/B, 1], one mask at least      1/t      t   (no bound; blocks of B;
              as Stable-DiffCoder does)

With objective.complementary every row comes twice, the second time with the masks where the first has
none; l is then uniform on 0..m, and what is masked counts (m + 1)/l.
Shapes: B batch, L length, b rows before complements, G groups, S tokens of the longest group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from mdm import attention
from mdm.diffusion import apply_mask, generator, mask_by_rate, mask_exactly, row_uniforms
from mdm.schedule import SCHEDULES

from .placement import (
    BY_CHUNK,
    CHOICES,
    PLACES,
    Ground,
    MaskSettings,
    Noise,
    Uniforms,
    class_weights,
    counted,
)

if TYPE_CHECKING:
    from .objective import ObjectiveSettings


@dataclasses.dataclass(frozen=True)
class MaskedBatch:
    """A micro-batch after the forward process, on the CPU.

    `ce_weight_BL` is w_i at masked positions; `distilled_BL` the positions the teacher is asked for;
    `ce_weight_BL` and `kd_weight_BL` include the subset corrections, and each has a denominator.
    `maskable_BL` are the tokens that are learnt, `level_BL` the noise level t of each. `keys` are (seed,
    step, sample) of each row: whatever else is random about a row is a function of them. `rows` are the
    rows' places in the training data, if they come from there. Of `copies` copies of every row, which
    differ in their masks, the first ones come first. `block_size` is that of this step; 0 = no blocks.
    `chunk_BL` numbers the chunks of two tokenizations; -1 = in none. `share_BL` is λ_t of a mixed target.
    `own_text` tells rollouts of the student from text of others.
    """

    x0_BL: torch.Tensor
    xt_BL: torch.Tensor
    document_ids_BL: torch.Tensor
    maskable_BL: torch.Tensor
    masked_BL: torch.Tensor
    distilled_BL: torch.Tensor
    ce_weight_BL: torch.Tensor
    kd_weight_BL: torch.Tensor
    level_BL: torch.Tensor
    denominator: float
    kd_denominator: float
    keys: tuple[tuple[int, ...], ...]
    rows: tuple[int, ...] = ()
    copies: int = 1
    block_size: int = 0
    chunk_BL: torch.Tensor | None = None
    share_BL: torch.Tensor | None = None
    own_text: bool = False

    @property
    def x0_bL(self) -> torch.Tensor:
        """The clean rows, each once."""
        return self.x0_BL[: len(self.x0_BL) // self.copies]

    @property
    def clean(self) -> dict[str, Any]:
        """What a student with blocks reads besides the noisy rows, as arguments of its forward."""
        return {"x0_bL": self.x0_bL, "block_size": self.block_size} if self.block_size else {}

    @property
    def num_tokens(self) -> int:
        """Tokens in the batch, padding and copies left out."""
        return int((self.document_ids_BL[: len(self.x0_bL)] >= 0).sum())

    def to(self, device: torch.device) -> MaskedBatch:
        """The same batch on another device."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        moved: dict[str, Any] = {
            name: value.to(device)
            for name, value in values.items()
            if isinstance(value, torch.Tensor)
        }
        return dataclasses.replace(self, **moved)


# --- how much of a group is masked ---------------------------------------------------------------


def _by_rate(
    settings: ObjectiveSettings, level_G: torch.Tensor, total_G: torch.Tensor, size: int
) -> Noise:
    least_t = settings.min_t
    # The complement's level is 1 - t, and it has to be drawn as often.
    span = 1 - (2 if settings.complementary else 1) * least_t
    return _rates(settings, least_t + span * level_G, least_t)


def _clipped(
    settings: ObjectiveSettings, level_G: torch.Tensor, total_G: torch.Tensor, size: int
) -> Noise:
    least_t = max(settings.min_t, 1 / size)
    noise = _rates(settings, least_t + (1 - least_t) * level_G, least_t)

    def mask(maskable_GS: torch.Tensor, u_GS: torch.Tensor, taken: int) -> torch.Tensor:
        masked_GS = noise.mask(maskable_GS, u_GS, taken)
        one_G = torch.ones(len(u_GS), dtype=torch.long)
        return masked_GS | mask_exactly(one_G, maskable_GS, u_GS)

    return dataclasses.replace(noise, mask=mask, least=None)


def _rates(settings: ObjectiveSettings, t_G: torch.Tensor, least_t: float) -> Noise:
    schedule = SCHEDULES[settings.schedule]
    share_G = 1 - schedule.alpha(t_G)
    least = 1 - float(schedule.alpha(torch.tensor(least_t, dtype=torch.float64)))

    def mask(maskable_GS: torch.Tensor, u_GS: torch.Tensor, taken: int) -> torch.Tensor:
        return mask_by_rate(share_G, maskable_GS, u_GS)

    return Noise(share_G, schedule.loss_weight(t_G), mask, least, t_G)


def _exactly(
    settings: ObjectiveSettings, level_G: torch.Tensor, total_G: torch.Tensor, size: int
) -> Noise:
    if settings.complementary:
        count_G = (level_G * (total_G + 1)).long()  # uniform on 0..m: the complement's is, too
        whole_G = total_G + 1
    else:
        count_G = (level_G * total_G).long() + 1  # uniform on 1..m: level < 1
        whole_G = total_G
    count_G = torch.minimum(count_G, total_G)

    def mask(maskable_GS: torch.Tensor, u_GS: torch.Tensor, taken: int) -> torch.Tensor:
        return mask_exactly(count_G - taken, maskable_GS, u_GS)

    t_G = count_G / total_G.clamp(min=1)
    return Noise(t_G, whole_G / count_G.clamp(min=1), mask, None, t_G)


MASKINGS = {"rate": _by_rate, "exact": _exactly, "clipped": _clipped}
WEIGHTS = ("bound", "mean_masked")


# --- what shares a noise level -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Groups:
    """Tokens of rows, laid out with a group in each row; `number_BL` and `place_BL` say where each is."""

    number_BL: torch.Tensor
    place_BL: torch.Tensor
    row_G: torch.Tensor
    size: int

    def gather(self, value_BL: torch.Tensor, empty: float = 0) -> torch.Tensor:
        """(G, S) the values of the groups' tokens, `empty` where a group is shorter."""
        found_GS = value_BL.new_full((len(self.row_G), self.size), empty)
        found_GS[self.number_BL, self.place_BL] = value_BL
        return found_GS

    def spread(self, value_GS: torch.Tensor) -> torch.Tensor:
        """(B, L) values of the groups' tokens where the tokens stand in the rows."""
        return value_GS.expand(-1, self.size)[self.number_BL, self.place_BL]


def by_row(document_ids_BL: torch.Tensor) -> Groups:
    """Every row is a group."""
    rows, length = document_ids_BL.shape
    row_B1, place_L = torch.arange(rows)[:, None], torch.arange(length)
    return Groups(row_B1.expand(-1, length), place_L.expand(rows, -1), torch.arange(rows), length)


def by_block(document_ids_BL: torch.Tensor, block_size: int) -> Groups:
    """Every block of a document is a group; the grid is that of attention.py."""
    position_BL = attention.positions(document_ids_BL)
    place_BL = position_BL % block_size
    first_BL = place_BL == 0
    number_BL = first_BL.flatten().cumsum(0).view_as(first_BL) - 1
    row_G = first_BL.nonzero()[:, 0]
    return Groups(number_BL, place_BL, row_G, min(block_size, document_ids_BL.shape[1]))


def group_levels(
    groups: Groups, learnt_G: torch.Tensor, seed: int, step: int, samples: Sequence[int], count: int
) -> torch.Tensor:
    """(G,) one number in [0, 1) a group, spread evenly over the groups of a row and the rows of a step.

    Of the n groups of a row that have something to learn, each gets another of n even parts of [0, 1),
    in random order, shifted by the row's place among the step's `count` samples; all are shifted by one
    random number. So each is uniform by itself, and blocks and rows together cover the noise levels
    (antithetic sampling: BD3LM, arXiv 2503.09573, and VDM, arXiv 2107.00630, I.1).
    """
    shift = torch.rand((), generator=generator("noise level", seed, step), dtype=torch.float64)
    level_G = torch.zeros(len(learnt_G), dtype=torch.float64)
    for row, sample in enumerate(samples):
        own_g = ((groups.row_G == row) & learnt_G).nonzero()[:, 0]
        # A row that is one group needs no order, and keeps the level it always had.
        random = generator("noise order", seed, step, sample)
        order_g = torch.randperm(len(own_g), generator=random).double()
        level_G[own_g] = (shift + (order_g + sample / count) / max(1, len(own_g))) % 1.0
    return level_G.float().clamp_(max=1 - 2**-24)


# --- a micro-batch -------------------------------------------------------------------------------


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
    block_size: int = 0,
    chunk_BL: torch.Tensor | None = None,
) -> MaskedBatch:
    """Masks and weights of the samples with these indices in the step; depends on nothing else.

    `block_size` is that of a block diffusion model at this step; 0 = there are no blocks.
    """
    draw = partial(row_uniforms, seed=seed, step=step, samples=samples, length=tokens_BL.shape[1])
    groups = by_row(document_ids_BL)
    if settings.noise == "block":
        assert block_size, "noise by blocks needs blocks"
        groups = by_block(document_ids_BL, block_size)
    maskable_GS = groups.gather(maskable_BL)
    total_G = maskable_GS.sum(1)
    level_G = group_levels(groups, total_G > 0, seed, step, samples, samples_per_step)
    noise = MASKINGS[settings.masking](settings, level_G, total_G, groups.size)
    c_BL = class_weights(masks, classes_BL) * maskable_BL
    ground = Ground(
        maskable_GS,
        groups.gather(document_ids_BL, -1),
        groups.gather(c_BL),
        None if chunk_BL is None else groups.gather(chunk_BL, -1),
    )
    masked_GS, weight_GS = PLACES[masks.where](
        masks, noise, ground, lambda name: groups.gather(draw(name))
    )
    masked_BL, weight_BL = groups.spread(masked_GS), groups.spread(weight_GS)
    level_BL = groups.spread(noise.level_B[:, None])
    if settings.complementary:
        weight_GS = _other_weight(settings, noise, total_G)[:, None]
        masked_BL = torch.cat([masked_BL, maskable_BL & ~masked_BL])
        weight_BL = torch.cat([weight_BL, groups.spread(weight_GS)])
        level_BL = torch.cat([level_BL, 1 - level_BL])
    copies = len(masked_BL) // len(tokens_BL)
    repeated = partial(torch.Tensor.repeat, repeats=(copies, 1))
    tokens_BL, document_ids_BL, maskable_BL, c_BL = map(
        repeated, (tokens_BL, document_ids_BL, maskable_BL, c_BL)
    )
    chunk_BL = None if chunk_BL is None else repeated(chunk_BL)
    distilled_BL, inclusion_BL = choose_distilled(
        settings, masks, masked_BL, c_BL, lambda name: repeated(draw(name))
    )
    ce_weight_BL, kd_weight_BL = _terms(settings, masked_BL, weight_BL, distilled_BL, inclusion_BL)
    denominator = float((maskable_BL if settings.weight == "bound" else masked_BL).sum())
    kd_denominator = denominator
    if settings.kd_reduce == "mean_masked":
        kd_denominator = float(masked_BL.sum())
        if masks.where in BY_CHUNK and chunk_BL is not None:
            kd_denominator = float(number_of_chunks(chunk_BL[masked_BL]))
    return MaskedBatch(
        x0_BL=tokens_BL,
        xt_BL=apply_mask(tokens_BL, masked_BL, mask_id),
        document_ids_BL=document_ids_BL,
        maskable_BL=maskable_BL,
        masked_BL=masked_BL,
        distilled_BL=distilled_BL,
        ce_weight_BL=ce_weight_BL,
        kd_weight_BL=kd_weight_BL,
        level_BL=level_BL,
        denominator=denominator,
        kd_denominator=kd_denominator,
        keys=row_keys(seed, step, samples, copies),
        rows=tuple(rows) * copies,
        copies=copies,
        block_size=block_size,
        chunk_BL=chunk_BL,
    )


def _terms(
    settings: ObjectiveSettings,
    masked_BL: torch.Tensor,
    weight_BL: torch.Tensor,
    distilled_BL: torch.Tensor,
    inclusion_BL: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, L) what each token counts in the cross-entropy and in distillation."""
    weight_BL = masked_BL * (weight_BL if settings.weight == "bound" else 1.0)
    kd_weight_BL = masked_BL.float() if settings.kd_reduce == "mean_masked" else weight_BL
    ce_weight_BL = weight_BL
    if settings.ce_positions == "rest":
        # Choosing uniformly never makes a position of the rest count more than kd_positions + 1 times.
        left_BL = (1 - inclusion_BL).clamp(min=1 / (settings.kd_positions + 1))
        ce_weight_BL = weight_BL * counted(masked_BL & ~distilled_BL, left_BL)
    return ce_weight_BL, kd_weight_BL * counted(distilled_BL, inclusion_BL)


def row_keys(
    seed: int, step: int, samples: Sequence[int], copies: int
) -> tuple[tuple[int, ...], ...]:
    """What is random about each row of a batch is a function of its key."""
    return tuple(
        (seed, step, sample, *([copy] if copy else []))
        for copy in range(copies)
        for sample in samples
    )


def counted_tokens(settings: ObjectiveSettings, batch: MaskedBatch) -> torch.Tensor:
    """(B, L) bool: tokens whose number is the denominator of distillation."""
    plain = settings.weight == "mean_masked" or settings.kd_reduce == "mean_masked"
    return batch.masked_BL if plain else batch.maskable_BL


def number_of_chunks(chunk_N: torch.Tensor) -> int:
    """How many chunks these positions lie in."""
    return len(chunk_N[chunk_N >= 0].unique())


def _other_weight(settings: ObjectiveSettings, noise: Noise, total_G: torch.Tensor) -> torch.Tensor:
    """(G,) the weight of what is masked in the complement."""
    if settings.masking == "rate":
        return 1 / (1 - noise.level_B)
    others_G = total_G - (noise.level_B * total_G).round()
    return (total_G + 1) / others_G.clamp(min=1)


def choose_distilled(
    settings: ObjectiveSettings,
    masks: MaskSettings,
    masked_BL: torch.Tensor,
    c_BL: torch.Tensor,
    uniforms: Uniforms,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions the teacher is asked for, and the probability of each masked one to be chosen."""
    if not settings.distils:
        return torch.zeros_like(masked_BL), torch.zeros(masked_BL.shape)
    if settings.kd_positions == 0:
        return masked_BL, masked_BL.float()
    return CHOICES[masks.distilled](masked_BL, c_BL, settings.kd_positions, uniforms)


# --- block sizes ---------------------------------------------------------------------------------


def block_size_at(final: int, first: int, steps: int, step: int) -> int:
    """The block size at a step (0-based) that grows from `first` to `final` over `steps` steps.

    By doubling, each size for equally many steps; `first` times a power of two is `final`. 0 = no growth.
    """
    sizes = [final]
    while first and sizes[0] > first:
        sizes.insert(0, sizes[0] // 2)
    if not steps or step >= steps:
        return final
    return sizes[step * len(sizes) // steps]
