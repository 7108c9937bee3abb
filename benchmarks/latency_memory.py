"""Memory against context: the peak of a short text behind prompts of growing length, on both sides.

Growth is the peak above what the process held just before, with both models loaded and freed memory
given back. On a GPU these are bytes the allocator handed out, otherwise resident bytes.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mdm.serve.memory import PeakMeter

from .latency_models import Models, long_prompt
from .latency_sides import Side

NEW_TOKENS = 8


def give_back() -> None:
    """Return memory that is free but still held: the next peak then starts from what is in use."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
        if trim is not None:
            trim(0)


def peak_of(device: torch.device, work: Callable[[], object]) -> int:
    """Bytes that `work` takes above what is held before it."""
    give_back()
    meter = PeakMeter(device)
    before = meter.read()
    meter.reset()
    work()
    after = meter.read()
    if before.device is not None and after.device_peak is not None:
        return max(0, after.device_peak - before.device)
    return max(0, after.rss_peak - before.rss)


def contexts(
    sides: Sequence[Side],
    models: Models,
    wanted: Sequence[int],
    *,
    student_keeps: bool,
    note: Callable[[str], None],
) -> dict[str, Any]:
    """The peak of each side behind prompts of these lengths, as far as both models reach.

    `kept_bytes` is what keys and values of prompt and text take by the shapes; 0 without a cache.
    """
    most = min(models.student.max_length, models.teacher.max_length) - NEW_TOKENS
    lines = []
    for length in sorted(length for length in wanted if length <= most):
        for side in sides:
            own = side.who == "student"
            model = models.student if own else models.teacher
            prompt = long_prompt((models.student if models.shared else model).vocab, length)
            growth = peak_of(model.device, functools.partial(side.write, [prompt], NEW_TOKENS))
            keeps = student_keeps or not own
            kept = models.sizes[side.who].kept_bytes(1, length + NEW_TOKENS) if keeps else 0
            lines.append({
                "who": side.who,
                "mode": side.mode,
                "context": length,
                "growth_bytes": growth,
                "kept_bytes": kept,
            })  # fmt: skip
            note(f"context {length}: {side.name}: {growth / 2**20:.0f} MiB above idle")
    return {
        "new_tokens": NEW_TOKENS,
        "lines": lines,
        "left_out": [length for length in wanted if length > most],
    }
