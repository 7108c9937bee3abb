"""Which token a student would write first, to write given bytes: how a teacher's token is split.

The bytes are encoded by the student's tokenizer on their own, without what stands around them (and
without half a character at their end). Where that gives other bytes (a tokenizer that adds a space, half
a character at the start), it is the longest token that begins the bytes.
Shapes: V tokens of the teacher.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import torch

from mdm.token_bytes import token_bytes
from mdm.vocab import Vocab

NO_PIECE = -1
_MEMORY = 2**20  # byte strings remembered; more are worked out again


class Pieces:
    """First pieces in a student's tokens, remembered."""

    def __init__(self, student: Vocab) -> None:
        self._vocab = student
        self._bytes = token_bytes(student)
        self._id_of: dict[bytes, int] = {}
        for token, value in enumerate(self._bytes):
            if value:
                self._id_of.setdefault(value, token)
        self._longest = max(map(len, self._id_of), default=0)
        self._known: dict[bytes, int] = {}

    def first(self, wanted: Sequence[bytes]) -> list[int]:
        """The student's first token for each of the byte strings; NO_PIECE if it has none."""
        new = {value for value in wanted if value not in self._known}
        if len(self._known) + len(new) > _MEMORY:
            self._known, new = {}, set(wanted)
        self._work_out(sorted(new))
        return [self._known[value] for value in wanted]

    def _work_out(self, new: Sequence[bytes]) -> None:
        texts = [value.decode("utf-8", "ignore") for value in new]
        for value, ids in zip(new, self._vocab.encode_batch(texts), strict=True):
            own = self._bytes[ids[0]] if ids else None
            fits = own and value.startswith(own)
            self._known[value] = ids[0] if fits else self._longest_start(value)

    def _longest_start(self, value: bytes) -> int:
        for size in range(min(len(value), self._longest), 0, -1):
            if value[:size] in self._id_of:
                return self._id_of[value[:size]]
        return NO_PIECE


class Continuations:
    """The teacher's tokens that begin with given bytes and go on, and how the student goes on."""

    def __init__(
        self, teacher: Vocab, num_tokens: int, pieces: Pieces, ends: dict[int, int]
    ) -> None:
        """`ends`: tokens of the teacher without text that mean the same as one of the student's."""
        table = token_bytes(teacher)
        padding: tuple[bytes | None, ...] = (None,) * max(0, num_tokens - len(table))
        self.bytes = (*table, *padding)[:num_tokens]
        self.lengths_V = torch.tensor([len(value or b"") for value in self.bytes])
        self._pieces = pieces
        written = [(value, token) for token, value in enumerate(self.bytes) if value]
        self._sorted = sorted(written)
        self._keys = [value for value, _ in self._sorted]
        self._found: dict[bytes, tuple[torch.Tensor, torch.Tensor]] = {}
        firsts = pieces.first([value for value, _ in written])
        self.first_V = torch.full((num_tokens,), NO_PIECE)
        self.first_V[[token for _, token in written]] = torch.tensor(firsts, dtype=torch.long)
        for token, same in ends.items():
            if token < num_tokens:
                self.first_V[token] = same

    def behind(self, start: bytes) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens, pieces): the teacher's tokens longer than `start` that begin with it, and the
        student's first token of what each has behind it."""
        if start not in self._found:
            low = bisect.bisect_right(
                self._keys, start
            )  # behind `start` itself, which is not longer
            high = bisect.bisect_left(self._keys, _after(start), lo=low) if _after(start) else None
            chosen = self._sorted[low:high]
            firsts = self._pieces.first([value[len(start) :] for value, _ in chosen])
            if len(self._found) >= _MEMORY // 2**8:
                self._found = {}
            self._found[start] = (
                torch.tensor([token for _, token in chosen], dtype=torch.long),
                torch.tensor(firsts, dtype=torch.long),
            )
        return self._found[start]

    def joined(self, start: bytes, tokens: Sequence[int]) -> list[int]:
        """The student's first token of `start` followed by each of these tokens of the teacher."""
        return self._pieces.first([start + (self.bytes[token] or b"") for token in tokens])

    def alone(self, start: bytes) -> int:
        """The student's first token of `start`."""
        return self._pieces.first([start])[0]


def _after(start: bytes) -> bytes:
    """The smallest byte string above all that begin with `start`; empty if there is none."""
    trimmed = start.rstrip(b"\xff")
    return trimmed[:-1] + bytes([trimmed[-1] + 1]) if trimmed else b""
