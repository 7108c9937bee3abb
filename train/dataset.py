"""Training data: from sources to rows of tokens on disk, prepared once and memory-mapped.

Every document is either held out or trained on, by a hash of its text: never by its place. Sampling
order, sources and the cutting of rows are in rows.py, corpus.py and packing.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mdm.checkpoint import replacing
from mdm.config import require, to_tree
from mdm.errors import DataError, VocabError, unknown

from .corpus import Source, open_source, read_in_turn
from .documents import Document, Message, Skips
from .packing import EOS_PADDINGS, Packer
from .rows import Rows, RowWriter

MANIFEST = "manifest.json"
SPLITS = ("train", "held_out")
_FORMAT = 1
_BATCH_CHARACTERS = 2**18  # tokenised at once: enough for all cores, little memory


class Vocab(Protocol):
    """What this file needs of `mdm.vocab.Vocab`."""

    @property
    def start_id(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def mask_id(self) -> int | None: ...
    @property
    def fingerprint(self) -> str: ...
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...
    def encode_chat(self, messages: Sequence[Message]) -> list[int]: ...


@dataclass(frozen=True)
class DataSettings:
    """What to train on. Rows decide what they are: text, prompt and response, or chat messages.

    sources            where documents come from (see train/corpus.py); read in turn
    extensions         endings of the files to read in a folder
    max_file_kib       larger files of source text are left out
    length             tokens in a row
    packing            several documents in a row; false: one, then padding
    min_tokens         shortest piece of a document; shorter documents are left out
    eos_padding        after a response, eos as targets: none | block | row (to the end of the row)
    eos_block          "block": the response is padded to a multiple of this many tokens
    held_out_fraction  share of the documents that is never trained on; 0 = none
    max_held_out_rows  no more rows than this are kept of them
    split_seed         another seed, another split
    max_tokens         stop after this many training tokens; null = read everything
    """

    sources: tuple[str, ...] = ("stdlib",)
    extensions: tuple[str, ...] = (".py",)
    max_file_kib: int = 1024
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
        require(
            self.eos_padding in EOS_PADDINGS,
            unknown("data.eos_padding", self.eos_padding, EOS_PADDINGS),
        )
        require(
            0 <= self.held_out_fraction < 1,
            f"data.held_out_fraction must be at least 0 and below 1; got {self.held_out_fraction}",
        )


@dataclass(frozen=True)
class PreparedData:
    """Rows to train on and held-out rows, with the manifest that says how they came about.

    `reused` is True if an earlier preparation of the same data was found.
    """

    directory: Path
    manifest: Mapping[str, Any]
    train: Rows
    held_out: Rows
    reused: bool


def prepare(settings: DataSettings, vocab: Vocab, directory: str | Path) -> PreparedData:
    """The data of `settings` in the tokens of `vocab`, written to `directory` unless it is there.

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
    made_from = _made_from(settings, vocab, sources)
    _require_ours(directory)
    found = _finished(directory, made_from)
    if found is not None:
        return found
    with replacing(directory) as draft:
        counts = _write(settings, vocab, sources, draft)
        manifest = json.dumps({"made_from": made_from, **counts}, indent=1)
        (draft / MANIFEST).write_text(manifest + "\n", encoding="utf-8")
    return _open(directory, reused=False)


def _made_from(settings: DataSettings, vocab: Vocab, sources: list[Source]) -> dict[str, Any]:
    """Everything the rows depend on, as plain JSON values."""
    state = hashlib.sha256(repr([source.state() for source in sources]).encode())
    return {
        "format": _FORMAT,
        "settings": to_tree(settings),
        "vocab": {
            "fingerprint": vocab.fingerprint,
            **{name: getattr(vocab, name) for name in ("start_id", "eos_id", "pad_id")},
        },
        "sources_state": state.hexdigest(),
    }


