"""From the tokens of documents to rows of one length.

A row holds one or more segments. A segment is a whole document or a piece of a long one, opens with
the start token, and never continues in the next row. Plain text may be cut anywhere into pieces of
at least `min_tokens`, so that rows are full; a prompt with its response has a row to itself.
Shapes: L length of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .readings import Piece, Reading
from .weighting import OTHER

EOS_PADDINGS = ("none", "block", "row", "document")
PADDING_DOCUMENT = -1


class Row(NamedTuple):
    """One training sample: token ids, segment number (-1 = padding), what may be masked, and the class
    of each token (see train/weighting.py). If a teacher reads it too, its pieces of documents, each with
    the place where its learnt tokens begin."""

    tokens_L: npt.NDArray[np.int32]
    document_ids_L: npt.NDArray[np.int32]
    maskable_L: npt.NDArray[np.bool_]
    classes_L: npt.NDArray[np.uint8]
    pieces: tuple[tuple[int, Piece], ...] = ()


class _Segment(NamedTuple):
    context: list[int]  # start token and prompt: read, never masked
    targets: list[int]
    classes: list[int]  # of the targets; those that are only read have none
    piece: Piece | None

    def __len__(self) -> int:
        return len(self.context) + len(self.targets)


@dataclass
class Packer:
    """Cuts documents into segments and fills rows with them, in the order they come.

    length       tokens in a row, more than twice `min_tokens`
    min_tokens   shortest piece of plain text, its eos included
    packing      several segments in a row; False: one, then padding
    eos_padding  more targets: "none"; after a response "block" (eos until the response fills a multiple of
                 `eos_block` tokens) or "row" (eos to the end, LLaDA arXiv 2502.09992); at the end of any
                 document "document" (eos until the document, start and prompt included, fills a multiple
                 of `eos_block` tokens: the grid of block diffusion, whose blocks are then never cut short)
    """

    length: int
    min_tokens: int
    packing: bool
    eos_padding: str
    eos_block: int
    start_id: int
    eos_id: int
    pad_id: int
    _open: list[_Segment] = field(default_factory=list, init=False)

    def refusal(
        self, tokens: Sequence[int], prompt: Sequence[int] | None = None, *, cut: bool = False
    ) -> str | None:
        """Why these tokens cannot be learnt from, in a few words; None if they can. See `add`."""
        targets = len(tokens) if cut else len(tokens) + 1
        if prompt is None:
            return "too short" if targets < max(1, self.min_tokens) else None
        if not tokens:
            return "empty"
        room = self.length - len(self._opened(prompt))
        return "prompt too long" if room < min(self.min_tokens, targets) else None

    def add(
        self,
        tokens: Sequence[int],
        prompt: Sequence[int] | None = None,
        classes: Sequence[int] | None = None,
        *,
        cut: bool = False,
        reading: Reading | None = None,
    ) -> list[Row]:
        """The rows that these tokens complete. They must not be refused.

        `classes` are those of `tokens`, None = all "other", as are start, prompt, eos and padding.
        Plain text (no prompt) gets start and eos; its last row stays open for the next document.
        A response is cut at the end of its row, then without eos; its row is complete at once.
        Tokens that are `cut` end where the text went on: they get no eos either, nor its padding.
        `reading` is a teacher's of the same text; each row gets the part that is in it.
        """
        assert self.refusal(tokens, prompt, cut=cut) is None, "the caller drops what is refused"
        classes = [OTHER] * len(tokens) if classes is None else classes
        assert len(classes) == len(tokens), "one class for each token"
        if prompt is not None:
            context = self._opened(prompt)
            targets = self._response(tokens, len(context), cut)
            eos = max(0, len(targets) - len(tokens))
            classes = [*classes[: len(targets)], *[OTHER] * eos]
            piece = reading.piece(0, len(targets)) if reading else None
            return [self._row([_Segment(context, targets, classes, piece)])]
        rows = []
        targets, classes, done = list(tokens), list(classes), 0
        if not cut:
            targets, classes = [*targets, self.eos_id], [*classes, OTHER]
        while done < len(targets):
            size = self._piece(len(targets) - done)
            if size:
                if done + size == len(targets) and not cut:
                    targets, classes = self._to_block(targets, classes, size)
                    size = len(targets) - done
                part = slice(done, done + size)
                piece = reading.piece(done, done + size) if reading else None
                self._open.append(_Segment([self.start_id], targets[part], classes[part], piece))
                done += size
            if not size or not self.packing:
                rows += self.finish()
        return rows

    def finish(self) -> list[Row]:
        """The open row, filled with padding; empty if none is open."""
        segments, self._open = self._open, []
        return [self._row(segments)] if segments else []

    def _piece(self, left: int) -> int:
        """How many of a document's `left` tokens to put into the open row; 0 = begin another row.

        Neither this piece nor what remains is shorter than min_tokens.
        """
        room = self.length - sum(map(len, self._open)) - 1
        if left <= room:
            return left
        size = min(room, left - self.min_tokens)
        return size if size >= self.min_tokens else 0

    def _to_block(
        self, targets: list[int], classes: list[int], size: int
    ) -> tuple[list[int], list[int]]:
        """A text whose last piece has `size` tokens, with eos until that fills a block or the row."""
        if self.eos_padding != "document":
            return targets, classes
        room = self.length - sum(map(len, self._open)) - 1 - size
        more = min(room, -(1 + size) % self.eos_block)
        return targets + [self.eos_id] * more, classes + [OTHER] * more

    def _opened(self, prompt: Sequence[int]) -> list[int]:
        """The prompt behind a start token; a chat template may have put one there already."""
        return list(prompt) if prompt and prompt[0] == self.start_id else [self.start_id, *prompt]

    def _response(self, tokens: Sequence[int], context: int, cut: bool) -> list[int]:
        room = self.length - context
        if cut:
            return list(tokens[:room])
        targets = [*tokens, self.eos_id][:room]
        filled = {
            "none": len(targets),
            "block": -(-len(targets) // self.eos_block) * self.eos_block,
            "document": -(-(context + len(targets)) // self.eos_block) * self.eos_block - context,
            "row": room,
        }[self.eos_padding]
        return targets + [self.eos_id] * (min(filled, room) - len(targets))

    def _row(self, segments: list[_Segment]) -> Row:
        row = Row(
            np.full(self.length, self.pad_id, np.int32),
            np.full(self.length, PADDING_DOCUMENT, np.int32),
            np.zeros(self.length, np.bool_),
            np.full(self.length, OTHER, np.uint8),
        )
        start = 0
        pieces = []
        for number, (context, targets, classes, piece) in enumerate(segments):
            middle, end = start + len(context), start + len(context) + len(targets)
            row.tokens_L[start:end] = context + targets
            row.document_ids_L[start:end] = number
            row.maskable_L[middle:end] = True
            row.classes_L[middle:end] = classes
            if piece is not None:
                pieces.append((middle, piece))
            start = end
        return row._replace(pieces=tuple(pieces))
