"""Arrays on disk that are written bit by bit and read by memory map. Nothing is pickled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


class GrowingArray:
    """A .npy file that grows along its first axis. Until close() it counts as empty."""

    def __init__(self, path: Path, kind: str, shape: tuple[int, ...] = ()) -> None:
        self.length = 0
        self._kind, self._shape = kind, shape
        # Open until close(), hence no `with`.
        self._file = open(path, "wb")  # noqa: SIM115
        self._write_header()

    def append(self, values: npt.NDArray[Any]) -> None:
        """Add entries; all but the first axis as given at the start."""
        assert values.shape[1:] == self._shape, "another shape than the entries before"
        self._file.write(values.astype(self._kind).tobytes())
        self.length += len(values)

    def close(self) -> None:
        """Write the final number of entries."""
        with self._file:
            self._write_header()

    def _write_header(self) -> None:
        """(Re)write the header in place: numpy leaves room in it for the first axis to grow."""
        self._file.seek(0)
        np.lib.format.write_array_header_1_0(
            self._file,
            {
                "descr": self._kind,
                "fortran_order": False,
                "shape": (self.length, *self._shape),
            },
        )
