"""On-policy distillation in small: an AR model becomes a block diffusion model, by its own text or others'.

The teacher is the AR model; every student begins as that model read in blocks, with all its layers. All
learn the same number of rows of one length behind prompts from one file, in blocks of each size. Rollouts
that end early have fewer tokens, and equal seeds take other prompts of the file where arms differ in text.
The arms and their recipes are in on_policy_recipes.py; `start` is the student before any step. Measures,
each by row, hole or prompt so that they are paired:

    bound          held-out likelihood bound on the corpus, nats a token
    bound_teacher  the same on the teacher's text
    exact_1…3      share of held-out holes of 1…3 tokens that are filled exactly
    teacher_T      teacher's log-likelihood a token of what the student writes behind held-out prompts,
                   greedily at threshold T, and drawn (temperature 1) at DRAWN_AT; its length
    parallel_T     tokens a forward, of the same

Every run ends with a record of its own, so an interrupted study goes on where it was.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mdm.autoregressive import Autoregressive, log_likelihood
from mdm.checkpoint import load_ar, load_denoiser, load_vocab
from mdm.config import require, to_tree
from mdm.convert import initial
from mdm.denoiser import Denoiser
from mdm.likelihood import Pair
from mdm.record import append_record, make_record, to_json
from mdm.train.corpus import open_source, read_in_turn
from mdm.train.dataset import DataSettings, PreparedData, prepare
from mdm.train.documents import Skips
from mdm.train.held_out import HeldOut, held_out_bound
from mdm.train.on_policy import OnPolicySettings
from mdm.train.recipe import Recipe, read_recipe
from mdm.train.rollouts import Rollout, roll_out
from mdm.train.run import new_run
from mdm.train.teacher_text import TextSettings, opening_text, sample_text
from mdm.train.trainer import train
from mdm.vocab import read_vocab

from .demo import SPAN, fill, find_holes
from .on_policy_recipes import (
    ARMS,
    BASE,
    CONTROL,
    CORPUS,
    START,
    TEACHER_TEXT,
    OnPolicyBench,
    recipe_of,
)
from .study import finished, held_out_units, with_last
from .study_report import Units, comparisons, weighted_mean
from .tide import clean, close
from .tide_recipes import TEACHER, short_hash

DRAWN, DRAWN_AT = "drawn", 0.9  # a way to write: temperature 1, at the threshold of rollouts


def run(
    settings: OnPolicyBench,
    runs: Path,
    path: Path,
    say: Callable[[str], None],
    *,
    keep: bool = False,
) -> dict[str, Any]:
    """Do the runs that are missing in `runs`, append the record to `path`, return it.

    Folders have names that tell settings apart. Weights and rows of a measured student are deleted, unless
    `keep`.
    """
    # All recipes first: a wrong setting should not come to light after an hour.
    recipes = {
        (arm, block, seed): recipe_of(settings, arm, block, seed)
        for seed in settings.seeds
        for block in settings.blocks
        for arm in (START, *settings.chosen)
        # The conversion has no random part, so it is measured once.
        if arm != START or seed == settings.seeds[0]
    }
    texts = made_texts(settings, runs, say)
    done = {}
    for number, (key, recipe) in enumerate(recipes.items(), start=1):
        if key[0] == START:
            recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, steps=1))
        made = made_from(recipe, settings, texts)
        recipe = placed(recipe, texts, f"{recipe.name}-{short_hash(made)}")
        found = finished(runs / recipe.name, made)
        if found is None:
            say(f"{number}/{len(recipes)} {recipe.name} …")
            found = one_run(settings, recipe, runs, texts, trained=key[0] != START)
            close(runs / recipe.name, found, made, keep=keep)
        done[key] = found
    record = make_record(
        "bench on-policy",
        {"text": texts.numbers, "blocks": results_of(settings, done)},
        settings={
            **dataclasses.asdict(settings),
            "recipes": {"all": [*BASE], **{arm: [*ARMS[arm][1]] for arm in settings.chosen}},
        },
        seed=None,
        checkpoint=texts.numbers["teacher"],
    )
    append_record(path, record)
    return record


# --- text and recipes --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Texts:
    """Where the text is that students learn from, and what is known of it."""

    folder: Path
    numbers: dict[str, Any]


def made_texts(settings: OnPolicyBench, runs: Path, say: Callable[[str], None]) -> Texts:
    """The prompts with what follows them in the corpus, and with what the teacher writes; made once."""
    base = read_recipe(settings.recipe, (*BASE, *settings.assignments))
    asked = [
        settings.model,
        settings.prompt_tokens,
        settings.length,
        settings.documents,
        base.data.sources,
        base.data.extensions,
        base.data.max_file_kib,
    ]
    folder = runs / f"text-{short_hash(asked)}"
    numbers = folder / "numbers.json"
    if not numbers.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        say(f"text of the teacher behind {settings.documents} prompts …")
        rows = write_corpus(settings, base.data, folder / CORPUS)
        found = {**write_teacher_text(settings, folder), "corpus_rows": rows}
        numbers.write_text(to_json(found), encoding="utf-8")
    return Texts(folder, json.loads(numbers.read_text(encoding="utf-8")))


def write_corpus(settings: OnPolicyBench, data: DataSettings, path: Path) -> int:
    """Beginnings of documents as prompt and response; how many."""
    vocab = load_vocab(settings.model)
    sources = [open_source(name, data.extensions, data.max_file_kib) for name in data.sources]
    rows = 0
    with open(path, "w", encoding="utf-8") as file:
        for document in itertools.islice(read_in_turn(sources, Skips()), settings.documents):
            prompt = opening_text(vocab, document.text, settings.prompt_tokens)
            whole = opening_text(vocab, document.text, settings.prompt_tokens + settings.length)
            response = whole[len(prompt) :]
            if response.strip():
                cut = len(whole) < len(document.text)
                line = {
                    "prompt": prompt,
                    "response": response,
                    "origin": document.origin,
                    "cut": cut,
                }
                file.write(json.dumps(line) + "\n")
                rows += 1
    return rows


def write_teacher_text(settings: OnPolicyBench, folder: Path) -> dict[str, Any]:
    """The teacher's continuations of the same prompts."""
    model = settings.model
    ar = autoregressive(model)
    source = open_source(str(folder / CORPUS), (".py",), 1024)
    text = TextSettings(
        max_tokens=settings.length, prompt_tokens=settings.prompt_tokens, limit=settings.documents
    )
    summary = sample_text(
        ar, {CORPUS: source}, text, folder / TEACHER_TEXT, teacher={"model": model}, overwrite=True
    )
    assert summary is not None, "one process"
    return {
        "teacher": model,
        "teacher_rows": summary.rows,
        "teacher_log_prob": summary.mean_log_prob,
        "teacher_log_prob_std_err": summary.std_err,
    }


