"""Committed text: what can be sent while a row is still being denoised, and never taken back.

Certain are the tokens up to the first open position, the text up to an end token or a stop string,
without an incomplete UTF-8 character and without what could become a stop string.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from mdm.vocab import Vocab

INCOMPLETE = "\ufffd"  # what a decoder shows for the first bytes of a character


class CommittedText:
    """The text of one hole, as it becomes certain.

    length   open positions at the start
    stop     strings that end the text
    end_ids  tokens that end the text
    """

    def __init__(
        self, vocab: Vocab, length: int, stop: Sequence[str], end_ids: Collection[int]
    ) -> None:
        self.vocab, self.stop, self.end_ids = vocab, tuple(stop), frozenset(end_ids)
        self.tokens: list[int | None] = [None] * length
        self.sent = ""
        self._known = 0  # tokens without a gap from the left
        self._ended = False

    def add(self, positions: Sequence[int], tokens: Sequence[int]) -> str:
        """Take in decided tokens; the text that became certain by them ("" if none did)."""
        for position, token in zip(positions, tokens, strict=True):
            self.tokens[position] = token
        known = self._known
        while known < len(self.tokens) and self.tokens[known] is not None:
            known += 1
        if known == self._known or self._ended:
            return ""
        self._known = known
        ids = [token for token in self.tokens[:known] if token is not None]
        end = next((i for i, token in enumerate(ids) if token in self.end_ids), None)
        while end is None and known < len(self.tokens) and ids and ids[-1] in self.vocab.byte_ids:
            ids.pop()  # the text of a run of bytes is settled by what follows it
        text = self.vocab.decode(ids[:end])
        places = [text.find(string) for string in self.stop if string in text]
        if places:
            text, self._ended = text[: min(places)], True
        elif end is not None:
            self._ended = True
        else:
            text = hold_back(text, self.stop)
        return self._send(text)

    def finish(self, text: str) -> str:
        """What is left to send of the finished text."""
        self._ended = True
        return self._send(text)

    def _send(self, text: str) -> str:
        # A tokenizer whose text is not a growing one waits for the end rather than take back.
        new = text[len(self.sent) :] if text.startswith(self.sent) else ""
        self.sent += new
        return new


def hold_back(text: str, stop: Sequence[str]) -> str:
    """The text without what may still change: an incomplete character, the beginning of a stop string."""
    text = text.rstrip(INCOMPLETE)
    longest = 0
    for string in stop:
        for size in range(min(len(string) - 1, len(text)), longest, -1):
            if text.endswith(string[:size]):
                longest = size
                break
    return text[: len(text) - longest]
