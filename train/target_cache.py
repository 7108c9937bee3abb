"""A teacher's answers on disk, for targets that do not depend on the masks.

A causal pass over clean text says the same of a position whatever is masked, so it is asked once for
every maskable position of every row, for all epochs. A folder holds `cache.json` (what the answers were
made from) and shards of some rows each, targets-00000.npy, …: uint8 of shape (rows, L, W), read by memory
map; the W bytes of a token are those of target_bytes.py.
Shapes: B batch, L length, N positions, K kept tokens, W bytes of a token.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from mdm.checkpoint import config_hash, load_config, load_vocab, source_identity
from mdm.config import to_tree
from mdm.denoiser import Denoiser
from mdm.errors import CheckpointError, ConfigError, DataError

from . import processes
from .dataset import reader_identity
from .target_bytes import decode, width
from .targets import SoftTargets
from .teachers.mapped import CONDITIONED_ON

if TYPE_CHECKING:
    from .dataset import PreparedData
    from .masking import MaskedBatch
    from .recipe import Recipe

# Kinds whose answers are the same for all masks, and what they are conditioned on.
MASK_FREE = {"left": "left", "mapped": CONDITIONED_ON}
CACHE_FILE = "cache.json"
FORMAT = 1
BY_WEIGHTS = "weights:"  # teacher.model=weights:HASH, where the teacher's files are not at hand
WEIGHTS = "the teacher's weights"  # a name in an identity
_SAME_ANSWERS = {"model", "offload"}  # of the teacher's settings; the weights stand for `model`

_SHARD_BYTES = 2**28
_SHARDS = 64  # of a small cache: so many can be interrupted and shared out without much loss
_MIN_SHARD_ROWS = 8

Bytes = npt.NDArray[np.uint8]


# --- what a cache was made from ------------------------------------------------------------------


def check_cacheable(recipe: Recipe) -> None:
    """Raise ConfigError if the answers to this recipe depend on the masks, or there are none."""
    target = recipe.target
    if not recipe.objective.distils:
        raise ConfigError(
            "objective.kd_lambda is 0: no teacher is asked, there is nothing to cache"
        )
    if target.kind not in MASK_FREE:
        raise ConfigError(
            f"target.kind={target.kind} has other answers for other masks, so they cannot be cached;"
            f" leave target.cache empty, or set target.kind to one of {', '.join(MASK_FREE)}"
        )
    if target.top_k == 0:
        raise ConfigError(
            "target.top_k=0 keeps whole distributions, which are too large for a cache; set target.top_k"
            " to 1 or more"
        )
    if target.infill:
        raise ConfigError(
            f"target.infill={target.infill} shows the teacher the masks' places, so its answers cannot"
            " be cached; leave target.cache or target.infill empty"
        )


def settings_identity(recipe: Recipe) -> dict[str, Any]:
    """What of a cache can be told before there is any data, by the names that users know.

    A teacher that is named by its weights (BY_WEIGHTS) is not looked at. Raises CheckpointError if the
    teacher is not found.
    """
    target, teacher = recipe.target, to_tree(recipe.teacher)
    for name in _SAME_ANSWERS & teacher.keys():
        del teacher[name]
    return {
        WEIGHTS: _weights(recipe.teacher.model),
        **_beside_the_weights(recipe.teacher.model),
        **{f"teacher.{name}": value for name, value in teacher.items()},
        "target.kind": target.kind,
        "target.top_k": target.top_k,
        "target.top_p": target.top_p,
        "objective.kd_temperature": recipe.objective.kd_temperature,
        **{f"data.{name}": value for name, value in to_tree(recipe.data).items()},
    }


def data_identity(data: PreparedData) -> dict[str, Any]:
    """What the rows were made from, but for the settings; with a teacher's reading they are the same."""
    made_from = data.manifest["made_from"]
    return {
        "the format of rows": made_from["format"],
        "the student's tokens": json.dumps(made_from["vocab"], sort_keys=True),
        "the files of data.sources": made_from["sources_state"],
        "rows": len(data.train),
    }


def _weights(model: str) -> str:
    if model.startswith(BY_WEIGHTS):
        return model.removeprefix(BY_WEIGHTS)
    return source_identity(model)