def autoregressive(model: str) -> Autoregressive:
    """The teacher as a model that writes and scores."""
    network, tokenizer = load_ar(model, dtype=torch.float32)
    return Autoregressive(network, read_vocab(tokenizer))


def placed(recipe: Recipe, texts: Texts, name: str) -> Recipe:
    """The recipe with its sources where they are, under this name."""
    sources = tuple(str(texts.folder / source) for source in recipe.data.sources)
    return dataclasses.replace(
        recipe, name=name, data=dataclasses.replace(recipe.data, sources=sources)
    )


def made_from(recipe: Recipe, settings: OnPolicyBench, texts: Texts) -> dict[str, Any]:
    """Everything a run's numbers depend on, as JSON gives it back; no places."""
    measured = ("thresholds", "samples", "eval_rows", "eval_draws", "holes")
    tree = {
        "recipe": to_tree(recipe),
        "text": texts.numbers,
        TEACHER: texts.numbers["teacher"],
        **{name: getattr(settings, name) for name in measured},
    }
    return dict(json.loads(to_json(tree)))


# --- one run -----------------------------------------------------------------------------------------


def one_run(
    settings: OnPolicyBench, recipe: Recipe, runs: Path, texts: Texts, *, trained: bool
) -> dict[str, Any]:
    """Train, unless it is the start, and measure."""
    folder = new_run(recipe, runs, overwrite=True)
    times: dict[str, float] = {"steps": 0, "seconds": 0.0, "tokens": 0, "rollout_seconds": 0.0}
    if trained:
        outcome = train(recipe, folder)
        student = load_denoiser(folder / "final")
        times |= {"steps": outcome.steps, "seconds": outcome.seconds, "tokens": outcome.tokens}
        times["rollout_seconds"] += sum(metrics_of(folder, "rollout_seconds"))
    else:
        student = initial(recipe.student)
    student.eval()
    found = {name: prepared(recipe, texts, runs, name, student) for name in (CORPUS, TEACHER_TEXT)}
    half = recipe.train.precision == "bf16"
    units: dict[str, Units] = {}
    began = time.monotonic()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        for name, data in (("bound", found[CORPUS]), ("bound_teacher", found[TEACHER_TEXT])):
            units[name] = held_out_units(bound(settings, recipe, student, data))["bound"]
        units |= exact_fills(settings, recipe, student, found[CORPUS])
        written = all_written(settings, recipe, student, found[CORPUS])
    ar = autoregressive(recipe.teacher.model)
    for way, rollouts in written.items():
        units |= sample_units(ar, rollouts, way)
    clean(folder, "prompts", "rollouts")
    return {
        "units": {name: dataclasses.asdict(unit) for name, unit in units.items()},
        **times,
        "measuring_seconds": time.monotonic() - began,
    }


