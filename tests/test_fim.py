"""Fill in the middle for AR models: whose marks a tokenizer has, and the text made of them."""

import pytest
from students import random_ar
from tiny import byte_tokenizer, word_tokenizer

from mdm.autoregressive import DecodingSettings, write
from mdm.errors import RequestError
from mdm.fim import MARKS, as_continuation, marks
from mdm.generate import Hole
from mdm.vocab import read_vocab

START = 256


@pytest.mark.parametrize("names", MARKS)
def test_marks_of_each_family(names):
    assert marks(read_vocab(byte_tokenizer(names))) == (259, 260, 261)
    # In whatever order the tokenizer has them.
    suffix_first = (names[1], names[0], names[2])
    assert marks(read_vocab(byte_tokenizer(suffix_first))) == (260, 259, 261)


@pytest.mark.parametrize("extra", [(), ("<|fim_prefix|>", "<|fim_suffix|>"), ("<fim_middle>",)])
def test_no_marks(extra):
    assert marks(read_vocab(byte_tokenizer(extra))) is None


def test_the_first_complete_family_counts():
    both = ("<|fim_prefix|>", *MARKS[1], "<|fim_suffix|>", "<|fim_middle|>")
    assert marks(read_vocab(byte_tokenizer(both))) == (259, 263, 264)
    halves = ("<|fim_prefix|>", *MARKS[1])
    assert marks(read_vocab(byte_tokenizer(halves))) == (260, 261, 262)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((START, 1, 2), (3, 4), (START, 259, 1, 2, 260, 3, 4, 261)),
        ((1, 2), (3, 4), (259, 1, 2, 260, 3, 4, 261)),
        ((START,), (3,), (START, 259, 260, 3, 261)),
        ((START, 1), (), (START, 259, 1, 260, 261)),
        ((), (3,), (259, 260, 3, 261)),
        ((START, START, 1), (3,), (START, 259, START, 1, 260, 3, 261)),
    ],
)
def test_prefix_suffix_middle(before, after, expected):
    vocab = read_vocab(byte_tokenizer(MARKS[0]))
    hole = Hole(before, 5, after, stop=("x",), key=("k", 3))
    assert as_continuation(hole, vocab, (259, 260, 261)) == Hole(
        expected, 5, (), stop=("x",), key=("k", 3)
    )


def test_a_continuation_can_be_written():
    ar = random_ar()
    assert marks(read_vocab(word_tokenizer())) is None
    hole = Hole((12, 3), 4, (5, 6))
    with pytest.raises(RequestError, match="trained to fill in the middle"):
        write(ar, [hole], DecodingSettings())
    (found,) = write(ar, [as_continuation(hole, ar.vocab, (9, 10, 11))], DecodingSettings())
    (same,) = write(ar, [Hole((12, 9, 3, 10, 5, 6, 11), 4)], DecodingSettings())
    assert found == same
