"""One distillation step of mdm against a straightforward twin: time and peak memory.

The twin does what is usually written: logits of the whole vocabulary at all positions for student
and teacher, then losses at the masked ones. Its KL is over the
whole vocabulary, that of mdm over the teacher's top 64 and one bucket, a lower bound of it; so the
losses differ. Memory is measured in a fresh process for each side, time in one process in which the two
sides take turns.
Block diffusion students (--kind bd3lm) are in train_step_blocks.py, which measures with what is here.
Shapes: B batch, L length, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from mdm.config import require
from mdm.convert import StudentSettings, convert
from mdm.denoiser import Denoiser
from mdm.record import append_record, make_record, to_json
from mdm.train.asking import soft_targets
from mdm.train.loss_sums import loss_sums
from mdm.train.masking import MaskedBatch, mask_batch
from mdm.train.objective import ObjectiveSettings
from mdm.train.placement import MaskSettings
from mdm.train.targets import TargetSettings
from mdm.train.teachers.ar import ARTeacher, load_teacher

OBJECTIVE = ObjectiveSettings(kd_lambda=0.5)
TARGET = TargetSettings(kind="left", top_k=64)


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """What is measured; see `mdm bench train-step --help`."""

    model: str
    layers: int | None
    rows: int
    length: int
    repeats: int
    checkpointing: bool
    seed: int


Settings = TypeVar("Settings", bound=StepSettings)
# The student, and a step's loss.
Step = tuple[Denoiser, Callable[[], torch.Tensor]]


@dataclasses.dataclass(frozen=True)
class Setting:
    """Everything one step needs."""

    denoiser: Denoiser
    teacher: ARTeacher
    batch: MaskedBatch


def compare(settings: StepSettings, path: Path) -> dict[str, Any]:
    """Measure both sides; the record is appended to `path`."""
    setting = make_setting(settings)
    require(
        settings.length <= setting.denoiser.max_length,
        f"--length {settings.length} is more than the context of {settings.model},"
        f" {setting.denoiser.max_length} tokens",
    )
    require_linux()
    memory = {side: memory_in_fresh_process(side, settings) for side in SIDES}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    steps: dict[str, Step] = {
        side: (setting.denoiser, partial(loss, setting)) for side, loss in SIDES.items()
    }
    losses = {side: run_once(*step) for side, step in steps.items()}  # warms up, too
    for _ in range(settings.repeats):
        for side, step in steps.items():
            began = time.perf_counter()
            run_once(*step)
            seconds[side].append(time.perf_counter() - began)
    tokens = settings.rows * settings.length
    ratios = [ours / twin for ours, twin in zip(seconds["mdm"], seconds["twin"], strict=True)]
    results = {
        side: {
            "loss": losses[side],
            "activation_bytes": memory[side],
            "seconds": statistics.median(seconds[side]),
            "seconds_all": seconds[side],
            "tokens_per_second": tokens / statistics.median(seconds[side]),
        }
        for side in SIDES
    }
    record = make_record(
        "train_step",
        {
            **results,
            "memory_ratio": memory["mdm"] / memory["twin"],
            "time_ratio": statistics.median(ratios),
            "time_ratio_std_err": std_err(ratios),
            "n": settings.repeats,
            "masked_tokens": int(setting.batch.masked_BL.sum()),
        },
        settings=dataclasses.asdict(settings),
        seed=settings.seed,
    )
    append_record(path, record)
    return record


def make_setting(settings: StepSettings) -> Setting:
    """Student, teacher and one batch of random tokens, on the GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    denoiser = convert(StudentSettings(init=settings.model, layers=settings.layers)).to(device)
    teacher = load_teacher(settings.model, denoiser.vocab, dtype=torch.bfloat16)
    teacher.model.to(device)
    if settings.checkpointing:
        denoiser.model.activation_checkpointing_enable()
    denoiser.train()
    random = torch.Generator().manual_seed(settings.seed)
    shape = (settings.rows, settings.length)
    tokens_BL = torch.randint(0, teacher.num_tokens, shape, generator=random)
    maskable_BL = torch.ones_like(tokens_BL, dtype=torch.bool)
    maskable_BL[:, 0] = False
    batch = mask_batch(
        OBJECTIVE,
        tokens_BL,
        torch.zeros_like(tokens_BL),
        maskable_BL,
        torch.zeros_like(tokens_BL),
        masks=MaskSettings(),
        mask_id=denoiser.mask_id,
        seed=settings.seed,
        step=0,
        samples=range(settings.rows),
        samples_per_step=settings.rows,
    )
    return Setting(denoiser, teacher, batch.to(device))


def run_once(denoiser: Denoiser, step_loss: Callable[[], torch.Tensor]) -> float:
    """Forward, backward, and the loss; gradients are freed."""
    with torch.autocast(denoiser.device.type, dtype=torch.bfloat16):
        loss = step_loss()
    loss.backward()
    value = float(loss.detach())
    denoiser.zero_grad(set_to_none=True)
    return value


