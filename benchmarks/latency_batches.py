"""Aggregate tokens a second against the batch, and where the autoregressive side overtakes."""

from __future__ import annotations

import itertools
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
    """Student and teacher of each mode write batches of growing size, in turn; who begins changes, from
    size to size and from repeat to repeat.

    Before a size each writes one batch of it that is not counted.
    """
    lines, crossovers = [], []
    for pair in pairs:
        points: list[Point] = []
        for index, size in enumerate(sorted(sizes)):
            rates = {}
            for line in one_size(
                pair, prompts, size, repeats=repeats, length=length, first=index % 2
            ):
                lines.append(line)
                rates[line["who"]] = line["tokens_per_s"]
                note(
                    f"batch {size}: {line['who']} {line['mode']}: {line['tokens_per_s']:.1f} tokens/s"
                )
            points.append((size, rates["student"], rates["teacher"]))
        crossovers.append({"mode": pair[0].mode, **crossover(points)})
    return {"decoding": pairs[0][0].decoding, "lines": lines, "crossovers": crossovers}


def one_size(
    pair: tuple[Side, Side],
    prompts: Prompts,
    size: int,
    *,
    repeats: int,
    length: int,
    first: int,
) -> list[dict[str, Any]]:
    """A line for each side: sums over repeats. `first` is who of the pair begins the first repeat."""
    found: dict[str, list[Any]] = {side.who: [] for side in pair}
    for side in pair:
        side.warm_up(prompts.of(side.who)[:size], length)
    for repeat in range(repeats):
        for side in pair if (first + repeat) % 2 == 0 else pair[::-1]:
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

    Rates are taken as linear in log2(batch) between two points. `changes` is how often the lead changes;
    a tie is the student's. None if the teacher overtakes nowhere in the range; `leads` then says who is
    ahead, "student", "teacher", or "teacher first" if the student overtakes instead. None as well if the
    lead changes more than once ("changing"): no single batch parts the two then.
    """
    ahead = [student - teacher for _, student, teacher in points]
    changes = sum((before >= 0) != (after >= 0) for before, after in itertools.pairwise(ahead))
    if changes > 1:
        return {"batch": None, "leads": "changing", "changes": changes}
    for (low, *_), (high, *_), before, after in zip(
        points, points[1:], ahead, ahead[1:], strict=False
    ):
        if before >= 0 > after:
            place = math.log2(low) + (math.log2(high) - math.log2(low)) * before / (before - after)
            return {"batch": 2**place, "leads": "student first", "changes": changes}
    if changes:
        leads = "teacher first"
    else:
        leads = "student" if all(gap >= 0 for gap in ahead) else "teacher"
    return {"batch": None, "leads": leads, "changes": changes}
