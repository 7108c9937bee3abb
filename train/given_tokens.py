"""Tokens that a document brings along: those a teacher drew, where encoding the text gives others.

A sampled text is often not spelled as the tokenizer would spell it. Learnt as it was drawn, it is a
sample of the teacher; encoded again it is not quite one.
Shapes: N tokens of a text.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from mdm.token_bytes import token_bytes
from mdm.vocab import Vocab

from .documents import Document


def given_tokens(
    vocab: Vocab, document: Document
) -> tuple[list[int], npt.NDArray[np.int64]] | None:
    """The tokens a document brings, and the bytes of its text at which they end; None if there are none,
    or they do not spell the text in this vocabulary, byte by byte.

    An end token behind the text is left out: what follows a text is decided in packing.py.
    """
    if document.tokens is None:
        return None
    table = token_bytes(vocab)
    ids = list(document.tokens)
    spelt = [table[i] if 0 <= i < len(table) else None for i in ids]
    if spelt and spelt[-1] is None and not document.cut:
        ids, spelt = ids[:-1], spelt[:-1]
    known = [value for value in spelt if value is not None]
    if len(known) < len(spelt) or b"".join(known) != document.text.encode():
        return None
    return ids, np.cumsum([len(value) for value in known], dtype=np.int64)


def spans_of(text: str, ends_N: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """The characters (from, to) of each token; one that holds a part of a character covers the whole."""
    data = np.frombuffer(text.encode(), np.uint8)
    begins = (data & 0xC0) != 0x80  # all bytes but those inside a character
    character = np.concatenate([[0], np.cumsum(begins)])
    starts = [0, *ends_N.tolist()]
    return [
        (int(character[low + 1]) - 1, int(character[high]))
        if high > low
        else (int(character[low]),) * 2
        for low, high in itertools.pairwise(starts)
    ]
