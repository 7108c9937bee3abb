"""What a model has answered so far, on disk, so that an interrupted evaluation goes on.

One JSON line an answer, keyed by a hash of everything that decides it: model, weights, settings and
the request itself. Another model or other settings have other keys, so nothing can be mixed up.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from mdm.errors import DataError
from mdm.record import to_json


def key_of(*parts: Any) -> str:
    """Hash of plain values (dicts in any order)."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class Responses:
    """Answers by key; those of a file, if one is given, and each new one appended to it."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.known: dict[str, Any] = {}
        if path is not None and path.is_file():
            self._read(path)

    def _read(self, path: Path) -> None:
        lines = path.read_bytes().split(b"\n")
        last = lines.pop()  # empty, unless a process was killed while writing
        for number, line in enumerate(lines, 1):
            try:
                self._keep(line)
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{path}, line {number} is damaged ({error}); remove the line, or the file to"
                    " start over"
                ) from error
        if last:
            try:
                self._keep(last)
                with open(path, "ab") as file:
                    file.write(b"\n")
            except (ValueError, KeyError, TypeError):
                os.truncate(path, path.stat().st_size - len(last))

    def _keep(self, line: bytes) -> None:
        entry = json.loads(line)
        self.known[entry["key"]] = entry["response"]

    def __contains__(self, key: str) -> bool:
        return key in self.known

    def __getitem__(self, key: str) -> Any:
        return self.known[key]

    def add(self, key: str, response: dict[str, Any]) -> None:
        """Remember an answer and write it down at once."""
        self.known[key] = response
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(to_json({"key": key, "response": response}) + "\n")
