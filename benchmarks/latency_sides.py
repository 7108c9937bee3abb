"""How each side writes one batch of texts, and what is counted while it does.

The clock starts at token ids and stops when the new ids are on the host: prefill is in the time,
encoding and decoding of text is not. Nothing but a time stamp a forward is taken in between; what was
written and computed is counted afterwards.

    student     mdm's sampler (mdm/sampler.py)
    plain       the published loop on the same weights (latency_plain.py)
    teacher     mdm's autoregressive loop (mdm/autoregressive.py)
    teacher_hf  `generate` of transformers on the same weights, as a user has it today
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch

from mdm.autoregressive import Autoregressive, DecodingSettings, check_hole, writing
from mdm.canvas import SamplerSettings
from mdm.denoiser import Denoiser
from mdm.generate import Hole
from mdm.sampler import denoise, make_canvas

from .latency_plain import plain_text
from .latency_settings import Decoding

Prompt = Sequence[int]
KINDS = ("prefill", "store", "denoise", "refresh", "decode")  # decode: one token of an AR model


@dataclasses.dataclass(frozen=True)
class Texts:
    """What a side wrote behind a batch of prompts.

    rows            ids after each prompt, as decided: an end token and what follows it are there
    wall_s          for all of them
    first_s         until the first token of the first row stood, with no gap before it
    forwards        of single rows, by kind; a forward that reads the prompt and decides is "prefill"
    passes          calls of the model
    token_forwards  positions that were computed; padding of a batch is not counted
    """

    rows: list[list[int]]
    wall_s: float
    first_s: float
    forwards: dict[str, int]
    passes: int
    token_forwards: int


Write = Callable[[Sequence[Prompt], int], Texts]


@dataclasses.dataclass(frozen=True)
class Side:
    """One line of the comparison.

    who       student, plain, teacher or teacher_hf
    mode      eager, compile or graphs
    decoding  how the student (or the plain loop) decides; "" = one token after the other
    write     prompts, new tokens -> what was written
    ends      tokens that end a text for whoever counts what is visible
    warm_up   the same, for everything that happens once; by default a whole text
    """

    who: str
    mode: str
    decoding: str
    write: Write
    ends: frozenset[int]
    warm_up: Write

    @property
    def name(self) -> str:
        """For people."""
        return " ".join(filter(None, (self.who, self.decoding, self.mode)))

    def visible(self, row: Sequence[int]) -> list[int]:
        """The tokens of a row that a user sees: before the first end token."""
        return before_end(row, self.ends)


def before_end(row: Sequence[int], ends: Collection[int]) -> list[int]:
    """The tokens before the first of `ends`."""
    return list(row[: next((i for i, token in enumerate(row) if token in ends), len(row))])


def settle(device: torch.device) -> float:
    """The time, once the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# --- the student -----------------------------------------------------------------------------------


def student_side(
    denoiser: Denoiser, decoding: Decoding, settings: SamplerSettings, mode: str = "eager"
) -> Side:
    """A student under one decoding; `denoiser` is in that mode already."""

    def write(prompts: Sequence[Prompt], length: int) -> Texts:
        began = settle(denoiser.device)
        canvases = [
            make_canvas(
                denoiser,
                [*prompt, *[denoiser.mask_id] * length],
                settings,
                key=("latency", row),
                tokens_per_step=decoding.tokens_per_step,
            )
            for row, prompt in enumerate(prompts)
        ]
        steps = [(time.perf_counter(), step.commits) for step in denoise(denoiser, canvases)]
        rows = [
            canvas.ids_L[len(prompt) :].tolist()
            for canvas, prompt in zip(canvases, prompts, strict=True)
        ]
        wall_s = settle(denoiser.device) - began
        opening = len(prompts[0])
        commits = [commit for _, some in steps for commit in some]
        return Texts(
            rows=rows,
            wall_s=wall_s,
            first_s=next(
                at - began
                for at, some in steps
                if any(c.row == 0 and opening in c.positions_k.tolist() for c in some)
            ),
            forwards=counted(commit.kind for commit in commits),
            passes=len(steps),
            token_forwards=sum(commit.tokens_read for commit in commits),
        )

    ends = frozenset([denoiser.vocab.eos_id])
    return Side("student", mode, decoding.name, write, ends, write)


def counted(kinds: Iterator[str]) -> dict[str, int]:
    """How often each kind of forward; those that never came are 0 and there."""
    found = Counter(kinds)
    assert found.keys() <= set(KINDS), f"a kind of forward without a column: {sorted(found)}"
    return {kind: found[kind] for kind in KINDS}


# --- the published loop ------------------------------------------------------------------------------