def prepared(
    recipe: Recipe, texts: Texts, runs: Path, name: str, student: Denoiser
) -> PreparedData:
    """The rows of one of the texts, made once for all students with these blocks."""
    sources = (str(texts.folder / name),)
    data = dataclasses.replace(recipe.data, sources=sources)
    folder = runs / "data" / f"{Path(name).stem}-{short_hash([to_tree(data), texts.numbers])}"
    return prepare(data, student.vocab, folder)


def metrics_of(folder: Path, name: str) -> list[float]:
    """What a run noted under this name, in order."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry[name] for entry in map(json.loads, lines) if name in entry]


def bound(
    settings: OnPolicyBench, recipe: Recipe, student: Denoiser, data: PreparedData
) -> HeldOut:
    """The likelihood bound on held-out rows."""
    return held_out_bound(
        student,
        data.held_out,
        num_rows=settings.eval_rows,
        draws=settings.eval_draws,
        batch_rows=4,
        seed=recipe.train.seed,
    )


def exact_fills(
    settings: OnPolicyBench, recipe: Recipe, student: Denoiser, data: PreparedData
) -> dict[str, Units]:
    """For each length whether holes in held-out rows are filled exactly."""
    start_id, seed = student.vocab.start_id, recipe.train.seed
    found = find_holes(data.held_out, start_id, count=settings.holes, seed=seed)
    require(len(found) > 1, "the held-out rows have no room for holes; raise --length")
    units = {}
    for count in range(1, SPAN + 1):
        shorter = [with_last(hole, count) for hole in found]
        fills = fill(student, shorter)
        hits = [float(own == hole.truth) for own, hole in zip(fills, shorter, strict=True)]
        units[f"exact_{count}"] = Units(hits, [1.0] * len(hits))
    return units


def all_written(
    settings: OnPolicyBench, recipe: Recipe, student: Denoiser, data: PreparedData
) -> dict[str, list[Rollout]]:
    """What the student writes in every way, by name: greedily at each threshold, and drawn."""
    found: dict[str, list[Rollout]] = {}
    alike = None
    for threshold in sorted(settings.thresholds):
        # Once a threshold lets nothing pass together, a higher one changes nothing either.
        if alike is None or any(rollout.decided > rollout.nfe for rollout in alike):
            greedy = OnPolicySettings(
                threshold=threshold, temperature=0.0, remasking="low_confidence"
            )
            alike = written_by(settings, recipe, student, data, greedy)
        found[f"{threshold:g}"] = alike
    drawn = OnPolicySettings(threshold=DRAWN_AT, remasking="low_confidence")
    return {**found, DRAWN: written_by(settings, recipe, student, data, drawn)}


def written_by(
    settings: OnPolicyBench,
    recipe: Recipe,
    student: Denoiser,
    data: PreparedData,
    wanted: OnPolicySettings,
) -> list[Rollout]:
    """What the student writes behind held-out prompts."""
    prompts = list(itertools.islice(held_out_prompts(data), settings.samples))
    return roll_out(
        student,
        prompts,
        wanted.sampler,
        length=settings.length,
        keys=[("on-policy study", recipe.train.seed, number) for number in range(len(prompts))],
        decode_rows=settings.samples,
    )


def held_out_prompts(data: PreparedData) -> Iterator[list[int]]:
    """The prompts of held-out rows: what stands before the first token that is learnt."""
    for row in range(len(data.held_out)):
        tokens_1L, _, maskable_1L, _ = data.held_out.batch([row])
        yield tokens_1L[0, : int(maskable_1L[0].nonzero()[0])].tolist()


def sample_units(ar: Autoregressive, rollouts: Sequence[Rollout], way: str) -> dict[str, Units]:
    """The teacher's log-likelihood a token, tokens a forward and lengths, by sample.

    A text is judged up to its end token; the token itself counts, as it is the student's.
    """
    pairs = []
    for rollout in rollouts:
        answer = rollout.response(ar.vocab.eos_id)
        answer = [*answer, ar.vocab.eos_id] if rollout.ended else answer
        pairs.append(Pair(tuple(rollout.tokens_L[: rollout.prompt_length].tolist()), tuple(answer)))
    scores = log_likelihood(ar, pairs)
    lengths = [float(len(pair.answer)) for pair in pairs]
    forwards = [float(rollout.nfe) for rollout in rollouts]
    return {
        f"teacher_{way}": Units(
            [score.value / length for score, length in zip(scores, lengths, strict=True)], lengths
        ),
        f"parallel_{way}": Units([rollout.decided / rollout.nfe for rollout in rollouts], forwards),
        f"length_{way}": Units(lengths, [1.0] * len(lengths)),
    }


# --- results -----------------------------------------------------------------------------------------


def results_of(
    settings: OnPolicyBench, done: dict[tuple[str, int, int], dict[str, Any]]
) -> dict[str, Any]:
    """By size of block: each run by itself, then differences to the controls over seeds."""
    found = {}
    for block in settings.blocks:
        own = {(arm, seed): value for (arm, size, seed), value in done.items() if size == block}
        units = {
            key: {name: Units(**unit) for name, unit in result["units"].items()}
            for key, result in own.items()
        }
        runs = [
            {
                "arm": arm,
                "seed": seed,
                **{name: told(unit) for name, unit in units[arm, seed].items()},
                **{name: value for name, value in result.items() if name != "units"},
            }
            for (arm, seed), result in own.items()
        ]
        # Samples of two students have lengths of their own: these are compared by their means.
        fixed = {
            key: {name: unit if is_paired(name) else alone(unit) for name, unit in value.items()}
            for key, value in units.items()
        }
        found[str(block)] = {
            "runs": runs,
            "differences": comparisons(fixed, (CONTROL, "on_policy", "on_policy_8")),
        }
    return found


def is_paired(name: str) -> bool:
    """Does a measure have the same units for all students?"""
    return not name.startswith(("teacher_", "parallel_"))


def alone(unit: Units) -> Units:
    """The weighted mean as a single unit."""
    return Units([weighted_mean(unit)[0]], [1.0])


def told(unit: Units) -> dict[str, float]:
    """Mean and standard error."""
    mean, std_err = weighted_mean(unit)
    return {"mean": mean, "std_err": std_err}
