"""Soft targets on a language that can be enumerated: how far is each student from the truth?

The teacher is a small random transformer over a few words and texts of one length, so its posterior
q(x_i | visible) is known for every mask pattern. A tiny bidirectional student is trained by mdm's own
masks, targets and losses, once for each arm and seed, on endless fresh texts:

    texts   teacher  samples of the teacher at T = 1: what the guarantees of the estimators assume
            corpus   another law, half the teacher's and half a second random teacher's
    arm     ce       hard targets alone
            exact    the teacher's posterior by enumeration: the best a soft target can be
            others   the kinds of mdm.train.teachers.kinds, distillation alone (kd_lambda 1)

What is measured, and what the limit of an arm is: see synthetic_language.py. Differences between arms
are paired: all see the same texts and masks and start from the same weights.
The average of the weights is measured (a constant learning rate, so one run gives the whole curve).
Targets are made for several steps at once, which is cheaper; the student's own proposals are as old as
that. Seconds are those of the processor, measuring left out.
Shapes: B batch, L words of a text (and the start token), N positions, V words, X one axis a position.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mdm.config import require
from mdm.denoiser import Denoiser
from mdm.diffusion import generator
from mdm.errors import check_known
from mdm.record import append_record, make_record
from mdm.train.asking import soft_targets
from mdm.train.loss_sums import loss_sums
from mdm.train.masking import MaskedBatch, mask_batch
from mdm.train.objective import ObjectiveSettings
from mdm.train.optimizer import WeightAverage, adamw
from mdm.train.placement import MaskSettings
from mdm.train.targets import SoftTargets, TargetSettings
from mdm.train.teachers.kinds import TARGETS

from .serve_report import mean_and_error
from .synthetic_language import (
    Table,
    World,
    all_texts,
    decoded,
    excess,
    limit,
    make_world,
    random_student,
    student_table,
    total_variation,
)

ARMS = {
    "teacher": ("ce", "left", "mc_literal", "importance", "smc", "i_sir", "csmc", "student",
                "suffix", "exact"),
    "corpus": ("ce", "left", "smc", "i_sir", "suffix", "exact"),
}  # fmt: skip
BLOCK = 8  # steps whose targets are made together
LEARNING_RATE, WARMUP, AVERAGE, CLIP = 3e-3, 20, 0.98, 1.0


@dataclasses.dataclass(frozen=True)
class SyntheticBench:
    """What is measured; see `mdm bench study --help`. `arms` empty = all of them; `language` is a seed."""

    arms: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 200
    rows: int = 16
    fills: int = 4
    words: int = 5
    length: int = 6
    language: int = 0

    def __post_init__(self) -> None:
        for arm in self.arms:
            check_known("arm", arm, ARMS["teacher"])
        require(bool(self.seeds), "seeds must name at least one seed")
        require(len({*self.seeds}) == len(self.seeds), f"seeds must differ; got {self.seeds}")
        require(self.steps >= 4, f"steps must be at least 4; got {self.steps}")
        for name in ("rows", "fills"):
            require(getattr(self, name) >= 1, f"{name} must be >= 1; got {getattr(self, name)}")
        require(2 <= self.words <= 8, f"words must be 2…8; got {self.words}")
        contexts = (self.words + 1) ** self.length
        require(
            self.length >= 2 and contexts <= 2**18,
            f"length must be at least 2, and with {self.words} words short enough to enumerate"
            f" {contexts} contexts (at most {2**18}); got {self.length}",
        )


# --- training ----------------------------------------------------------------------------------------


def objective_of(arm: str) -> ObjectiveSettings:
    """Exactly l masks with weight L / l: the loss is the bound that `excess` is about."""
    return ObjectiveSettings(masking="exact", kd_lambda=0.0 if arm == "ce" else 1.0)


def enumerated(truth: Table, batch: MaskedBatch) -> SoftTargets:
    """The teacher's posterior at the distilled positions."""
    rows = []
    for x0_L, masked_L, wanted_L in zip(
        batch.x0_BL[:, 1:].tolist(), batch.masked_BL[:, 1:], batch.distilled_BL[:, 1:], strict=True
    ):
        masked = tuple(masked_L.nonzero()[:, 0].tolist())
        at = tuple(0 if k in masked else word for k, word in enumerate(x0_L))
        rows += [truth[masked, i][at] for i in wanted_L.nonzero()[:, 0].tolist()]
    probs_NV = torch.stack(rows)
    ids_NV = torch.arange(probs_NV.shape[1]).expand_as(probs_NV)
    return SoftTargets(
        ids_NV, probs_NV.log().float(), torch.zeros(len(rows)), 1.0, "visible tokens"
    )


