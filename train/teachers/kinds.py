"""The kinds of soft target, by name. A new kind is one file and one line here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

from mdm.errors import ConfigError, check_known

from ..targets import Question, SoftTargets, TargetSettings, refuse_nan, stack_targets
from .ar import ARTeacher
from .fills import Rule, filled
from .infill import arrange, restore
from .left import left_only
from .student import student_proposed
from .suffix import suffix_scored

TARGETS: dict[str, Callable[..., SoftTargets]] = {
    "left": left_only,
    "suffix": suffix_scored,
    "importance": partial(filled, rule=Rule()),
    "smc": partial(filled, rule=Rule(resampled=True)),
    "i_sir": partial(filled, rule=Rule(pinned=True)),
    "csmc": partial(filled, rule=Rule(pinned=True, resampled=True)),
    "student": student_proposed,
    "mc_literal": partial(filled, rule=Rule(weighed=False)),
}

# Random answers, right on average: of no use in a loss that is not linear in them.
SAMPLED = ("importance", "smc", "i_sir", "csmc", "student", "mc_literal")


def answer(
    teacher: ARTeacher, question: Question, *, settings: TargetSettings, temperature: float
) -> SoftTargets:
    """The teacher's answer of the kind and in the form that the settings ask for.

    Raises TrainingError if it is not made of numbers.
    """
    found = _answer(teacher, question, settings, temperature)
    refuse_nan(found)
    return found


def _answer(
    teacher: ARTeacher, question: Question, settings: TargetSettings, temperature: float
) -> SoftTargets:
    kind = TARGETS[settings.kind]
    if not settings.infill:
        return kind(teacher, question, settings=settings, temperature=temperature)
    assert teacher.template is not None, "load_teacher gives a teacher its template"
    arranged = arrange(question, teacher.template, teacher.max_length, block=settings.block)
    inside = dataclasses.replace(settings, window=0, block=0)  # all evidence is the end mark
    # A row for each hole, each as long as its document: as many at once as there were tokens before.
    rows, length = arranged.question.x0_BL.shape
    size = max(1, question.x0_BL.numel() // max(1, length))
    parts = [
        kind(
            teacher,
            arranged.question.rows(slice(first, first + size)),
            settings=inside,
            temperature=temperature,
        )
        for first in range(0, rows, size)
    ]
    return restore(stack_targets(parts), arranged)


def asks_student(settings: TargetSettings) -> bool:
    """Does the target need the student's own distributions?"""
    return settings.kind == "student" or (
        settings.kind == "suffix" and settings.student_candidates > 0
    )


def check_target(settings: TargetSettings, num_tokens: int) -> None:
    """Raise ConfigError if the settings cannot be met by a teacher with this many tokens."""
    check_known("target.kind", settings.kind, TARGETS)
    asked = settings.candidates + settings.tail_draws
    if settings.kind == "suffix" and asked > num_tokens:
        raise ConfigError(
            f"target.candidates and tail_draws ask for {asked} tokens, but the teacher has"
            f" {num_tokens}; lower them"
        )
