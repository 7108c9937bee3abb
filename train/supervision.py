"""Where the targets of a run come from: a teacher asked at every step, or a cache of its answers.

`open_teacher` loads what is needed and checks the settings against it, before any data is made;
`bind` joins it with the data of the run. The trainer sees nothing but an `Ask`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from mdm.denoiser import Denoiser
from mdm.errors import ConfigError
from mdm.vocab import Vocab

from . import processes
from .asking import soft_targets, whole_targets
from .masking import MaskedBatch
from .sharding import shard_teacher
from .target_cache import BY_WEIGHTS, cached_answers, check_cacheable
from .targets import Targets
from .teachers.ar import ARTeacher, load_foreign, load_teacher
from .teachers.chunk_likelihoods import ask_chunks
from .teachers.denoised import (
    CHUNKS,
    DENOISED,
    SEES_MASKS,
    DiffusionTeacher,
    ask_denoised,
    load_diffusion_teacher,
)
from .teachers.foreign import FOREIGN, ask_foreign
from .teachers.kinds import check_target

if TYPE_CHECKING:
    from .dataset import PreparedData
    from .recipe import Recipe, TeacherSettings

READERS = (*FOREIGN, CHUNKS)  # kinds whose teacher reads the rows in its own tokens

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

# The targets of a masked batch on the device; the student may be asked for its own distributions, if the
# target depends on the masks.
Ask = Callable[[MaskedBatch, Denoiser | None], Targets]


def needs_teacher(recipe: Recipe) -> bool:
    """Is a teacher's model asked in the course of training?"""
    return recipe.distils and not recipe.target.cache


Teacher = ARTeacher | DiffusionTeacher


def open_teacher(recipe: Recipe, vocab: Vocab) -> Teacher | None:
    """The teacher of a student with this vocabulary on this process's device, checked against the
    recipe; None if none is asked."""
    if recipe.distils and recipe.target.cache:
        check_cacheable(recipe)
    if not needs_teacher(recipe):
        return None
    if recipe.teacher.model.startswith(BY_WEIGHTS):
        raise ConfigError(
            f"teacher.model={recipe.teacher.model} names weights that are not at hand, which goes with"
            " target.cache only; name a model"
        )
    settings, target = recipe.teacher, recipe.target
    dtype, few, device = DTYPES[settings.dtype], settings.quantization, processes.device()
    teacher: Teacher
    if target.kind in SEES_MASKS:
        teacher = load_diffusion_teacher(
            settings.model,
            vocab,
            dtype=dtype,
            foreign=target.kind == CHUNKS,
            trust_remote_code=settings.trust_remote_code,
        )
        if target.kind == DENOISED:
            require_context(recipe, teacher.max_length, "teacher")
    elif target.kind in FOREIGN:
        teacher = load_foreign(settings.model, dtype=dtype, quantization=few, device=device)
    else:
        teacher = load_teacher(
            settings.model,
            vocab,
            dtype=dtype,
            infill=target.infill,
            family=target.family,
            quantization=few,
            device=device,
        )
        check_target(target, teacher.num_tokens)
        require_room(recipe, teacher)
        require_context(recipe, teacher.max_length, "teacher")
    shard_teacher(teacher.model, recipe.train)
    place(teacher, settings)
    return teacher


def place(teacher: Teacher, settings: TeacherSettings) -> None:
    """Have the teacher compute on this process's device, wherever its weights are kept."""
    if settings.offload:
        from accelerate import cpu_offload

        cpu_offload(teacher.model, execution_device=processes.device())
    elif not settings.quantization:  # a quantised one was loaded to where it is
        whole = teacher.denoiser if isinstance(teacher, DiffusionTeacher) else teacher.model
        whole.to(processes.device())


def bind(recipe: Recipe, teacher: Teacher | None, vocab: Vocab, data: PreparedData) -> Ask | None:
    """How a step asks for its targets; None if it has none."""
    objective, target = recipe.objective, recipe.target
    if not recipe.distils:
        return None
    if target.cache:
        return cached_answers(recipe, data, len(vocab))
    assert teacher is not None
    if target.kind in READERS:
        readings = data.readings
        assert readings is not None, "the rows were read by the teacher"
        require_reading_room(data.manifest["splits"]["train"]["longest_reading"], teacher)
        if isinstance(teacher, DiffusionTeacher):
            return ask_chunks(teacher, readings, target)
        return ask_foreign(teacher, readings, vocab, target, objective.kd_temperature)
    if isinstance(teacher, DiffusionTeacher):
        return ask_denoised(teacher, target)

    def ask(batch: MaskedBatch, student: Denoiser | None) -> Targets:
        if target.top_k == 0:
            return whole_targets(teacher, batch)
        return soft_targets(teacher, batch, target, objective.kd_temperature, student)

    return ask


def require_context(recipe: Recipe, max_length: int, who: str) -> None:
    """Raise ConfigError if rows are longer than a model's context."""
    if recipe.data.length > max_length:
        raise ConfigError(
            f"data.length is {recipe.data.length}, but the {who} was built for at most"
            f" {max_length} tokens; lower data.length"
        )


def require_reading_room(longest: int, teacher: Teacher) -> None:
    """Raise ConfigError if a document of a row has more tokens for the teacher than its context holds."""
    if longest > teacher.max_length:
        raise ConfigError(
            f"a row of the training data has {longest} tokens for the teacher, but it was built for at"
            f" most {teacher.max_length}; lower data.length"
        )


def require_room(recipe: Recipe, teacher: ARTeacher) -> None:
    """Raise ConfigError if a row in the teacher's fill-in-the-middle template might not fit."""
    if teacher.template is None:
        return
    needed = recipe.data.length + teacher.template.num_marks + 1
    if needed > teacher.max_length:
        raise ConfigError(
            f"target.infill={recipe.target.infill} adds {needed - recipe.data.length} tokens to rows of"
            f" {recipe.data.length}, but the teacher was built for at most {teacher.max_length}; lower"
            " data.length"
        )
