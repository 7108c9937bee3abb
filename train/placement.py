"""Where masks fall, and which masked positions are distilled.

A row's noise is drawn first: with masking=rate a mask probability m = 1 - alpha(t), with masking=exact
a number l of L tokens, and the weight w of the likelihood bound (1/t, L/l). Then one of these places
the masks. c_i > 0 is the weight of the class of token i (train/weighting.py), C its sum over the
maskable tokens of the row, M the set of masked positions.

    where      masks                                          weight of token i   what the loss is
    uniform    all sets of one size are equally likely        w                   the bound
    tilted     a set M is Σ_M c times as likely as it was     w E[Σ_M c] / Σ_M c  the same bound
    weighted   token i with probability m^(1/c_i)             w / c_i             no bound
    spans      neighbours together (masking=rate)             w                   a looser bound
    chunks     chunks together (masking=rate)                 w                   a looser bound

tilted    One position is drawn with probability c_i / C, the others as usual (rate: independently;
          exact: l - 1 of them). That tilts the law of M by Σ_M c / E[Σ_M c], E = m C or (l / L) C, and
          the weight undoes it: importance sampling, exact for every c, also one read off the text.
          M is never empty, so masking=rate wastes no row.
weighted  d/dt m^(1/c) / m^(1/c) = m' / (c m): every token counts once, as in the chain rule over a
          random order in which heavy tokens tend to come last. That is a bound if c does not look at
          the tokens. Ours does: which positions are masked then tells something about what is under
          them, and a model can use it to score better than any decoder could. m starts at m(min_t),
          not 0; the weight is rescaled so that every class counts as much as with uniform masks.
spans     Runs of maskable tokens of one document are cut at random (not looking at the tokens) into
          pieces of geometric length; the tokens of a piece share one uniform. The loss is the bound of
          a decoder that fills a piece at once, its tokens independently.

chunks    Chunks are the shortest spans on whose ends the tokenizations of student and teacher agree. As
          spans; `chunks` draws one uniform for a chunk. chunks_published draws one for a token and masks
          a chunk if one of its n tokens is hit, with probability 1 - (1-t)^n; it keeps 1/t, so a chunk
          counts 1 + 1/2 + … + 1/n times (TIDE, arXiv 2604.26951, as released). chunks_corrected masks in
          the same way and weighs by n (1-t)^(n-1) / (1 - (1-t)^n), the weight of the bound for that rate.

Distilled are kd_positions of the masked ones, k of m, token i with probability q_i:

    uniform    q_i = k / m
    weighted   q_i proportional to c_i, at most 1 (then the others share what is left)

and each counts 1 / q_i, so that the expected sum is that over all masks (Horvitz and Thompson 1952).
Shapes: B batch, L length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from mdm.config import require
from mdm.diffusion import mask_exactly
from mdm.errors import check_known

from .chunk_masks import any_of_chunk, chunk_sizes, corrected_weight, shared_uniforms
from .weighting import CLASSES, NO_LANGUAGE

# Uniforms in [0, 1) by name, (B, L): functions of (name, seed, step, sample) alone.
Uniforms = Callable[[str], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class MaskSettings:
    """Where masks fall; see train/placement.py for what each does to the loss.

    where       "uniform"; "tilted": heavy classes more often, still the bound; "weighted": heavy classes
                more often and longer, no bound; "spans": neighbouring tokens together; target.kind=chunks
                needs chunks, chunks_published or chunks_corrected: chunks of two tokenizations together
    distilled   which masked positions objective.kd_positions chooses: "uniform", or "weighted": heavy
                classes more often
    identifier  weight of names, where something is weighted; the share of masks rises with it
    literal     weight of strings and numbers
    keyword     weight of keywords
    operator    weight of operators and punctuation
    comment     weight of comments and docstrings
    other       weight of everything else, the end of a document too
    span_length mean length of where=spans in tokens; 1 = as uniform
    """

    where: str = "uniform"
    distilled: str = "uniform"
    identifier: float = 2.0
    literal: float = 2.0
    keyword: float = 1.5
    operator: float = 1.0
    comment: float = 1.0
    other: float = 1.0
    span_length: float = 3.0

    def __post_init__(self) -> None:
        check_known("masks.where", self.where, PLACES)
        check_known("masks.distilled", self.distilled, CHOICES)
        for name in CLASSES:
            value = getattr(self, name)
            # Far from 1, m^(1/c) is 0 or 1 for nearly all t.
            require(0.01 <= value <= 100, f"masks.{name} must be in [0.01, 100]; got {value}")
        require(
            1 <= self.span_length < float("inf"),
            f"masks.span_length must be at least 1 (token); got {self.span_length}",
        )

    @property
    def looks_at_classes(self) -> bool:
        """Whether anything depends on the classes of tokens."""
        return self.where in ("tilted", "weighted") or self.distilled == "weighted"


@dataclasses.dataclass(frozen=True)
class Noise:
    """How much of each row is masked.

    share_B   expected share of the maskable tokens: m, or l / L
    weight_B  w of the bound
    mask      (maskable_BL, uniforms_BL, taken) -> masked_BL, where `taken` positions of each row, not
              among the maskable ones, are masked already and count
    least     m at the lowest noise level; None but with masking=rate
    level_B   t: 0 is clean, 1 all mask
    """

    share_B: torch.Tensor
    weight_B: torch.Tensor
    mask: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
    least: float | None
    level_B: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Ground:
    """Where masks can fall: maskable positions (bool), their documents and class weights c (0 elsewhere,
    float64), and the chunks they lie in, if two tokenizations were aligned (-1 = in none)."""

    maskable_BL: torch.Tensor
    document_ids_BL: torch.Tensor
    c_BL: torch.Tensor
    chunk_BL: torch.Tensor | None = None


def class_weights(settings: MaskSettings, classes_BL: torch.Tensor) -> torch.Tensor:
    """(B, L) float64 the weight c of each token."""
    values = [getattr(settings, name) for name in CLASSES]
    return torch.tensor(values, dtype=torch.float64)[classes_BL.long()]


def check_masks(
    settings: MaskSettings,
    *,
    masking: str,
    language: str,
    distils: bool,
    kd_positions: int,
    ce_positions: str,
) -> None:
    """Settings of other sections that do not fit: raise ConfigError."""
    require(
        masking == "rate" or settings.where in ("uniform", "tilted"),
        f"masks.where={settings.where} masks tokens or spans independently of their number: set"
        f" objective.masking=rate; got {masking}",
    )
    require(
        language != NO_LANGUAGE or not settings.looks_at_classes,
        f"masks.where={settings.where}, masks.distilled={settings.distilled} need the classes of"
        " tokens: set data.language=auto, or the name of the language",
    )
    require(
        settings.distilled == "uniform" or kd_positions > 0 or not distils,
        f"masks.distilled={settings.distilled} has nothing to choose when all masked positions are"
        " distilled; set objective.kd_positions to 1 or more",
    )
    require(
        settings.distilled == "uniform" or ce_positions == "all" or not distils,
        f"masks.distilled={settings.distilled} distils some tokens nearly always, so the cross-entropy"
        " would hardly see them; set objective.ce_positions=all",
    )


# --- where masks fall ----------------------------------------------------------------------------


def _uniform(
    settings: MaskSettings, noise: Noise, ground: Ground, uniforms: Uniforms
) -> tuple[torch.Tensor, torch.Tensor]:
    masked_BL = noise.mask(ground.maskable_BL, uniforms("mask"), 0)
    return masked_BL, noise.weight_B[:, None]


def _tilted(
    settings: MaskSettings, noise: Noise, ground: Ground, uniforms: Uniforms
) -> tuple[torch.Tensor, torch.Tensor]:
    sum_BL = ground.c_BL.cumsum(1)
    total_B1 = sum_BL[:, -1:]
    # float64: the product stays below the total, so the first sum above it is at a maskable position.
    aim_B1 = uniforms("tilt")[:, :1].double() * total_B1
    index_L = torch.arange(sum_BL.shape[1])
    first_BL = ground.maskable_BL & (index_L == (sum_BL <= aim_B1).sum(1, keepdim=True))
    masked_BL = first_BL | noise.mask(ground.maskable_BL & ~first_BL, uniforms("mask"), 1)
    found_B = (ground.c_BL * masked_BL).sum(1)
    expected_B = noise.share_B * total_B1[:, 0]
    correction_B = torch.where(found_B > 0, expected_B / found_B, 0.0)
    return masked_BL, (noise.weight_B * correction_B).float()[:, None]


def _weighted(
    settings: MaskSettings, noise: Noise, ground: Ground, uniforms: Uniforms
) -> tuple[torch.Tensor, torch.Tensor]:
    assert noise.least is not None, "check_masks refuses masking=exact"
    power_BL = torch.where(ground.maskable_BL, 1 / ground.c_BL, 1.0)
    share_BL = noise.share_B[:, None].double() ** power_BL
    masked_BL = ground.maskable_BL & (uniforms("mask") < share_BL)
    whole_BL = (1 - noise.least) / (1 - noise.least**power_BL)
    return masked_BL, (noise.weight_B[:, None] * power_BL * whole_BL).float()


def _spans(
    settings: MaskSettings, noise: Noise, ground: Ground, uniforms: Uniforms
) -> tuple[torch.Tensor, torch.Tensor]:
    assert noise.least is not None, "check_masks refuses masking=exact"
    starts_BL = span_starts(ground, settings.span_length, uniforms("span"))
    index_BL = torch.arange(starts_BL.shape[1]).expand_as(starts_BL)
    start_BL = torch.where(starts_BL, index_BL, 0).cummax(1).values
    shared_BL = uniforms("mask").gather(1, start_BL)
    return noise.mask(ground.maskable_BL, shared_BL, 0), noise.weight_B[:, None]


def span_starts(ground: Ground, length: float, uniforms_BL: torch.Tensor) -> torch.Tensor:
    """(B, L) bool: where a span begins; it goes on to the next one, or until nothing is maskable.

    Everywhere with probability 1 / length, and at the first of a run of maskable tokens of a document.
    """
    maskable_BL, ids_BL = ground.maskable_BL, ground.document_ids_BL
    goes_on_BL = torch.zeros_like(maskable_BL)
    goes_on_BL[:, 1:] = maskable_BL[:, :-1] & (ids_BL[:, 1:] == ids_BL[:, :-1])
    return maskable_BL & (~goes_on_BL | (uniforms_BL < 1 / length))


def _chunks(
    settings: MaskSettings, noise: Noise, ground: Ground, uniforms: Uniforms
) -> tuple[torch.Tensor, torch.Tensor]:
    assert ground.chunk_BL is not None, "check_masks refuses a target without chunks"
    shared_BL = shared_uniforms(uniforms("mask"), ground.chunk_BL)
    return noise.mask(ground.maskable_BL, shared_BL, 0), noise.weight_B[:, None]


def _chunks_published(
    settings: MaskSettings, noise: Noise, ground: Ground, uniforms: Uniforms
) -> tuple[torch.Tensor, torch.Tensor]:
    assert ground.chunk_BL is not None, "check_masks refuses a target without chunks"
    masked_BL = noise.mask(ground.maskable_BL, uniforms("mask"), 0)
    together_BL = any_of_chunk(masked_BL, ground.chunk_BL) & ground.maskable_BL
    return together_BL, noise.weight_B[:, None]


def _chunks_corrected(
    settings: MaskSettings, noise: Noise, ground: Ground, uniforms: Uniforms
) -> tuple[torch.Tensor, torch.Tensor]:
    assert ground.chunk_BL is not None, "check_masks refuses a target without chunks"
    masked_BL, _ = _chunks_published(settings, noise, ground, uniforms)
    weight_BL = corrected_weight(noise.share_B, chunk_sizes(ground.chunk_BL))
    # That is of the linear schedule; the other factor is 1 there.
    return masked_BL, weight_BL * (noise.share_B * noise.weight_B)[:, None]


PLACES = {
    "uniform": _uniform,
    "tilted": _tilted,
    "weighted": _weighted,
    "spans": _spans,
    "chunks": _chunks,
    "chunks_published": _chunks_published,
    "chunks_corrected": _chunks_corrected,
}
BY_CHUNK = ("chunks", "chunks_published", "chunks_corrected")

# What the loss estimates, for the log; held-out rows are always masked uniformly.
MEANINGS = {
    "uniform": "the likelihood bound per token",
    "tilted": "the likelihood bound per token",
    "weighted": "no likelihood bound, as where masks fall depends on the text",
    "spans": "the likelihood bound per token of a decoder that fills a span at once",
    "chunks": "the likelihood bound per token of a decoder that is told the chunks and fills one at once",
    "chunks_published": "no likelihood bound, as long chunks count more",
    "chunks_corrected": "the likelihood bound per token of a decoder that is told the chunks and fills"
    " one at once",
}


# --- which masked positions are distilled --------------------------------------------------------


def _choose_uniformly(
    masked_BL: torch.Tensor, c_BL: torch.Tensor, count: int, uniforms: Uniforms
) -> tuple[torch.Tensor, torch.Tensor]:
    total_B = masked_BL.sum(1)
    chosen_BL = mask_exactly(torch.full_like(total_B, count), masked_BL, uniforms("distilled"))
    inclusion_B = (count / total_B.clamp(min=1)).clamp(max=1.0)
    return chosen_BL, masked_BL * inclusion_B[:, None]


def _choose_by_weight(
    masked_BL: torch.Tensor, c_BL: torch.Tensor, count: int, uniforms: Uniforms
) -> tuple[torch.Tensor, torch.Tensor]:
    inclusion_BL = inclusion(masked_BL * c_BL, count)
    # Systematic sampling (Madow 1949): a comb of step 1 with a random offset meets an interval of length
    # q with probability q. Sums are rounded so that whole numbers are whole.
    sum_BL = (inclusion_BL.cumsum(1) * 2**30).round() / 2**30
    passed_BL = (sum_BL - uniforms("distilled")[:, :1]).ceil()
    chosen_BL = passed_BL.diff(dim=1, prepend=torch.zeros_like(passed_BL[:, :1])) > 0
    return masked_BL & chosen_BL, inclusion_BL.float()


def inclusion(c_BL: torch.Tensor, count: int) -> torch.Tensor:
    """(B, L) probabilities proportional to c, at most 1, that sum to `count` (or to how many c are > 0).

    Where a probability would be above 1 it is 1, and the others share what is left of the count.
    """
    count_B1 = (c_BL > 0).sum(1, keepdim=True).clamp(max=count)
    sure_BL = torch.zeros_like(c_BL, dtype=torch.bool)
    while True:
        free_BL = c_BL.masked_fill(sure_BL, 0.0)
        left_B1 = count_B1 - sure_BL.sum(1, keepdim=True)
        # Weights are at least 0.01; the sum is 0 where nothing is left to choose from.
        scale_B1 = left_B1 / free_BL.sum(1, keepdim=True).clamp(min=1e-9)
        inclusion_BL = torch.where(sure_BL, 1.0, free_BL * scale_B1)
        over_BL = inclusion_BL > 1
        if not bool(over_BL.any()):
            return inclusion_BL
        sure_BL |= over_BL


CHOICES = {"uniform": _choose_uniformly, "weighted": _choose_by_weight}


def counted(part_BL: torch.Tensor, inclusion_BL: torch.Tensor) -> torch.Tensor:
    """(B, L) 1 / probability on a chosen part, 0 elsewhere: keeps the expected sum over the whole."""
    return torch.where(part_BL, 1 / inclusion_BL, 0.0)
