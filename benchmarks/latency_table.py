"""The table of `mdm bench latency`: all sides write the same texts in turn; sums and their errors.

Rates are sums over sums. Their standard errors are jackknifed over texts, which are what a repetition
of the benchmark would draw anew; repeats of one text are summed first.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from .latency_memory import peak_of
from .latency_models import Prompts
from .latency_sides import KINDS, Side, Texts
from .serve_report import mean_and_error, percentile

Note = Callable[[str], None]
Unit = TypeVar("Unit")


@dataclasses.dataclass
class Written:
    """What a side has written so far: for each text all its repeats, and the memory of its first one."""

    side: Side
    texts: dict[int, list[Texts]] = dataclasses.field(default_factory=dict)
    growth: int = 0

    @property
    def first(self) -> dict[int, list[int]]:
        """Text by text what a user sees, of the first repeat."""
        return {number: self.side.visible(found[0].rows[0]) for number, found in self.texts.items()}


@dataclasses.dataclass(frozen=True)
class Sums:
    """One text of a side, all repeats together."""

    tokens: int
    wall_s: float
    forwards: int

    @classmethod
    def of(cls, side: Side, found: Sequence[Texts]) -> Sums:
        """Visible tokens, seconds and forwards."""
        return cls(
            tokens=sum(len(side.visible(row)) for texts in found for row in texts.rows),
            wall_s=math.fsum(texts.wall_s for texts in found),
            forwards=sum(sum(texts.forwards.values()) for texts in found),
        )


# --- measuring --------------------------------------------------------------------------------------


def take_turns(
    sides: Sequence[Side],
    prompts: Prompts,
    *,
    texts: int,
    plain_texts: int,
    repeats: int,
    length: int,
    device: torch.device,
    note: Note,
) -> list[Written]:
    """Every side writes every text, one at a time; who begins changes with each text.

    First each writes a text that is not counted, and shows its memory there; two tokens before that, so
    that what is allocated once is no side's. Says every line as it comes.
    """
    all_written = [Written(side) for side in sides]
    for written in all_written:
        written.side.warm_up(prompts.of(written.side.who)[:1], 2)
    for written in all_written:
        note(f"warming up: {written.side.name}")
        first = prompts.of(written.side.who)[:1]
        written.growth = peak_of(device, functools.partial(written.side.warm_up, first, length))
    turn = 0
    for repeat in range(repeats):
        for number in range(texts):
            start = turn % len(all_written)
            for written in [*all_written[start:], *all_written[:start]]:
                if written.side.who == "plain" and number >= plain_texts:
                    continue
                prompt = prompts.of(written.side.who)[number]
                found = written.side.write([prompt], length)
                written.texts.setdefault(number, []).append(found)
                seen = len(written.side.visible(found.rows[0]))
                note(
                    f"repeat {repeat + 1} of {repeats}, text {number + 1} of {texts}:"
                    f" {written.side.name}: {seen} tokens in {found.wall_s:.2f} s,"
                    f" {found.passes} forwards"
                )
            turn += 1
    return all_written


# --- sums ---------------------------------------------------------------------------------------------


def side_line(
    written: Written, model: dict[str, Any], bandwidth: float, twin: Written | None
) -> dict[str, Any]:
    """One line of the table.

    `model` is what is known of the side's model, `twin` the side that should write the same texts.
    """
    side, found = written.side, [texts for some in written.texts.values() for texts in some]
    sums = [Sums.of(side, some) for some in written.texts.values()]
    walls = [texts.wall_s for texts in found]
    by_text = [sum(t.wall_s for t in some) / len(some) for some in written.texts.values()]
    latency, latency_error = mean_and_error(by_text)
    rate, rate_error = jackknife(sums, tokens_per_s)
    each, each_error = jackknife(sums, tokens_per_forward)
    forwards: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
    for texts in found:
        forwards.update(texts.forwards)
    floor_s = model["read_bytes"] / bandwidth
    passes = sum(texts.passes for texts in found)
    forward_s = math.fsum(walls) / passes
    return {
        "who": side.who,
        "mode": side.mode,
        "decoding": side.decoding,
        "n": len(sums),
        "timed": len(found),
        "tokens": sum(one.tokens for one in sums),
        "wall_s": math.fsum(walls),
        "tokens_per_s": rate,
        "tokens_per_s_std_err": rate_error,
        "latency_s": latency,
        "latency_s_std_err": latency_error,
        "latency_p50_s": percentile(walls, 50),
        "latency_p95_s": percentile(walls, 95),
        "first_p50_s": percentile([texts.first_s for texts in found], 50),
        "first_p95_s": percentile([texts.first_s for texts in found], 95),
        "forwards": dict(forwards),
        "tokens_per_forward": each,
        "tokens_per_forward_std_err": each_error,
        "passes": passes,
        "token_forwards": sum(texts.token_forwards for texts in found),
        "forward_s": forward_s,
        "floor_s": floor_s,
        "times_floor": forward_s / floor_s,
        "parameters": model["parameters"],
        "weight_bytes": model["weight_bytes"],
        "growth_bytes": written.growth,
        "peak_bytes": model["weight_bytes"] + written.growth,
        "latency_s_all": walls,
        "texts_compared": len(written.first.keys() & twin.first.keys()) if twin else None,
        "texts_differ": texts_differ(written, twin) if twin else None,
    }


def texts_differ(one: Written, other: Written) -> int:
    """How many of the texts that both wrote are not the same."""
    return sum(
        one.first[number] != other.first[number] for number in one.first.keys() & other.first
    )


def tokens_per_s(sums: Sequence[Sums]) -> float:
    """Visible tokens over seconds."""
    return sum(one.tokens for one in sums) / math.fsum(one.wall_s for one in sums)


def tokens_per_forward(sums: Sequence[Sums]) -> float:
    """Visible tokens over forwards; every forward counts, those that read the prompt decide as well."""
    return sum(one.tokens for one in sums) / sum(one.forwards for one in sums)


def ratio_line(ours: Written, theirs: Written) -> dict[str, Any]:
    """Tokens a second, ours over theirs, on the texts that both wrote."""
    numbers = sorted(ours.texts.keys() & theirs.texts)
    pairs = [
        (Sums.of(ours.side, ours.texts[number]), Sums.of(theirs.side, theirs.texts[number]))
        for number in numbers
    ]

    def rate(some: Sequence[tuple[Sums, Sums]]) -> float:
        slow = tokens_per_s([b for _, b in some])
        return tokens_per_s([a for a, _ in some]) / slow if slow else math.nan

    value, std_err = jackknife(pairs, rate)
    return {
        "decoding": ours.side.decoding,
        "mode": ours.side.mode,
        "against": theirs.side.who,
        "against_mode": theirs.side.mode,
        "ratio": value,
        "std_err": std_err,
        "n": len(pairs),
    }


def jackknife(
    units: Sequence[Unit], estimate: Callable[[Sequence[Unit]], float]
) -> tuple[float, float]:
    """The estimate from all units and its standard error by leaving out one at a time; NaN for one unit."""
    value, count = estimate(units), len(units)
    if count < 2:
        return value, math.nan
    without = [estimate([*units[:i], *units[i + 1 :]]) for i in range(count)]
    centre = math.fsum(without) / count
    spread = math.fsum((one - centre) ** 2 for one in without)
    return value, math.sqrt(spread * (count - 1) / count)


def ratios(all_written: Sequence[Written]) -> list[dict[str, Any]]:
    """Every student against the teacher in every mode, `generate`, and the plain loop at equal steps.

    In every mode, as a student that can be run in one alone has to beat the teacher at its fastest.
    """
    found = []
    for ours in all_written:
        if ours.side.who != "student":
            continue
        for theirs in all_written:
            fits = {
                "teacher": True,
                "teacher_hf": True,
                "plain": theirs.side.decoding == ours.side.decoding,
            }
            if fits.get(theirs.side.who, False):
                found.append(ratio_line(ours, theirs))
    return found
