"""The micro-batches of a step: rows of the data, masked, and rollouts of the student in earlier states.

Each process makes its own share of both; rollouts are written here when their time has come. Everything
random is a function of (seed, step, sample).
Shapes: B batch, L length.
"""

from __future__ import annotations

import dataclasses
import json
import time

import torch

from . import processes
from .masking import MaskedBatch, block_size_at, mask_batch
from .objective import ObjectiveSettings, with_mix
from .on_policy import (
    batch_of,
    batch_size,
    chosen,
    first_of,
    is_due,
    length_limit,
    needed_batches,
    shares,
)
from .placement import BY_CHUNK
from .readings import chunks
from .recipe import Recipe
from .rollouts import Rollout, gathered, load, numbers_of, roll_out, store
from .rows import sample_indices
from .run import Run, precision
from .states import state_batch

SAMPLES = "samples.jsonl"


def rows_of(recipe: Recipe, step: int) -> tuple[int, int]:
    """Rows of a step that are data, and that are rollouts."""
    return shares(recipe.on_policy, recipe.train.batch_rows, step)


def step_rows(run: Run, step: int) -> list[int]:
    """The training rows of a step, over all processes."""
    recipe = run.recipe
    count = rows_of(recipe, step)[0]
    before = min(step, recipe.on_policy.start_step) if recipe.on_policy.active else step
    first = before * recipe.train.batch_rows + (step - before) * count
    rows = sample_indices(len(run.data.train), recipe.train.seed, first, count)
    return [int(row) for row in rows]


def micro_batches(run: Run, step: int) -> list[MaskedBatch]:
    """This process's share of the rows of a step, in micro-batches; those of rollouts come last."""
    data, rollouts = (own_samples(run, count) for count in rows_of(run.recipe, step))
    return [data_batch(run, step, samples) for samples in data] + [
        rollout_batch(run, step, samples) for samples in rollouts
    ]


def own_samples(run: Run, count: int) -> list[list[int]]:
    """This process's part of `count` samples, by micro-batches."""
    mine = range(processes.rank(), count, processes.world_size())
    size = run.recipe.train.micro_rows
    return [list(mine[first : first + size]) for first in range(0, len(mine), size)]


def data_batch(run: Run, step: int, samples: list[int]) -> MaskedBatch:
    """Masked rows of the data."""
    recipe, rows = run.recipe, step_rows(run, step)
    settings = recipe.train
    rows_b = [rows[sample] for sample in samples]
    data = run.data.train.batch(rows_b)
    batch = mask_batch(
        recipe.objective,
        *data,
        masks=recipe.masks,
        mask_id=run.denoiser.mask_id,
        seed=settings.seed,
        step=step,
        samples=samples,
        samples_per_step=len(rows),
        rows=rows_b,
        block_size=block_size(run, step),
        chunk_BL=chunks_of(run, rows_b, data.document_ids_BL),
    )
    return with_mix(batch, recipe.mix, step / settings.steps)


def block_size(run: Run, step: int) -> int:
    """Tokens a block at a step; 0 if the student has none."""
    final, objective = run.denoiser.block_size, run.recipe.objective
    if final is None:
        return 0
    return block_size_at(final, objective.grow_from, objective.grow_steps, step)


def chunks_of(run: Run, rows: list[int], document_ids_BL: torch.Tensor) -> torch.Tensor | None:
    """(B, L) the chunks of rows that are masked by chunk; None if they are not."""
    if run.recipe.masks.where not in BY_CHUNK:
        return None
    assert run.data.readings is not None, "the rows were read by the teacher"
    return chunks(run.data.readings.batch(rows), document_ids_BL)[0]


# --- rollouts ----------------------------------------------------------------------------------------


