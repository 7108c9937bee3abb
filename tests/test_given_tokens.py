"""Tokens that a document brings along: kept where they spell the text, and nowhere else."""

import dataclasses
import json

import numpy as np
import pytest
import tiny
from test_mapped import vocab_of

from mdm.errors import DataError
from mdm.train.dataset import DataSettings, prepare
from mdm.train.documents import Document, document_of_row
from mdm.train.given_tokens import given_tokens, spans_of
from mdm.vocab import read_vocab

VOCAB = vocab_of(("return", "é"))
TEXT = "return é\n"
DRAWN = [*b"ret", *b"urn", *b" ", *"é".encode(), ord("\n")]  # byte by byte: not as it is encoded


def rows_of(tmp_path, rows, reader=None, **settings):
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    chosen = DataSettings(
        sources=(str(source),), length=48, held_out_fraction=0, eos_padding="none", **settings
    )
    return prepare(chosen, VOCAB, tmp_path / "data", reader)


def learnt(data, row):
    batch = data.train.batch([row])
    return batch.tokens_BL[batch.maskable_BL].tolist()


@pytest.mark.parametrize("cut", [False, True])
def test_drawn_tokens_are_learnt_as_they_were_drawn(tmp_path, cut):
    ids = DRAWN if cut else [*DRAWN, VOCAB.eos_id]
    row = {"prompt": "x", "response": TEXT, "token_ids": ids, "cut": cut}
    data = rows_of(tmp_path, [row])
    assert learnt(data, 0) == (DRAWN if cut else [*DRAWN, VOCAB.eos_id])
    assert VOCAB.encode(TEXT) != DRAWN


@pytest.mark.parametrize(
    "ids",
    [
        DRAWN[:-1],  # other text
        [*DRAWN, ord("x")],
        [10**6, *DRAWN],  # another vocabulary
        [-1, *DRAWN],
        [VOCAB.eos_id, *DRAWN],
        [*DRAWN, VOCAB.eos_id, VOCAB.eos_id],
    ],
)
def test_tokens_that_do_not_spell_the_text_are_not_used(tmp_path, ids):
    data = rows_of(tmp_path, [{"prompt": "x", "response": TEXT, "token_ids": ids}])
    assert learnt(data, 0) == [*VOCAB.encode(TEXT), VOCAB.eos_id]


def test_other_tokenizers_encode_the_text(tmp_path):
    document = Document(TEXT, "x", "p", tokens=tuple(DRAWN))
    ids, ends = given_tokens(VOCAB, document)
    assert (ids, ends.tolist()) == (DRAWN, list(range(1, len(TEXT.encode()) + 1)))
    words = read_vocab(tiny.word_tokenizer())
    assert given_tokens(words, document) is None
    assert given_tokens(VOCAB, Document(TEXT, "x")) is None


def test_classes_and_readings_follow_the_drawn_tokens(tmp_path):
    row = {"text": TEXT, "token_ids": DRAWN, "origin": "a.py"}
    data = rows_of(tmp_path, [row], vocab_of(("return é",)), language="python")
    batch = data.train.batch([0])
    spelt = batch.tokens_BL[0, 1 : 1 + len(DRAWN)].tolist()
    assert spelt == DRAWN
    classes = batch.classes_BL[0, 1 : 1 + len(DRAWN)].tolist()
    assert len(set(classes[:6])) == 1  # the six bytes of "return" are one word
    assert classes[0] != classes[7]
    reading = data.readings.batch([0])
    ends = reading.student_ends_BL[0, 1 : 1 + len(DRAWN)].tolist()
    assert ends == list(range(1, len(TEXT.encode()) + 1))


def test_samples_count_as_often_as_they_were_drawn(tmp_path):
    row = {"prompt": "x", "response": TEXT}
    assert len(rows_of(tmp_path, [row, row]).train) == 1
    drawn = {**row, "token_ids": DRAWN}
    assert len(rows_of(tmp_path, [drawn, drawn, drawn]).train) == 3


def test_spans():
    assert spans_of("aé😀b", np.cumsum([1, 2, 4, 1])) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert spans_of("é😀", np.cumsum([1, 1, 3, 1])) == [(0, 1), (0, 1), (1, 2), (1, 2)]
    assert spans_of("a é", np.cumsum([2, 1, 1])) == [(0, 2), (2, 3), (2, 3)]


def test_bad_token_ids():
    for value in ("12", [1, "2"], [True], 3):
        with pytest.raises(DataError, match=r"line 7: `token_ids` must be a list of whole numbers"):
            document_of_row({"text": "x", "token_ids": value}, "line 7")
    assert document_of_row({"text": "x", "token_ids": None}, "o").tokens is None


def test_a_cut_text_has_no_end_token():
    document = Document(TEXT, "x", "p", cut=True, tokens=(*DRAWN, VOCAB.eos_id))
    assert given_tokens(VOCAB, document) is None
    assert given_tokens(VOCAB, dataclasses.replace(document, cut=False))[0] == DRAWN
