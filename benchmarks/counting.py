"""A teacher that counts what it is given: the price of a target in tokens."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import torch

from mdm.train.teachers.ar import ARTeacher

COUNTS = ("tokens", "fed", "heads", "forwards")


@dataclasses.dataclass(frozen=True)
class CountingTeacher(ARTeacher):
    """A teacher that counts what it is given.

    tokens    tokens it had to read (the clean rows included)
    fed       the same with padding
    heads     positions whose logits were computed
    forwards  calls of the model
    """

    counts: Counter[str] = dataclasses.field(default_factory=Counter)

    @classmethod
    def of(cls, teacher: ARTeacher) -> CountingTeacher:
        """The same teacher, with counts at 0."""
        return cls(**{f.name: getattr(teacher, f.name) for f in dataclasses.fields(ARTeacher)})

    def call(
        self, x_BL: torch.Tensor, outputs_BL: torch.Tensor, cache: Any, **layout: torch.Tensor
    ) -> torch.Tensor:
        """As ARTeacher.call. On a filled cache (branches) every output but padding is asked for."""
        branches = cache is not None and cache.get_seq_length() > 0
        read = int(outputs_BL.sum()) if branches else x_BL.numel()
        self.counts.update(forwards=1, fed=x_BL.numel(), tokens=read)
        return super().call(x_BL, outputs_BL, cache, **layout)

    def head(self, rows_ND: torch.Tensor) -> torch.Tensor:
        """As ARTeacher.head."""
        self.counts.update(heads=len(rows_ND))
        return super().head(rows_ND)

    def take(self) -> dict[str, int]:
        """The counts since the last time; they start at 0 again."""
        found = {name: self.counts[name] for name in COUNTS}
        self.counts.clear()
        return found
