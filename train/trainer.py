"""The training loop. Works alone or under `torchrun`.

Everything random is a function of (seed, step, sample), so micro-batches, processes and interruptions
change nothing but the order of floating-point sums; resuming on one process is exact to the bit.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mdm.errors import ConfigError, TrainingError

from . import processes
from .loss_sums import loss_sums, next_tokens
from .masking import MaskedBatch, block_size_at, mask_batch
from .objective import loss_meaning, term_weights, with_mix
from .optimizer import lr_factor
from .placement import BY_CHUNK
from .progress import Progress, read_metrics
from .readings import chunks
from .recipe import Recipe
from .rows import sample_indices
from .run import Outcome, Run, evaluate, evaluate_before, finish, precision, save, start
from .sharding import clip_gradients
from .state import load_state, saved_steps
from .targets import Measured


def train(recipe: Recipe, folder: Path) -> Outcome:
    """Train in `folder`, from its newest checkpoint if it has one; writes final/ at the end.

    SIGINT and SIGTERM end the run after the current step, with a checkpoint. Raises TrainingError
    then, and if the loss is not finite.
    """
    refuse_finished(recipe, folder)
    run = start(recipe, folder)
    settings = recipe.train
    saved = saved_steps(folder / "checkpoints")
    step = 0
    if saved:
        parts = (run.denoiser, run.optimizer, run.average)
        step = load_state(saved[-1], *parts, data=run.data_identity)
    progress = Progress(
        folder,
        steps=settings.steps,
        first=step,
        active=processes.rank() == 0,
        board=settings.tensorboard,
    )
    progress.say(f"the loss is {loss_meaning(recipe.objective, recipe.masks)}")
    before = evaluate_before(run, step)
    if step == 0:
        progress.evaluation(0, before.summary())
    began, tokens = time.monotonic(), 0
    run.denoiser.train()
    with stop_signals() as signals:
        while step < settings.steps:
            metrics = train_step(run, step)
            step += 1
            tokens += int(metrics["tokens"])
            progress.step(step, metrics, time.monotonic() - began)
            if step == settings.steps:
                break
            if due(settings.eval_every, step):
                progress.evaluation(step, evaluate(run).summary())
            interrupted = agreed(bool(signals))
            late = agreed(0 < settings.max_minutes * 60 < time.monotonic() - began)
            if interrupted or late or due(settings.checkpoint_every, step):
                save(run, step)
            if interrupted:
                raise TrainingError(
                    f"stopped by a signal after step {step}; continue with"
                    f" `mdm train --resume {folder}`"
                )
            if late:
                progress.say(f"train.max_minutes reached after {step} of {settings.steps} steps")
                break
    seconds = time.monotonic() - began
    after = evaluate(run)
    progress.evaluation(step, after.summary())
    outcome = Outcome(folder, before, after, step, tokens, seconds)
    for line in finish(run, outcome):
        progress.say(line)
    progress.close()
    return outcome


def train_step(run: Run, step: int) -> dict[str, float]:
    """One optimizer step (0-based). Returns the metrics, tokens among them."""
    settings = run.recipe.train
    device = run.denoiser.device
    batches = micro_batches(run, step)
    own_4 = torch.tensor(
        [[b.denominator, b.kd_denominator, next_tokens(b), b.num_tokens] for b in batches]
    )
    *denominators, tokens = processes.total(own_4.double().sum(0).to(device)).tolist()
    over_3 = torch.tensor(denominators, device=device).clamp(min=1.0)
    weights = term_weights(run.recipe.objective, step, teacher=run.ask is not None)
    weight_3 = torch.tensor(weights, device=device)
    sums_3, measured = torch.zeros(3, device=device), Measured()
    for index, batch in enumerate(batches):
        with synchronising(run.module, last=index == len(batches) - 1):
            with precision(run):
                terms_3 = step_terms(run, batch.to(device), weights[1], measured)
            # DDP averages gradients over processes; the objective is a sum over them.
            loss = (weight_3 * terms_3 / over_3).sum() * processes.world_size()
            loss.backward()
        sums_3 += terms_3.detach()
    found_3 = processes.total(sums_3) / over_3
    ce, kd, following = found_3.tolist()
    norm = clip_gradients(run.denoiser.parameters(), settings.clip)
    if not math.isfinite(ce + kd + following + norm):
        diverged(run, step, f"ce {ce:g}, kd {kd:g}, gradient norm {norm:g}")
    rate = settings.learning_rate * lr_factor(
        settings.lr_schedule,
        step,
        steps=settings.steps,
        warmup_steps=settings.warmup_steps,
        decay_fraction=settings.decay_fraction,
        floor=settings.lr_floor,
    )
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    if run.average is not None:
        run.average.update(run.denoiser, step)
    return {
        "loss": float((weight_3 * found_3).sum()),
        "ce": ce,
        "kd": kd,
        "kd_lambda": weights[1],
        **({"next_token": following} if weights[2] else {}),
        "gradient_norm": norm,
        "learning_rate": rate,
        "tokens": tokens,
        **measured.means(device),
    }


def step_terms(run: Run, batch: MaskedBatch, share: float, measured: Measured) -> torch.Tensor:
    """(3,) the sums of one micro-batch on the device (loss_sums.py); targets are noted in `measured`."""
    objective, targets = run.recipe.objective, None
    if run.ask is not None and share > 0:
        targets = run.ask(batch, run.denoiser)
        measured.add(targets)
    return loss_sums(run.module, batch, targets, objective, run.denoiser.projection)


def step_rows(run: Run, step: int) -> list[int]:
    """The training rows of a step, over all processes."""
    count = run.recipe.train.batch_rows
    rows = sample_indices(len(run.data.train), run.recipe.train.seed, step * count, count)
    return [int(row) for row in rows]


def micro_batches(run: Run, step: int) -> list[MaskedBatch]:
    """This process's share of the rows of a step, masked, in micro-batches."""
    recipe, rows = run.recipe, step_rows(run, step)
    settings = recipe.train
    mine = range(processes.rank(), settings.batch_rows, processes.world_size())
    batches = []
    for first in range(0, len(mine), settings.micro_rows):
        samples = list(mine[first : first + settings.micro_rows])
        chosen = [rows[sample] for sample in samples]
        data = run.data.train.batch(chosen)
        batch = mask_batch(
            recipe.objective,
            *data,
            masks=recipe.masks,
            mask_id=run.denoiser.mask_id,
            seed=settings.seed,
            step=step,
            samples=samples,
            samples_per_step=settings.batch_rows,
            rows=chosen,
            block_size=block_size(run, step),
            chunk_BL=chunks_of(run, chosen, data.document_ids_BL),
        )
        batches.append(with_mix(batch, recipe.mix, step / settings.steps))
    return batches


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


