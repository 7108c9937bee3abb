"""A training study: what do soft targets, and where masks fall, do for the student?

An arm is a base recipe with a few settings changed. All arms of a seed have the same rows in the same
order, the same number of steps, the same initial student and, where masks fall alike, the same masks;
all are measured on the same held-out masks and holes, so their differences are paired. Arms that distil
two positions a row (the expensive targets) have `left_2` beside them: the cheap target at as many.

    bound         held-out likelihood bound, nats per token; masks uniform whatever the training had
    accuracy_low  held-out accuracy where at most a fifth of the tokens is masked
    exact_1…3     share of held-out holes of 1…3 tokens that are filled exactly (greedy, surest first)

Every run has a folder and ends with a record of its own, so an interrupted study goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mdm.checkpoint import load_denoiser, weights_hash
from mdm.config import require, to_tree
from mdm.errors import ConfigError, check_known
from mdm.record import append_record, make_record, to_json
from mdm.train.dataset import open_prepared, prepare
from mdm.train.held_out import LEVELS, HeldOut
from mdm.train.recipe import Recipe, read_recipe
from mdm.train.rows import Rows
from mdm.train.run import Outcome, initial_student, new_run, precision, start
from mdm.train.trainer import micro_batches, train

from .demo import SPAN, Hole, fill, find_holes
from .study_report import Units, comparisons, weighted_mean

# A share of one for the expensive targets: each of the two positions stands for all masks of its row,
# and a larger one makes the gradient noisy (the same as in the recipe `suffix`).
_TWO = ("objective.kd_lambda=0.1", "objective.kd_positions=2")
_LEFT = ("target.kind=left", "objective.kd_lambda=0.5")
_WEIGHTED = ("masks.where=weighted",)
ARMS: dict[str, tuple[str, ...]] = {
    "ce": ("objective.kd_lambda=0",),
    "left": _LEFT,
    "left_2": ("target.kind=left", *_TWO),
    "suffix": ("target.kind=suffix", *_TWO),
    "i_sir": ("target.kind=i_sir", *_TWO),
    "student": ("target.kind=student", *_TWO),
    "ce_weighted": ("objective.kd_lambda=0", *_WEIGHTED),
    "left_weighted": (*_LEFT, *_WEIGHTED),
    "suffix_weighted": ("target.kind=suffix", *_TWO, "masks.distilled=weighted"),
}
# What --set may change. Classes of tokens are made for all arms, so that all have the same rows. Spans
# instead of regions: a region begins with the document, and filling all its masks takes many forwards.
BASE = (
    "data.language=auto",
    "target.fill=span",
    "target.fills=4",
    "train.eval_rows=64",
    "train.eval_draws=2",
    "train.checkpoint_every=0",
)
KIND = "study run"
TIMED_STEPS = 2


@dataclasses.dataclass(frozen=True)
class StudyBench:
    """What is measured; see `mdm bench study --help`.

    `arms` empty = all of them; `assignments` change the base recipe, an arm's own settings go last.
    """

    arms: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 80
    layers: int | None = 6
    length: int = 128
    holes: int = 64
    recipe: str = "ce"
    assignments: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for arm in self.arms:
            check_known("arm", arm, ARMS)
        require(bool(self.seeds), "seeds must name at least one seed")
        require(len({*self.seeds}) == len(self.seeds), f"seeds must differ; got {self.seeds}")
        require(self.holes >= 2, f"holes must be >= 2; got {self.holes}")


def run(
    settings: StudyBench, runs: Path, path: Path, say: Callable[[str], None], *, keep: bool = False
) -> dict[str, Any]:
    """Do the runs that are missing in `runs`, append the record to `path`, return it.

    Weights, checkpoints and rows of a run are deleted when it has been measured, unless `keep`.
    Raises ConfigError if a run there was measured with other settings.
    """
    arms = settings.arms or tuple(ARMS)
    # All recipes first: a wrong setting should not come to light after an hour.
    recipes = {
        (arm, seed): recipe_of(settings, arm, seed) for seed in settings.seeds for arm in arms
    }
    found = {key: finished(runs / recipe.name, made_from(recipe, settings))
             for key, recipe in recipes.items()}  # fmt: skip
    for number, (key, recipe) in enumerate(recipes.items(), start=1):
        if found[key] is None:
            say(f"{number}/{len(recipes)} {recipe.name} …")
            found[key] = one_run(settings, recipe, runs, keep=keep)
    done = {key: result for key, result in found.items() if result is not None}
    record = make_record(
        "bench study", results_of(done), settings=dataclasses.asdict(settings), seed=None
    )
    append_record(path, record)
    return record


def recipe_of(settings: StudyBench, arm: str, seed: int) -> Recipe:
    """The recipe of one run."""
    own = (
        f"name={arm}-seed{seed}",
        f"train.seed={seed}",
        f"train.steps={settings.steps}",
        f"student.layers={'null' if settings.layers is None else settings.layers}",
        f"data.length={settings.length}",
    )
    return read_recipe(settings.recipe, (*BASE, *own, *settings.assignments, *ARMS[arm]))


def made_from(recipe: Recipe, settings: StudyBench) -> dict[str, Any]:
    """Everything a run's numbers depend on, as JSON gives it back."""
    tree = {"recipe": to_tree(recipe), "holes": settings.holes}
    return dict(json.loads(to_json(tree)))


