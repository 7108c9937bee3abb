"""`mdm train --dry-run`: what a recipe would do and need, from its configs, without loading weights.

The models are in outlines.py, what they take in memory.py, what they compute in flops.py, what is said of
rollouts in estimate_rollouts.py. Memory is that of one process's device, an order of magnitude and not a
promise.
"""

from __future__ import annotations

import yaml

from mdm.checkpoint import load_vocab
from mdm.config import to_tree
from mdm.errors import ConfigError

from .checks import check_blocks
from .estimate_rollouts import describe_rollouts
from .flops import describe_computing, rollout_batches, states_of
from .memory import (
    BYTES,
    OF_A_STEP,
    copies_trained,
    rollout_bytes,
    student_bytes,
    teacher_bytes,
)
from .outlines import (
    Outline,
    RowShape,
    data_rows,
    has_tokenizer,
    prompt_lengths,
    rollout_length,
    student_outline,
    teacher_outline,
)
from .recipe import Recipe
from .run import initial_vocab
from .sharding import check_sharding
from .supervision import needs_teacher, require_context
from .target_cache import check_cacheable
from .teachers.ar import asked_through
from .teachers.denoised import CHUNKS, DENOISED, shared_tokens
from .teachers.foreign import FOREIGN
from .teachers.kinds import check_target

GIB = 2**30


def describe(recipe: Recipe, processes: int = 1, tflops: float | None = None) -> str:
    """The recipe, the size of student and teacher, tokens to be trained on, memory and computing.

    `tflops` is what a process computes in a second, in 10¹² FLOPs. Raises what the run would raise for
    its settings: ConfigError, CheckpointError, VocabError.
    """
    check_sharding(recipe)
    require_even(recipe, processes)
    student = student_outline(recipe)
    check_blocks(recipe.objective, recipe.data, student)
    require_context(recipe, student.max_length, "student")
    teacher = None
    lines = [
        yaml.safe_dump(to_tree(recipe), sort_keys=False).rstrip(),
        "",
        f"student     {student.told()}, {student.layers} layers, width {student.width}",
    ]
    if recipe.train.lora_rank and student.size:
        lines.append(
            f"            {student.size.adapters / 1e6:.1f}M more in adapters, which alone are trained"
        )
    if not recipe.distils:
        lines.append("teacher     none (objective.kd_lambda or kd_weight is 0)")
    elif not needs_teacher(recipe):
        check_cacheable(recipe)
        lines.append(f"teacher     not loaded: its answers are read from {recipe.target.cache}")
    else:
        teacher = teacher_outline(recipe)
        lines += describe_teacher(recipe, teacher)
    lines.append(f"tokens      {tokens_of_data(recipe)}")
    lines += describe_rollouts(recipe, student, teacher, processes)
    lines += describe_memory(recipe, student, teacher, processes)
    lines += describe_computing(recipe, student, teacher, processes, tflops)
    return "\n".join(lines)


def describe_teacher(recipe: Recipe, teacher: Outline) -> list[str]:
    """Lines about the teacher. Raises ConfigError or VocabError if it cannot answer the target."""
    settings, target = recipe.teacher, recipe.target
    held = [name for name in (settings.quantization, settings.dtype) if name]
    held += ["offloaded"] if settings.offload else []
    lines = [f"teacher     {teacher.told()}, {', '.join(held)}"]
    if target.kind not in (*FOREIGN, CHUNKS):
        require_context(recipe, teacher.max_length, "teacher")
    if target.kind == DENOISED:
        lines += compare_tokens(recipe)
    elif target.kind == CHUNKS:
        lines.append(
            "            reads the rows in its own tokens, here taken to be as many as the student's"
        )
    elif target.kind not in FOREIGN:
        check_target(target, teacher.rows)
    if target.comp_demo:
        lines.append("            asked twice a step, one half of the masks after the other")
    if target.infill:
        lines.append(f"            asked through {template_of(recipe)}")
    if not recipe.objective.distils:
        lines.append(
            "            asked about rollouts alone (objective.kd_lambda or kd_weight is 0)"
        )
    return lines


def compare_tokens(recipe: Recipe) -> list[str]:
    """Check that student and teacher have the same tokens, or say that it could not be checked.

    Raises VocabError if they differ, or have no mask.
    """
    model = recipe.teacher.model
    for source in (model, recipe.student.tokenizer or recipe.student.init):
        if not has_tokenizer(source):
            return [
                f"            not checked: whether it has the student's tokens (no tokenizer in {source})"
            ]
    shared_tokens(load_vocab(model), initial_vocab(recipe))
    return []


