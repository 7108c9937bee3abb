"""Kinds of target that a teacher with another tokenizer can give, by name.

They do not look at the masks: what a teacher says of a position is the same for every mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from mdm.denoiser import Denoiser
from mdm.diffusion import generator
from mdm.errors import ConfigError
from mdm.vocab import Vocab

from ..readings import ReadingBatch, Readings
from ..targets import Targets, TargetSettings, refuse_nan
from .ar import ARTeacher
from .embedding import states
from .mapped import make_mapping, mapped

if TYPE_CHECKING:
    from ..masking import MaskedBatch

FOREIGN = ("mapped", "embedding")

Answer = Callable[[ReadingBatch, torch.Tensor, torch.Tensor], Targets]


def ask_foreign(
    teacher: ARTeacher,
    readings: Readings,
    student: Vocab,
    settings: TargetSettings,
    temperature: float,
) -> Callable[[MaskedBatch, Denoiser | None], Targets]:
    """How a step asks the teacher, which reads the rows of a batch in its own tokens."""
    answer = _KINDS[settings.kind](teacher, student, settings, temperature)

    def ask(batch: MaskedBatch, _student: Denoiser | None) -> Targets:
        device = batch.x0_BL.device
        reading = ReadingBatch(*(tensor.to(device) for tensor in readings.batch(batch.rows)))
        with torch.autocast(device.type, enabled=False):
            targets = answer(reading, batch.distilled_BL, batch.document_ids_BL)
        refuse_nan(targets)
        return targets

    return ask


def _mapped(
    teacher: ARTeacher, student: Vocab, settings: TargetSettings, temperature: float
) -> Answer:
    mapping = make_mapping(teacher, student)

    def answer(
        reading: ReadingBatch, wanted_BL: torch.Tensor, document_ids_BL: torch.Tensor
    ) -> Targets:
        return mapped(
            mapping,
            reading,
            wanted_BL,
            document_ids_BL,
            settings=settings,
            temperature=temperature,
        )

    return answer


def _embedding(
    teacher: ARTeacher, _student: Vocab, _settings: TargetSettings, _temperature: float
) -> Answer:
    def answer(
        reading: ReadingBatch, wanted_BL: torch.Tensor, document_ids_BL: torch.Tensor
    ) -> Targets:
        return states(teacher, reading, wanted_BL, document_ids_BL)

    return answer


_KINDS = {"mapped": _mapped, "embedding": _embedding}


def projection(student: Denoiser, teacher: ARTeacher) -> nn.Linear:
    """From the student's states to the teacher's: random at first, learnt with the student.

    Raises ConfigError if one of the two makes its logits from more than a state and a matrix.
    """
    for who, plain in (("student", student.plain_head), ("teacher", teacher.plain_head)):
        if not plain:
            raise ConfigError(
                f"target.kind=embedding compares the states that logits are made of, but the {who}"
                " scales or caps its logits; set target.kind=mapped"
            )
    ours = student.model.get_output_embeddings().weight.shape[1]
    theirs = teacher.model.get_output_embeddings().weight.shape[1]
    layer = nn.Linear(ours, theirs, bias=False)
    with torch.no_grad():
        noise = torch.randn(layer.weight.shape, generator=generator("projection", ours, theirs))
        layer.weight.copy_(noise / ours**0.5)
    return layer
