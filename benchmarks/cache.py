"""Training steps with a teacher that is asked at every step, against a cache of its answers.

Teacher and student are the same model, the rows real code, the settings those of the recipe `left`. Both
sides take the same steps with the same student, rows and masks, in turn in one process; the learning
rate is next to nothing, so that both start from the same weights and their losses can be compared.

    ratio              seconds of an online step / of a cached one, within a pair of neighbours
    bytes a token      of the cache on disk
    pays after epochs  time to make the cache / time it saves in an epoch
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mdm.checkpoint import source_path, weights_hash
from mdm.config import build, require
from mdm.record import append_record, make_record, to_json
from mdm.train.cache_targets import Cached, cache_targets
from mdm.train.recipe import Recipe
from mdm.train.run import Run, new_run, start
from mdm.train.target_cache import cached_answers
from mdm.train.trainer import train_step

SIDES = ("online", "cached")
AIMS = {"ratio": 1.5, "bytes_per_token": 400.0}
_STILL = 1e-9  # learning rate


@dataclasses.dataclass(frozen=True)
class CacheBench:
    """What is measured; see `mdm bench cache --help`."""

    model: str
    source: str
    rows: int
    length: int
    cached_rows: int
    pairs: int
    top_k: int
    precision: str
    seed: int

    def __post_init__(self) -> None:
        for name in ("rows", "cached_rows", "pairs"):
            value = getattr(self, name)
            require(value >= 1, f"--{name.replace('_', '-')} must be at least 1; got {value}")

    @property
    def recipe(self) -> Recipe:
        """The online side."""
        tree = {
            "student": {"init": self.model},
            "teacher": {"model": self.model, "dtype": self.precision},
            "data": {
                "sources": [self.source],
                "length": self.length,
                "max_tokens": self.cached_rows * self.length,
                "held_out_fraction": 0.05,
                "max_held_out_rows": 16,
            },
            "target": {"kind": "left", "top_k": self.top_k},
            "objective": {"kd_lambda": 0.5, "weight": "mean_masked"},
            "train": {
                "batch_rows": self.rows,
                "micro_rows": self.rows,
                "learning_rate": _STILL,
                "lr_schedule": "constant",
                "precision": self.precision,
                "seed": self.seed,
            },
        }
        return build(Recipe, tree)


def run(
    settings: CacheBench, path: Path, tell: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Measure, append the record to `path`, return it. `tell` hears how far it is."""
    recipe = settings.recipe
    with tempfile.TemporaryDirectory(prefix="mdm-bench-cache-") as place:
        tell("making the cache")
        done = cache_targets(recipe, Path(place) / "cache", tell=tell)
        sides = open_sides(recipe, Path(place), str(done.cache.folder))
        pairs = take_turns(sides, settings.pairs, tell)
    results = summary(pairs, done)
    place_of_weights = source_path(settings.model)
    record = make_record(
        "bench cache",
        results,
        settings=dataclasses.asdict(settings),
        seed=settings.seed,
        checkpoint=weights_hash(place_of_weights) if place_of_weights else None,
    )
    append_record(path, record)
    return record


def open_sides(recipe: Recipe, place: Path, cache: str) -> dict[str, Run]:
    """The run, and the same one with answers from the folder `cache`."""
    online = start(recipe, new_run(recipe, place / "runs"))
    online.denoiser.train()
    target = dataclasses.replace(recipe.target, cache=cache)
    other = dataclasses.replace(recipe, target=target)
    ask = cached_answers(other, online.data, len(online.denoiser.vocab))
    return {"online": online, "cached": dataclasses.replace(online, recipe=other, ask=ask)}


@dataclasses.dataclass(frozen=True)
class Step:
    """One training step."""

    seconds: float
    loss: float
    tokens: float


def take_turns(
    sides: dict[str, Run], pairs: int, tell: Callable[[str], None]
) -> list[dict[str, Step]]:
    """Each side's step of every pair; one pair more is taken first, to warm up."""
    found = []
    for pair in range(-1, pairs):
        tell(f"pair {pair + 1} of {pairs}" if pair >= 0 else "warming up")
        step = pair % pairs
        found.append({name: timed_step(sides[name], step) for name in SIDES})
    return found[1:]