def finished(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What a run measured; None if it did not. Raises ConfigError if it had other settings."""
    path = folder / "record.jsonl"
    if not path.is_file():
        return None
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except json.JSONDecodeError:  # it was stopped while it wrote: again, then
        return None
    for record in reversed(records):
        if record["kind"] == KIND:
            if record["settings"] != settings:
                raise ConfigError(
                    f"{folder} was measured with other settings; give another --runs, or delete it"
                )
            return dict(record["results"])
    return None


def one_run(settings: StudyBench, recipe: Recipe, runs: Path, *, keep: bool) -> dict[str, Any]:
    """Train, measure, record, clean up."""
    shared = runs / "data"
    prepare(recipe.data, initial_student(recipe).vocab, shared)  # made once, then found again
    folder = new_run(recipe, runs, overwrite=True)
    shutil.copytree(shared, folder / "data", dirs_exist_ok=True)
    outcome = train(recipe, folder)
    results = measured(recipe, outcome, open_prepared(folder / "data").held_out, settings.holes)
    record = make_record(
        KIND,
        results,
        settings=made_from(recipe, settings),
        seed=recipe.train.seed,
        checkpoint=weights_hash(folder / "final"),
    )
    append_record(folder / "record.jsonl", record)
    if not keep:
        for name in ("data", "final", "checkpoints"):
            shutil.rmtree(folder / name, ignore_errors=True)
    return results


def measured(recipe: Recipe, outcome: Outcome, rows: Rows, holes: int) -> dict[str, Any]:
    """The measures of a finished run: per row and per hole, so that they can be paired."""
    student = load_denoiser(outcome.folder / "final")
    found = find_holes(rows, student.vocab.start_id, count=holes, seed=recipe.train.seed)
    require(len(found) > 1, "the held-out rows have no room for holes; raise --length")
    units = held_out_units(outcome.after)
    half = recipe.train.precision == "bf16"
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        for count in range(1, SPAN + 1):
            shorter = [with_last(hole, count) for hole in found]
            fills = fill(student, shorter)
            hits = [float(own == hole.truth) for own, hole in zip(fills, shorter, strict=True)]
            units[f"exact_{count}"] = Units(hits, [1.0] * len(hits))
    asked = teacher_seconds(recipe, outcome.folder)
    return {
        "units": {name: dataclasses.asdict(unit) for name, unit in units.items()},
        "bound_before": outcome.before.summary()["nelbo"],
        "steps": outcome.steps,
        "tokens": outcome.tokens,
        "seconds": outcome.seconds,
        "teacher_seconds": asked * outcome.steps,
    }


def with_last(hole: Hole, count: int) -> Hole:
    """The same hole with only its last `count` tokens missing."""
    known = len(hole.truth) - count
    return Hole([*hole.before, *hole.truth[:known]], hole.truth[known:], hole.after)


def held_out_units(after: HeldOut) -> dict[str, Units]:
    """The bound per row (the mean over its masks), and the accuracy of rows with few masks."""
    level_R, ce_R, hit_R, tokens_R = after.values_R4.unbind(-1)
    tokens = tokens_R.view(after.draws, -1)[0]
    bound = Units(ce_R.view(after.draws, -1).mean(0).tolist(), tokens.tolist())
    low_R = level_R <= LEVELS[1]
    few = Units(hit_R[low_R].tolist(), (level_R * tokens_R)[low_R].tolist())
    return {"bound": bound, "accuracy_low": few} if few.values else {"bound": bound}


def teacher_seconds(recipe: Recipe, folder: Path) -> float:
    """Seconds a step that go into soft targets: the fastest of a few of the run's steps."""
    if not recipe.objective.distils:
        return 0.0
    again = start(recipe, folder)
    assert again.ask is not None, "there is distillation"
    device = again.denoiser.device
    seconds = []
    for step in range(min(TIMED_STEPS, recipe.train.steps)):
        batches = [batch.to(device) for batch in micro_batches(again, step)]
        began = time.monotonic()
        for batch in batches:
            with precision(again):
                again.ask(batch, again.denoiser)
        seconds.append(time.monotonic() - began)
    return min(seconds)


def results_of(done: dict[tuple[str, int], dict[str, Any]]) -> dict[str, Any]:
    """Each run by itself, then the paired differences between arms."""
    units = {
        key: {name: Units(**unit) for name, unit in result["units"].items()}
        for key, result in done.items()
    }
    lines = []
    for (arm, seed), result in done.items():
        values = {name: weighted_mean(unit) for name, unit in units[arm, seed].items()}
        rest = {name: value for name, value in result.items() if name != "units"}
        means = {
            name: {"mean": mean, "std_err": std_err} for name, (mean, std_err) in values.items()
        }
        lines.append({"arm": arm, "seed": seed, **means, **rest})
    return {"runs": lines, "differences": comparisons(units)}
