"""Training data: from sources to rows of tokens on disk, prepared once and memory-mapped.

The settings, the folder and its manifest. Reading is in corpus.py, tokenising and the held-out
split in splits.py, the cutting of rows in packing.py, their storage and order in rows.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdm.checkpoint import replacing
from mdm.config import require, to_tree
from mdm.errors import DataError, check_known

from .corpus import Source, open_source
from .packing import EOS_PADDINGS
from .readings import READINGS, Readings
from .rows import Rows
from .splits import SPLITS, Pass, Vocab
from .weighting import NO_LANGUAGE, check_language

MANIFEST = "manifest.json"
_FORMAT = 2  # 2: rows have the classes of tokens


@dataclass(frozen=True)
class DataSettings:
    """What to train on. Rows decide what they are: text, prompt and response, or chat messages.

    sources            where documents come from (see train/corpus.py); read in turn
    extensions         endings of the files to read in a folder
    max_file_kib       larger files of source text are left out
    language           classes of tokens, for masks that fall by them: none | auto (by the name of the
                       file, or the `origin` of a row) | one that pygments knows, such as python.
                       Reading takes about a second more per MB
    length             tokens in a row
    packing            several documents in a row; false: one, then padding
    min_tokens         shortest piece of a document; shorter documents are left out
    eos_padding        eos as more targets: none; after a response: block | row (to the end of the row);
                       after any document: document, for block diffusion students
    eos_block          "block": the response is padded to a multiple of this many tokens; "document": the
                       whole document, start and prompt included
    held_out_fraction  share of the documents that is never trained on; 0 = none
    max_held_out_rows  no more rows than this are kept of them, at most 1/16 from one document
    split_seed         another seed, another split
    max_tokens         stop after this many training tokens; null = read everything
    """

    sources: tuple[str, ...] = ("stdlib",)
    extensions: tuple[str, ...] = (".py",)
    max_file_kib: int = 1024
    language: str = NO_LANGUAGE
    length: int = 256
    packing: bool = True
    min_tokens: int = 8
    eos_padding: str = "block"
    eos_block: int = 32
    held_out_fraction: float = 0.02
    max_held_out_rows: int = 128
    split_seed: int = 0
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        require(bool(self.sources), "data.sources must name at least one source")
        require(
            bool(self.extensions) and all(e.startswith(".") for e in self.extensions),
            f"data.extensions must be endings such as .py; got {list(self.extensions)}",
        )
        for name in ("max_file_kib", "min_tokens", "eos_block", "max_held_out_rows", "max_tokens"):
            value = getattr(self, name)
            require(value is None or value > 0, f"data.{name} must be at least 1; got {value}")
        require(
            self.length > 2 * self.min_tokens,
            f"data.length must be more than twice data.min_tokens ({self.min_tokens});"
            f" got {self.length}",
        )
        check_known("data.eos_padding", self.eos_padding, EOS_PADDINGS)
        check_language(self.language)
        require(
            0 <= self.held_out_fraction < 1,
            f"data.held_out_fraction must be at least 0 and below 1; got {self.held_out_fraction}",
        )


@dataclass(frozen=True)
class PreparedData:
    """Rows to train on and held-out rows, with the manifest that says how they came about.

    `reused` is True if an earlier preparation of the same data was found; `readings` are those of the
    training rows by a teacher with another tokenizer.
    """

    directory: Path
    manifest: Mapping[str, Any]
    train: Rows
    held_out: Rows
    reused: bool
    readings: Readings | None = None


def prepare(
    settings: DataSettings, vocab: Vocab, directory: str | Path, reader: Vocab | None = None
) -> PreparedData:
    """The data of `settings` in the tokens of `vocab`, written to `directory` unless it is there.

    `reader` is the vocabulary of a teacher with another tokenizer, which reads the training rows, too.

    The directory is replaced as a whole when settings, vocabulary or sources have changed, and only
    when the new data is complete. Memory grows with the number of documents (about 100 bytes each,
    to find duplicates), not with their size.
    Raises DataError if there is nothing to learn from, a source cannot be read, or the directory
    holds something else; CheckpointError if it cannot be written.
    """
    directory = Path(directory)
    sources = [
        open_source(name, settings.extensions, settings.max_file_kib) for name in settings.sources
    ]
    made_from = _made_from(settings, vocab, sources, reader)
    found = _finished(directory, made_from)
    if found is not None:
        return found
    _require_ours(directory)
    with replacing(directory) as draft:
        counts = _write(settings, vocab, sources, draft, reader)
        manifest = json.dumps({"made_from": made_from, **counts}, indent=1)
        (draft / MANIFEST).write_text(manifest + "\n", encoding="utf-8")
    return open_prepared(directory, reused=False)


def _made_from(
    settings: DataSettings, vocab: Vocab, sources: list[Source], reader: Vocab | None
) -> dict[str, Any]:
    """Everything the rows depend on, as plain JSON values."""
    second = {} if reader is None else {"reader": reader_identity(reader)}
    state = hashlib.sha256(repr([source.state() for source in sources]).encode())
    return {
        "format": _FORMAT,
        "settings": to_tree(settings),
        "vocab": _identity(vocab),
        "sources_state": state.hexdigest(),
        **second,
    }


def reader_identity(reader: Vocab) -> dict[str, Any]:
    """What the readings depend on: the tokens, and how chats are put to the teacher."""
    template = str(reader.tokenizer.chat_template)
    return {
        **_identity(reader),
        "chat_template": hashlib.sha256(template.encode()).hexdigest()[:16],
    }


def _identity(vocab: Vocab) -> dict[str, Any]:
    names = ("start_id", "eos_id", "pad_id")
    return {"fingerprint": vocab.fingerprint, **{name: getattr(vocab, name) for name in names}}


def _require_ours(directory: Path) -> None:
    """Never replace a folder that holds anything we did not write."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise DataError(f"{directory} is a file; give a folder for the prepared data")
    foreign = sorted({entry.name for entry in directory.iterdir()} - {MANIFEST, *SPLITS})
    if foreign:
        raise DataError(
            f"{directory} holds other things ({', '.join(foreign[:3])}); give an empty or new"
            " folder for the prepared data"
        )


