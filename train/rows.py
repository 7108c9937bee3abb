"""Rows on disk: memory-mapped arrays, the batches read from them, and the order of reading.

A folder holds tokens.npy, document_ids.npy, maskable.npy and classes.npy, each (N, L). Nothing is
pickled.
Shapes: N rows, B batch, L length.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mdm.errors import DataError

from .arrays import GrowingArray
from .packing import Row

# Row fields in order. Little-endian, whatever the machine, so that a folder can be moved.
_ARRAYS = {"tokens": "<i4", "document_ids": "<i4", "maskable": "|b1", "classes": "|u1"}
_BLOCK = 512


class RowBatch(NamedTuple):
    """Rows for one step: ids (long), segment numbers (long, -1 = padding), maskable (bool), classes
    of tokens (uint8, places in weighting.CLASSES)."""

    tokens_BL: torch.Tensor
    document_ids_BL: torch.Tensor
    maskable_BL: torch.Tensor
    classes_BL: torch.Tensor


class RowWriter:
    """Writes rows to a folder, holding at most a block of them in memory."""

    def __init__(self, folder: Path, length: int) -> None:
        folder.mkdir(exist_ok=True)
        self.num_rows = 0
        self._pending: list[tuple[Any, ...]] = []
        self._arrays = [
            GrowingArray(folder / f"{name}.npy", kind, (length,)) for name, kind in _ARRAYS.items()
        ]

    def append(self, row: Row) -> None:
        """Add one row of the length given at the start."""
        self._pending.append(row[: len(_ARRAYS)])
        self.num_rows += 1
        if len(self._pending) == _BLOCK:
            self._write_pending()

    def close(self) -> None:
        """Write what is pending and the final number of rows. Without this the folder is empty."""
        try:
            self._write_pending()
        finally:
            for array in self._arrays:
                array.close()

    def _write_pending(self) -> None:
        if self._pending:
            for array, column in zip(self._arrays, zip(*self._pending, strict=True), strict=True):
                array.append(np.stack(column))
        self._pending = []


class Rows:
    """The rows of a folder, read from disk as they are asked for.

    Raises DataError if an array is missing, cut short or of another form.
    """

    def __init__(self, folder: Path) -> None:
        self._arrays = [_mapped(folder / f"{name}.npy", kind) for name, kind in _ARRAYS.items()]
        shapes = {array.shape for array in self._arrays}
        if len(shapes) != 1:
            raise DataError(f"the arrays in {folder} differ in shape: {sorted(shapes)}")
        self._num_rows, self.length = shapes.pop()

    def __len__(self) -> int:
        return int(self._num_rows)

    def batch(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> RowBatch:
        """The rows at `indices`, in that order, as new tensors."""
        index_B = np.asarray(indices, dtype=np.int64)
        tokens, document_ids, maskable, classes = (
            torch.from_numpy(np.asarray(array[index_B])) for array in self._arrays
        )
        return RowBatch(tokens.long(), document_ids.long(), maskable, classes)


def sample_indices(num_rows: int, seed: int, start: int, count: int) -> npt.NDArray[np.int64]:
    """Which rows are samples start … start+count-1 of a run; every row comes once in an epoch.

    A pure function of its arguments, so a run resumes exactly, with any number of processes.
    """
    assert num_rows > 0, "no rows to sample from"
    sample = np.arange(start, start + count, dtype=np.int64)
    epochs, places = np.divmod(sample, num_rows)
    result = np.empty_like(sample)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        result[chosen] = _permutation(num_rows, seed, int(epoch))[places[chosen]]
    return result


@functools.lru_cache(maxsize=2)  # a batch may span two epochs
def _permutation(num_rows: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Sorted raw Philox output: numpy promises that stream for ever, but not its shuffles."""
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(num_rows), kind="stable")


def _mapped(path: Path, kind: str) -> npt.NDArray[Any]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"cannot read the rows in {path}: {error}; prepare the data again"
        ) from error
    if array.ndim != 2 or array.dtype != np.dtype(kind):
        raise DataError(f"{path} holds {array.ndim}-D {array.dtype}; expected 2-D {kind}")
    return array
