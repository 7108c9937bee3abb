"""What a run shows and leaves behind: a live line, metrics.jsonl, TensorBoard if asked, loss.png."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from mdm.errors import ConfigError
from mdm.record import to_json


class Progress:
    """Sinks of one run; with several processes only the first one shows and writes anything."""

    def __init__(self, folder: Path, *, steps: int, first: int, active: bool, board: bool) -> None:
        self.steps, self.first, self.active = steps, first, active
        self.tokens = 0
        self.live = active and sys.stderr.isatty()
        self.path = folder / "metrics.jsonl"
        self.board = open_tensorboard(folder / "tensorboard", first) if active and board else None
        if active:
            keep_until(self.path, first)

    def step(self, step: int, metrics: dict[str, float], seconds: float) -> None:
        """Record a finished step (counted from 1), `seconds` after the first one of the session began."""
        self.tokens += int(metrics["tokens"])
        if not self.active:
            return
        rate = self.tokens / seconds
        memory = peak_memory_bytes()
        self._write({"step": step, **metrics, "tokens_per_second": rate, "memory_bytes": memory})
        left = seconds / (step - self.first) * (self.steps - step)
        line = (
            f"step {step}/{self.steps}  loss {metrics['loss']:.3f} (ce {metrics['ce']:.3f}"
            f" kd {metrics['kd']:.3f}{told_rollouts(metrics)})  lr {metrics['learning_rate']:.1e}"
            f"  {rate:.0f} tok/s  {memory / 2**30:.1f} GiB  ETA {clock(left)}"
        )
        if self.live:
            print(f"\r{line}\033[K", end="", file=sys.stderr, flush=True)
        elif step % max(1, self.steps // 20) == 0 or step == self.steps:
            print(line, file=sys.stderr, flush=True)

    def evaluation(self, step: int, summary: dict[str, Any]) -> None:
        """Record an evaluation after `step` steps."""
        if not self.active:
            return
        self._write({"step": step, "held_out": summary})
        self.say(
            f"held-out bound after {step} steps:"
            f" {summary['nelbo']:.3f} ± {summary['nelbo_std_err']:.3f} nats per token"
        )

    def say(self, text: str) -> None:
        """One line for people, below the live line."""
        if self.active:
            print(("\n" if self.live else "") + text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Flush the sinks."""
        if self.board is not None:
            self.board.close()

    def _write(self, entry: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(to_json(entry) + "\n")
        if self.board is not None:
            flat = {**entry, **entry.get("held_out", {})}
            for name, value in flat.items():
                if isinstance(value, (int, float)) and name != "step":
                    self.board.add_scalar(name, value, entry["step"])


def told_rollouts(metrics: dict[str, float]) -> str:
    """What is said of rollouts beside the losses; nothing if there are none."""
    names = {
        "on_policy": "on-policy",
        "target_agreed": "agreed",
        "rollout_tokens_per_forward": "tok/fwd",
    }
    told = [f" {name} {metrics[key]:.3f}" for key, name in names.items() if key in metrics]
    return "".join(told)


def open_tensorboard(folder: Path, first: int) -> Any:
    """A TensorBoard writer that hides events after step `first`; ConfigError without the package."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "train.tensorboard=true needs the package tensorboard; install mdm-code[tensorboard]"
            " or set train.tensorboard=false"
        ) from error
    return SummaryWriter(str(folder), purge_step=first + 1)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The entries of a metrics.jsonl; a last line cut short by a kill is left out."""
    return [entry for _, entry in _lines(path)]


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line, as it is and read, up to one that cannot be."""
    if not path.is_file():
        return
    # Not splitlines(): text has other line separators in it, which JSON leaves as they are.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            yield line, json.loads(line)
        except ValueError:
            return


def keep_until(path: Path, step: int) -> None:
    """Drop entries after `step`, all if it is 0: the run writes them again."""
    if not path.exists():
        return
    kept = [line for line, entry in _lines(path) if entry["step"] <= step] if step else []
    draft = path.with_suffix(".draft")
    draft.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(draft, path)


def plot_loss(metrics: Path, image: Path) -> bool:
    """Draw the loss and the held-out bound over steps; False if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    entries = read_metrics(metrics)
    steps = [e for e in entries if "loss" in e]
    bounds = [e for e in entries if "held_out" in e]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    parts = [name for name in ("kd", "on_policy") if any(e.get(name) for e in steps)]
    names = ["loss", *(["ce", *parts] if parts else [])]
    for name in names:
        axes.plot(
            [e["step"] for e in steps],
            [e.get(name, math.nan) for e in steps],
            label=f"train {name}",
            alpha=1.0 if name == "loss" else 0.5,
        )
    axes.errorbar(
        [e["step"] for e in bounds],
        [e["held_out"]["nelbo"] for e in bounds],
        yerr=[e["held_out"]["nelbo_std_err"] or 0.0 for e in bounds],  # none for a single row
        fmt="o-",
        capsize=3,
        color="black",
        label="held-out bound ± s.e.",
    )
    axes.set(xlabel="step", ylabel="nats per token", title=metrics.parent.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(image, dpi=120)
    return True


def peak_memory_bytes() -> int:
    """Largest device memory allocated so far, or on a CPU the resident memory of this process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return int(psutil.Process().memory_info().rss)


def clock(seconds: float) -> str:
    """1:05 or 2:03:04."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