def _require_ours(directory: Path) -> None:
    """Never replace a folder that holds anything we did not write."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise DataError(f"{directory} is a file; give a folder for the prepared data")
    foreign = sorted({entry.name for entry in directory.iterdir()} - {MANIFEST, *SPLITS})
    if foreign:
        raise DataError(
            f"{directory} holds other things ({', '.join(foreign[:3])}); give an empty or new folder"
            " for the prepared data"
        )


def _finished(directory: Path, made_from: Mapping[str, Any]) -> PreparedData | None:
    """The data in a directory if it is complete and was made from the same things."""
    try:
        data = _open(directory, reused=True)
    except DataError:
        return None
    return data if data.manifest.get("made_from") == made_from else None


def _open(directory: Path, *, reused: bool) -> PreparedData:
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        expected = [manifest["splits"][split]["rows"] for split in SPLITS]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{directory} holds no finished data: {error}") from error
    train, held_out = (Rows(directory / split) for split in SPLITS)
    if [len(train), len(held_out)] != expected:
        raise DataError(f"{directory} does not hold the rows its manifest counts")
    return PreparedData(directory, manifest, train, held_out, reused)


def _write(
    settings: DataSettings, vocab: Vocab, sources: list[Source], folder: Path
) -> dict[str, Any]:
    """Write both splits below `folder`; what was counted on the way.

    A corpus so small that a split gets nothing is read again: the usable document with the smallest
    hash is then the held-out one.
    """
    below = int(settings.held_out_fraction * 2**64)
    first = _Pass(settings, vocab, folder, below)
    first.run(sources)
    if not first.hashes_used:
        raise DataError(
            f"nothing to learn from in {', '.join(settings.sources)}: {first.skips}"
            + (f", {first.duplicates} duplicates" if first.duplicates else "")
        )
    if not below or all(split.documents for split in first.splits.values()):
        return first.counts()
    if first.hashes_used == 1:
        raise DataError(
            f"{', '.join(settings.sources)} has one usable document, so none can be held out (skipped:"
            f" {first.skips}); add documents, or set data.held_out_fraction to 0"
        )
    second = _Pass(settings, vocab, folder, first.smallest_hash + 1)
    second.run(sources)
    return second.counts()


class _Split:
    """One part of the corpus on its way to disk: packed, written and counted, up to a limit."""

    def __init__(
        self, writer: RowWriter, packer: Packer, max_rows: int | None, max_tokens: int | None
    ) -> None:
        self.documents = self.tokens = self.maskable_tokens = 0
        self._writer, self._packer = writer, packer
        self._max_rows, self._max_tokens = max_rows, max_tokens

    @property
    def full(self) -> bool:
        rows_full = self._max_rows is not None and self._writer.num_rows >= self._max_rows
        return rows_full or (self._max_tokens is not None and self.tokens >= self._max_tokens)

    def add(self, tokens: Sequence[int], prompt: Sequence[int] | None) -> None:
        if not self.full:
            self.documents += 1
            self._append(self._packer.add(tokens, prompt))

    def finish(self) -> None:
        self._append(self._packer.finish())

    def counts(self) -> dict[str, int]:
        return {
            "documents": self.documents,
            "rows": self._writer.num_rows,
            "tokens": self.tokens,
            "maskable_tokens": self.maskable_tokens,
        }

    def _append(self, rows: Iterable[Row]) -> None:
        for row in rows:
            if self.full:
                break
            self._writer.append(row)
            self.tokens += int((row.document_ids_L != PADDING_DOCUMENT).sum())
            self.maskable_tokens += int(row.maskable_L.sum())


class _Pass:
    """One reading of all sources; documents whose hash is below `held_out_below` are held out."""

    def __init__(
        self, settings: DataSettings, vocab: Vocab, folder: Path, held_out_below: int
    ) -> None:
        self.skips = Skips()
        self.duplicates = self.used = 0
        self.smallest_hash = 2**64
        self.splits: dict[str, _Split] = {}
        self._settings, self._vocab, self._folder = settings, vocab, folder
        self._held_out_below = held_out_below

    def run(self, sources: Sequence[Source]) -> None:
        """Read until the sources end or no split wants more."""
        max_held_out = self._settings.max_held_out_rows if self._held_out_below else 0
        with contextlib.ExitStack() as open_files:
            for name, max_rows, max_tokens in (
                ("train", None, self._settings.max_tokens),
                ("held_out", max_held_out, None),
            ):
                writer = RowWriter(self._folder / name, self._settings.length)
                open_files.enter_context(contextlib.closing(writer))
                self.splits[name] = _Split(writer, self._packer(), max_rows, max_tokens)
            wanted = self._wanted(self._unique(read_in_turn(sources, self.skips)))
            for batch in _batches(wanted):
                self._add(batch)
            for split in self.splits.values():
                split.finish()

    def counts(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "splits": {name: split.counts() for name, split in self.splits.items()},
            "duplicates": self.duplicates,
            "skipped": dict(self.skips.counts),
            "skipped_examples": self.skips.examples,
        }

    def _packer(self) -> Packer:
        names = ("length", "min_tokens", "packing", "eos_padding", "eos_block")
        ids = {name: getattr(self._vocab, name) for name in ("start_id", "eos_id", "pad_id")}
        return Packer(**{name: getattr(self._settings, name) for name in names}, **ids)

    def _split_of(self, document_hash: int) -> _Split:
        return self.splits["held_out" if document_hash < self._held_out_below else "train"]

    def _unique(self, documents: Iterable[Document]) -> Iterator[tuple[int, Document]]:
        """Documents with their hash, each text once."""
        seen: set[int] = set()
        for document in documents:
            document_hash = document.hash(self._settings.split_seed)
            if document_hash in seen:
                self.duplicates += 1
            else:
                seen.add(document_hash)
                yield document_hash, document

    def _wanted(
        self, documents: Iterable[tuple[int, Document]]
    ) -> Iterator[tuple[int, Document]]:
        """Documents that some split has room for; the end, once none has.

        When training has enough, reading goes on for the held-out rows, so that these are the same
        whatever `max_tokens` is. Until there is one, every document might have to be held out.
        """
        for document_hash, document in documents:
            if all(split.full for split in self.splits.values()):
                return
            none_held_out = self._held_out_below > 0 and not self.splits["held_out"].documents
            if none_held_out or not self._split_of(document_hash).full:
                yield document_hash, document

    def _add(self, batch: Sequence[tuple[int, Document]]) -> None:
        encoded = _encode([document for _, document in batch], self._vocab)
        for (document_hash, document), (tokens, prompt) in zip(batch, encoded, strict=True):
            split = self._split_of(document_hash)
            reason = self._refuser.refusal(tokens, prompt)
            if reason is not None:
                self.skips.add(reason, document.origin)
                continue
            _require_no_mask(tokens, prompt or (), self._vocab.mask_id, document.origin)
            self.used += 1
            self.smallest_hash = min(self.smallest_hash, document_hash)
            split.add(tokens, prompt)


def _batches(
    documents: Iterable[tuple[int, Document]],
) -> Iterator[list[tuple[int, Document]]]:
    """Documents in groups of about _BATCH_CHARACTERS."""
    batch, characters = [], 0
    for item in documents:
        batch.append(item)
        characters += len(item[1].text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(
    documents: Sequence[Document], vocab: Vocab
) -> list[tuple[list[int], list[int] | None]]:
    """Token ids of each document's text and of its prompt (None without one)."""
    texts = vocab.encode_batch([document.text for document in documents])
    prompts = iter(
        vocab.encode_batch([d.prompt for d in documents if isinstance(d.prompt, str)])
    )
    result = []
    for document, tokens in zip(documents, texts, strict=True):
        prompt = None
        if isinstance(document.prompt, str):
            prompt = next(prompts)
        elif document.prompt is not None:
            prompt = vocab.encode_chat(document.prompt)
        result.append((tokens, prompt))
    return result
