"""Rows from tokens: nothing lost, nothing twice, every segment opened, little room wasted."""

import random

import numpy as np
import pytest

from mdm.train.packing import Packer

START, END, PAD = 1, 2, 0


def packer(**changes):
    settings = {
        "length": 32,
        "min_tokens": 4,
        "packing": True,
        "eos_padding": "none",
        "eos_block": 8,
        "start_id": START,
        "eos_id": END,
        "pad_id": PAD,
    }
    return Packer(**(settings | changes))


def pack(packer, documents):
    rows = [row for tokens in documents for row in packer.add(tokens)]
    return rows + packer.finish()


def segments(row):
    """(tokens, maskable) of each segment, after checking that segments are contiguous."""
    ids = row.document_ids_L
    count = ids.max() + 1
    assert (ids == np.concatenate([np.repeat(range(count), np.bincount(ids[ids >= 0])),
                                   np.full((ids < 0).sum(), -1)])).all()  # fmt: skip
    return [
        (row.tokens_L[ids == i].tolist(), row.maskable_L[ids == i].tolist()) for i in range(count)
    ]


def numbered(lengths):
    """Documents in which every token is different, so that order and loss show."""
    first = 10
    for length in lengths:
        yield list(range(first, first + length))
        first += length


LENGTHS = [
    [random.Random(seed).choice([3, 5, 20, 31, 32, 60, 300]) for _ in range(40)]
    for seed in range(5)
]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("lengths", [*LENGTHS, [31], [30], [29], [3], [27, 3, 27, 3], [34] * 9])
def test_every_token_comes_once_in_order_and_every_segment_is_opened(lengths, packing):
    documents = list(numbered(lengths))
    rows = pack(packer(packing=packing), documents)
    found = []
    for row in rows:
        parts = segments(row)
        assert len(parts) == 1 or packing
        for tokens, maskable in parts:
            assert tokens[0] == START
            assert maskable == [False] + [True] * (len(tokens) - 1)
            assert len(tokens) - 1 >= 4  # min_tokens, also for the pieces of a long document
            found += tokens[1:]
        padding = row.document_ids_L == -1
        assert (row.tokens_L[padding] == PAD).all()
        assert not row.maskable_L[padding].any()
    assert found == [token for document in documents for token in (*document, END)]


def test_segments_of_different_documents_have_different_ids():
    (row,) = pack(packer(), [[5] * 4, [6] * 4, [7] * 4])
    assert [set(tokens) for tokens, _ in segments(row)] == [{START, END, t} for t in (5, 6, 7)]


def test_little_room_is_wasted():
    lengths = [random.Random(1).randint(10, 400) for _ in range(300)]
    rows = pack(packer(length=128, min_tokens=8), list(numbered(lengths)))
    padding = np.mean([(row.document_ids_L < 0).mean() for row in rows])
    assert padding < 0.02


def test_rows_have_small_exact_types():
    (row,) = pack(packer(), [[5] * 4])
    assert [column.dtype for column in row[:4]] == [np.int32, np.int32, np.bool_, np.uint8]
    assert {len(column) for column in row[:4]} == {32}


@pytest.mark.parametrize(
    ("tokens", "prompt", "reason"),
    [
        ([5] * 2, None, "too short"),
        ([5] * 3, None, None),  # the eos counts
        ([5], [9] * 29, None),  # start + 29 + one token + eos
        ([5], [9] * 30, "prompt too long"),
        ([5] * 99, [9] * 27, None),  # room for min_tokens of the response
        ([5] * 99, [9] * 28, "prompt too long"),
        ([], [9], "empty"),
        ([5], [], None),
    ],
)
def test_refusals(tokens, prompt, reason):
    one = packer()
    assert one.refusal(tokens, prompt) == reason
    if reason is None:
        one.add(tokens, prompt)
    else:
        with pytest.raises(AssertionError):
            one.add(tokens, prompt)


def test_a_response_is_learnt_and_its_prompt_is_not():
    (row,) = packer().add([5, 6], prompt=[8, 9])
    assert row.tokens_L[:7].tolist() == [START, 8, 9, 5, 6, END, PAD]
    assert row.maskable_L.nonzero()[0].tolist() == [3, 4, 5]
    assert row.document_ids_L.tolist() == [0] * 6 + [-1] * 26


def test_a_template_that_opens_with_the_start_token_is_not_opened_twice():
    (row,) = packer().add([5, 6], prompt=[START, 9])
    assert row.tokens_L[:5].tolist() == [START, 9, 5, 6, END]


@pytest.mark.parametrize(
    ("eos_padding", "response", "targets"),
    [
        ("none", 2, 3),
        ("block", 2, 8),
        ("block", 7, 8),  # the eos fills the block
        ("block", 8, 16),
        ("block", 24, 29),  # the end of the row comes before the end of the block
        ("row", 2, 29),
        ("document", 2, 5),  # start, two of the prompt, two of the response, three eos
        ("document", 4, 5),
        ("document", 5, 13),
        ("document", 27, 29),
    ],
)
def test_eos_padding_is_learnt_and_the_rest_is_not(eos_padding, response, targets):
    (row,) = packer(eos_padding=eos_padding).add([5] * response, prompt=[8, 9])
    expected = [5] * response + [END] * (targets - response)
    assert row.tokens_L[3 : 3 + targets].tolist() == expected
    assert row.maskable_L.tolist() == [False] * 3 + [True] * targets + [False] * (29 - targets)
    assert (row.document_ids_L[3 + targets :] == -1).all()


