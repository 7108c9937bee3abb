"""One reading of a corpus: documents are deduplicated, split, tokenised, packed and written.

Every document is either held out or trained on, by a hash of its text or of its group: never by
its place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mdm.errors import VocabError
from mdm.token_bytes import encode_with_ends
from mdm.vocab import Vocab

from .corpus import Source, read_in_turn
from .documents import Document, Skips
from .given_tokens import given_tokens, spans_of
from .packing import PADDING_DOCUMENT, Packer, Row
from .readings import READINGS, Reading, ReadingWriter
from .rows import RowWriter
from .weighting import CLASSES, NO_LANGUAGE, OTHER, find_lexer, token_classes

if TYPE_CHECKING:
    from .dataset import DataSettings

SPLITS = ("train", "held_out")
_BATCH_CHARACTERS = 2**16  # tokenised at once: enough for all cores, little memory
_MIN_DOCUMENTS = 16  # that a full held-out split comes from


class _Encoded(NamedTuple):
    """A document as token ids: those to learn with their classes, and those of a prompt, if any."""

    tokens: list[int]
    classes: list[int]
    prompt: list[int] | None
    cut: bool
    reading: Reading | None


class _Split:
    """One part of the corpus on its way to disk: packed, written and counted, up to a limit."""

    def __init__(
        self,
        writer: RowWriter,
        packer: Packer,
        max_rows: int | None,
        max_tokens: int | None,
        readings: ReadingWriter | None = None,
    ) -> None:
        self.packer = packer
        self.documents = self.tokens = self.maskable_tokens = 0
        self._class_counts = np.zeros(len(CLASSES), np.int64)
        self._writer, self._max_rows, self._max_tokens = writer, max_rows, max_tokens
        self._readings = readings
        # Few rows should not all come from one long document.
        self._max_per_document = None if max_rows is None else max(1, max_rows // _MIN_DOCUMENTS)

    @property
    def full(self) -> bool:
        rows_full = self._max_rows is not None and self._writer.num_rows >= self._max_rows
        return rows_full or (self._max_tokens is not None and self.tokens >= self._max_tokens)

    def add(self, document: _Encoded) -> None:
        if not self.full:
            self.documents += 1
            rows = self.packer.add(
                document.tokens,
                document.prompt,
                document.classes,
                cut=document.cut,
                reading=document.reading,
            )
            self._append(rows[: self._max_per_document])

    def finish(self) -> None:
        self._append(self.packer.finish())

    def counts(self) -> dict[str, Any]:
        return {
            "documents": self.documents,
            "rows": self._writer.num_rows,
            "tokens": self.tokens,
            "maskable_tokens": self.maskable_tokens,
            "classes": dict(zip(CLASSES, self._class_counts.tolist(), strict=True)),
            **({"longest_reading": self._readings.longest} if self._readings else {}),
        }

    def _append(self, rows: Iterable[Row]) -> None:
        for row in rows:
            if self.full:
                break
            self._writer.append(row)
            if self._readings is not None:
                self._readings.append(row.pieces)
            self.tokens += int((row.document_ids_L != PADDING_DOCUMENT).sum())
            self.maskable_tokens += int(row.maskable_L.sum())
            learnt = row.classes_L[row.maskable_L]
            self._class_counts += np.bincount(learnt, minlength=len(CLASSES))


class Pass:
    """One reading of all sources; documents whose hash is below `held_out_below` are held out.

    `reader` is the vocabulary of a teacher with another tokenizer, which reads the training rows, too.
    """

    def __init__(
        self,
        settings: DataSettings,
        vocab: Vocab,
        folder: Path,
        held_out_below: int,
        reader: Vocab | None = None,
    ) -> None:
        self.skips = Skips()
        self.duplicates = self.used = 0
        self.smallest_hash, self.largest_hash = 2**64, -1
        self.splits: dict[str, _Split] = {}
        self._settings, self._vocab, self._folder = settings, vocab, folder
        self._held_out_below, self._reader = held_out_below, reader

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
                readings = None
                if self._reader is not None and name == "train":
                    readings = ReadingWriter(self._folder / name / READINGS, self._settings.length)
                    open_files.enter_context(contextlib.closing(readings))
                self.splits[name] = _Split(writer, self._packer(), max_rows, max_tokens, readings)
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
        """Documents with the hash that decides their split, each text once."""
        seen: set[int] = set()
        for document in documents:
            content_hash = document.hash(self._settings.split_seed)
            # Samples are what they are as often as they were drawn.
            if content_hash in seen and document.tokens is None:
                self.duplicates += 1
            else:
                seen.add(content_hash)
                yield document.split_hash(self._settings.split_seed), document

    def _wanted(self, documents: Iterable[tuple[int, Document]]) -> Iterator[tuple[int, Document]]:
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
        documents = [document for _, document in batch]
        encoded = _encode(documents, self._vocab, self._settings.language, self._reader)
        for (document_hash, document), parts in zip(batch, encoded, strict=True):
            split = self._split_of(document_hash)
            reason = split.packer.refusal(parts.tokens, parts.prompt, cut=parts.cut)
            if reason is not None:
                self.skips.add(reason, document.origin)
                continue
            if self._vocab.mask_id in (*parts.tokens, *(parts.prompt or ())):
                raise VocabError(
                    f"{document.origin} holds the mask token (id {self._vocab.mask_id});"
                    " choose another mask token"
                )
            self.used += 1
            self.smallest_hash = min(self.smallest_hash, document_hash)
            self.largest_hash = max(self.largest_hash, document_hash)
            split.add(parts)


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
    documents: Sequence[Document], vocab: Vocab, language: str, reader: Vocab | None
) -> list[_Encoded]:
    """Token ids of each document's text, with classes, of its prompt (None without one), and the
    reading of a teacher, if there is one."""
    texts = _with_classes(documents, vocab, language)
    prompts = _prompts(documents, vocab)
    readings: Sequence[Reading | None] = [None] * len(documents)
    if reader is not None:
        readings = _readings(documents, vocab, reader)
    return [
        _Encoded(tokens, classes, prompt, document.cut, reading)
        for document, (tokens, classes), prompt, reading in zip(
            documents, texts, prompts, readings, strict=True
        )
    ]


def _prompts(documents: Sequence[Document], vocab: Vocab) -> list[list[int] | None]:
    """Token ids of the prompts, chats in the tokenizer's own template; None without one."""
    plain = iter(vocab.encode_batch([d.prompt for d in documents if isinstance(d.prompt, str)]))
    result: list[list[int] | None] = []
    for document in documents:
        prompt = document.prompt
        if prompt is None:
            result.append(None)
        else:
            result.append(next(plain) if isinstance(prompt, str) else vocab.encode_chat(prompt))
    return result


