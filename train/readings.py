"""Rows read a second time, by a teacher with another tokenizer: its tokens of the same text.

A row of training data has a reading: for each of its documents the teacher's start token, its tokens of
the prompt, those of the text, and its end token where the text ends. Of every token that is text, on both
sides, it is known which bytes of the piece of text in this row it stands for; start, prompt and end
tokens stand for none (-1). A token of the teacher that reaches over an edge of the piece is left out.

A folder holds student_starts.npy, student_ends.npy (N, L) and, one row after the other, tokens.npy,
documents.npy, starts.npy, ends.npy (T,) with places.npy (N + 1,).
Shapes: N rows, L length, T the teacher's tokens of all rows, B batch, M longest reading in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mdm.errors import DataError

from .alignment import align
from .arrays import GrowingArray

READINGS = "readings"
NO_TEXT = -1
_STUDENT = ("student_starts", "student_ends")
_FLAT = ("tokens", "documents", "starts", "ends")

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Reading:
    """A document in both tokenizations: which bytes each token of its text stands for.

    `context` is what the teacher reads before the text: its start token and its tokens of a prompt.
    `end` is its end token, which stands behind the text where the student has one.
    """

    context: Sequence[int]
    tokens: Ints
    ends: Ints
    student_ends: Ints
    end: int

    def piece(self, first: int, last: int) -> Piece:
        """The student's tokens first … last - 1 of the text; those from the text's end on are eos."""
        known = len(self.student_ends)
        low, high = self._edge(min(first, known)), self._edge(min(last, known))
        # Tokens without bytes go with what is before them.
        one = int(np.searchsorted(self.ends, low, side="right")) if low else 0
        if one < len(self.ends) and (self.ends[one - 1] if one else 0) < low:
            one = int(np.searchsorted(self.ends, self.ends[one], side="right"))  # begins before it
        two = max(one, int(np.searchsorted(self.ends, high, side="right")))
        ends = self.ends[one:two] - low
        starts = np.concatenate([[self.ends[one - 1] - low if one else 0], ends[:-1]])[: len(ends)]
        student = np.full((2, last - first), NO_TEXT, np.int64)
        text = max(0, min(last, known) - first)
        student[1, :text] = self.student_ends[first : first + text] - low
        student[0, 1:text] = student[1, : max(0, text - 1)]
        student[0, :1] = 0 if text else NO_TEXT
        context, behind = len(self.context), [self.end] if last > known else []
        return Piece(
            np.array([*self.context, *self.tokens[one:two], *behind], np.int64),
            _no_text_around(context, starts, len(behind)),
            _no_text_around(context, ends, len(behind)),
            *student,
        )

    def _edge(self, token: int) -> int:
        return int(self.student_ends[token - 1]) if token else 0


class Piece(NamedTuple):
    """What of a document is in one row: the teacher's tokens with their bytes, and the bytes of the
    student's tokens that are learnt."""

    tokens: Ints
    starts: Ints
    ends: Ints
    student_starts: Ints
    student_ends: Ints


def _no_text_around(before: int, values: Ints, after: int) -> Ints:
    return np.pad(values, (before, after), constant_values=NO_TEXT)


class ReadingWriter:
    """Writes the readings of rows to a folder."""

    def __init__(self, folder: Path, length: int) -> None:
        folder.mkdir(exist_ok=True)
        self.longest = 0  # tokens the teacher reads of one document in one row
        self._length = length
        self._student = [
            GrowingArray(folder / f"{name}.npy", "<i4", (length,)) for name in _STUDENT
        ]
        self._flat = [GrowingArray(folder / f"{name}.npy", "<i4") for name in _FLAT]
        self._places = GrowingArray(folder / "places.npy", "<i8")
        self._places.append(np.zeros(1))

    def append(self, pieces: Sequence[tuple[int, Piece]]) -> None:
        """The next row: its pieces, each with the place in the row where its learnt tokens begin."""
        student = np.full((2, self._length), NO_TEXT)
        for number, (place, piece) in enumerate(pieces):
            learnt = slice(place, place + len(piece.student_ends))
            student[:, learnt] = piece.student_starts, piece.student_ends
            documents = np.full(len(piece.tokens), number)
            columns = (piece.tokens, documents, piece.starts, piece.ends)
            for array, values in zip(self._flat, columns, strict=True):
                array.append(values)
            self.longest = max(self.longest, len(piece.tokens))
        for array, values in zip(self._student, student, strict=True):
            array.append(values[None])
        self._places.append(np.array([self._flat[0].length]))

    def close(self) -> None:
        """Write the final lengths. Without this the folder is empty."""
        for array in (*self._student, *self._flat, self._places):
            array.close()