def mdm_loss(setting: Setting) -> torch.Tensor:
    """The step as the trainer takes it."""
    batch = setting.batch
    targets = soft_targets(setting.teacher, batch, TARGET, OBJECTIVE.kd_temperature)
    ce, kd, _ = loss_sums(setting.denoiser, batch, targets, OBJECTIVE) / batch.denominator
    return (1 - OBJECTIVE.kd_lambda) * ce + OBJECTIVE.kd_lambda * kd


def twin_loss(setting: Setting) -> torch.Tensor:
    """The same objective with full-vocabulary logits at all positions."""
    batch, teacher = setting.batch, setting.teacher
    student_BLV = setting.denoiser.model(batch.xt_BL, use_cache=False).logits[:, :-1].float()
    with torch.no_grad():
        teacher_BLV = teacher.model(batch.x0_BL, use_cache=False).logits[:, :-1].float()
    log_q_BLV = student_BLV.log_softmax(-1)
    log_p_BLV = teacher_BLV.log_softmax(-1)
    target_BL = batch.x0_BL[:, 1:]
    ce_BL = -log_q_BLV.gather(-1, target_BL[..., None])[..., 0]
    shared = log_p_BLV.shape[-1]
    kd_BL = (log_p_BLV.exp() * (log_p_BLV - log_q_BLV[..., :shared])).sum(-1)
    share = OBJECTIVE.kd_lambda
    loss_BL = (1 - share) * ce_BL * batch.ce_weight_BL[:, 1:]
    loss_BL = loss_BL + share * kd_BL * batch.kd_weight_BL[:, 1:]
    return loss_BL.sum() / batch.denominator


SIDES: dict[str, Callable[[Setting], torch.Tensor]] = {"mdm": mdm_loss, "twin": twin_loss}


def require_linux() -> None:
    """Raise ConfigError where peak memory cannot be read."""
    require(sys.platform == "linux" or torch.cuda.is_available(), "peak memory is read from Linux")


def memory_in_fresh_process(side: str, settings: StepSettings, module: str = __name__) -> int:
    """Peak bytes of one step above what stood before it; `module` is run to measure it."""
    command = [sys.executable, "-m", module, side]
    environment = {
        **os.environ,
        # Freed tensors go back to the system at once, so that resident memory is what is in use.
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    result = subprocess.run(
        [*command, json.dumps(dataclasses.asdict(settings))],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise RuntimeError(f"the memory run of {side} failed: {result.stderr[-2000:]}")
    return int(result.stdout.split()[-1])


def open_step(side: str, settings: StepSettings) -> Step:
    """A step of this side, ready to be taken."""
    setting = make_setting(settings)
    return setting.denoiser, partial(SIDES[side], setting)


def step_memory(opened: Callable[[Settings], Step], settings: Settings) -> int:
    """Peak bytes of one step above what stood before it, in this process.

    What stands before includes weights, gradients and, after a first small step, thread pools and
    kernels: what is measured is what the step itself needs.
    """
    run_once(*opened(dataclasses.replace(settings, rows=1, length=32)))
    step = opened(settings)
    for parameter in step[0].parameters():
        parameter.grad = torch.empty_like(parameter).fill_(
            0.0
        )  # zeros_like would take no memory yet
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_once(*step)
        return torch.cuda.max_memory_allocated() - before
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak below
    run_once(*step)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024 - before


def describe(record: dict[str, Any]) -> str:
    """The card for people and, last, the record as one JSON line."""
    results, settings = record["results"], record["settings"]
    lines = [
        f"one distillation step: {settings['model']}, {settings['rows']} rows of"
        f" {settings['length']}, gradient checkpointing"
        f" {'on' if settings['checkpointing'] else 'off'}",
        f"{'':8}{'tokens/s':>10}{'seconds':>10}{'peak memory':>16}{'loss':>10}",
    ]
    for side in SIDES:
        r = results[side]
        lines.append(
            f"{side:8}{r['tokens_per_second']:>10.0f}{r['seconds']:>10.2f}"
            f"{r['activation_bytes'] / 2**20:>12.0f} MiB{r['loss']:>10.3f}"
        )
    lines.append(
        f"mdm / twin: memory {results['memory_ratio']:.2f}, time {results['time_ratio']:.2f}"
        f" ± {results['time_ratio_std_err']:.2f} (n={results['n']})"
    )
    return "\n".join([*lines, to_json(record)])


def std_err(values: list[float]) -> float:
    """Standard error of the mean; NaN for a single value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


if __name__ == "__main__":
    print(step_memory(partial(open_step, sys.argv[1]), StepSettings(**json.loads(sys.argv[2]))))