@pytest.mark.parametrize("eos_padding", ["none", "block", "row", "document"])
def test_a_cut_response_has_no_eos(eos_padding):
    (row,) = packer(eos_padding=eos_padding).add([5] * 40, prompt=[8, 9])
    assert row.tokens_L.tolist() == [START, 8, 9] + [5] * 29
    (row,) = packer(eos_padding=eos_padding).add([5] * 28, prompt=[8, 9])
    assert row.tokens_L.tolist()[-2:] == [5, END]


# --- classes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS[:2])
def test_every_token_keeps_its_class(lengths, packing):
    one, found = packer(packing=packing), {}
    documents = list(numbered(lengths))
    classes = {token: 1 + token % 5 for tokens in documents for token in tokens}
    rows = [row for t in documents for row in one.add(t, classes=[classes[x] for x in t])]
    for row in rows + one.finish():
        found |= dict(zip(row.tokens_L.tolist(), row.classes_L.tolist(), strict=True))
    assert found == {START: 0, END: 0, PAD: 0, **classes}


def test_without_classes_everything_is_other():
    for prompt in (None, [8, 9]):
        one = packer()
        (row,) = one.add([5] * 9, prompt) + one.finish()
        assert not row.classes_L.any()


@pytest.mark.parametrize("eos_padding", ["none", "block", "row", "document"])
@pytest.mark.parametrize("response", [1, 7, 28, 29, 40])
def test_only_the_tokens_of_a_response_have_classes(eos_padding, response):
    (row,) = packer(eos_padding=eos_padding).add([5] * response, [8, 9], [3] * response)
    assert (row.classes_L == 3).tolist() == (row.tokens_L == 5).tolist()
    assert row.classes_L.sum() == 3 * min(response, 29)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("lengths", [[5], [6], [7], [40], [5, 6, 30, 31, 61], [4] * 9])
def test_documents_end_with_a_block_or_the_row(lengths, packing):
    """The pieces of a text lie on one grid from their start tokens on; only the last one is filled up."""
    one = packer(eos_padding="document", packing=packing)
    plain = packer(packing=packing)
    for tokens in numbered(lengths):
        classes = [3] * len(tokens)
        rows = one.add(tokens, classes=classes) + one.finish()
        before = plain.add(tokens) + plain.finish()
        assert len(rows) == len(before)
        for row, other in zip(rows[:-1], before[:-1], strict=True):
            assert row.tokens_L.tolist() == other.tokens_L.tolist()
        last, unfilled = rows[-1], before[-1]
        used, had = int((last.document_ids_L >= 0).sum()), int((unfilled.document_ids_L >= 0).sum())
        assert used == min(-(-had // 8) * 8, 32)
        assert last.tokens_L[had:used].tolist() == [END] * (used - had)
        assert last.maskable_L[1:used].all()
        assert last.classes_L[had - 1 :].sum() == 0  # eos is of no class


def test_documents_in_one_row_each_fill_their_blocks():
    one = packer(eos_padding="document")
    assert one.add([5] * 4) + one.add([6] * 8) == []
    (row,) = one.finish()
    assert [len(tokens) for tokens, _ in segments(row)] == [8, 16]


def test_there_is_one_class_for_each_token():
    with pytest.raises(AssertionError, match="one class"):
        packer().add([5] * 9, classes=[1] * 8)


# --- text that goes on -----------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("lengths", [*LENGTHS[:2], [31], [4], [27, 4, 27, 4]])
def test_a_cut_text_is_learnt_without_an_end(lengths, packing):
    one = packer(packing=packing)
    documents = [tokens for tokens in numbered(lengths) if len(tokens) >= 4]
    cut = [i % 3 != 1 for i in range(len(documents))]
    rows = [row for t, c in zip(documents, cut, strict=True) for row in one.add(t, cut=c)]
    found = []
    for row in rows + one.finish():
        for tokens, _ in segments(row):
            assert len(tokens) - 1 >= 4
            found += tokens[1:]
    assert found == [
        token
        for tokens, c in zip(documents, cut, strict=True)
        for token in (*tokens, *([] if c else [END]))
    ]


@pytest.mark.parametrize("eos_padding", ["none", "block", "row", "document"])
@pytest.mark.parametrize("response", [1, 8, 28, 29, 40])
def test_a_response_that_was_cut_is_followed_by_nothing(eos_padding, response):
    one = packer(eos_padding=eos_padding)
    (row,) = one.add([5] * response, [8, 9], [3] * response, cut=True)
    learnt = min(response, 29)
    assert row.tokens_L[row.maskable_L].tolist() == [5] * learnt
    assert row.classes_L[row.maskable_L].tolist() == [3] * learnt
    assert (row.document_ids_L[3 + learnt :] == -1).all()
    assert END not in row.tokens_L


@pytest.mark.parametrize(
    ("tokens", "prompt", "reason"),
    [
        ([5] * 3, None, "too short"),  # no eos to count
        ([5] * 4, None, None),
        ([5], [9] * 30, None),  # start + 30 + one token
        ([5], [9] * 31, "prompt too long"),
        ([5] * 2, [9] * 30, "prompt too long"),
        ([], [9], "empty"),
    ],
)
def test_refusals_of_what_was_cut(tokens, prompt, reason):
    assert packer().refusal(tokens, prompt, cut=True) == reason
    if reason is None:
        packer().add(tokens, prompt, cut=True)
    assert packer(min_tokens=0).refusal([], cut=True) == "too short"


def test_a_response_leaves_the_open_row_alone():
    one = packer()
    assert one.add([5] * 6) == []
    assert len(one.add([6], prompt=[7])) == 1
    assert one.add([8] * 6) == []
    (row,) = one.finish()
    assert [set(tokens) for tokens, _ in segments(row)] == [{START, 5, END}, {START, 8, END}]
