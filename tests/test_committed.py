"""Committed text: pieces that add up to the result, whatever the order in which tokens are decided.

Bytes are token ids; start 256, end 257.
"""

import random

import pytest
from tiny_serve import byte_vocab

from mdm.generate import visible
from mdm.serve.committed import CommittedText, hold_back

END = 257
VOCAB = byte_vocab()


def pieces(ids, order, stop=(), chunk=1):
    """What is sent step by step, and last of all at the end."""
    text = CommittedText(VOCAB, len(ids), stop, (END,))
    sent = []
    for first in range(0, len(order), chunk):
        positions = order[first : first + chunk]
        sent.append(text.add(positions, [ids[i] for i in positions]))
    final = visible(VOCAB, ids, stop)[0]
    sent.append(text.finish(final))
    return sent, final


def ids_of(text):
    return list(text.encode())


TEXTS = [
    "def f(x):\n    return x",
    "naïve Übergröße — 数学 🧪🧪 end",
    "STOP",
    "a\n\n\nb",
    "ab" * 30,
]
STOPS = [
    (),
    ("\n",),
    ("\n\n",),
    ("STOP",),
    ("🧪", "학"),
    ("数学 ", "—"),
    ("abab", "aba"),
    ("xyz", "d"),
]


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_add_up_to_the_result_in_any_order(text, stop):
    for seed in range(30):
        draw = random.Random(seed)
        ids = ids_of(text)
        if seed % 3 == 1:
            ids.insert(draw.randrange(len(ids)), END)
        if seed % 5 == 2:
            ids[draw.randrange(len(ids))] = draw.randrange(128, 256)  # not UTF-8 any more
        order = list(range(len(ids)))
        if seed:
            draw.shuffle(order)
        sent, final = pieces(ids, order, stop, chunk=1 + seed % 4)
        assert "".join(sent) == final
        for string in stop:
            assert string not in final


def test_left_to_right_text_comes_with_its_tokens():
    sent, _ = pieces(ids_of("héy"), [0, 1, 2, 3])
    assert sent == ["h", "", "é", "y", ""]


def test_nothing_beyond_a_gap():
    text = CommittedText(VOCAB, 4, (), (END,))
    assert text.add([2, 3], [99, 100]) == ""
    assert text.add([0], [97]) == "a"
    assert text.add([1], [98]) == "bcd"


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_not_one():
    sent, final = pieces(ids_of("a\n\nb"), range(4), ("\n\nclass",))
    assert sent == ["a", "", "", "\n\nb", ""]
    assert final == "a\n\nb"
    sent, final = pieces(ids_of("a\n\nclass B"), range(10), ("\n\nclass",))
    assert "".join(sent) == final == "a"


def test_nothing_after_an_end_or_a_stop():
    ids = [*ids_of("ab"), END, *ids_of("cd")]
    sent, final = pieces(ids, range(5))
    assert (sent, final) == (["a", "b", "", "", "", ""], "ab")
    text = CommittedText(VOCAB, 6, ("x",), (END,))
    assert [text.add([i], [token]) for i, token in enumerate(ids_of("axbxcd"))] == ["a", *[""] * 5]


def test_an_unfinished_character_is_sent_at_the_end():
    sent, final = pieces([97, 0xE2, 0x82], range(3))
    assert sent == ["a", "", "", "\ufffd"]
    assert final == "a\ufffd"


@pytest.mark.parametrize(
    ("text", "stop", "kept"),
    [
        ("abc", (), "abc"),
        ("abc", ("cd",), "ab"),
        ("abc", ("bcd", "c!"), "a"),
        ("abc", ("abcd",), ""),
        ("abab", ("abc",), "ab"),
        ("abc", ("c",), "abc"),  # a whole stop string is not for this function
        ("abc\ufffd", ("cd",), "ab"),
        ("aa", ("aaa",), ""),
    ],
)
def test_hold_back(text, stop, kept):
    assert hold_back(text, stop) == kept


BYTES = {f"<0x{i:02X}>": i for i in range(256)}
WORDS = {"▁a": 300, "b": 301, "▁é": 302, "</s>": 303, "<s>": 304, "<unk>": 305}


def fallback_vocab():
    """A tokenizer of the Llama kind: words, and bytes that are decoded run by run."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    from mdm.vocab import read_vocab

    model = models.BPE({**BYTES, **WORDS}, [], byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["</s>", "<s>"])
    return read_vocab(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    )


def test_a_run_of_bytes_is_settled_by_what_follows_it():
    vocab = fallback_vocab()
    assert len(vocab.byte_ids) == 256
    for seed in range(200):
        draw = random.Random(seed)
        euro = [0xE2, 0x82, 0xAC]
        pool = [[300], [301], [302], euro, [0xFF], [0x0A], [0xC3]]
        ids = [token for part in draw.choices(pool, k=8) for token in part]
        if seed % 4 == 0:
            ids.insert(draw.randrange(len(ids)), 303)
        text = CommittedText(vocab, len(ids), (), (303,))
        order = list(range(len(ids)))
        if seed % 2:
            draw.shuffle(order)
        sent = [text.add([i], [ids[i]]) for i in order]
        final = visible(vocab, ids, ())[0]
        assert "".join([*sent, text.finish(final)]) == final


def test_a_text_that_shrinks_is_not_sent_twice():
    """A tokenizer whose text is not a growing one waits for the end."""

    class Odd:
        byte_ids = frozenset()

        def decode(self, ids):
            return {1: "ab", 2: "aXY", 3: "abZ"}[len(ids)]

    text = CommittedText(Odd(), 3, (), (END,))
    assert [text.add([i], [5]) for i in range(3)] == ["ab", "", "Z"]
    assert text.finish("abZ!") == "!"
