"""What helps on a CPU: number types, 8 bits, threads, compiled code. Time of a forward, and its price.

A forward is what a user waits for: a step of `denoise` in a canvas (the student's block after some clean
tokens), a token of `writing` (the AR model after as many). The first one of a text, which reads the
prompt, is told apart. Sides take turns: in every repeat each of them writes the same text. cpu_price.py
says what they cost.
Forwards that keep keys and values can be compiled, so not those of a student without blocks; nor
`int8_dynamic`: torch cannot look into its kernels and would compile what is between them.
Shape: L length.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mdm import autoregressive
from mdm.acceleration import accelerate
from mdm.autoregressive import Autoregressive, DecodingSettings
from mdm.canvas import SamplerSettings
from mdm.checkpoint import load_ar, load_denoiser, opens_as_denoiser, source_path, weights_hash
from mdm.config import require
from mdm.denoiser import Denoiser
from mdm.errors import ConfigError, check_known
from mdm.generate import Hole
from mdm.int8 import INT8_DYNAMIC, is_quantised, num_weights, quantise, weight_bytes
from mdm.loading import dtype_of
from mdm.record import append_record, make_record
from mdm.sampler import denoise, make_canvas
from mdm.vocab import read_vocab

from .cpu_price import prices, standard_error
from .target_texts import library_rows

# Name -> number type and quantization of a model.
NUMBERS = {
    "float32": ("float32", ""),
    "bfloat16": ("bfloat16", ""),
    INT8_DYNAMIC: ("float32", INT8_DYNAMIC),
}
REFERENCE = "float32"
WARM_UP = 2  # texts: a prompt is compiled when its buffer is used again
STUDENT, TEACHER = "student", "teacher"


@dataclasses.dataclass(frozen=True)
class CpuBench:
    """What is measured; see `mdm bench cpu --help`.

    numbers  keys of NUMBERS, of which float32 comes along; empty = all
    threads  empty = 1, 2, 4 … and all cores
    kept     clean tokens before those that are written; a student's block begins at its boundary
    length   open positions of a canvas without blocks
    tokens   timed forwards of the AR model in a repeat
    """

    model: str
    teacher: str = "embedded"
    numbers: tuple[str, ...] = ()
    threads: tuple[int, ...] = ()
    compile: bool = False
    kept: int = 256
    length: int = 8
    tokens: int = 8
    repeats: int = 7
    texts: int = 8
    text_length: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"kept": 1, "length": 1, "tokens": 1, "repeats": 1, "texts": 1, "text_length": 2}
        for name, lowest in least.items():
            value = getattr(self, name)
            option = name.replace("_", "-")
            require(value >= lowest, f"--{option} must be at least {lowest}; got {value}")
        for number in self.numbers:
            check_known("--numbers", number, NUMBERS)
        for count in self.threads:
            require(count >= 1, f"--threads must be at least 1; got {count}")

    @property
    def compared(self) -> tuple[str, ...]:
        """The number types, float32 first."""
        asked = self.numbers or tuple(NUMBERS)
        return (
            REFERENCE,
            *(number for number in NUMBERS if number in asked and number != REFERENCE),
        )

    @property
    def thread_counts(self) -> tuple[int, ...]:
        """Numbers of threads, as asked for or all that make sense."""
        return self.threads or sensible_threads(cores())


def cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def sensible_threads(most: int) -> tuple[int, ...]:
    """Powers of two up to `most`, and `most`."""
    powers = (2**i for i in range(most.bit_length()))
    return tuple(sorted({*(power for power in powers if power <= most), most}))


@dataclasses.dataclass(frozen=True)
class Side:
    """A model as it is timed."""

    who: str
    number: str
    mode: str
    model: Denoiser | Autoregressive


def run(
    settings: CpuBench, path: Path, tell: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Measure, append the record to `path`, return it. `tell` hears how far it is."""
    tell("loading")
    sides = open_sides(settings)
    prompts = {side.who: prompt_of(side.model, settings) for side in sides}
    lines = take_turns(sides, prompts, settings, tell)
    tell("what it costs")
    results = {
        "models": describe_models(sides, prompts, settings),
        "times": lines,
        "price": {who: price_of(sides, who, settings) for who in (STUDENT, TEACHER)},
    }
    place = source_path(settings.model)
    told = dataclasses.asdict(settings)
    record = make_record(
        "bench cpu",
        results,
        settings={**told, "numbers": settings.compared, "threads": settings.thread_counts},
        seed=settings.seed,
        checkpoint=weights_hash(place) if place else None,
    )
    append_record(path, record)
    return record


