"""Files of source code: which files of a folder to read, and their text.

Hidden, binary, generated, over-large and non-UTF-8 files are left out and counted by reason. Files
come in an order shuffled by a hash of their path: always the same, and a part is representative.
"""

from __future__ import annotations

import hashlib
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from mdm.errors import DataError

from .documents import Document, Skips

_NOT_SOURCE = frozenset({"__pycache__", "node_modules"})
_NOT_LIBRARY = _NOT_SOURCE | {"site-packages", "dist-packages", "test", "tests", "idle_test"}

# Written by a program: says so in its first lines, or has lines no person would write.
_GENERATED = re.compile(
    r"@generated|auto-?generated|automatically generated|\bgenerated (from|by|with)\b|do not edit",
    re.IGNORECASE,
)
_HEAD_LINES = 5
_LONGEST_LINE = 2000


@dataclass(frozen=True)
class CodeFiles:
    """Source files below `root`; `names` are their relative paths, in reading order."""

    root: Path
    names: tuple[str, ...]
    max_file_kib: int

    def documents(self, skips: Skips) -> Iterator[Document]:
        """One document a file; files that cannot be used are counted in `skips`."""
        for name in self.names:
            text = read_text(self.root / name, self.max_file_kib, skips)
            if text is None:
                continue
            if is_generated(text):
                skips.add("generated", str(self.root / name))
            else:
                yield Document(text, name)

    def state(self) -> str:
        """A hash that changes when a file is added, removed or written."""
        digest = hashlib.sha256()
        for name in self.names:
            digest.update(repr((name, file_state(self.root / name))).encode())
        return digest.hexdigest()


def folder_files(root: Path, extensions: tuple[str, ...], max_file_kib: int) -> CodeFiles:
    """The files below a folder whose names end in one of `extensions`.

    Raises DataError if there are none, telling which endings the folder does hold.
    """
    return CodeFiles(root, _names_below(root, extensions, _NOT_SOURCE), max_file_kib)


def library_files(max_file_kib: int) -> CodeFiles:
    """The standard library of the running Python, without its tests and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    return CodeFiles(root, _names_below(root, (".py",), _NOT_LIBRARY), max_file_kib)


def read_text(path: Path, max_file_kib: int, skips: Skips) -> str | None:
    """The text of a file, line endings as they are; None, and counted, if it cannot be used."""
    try:
        if path.stat().st_size > max_file_kib * 1024:
            skips.add(f"larger than {max_file_kib} KiB", str(path))
            return None
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        skips.add("binary" if b"\0" in data else "not UTF-8", str(path))
        return None
    except OSError:
        skips.add("unreadable", str(path))
        return None
    if "\0" in text:
        skips.add("binary", str(path))
        return None
    if not text.strip():
        skips.add("empty", str(path))
        return None
    return text


def is_generated(text: str) -> bool:
    """Whether source text looks written by a program: it says so on top, or has a giant line."""
    lines = text.split("\n")
    if max(map(len, lines)) > _LONGEST_LINE:
        return True
    head = [line for line in lines[: 4 * _HEAD_LINES] if line.strip()][:_HEAD_LINES]
    return bool(_GENERATED.search("\n".join(head)))


def file_state(path: Path) -> tuple[int, int]:
    """Size in bytes and time of the last write in ns; zeros if the file is gone."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _names_below(
    root: Path, extensions: tuple[str, ...], not_below: Collection[str]
) -> tuple[str, ...]:
    names: list[str] = []
    others: Counter[str] = Counter()
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [n for n in subfolders if n not in not_below and not n.startswith(".")]
        for file in files:
            path = Path(folder, file)
            if file.startswith(".") or not os.path.isfile(path):  # a broken link, a pipe
                continue
            if file.endswith(extensions):
                names.append(path.relative_to(root).as_posix())
            else:
                others[path.suffix or "(no ending)"] += 1
    if not names:
        held = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
        raise DataError(
            f"no file ending in {', '.join(extensions)} below {str(root)!r}; it holds"
            f" {held or 'no files'} — choose with `extensions`"
        )
    return tuple(sorted(names, key=_shuffled))


def _shuffled(name: str) -> bytes:
    return hashlib.blake2b(os.fsencode(name), digest_size=16).digest()