def plain_side(
    denoiser: Denoiser, decoding: Decoding, *, suppress_eos: bool, block_length: int
) -> Side:
    """The published loop on the student's weights, one row at a time."""

    def write(prompts: Sequence[Prompt], length: int, most_steps: int | None = None) -> Texts:
        (prompt,) = prompts
        never = [*denoiser.never_sampled.tolist(), *[denoiser.vocab.eos_id] * suppress_eos]
        began = settle(denoiser.device)
        stamps: list[float] = []
        with before_forwards(denoiser.model, lambda _: stamps.append(time.perf_counter())):
            row, kept = plain_text(
                denoiser.model,
                prompt,
                length=length,
                tokens_per_step=decoding.tokens_per_step,
                mask_id=denoiser.mask_id,
                never=torch.tensor(never, device=denoiser.device),
                shift=denoiser.shift,
                block_length=block_length,
                most_steps=most_steps,
            )
        ended = settle(denoiser.device)
        stamps.append(ended)  # a step is over when the next one begins
        opened = (i for i, chosen_k in enumerate(kept) if len(prompt) in chosen_k.tolist())
        first = next(opened, len(kept) - 1)
        return Texts(
            rows=[row],
            wall_s=ended - began,
            first_s=stamps[first + 1] - began,
            forwards=counted(iter(["denoise"] * len(kept))),
            passes=len(kept),
            token_forwards=len(kept) * (len(prompt) + length),
        )

    def two_steps(prompts: Sequence[Prompt], length: int) -> Texts:
        return write(prompts, length, 2)  # every step is like the first

    ends = frozenset([denoiser.vocab.eos_id])
    return Side("plain", "eager", decoding.name, write, ends, two_steps)


@contextlib.contextmanager
def before_forwards(model: Any, call: Callable[[int], None]) -> Iterator[None]:
    """`call(positions)` before every forward of the model."""

    def hook(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        x_BL = given[0] if given else named["input_ids"]
        call(x_BL.numel())

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


# --- the teacher -----------------------------------------------------------------------------------


def teacher_side(ar: Autoregressive, *, suppress_eos: bool, mode: str = "eager") -> Side:
    """The AR model by mdm's own loop, greedily; `ar` is in that mode already."""
    settings = DecodingSettings(suppress_eos=suppress_eos)

    def write(prompts: Sequence[Prompt], length: int) -> Texts:
        holes = [
            Hole(tuple(prompt), length, key=("latency", row)) for row, prompt in enumerate(prompts)
        ]
        for hole in holes:
            check_hole(ar, hole)
        began = settle(ar.device)
        steps = [(time.perf_counter(), some) for some in writing(ar, holes, settings)]
        wall_s = settle(ar.device) - began
        rows: list[list[int]] = [[] for _ in prompts]
        for _, some in steps:
            for written in some:
                rows[written.row].append(written.token)
        tokens = sum(map(len, rows))
        return Texts(
            rows=rows,
            wall_s=wall_s,
            first_s=steps[0][0] - began,
            forwards=counted(
                iter(["prefill"] * len(rows) + ["decode"] * (tokens - len(rows))),
            ),
            passes=len(steps),
            token_forwards=sum(map(len, prompts)) + tokens - len(rows),
        )

    return Side("teacher", mode, "", write, ar.end_ids, write)


def hf_side(ar: Autoregressive, *, suppress_eos: bool) -> Side:
    """The same AR model by `generate` of transformers, greedily with its own cache; one row at a time."""

    def write(prompts: Sequence[Prompt], length: int) -> Texts:
        from transformers import GenerationConfig

        (prompt,) = prompts
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=length,
            min_new_tokens=length if suppress_eos else None,
            eos_token_id=sorted(ar.end_ids),
            pad_token_id=ar.vocab.pad_id,
        )
        began = settle(ar.device)
        reads: list[tuple[float, int]] = []
        with (
            only_config(ar.model, config),
            before_forwards(ar.model, lambda read: reads.append((time.perf_counter(), read))),
        ):
            x_1L = torch.tensor([list(prompt)], device=ar.device)
            found_1L = ar.model.generate(x_1L, attention_mask=torch.ones_like(x_1L))
            row = found_1L[0, len(prompt) :].tolist()
        ended = settle(ar.device)
        return Texts(
            rows=[row],
            wall_s=ended - began,
            # The first token is known when the second forward begins.
            first_s=(reads[1][0] if len(reads) > 1 else ended) - began,
            forwards=counted(iter(["prefill"] + ["decode"] * (len(reads) - 1))),
            passes=len(reads),
            token_forwards=sum(read for _, read in reads),
        )

    return Side("teacher_hf", "eager", "", write, ar.end_ids, write)


@contextlib.contextmanager
def only_config(model: Any, config: Any) -> Iterator[None]:
    """Generation by this config alone: what a checkpoint brings along (penalties, say) is put aside.

    `generate` fills what a config leaves open with what the model says, so it cannot just be passed.
    """
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own