# --- models and texts ------------------------------------------------------------------------------


def open_sides(settings: CpuBench) -> list[Side]:
    """Both models in every number type, eager and (if asked for) compiled, on the same weights."""
    if opens_as_denoiser(settings.teacher):
        raise ConfigError(
            f"--teacher {settings.teacher} is a diffusion model; name an autoregressive one"
        )
    sides = []
    for who, opened in ((STUDENT, open_student), (TEACHER, open_teacher)):
        for number in settings.compared:
            name, quantization = NUMBERS[number]
            model = quantise(opened(settings, dtype_of(name)), quantization)
            sides.append(Side(who, number, "eager", model))
            if settings.compile and can_compile(model):
                compiled = copy.copy(model)
                accelerate(compiled, "compile")
                sides.append(Side(who, number, "compile", compiled))
    return sides


def can_compile(model: Denoiser | Autoregressive) -> bool:
    """Are its forwards run by what can be compiled (acceleration.py), and is there something in it?"""
    has_cache = not isinstance(model, Denoiser) or model.block_size is not None
    return has_cache and not is_quantised(model.model)


def open_student(settings: CpuBench, dtype: torch.dtype) -> Denoiser | Autoregressive:
    """The student, checked for something to time."""
    denoiser = load_denoiser(settings.model, dtype=dtype)
    require(
        denoiser.block_size != 1,
        f"{settings.model} has blocks of 1 token, which the forward decides that reads what is before"
        " them; nothing is left to time",
    )
    size = denoiser.block_size or settings.length
    require(
        settings.kept >= (denoiser.block_size or 1),
        f"--kept {settings.kept} is less than a block of {size} tokens",
    )
    _require_room("--model", settings.kept + size, denoiser.max_length)
    _require_room("--model", settings.text_length, denoiser.max_length)
    return denoiser


def open_teacher(settings: CpuBench, dtype: torch.dtype) -> Denoiser | Autoregressive:
    """The AR model."""
    network, tokenizer = load_ar(settings.teacher, dtype=dtype)
    ar = Autoregressive(network, read_vocab(tokenizer))
    _require_room("--teacher", settings.kept + settings.tokens + 1, ar.max_length)
    _require_room("--teacher", settings.text_length, ar.max_length)
    return ar


def _require_room(option: str, length: int, most: int) -> None:
    require(
        length <= most,
        f"{option} was built for {most} tokens, not {length}; lower --kept or --text-length",
    )


def prompt_of(model: Denoiser | Autoregressive, settings: CpuBench) -> list[int]:
    """The clean tokens: code of the standard library. For a model with blocks whole ones."""
    size = (isinstance(model, Denoiser) and model.block_size) or 1
    kept = settings.kept - settings.kept % size
    (row_L,) = library_rows(model.vocab, 1, kept, settings.seed)
    return [int(token) for token in row_L]


def describe_models(
    sides: Sequence[Side], prompts: dict[str, list[int]], settings: CpuBench
) -> dict[str, Any]:
    """What the models are, and the bytes of their weights in each number type."""
    found: dict[str, Any] = {}
    for side in sides:
        own = found.setdefault(
            side.who,
            {
                "source": settings.model if side.who == STUDENT else settings.teacher,
                "parameters": num_weights(side.model.model),
                "block_size": getattr(side.model, "block_size", None),
                "kept": len(prompts[side.who]),
                "weight_bytes": {},
            },
        )
        own["weight_bytes"][side.number] = weight_bytes(side.model.model)
    return found


# --- time --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Written:
    """Seconds of the forwards of one text.

    first   that of the prompt; None if every forward reads it again (no blocks)
    later   the others
    tokens  that one of the others reads
    """

    first: float | None
    later: tuple[float, ...]
    tokens: int


