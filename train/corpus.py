"""Where documents come from: the sources a corpus can name, each read as a stream.

    a folder                              one document a file with one of `extensions`
    NAME.jsonl, .jsonl.gz, .json          one document a row (a .json file is read whole)
    any other file                        one document
    stdlib                                the standard library of the running Python
    hub:owner/name[:split[:column]]       rows of a Hugging Face dataset, streamed

Only lists of file names and the document at hand are in memory. Knows nothing of tokens or rows.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from mdm.errors import DataError

from .code_files import file_state, folder_files, library_files, read_text
from .documents import Document, Skips, document_of_row, prompt_of_row

STDLIB = "stdlib"
HUB = "hub:"
_KINDS = (
    "a folder, a text file, a .jsonl, .jsonl.gz or .json file of rows, the word 'stdlib',"
    " or hub:owner/name[:split[:column]]"
)


class Source(Protocol):
    """A place that documents come from."""

    def documents(self, skips: Skips) -> Iterator[Document]:
        """All documents, one at a time; what cannot be used is counted in `skips`.

        Raises DataError for a row that is malformed, or a hub that does not answer.
        """

    def state(self) -> str:
        """Text that changes when the content does."""


def open_source(name: str, extensions: tuple[str, ...], max_file_kib: int) -> Source:
    """The source a name stands for. Raises DataError if there is no such thing."""
    if name == STDLIB:
        return library_files(max_file_kib)
    if name.startswith(HUB):
        return _hub_rows(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return folder_files(path, extensions, max_file_kib)
    if not path.is_file():
        raise DataError(f"no source {name!r}; a source is {_KINDS}")
    if path.name.endswith((".jsonl", ".jsonl.gz", ".json")):
        return RowFile(path)
    return TextFile(path, max_file_kib)


def open_prompts(name: str, extensions: tuple[str, ...], max_file_kib: int) -> Source:
    """As open_source, for documents that a teacher is to continue."""
    source = open_source(name, extensions, max_file_kib)
    return replace(source, prompts=True) if isinstance(source, RowFile | HubRows) else source


def read_in_turn(sources: Sequence[Source], skips: Skips) -> Iterator[Document]:
    """One document from each source in turn, so that a reader who stops early has seen them all."""
    streams = [source.documents(skips) for source in sources]
    while streams:
        for stream in list(streams):
            document = next(stream, None)
            if document is None:
                streams.remove(stream)
            else:
                yield document


@dataclass(frozen=True)
class TextFile:
    """One file, one document."""

    path: Path
    max_file_kib: int

    def documents(self, skips: Skips) -> Iterator[Document]:
        """The file's text, unless it is unusable."""
        text = read_text(self.path, self.max_file_kib, skips)
        if text is not None:
            yield Document(text, str(self.path))

    def state(self) -> str:
        """Size and time of the last write."""
        return str(file_state(self.path))


@dataclass(frozen=True)
class RowFile:
    """JSON rows: one a line (`.jsonl`, `.jsonl.gz`), or one list (`.json`)."""

    path: Path
    prompts: bool = False

    def documents(self, skips: Skips) -> Iterator[Document]:
        """One document a row; blank lines are ignored, empty texts counted.

        With `prompts` a row needs no response, and an empty text is a document, too.
        """
        for origin, row in self._list() if self.path.suffix == ".json" else self._lines():
            document = prompt_of_row(row, origin) if self.prompts else document_of_row(row, origin)
            if self.prompts or document.text.strip():
                yield document
            else:
                skips.add("empty", origin)

    def state(self) -> str:
        """Size and time of the last write."""
        return str(file_state(self.path))

    def _lines(self) -> Iterator[tuple[str, Any]]:
        opener = gzip.open if self.path.suffix == ".gz" else open
        number = 0
        try:
            with opener(self.path, "rb") as stream:
                for number, line in enumerate(stream, start=1):
                    origin = f"{self.path} line {number}"
                    if line.strip():
                        yield origin, _parse(line, origin)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"cannot read {self.path} after line {number}: {error}") from error

    def _list(self) -> Iterator[tuple[str, Any]]:
        try:
            rows = _parse(self.path.read_bytes(), str(self.path))
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error}") from error
        if not isinstance(rows, list):
            raise DataError(f"{self.path} holds a {type(rows).__name__}; expected a list of rows")
        for number, row in enumerate(rows, start=1):
            yield f"{self.path} row {number}", row


@dataclass(frozen=True)
class HubRows:
    """A dataset of the Hugging Face hub, streamed. Its rows have the form of `RowFile`'s."""

    name: str
    split: str
    column: str | None
    prompts: bool = field(default=False, repr=False)

    def documents(self, skips: Skips) -> Iterator[Document]:
        """One document a row, in the dataset's order."""
        for number, row in enumerate(self._rows(), start=1):
            origin = f"{HUB}{self.name}:{self.split} row {number}"
            if self.prompts and self.column is None:
                document = prompt_of_row(row, origin)
            else:
                document = document_of_row(row, origin, self.column)
            if self.prompts or document.text.strip():
                yield document
            else:
                skips.add("empty", origin)

    def state(self) -> str:
        """The name alone: a change on the hub is not noticed."""
        return repr(self)

    def _rows(self) -> Iterator[Any]:
        try:
            from datasets import load_dataset
        except ImportError as error:
            raise DataError(
                f"reading {HUB}{self.name} needs the package `datasets`: pip install datasets"
            ) from error
        try:
            yield from load_dataset(self.name, split=self.split, streaming=True)
        except Exception as error:  # the hub client raises errors of many libraries
            reason = " ".join(str(error).split())[:300]
            raise DataError(
                f"cannot read {HUB}{self.name}:{self.split} ({type(error).__name__}: {reason});"
                " check the name and the network, or give a local source"
            ) from error


def _hub_rows(name: str) -> HubRows:
    parts = name.removeprefix(HUB).split(":")
    if not parts[0] or len(parts) > 3:
        raise DataError(f"cannot read the source {name!r}; write {HUB}owner/name[:split[:column]]")
    dataset, split, column = (*parts, "", "")[:3]
    return HubRows(dataset, split or "train", column or None)


def _parse(data: bytes, origin: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{origin}: not UTF-8 ({error.reason})") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{origin}: not valid JSON ({error})") from error
    except RecursionError as error:
        raise DataError(f"{origin}: nested too deeply") from error
