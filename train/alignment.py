"""Chunks: the shortest spans of a text on whose both ends two tokenizations agree.

Both tokenizations are given by the byte of the text at which each token ends (`encode_with_ends` of
mdm/token_bytes.py), so any two tokenizers can be aligned, and nothing but the text is compared. A byte
where a token of each ends is a common boundary; a chunk is what lies between two neighbouring ones.
No other choice of common boundaries gives shorter chunks.

Special and template tokens (start, end, chat marks) stand for no bytes of the text and take no part:
align the content alone and add them afterwards.

Shapes: N tokens of one tokenization, M of the other.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def align(ends_N: Ints, ends_M: Ints) -> tuple[Ints, Ints]:
    """The chunk, from 0, of each token of two tokenizations of one text: chunk_N, chunk_M, int64.

    Given are non-decreasing byte offsets in the text, the last one its length in both. Chunks are
    minimal and in order, both tokenizations have a token in each, and its tokens stand for the same
    bytes of the text in both. Tokens of no bytes belong to the chunk before them, at the start of the
    text to the first. Linear in the bytes of the text. Without tokens on both sides there are no chunks.
    """
    assert _length(ends_N) == _length(ends_M), (
        f"one tokenization ends at byte {_length(ends_N)} of the text, the other at {_length(ends_M)}"
    )
    return _chunks(ends_N, ends_M), _chunks(ends_M, ends_N)


def _chunks(ends_N: Ints, ends_M: Ints) -> Ints:
    """Per token, the number of common boundaries strictly below its end."""
    ends_other = np.zeros(_length(ends_M) + 1, np.bool_)
    ends_other[ends_M] = True
    closes_N = ends_other[ends_N] & (ends_N > 0)
    # Of tokens with one end the last one closes: the others behind it have no bytes.
    closes_N[:-1] &= ends_N[:-1] < ends_N[1:]
    return np.cumsum(closes_N, dtype=np.int64) - closes_N


def _length(ends: Ints) -> int:
    return int(ends[-1]) if len(ends) else 0
