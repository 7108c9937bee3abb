"""The computing of a training step in FLOPs, and the hours of a run, by formulas of sizes alone.

A multiplication and an addition are two. Norms, softmax, the optimizer and evaluations are left out. With
P the parameters of linear layers that a token passes through, A those of adapters, H the heads times
their width, V x D the head, for every token that is read (noisy or clean), pair of tokens, and masked
token:

    part        forward   forward and backward (of frozen weights; of weights computed twice)
    layers      2 P       6 P                  (4 P + 6 A; 2 P more, train.gradient_checkpointing)
    attention   4 H       12 H                 (12 H; 4 H more) a pair and layer, every pair of a row
    head        2 V D     8 V D                (6 V D): logits are always computed twice

A teacher's forward is 2 P and 4 H, twice with CompDemo. Its head is 2 V D a masked token, and 4 V D where
whole distributions are made of its answers, in the forward pass and again in the backward pass.
Kernels that skip what is masked, or compute more in the backward pass (flash attention: 2 H a pair and
layer), do something else with the pairs.
"""

from __future__ import annotations

import torch

from mdm.schedule import SCHEDULES

from .objective import ObjectiveSettings
from .outlines import Outline, copies
from .recipe import Recipe
from .sharding import EQUAL_PASSES
from .teachers.denoised import DENOISED

EXAMPLE_TFLOPS = 100.0  # of a process, in the example where no rate is given


def step_flops(recipe: Recipe, student: Outline, teacher: Outline | None) -> dict[str, float]:
    """FLOPs of a step of all processes, by part; of a teacher, what does not depend on where masks are."""
    masked = masked_tokens(recipe, student)
    found = _of_student(recipe, student, masked)
    return found | (_of_teacher(recipe, teacher, masked) if teacher else {})


def _of_student(recipe: Recipe, student: Outline, masked: float) -> dict[str, float]:
    settings, size = recipe.train, student.size
    assert size is not None
    frozen = bool(settings.lora_rank)
    again = 1 if settings.gradient_checkpointing else 0
    rows = settings.batch_rows
    tokens = rows * recipe.data.length * student.streams(recipe)
    pairs = rows * student.pairs(recipe) * student.layers
    scored = masked + (rows * recipe.data.length if recipe.objective.ar_weight else 0)
    back = 1 if frozen else 2  # in units of the forward pass
    linear = 2 * size.used * tokens * (1 + again + back)
    adapters = 2 * size.adapters * tokens * (1 + again + 2)
    return {
        "student's layers": float(linear + adapters),
        "student's attention": float(4 * student.heads * pairs * (1 + again + 2)),
        "student's head": 2 * student.rows * student.width * scored * (2 + back),
    }


def _of_teacher(recipe: Recipe, teacher: Outline, masked: float) -> dict[str, float]:
    size, target, rows = teacher.size, recipe.target, recipe.train.batch_rows
    assert size is not None
    passes = 2 if target.comp_demo else 1
    tokens = rows * recipe.data.length * teacher.streams(recipe)
    pairs = rows * teacher.pairs(recipe) * teacher.layers
    found = {
        "teacher's layers": float(2 * size.used * tokens * passes),
        "teacher's attention": float(4 * teacher.heads * pairs * passes),
    }
    if target.kind == "embedding":
        return found
    few = recipe.objective.kd_positions
    asked = min(masked, few * rows * copies(recipe)) if few else masked
    head = 2 * teacher.rows * teacher.width * asked
    return found | {"teacher's head": head * (2 if target.kind == DENOISED else 1)}


def masked_tokens(recipe: Recipe, student: Outline) -> float:
    """Masked tokens expected in a step, as if every token of a row could be masked."""
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
    lines = [f"computing   {step:.3g} FLOPs a step, {step * steps:.3g} in {steps} steps:"]
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
        return [*lines, f"time        about {needed}{shared}"]
    return [
        *lines,
        f"time        depends on the machine; for example {needed}{shared} (your rate: --tflops)",
    ]
