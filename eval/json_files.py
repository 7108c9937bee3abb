"""JSON and JSON Lines from disk; whatever is wrong is a DataError that names file and line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mdm.errors import DataError

Row = dict[str, Any]


def read_lines(path: str | Path) -> Iterator[tuple[str, Row]]:
    """("file, line n", object) of each line that is not blank; .gz is unpacked."""
    for number, line in enumerate(_read(Path(path)).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where} is not JSON: {error}") from error
        yield where, _object(where, row)


def read_list(path: str | Path) -> Iterator[tuple[str, Row]]:
    """("file, row n", object) of a file that holds one list of objects."""
    rows = _parse(path)
    if not isinstance(rows, list):
        raise DataError(f"{path} holds a {type(rows).__name__}; expected a list of objects")
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        yield where, _object(where, row)


def read_object(path: str | Path) -> Row:
    """The object that a file holds."""
    return _object(str(path), _parse(path))


def _parse(path: str | Path) -> object:
    try:
        return json.loads(_read(Path(path)))
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not JSON: {error}") from error


def _object(where: str, row: object) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object; got {type(row).__name__}")
    return row


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        return data.decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