class ReadingBatch(NamedTuple):
    """Readings of some rows, padded to the longest: all long, -1 where there is no text or no token
    (padding: document -1, token 0)."""

    tokens_BM: torch.Tensor
    document_ids_BM: torch.Tensor
    starts_BM: torch.Tensor
    ends_BM: torch.Tensor
    student_starts_BL: torch.Tensor
    student_ends_BL: torch.Tensor


class Readings:
    """The readings of a folder, read from disk as they are asked for. Raises DataError."""

    def __init__(self, folder: Path) -> None:
        try:
            names = (*_STUDENT, *_FLAT, "places")
            arrays = {
                name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
                for name in names
            }
        except (OSError, ValueError, EOFError) as error:
            raise DataError(
                f"cannot read the teacher's reading of the rows in {folder}: {error}; prepare the"
                " data again"
            ) from error
        self._places = arrays.pop("places")
        self._student = [arrays[name] for name in _STUDENT]
        self._flat = [arrays[name] for name in _FLAT]
        rows, tokens = len(self._places) - 1, int(self._places[-1])
        if any(len(a) != rows for a in self._student) or any(len(a) != tokens for a in self._flat):
            raise DataError(f"the arrays in {folder} differ in length; prepare the data again")

    def __len__(self) -> int:
        return len(self._places) - 1

    def batch(self, rows: Sequence[int]) -> ReadingBatch:
        """The readings of these rows, in that order."""
        spans = [slice(int(self._places[row]), int(self._places[row + 1])) for row in rows]
        longest = max(1, *(span.stop - span.start for span in spans))
        flat = np.full((4, len(spans), longest), NO_TEXT, np.int64)
        flat[0] = 0
        for place, span in enumerate(spans):
            for column, values in zip(flat, self._flat, strict=True):
                column[place, : span.stop - span.start] = values[span]
        student = (torch.from_numpy(array[list(rows)].astype(np.int64)) for array in self._student)
        return ReadingBatch(*(torch.from_numpy(column) for column in flat), *student)


def chunks(
    reading: ReadingBatch, document_ids_BL: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, L) and (B, M) the chunk each token lies in, numbered through the batch; -1 = in none.

    A chunk is the shortest run of bytes on both of whose ends the two tokenizations agree (see
    alignment.py). One that the edge of a piece cuts off on the teacher's side is none.
    """
    tokens_BM, documents_BM, starts_BM, ends_BM, student_starts_BL, student_ends_BL = (
        tensor.cpu().numpy() for tensor in reading
    )
    chunk_BL = np.full(student_ends_BL.shape, NO_TEXT, np.int64)
    chunk_BM = np.full(tokens_BM.shape, NO_TEXT, np.int64)
    first = 0
    for row, documents_L in enumerate(document_ids_BL.numpy()):
        for document in range(int(documents_L.max()) + 1):
            ours = ((documents_L == document) & (student_starts_BL[row] >= 0)).nonzero()[0]
            theirs = ((documents_BM[row] == document) & (starts_BM[row] >= 0)).nonzero()[0]
            if not len(ours) or not len(theirs):
                continue
            # What the teacher does not have at the edges stands in as a token of its own.
            end, low = student_ends_BL[row, ours[-1]], starts_BM[row, theirs[0]]
            high = ends_BM[row, theirs[-1]]
            edged = np.concatenate([[low], ends_BM[row, theirs], [end]])
            student_chunks, teacher_chunks = align(student_ends_BL[row, ours], edged)
            cut = {int(teacher_chunks[0])} if low > 0 else set()
            cut |= {int(teacher_chunks[-1])} if end > high else set()
            for numbers, columns, result in (
                (student_chunks, ours, chunk_BL[row]),
                (teacher_chunks[1:-1], theirs, chunk_BM[row]),
            ):
                result[columns] = np.where(np.isin(numbers, list(cut)), NO_TEXT, numbers + first)
            first += int(student_chunks[-1]) + 1
    return torch.from_numpy(chunk_BL), torch.from_numpy(chunk_BM)
