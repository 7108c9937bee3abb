"""Rows of teacher text on disk while they are written: parts that survive an interruption, then one file.

OUTPUT.part (of several processes: OUTPUT.part-RANK) begins with a line that says what its rows were
made from; then comes one finished row a line. A last line without its end was being written when the
process died, and counts as nothing. All processes must see the same folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from mdm.errors import ConfigError, DataError

from . import processes

Key = tuple[int, int]  # number of the document, number of the sample


class StoredRow(NamedTuple):
    """Where a finished row is, and what a summary needs of it."""

    key: Key
    path: Path
    offset: int
    size: int
    log_prob: float
    tokens: int
    cut: bool
    same_tokens: bool
    empty: bool


def part_files(output: Path) -> list[Path]:
    """The files with the rows that are finished so far."""
    form = re.compile(re.escape(output.name) + r"\.part(-\d+)?")
    return sorted(path for path in output.parent.iterdir() if form.fullmatch(path.name))


def stored_rows(output: Path) -> dict[Key, StoredRow]:
    """The finished rows of all parts. Raises DataError naming a line that is damaged."""
    return {row.key: row for path in part_files(output) for row in _rows_of(path)}


def make_way(output: Path, made_from: Mapping[str, Any], overwrite: bool) -> None:
    """Raise ConfigError if the output exists or its parts were made from something else.

    With `overwrite` such parts are removed; an old output stays until the new one is complete.
    """
    if output.exists() and not overwrite:
        raise ConfigError(f"{output} exists; add --overwrite, or choose another --output")
    begun = [(path, _header(path)) for path in part_files(output)]
    stale = [(path, there) for path, there in begun if there is not None and there != made_from]
    if stale and not overwrite:
        path, there = stale[0]
        raise ConfigError(
            f"{path} was begun with other settings: {_differences(there, made_from)}. Repeat them to"
            " go on with it, add --overwrite to start over, or choose another --output"
        )
    processes.barrier()  # all have looked before anything is removed
    if processes.rank() == 0:
        for path, _ in stale:
            path.unlink()
    processes.barrier()


class Part:
    """The part of this process: made by its first row, continued behind the last whole one."""

    def __init__(self, output: Path, made_from: Mapping[str, Any]) -> None:
        alone = processes.world_size() == 1
        own = f"{output.name}.part" if alone else f"{output.name}.part-{processes.rank()}"
        self._path, self._made_from = output.with_name(own), made_from
        self._stream: BinaryIO | None = None

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row so that it survives the end of this process."""
        if self._stream is None:
            self._stream = open(self._path, "ab+")  # noqa: SIM115 (closed by close)
            self._stream.seek(0)
            whole = sum(len(line) for line in self._stream if line.endswith(b"\n"))
            self._stream.truncate(whole)
            if not whole:
                self._stream.write(_line({"made_from": self._made_from}))
        self._stream.write(_line(row))
        self._stream.flush()

    def close(self) -> None:
        """Close the file, if there is one."""
        if self._stream is not None:
            self._stream.close()


def merge(output: Path, rows: Sequence[StoredRow]) -> None:
    """Copy the rows into `output`, which appears whole, and remove the parts."""
    draft = output.with_name(f".{output.name}.{os.getpid()}.draft")
    try:
        with contextlib.ExitStack() as files, open(draft, "wb") as stream:
            parts = {path: files.enter_context(open(path, "rb")) for path in part_files(output)}
            for row in rows:
                parts[row.path].seek(row.offset)
                stream.write(parts[row.path].read(row.size))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, output)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()
    for path in part_files(output):
        path.unlink()


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def _header(path: Path) -> dict[str, Any] | None:
    """What the rows of a part were made from ({} if that is not said); None if it has no rows yet."""
    with open(path, "rb") as stream:
        line = stream.readline()
    if not line.endswith(b"\n"):
        return None
    try:
        found = json.loads(line)["made_from"]
    except (ValueError, TypeError, KeyError):
        return {}
    return found if isinstance(found, dict) else {}


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    return ", ".join(f"{name} {there.get(name)!r} (now {here.get(name)!r})" for name in names)


def _rows_of(path: Path) -> Iterator[StoredRow]:
    offset = 0
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.endswith(b"\n"):
                return
            if number > 1:
                yield _stored_row(path, offset, line, number)
            offset += len(line)


def _stored_row(path: Path, offset: int, line: bytes, number: int) -> StoredRow:
    try:
        row = json.loads(line)
        text = row["response"] if "response" in row else row["messages"][-1]["content"]
        return StoredRow(
            key=(row["index"], row["sample"]),
            path=path,
            offset=offset,
            size=len(line),
            log_prob=row["log_prob"],
            tokens=len(row["token_ids"]),
            cut=row["cut"],
            same_tokens=row["same_tokens"],
            empty=not text.strip(),
        )
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise DataError(
            f"{path}, line {number} is damaged ({error!r}); remove the line, or the file to start"
            " over"
        ) from error