def rollout_batch(run: Run, step: int, samples: list[int]) -> MaskedBatch:
    """Rollouts in states of this step."""
    recipe, denoiser = run.recipe, run.denoiser
    rows, seed = rows_of(recipe, step)[1], recipe.train.seed
    every = step_rollouts(run, step)
    places = [every[sample] for sample in samples]
    return state_batch(
        recipe.on_policy,
        on_rollouts(recipe.objective),
        [run.rollouts[batch][number] for batch, number in places],
        mask_id=denoiser.mask_id,
        eos_id=denoiser.vocab.eos_id,
        pad_id=denoiser.vocab.pad_id,
        seed=seed,
        step=step,
        samples=samples,
        samples_per_step=rows,
        block_size=denoiser.block_size or 0,
    )


def step_rollouts(run: Run, step: int) -> list[tuple[int, int]]:
    """(batch, number in it) of the rollouts of a step, over all processes."""
    recipe, rows = run.recipe, rows_of(run.recipe, step)[1]
    return [
        chosen(recipe.on_policy, rows, recipe.train.seed, step, sample) for sample in range(rows)
    ]


def on_rollouts(objective: ObjectiveSettings) -> ObjectiveSettings:
    """The objective of rollouts: distillation, whatever share of it the text of others has."""
    return dataclasses.replace(
        objective,
        kd_lambda=ObjectiveSettings.kd_lambda,
        kd_weight=None,
        ce_positions="all",
        ar_weight=0.0,
    )


def renew_rollouts(run: Run, step: int) -> dict[str, float]:
    """Have the rollouts that a step learns from at hand; metrics of those that were written for it.

    A collective. After an interruption, those that the run had are read back.
    """
    settings = run.recipe.on_policy
    if not settings.active or step < settings.start_step:
        return {}
    current, wanted = batch_of(settings, step), needed_batches(settings, step)
    for old in [batch for batch in run.rollouts if batch not in wanted]:
        del run.rollouts[old]
    found: dict[str, float] = {}
    if is_due(settings, step):
        # Also if it is there: a run that was resumed before it must not take one of later weights.
        began = time.monotonic()
        run.rollouts[current] = write_batch(run, current)
        found = numbers_of(run.rollouts[current]) | {
            "rollout_limit": length_limit(settings, current),
            "rollout_seconds": time.monotonic() - began,
        }
        if processes.rank() == 0:
            store(run.folder / "rollouts", current, run.rollouts[current])
            show_samples(run, step, current)
        processes.barrier()
    for batch in wanted:
        if batch not in run.rollouts:
            run.rollouts[batch] = load(run.folder / "rollouts", batch)
    return found


def write_batch(run: Run, batch: int) -> list[Rollout]:
    """All rollouts of a batch, written by all processes with the present weights."""
    recipe, prompts = run.recipe, run.prompts
    assert prompts is not None, "a run with rollouts has prompts"
    settings, seed = recipe.on_policy, recipe.train.seed
    rows = settings.rows(recipe.train.batch_rows)
    count, first = batch_size(settings, rows, batch), first_of(settings, rows, batch)
    places = sample_indices(len(prompts), seed, first, count)
    limit = length_limit(settings, batch)
    mine = range(processes.rank(), count, processes.world_size())
    with precision(run):
        written = roll_out(
            run.denoiser,
            [prompts[int(places[number])] for number in mine],
            settings.sampler,
            tokens_per_step=settings.tokens_per_step,
            length=limit,
            keys=[("rollout", seed, first + number) for number in mine],
            decode_rows=settings.decode_rows,
        )
    return gathered(dict(zip(mine, written, strict=True)), count)


def show_samples(run: Run, step: int, batch: int) -> None:
    """Add the first rollouts of a batch to samples.jsonl, as text."""
    vocab = run.denoiser.vocab
    with open(run.folder / SAMPLES, "a", encoding="utf-8") as file:
        for rollout in run.rollouts[batch][: run.recipe.on_policy.samples]:
            line = {
                "step": step + 1,
                "prompt": vocab.decode(rollout.tokens_L[: rollout.prompt_length].tolist()),
                "response": vocab.decode(rollout.response(vocab.eos_id)),
                "ended": rollout.ended,
                "tokens": rollout.decided,
                "forwards": rollout.nfe,
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
