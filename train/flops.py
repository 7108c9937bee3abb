"""The computing of a training step in FLOPs, and the hours of a run, by formulas of sizes alone.

A multiplication and an addition are two. Norms, softmax, the optimizer and evaluations are left out. With
P the parameters of linear layers that a token passes through, A those of adapters, H the heads times
their width, V x D the head, for every token that is read (noisy or clean), pair of tokens, and masked
token:

    part        forward   forward and backward (of frozen weights; of weights computed twice)
    layers      2 P       6 P                  (4 P + 6 A; 2 P more, train.gradient_checkpointing)
    attention   4 H       12 H                 (12 H; 4 H more) a pair and layer, every pair of a row
    head        2 V D     8 V D                (6 V D): logits are always computed twice

A teacher's forward is 2 P and 4 H, twice with CompDemo; left-only targets read copies of a row once. Its
head is 2 V D a masked token, and 4 V D where whole distributions are made of its answers, in the forward
pass and again in the backward pass.

A rollout is forwards of the student: 2 (P + A), 4 H, and 2 V D for every token that is open in its block. A
student with blocks of B keeps keys and values: to write a tokens a forward it reads B tokens in each, and
every clean token once, so B / a + 1 for a token written, and sees all before them; without blocks it reads
the whole row in each. How long prompts are, and a where probabilities decide it, is assumed; no rollout is
taken to end before its limit, and the padding of rows that are decoded together is left out.

Kernels that skip what is masked, or compute more in the backward pass (flash attention: 2 H a pair and
layer), do something else with the pairs.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from mdm.schedule import SCHEDULES

from .memory import gives_whole
from .objective import ObjectiveSettings
from .on_policy import OnPolicySettings, batch_size, length_limit
from .outlines import (
    Outline,
    RowShape,
    copies,
    data_rows,
    prompt_lengths,
    read_by_teacher,
    rollout_length,
)
from .recipe import Recipe
from .sharding import EQUAL_PASSES
from .targets import LOOKED_AT

EXAMPLE_TFLOPS = 100.0  # of a process, in the example where no rate is given

# Tokens a forward where a threshold decides: OPDLM reports 1.5 to 1.9 at .9 with blocks of 4.
ASSUMED_ACCEPTED = 1.5


def step_flops(recipe: Recipe, student: Outline, teacher: Outline | None) -> dict[str, float]:
    """FLOPs of a step of all processes, by part; of a teacher, what does not depend on where masks are.

    With rollouts it is the mean over all steps of the run.
    """
    found: dict[str, float] = {}

    def add(parts: dict[str, float], share: float) -> None:
        for name, value in parts.items():
            found[name] = found.get(name, 0.0) + share * value

    for learnt in learnt_rows(recipe, student):
        add(_of_student(recipe, student, learnt), learnt.share)
        if teacher and learnt.teaches:
            add(_of_teacher(recipe, teacher, learnt), learnt.share)
    for batch in rollout_batches(recipe):
        add(_of_writing(recipe, student, batch), 1 / recipe.train.steps)
    return found


# --- what is learnt from -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Learnt:
    """Rows of a step that are learnt from.

    share    of the run's steps that have them
    rows     what they are
    masked   their masked tokens, of all copies
    clean    their clean tokens after which the next one is learnt
    teaches  whether the teacher is asked about them
    own      whether the student has written them
    """

    share: float
    rows: RowShape
    masked: float
    clean: float
    teaches: bool
    own: bool = False


def learnt_rows(recipe: Recipe, student: Outline) -> list[Learnt]:
    """Everything that the steps of a run learn from."""
    settings, steps = recipe.on_policy, recipe.train.steps
    every = recipe.train.batch_rows
    own = settings.rows(every)
    before = min(settings.start_step, steps) if settings.active else steps
    found = []
    for share, count in ((before / steps, every), (1 - before / steps, every - own)):
        if share and count:
            masked = masked_tokens(recipe, student) * count / every
            clean = count * recipe.data.length if recipe.objective.ar_weight else 0
            rows = data_rows(recipe, count)
            found.append(Learnt(share, rows, masked, clean, recipe.objective.distils))
    prompt = prompt_lengths(recipe)[0]
    for batch in rollout_batches(recipe):
        length = rollout_length(student, prompt, batch.limit)
        number, masked = states_of(recipe, student, length - prompt)
        rows = RowShape(own, length, number)
        found.append(Learnt(batch.steps / steps, rows, own * masked, 0, True, own=True))
    return found


def masked_tokens(recipe: Recipe, student: Outline) -> float:
    """Masked tokens expected in a step, as if every token of a row could be masked and all were data."""
    objective, data = recipe.objective, recipe.data
    group = student.block_size if objective.noise == "block" else data.length
    assert group, "check_blocks refuses noise by blocks without blocks"
    return recipe.train.batch_rows * data.length * copies(recipe) * masked_share(objective, group)


def masked_share(objective: ObjectiveSettings, group: int) -> float:
    """Mean share of the tokens of a group (a row or a block) that is masked, over all noise levels."""
    if objective.complementary:
        return 0.5
    if objective.masking != "rate":  # 1 … m of m tokens, or a level in [1/m, 1]
        return (1 + 1 / group) / 2
    level_t = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    return float(1 - SCHEDULES[objective.schedule].alpha(level_t).mean())


# --- rollouts ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RolloutBatch:
    """Rollouts that are written together: how many, of at most how many tokens, for how many steps."""

    count: int
    limit: int
    steps: int


def rollout_batches(recipe: Recipe) -> list[RolloutBatch]:
    """All batches of rollouts of a run; none if there are no rollouts."""
    settings = recipe.on_policy
    if not settings.active:
        return []
    rows, each = settings.rows(recipe.train.batch_rows), settings.steps_per_batch
    left = recipe.train.steps - settings.start_step
    return [
        RolloutBatch(
            batch_size(settings, rows, number),
            length_limit(settings, number),
            min(each, left - number * each),
        )
        for number in range(max(0, -(-left // each)))
    ]


def accepted(settings: OnPolicySettings, group: int) -> float:
    """Tokens decided in a forward, of `group` that are decoded together; a mean."""
    if settings.threshold is None:
        return group / math.ceil(group / settings.tokens_per_step)
    return min(ASSUMED_ACCEPTED, group)


def states_of(recipe: Recipe, student: Outline, written: int) -> tuple[int, float]:
    """(noisy copies of a rollout, its masked tokens in all of them), of `written` tokens."""
    settings, objective = recipe.on_policy, recipe.objective
    group = min(student.block_size or written, written)
    rate = accepted(settings, min(settings.block_length or group, group))
    # Before its steps a group has `group`, group - rate, … rate masks.
    round_share = (1 + rate / group) / 2
    steps = group / rate
    if settings.threshold is not None and student.block_size:
        steps = group  # in any micro-batch there is a block that took one for each token
    noise = (student.block_size if objective.noise == "block" else None) or written
    found = {
        "round": (1, round_share),
        "complement": (2, 1.0),
        "all": (math.ceil(steps), group / rate * round_share),
        "random": (copies(recipe), copies(recipe) * masked_share(objective, noise)),
    }
    number, share = found[settings.states]
    return number, share * written


@dataclasses.dataclass(frozen=True)
class Writing:
    """What the student does to write a rollout: forwards, tokens read, pairs of them in a layer, logits."""

    forwards: float
    tokens: float
    pairs: float
    logits: float


def writing_of(settings: OnPolicySettings, student: Outline, prompt: int, limit: int) -> Writing:
    """The work of one rollout that goes on to its limit."""
    total, block = rollout_length(student, prompt, limit), student.block_size
    written = total - prompt
    group = min(settings.block_length or block or written, written)
    rate = accepted(settings, group)
    forwards = written / rate
    if settings.threshold is None and settings.tokens_per_step > 1:
        forwards = math.ceil(written / group) * group / rate  # those of a whole last part
    logits = forwards * (group + rate) / 2
    if block is None:
        return Writing(forwards, forwards * total, forwards * total**2, logits)
    first = (prompt // block + 1) * block  # end of the first block
    blocks = (total - first) // block + 1
    ends = blocks * (first + total) / 2  # of all blocks, which are the keys of their forwards
    # In its first forward a block brings along what has become clean before it.
    clean = (first - block) * first + block * (ends - first)
    pairs = forwards / blocks * block * ends + clean
    return Writing(forwards, forwards * block + total - block, pairs, logits)


def _of_writing(recipe: Recipe, student: Outline, batch: RolloutBatch) -> dict[str, float]:
    size = student.size
    assert size is not None
    work = writing_of(recipe.on_policy, student, prompt_lengths(recipe)[0], batch.limit)
    return {
        "rollouts' layers": batch.count * 2 * (size.used + size.adapters) * work.tokens,
        "rollouts' attention": batch.count * 4 * student.heads * student.layers * work.pairs,
        "rollouts' head": batch.count * 2 * student.rows * student.width * work.logits,
    }


# --- student and teacher -------------------------------------------------------------------------


def _of_student(recipe: Recipe, student: Outline, learnt: Learnt) -> dict[str, float]:
    settings, size, rows = recipe.train, student.size, learnt.rows
    assert size is not None
    frozen = bool(settings.lora_rank)
    again = 1 if settings.gradient_checkpointing else 0
    tokens = rows.count * rows.length * student.streams(rows)
    pairs = rows.count * student.pairs(rows) * student.layers
    back = 1 if frozen else 2  # in units of the forward pass
    linear = 2 * size.used * tokens * (1 + again + back)
    adapters = 2 * size.adapters * tokens * (1 + again + 2)
    scored = learnt.masked + learnt.clean
    return {
        "student's layers": float(linear + adapters),
        "student's attention": float(4 * student.heads * pairs * (1 + again + 2)),
        "student's head": 2 * student.rows * student.width * scored * (2 + back),
    }


def _of_teacher(recipe: Recipe, teacher: Outline, learnt: Learnt) -> dict[str, float]:
    size, target, rows = teacher.size, recipe.target, read_by_teacher(recipe, learnt.rows)
    assert size is not None
    passes = 2 if target.comp_demo else 1
    tokens = rows.count * rows.length * teacher.streams(rows)
    pairs = rows.count * teacher.pairs(rows) * teacher.layers
    found = {
        "teacher's layers": float(2 * size.used * tokens * passes),
        "teacher's attention": float(4 * teacher.heads * pairs * passes),
    }
    if target.kind == "embedding":
        return found
    few = recipe.objective.kd_positions
    asked = min(learnt.masked, few * rows.count * learnt.rows.copies) if few else learnt.masked
    if gives_whole(recipe):
        looked = LOOKED_AT * -(-rows.count // recipe.train.micro_rows) if learnt.own else 0
        asked = 2 * asked + min(asked, looked)
    return found | {"teacher's head": 2 * teacher.rows * teacher.width * asked}


# --- in words ------------------------------------------------------------------------------------


def duration(flops: float, tflops: float, processes: int) -> str:
    """Hours, or if it is less than one minutes, at `tflops` · 10¹² FLOPs a second in each process."""
    needed = flops / (tflops * 1e12 * processes) / 3600
    return f"{needed:.3g} hours" if needed >= 1 else f"{60 * needed:.2g} minutes"


def describe_computing(
    recipe: Recipe,
    student: Outline,
    teacher: Outline | None,
    processes: int,
    tflops: float | None,
) -> list[str]:
    """Lines about the computing of a step, of the run, and the time it takes."""
    models = {"student": student} | ({"teacher": teacher} if teacher else {})
    if unknown := [name for name, model in models.items() if model.size is None]:
        return [f"computing   not known, as the size of the {' and the '.join(unknown)} is not"]
    parts = step_flops(recipe, student, teacher)
    step, steps = sum(parts.values()), recipe.train.steps
    mean = " on average" if recipe.on_policy.active else ""
    lines = [f"computing   {step:.3g} FLOPs a step{mean}, {step * steps:.3g} in {steps} steps:"]
    lines += [f"              {name:<22}{value:9.2e} FLOPs a step" for name, value in parts.items()]
    if teacher and recipe.target.kind not in EQUAL_PASSES:
        lines.append(
            f"              not counted: the branches of target.kind={recipe.target.kind}, which depend"
            " on the masks"
        )
    rate = tflops or EXAMPLE_TFLOPS
    needed = f"{duration(step * steps, rate, processes)} at {rate:g} TFLOP/s a process"
    shared = f", of {processes}" if processes > 1 else ""
    if tflops:
        lines.append(f"time        about {needed}{shared}")
    else:
        lines.append(
            f"time        depends on the machine; for example {needed}{shared} (your rate: --tflops)"
        )
    if rollout_batches(recipe):
        lines.append(
            "            and more than that: forwards of rollouts come one after another, and each computes"
            " little"
        )
    return lines
