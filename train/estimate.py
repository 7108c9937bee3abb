"""`mdm train --dry-run`: what a recipe would do and need, from its configs, without loading weights.

Memory is that of one process's device, an order of magnitude and not a promise.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import yaml
from torch import nn

from mdm.checkpoint import load_config, load_vocab
from mdm.config import to_tree
from mdm.convert import decoder_layers, student_config
from mdm.denoiser import CHUNK_BYTES, max_length
from mdm.errors import ConfigError

from .lora import adapter_parameters, linear_shapes
from .recipe import Recipe
from .sharding import check_sharding
from .supervision import needs_teacher, require_context
from .target_cache import check_cacheable
from .teachers.ar import asked_through
from .teachers.foreign import FOREIGN
from .teachers.kinds import check_target

GIB = 2**30
# nf4: half a byte, and a float32 scale for each 64 weights.
BYTES = {"bf16": 2.0, "fp32": 4.0, "int8": 1.0, "nf4": 0.5 + 4 / 64}


@dataclasses.dataclass(frozen=True)
class Size:
    """Numbers of parameters of a model, tied ones once.

    parameters  all of them
    layers      in decoder layers
    layer       in the largest decoder layer
    linear      in linear layers but the head
    adapters    that LoRA would add
    matrix      in the largest matrix
    """

    parameters: int
    layers: int
    layer: int
    linear: int
    adapters: int
    matrix: int

    @property
    def ends(self) -> int:
        """Parameters before and after the decoder layers: embeddings, head, last norm."""
        return self.parameters - self.layers


def describe(recipe: Recipe, processes: int = 1) -> str:
    """The recipe, the size of student and teacher, tokens to be trained on and a memory estimate.

    Raises what the run would raise for its settings: ConfigError, VocabError.
    """
    check_sharding(recipe)
    require_even(recipe, processes)
    config = config_of_student(recipe)
    student = size_of(config, recipe.train.lora_rank)
    memory = student_bytes(recipe, config, student, processes)
    loading = 4 * student.parameters
    settings, data = recipe.train, recipe.data
    lines = [
        yaml.safe_dump(to_tree(recipe), sort_keys=False).rstrip(),
        "",
        f"student     {student.parameters / 1e6:.1f}M parameters, {config.num_hidden_layers} layers,"
        f" width {config.hidden_size}",
    ]
    if settings.lora_rank:
        lines.append(
            f"            {student.adapters / 1e6:.1f}M more in adapters, which alone are trained"
        )
    if not recipe.objective.distils:
        lines.append("teacher     none (objective.kd_lambda is 0)")
    elif not needs_teacher(recipe):
        check_cacheable(recipe)
        lines.append(f"teacher     not loaded: its answers are read from {recipe.target.cache}")
    else:
        teacher_config = load_config(recipe.teacher.model)
        teacher = size_of(teacher_config)
        loading += int(teacher.parameters * BYTES[recipe.teacher.dtype])
        lines += describe_teacher(recipe, teacher_config, teacher)
        memory |= teacher_bytes(recipe, teacher_config.get_text_config(), teacher, processes)
        if recipe.target.kind == "embedding":
            trained = config.hidden_size * teacher_config.get_text_config().hidden_size
            memory["projection"] = 4 * trained * copies_trained(recipe)
    require_context(recipe, max_length(config), "student")
    tokens = settings.steps * settings.batch_rows * data.length
    lines.append(
        f"tokens      {tokens:,} in {settings.steps} steps of {settings.batch_rows} rows"
        f" of {data.length}"
    )
    shared = f", of {processes}" if processes > 1 else ""
    lines.append(f"memory      about {sum(memory.values()) / GIB:.1f} GiB a process{shared}:")
    lines += [f"              {name:<22}{size / GIB:7.2f} GiB" for name, size in memory.items()]
    stays = " and all the time" if recipe.teacher.offload else ""
    lines.append(f"            and up to {loading / GIB:.1f} GiB of CPU memory at the start{stays}")
    return "\n".join(lines)


def describe_teacher(recipe: Recipe, config: Any, size: Size) -> list[str]:
    """Lines about the teacher. Raises ConfigError or VocabError if it cannot answer the target."""
    settings, target = recipe.teacher, recipe.target
    if target.kind not in FOREIGN:
        require_context(recipe, max_length(config), "teacher")
        check_target(target, config.get_text_config().vocab_size)
    held = [name for name in (settings.quantization, settings.dtype) if name]
    held += ["offloaded"] if settings.offload else []
    lines = [f"teacher     {size.parameters / 1e6:.1f}M parameters, {', '.join(held)}"]
    if target.infill:
        lines.append(f"            asked through {template_of(recipe)}")
    return lines


def require_even(recipe: Recipe, processes: int) -> None:
    """Raise ConfigError if the processes would not have equally many rows a step."""
    if recipe.train.batch_rows % processes:
        raise ConfigError(
            f"train.batch_rows ({recipe.train.batch_rows}) must be a multiple of the number of"
            f" processes ({processes})"
        )


def config_of_student(recipe: Recipe) -> Any:
    """The config that the student would have, with its rows for another tokenizer."""
    settings = recipe.student
    config = student_config(
        load_config(settings.init), layers=settings.layers, width=settings.width
    )
    if settings.tokenizer is not None:
        config.vocab_size = len(load_vocab(settings.tokenizer)) + 1
    return config


def template_of(recipe: Recipe) -> str:
    """Name of the template the teacher is asked through. Raises VocabError if it has no such marks."""
    vocab, target = load_vocab(recipe.teacher.model), recipe.target
    found = asked_through(vocab, target.infill, target.family)
    return f"{found.family}, {found.order}"


def size_of(config: Any, lora_rank: int = 0) -> Size:
    """The size of a model with this config; no memory is taken."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = [numel(layer) for layer in decoder_layers(model)]
    return Size(
        parameters=numel(model),
        layers=sum(layers),
        layer=max(layers),
        linear=sum(shape.numel() for shape in linear_shapes(model).values()),
        adapters=adapter_parameters(model, lora_rank),
        matrix=max(parameter.numel() for parameter in model.parameters()),
    )


