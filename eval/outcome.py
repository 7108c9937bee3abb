"""What came out of one task: numbers with their errors, and every item they are made of."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Score:
    """One number of a task.

    value       the mean over items (or what the task defines)
    n           items
    std_err     from the choice of items; None or NaN = unknown
    mc_std_err  from the Monte-Carlo noise of likelihoods; None = there is none
    interval    95 %, where value ± 2 std_err is no good one
    """

    value: float
    n: int
    std_err: float | None = None
    mc_std_err: float | None = None
    interval: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One task's scores by metric name, its items, and how it was run.

    Each sample has `task`, `id` (unique in the task), `doc_hash` (of the item itself, so that two
    runs are only compared on equal items), `metrics` (name → number), `outputs` (texts of the
    model), and whatever else helps to understand it. Rolling likelihoods have `pairs` instead of
    metrics: name → (log-likelihood, length).
    """

    task: str
    scores: dict[str, Score]
    samples: list[dict[str, Any]]
    settings: dict[str, Any]
