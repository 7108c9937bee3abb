"""Training checkpoints: weights, optimizer moments and weight average, exact to the bit.

    runs/<name>/checkpoints/step-000100/   model.safetensors optimizer.safetensors state.json [ema…]

Each folder is written whole or not at all, and never changed afterwards.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mdm.checkpoint import replacing
from mdm.errors import CheckpointError, DataError

from .optimizer import WeightAverage

STEP_FOLDER = re.compile(r"step-\d{6,}")
MOMENTS = ("exp_avg", "exp_avg_sq")


def save_state(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None,
    *,
    data: str,
    keep: int,
) -> Path:
    """Write `folder/step-…` after `step` finished steps and remove all but the newest `keep`.

    `data` identifies the rows trained on; `load_state` wants the same.
    """
    target = folder / f"step-{step:06d}"
    with replacing(target) as draft:
        save_file(_named(model), draft / "model.safetensors")
        save_file(_moments(model, optimizer), draft / "optimizer.safetensors")
        if average is not None:
            save_file(average.values, draft / "ema.safetensors")
        (draft / "state.json").write_text(json.dumps({"step": step, "data": data}) + "\n")
    for old in saved_steps(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def saved_steps(folder: Path) -> list[Path]:
    """The finished checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if STEP_FOLDER.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def load_state(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None,
    *,
    data: str,
) -> int:
    """Restore everything from one checkpoint; returns the number of finished steps.

    Raises CheckpointError if a file is missing or damaged, DataError if the data has changed.
    """
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        step, made_from = int(state["step"]), str(state["data"])
        _copy_into(_named(model), load_file(path / "model.safetensors"))
        if step > 0:
            _restore_moments(model, optimizer, load_file(path / "optimizer.safetensors"))
        if average is not None:
            _copy_into(average.values, load_file(path / "ema.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"the checkpoint {path} is damaged ({error}); delete it to resume from the one before"
        ) from error
    if made_from != data:
        raise DataError(
            "the prepared data of this run are not those it was interrupted with, so it cannot be"
            " continued exactly; restore its data/ folder, or start a new run"
        )
    return step


def _named(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state: Mapping[Any, Mapping[str, torch.Tensor]] = optimizer.state
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = value
    return tensors


def _restore_moments(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]
) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        optimizer.state[parameter] = {
            key: tensors[f"{key}/{name}"].to(parameter.device) for key in (*MOMENTS, "step")
        }


@torch.no_grad()
def _copy_into(target: Mapping[str, torch.Tensor], source: Mapping[str, torch.Tensor]) -> None:
    if {n: t.shape for n, t in target.items()} != {n: t.shape for n, t in source.items()}:
        raise ValueError("it holds other parameters than this model")
    for name, tensor in target.items():
        tensor.copy_(source[name])
