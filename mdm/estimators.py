"""Which masks estimate the likelihood bound of an answer, what each counts, and how sure the sum is.

The bound of an answer of L tokens is Σ_l E[mean log p(token) over l masked tokens], l = 1…L (LLaDA,
arXiv 2502.09992, eq. 14; the any-order chain rule). Every estimator is a list of masks and weights:
bound ≈ Σ_r weight_r · Σ_{i masked in r} log p_i. No model is known here.
Shapes: R masks, L answer tokens, n values of one position.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import torch

# Neyman allocation: the mean of l masked losses spreads like l^-1/2, so small l get more masks.
ALLOCATION_POWER = 0.5
# With fewer masks than l the spread of the weights counts too, so the shares are more even.
SPARSE_POWER = 0.25
PUBLISHED_BATCH = 8


@dataclasses.dataclass(frozen=True)
class Masks:
    """Masks of one answer.

    masked_RL  bool; true where a token is hidden
    weight_R   float64; what the summed log-probabilities of a row's masked tokens count
    sampled_R  bool; false where all masks of a row's size were taken, so that it has no error
    """

    masked_RL: torch.Tensor
    weight_R: torch.Tensor
    sampled_R: torch.Tensor

    def value(self, log_probs_RL: torch.Tensor) -> float:
        """The estimate in nats, from log-probabilities of the masked tokens (anything elsewhere)."""
        return float((self.rows(log_probs_RL) * self.weight_R).sum())

    def rows(self, log_probs_RL: torch.Tensor) -> torch.Tensor:
        """(R,) summed log-probabilities of each row's masked tokens, float64."""
        return log_probs_RL.double().masked_fill(~self.masked_RL, 0.0).sum(1)


def every_mask(length: int, samples: int, random: torch.Generator) -> Masks:
    """All 2^L - 1 masks: the bound itself."""
    masked_RL = torch.tensor(list(itertools.product((False, True), repeat=length))[1:])
    count_R = masked_RL.sum(1).tolist()
    weight_R = torch.tensor([1 / (l * math.comb(length, l)) for l in count_R], dtype=torch.float64)
    return Masks(masked_RL, weight_R, torch.zeros(len(weight_R), dtype=torch.bool))


def stratified(length: int, samples: int, random: torch.Generator) -> Masks:
    """At most `samples` masks; each l has its share, each position is masked equally often.

    Small l get more masks (their mean spreads more), an l with few subsets gets each of them once.
    With fewer masks than L the l are drawn by one uniform, evenly spread over shares like these.
    Unbiased for every L and number of samples.
    """
    if samples < length:
        share_l = torch.arange(1, length + 1, dtype=torch.float64) ** -SPARSE_POWER
        share_l /= share_l.sum()
        u = torch.rand((), generator=random, dtype=torch.float64)
        points_R = (u + torch.arange(samples)) / samples
        index_R = torch.searchsorted(share_l.cumsum(0), points_R, right=True)
        index_R = index_R.clamp_(max=length - 1)  # the last share may end just below 1
        masked_RL = balanced_masks(length, (index_R + 1).tolist(), random)
        weight_R = 1 / (samples * (index_R + 1) * share_l[index_R])
        return Masks(masked_RL, weight_R, torch.ones(len(weight_R), dtype=torch.bool))
    counts = allocate(length, samples)
    subsets = [math.comb(length, l) for l in range(1, length + 1)]
    whole = [l for l in range(1, length + 1) if counts[l - 1] == subsets[l - 1]]
    sampled = [l for l in range(1, length + 1) if l not in whole for _ in range(counts[l - 1])]
    rows = [
        mask_of(chosen, length)
        for l in whole
        for chosen in itertools.combinations(range(length), l)
    ]
    sizes = [l for l in whole for _ in range(subsets[l - 1])] + sampled
    masked_RL = torch.cat([
        torch.tensor(rows, dtype=torch.bool).reshape(-1, length),
        balanced_masks(length, sampled, random),
    ])  # fmt: skip
    weight_R = torch.tensor([1 / (l * counts[l - 1]) for l in sizes], dtype=torch.float64)
    # No finite population correction for the others: decks may deal a mask twice.
    return Masks(masked_RL, weight_R, torch.tensor([l not in whole for l in sizes]))


def allocate(length: int, samples: int) -> list[int]:
    """How many masks each l = 1…L gets: at least 1, at most all its subsets, `samples` in all or fewer.

    In proportion to l^-1/2 between those limits; what rounding leaves over is not spent.
    """
    assert samples >= length
    most = [min(samples, math.comb(length, l)) for l in range(1, length + 1)]  # no float overflow
    most_l = torch.tensor(most, dtype=torch.float64)
    share_l = torch.arange(1, length + 1, dtype=torch.float64) ** -ALLOCATION_POWER
    low, high = 0.0, float(samples) * length
    for _ in range(80):  # the factor at which the shares just fit
        middle = (low + high) / 2
        fits = float((middle * share_l).clamp(min=1.0).minimum(most_l).sum()) <= samples
        low, high = (middle, high) if fits else (low, middle)
    wanted_l = (low * share_l).clamp(min=1.0).minimum(most_l)
    ends_l = (wanted_l.cumsum(0) + 1e-6).floor()
    return ends_l.diff(prepend=ends_l.new_zeros(1)).clamp(min=1.0).minimum(most_l).long().tolist()


