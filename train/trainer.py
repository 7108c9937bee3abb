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
from .batches import (
    SAMPLES,
    micro_batches,
    on_rollouts,
    renew_rollouts,
    rows_of,
    step_rollouts,
    step_rows,
)
from .loss_sums import loss_sums, next_tokens
from .masking import MaskedBatch
from .objective import term_weights
from .optimizer import lr_factor
from .progress import Progress, keep_until, read_metrics
from .recipe import Recipe
from .run import (
    Outcome,
    Run,
    evaluate,
    evaluate_before,
    finish,
    precision,
    save,
    start,
    told_loss,
)
from .sharding import clip_gradients
from .state import load_state, saved_steps
from .targets import Measured, with_agreement

SMALLEST = 1e-6  # of a denominator; with on_policy.states=all it may be below 1


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
    if processes.rank() == 0:
        keep_until(folder / SAMPLES, step)
    progress.say(f"the loss is {told_loss(recipe)}")
    if run.prompts is not None:
        progress.say(f"rollouts continue {len(run.prompts)} prompts")
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
    settings, device = run.recipe.train, run.denoiser.device
    written = renew_rollouts(run, step)
    batches = micro_batches(run, step)
    weights = text_weights(run, step)
    weight_S3 = torch.tensor(weights, device=device)
    own_S4 = torch.zeros(len(weights), 4, dtype=torch.float64)
    for batch in batches:
        counts = [batch.denominator, batch.kd_denominator, next_tokens(batch), batch.num_tokens]
        own_S4[int(batch.own_text)] += torch.tensor(counts)
    total_S4 = processes.total(own_S4.to(device))
    over_S3 = total_S4[:, :3].float().clamp(min=SMALLEST)
    sums_S3, measured = torch.zeros_like(over_S3), Measured()
    for index, batch in enumerate(batches):
        source = int(batch.own_text)
        with synchronising(run.module, last=index == len(batches) - 1):
            with precision(run):
                terms_3 = step_terms(run, batch.to(device), weights[source][1], measured)
            # DDP averages gradients over processes; the objective is a sum over them.
            loss = (weight_S3[source] * terms_3 / over_S3[source]).sum() * processes.world_size()
            loss.backward()
        sums_S3[source] += terms_3.detach()
    found_S3 = processes.total(sums_S3) / over_S3
    (ce, kd, following), (_, on_policy, _) = found_S3.tolist()
    norm = clip_gradients(run.denoiser.parameters(), settings.clip)
    if not math.isfinite(float(found_S3.sum()) + norm):
        numbers = f"ce {ce:g}, kd {kd:g}, gradient norm {norm:g}"
        diverged(run, step, numbers + (f", on_policy {on_policy:g}" if weights[1][1] else ""))
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
        "loss": float((weight_S3 * found_S3).sum()),
        "ce": ce,
        "kd": kd,
        "kd_lambda": weights[0][1],
        **({"next_token": following} if weights[0][2] else {}),
        **({"on_policy": on_policy} if weights[1][1] else {}),
        "gradient_norm": norm,
        "learning_rate": rate,
        "tokens": float(total_S4[:, 3].sum()),
        **measured.means(device),
        **written,
    }


def text_weights(run: Run, step: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Weights of the terms (cross-entropy, distillation, next token) of the data, and of rollouts."""
    recipe = run.recipe
    data, own = rows_of(recipe, step)
    share = own / (data + own)
    of_data = term_weights(recipe.objective, step, teacher=run.ask is not None)
    return tuple((1 - share) * weight for weight in of_data), (0.0, share, 0.0)


def step_terms(run: Run, batch: MaskedBatch, share: float, measured: Measured) -> torch.Tensor:
    """(3,) the sums of one micro-batch on the device (loss_sums.py); targets are noted in `measured`."""
    objective, targets = run.recipe.objective, None
    if batch.own_text:
        objective = on_rollouts(objective)
    if run.ask is not None and share > 0:
        targets = run.ask(batch, run.denoiser)
        measured.add(with_agreement(targets, batch.x0_BL[batch.distilled_BL], batch.own_text))
    return loss_sums(run.module, batch, targets, objective, run.denoiser.projection)


def diverged(run: Run, step: int, numbers: str) -> NoReturn:
    """Keep the weights from before this step and raise a TrainingError that names its rows."""
    save(run, step)
    rows = ", ".join(map(str, step_rows(run, step)[:16])) or "none"
    if own := step_rollouts(run, step):
        named = ", ".join(f"{number} of batch {batch}" for batch, number in own[:16])
        rows += f", and of {run.folder / 'rollouts'} those with the numbers {named}"
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