def write_canvas(denoiser: Denoiser, prompt: Sequence[int], settings: CpuBench) -> Written:
    """Denoise one block (or --length open positions) after the prompt, a token a forward."""
    size = denoiser.block_size or settings.length
    canvas = make_canvas(
        denoiser, [*prompt, *[denoiser.mask_id] * size], SamplerSettings(stop_at_eos=False)
    )
    seconds: dict[str, list[float]] = {}
    tokens = 0
    began = time.perf_counter()
    for step in denoise(denoiser, [canvas]):
        now = time.perf_counter()
        (commit,) = step.commits
        seconds.setdefault(commit.kind, []).append(now - began)
        tokens = commit.tokens_read
        began = time.perf_counter()
    first = seconds.pop("prefill", [None])[0]
    (later,) = seconds.values()
    return Written(first, tuple(later), tokens)


def write_text(ar: Autoregressive, prompt: Sequence[int], settings: CpuBench) -> Written:
    """Continue the prompt token by token."""
    hole = Hole(tuple(prompt), settings.tokens + 1)
    seconds = []
    began = time.perf_counter()
    for _ in autoregressive.writing(ar, [hole], DecodingSettings(suppress_eos=True)):
        now = time.perf_counter()
        seconds.append(now - began)
        began = time.perf_counter()
    return Written(seconds[0], tuple(seconds[1:]), 1)


def write(side: Side, prompt: Sequence[int], settings: CpuBench) -> Written:
    """One text of a side."""
    if isinstance(side.model, Denoiser):
        return write_canvas(side.model, prompt, settings)
    return write_text(side.model, prompt, settings)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """So many CPU threads inside; then as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def take_turns(
    sides: Sequence[Side],
    prompts: dict[str, list[int]],
    settings: CpuBench,
    tell: Callable[[str], None],
) -> list[dict[str, Any]]:
    """A line for every side and number of threads. Two texts of each are not counted."""
    lines = []
    for count in settings.thread_counts:
        texts: list[list[Written]] = [[] for _ in sides]
        with threads(count):
            for repeat in range(-WARM_UP, settings.repeats):
                doing = (
                    f"repeat {repeat + 1} of {settings.repeats}" if repeat >= 0 else "warming up"
                )
                tell(f"{count} thread{'s' * (count > 1)}: {doing}")
                for side, own in zip(sides, texts, strict=True):
                    own.append(write(side, prompts[side.who], settings))
        counted = [own[WARM_UP:] for own in texts]
        for side, own in zip(sides, counted, strict=True):
            reference = next(
                other
                for one, other in zip(sides, counted, strict=True)
                if (one.who, one.number, one.mode) == (side.who, REFERENCE, "eager")
            )
            lines.append(line_of(side, count, own, reference))
    return lines


def line_of(
    side: Side, count: int, own: Sequence[Written], reference: Sequence[Written]
) -> dict[str, Any]:
    """Seconds of a forward: the median of a text, then of texts. Ratios are within a repeat."""
    seconds = [statistics.median(text.later) for text in own]
    ratios = [
        statistics.median(other.later) / mine
        for other, mine in zip(reference, seconds, strict=True)
    ]
    firsts = [text.first for text in own if text.first is not None]
    return {
        "who": side.who,
        "numbers": side.number,
        "mode": side.mode,
        "threads": count,
        "forwards": len(own[0].later),
        "tokens_read": own[0].tokens,
        "median_seconds": statistics.median(seconds),
        "std_err": standard_error(seconds),
        "times_faster": statistics.median(ratios),
        "times_faster_std_err": standard_error(ratios),
        "first_seconds": statistics.median(firsts) if firsts else None,
        "n": len(own),
        "seconds_all": seconds,
    }


def price_of(sides: Sequence[Side], who: str, settings: CpuBench) -> dict[str, dict[str, Any]]:
    """By number type; what is compiled is taken to say the same."""
    models = {side.number: side.model for side in sides if (side.who, side.mode) == (who, "eager")}
    exact = models.pop(REFERENCE)
    x0_RL = library_rows(exact.vocab, settings.texts, settings.text_length, settings.seed + 1)
    return prices(exact, models, x0_RL, settings.seed)
