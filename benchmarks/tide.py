"""TIDE in small: what do diffusion teachers do for block diffusion students, loss by loss?

mdm makes the teacher itself: the AR model of the recipe becomes a block diffusion model with all its
layers and is trained for a while. So is, on cross-entropy, a student with some of the layers, from which
all students of a pipeline begin (as TIDE's begin from a trained one). They then learn from the teacher, in
two pipelines (TIDE, arXiv 2604.26951), each with controls that learn from the same text without it. The
arms and their recipes are in tide_recipes.py.

All students of a pipeline and seed have the same rows, number of tokens and initial weights (in one with
tokens of its own: the same again), and are measured on the same held-out masks and holes as the control:
differences are paired. The measures are those of study.py. The teacher is measured on them too: nothing
can be learnt from one that is no better than the students.

Every run ends with a record of its own, so an interrupted study goes on where it was.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mdm.checkpoint import load_denoiser, load_vocab, weights_hash
from mdm.config import to_tree
from mdm.convert import StudentSettings
from mdm.record import append_record, make_record, to_json
from mdm.train.corpus import open_source, read_in_turn
from mdm.train.dataset import PreparedData, prepare
from mdm.train.documents import Skips
from mdm.train.held_out import held_out_bound
from mdm.train.recipe import Recipe
from mdm.train.run import Outcome, initial_vocab, new_run
from mdm.train.state import saved_steps
from mdm.train.teachers.denoised import CHUNKS
from mdm.train.tokenizer import train_tokenizer
from mdm.train.trainer import train

from .study import KIND, finished, measured, results_of
from .study_report import Units, comparisons
from .tide_recipes import (
    FIRST,
    PIPELINE_OF,
    PIPELINES,
    TEACHER,
    TideBench,
    assignments_of,
    first_recipe,
    recipe_of,
    short_hash,
    teacher_recipe,
    tokenizer_name,
)
from .tokenizers import bytes_per_token


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished training: its folder, and its numbers for the record."""

    folder: Path
    numbers: dict[str, Any]


def run(
    settings: TideBench, runs: Path, path: Path, say: Callable[[str], None], *, keep: bool = False
) -> dict[str, Any]:
    """Do the runs that are missing in `runs`, append the record to `path`, return it.

    Folders have names that tell settings apart, so what was made with others stays and is not taken.
    Weights and rows of a measured student are deleted, unless `keep`; teacher and tokenizer are kept.
    """
    # All recipes first: a wrong setting should not come to light after an hour.
    recipes = {
        (arm, seed): recipe_of(settings, arm, seed)
        for seed in settings.seeds
        for arm in (TEACHER, *settings.chosen)
    }
    pipelines = [
        name for name in PIPELINES if name in {PIPELINE_OF[arm] for arm in settings.chosen}
    ]
    if "cross" in pipelines:
        made_tokenizer(settings, runs, say)
    teacher = trained(teacher_recipe(settings), runs, say)
    firsts = {name: trained(first_recipe(settings, name), runs, say)
              for name in pipelines if settings.first_steps}  # fmt: skip
    done = {}
    for number, ((arm, seed), recipe) in enumerate(recipes.items(), start=1):
        first = firsts.get(PIPELINE_OF.get(arm, ""))
        made = made_from(recipe, settings, teacher, first)
        recipe = placed(recipe, runs, teacher, first, name=f"{recipe.name}-{short_hash(made)}")
        found = finished(runs / recipe.name, made)
        if found is None:
            say(f"{number}/{len(recipes)} {recipe.name} …")
            measure = measured_teacher if arm == TEACHER else measured_student
            found = measure(settings, recipe, runs, teacher)
            close(runs / recipe.name, found, made, keep=keep)
        done[arm, seed] = found
    control = {name: placed(recipes[PIPELINES[name].controls[0], settings.seeds[0]], runs, teacher,
                            firsts.get(name)) for name in pipelines}  # fmt: skip
    results = {
        "teacher": teacher.numbers,
        "first": {name: first.numbers for name, first in firsts.items()},
        "pipelines": {
            name: pipeline_results(name, done, bytes_a_token(recipe, runs))
            for name, recipe in control.items()
        },
    }
    record = make_record(
        "bench tide",
        results,
        settings={**dataclasses.asdict(settings), "recipes": assignments_of(settings)},
        seed=None,
        checkpoint=teacher.numbers["weights"],
    )
    append_record(path, record)
    return record


# --- recipes -----------------------------------------------------------------------------------------


def placed(
    recipe: Recipe, runs: Path, teacher: Trained, first: Trained | None, *, name: str = ""
) -> Recipe:
    """The recipe with teacher, first student and tokenizer where they are, under another name if one is
    given."""
    student = recipe.student
    if first is not None:
        student = StudentSettings(init=str(first.folder / "final"))
    if student.tokenizer is not None:
        student = dataclasses.replace(student, tokenizer=str(runs / student.tokenizer))
    return dataclasses.replace(
        recipe,
        name=name or recipe.name,
        student=student,
        teacher=dataclasses.replace(recipe.teacher, model=str(teacher.folder / "final")),
    )


def made_from(
    recipe: Recipe, settings: TideBench, teacher: Trained, first: Trained | None
) -> dict[str, Any]:
    """Everything a run's numbers depend on, as JSON gives it back; no places."""
    tree = {
        "recipe": to_tree(recipe),
        "holes": settings.holes,
        TEACHER: teacher.numbers["weights"],
        FIRST: first and first.numbers["weights"],
    }
    return dict(json.loads(to_json(tree)))


# --- what the students learn from --------------------------------------------------------------------


