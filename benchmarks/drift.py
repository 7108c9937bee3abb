"""How far approximate caches are off, and what they save: a full-canvas student against itself.

The exact sampler writes a text. At every one of its steps each cache says what it would have decided, with
keys and values as old as they would be by then: the largest difference of a logit, the share of open
positions whose likeliest token is the same, and the divergence KL(exact || approximate). Then each cache
writes by itself: forwards per second against the exact loop, and the tokens that are the same. Sides take
turns text by text. Settings of the sampler are the same for all.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mdm.canvas import Canvas, SamplerSettings
from mdm.checkpoint import load_denoiser, weights_hash
from mdm.config import require
from mdm.denoiser import Denoiser
from mdm.errors import ConfigError
from mdm.eval.human_eval_data import human_eval_problems
from mdm.loading import dtype_of
from mdm.record import append_record, make_record
from mdm.sampler import make_canvas, open_logits, take_step

from .serve_report import mean_and_error

Note = Callable[[str], None]
EXACT = "none"


@dataclasses.dataclass(frozen=True)
class DriftBench:
    """What is measured.

    caches  names of caches, with the steps between refreshes behind a colon: "dual", "dual:8"
    """

    model: str
    texts: int = 4
    prompt_length: int = 48
    gen_length: int = 64
    block_length: int = 16
    tokens_per_step: int = 1
    caches: tuple[str, ...] = ("prefix", "dual", "dual:4")
    dtype: str = "float32"
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("texts", "gen_length", "block_length", "tokens_per_step", "threads"):
            value = getattr(self, name)
            require(value >= 1, f"--{name.replace('_', '-')} must be at least 1; got {value}")
        require(self.prompt_length >= 2, f"--prompt-length must be >= 2; got {self.prompt_length}")
        require(bool(self.caches), "--caches names no cache; try prefix,dual")
        for cache in self.caches:
            self.sampler(cache)

    def sampler(self, cache: str) -> SamplerSettings:
        """The settings with this cache. Raises ConfigError for an unknown one."""
        name, _, refresh = cache.partition(":")
        if refresh and not refresh.isdecimal():
            raise ConfigError(f"steps between refreshes must be a number: dual:8; got {cache!r}")
        return SamplerSettings(
            block_length=self.block_length,
            suppress_eos=True,
            cache=name,
            refresh=int(refresh) if refresh else None,
        )


def run(settings: DriftBench, path: Path, note: Note = lambda _: None) -> dict[str, Any]:
    """Measure, append the record to `path`, return it. Raises ConfigError for a model with blocks."""
    denoiser = load_denoiser(settings.model, dtype=dtype_of(settings.dtype))
    require(
        denoiser.block_size is None,
        f"{settings.model} denoises in blocks of {denoiser.block_size} and has an exact cache; approximate"
        " ones are for models without blocks",
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        results = measure(denoiser, settings, note)
    finally:
        torch.set_num_threads(threads)
    record = make_record(
        "bench drift",
        results,
        settings=dataclasses.asdict(settings),
        seed=settings.seed,
        checkpoint=weights_hash(Path(settings.model)),
    )
    append_record(path, record)
    return record


def measure(denoiser: Denoiser, settings: DriftBench, note: Note) -> dict[str, Any]:
    """Numbers of every cache, by its name."""
    prompts = _prompts(denoiser, settings)
    names = (EXACT, *settings.caches)
    _write(denoiser, prompts[0], settings, EXACT)  # warm-up
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in settings.caches}
    written: dict[str, list[tuple[list[int], float, int, int]]] = {name: [] for name in names}
    for number, ids in enumerate(prompts):
        note(f"text {number + 1} of {len(prompts)}")
        for cache, own in beside_exact(denoiser, ids, settings).items():
            steps[cache].append(own)
        for name in names:
            written[name].append(_write(denoiser, ids, settings, name))
    return {
        "texts": len(prompts),
        "caches": {
            cache: _line(steps[cache], written[cache], written[EXACT]) for cache in settings.caches
        },
        "exact": {
            "seconds_per_forward": _rate(written[EXACT]),
            "tokens_read_per_forward": sum(w[3] for w in written[EXACT])
            / sum(w[2] for w in written[EXACT]),
        },
    }


def _prompts(denoiser: Denoiser, settings: DriftBench) -> list[list[int]]:
    problems = list(human_eval_problems().values())[: settings.texts]
    vocab, room = denoiser.vocab, settings.prompt_length - 1
    return [[vocab.start_id, *vocab.encode(one["prompt"])[-room:]] for one in problems]


def _canvas(denoiser: Denoiser, ids: list[int], settings: DriftBench, cache: str) -> Canvas:
    return make_canvas(
        denoiser,
        [*ids, *[denoiser.mask_id] * settings.gen_length],
        settings.sampler(cache),
        tokens_per_step=settings.tokens_per_step,
    )


def beside_exact(
    denoiser: Denoiser, ids: list[int], settings: DriftBench
) -> dict[str, dict[str, float]]:
    """By cache, means over the steps of the exact text; each sees the text as the exact one has it."""
    exact = _canvas(denoiser, ids, settings, EXACT)
    others = {cache: _canvas(denoiser, ids, settings, cache) for cache in settings.caches}
    found: dict[str, list[tuple[float, float, float]]] = {cache: [] for cache in others}
    while not exact.finished:
        (right_nV,) = open_logits(denoiser, [exact])
        for cache, other in others.items():
            (close_nV,) = open_logits(denoiser, [other])
            found[cache].append(compared(right_nV, close_nV))
            # It goes on with its own keys and values, but with the tokens of the exact text.
            take_step(denoiser, {0: other})
        take_step(denoiser, {0: exact})
        for other in others.values():
            _follow(other, exact)
    return {
        cache: {
            "max_logit_difference": max(one[0] for one in own),
            "same_argmax": statistics.fmean(one[1] for one in own),
            "kl": statistics.fmean(one[2] for one in own),
        }
        for cache, own in found.items()
    }


def _follow(canvas: Canvas, exact: Canvas) -> None:
    """Put a canvas where the exact one is, but for what it keeps."""
    canvas.ids_L, canvas.open_L = exact.ids_L.clone(), exact.open_L.clone()
    canvas.decided_L, canvas.step = exact.decided_L.clone(), exact.step
    canvas.blocks, canvas.due = list(exact.blocks), list(exact.due)
    canvas.block_steps = list(exact.block_steps)


def compared(right_nV: torch.Tensor, close_nV: torch.Tensor) -> tuple[float, float, float]:
    """Largest difference of a logit, share of equal argmax, mean KL in nats; tokens that can be."""
    allowed_V = right_nV[0].isfinite()
    right_nV, close_nV = right_nV[:, allowed_V].double(), close_nV[:, allowed_V].double()
    log_p_nV, log_q_nV = right_nV.log_softmax(-1), close_nV.log_softmax(-1)
    return (
        float((right_nV - close_nV).abs().max()),
        float((right_nV.argmax(-1) == close_nV.argmax(-1)).double().mean()),
        float((log_p_nV.exp() * (log_p_nV - log_q_nV)).sum(-1).mean()),
    )


def _write(
    denoiser: Denoiser, ids: list[int], settings: DriftBench, cache: str
) -> tuple[list[int], float, int, int]:
    """(tokens, seconds, forwards, positions read) of a text."""
    canvas = _canvas(denoiser, ids, settings, cache)
    read = 0
    began = time.perf_counter()
    while not canvas.finished:
        (commit,) = take_step(denoiser, {0: canvas})
        read += commit.tokens_read
    return canvas.ids_L[len(ids) :].tolist(), time.perf_counter() - began, canvas.nfe, read


def _rate(written: Sequence[tuple[list[int], float, int, int]]) -> float:
    return sum(one[1] for one in written) / sum(one[2] for one in written)


def _line(
    steps: Sequence[dict[str, float]],
    written: Sequence[tuple[list[int], float, int, int]],
    exact: Sequence[tuple[list[int], float, int, int]],
) -> dict[str, Any]:
    """Means over texts with standard errors; seconds as sums over sums."""
    line: dict[str, Any] = {
        "max_logit_difference": max(one["max_logit_difference"] for one in steps),
        "forwards": sum(one[2] for one in written),
        "tokens_read_per_forward": sum(one[3] for one in written) / sum(one[2] for one in written),
        "seconds_per_forward": _rate(written),
        "speed_up": sum(one[1] for one in exact) / sum(one[1] for one in written),
    }
    same = [
        statistics.fmean(float(a == b) for a, b in zip(own[0], right[0], strict=True))
        for own, right in zip(written, exact, strict=True)
    ]
    for name, values in (
        ("same_argmax", [one["same_argmax"] for one in steps]),
        ("kl", [one["kl"] for one in steps]),
        ("same_tokens", same),
    ):
        line[name], line[f"{name}_std_err"] = mean_and_error(values)
    return line


def markdown(record: dict[str, Any]) -> str:
    """The table of a record."""
    results, settings = record["results"], record["settings"]
    lines = [
        f"{results['texts']} texts of {settings['gen_length']} tokens in blocks of"
        f" {settings['block_length']}, {settings['tokens_per_step']} tokens a step, {settings['dtype']},"
        f" {settings['threads']} threads of {record['device']['cpu']}.",
        "",
        "| cache | positions a forward | speed-up | max logit off | same argmax | KL, nats | same text |",
        "|---|--:|--:|--:|--:|--:|--:|",
        f"| none (exact) | {results['exact']['tokens_read_per_forward']:.0f} | 1 | 0 | 100 % | 0 | 100 % |",
    ]
    for name, one in results["caches"].items():
        lines.append(
            f"| {name}, approximate | {one['tokens_read_per_forward']:.0f} | {one['speed_up']:.2f}"
            f" | {one['max_logit_difference']:.1f}"
            f" | {one['same_argmax']:.1%} ± {one['same_argmax_std_err']:.1%}"
            f" | {one['kl']:.3f} ± {one['kl_std_err']:.3f}"
            f" | {one['same_tokens']:.0%} ± {one['same_tokens_std_err']:.0%} |"
        )
    return "\n".join(lines) + "\n"