def timed_step(run: Run, step: int) -> Step:
    """One optimizer step with its time."""
    began = time.perf_counter()
    metrics = train_step(run, step)
    if run.denoiser.device.type == "cuda":
        torch.cuda.synchronize()
    return Step(time.perf_counter() - began, metrics["loss"], metrics["tokens"])


def summary(pairs: list[dict[str, Step]], done: Cached) -> dict[str, Any]:
    """Medians, the ratio with its standard error over pairs, and what the cache costs."""
    results: dict[str, Any] = {}
    for name in SIDES:
        seconds = [pair[name].seconds for pair in pairs]
        tokens = statistics.fmean(pair[name].tokens for pair in pairs)
        results[name] = {
            "seconds": statistics.median(seconds),
            "steps_per_second": 1 / statistics.median(seconds),
            "tokens_per_second": tokens / statistics.median(seconds),
            "seconds_all": seconds,
        }
    ratios = [pair["online"].seconds / pair["cached"].seconds for pair in pairs]
    bytes_per_token = done.bytes / done.tokens
    results |= {
        "ratio": statistics.median(ratios),
        "ratio_std_err": statistics.stdev(ratios) / len(ratios) ** 0.5
        if len(ratios) > 1
        else math.nan,
        "n": len(pairs),
        "loss_difference": max(abs(p["online"].loss - p["cached"].loss) for p in pairs),
        "loss": statistics.fmean(pair["online"].loss for pair in pairs),
        "bytes_per_token": bytes_per_token,
        "bytes_per_maskable_token": done.bytes / done.maskable,
        "cached_tokens": done.asked,
        "cache_seconds": done.seconds,
        "cache_tokens_per_second": done.asked / done.seconds,
        "pays_after_epochs": epochs_to_pay(results, done),
    }
    results["aims"] = {
        "ratio": {"aim": AIMS["ratio"], "met": results["ratio"] >= AIMS["ratio"]},
        "bytes_per_token": {
            "aim": AIMS["bytes_per_token"],
            "met": bytes_per_token <= AIMS["bytes_per_token"],
        },
    }
    return results


def epochs_to_pay(results: dict[str, Any], done: Cached) -> float:
    """Epochs until the cache has saved the time it took; infinite if it saves none."""
    online, cached = (1 / results[name]["tokens_per_second"] for name in SIDES)
    saved = online - cached
    return done.seconds / done.asked / saved if saved > 0 else math.inf


def describe(record: dict[str, Any]) -> str:
    """The card for people and, last, the record as one JSON line."""
    results, settings = record["results"], record["settings"]
    lines = [
        f"a training step of {settings['model']} with itself as teacher: {settings['rows']} rows of"
        f" {settings['length']}, {settings['precision']}, top {settings['top_k']}",
        f"{'':8}{'steps/s':>10}{'tokens/s':>10}{'seconds':>10}",
    ]
    for name in SIDES:
        side = results[name]
        lines.append(
            f"{name:8}{side['steps_per_second']:>10.3f}{side['tokens_per_second']:>10.0f}"
            f"{side['seconds']:>10.2f}"
        )
    lines += [
        f"online / cached: {results['ratio']:.2f} ± {results['ratio_std_err']:.2f} times the seconds"
        f" (n={results['n']}), losses {results['loss']:.4f}, apart by at most"
        f" {results['loss_difference']:.1e}",
        f"cache: {results['bytes_per_token']:.1f} bytes a token"
        f" ({results['bytes_per_maskable_token']:.1f} a maskable one), made at"
        f" {results['cache_tokens_per_second']:.0f} tokens/s, pays after"
        f" {results['pays_after_epochs']:.2f} epochs",
    ]
    lines += [
        f"aim {name}: {results[name]:.2f}, {'at least' if name == 'ratio' else 'at most'}"
        f" {told['aim']:g}: {'met' if told['met'] else 'missed'}"
        for name, told in results["aims"].items()
    ]
    return "\n".join([*lines, to_json(record)])