def targets_of(
    arm: str, world: World, batch: MaskedBatch, student: Denoiser, fills: int
) -> SoftTargets | None:
    """The arm's answer for a batch; None for hard targets."""
    if arm == "ce":
        return None
    if arm == "exact":
        return enumerated(world.truths["teacher"], batch)
    words = world.teacher.num_tokens
    settings = TargetSettings(kind=arm, window=0, candidates=words, fills=fills)
    return soft_targets(world.teacher, batch, settings, 1.0, student)


def masked_texts(
    settings: SyntheticBench, world: World, texts: str, arm: str, seed: int, block: int
) -> MaskedBatch:
    """Fresh texts for the steps of a block, masked: the same for all arms."""
    count = settings.rows * BLOCK
    random = generator("texts", texts, settings.language, seed, block)
    law_N = world.laws[texts].flatten()
    chosen_B = torch.multinomial(law_N, count, replacement=True, generator=random)
    texts_BL = all_texts(settings.words, settings.length)[chosen_B]
    x0_BL = nn.functional.pad(texts_BL, (1, 0), value=world.vocab.start_id)
    maskable_BL = torch.ones_like(x0_BL, dtype=torch.bool)
    maskable_BL[:, 0] = False
    # Noise levels are spread over the samples in their order; each step gets every BLOCK-th.
    order = torch.arange(count).reshape(settings.rows, BLOCK).T.flatten().tolist()
    return mask_batch(
        objective_of(arm),
        x0_BL,
        torch.zeros_like(x0_BL),
        maskable_BL,
        torch.zeros_like(x0_BL, dtype=torch.uint8),
        masks=MaskSettings(),
        mask_id=student_mask(world),
        seed=seed,
        step=block,
        samples=order,
        samples_per_step=count,
    )


def student_mask(world: World) -> int:
    """The id of the mask token."""
    mask_id = world.vocab.mask_id
    assert mask_id is not None, "make_vocab adds a mask"
    return mask_id


def part(
    batch: MaskedBatch, targets: SoftTargets | None, rows: slice
) -> tuple[MaskedBatch, SoftTargets | None]:
    """Some rows of a batch without copies, and their targets."""
    chosen: dict[str, Any] = {
        field.name: getattr(batch, field.name)[rows]
        for field in dataclasses.fields(batch)
        if isinstance(getattr(batch, field.name), torch.Tensor | tuple)
    }
    share = len(chosen["x0_BL"]) / len(batch.x0_BL)  # every row has as many maskable tokens
    own = dataclasses.replace(
        batch,
        **chosen,
        denominator=batch.denominator * share,
        kd_denominator=batch.kd_denominator * share,
    )
    if targets is None:
        return own, None
    of_row_N = batch.distilled_BL.nonzero()[:, 0]
    on_N = (of_row_N >= rows.start) & (of_row_N < rows.stop)
    ids_NK, log_probs_NK, tail_N = (tensor[on_N] for tensor in targets.tensors)
    kept = SoftTargets(ids_NK, log_probs_NK, tail_N, targets.temperature, targets.conditioned_on)
    return own, kept


