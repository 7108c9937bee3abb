"""Aggregate tokens a second against the batch, and where the autoregressive side overtakes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from .latency_models import Prompts
from .latency_sides import Side

Point = tuple[int, float, float]  # batch, tokens a second of the student, of the teacher


def batches(
    pairs: Sequence[tuple[Side, Side]],
    prompts: Prompts,
    sizes: Sequence[int],
    *,
    repeats: int,
    length: int,
    note: Callable[[str], None],
) -> dict[str, Any]:
    """Student and teacher of each mode write batches of growing size, in turn; who begins changes.

    Before a size each writes one batch of it that is not counted.
    """
    lines, crossovers = [], []
    for pair in pairs:
        points: list[Point] = []
        for size in sorted(sizes):
            rates = {}
            for line in one_size(pair, prompts, size, repeats=repeats, length=length):
                lines.append(line)
                rates[line["who"]] = line["tokens_per_s"]
                note(
                    f"batch {size}: {line['who']} {line['mode']}: {line['tokens_per_s']:.1f} tokens/s"
                )
            points.append((size, rates["student"], rates["teacher"]))
        crossovers.append({"mode": pair[0].mode, **crossover(points)})
    return {"decoding": pairs[0][0].decoding, "lines": lines, "crossovers": crossovers}


def one_size(
    pair: tuple[Side, Side], prompts: Prompts, size: int, *, repeats: int, length: int
) -> list[dict[str, Any]]:
    """A line for each side: sums over repeats."""
    found: dict[str, list[Any]] = {side.who: [] for side in pair}
    for side in pair:
        side.warm_up(prompts.of(side.who)[:size], length)
    for repeat in range(repeats):
        for side in pair if repeat % 2 == 0 else pair[::-1]:
            found[side.who].append(side.write(prompts.of(side.who)[:size], length))
    lines = []
    for side in pair:
        texts = found[side.who]
        tokens = sum(len(side.visible(row)) for one in texts for row in one.rows)
        wall_s = math.fsum(one.wall_s for one in texts)
        passes = sum(one.passes for one in texts)
        lines.append({
            "who": side.who,
            "mode": side.mode,
            "batch": size,
            "repeats": repeats,
            "tokens": tokens,
            "wall_s": wall_s,
            "wall_s_all": [one.wall_s for one in texts],
            "tokens_per_s": tokens / wall_s,
            "passes": passes,
            "forward_s": wall_s / passes,
            "tokens_per_forward": tokens / sum(sum(one.forwards.values()) for one in texts),
        })  # fmt: skip
    return lines


def crossover(points: Sequence[Point]) -> dict[str, Any]:
    """The batch at which the teacher overtakes: where the lines between measured points meet.

    Rates are taken as linear in log2(batch) between two points. None if the teacher overtakes nowhere
    in the range; `leads` then says who is ahead, "student", "teacher", or "teacher first" if the
    student overtakes instead.
    """
    ahead = [student - teacher for _, student, teacher in points]
    for (low, *_), (high, *_), before, after in zip(
        points, points[1:], ahead, ahead[1:], strict=False
    ):
        if before >= 0 > after:
            place = math.log2(low) + (math.log2(high) - math.log2(low)) * before / (before - after)
            return {"batch": 2**place, "leads": "student first"}
    if all(gap >= 0 for gap in ahead):
        return {"batch": None, "leads": "student"}
    return {"batch": None, "leads": "teacher first" if ahead[-1] >= 0 else "teacher"}