def diverged(run: Run, step: int, numbers: str) -> NoReturn:
    """Keep the weights from before this step and raise a TrainingError that names its rows."""
    save(run, step)
    rows = ", ".join(map(str, step_rows(run, step)[:16]))
    raise TrainingError(
        f"not finite at step {step + 1} ({numbers}); training rows of that step in"
        f" {run.folder / 'data'}: {rows}. The weights before it are kept in"
        f" {run.folder / 'checkpoints' / f'step-{step:06d}'}; lower train.learning_rate, or set"
        " train.precision=fp32, in a new run"
    )


def refuse_finished(recipe: Recipe, folder: Path) -> None:
    """Raise ConfigError if the last step of a run is done (a time limit may have ended it earlier)."""
    entries = read_metrics(folder / "metrics.jsonl")
    if (folder / "final").exists() and entries and entries[-1]["step"] >= recipe.train.steps:
        raise ConfigError(
            f"{folder} is finished; to train its model further, start a new run with"
            f" --set student.init={folder / 'final'}"
        )


def due(every: int, step: int) -> bool:
    """Is something due after `step` steps that happens every `every` steps (0 = never)?"""
    return every > 0 and step % every == 0


def agreed(flag: bool) -> bool:
    """True on all processes if it is true on any, so that all stop at the same step."""
    if processes.world_size() == 1:
        return flag
    return bool(processes.total(torch.tensor(float(flag), device=processes.device())))


def synchronising(module: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[None]:
    """DDP exchanges gradients only in the last micro-batch of a step.

    Sharded ones are exchanged in each: to wait, every process would need room for all of them.
    """
    if isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return contextlib.nullcontext()


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying; a second one of the kind acts as usual."""
    received: list[int] = []
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _frame: object) -> None:
        received.append(number)
        signal.signal(number, usual[signal.Signals(number)])

    try:
        for number in usual:
            signal.signal(number, note)
        yield received
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