def numel(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def tokens_at_once(recipe: Recipe, processes: int) -> int:
    """Tokens of a micro-batch of one process."""
    rows = min(recipe.train.micro_rows, recipe.train.batch_rows // processes)
    return rows * recipe.data.length


def copies_trained(recipe: Recipe) -> int:
    """float32 values kept for a weight that is trained: itself, gradient, two moments, average."""
    return 4 + (1 if recipe.train.ema_decay else 0)


def student_bytes(recipe: Recipe, config: Any, size: Size, processes: int) -> dict[str, int]:
    """Estimated bytes of the student by purpose.

    Activations of a layer: about 16 values of the model width and 4 of the feed-forward width a
    token (inputs of every matrix product, norms, residuals), half of it in bf16.
    """
    settings = recipe.train
    full = settings.sharding == "full" and processes > 1
    parts = processes if full else 1
    mixed = settings.precision == "bf16"
    trained = size.adapters or size.parameters
    weights = size.parameters + size.adapters
    memory = {
        "weights": 4 * weights // parts,
        "gradients": 4 * trained // parts,
        "moments, average": 4 * trained * (copies_trained(recipe) - 2) // parts,
    }
    if (
        full
    ):  # two layers at a time, in half precision, and what is no layer all the time; and gradients
        layers, halves = 2 * 2 * size.layer, 2 * size.matrix if mixed else 0
        memory["gathered weights"] = (2 if mixed else 4) * layers + 4 * 2 * size.ends + halves
    elif mixed:
        memory["bf16 copies"] = 2 * (size.linear + size.matrix)
    if not full and processes > 1:
        memory["gradient exchange"] = 4 * trained
    tokens = tokens_at_once(recipe, processes)
    value = 3 if mixed else 4
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    layer = tokens * value * (16 * config.hidden_size + 4 * inner)
    if settings.gradient_checkpointing:
        memory["activations"] = layer + config.num_hidden_layers * tokens * 4 * config.hidden_size
    else:
        memory["activations"] = config.num_hidden_layers * layer
    # Logits, log-probabilities and their gradients; never more than a chunk of rows at a time.
    return memory | {"logits": 4 * min(CHUNK_BYTES, 4 * tokens * config.vocab_size)}


def teacher_bytes(recipe: Recipe, config: Any, size: Size, processes: int) -> dict[str, int]:
    """Estimated bytes of the teacher by purpose: weights, one forward, branches of a soft target."""
    settings = recipe.teacher
    value = BYTES[settings.dtype]
    if settings.offload:  # one matrix at a time
        weights = value * size.matrix
    elif settings.quantization:  # and one layer's matrix in full while it is used
        few = BYTES[settings.quantization]
        weights = few * size.linear + value * (size.parameters - size.linear)
    elif recipe.train.sharding == "full" and processes > 1:
        weights = value * (size.layers / processes + 2 * size.layer + size.ends)
    else:
        weights = value * size.parameters
    tokens = tokens_at_once(recipe, processes)
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    memory = {
        "teacher": int(weights),
        "teacher's forward": int(tokens * value * (8 * config.hidden_size + 4 * inner)),
    }
    if recipe.target.kind not in ("left", *FOREIGN):
        memory["teacher's branches"] = branch_bytes(recipe, config)
    return memory


def branch_bytes(recipe: Recipe, config: Any) -> int:
    """Estimated bytes of the branches of a soft target: keys and values, and what a layer needs."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    # Kept once, read once by a layer, and once more while they grow.
    memory = 3 * 2 * config.num_hidden_layers * heads * width
    value = BYTES[recipe.teacher.dtype]
    return int(recipe.target.branch_tokens * value * (memory + 8 * config.hidden_size + 4 * inner))
