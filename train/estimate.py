"""`mdm train --dry-run`: what a recipe would do and need, from its configs, without loading weights."""

from __future__ import annotations

from typing import Any

import torch
import yaml

from mdm.checkpoint import load_config, load_vocab
from mdm.config import to_tree
from mdm.convert import student_config
from mdm.denoiser import CHUNK_BYTES, max_length

from .recipe import Recipe
from .run import require_context
from .teachers.ar import asked_through
from .teachers.kinds import check_target

GIB = 2**30


def describe(recipe: Recipe) -> str:
    """The recipe, the size of student and teacher, tokens to be trained on and a memory estimate."""
    source = load_config(recipe.student.init)
    config = student_config(source, layers=recipe.student.layers, width=recipe.student.width)
    student = count_parameters(config)
    memory = memory_bytes(recipe, config, student)
    settings, data = recipe.train, recipe.data
    lines = [
        yaml.safe_dump(to_tree(recipe), sort_keys=False).rstrip(),
        "",
        f"student     {student / 1e6:.1f}M parameters, {config.num_hidden_layers} layers,"
        f" width {config.hidden_size}",
    ]
    if recipe.objective.kd_lambda > 0:
        teacher_config = load_config(recipe.teacher.model)
        require_context(recipe, max_length(teacher_config), "teacher")
        teacher = count_parameters(teacher_config)
        memory["teacher"] = teacher * (2 if recipe.teacher.dtype == "bf16" else 4)
        lines.append(f"teacher     {teacher / 1e6:.1f}M parameters, {recipe.teacher.dtype}")
        check_target(recipe.target, teacher_config.get_text_config().vocab_size)
        if recipe.target.infill:
            lines.append(f"            asked through {template_of(recipe)}")
        if recipe.target.kind != "left":
            memory["teacher's branches"] = branch_bytes(recipe, teacher_config.get_text_config())
    else:
        lines.append("teacher     none (objective.kd_lambda is 0)")
    require_context(recipe, max_length(config), "student")
    tokens = settings.steps * settings.batch_rows * data.length
    lines.append(
        f"tokens      {tokens:,} in {settings.steps} steps of {settings.batch_rows} rows"
        f" of {data.length}"
    )
    lines.append(f"memory      about {sum(memory.values()) / GIB:.1f} GiB a process:")
    lines += [f"              {name:<22}{size / GIB:7.2f} GiB" for name, size in memory.items()]
    return "\n".join(lines)


def template_of(recipe: Recipe) -> str:
    """Name of the template the teacher is asked through. Raises VocabError if it has no such marks."""
    vocab, target = load_vocab(recipe.teacher.model), recipe.target
    found = asked_through(vocab, target.infill, target.family)
    return f"{found.family}, {found.order}"


def branch_bytes(recipe: Recipe, config: Any) -> int:
    """Estimated bytes of the branches of a soft target: keys and values, and what a layer needs."""
    value = 2 if recipe.teacher.dtype == "bf16" else 4
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    # Kept once, read once by a layer, and once more while they grow.
    memory = 3 * 2 * config.num_hidden_layers * heads * width
    return int(recipe.target.branch_tokens * value * (memory + 8 * config.hidden_size + 4 * inner))


def count_parameters(config: Any) -> int:
    """Parameters of a model with this config, tied ones once; no memory is taken."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def memory_bytes(recipe: Recipe, config: Any, parameters: int) -> dict[str, int]:
    """Estimated bytes by purpose: an order of magnitude, not a promise.

    Activations of a layer: about 16 values of the model width and 4 of the feed-forward width a
    token (inputs of every matrix product, norms, residuals), half of it in bf16.
    """
    settings = recipe.train
    tokens = settings.micro_rows * recipe.data.length
    value = 3 if settings.precision == "bf16" else 4
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    layer = tokens * value * (16 * config.hidden_size + 4 * inner)
    if settings.gradient_checkpointing:
        activations = layer + config.num_hidden_layers * tokens * 4 * config.hidden_size
    else:
        activations = config.num_hidden_layers * layer
    copies = 4 + (1 if settings.ema_decay else 0)  # weights, gradients, two moments, average
    return {
        "weights and optimizer": parameters * 4 * copies,
        "activations": activations,
        "logits (one chunk)": 4 * CHUNK_BYTES,
    }
