"""Training checkpoints: weights, optimizer moments and weight average, exact to the bit.

    runs/<name>/checkpoints/step-000100/   shard-….safetensors state.json

Every process writes its part, whatever the number of processes and however the weights are shared out,
and any other arrangement can read it. Only what is trained is stored. A folder is written whole or not
at all, and never changed afterwards; state.json lists what belongs to it.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import nn

from mdm.checkpoint import replacing
from mdm.errors import CheckpointError, DataError

from . import processes
from .optimizer import WeightAverage

FORMAT = 2
STEP_FOLDER = re.compile(r"step-\d{6,}")
MOMENTS = ("exp_avg", "exp_avg_sq")
# The first part of a tensor's key; each has files of its own, which bounds the memory of writing.
PARTS = ("model", *MOMENTS, "ema")


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

    `data` identifies the rows trained on; `load_state` wants the same. A collective.
    Raises CheckpointError if writing fails.
    """
    target = folder / f"step-{step:06d}"
    tensors = {**_weights(model, average), **_moments(model, optimizer)}
    with _draft(target) as draft:
        _write(tensors, draft)
        if processes.rank() == 0:
            state = {
                "format": FORMAT,
                "step": step,
                "data": data,
                "processes": processes.world_size(),
                "tensors": _shapes(tensors),
                "files": _sizes(draft),
            }
            (draft / "state.json").write_text(json.dumps(state) + "\n", encoding="utf-8")
    if processes.rank() == 0:
        for old in saved_steps(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    processes.barrier()
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
    """Restore everything from one checkpoint; returns the number of finished steps. A collective.

    Raises CheckpointError if a file is missing or damaged or of another model, DataError if the data
    has changed.
    """
    with _naming_damage(path):
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if state.get("format", 1) != FORMAT:
            raise CheckpointError(
                f"the checkpoint {path} has format {state.get('format', 1)!r}; this version of mdm reads"
                f" format {FORMAT}: finish the run with the version it was started with, or start anew"
            )
        step, made_from, stored = int(state["step"]), str(state["data"]), dict(state["tensors"])
        _require_files(path, state["files"])
    if made_from != data:
        raise DataError(
            "the prepared data of this run are not those it was interrupted with, so it cannot be"
            " continued exactly; restore its data/ folder, or start a new run"
        )
    weights = _weights(model, average)
    _require_same(path, stored, _shapes(weights))
    moments = {
        f"{moment}/{name}": torch.zeros_like(parameter)
        for name, parameter in _trained(model).items()
        for moment in MOMENTS
        if f"{moment}/{name}" in stored
    }
    with _naming_damage(path):
        _read({**weights, **moments}, path)
    for name, parameter in model.named_parameters():
        if f"{MOMENTS[0]}/{name}" in moments:
            found = {moment: moments[f"{moment}/{name}"] for moment in MOMENTS}
            # AdamW counts its steps for each parameter; here they are those of the run.
            count = torch.tensor(float(step), device=parameter.device)
            optimizer.state[parameter] = {"step": count, **found}
    return step


# --- what is stored ---------------------------------------------------------------------------------


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def _weights(model: nn.Module, average: WeightAverage | None) -> dict[str, torch.Tensor]:
    tensors = {f"model/{name}": tensor for name, tensor in _trained(model).items()}
    if average is not None:
        tensors |= {f"ema/{name}": tensor for name, tensor in average.values.items()}
    return tensors


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state: Mapping[Any, Mapping[str, torch.Tensor]] = optimizer.state
    return {
        f"{moment}/{name}": state[parameter][moment]
        for name, parameter in model.named_parameters()
        for moment in MOMENTS
        if parameter in state
    }


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[int]]:
    return {key: list(tensor.shape) for key, tensor in tensors.items()}


def _sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in sorted(folder.glob("*.safetensors"))}


# --- checks -----------------------------------------------------------------------------------------


def _require_files(path: Path, files: Mapping[str, int]) -> None:
    """A file that is missing would leave part of the weights as they are."""
    found = _sizes(path)
    for name in sorted(files.keys() | found.keys()):
        size, wanted = found.get(name, 0), files.get(name, 0)
        if size != wanted:
            raise ValueError(f"{name} has {size} bytes instead of {wanted}")
        with safe_open(path / name, framework="pt"):  # raises if its header is damaged
            pass


def _require_same(
    path: Path, stored: Mapping[str, list[int]], wanted: Mapping[str, list[int]]
) -> None:
    """Raise CheckpointError unless the checkpoint has the weights that this run trains, and no others."""
    there = {key: shape for key, shape in stored.items() if key.startswith("model/")}
    there |= {key: stored[key] for key in wanted if key in stored}
    different = [key for key in {**there, **wanted} if there.get(key) != wanted.get(key)]
    if different:
        examples = ", ".join(
            f"{key} ({there.get(key, 'none')} there, {wanted.get(key, 'none')} here)"
            for key in different[:3]
        )
        raise CheckpointError(
            f"the checkpoint {path} is of another model or has no average: {len(different)} weights"
            f" differ, as {examples}; resume with the recipe it was made with, or start a new run"
        )


@contextlib.contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(
            f"the checkpoint {path} is damaged ({error}); delete it to resume from the one before"
        ) from error


# --- all processes together -------------------------------------------------------------------------


@contextlib.contextmanager
def _draft(target: Path) -> Iterator[Path]:
    """`replacing` for all processes: the first makes the folder and puts it into place."""
    if processes.rank() == 0:
        with replacing(target) as draft:
            yield Path(processes.from_first(str(draft)))
        return
    try:
        yield Path(processes.from_first(""))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {target}: {error}") from error


def _write(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    files = {key: 1 + PARTS.index(key.partition("/")[0]) for key in tensors}
    writer = dcp.HuggingFaceStorageWriter(
        str(folder), fqn_to_index_mapping=files, save_distributed=True
    )
    with _own_errors():
        dcp.save(tensors, storage_writer=writer, no_dist=not dist.is_initialized())


def _read(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Fill these tensors."""
    reader = dcp.HuggingFaceStorageReader(str(folder))
    with _own_errors():
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """Raise what went wrong itself, in every process, and do not remark that there may be but one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except dcp.api.CheckpointException as error:
            reason, _ = next(iter(error.failures.values()))
            raise reason from error