def balanced_masks(length: int, sizes: Sequence[int], random: torch.Generator) -> torch.Tensor:
    """(R, L) one mask of each size, dealt from shuffled decks of the positions.

    A deck is used up before the next is shuffled, so positions are masked equally often; a mask
    that needs cards of two decks takes the second deck's from positions it does not have yet. The
    procedure treats all positions alike, so each mask by itself is uniform among those of its size.
    """
    masked_RL = torch.zeros(len(sizes), length, dtype=torch.bool)
    deck = torch.randperm(length, generator=random).tolist()
    for row, size in enumerate(sizes):
        chosen, deck = deck[:size], deck[size:]
        if len(chosen) < size:
            fresh = torch.randperm(length, generator=random).tolist()
            held = set(chosen)
            added = [i for i in fresh if i not in held][: size - len(chosen)]
            taken = set(added)
            deck = [i for i in fresh if i not in taken]
            chosen = chosen + added
        masked_RL[row, chosen] = True
    return masked_RL


def independent(length: int, samples: int, random: torch.Generator) -> Masks:
    """l uniform on 1…L and a uniform mask of l positions, independent: plain Monte Carlo."""
    size_R = torch.randint(1, length + 1, (samples,), generator=random)
    return _plain(length, size_R, random)


def published(length: int, samples: int, random: torch.Generator) -> Masks:
    """LLaDA's released estimator, for comparison: biased, because it rounds half to even.

    Rounds of 8 masks; each spreads l over 1…L from one random start, rounded in float32. What does
    not fill a round is dropped; fewer than 8 samples are one smaller round.
    """
    batch = min(PUBLISHED_BATCH, samples)
    sizes = []
    for _ in range(samples // batch):
        k = int(torch.randint(1, length + 1, (), generator=random))
        grid = torch.linspace(float(k), k + (batch - 1) * (length / batch), batch)
        sizes.append((grid.round().long() - 1) % length + 1)
    return _plain(length, torch.cat(sizes), random)


def _plain(length: int, size_R: torch.Tensor, random: torch.Generator) -> Masks:
    """Uniform masks of these sizes, each weighted L / l."""
    order = [torch.randperm(length, generator=random) for _ in size_R]
    masked_RL = torch.stack(order) < size_R[:, None]
    weight_R = length / (size_R.double() * len(size_R))
    return Masks(masked_RL, weight_R, torch.ones(len(weight_R), dtype=torch.bool))


def mask_of(chosen: Sequence[int], length: int) -> list[bool]:
    """One mask as a list of flags."""
    row = [False] * length
    for position in chosen:
        row[position] = True
    return row


# --- standard errors ------------------------------------------------------------------------------


def no_std_err(masks: Masks, log_probs_RL: torch.Tensor) -> float:
    """0: nothing was sampled."""
    return 0.0


def rows_std_err(masks: Masks, log_probs_RL: torch.Tensor) -> float:
    """From the spread of rows that are independent of one another; NaN for one row."""
    parts_R = masks.rows(log_probs_RL) * masks.weight_R
    return float(parts_R.std() * len(parts_R) ** 0.5) if len(parts_R) > 1 else math.nan


def rounds_std_err(masks: Masks, log_probs_RL: torch.Tensor) -> float:
    """From the spread of the rounds of `published`; NaN for one round."""
    parts_R = masks.rows(log_probs_RL) * masks.weight_R
    if len(parts_R) < 2 * PUBLISHED_BATCH:
        return math.nan
    sums = parts_R.reshape(-1, PUBLISHED_BATCH).sum(1)
    return float(sums.std() * len(sums) ** 0.5)


def residual_std_err(masks: Masks, log_probs_RL: torch.Tensor) -> float:
    """From what is left when each position's mean and its trend in l^-1/2 are taken out.

    Balanced positions and stratified l make those parts cancel in the sum, so the spread of the
    residuals is what remains (Deville and Tillé 2005, variance of balanced sampling). Needs about
    3 masks a token; with fewer it is too small. NaN if no position was masked twice.
    """
    if not masks.sampled_R.any():
        return 0.0
    size_R = masks.masked_RL.sum(1).double()
    residual_RL = torch.zeros_like(log_probs_RL, dtype=torch.float64)
    left = 0
    for position in range(masks.masked_RL.shape[1]):
        at_R = masks.masked_RL[:, position]
        values_n = log_probs_RL[at_R, position].double()
        if len(values_n) < 2:
            continue
        columns = [torch.ones_like(values_n)]
        if len(values_n) > 3:
            columns.append(size_R[at_R] ** -0.5)
        design_nk = torch.stack(columns, 1)
        inverse_kk = torch.linalg.pinv(design_nk.T @ design_nk)
        fitted_n = design_nk @ (inverse_kk @ (design_nk.T @ values_n))
        leverage_n = ((design_nk @ inverse_kk) * design_nk).sum(1)
        # Residuals are smaller than errors by sqrt(1 - leverage); the floor keeps lone points finite.
        residual_RL[at_R, position] = (values_n - fitted_n) / (1 - leverage_n).clamp(min=0.2).sqrt()
        left += len(values_n) - len(columns)
    if left < 1:
        return math.nan
    parts_R = residual_RL.sum(1) * masks.weight_R
    return float(parts_R[masks.sampled_R].square().sum().sqrt())


Draw = Callable[[int, int, torch.Generator], Masks]
StdErr = Callable[[Masks, torch.Tensor], float]


@dataclasses.dataclass(frozen=True)
class Estimator:
    """How masks are drawn and how the standard error is told from their losses."""

    draw: Draw
    std_err: StdErr


ESTIMATORS: dict[str, Estimator] = {
    "exact": Estimator(every_mask, no_std_err),
    "stratified": Estimator(stratified, residual_std_err),
    "independent": Estimator(independent, rows_std_err),
    "llada": Estimator(published, rounds_std_err),
}