def _readings(documents: Sequence[Document], vocab: Vocab, reader: Vocab) -> list[Reading]:
    """Each text in the reader's tokens behind its start token and prompt, and where tokens end."""
    texts = [document.text for document in documents]
    result = []
    for document, (tokens, ends), (_, student_ends), prompt in zip(
        documents,
        encode_with_ends(reader, texts),
        encode_with_ends(vocab, texts),
        _prompts(documents, reader),
        strict=True,
    ):
        context = prompt or []
        if context[:1] != [reader.start_id]:  # a chat template may have put one there already
            context = [reader.start_id, *context]
        tokens, ends = given_tokens(reader, document) or (tokens, ends)
        _, student_ends = given_tokens(vocab, document) or ([], student_ends)
        ids = np.array(tokens, np.int64)
        result.append(Reading(context, ids, ends, student_ends, reader.eos_id))
    return result


def _with_classes(
    documents: Sequence[Document], vocab: Vocab, language: str
) -> list[tuple[list[int], list[int]]]:
    """Token ids of each text and their classes; an answer in a chat is prose, all "other".

    Tokens that a document brings along are kept.
    """
    texts = [document.text for document in documents]
    given = [given_tokens(vocab, document) for document in documents]
    if language == NO_LANGUAGE:
        encoded = vocab.encode_batch(texts)
        tokens = [own[0] if own else ids for own, ids in zip(given, encoded, strict=True)]
        return [(ids, [OTHER] * len(ids)) for ids in tokens]
    result = []
    for document, own, (ids, spans) in zip(
        documents, given, vocab.encode_batch_with_spans(texts), strict=True
    ):
        chat = isinstance(document.prompt, tuple)
        lexer = None if chat else find_lexer(language, document.file_name)
        if own is not None:
            ids, spans = own[0], spans_of(document.text, own[1])
        result.append((ids, token_classes(document.text, spans, lexer)))
    return result