def require_even(recipe: Recipe, processes: int) -> None:
    """Raise ConfigError if the processes would not have equally many rows a step."""
    if recipe.train.batch_rows % processes:
        raise ConfigError(
            f"train.batch_rows ({recipe.train.batch_rows}) must be a multiple of the number of"
            f" processes ({processes})"
        )
    own = recipe.on_policy.rows(recipe.train.batch_rows)
    if own % processes:
        raise ConfigError(
            f"train.batch_rows={recipe.train.batch_rows} with on_policy.fraction="
            f"{recipe.on_policy.fraction}: {own} rollouts a step cannot be shared out evenly among"
            f" {processes} processes"
        )


def template_of(recipe: Recipe) -> str:
    """Name of the template the teacher is asked through. Raises VocabError if it has no such marks."""
    vocab, target = load_vocab(recipe.teacher.model), recipe.target
    found = asked_through(vocab, target.infill, target.family)
    return f"{found.family}, {found.order}"


def tokens_of_data(recipe: Recipe) -> str:
    """How many tokens of the data are learnt from, in which steps."""
    settings, on_policy = recipe.train, recipe.on_policy
    own = on_policy.rows(settings.batch_rows)
    before = min(on_policy.start_step, settings.steps) if on_policy.active else settings.steps
    parts = [
        f"{steps * rows * recipe.data.length:,} in {steps} steps of {rows} rows of {recipe.data.length}"
        for steps, rows in (
            (before, settings.batch_rows),
            (settings.steps - before, settings.batch_rows - own),
        )
        if steps and rows
    ]
    return ", then ".join(parts) or "none of the data: every row is a rollout"


# --- memory --------------------------------------------------------------------------------------


def describe_memory(
    recipe: Recipe, student: Outline, teacher: Outline | None, processes: int
) -> list[str]:
    """Lines about the memory of a process, by purpose."""
    models = {"student": student} | ({"teacher": teacher} if teacher else {})
    if unknown := [name for name, model in models.items() if model.size is None]:
        return [f"memory      not known, as the size of the {' and the '.join(unknown)} is not"]
    memory = max(
        (
            parts_of_memory(recipe, student, teacher, processes, rows)
            for rows in largest_rows(recipe, student)
        ),
        key=lambda parts: sum(parts.values()),
    )
    loading = 4 * _parameters(student)
    if teacher:
        loading += int(_parameters(teacher) * BYTES[recipe.teacher.dtype])
    writing = rollout_bytes(recipe, student, processes) if rollout_batches(recipe) else {}
    of_a_step = sum(memory.get(name, 0) for name in OF_A_STEP)
    needed = sum(memory.values()) + max(0, sum(writing.values()) - of_a_step)
    shared = f", of {processes}" if processes > 1 else ""
    lines = [f"memory      about {needed / GIB:.1f} GiB a process{shared}:"]
    lines += [f"              {name:<22}{size / GIB:7.2f} GiB" for name, size in memory.items()]
    if writing:
        lines.append(
            f"            while rollouts are written, instead of the {of_a_step / GIB:.2f} GiB that only a"
            " step needs:"
        )
        lines += [
            f"              {name:<22}{size / GIB:7.2f} GiB" for name, size in writing.items()
        ]
    stays = " and all the time" if recipe.teacher.offload else ""
    lines.append(f"            and up to {loading / GIB:.1f} GiB of CPU memory at the start{stays}")
    return lines


def parts_of_memory(
    recipe: Recipe, student: Outline, teacher: Outline | None, processes: int, rows: RowShape
) -> dict[str, int]:
    """Bytes of a process by purpose when it learns from such rows."""
    memory = student_bytes(recipe, student, processes, rows)
    if teacher:
        memory |= teacher_bytes(recipe, teacher, processes, rows)
        if recipe.target.kind == "embedding":
            memory["projection"] = 4 * student.width * teacher.width * copies_trained(recipe)
    return memory


def largest_rows(recipe: Recipe, student: Outline) -> list[RowShape]:
    """The rows of each kind that a step learns from, when they are most and longest."""
    settings, every = recipe.on_policy, recipe.train.batch_rows
    own = settings.rows(every)
    batches = rollout_batches(recipe)
    found = []
    if not batches or settings.start_step or own < every:
        found.append(
            data_rows(recipe, every if settings.start_step or not batches else every - own)
        )
    if batches:
        limit = max(batch.limit for batch in batches)
        length = rollout_length(student, prompt_lengths(recipe)[1], limit)
        found.append(RowShape(own, length, states_of(recipe, student, limit)[0]))
    return found


def _parameters(model: Outline) -> int:
    assert model.size is not None
    return model.size.parameters