def _finished(directory: Path, made_from: Mapping[str, Any]) -> PreparedData | None:
    """The data in a directory, if it is complete and was made from the same things."""
    try:
        data = open_prepared(directory, reused=True)
    except DataError:
        return None
    complete = "held_out_below" in data.manifest  # not in those of earlier versions
    return data if complete and data.manifest.get("made_from") == made_from else None


def open_prepared(directory: Path, *, reused: bool = True) -> PreparedData:
    """The data that lies in a directory, whatever has become of its sources since. Raises DataError."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        expected = [manifest["splits"][split]["rows"] for split in SPLITS]
        found = manifest["made_from"]["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{directory} holds no finished data: {error}") from error
    if found != _FORMAT:
        raise DataError(
            f"{directory} holds rows of format {found}, this version of mdm reads format {_FORMAT};"
            " prepare them anew: start a new run"
        )
    train, held_out = (Rows(directory / split) for split in SPLITS)
    if [len(train), len(held_out)] != expected:
        raise DataError(f"{directory} does not hold the rows its manifest counts")
    readings = None
    if "reader" in manifest["made_from"]:
        readings = Readings(directory / SPLITS[0] / READINGS)
        if len(readings) != len(train):
            raise DataError(f"{directory} does not hold a teacher's reading of every row")
    return PreparedData(directory, manifest, train, held_out, reused, readings)


def _write(
    settings: DataSettings,
    vocab: Vocab,
    sources: list[Source],
    folder: Path,
    reader: Vocab | None,
) -> dict[str, Any]:
    """Write both splits below `folder`; what was counted on the way.

    A corpus so small that a split gets nothing is read again: the usable document with the smallest
    hash is then the held-out one.
    """
    below = int(settings.held_out_fraction * 2**64)
    first = Pass(settings, vocab, folder, below, reader)
    first.run(sources)
    if not first.used:
        raise DataError(
            f"nothing to learn from in {', '.join(settings.sources)}: {first.skips}"
            + (f", {first.duplicates} duplicates" if first.duplicates else "")
        )
    if not below or all(split.documents for split in first.splits.values()):
        return {"held_out_below": below, **first.counts()}
    if first.smallest_hash == first.largest_hash:
        raise DataError(
            f"{', '.join(settings.sources)} has one usable document or file, so none can be held out"
            f" (skipped: {first.skips}); add documents, or set data.held_out_fraction to 0"
        )
    second = Pass(settings, vocab, folder, first.smallest_hash + 1, reader)
    second.run(sources)
    return {"held_out_below": first.smallest_hash + 1, **second.counts()}
