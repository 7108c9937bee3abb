"""Ask a teacher once about every maskable position of the training rows, and keep its answers.

Shard by shard, each written whole or not at all, so an interrupted cache goes on with any number of
processes. A shard is asked for by one process in batches that start with the shard: its bytes do not
depend on interruptions or on the number of processes. Works alone or under `torchrun`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from mdm.errors import CheckpointError, ConfigError, TrainingError

from . import processes
from .arrays import GrowingArray
from .dataset import PreparedData
from .masking import MaskedBatch
from .recipe import Recipe
from .rows import Rows
from .run import initial_vocab, prepare_data
from .sharding import check_sharding
from .supervision import Ask, bind, open_teacher
from .target_bytes import encode, no_answer
from .target_cache import (
    CACHE_FILE,
    Manifest,
    TargetCache,
    check_cacheable,
    data_identity,
    read_manifest,
    require_same,
    rows_of_a_shard,
    settings_identity,
)
from .targets import Measured, SoftTargets
from .trainer import stop_signals

DATA = "data"
_TELL_EVERY = 10.0  # seconds


@dataclasses.dataclass(frozen=True)
class Cached:
    """What a call has made. `seconds`, `asked` (tokens) and `measures` are of this call alone."""

    cache: TargetCache
    tokens: int
    maskable: int
    bytes: int
    seconds: float
    asked: int
    measures: dict[str, float]


def cache_targets(
    recipe: Recipe,
    folder: Path,
    *,
    batch_rows: int | None = None,
    overwrite: bool = False,
    made_by: Sequence[str] = (),
    tell: Callable[[str], None] = lambda text: None,
) -> Cached:
    """Write the targets of a recipe's training rows to `folder`, or those that are missing there.

    The rows are prepared in folder/data. `batch_rows` rows are asked for at once (train.micro_rows);
    `made_by` are the options that say how to go on. SIGINT and SIGTERM stop it after the current batch.
    Raises ConfigError if the folder holds targets made from something else, or other things;
    CheckpointError if they cannot be written; TrainingError when stopped.
    """
    recipe = dataclasses.replace(recipe, target=dataclasses.replace(recipe.target, cache=""))
    check_cacheable(recipe)
    check_sharding(recipe)
    batch_rows = batch_rows or recipe.train.micro_rows
    first = processes.rank() == 0
    identity = settings_identity(recipe) if first else {}
    if first:
        _open_folder(folder, identity, overwrite)
    processes.barrier()
    vocab = initial_vocab(recipe)
    teacher = open_teacher(recipe, vocab)
    data = prepare_data(recipe, vocab, folder, teacher.vocab if teacher else None)
    ask = bind(recipe, teacher, vocab, data)
    assert ask is not None, "check_cacheable wants a teacher"
    if first:
        _write_manifest(folder, identity | data_identity(data), data, made_by, batch_rows)
    processes.barrier()
    manifest = read_manifest(folder)
    assert manifest is not None, "the first process wrote it"
    cache = TargetCache(folder, manifest)
    missing = cache.missing()
    _require_room(cache, len(missing))
    processes.barrier()  # nobody writes before all have seen what is missing
    work = _Work(ask, data.train, batch_rows, tell)
    with stop_signals() as signals:
        for shard in _share(missing, processes.rank()):
            work.write(cache, shard, signals)
    if recipe.train.sharding == "full":  # then the teacher answers only if all processes ask
        work.ask_along(_asks(cache, missing, batch_rows))
    asked, measures = work.totals()  # waits for all
    counts = data.manifest["splits"]["train"]
    return Cached(
        cache,
        tokens=counts["tokens"],
        maskable=counts["maskable_tokens"],
        bytes=sum(cache.path(shard).stat().st_size for shard in range(cache.num_shards)),
        seconds=time.monotonic() - work.began,
        asked=asked,
        measures=measures,
    )


class _Work:
    """Asking and writing, with what is counted on the way."""

    def __init__(
        self,
        ask: Ask,
        rows: Rows,
        batch_rows: int,
        tell: Callable[[str], None],
    ) -> None:
        self._ask, self._rows, self._batch_rows = ask, rows, batch_rows
        self._tell, self._measured, self._tokens, self._asked = tell, Measured(), 0, 0
        self.began = self._told = time.monotonic()

    def write(self, cache: TargetCache, shard: int, signals: Sequence[int]) -> None:
        """Ask for the rows of a shard and write it."""
        path, rows = cache.path(shard), cache.rows(shard)
        draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
        try:
            with contextlib.closing(GrowingArray(draft, "|u1", cache.row_shape)) as array:
                for first in range(rows.start, rows.stop, self._batch_rows):
                    chosen = range(first, min(first + self._batch_rows, rows.stop))
                    bytes_BLW = self._answers(chosen, cache.row_shape)
                    array.append(bytes_BLW.numpy())
                    self._progress(cache, shard)
                    if signals:
                        raise TrainingError(
                            f"stopped by a signal at shard {shard + 1} of {cache.num_shards}; go on"
                            f" with `{cache.command}`"
                        )
            with open(draft, "rb") as stream:
                os.fsync(stream.fileno())  # on the disk before its name counts
            os.replace(draft, path)
        except OSError as error:
            raise CheckpointError(
                f"cannot write {path}: {error}; free space and run `{cache.command}`"
            ) from error
        finally:
            draft.unlink(missing_ok=True)

    def _answers(self, rows: range, shape: tuple[int, int]) -> torch.Tensor:
        """(B, L, W) bytes of these rows."""
        batch = all_maskable(self._rows, rows)
        with torch.no_grad():
            targets = self._ask(batch.to(processes.device()), None)
        assert isinstance(targets, SoftTargets), "only distributions are cached"
        self._asked += 1
        self._measured.add(targets)
        self._tokens += batch.num_tokens
        top_k = (shape[1] - 4) // 6
        bytes_BLW = no_answer(top_k).expand(len(rows), *shape).clone()
        bytes_BLW[batch.distilled_BL] = encode(targets, top_k)
        return bytes_BLW

    def _progress(self, cache: TargetCache, shard: int) -> None:
        now = time.monotonic()
        if now - self._told >= _TELL_EVERY:
            self._told = now
            speed = self._tokens / (now - self.began)
            self._tell(f"shard {shard + 1} of {cache.num_shards}, {speed:.0f} tokens/s a process")

    def ask_along(self, asks: int) -> None:
        """Ask for nothing in particular until all processes have asked this often."""
        batch = all_maskable(self._rows, [0]).to(processes.device())
        with torch.no_grad():
            while self._asked < asks:
                self._ask(batch, None)
                self._asked += 1

    def totals(self) -> tuple[int, dict[str, float]]:
        """Tokens asked for and mean measures, over all processes, when all are done."""
        device = processes.device()
        asked = torch.tensor(float(self._tokens), dtype=torch.float64, device=device)
        return int(processes.total(asked)), self._measured.means(device)


def _share(shards: list[int], rank: int) -> list[int]:
    """The shards that a process makes."""
    return shards[rank :: processes.world_size()]


def _asks(cache: TargetCache, missing: list[int], batch_rows: int) -> int:
    """How often the busiest process asks the teacher."""
    return max(
        sum(-(-len(cache.rows(shard)) // batch_rows) for shard in _share(missing, rank))
        for rank in range(processes.world_size())
    )


def all_maskable(data: Rows, rows: Sequence[int]) -> MaskedBatch:
    """Rows as a batch in which every maskable position is masked and asked for."""
    tokens_BL, document_ids_BL, maskable_BL, _ = data.batch(rows)
    nothing_BL = torch.zeros(tokens_BL.shape)
    return MaskedBatch(
        x0_BL=tokens_BL,
        xt_BL=tokens_BL,  # no student looks at it
        document_ids_BL=document_ids_BL,
        maskable_BL=maskable_BL,
        masked_BL=maskable_BL,
        distilled_BL=maskable_BL,
        ce_weight_BL=nothing_BL,
        kd_weight_BL=nothing_BL,
        level_BL=nothing_BL,
        denominator=1.0,
        kd_denominator=1.0,
        keys=tuple((row,) for row in rows),
        rows=tuple(rows),
    )


def _open_folder(folder: Path, identity: Mapping[str, Any], overwrite: bool) -> None:
    """Make the folder, or check that it holds targets of the same settings; clean up after kills."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make the folder {folder}: {error}") from error
    for draft in (*folder.glob(".targets-*.draft"), *folder.glob(f".{CACHE_FILE}.*.draft")):
        owner = draft.name.split(".")[-2]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            draft.unlink()
    shards = sorted(folder.glob("targets-*.npy"))
    if overwrite:
        for file in (folder / CACHE_FILE, *shards):
            file.unlink(missing_ok=True)
        shards = []
    manifest = read_manifest(folder)
    if manifest is not None:
        _require_same(folder, manifest, identity)
    elif shards:
        raise ConfigError(
            f"{folder} holds targets without {CACHE_FILE}, so it is not known what they were made from;"
            " give another --output, or --overwrite"
        )
    elif others := [n.name for n in folder.iterdir() if n.name != DATA and n.name[0] != "."]:
        raise ConfigError(
            f"{folder} holds other things ({', '.join(sorted(others)[:3])}); give an empty or new folder"
            " with --output"
        )


def _write_manifest(
    folder: Path,
    identity: Mapping[str, Any],
    data: PreparedData,
    made_by: Sequence[str],
    batch_rows: int,
) -> None:
    manifest = read_manifest(folder)
    if manifest is not None:
        _require_same(folder, manifest, identity)
        return
    shard_rows = rows_of_a_shard(
        len(data.train), data.train.length, identity["target.top_k"], batch_rows
    )
    Manifest(identity, shard_rows, tuple(made_by)).write(folder)


def _require_same(folder: Path, manifest: Manifest, identity: Mapping[str, Any]) -> None:
    require_same(
        folder, manifest.identity, identity, "give another --output, or --overwrite to replace them"
    )


def _require_room(cache: TargetCache, shards: int) -> None:
    """Raise CheckpointError if the missing shards do not fit on the disk."""
    length, size = cache.row_shape
    needed = min(shards * cache.manifest.shard_rows, cache.num_rows) * length * size
    free = shutil.disk_usage(cache.folder).free
    if needed > free:
        raise CheckpointError(
            f"the targets need {needed / 2**30:.1f} GiB, but {cache.folder} has {free / 2**30:.1f} GiB"
            " free; lower target.top_k or data.max_tokens, or give another --output"
        )