def trained(recipe: Recipe, runs: Path, say: Callable[[str], None]) -> Trained:
    """Train by this recipe in `runs`, go on with it, or find it finished."""
    recipe = dataclasses.replace(recipe, name=f"{recipe.name}-{short_hash(to_tree(recipe))}")
    if recipe.student.tokenizer is not None:
        own = str(runs / recipe.student.tokenizer)
        recipe = dataclasses.replace(
            recipe, student=dataclasses.replace(recipe.student, tokenizer=own)
        )
    folder = runs / recipe.name
    record = finished_training(folder)
    if record is None:
        if not saved_steps(folder / "checkpoints") or (folder / "final").exists():
            new_run(recipe, runs, overwrite=True)
            shutil.copytree(prepared(recipe, runs).directory, folder / "data", dirs_exist_ok=True)
        say(f"{recipe.name}: {recipe.train.steps} steps …")
        train(recipe, folder)
        record = finished_training(folder)
        assert record is not None, "a finished training has a record"
    clean(folder, "data", "checkpoints")
    results = record["results"]
    numbers = {
        "weights": record["checkpoint"],
        "bound": {"mean": results["after"]["nelbo"], "std_err": results["after"]["nelbo_std_err"]},
        "bound_before": results["before"]["nelbo"],
        "steps": results["steps"],
    }
    return Trained(folder, numbers)


def finished_training(folder: Path) -> dict[str, Any] | None:
    """The record of a training; None if it is not finished."""
    path = folder / "record.jsonl"
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except json.JSONDecodeError:  # it was stopped while it wrote: again, then
        return None


def made_tokenizer(settings: TideBench, runs: Path, say: Callable[[str], None]) -> None:
    """Learn that tokenizer, unless it is there."""
    data = recipe_of(settings, "ce_cross", 0).data
    folder = runs / tokenizer_name(settings, data)
    if folder.is_dir():  # written whole or not at all
        return
    sources = [open_source(name, data.extensions, data.max_file_kib) for name in data.sources]
    documents = itertools.islice(read_in_turn(sources, Skips()), settings.documents)
    count = train_tokenizer((document.text for document in documents), settings.tokens, folder)
    say(f"tokenizer of the students: {count} tokens")


def prepared(recipe: Recipe, runs: Path) -> PreparedData:
    """The rows of a placed recipe, made once for all that have the same, and read by the teacher if it
    has another tokenizer."""
    reader = load_vocab(recipe.teacher.model) if recipe.target.kind == CHUNKS else None
    vocab = initial_vocab(recipe)
    name = f"{'rows' if reader is None else 'chunks'}-{vocab.fingerprint[:8]}"
    return prepare(recipe.data, vocab, runs / "data" / name, reader)


# --- runs --------------------------------------------------------------------------------------------


def measured_student(
    settings: TideBench, recipe: Recipe, runs: Path, teacher: Trained
) -> dict[str, Any]:
    """Train a student; its measures."""
    data = prepared(recipe, runs)
    folder = new_run(recipe, runs, overwrite=True)
    shutil.copytree(data.directory, folder / "data", dirs_exist_ok=True)
    outcome = train(recipe, folder)
    return measured(recipe, outcome, data.held_out, settings.holes)


def measured_teacher(
    settings: TideBench, recipe: Recipe, runs: Path, teacher: Trained
) -> dict[str, Any]:
    """The same measures of the teacher, on the held-out masks and holes of this recipe's seed."""
    rows, wanted = prepared(recipe, runs).held_out, recipe.train
    new_run(recipe, runs, overwrite=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=wanted.precision == "bf16"):
        after = held_out_bound(
            load_denoiser(teacher.folder / "final"),
            rows,
            num_rows=wanted.eval_rows,
            draws=wanted.eval_draws,
            batch_rows=wanted.micro_rows,
            seed=wanted.seed,
        )
    # Its training may have been of several sessions, whose times nobody added up.
    steps = teacher.numbers["steps"]
    outcome = Outcome(teacher.folder, after, after, steps, tokens=0, seconds=0.0)
    return measured(recipe, outcome, rows, settings.holes)


def close(folder: Path, results: dict[str, Any], made: dict[str, Any], *, keep: bool) -> None:
    """Record the measures of a run, and clean up unless `keep`."""
    final = folder / "final"
    record = make_record(
        KIND,
        results,
        settings=made,
        seed=made["recipe"]["train"]["seed"],
        checkpoint=weights_hash(final) if final.exists() else made[TEACHER],
    )
    append_record(folder / "record.jsonl", record)
    if not keep:
        clean(folder, "data", "final", "checkpoints")


def clean(folder: Path, *parts: str) -> None:
    """Delete these folders of a run."""
    for part in parts:
        shutil.rmtree(folder / part, ignore_errors=True)


# --- results -----------------------------------------------------------------------------------------


def bytes_a_token(recipe: Recipe, runs: Path) -> float:
    """Of the held-out rows, so that bounds of two tokenizers can be compared."""
    return bytes_per_token(prepared(recipe, runs), initial_vocab(recipe))


def pipeline_results(
    name: str, done: dict[tuple[str, int], dict[str, Any]], bytes_each: float
) -> dict[str, Any]:
    """Each run of a pipeline by itself, then the paired differences to its controls."""
    pipeline = PIPELINES[name]
    arms = {*pipeline.arms, *([TEACHER] if name == "shared" else [])}
    own = {key: result for key, result in done.items() if key[0] in arms}
    units = {
        key: {measure: Units(**unit) for measure, unit in result["units"].items()}
        for key, result in own.items()
    }
    first = pipeline.controls[0]
    return {
        "bytes_per_token": bytes_each,
        "runs": results_of(own)["runs"],
        "differences": [
            line for line in comparisons(units, pipeline.controls) if line["arm"] != first
        ],
    }