def _beside_the_weights(model: str) -> dict[str, str]:
    """What else of the teacher's files the answers depend on; not known of one named by its weights."""
    if model.startswith(BY_WEIGHTS):
        return {}
    reader = json.dumps(reader_identity(load_vocab(model)), sort_keys=True)
    return {
        "the teacher's config": config_hash(load_config(model)),
        "the teacher's tokenizer": hashlib.sha256(reader.encode()).hexdigest()[:16],
    }


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The contents of cache.json.

    identity    what the answers were made from; see settings_identity and data_identity
    shard_rows  rows in a shard; the last one may have fewer
    made_by     the options of `mdm data cache-targets`
    """

    identity: Mapping[str, Any]
    shard_rows: int
    made_by: Sequence[str] = ()
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        """Write cache.json, whole or not at all."""
        draft = folder / f".{CACHE_FILE}.{os.getpid()}.draft"
        draft.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")
        os.replace(draft, folder / CACHE_FILE)


def read_manifest(folder: Path) -> Manifest | None:
    """What cache.json in a folder says; None if there is none. Raises DataError if it is damaged."""
    try:
        text = (folder / CACHE_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {folder / CACHE_FILE}: {error}") from error
    try:
        found = json.loads(text)
        if found["format"] != FORMAT:
            raise DataError(
                f"{folder / CACHE_FILE} has format {found['format']!r}; this version of mdm reads"
                f" format {FORMAT}: make the targets anew with --overwrite"
            )
        return Manifest(**{f.name: found[f.name] for f in dataclasses.fields(Manifest)})
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder / CACHE_FILE} is damaged; make the targets anew with --overwrite"
        ) from error


def require_same(folder: Path, made: Mapping[str, Any], asked: Mapping[str, Any], out: str) -> None:
    """Raise ConfigError naming what a cache was made from that is not what is asked for.

    `out` is the way out. Only what `asked` names is compared.
    """
    differ = [name for name in asked if made.get(name) != asked[name]]
    if differ:
        shown = "; ".join(f"{n} {_short(made.get(n))}, now {_short(asked[n])}" for n in differ[:3])
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise ConfigError(f"the targets in {folder} were made with {shown}{more}; {out}")


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:28]}…{text[-28:]}"


# --- reading -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TargetCache:
    """The shards of a folder, whole or not."""

    folder: Path
    manifest: Manifest

    @property
    def num_rows(self) -> int:
        """Rows of the training data."""
        return int(self.manifest.identity["rows"])

    @property
    def row_shape(self) -> tuple[int, int]:
        """(L, W)"""
        identity = self.manifest.identity
        return int(identity["data.length"]), width(int(identity["target.top_k"]))

    @property
    def num_shards(self) -> int:
        """Shards of the complete cache."""
        return -(-self.num_rows // self.manifest.shard_rows)

    @property
    def command(self) -> str:
        """The command line that makes what is missing."""
        output = ["--output", str(self.folder)]
        return shlex.join(["mdm", "data", "cache-targets", *self.manifest.made_by, *output])

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.folder / f"targets-{shard:05d}.npy"

    def rows(self, shard: int) -> range:
        """The rows of a shard."""
        first = shard * self.manifest.shard_rows
        return range(first, min(first + self.manifest.shard_rows, self.num_rows))

    def missing(self) -> list[int]:
        """Shards that are not there, or not of the right form."""
        return [shard for shard in range(self.num_shards) if self._mapped(shard) is None]

    def require_complete(self) -> None:
        """Raise DataError naming the shards that are missing or damaged."""
        missing = self.missing()
        if missing:
            some = missing[:4]
            damaged = [self.path(shard).name for shard in some if self.path(shard).exists()]
            raise DataError(
                f"{self.folder} lacks {len(missing)} of {self.num_shards} shards ("
                + ", ".join(self.path(shard).name for shard in some)
                + (", …" if len(missing) > len(some) else "")
                + (f"; damaged: {', '.join(damaged)}" if damaged else "")
                + f"); make them with `{self.command}`"
            )

    def read(self, row_N: npt.NDArray[np.int64], column_N: npt.NDArray[np.int64]) -> Bytes:
        """(N, W) the bytes of tokens, by row of the training data and place in the row."""
        found_NW = np.empty((len(row_N), self.row_shape[1]), np.uint8)
        shard_N = row_N // self.manifest.shard_rows
        for shard in np.unique(shard_N).tolist():
            # Mapped anew each time: an open map holds a file descriptor, and there may be thousands.
            array = self._mapped(shard)
            if array is None:
                raise DataError(f"{self.path(shard)} is missing or damaged; run `{self.command}`")
            here_N = shard_N == shard
            found_NW[here_N] = array[row_N[here_N] - self.rows(shard).start, column_N[here_N]]
        return found_NW

    def answer(
        self, row_N: npt.NDArray[np.int64], column_N: npt.NDArray[np.int64], num_tokens: int
    ) -> SoftTargets:
        """The teacher's answer for these positions, on the CPU.

        Raises DataError if it names tokens that the student, which has `num_tokens`, has not.
        """
        ids_NK, log_probs_NK, tail_N = decode(torch.from_numpy(self.read(row_N, column_N)))
        wrong_N = (ids_NK >= num_tokens).any(-1).numpy()
        if wrong_N.any():
            path = self.path(int(row_N[wrong_N][0]) // self.manifest.shard_rows)
            raise DataError(
                f"{path} is damaged: it names tokens that the student has not; delete it and run"
                f" `{self.command}`"
            )
        identity = self.manifest.identity
        temperature, kind = identity["objective.kd_temperature"], identity["target.kind"]
        return SoftTargets(ids_NK, log_probs_NK, tail_N, temperature, MASK_FREE[kind])

    def _mapped(self, shard: int) -> Bytes | None:
        try:
            array = np.load(self.path(shard), mmap_mode="r", allow_pickle=False)
        except (FileNotFoundError, ValueError, EOFError):
            return None  # ValueError: cut short
        except OSError as error:  # there, but not for us
            raise DataError(f"cannot read {self.path(shard)}: {error}") from error
        right = array.dtype == np.uint8 and array.shape == (len(self.rows(shard)), *self.row_shape)
        return array if right else None


def rows_of_a_shard(num_rows: int, length: int, top_k: int, batch_rows: int) -> int:
    """Rows in a shard: `_SHARDS` of a small cache, at least a batch, none above `_SHARD_BYTES`."""
    most = max(1, _SHARD_BYTES // (length * width(top_k)))
    return min(most, max(_MIN_SHARD_ROWS, batch_rows, -(-num_rows // _SHARDS)))


def cached_answers(
    recipe: Recipe, data: PreparedData, num_tokens: int
) -> Callable[[MaskedBatch, Denoiser | None], SoftTargets]:
    """How a step reads its targets from the folder target.cache; the student has `num_tokens`.

    Raises ConfigError if the folder is no cache or was made from something else than the run's rows,
    teacher and settings; DataError if it is incomplete; CheckpointError if the teacher's files, which
    it is compared with, are not there.
    """
    check_cacheable(recipe)
    folder = Path(recipe.target.cache)
    manifest = read_manifest(folder)
    if manifest is None:
        raise ConfigError(
            f"target.cache={folder} holds no targets; make them with `mdm data cache-targets --recipe"
            f" … --output {folder}` and the same settings"
        )
    if processes.rank() == 0:  # one process is enough: hashing a large teacher takes a minute
        _require_made_for(recipe, data, folder, manifest)
    cache = TargetCache(folder, manifest)
    cache.require_complete()

    def ask(batch: MaskedBatch, _student: Denoiser | None) -> SoftTargets:
        assert len(batch.rows) == len(batch.x0_BL), "rows of the training data"
        place_N, column_N = batch.distilled_BL.cpu().numpy().nonzero()
        row_N = np.asarray(batch.rows, np.int64)[place_N]
        found, device = cache.answer(row_N, column_N, num_tokens), batch.x0_BL.device
        return dataclasses.replace(
            found,
            token_ids_NK=found.token_ids_NK.to(device),
            log_probs_NK=found.log_probs_NK.to(device),
            tail_mass_N=found.tail_mass_N.to(device),
        )

    return ask


def _require_made_for(recipe: Recipe, data: PreparedData, folder: Path, manifest: Manifest) -> None:
    try:
        asked = settings_identity(recipe) | data_identity(data)
    except CheckpointError as error:
        raise CheckpointError(
            f"the targets in {folder} are compared with teacher.model={recipe.teacher.model}, which"
            f" cannot be read ({error}); if it is elsewhere, name it by its weights: --set"
            f" teacher.model={BY_WEIGHTS}{manifest.identity.get(WEIGHTS)}"
        ) from error
    out = (
        "make others for this recipe with --output, or leave target.cache empty to ask the teacher"
    )
    require_same(folder, manifest.identity, asked, out)