def train_arm(
    settings: SyntheticBench, world: World, texts: str, arm: str, seed: int
) -> list[dict[str, Any]]:
    """Train one student; its measures after each budget of steps."""
    student = random_student(world.vocab, seed).train()
    objective = objective_of(arm)
    optimizer = adamw(student, weight_decay=0.0, betas=(0.9, 0.95))
    average = WeightAverage(student, AVERAGE)
    term = 0 if arm == "ce" else 1
    found, target_seconds, began = [], 0.0, time.process_time()
    for step in range(settings.steps):
        if step % BLOCK == 0:
            whole = masked_texts(settings, world, texts, arm, seed, step // BLOCK)
            asked = time.process_time()
            answers = targets_of(arm, world, whole, student, settings.fills)
            target_seconds += time.process_time() - asked
        first = step % BLOCK * settings.rows
        batch, targets = part(whole, answers, slice(first, first + settings.rows))
        (loss_sums(student, batch, targets, objective)[term] / batch.denominator).backward()
        nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(student, step)
        if step + 1 in budgets(settings.steps):
            seconds = time.process_time() - began
            average.swap(student)
            measured = measures(
                world, texts, student_table(student, settings.words, settings.length)
            )
            average.swap(student)
            found.append(
                {
                    "steps": step + 1,
                    **measured,
                    "seconds": seconds,
                    "target_seconds": target_seconds,
                }
            )
            began = time.process_time() - seconds  # measuring does not count
    return found


def budgets(steps: int) -> tuple[int, ...]:
    """Training budgets of the curve, in steps."""
    return steps // 4, steps // 2, steps


def measures(world: World, texts: str, guess: Table) -> dict[str, float]:
    """Distance to the teacher's posteriors and law, and to those of the texts."""
    law_X = world.laws[texts]
    decoded_X = decoded(guess, law_X.ndim)
    return {
        "excess": excess(law_X, world.truths["teacher"], guess),
        "excess_texts": excess(law_X, world.truths[texts], guess),
        "tv": total_variation(world.laws["teacher"], decoded_X),
        "tv_texts": total_variation(law_X, decoded_X),
    }


def run(settings: SyntheticBench, path: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Train all arms on both kinds of texts, append the record to `path`, return it."""
    began = time.process_time()
    world = make_world(settings.words, settings.length, settings.language)
    lines: list[dict[str, Any]] = []
    for texts, arms in ARMS.items():
        for arm in arms:
            if settings.arms and arm not in settings.arms:
                continue
            runs = [train_arm(settings, world, texts, arm, seed) for seed in settings.seeds]
            bound = limit(world, texts, arm)
            for places in zip(*runs, strict=True):
                lines.append(line_of(texts, arm, places))
                lines[-1]["limit"] = measures(world, texts, bound) if bound else None
            say(f"{texts} texts, {arm}: excess {lines[-1]['excess']['mean']:.4f} nats")
    compare_with_ce(lines)
    results = {
        "language": {name: described(law_X) for name, law_X in world.laws.items()},
        "lines": lines,
        "cpu_seconds": time.process_time() - began,
    }
    record = make_record(
        "bench study synthetic", results, settings=dataclasses.asdict(settings), seed=None
    )
    append_record(path, record)
    return record


def line_of(texts: str, arm: str, places: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One arm at one budget over seeds: each measure with its mean, standard error and values."""
    line: dict[str, Any] = {"texts": texts, "arm": arm, "steps": places[0]["steps"]}
    for name in places[0]:
        if name != "steps":
            values = [place[name] for place in places]
            mean, std_err = mean_and_error(values)
            line[name] = {"mean": mean, "std_err": std_err, "values": values}
    return line


def compare_with_ce(lines: Sequence[dict[str, Any]]) -> None:
    """Add `minus_ce` to each line: the paired difference of the excess over seeds."""
    hard = {
        (line["texts"], line["steps"]): line["excess"]["values"]
        for line in lines
        if line["arm"] == "ce"
    }
    for line in lines:
        base = hard.get((line["texts"], line["steps"]))
        line["minus_ce"] = None
        if base is not None:
            gaps = [a - b for a, b in zip(line["excess"]["values"], base, strict=True)]
            mean, std_err = mean_and_error(gaps)
            line["minus_ce"] = {"mean": mean, "std_err": std_err, "values": gaps}


def described(law_X: torch.Tensor) -> dict[str, float]:
    """Size of a language."""
    return {"entropy_per_word": float(-torch.xlogy(law_X, law_X).sum()) / law_X.ndim}


assert {*ARMS["teacher"]} == {"ce", "exact", *TARGETS}, "an arm for every kind of target"
