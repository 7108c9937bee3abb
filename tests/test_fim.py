"""Fill in the middle for AR models: the families' published tokens and prompts, told by a tokenizer.

Ids and orders are those of the model cards and papers, written out by hand here.
"""

import dataclasses

import pytest
from students import random_ar
from tiny import CHAT_TEMPLATE, byte_tokenizer, word_tokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from mdm.autoregressive import DecodingSettings, write
from mdm.errors import ConfigError, RequestError, VocabError
from mdm.fim import (
    FAMILIES,
    Slot,
    Template,
    as_continuation,
    end_ids,
    few_shot,
    find_template,
    nearest,
    template,
)
from mdm.generate import Hole
from mdm.vocab import read_vocab

START, END, PAD = 256, 257, 258  # of the byte tokenizer
BEFORE, AFTER = (7, 8), (9,)

# Token names as published; ids where the tables give them (Qwen2.5-Coder, CodeLlama, CodeGemma).
TOKENS = {
    "qwen": {
        "<|endoftext|>": 151643,
        "<|fim_prefix|>": 151659,
        "<|fim_middle|>": 151660,
        "<|fim_suffix|>": 151661,
        "<|fim_pad|>": 151662,
        "<|repo_name|>": 151663,
        "<|file_sep|>": 151664,
    },
    "codegemma": {
        "<eos>": 1,
        "<|fim_prefix|>": 67,
        "<|fim_middle|>": 68,
        "<|fim_suffix|>": 69,
        "<|file_separator|>": 70,
    },
    "starcoder": {
        "<|endoftext|>": 20,
        "<fim_prefix>": 21,
        "<fim_middle>": 22,
        "<fim_suffix>": 23,
        "<fim_pad>": 24,
        "<file_sep>": 25,
    },
    "santacoder": {
        "<|endoftext|>": 20,
        "<fim-prefix>": 21,
        "<fim-middle>": 22,
        "<fim-suffix>": 23,
        "<fim-pad>": 24,
    },
    "codellama": {"▁<PRE>": 32007, "▁<SUF>": 32008, "▁<MID>": 32009, "▁<EOT>": 32010},
    "deepseek": {
        "<\uff5cend\u2581of\u2581sentence\uff5c>": 30,
        "<\uff5cfim\u2581hole\uff5c>": 31,
        "<\uff5cfim\u2581begin\uff5c>": 32,
        "<\uff5cfim\u2581end\uff5c>": 33,
    },
    "codestral": {"</s>": 2, "[PREFIX]": 40, "[MIDDLE]": 41, "[SUFFIX]": 42},
}
# What stands around BEFORE = 7 8 and AFTER = 9, and what ends the middle.
PROMPTS = {
    ("qwen", "psm"): ([151659, 7, 8, 151661, 9, 151660], (151643,)),
    ("codegemma", "psm"): ([67, 7, 8, 69, 9, 68], (70, 1)),
    ("starcoder", "psm"): ([21, 7, 8, 23, 9, 22], (20,)),
    ("starcoder", "spm"): ([21, 23, 9, 22, 7, 8], (20,)),
    ("santacoder", "psm"): ([21, 7, 8, 23, 9, 22], (20,)),
    ("santacoder", "spm"): ([21, 23, 9, 22, 7, 8], (20,)),
    ("codellama", "psm"): ([32007, 7, 8, 32008, 9, 32009], (32010,)),
    ("codellama", "spm"): ([32007, 32008, 9, 32009, 7, 8], (32010,)),
    ("deepseek", "psm"): ([32, 7, 8, 31, 9, 33], (30,)),
    ("codestral", "spm"): ([42, 9, 40, 7, 8], (2,)),
}
DEFAULT = dict(reversed(PROMPTS))  # the first named of each


def vocab_of(tokens):
    """A vocabulary with exactly these tokens at these ids, a few words, start 100 and end 101."""
    words = {f"w{i}": i for i in range(20) if i not in tokens.values()}
    tokenizer = Tokenizer(models.WordLevel({**words, **tokens, "[S]": 100, "[E]": 101}, "w0"))
    tokenizer.add_special_tokens([*tokens, "[S]", "[E]"])
    return read_vocab(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="[S]", eos_token="[E]")
    )


def byte_vocab(*extra):
    return read_vocab(byte_tokenizer(extra))


# --- families ------------------------------------------------------------------------------------


def test_every_family_and_order_is_in_the_tables():
    assert set(TOKENS) == set(FAMILIES)
    assert set(PROMPTS) == {(name, order) for name in FAMILIES for order in FAMILIES[name].orders}
    assert {name: next(iter(family.orders)) for name, family in FAMILIES.items()} == DEFAULT


@pytest.mark.parametrize(("family", "order"), PROMPTS)
def test_published_tokens_and_prompts(family, order):
    vocab = vocab_of(TOKENS[family])
    expected, ends = PROMPTS[family, order]
    for named in (family, ""):
        found = template(vocab, order, named)
        assert (found.family, found.order, found.end_ids) == (family, order, ends)
        assert list(found.prompt(BEFORE, AFTER)) == expected
        assert list(found.prompt((100, *BEFORE), AFTER)) == [100, *expected]
        assert found.num_marks == len(expected) - 3
        assert (found.start_id, found.eos_id) == (100, 101)
    if order == DEFAULT[family]:
        assert find_template(vocab) == template(vocab) == found
        assert end_ids(vocab) == ends


def test_names_shared_by_families_are_told_apart_by_what_else_is_there():
    marks = FAMILIES["qwen"].marks
    assert marks == FAMILIES["codegemma"].marks
    cases = {
        ("<|file_separator|>",): "codegemma",
        ("<|fim_pad|>",): "qwen",
        (): "qwen",
        ("<|file_separator|>", "<|fim_pad|>"): "qwen",
    }
    for extra, family in cases.items():
        assert template(byte_vocab(*marks, *extra)).family == family
    # Whoever knows better says so.
    named = template(byte_vocab(*marks, "<|fim_pad|>"), family="codegemma")
    assert (named.family, named.end_ids) == ("codegemma", (END,))


def test_marks_count_when_they_are_complete():
    starcoder = FAMILIES["starcoder"].marks
    both = ("<|fim_prefix|>", *starcoder, "<|fim_suffix|>", "<|fim_middle|>")
    assert template(byte_vocab(*both)).prompt((), ()) == (259, 263, 264)
    assert template(byte_vocab(*both), family="starcoder").prompt((), ()) == (260, 261, 262)
    halves = ("<|fim_prefix|>", *starcoder)
    assert template(byte_vocab(*halves)).prompt((), ()) == (260, 261, 262)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_mark_of_its_own_the_middle_ends_with_the_text(family):
    found = template(byte_vocab(*FAMILIES[family].marks))
    assert found.end_ids == (END,)
    assert len(found.prompt((1,), (2,))) == found.num_marks + 2


@pytest.mark.parametrize("extra", [(), ("<|fim_prefix|>", "<|fim_suffix|>"), ("<fim_middle>",)])
def test_no_marks(extra):
    vocab = byte_vocab(*extra)
    assert find_template(vocab) is None
    assert end_ids(vocab) == ()
    with pytest.raises(VocabError) as error:
        template(vocab)
    for part in ("of any family", *FAMILIES, "another kind of target"):
        assert part in str(error.value)


def test_a_named_family_says_what_is_missing():
    vocab = byte_vocab("<fim_prefix>", "<fim_middle>")
    with pytest.raises(VocabError, match=r"tokens <fim_suffix> of the family 'starcoder'.*teacher"):
        template(vocab, family="starcoder")


@pytest.mark.parametrize(
    ("order", "family", "text"),
    [
        ("psn", "", "unknown fill-in-the-middle order of the family 'starcoder' 'psn'.*'psm'"),
        ("", "star", "unknown fill-in-the-middle family 'star'; did you mean 'starcoder'"),
    ],
)
def test_unknown_names(order, family, text):
    with pytest.raises(ConfigError, match=text):
        template(vocab_of(TOKENS["starcoder"]), order, family)


@pytest.mark.parametrize(("family", "order"), [("qwen", "spm"), ("codestral", "psm")])
def test_an_order_in_which_a_family_was_not_trained(family, order):
    with pytest.raises(ConfigError, match=f"order of the family '{family}' '{order}'"):
        template(vocab_of(TOKENS[family]), order)


# --- prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((START, 1, 2), (3, 4), (START, 259, 1, 2, 260, 3, 4, 261)),
        ((1, 2), (3, 4), (259, 1, 2, 260, 3, 4, 261)),
        ((START,), (3,), (START, 259, 260, 3, 261)),
        ((START, 1), (), (START, 259, 1, 260, 261)),
        ((), (3,), (259, 260, 3, 261)),
        ((START, START, 1), (3,), (START, 259, START, 1, 260, 3, 261)),
        ((START, 1), (3, END), (START, 259, 1, 260, 3, 261)),
        ((1,), (END, 3, END, END), (259, 1, 260, END, 3, 261)),
        ((1, END), (END,), (259, 1, END, 260, 261)),
    ],
)
def test_prefix_suffix_middle(before, after, expected):
    found = template(byte_vocab("<fim_prefix>", "<fim_suffix>", "<fim_middle>"))
    assert found.prompt(before, after) == expected
    hole = Hole(before, 5, after, stop=("x",), key=("k", 3))
    assert as_continuation(hole, found) == Hole(expected, 5, (), stop=("x",), key=("k", 3))


def test_a_start_token_that_the_pieces_bring_along_is_not_doubled():
    found = Template("toy", "psm", (5, 6, Slot.PREFIX, Slot.SUFFIX), (9,), 5, 9, opened=True)
    assert found.prompt((5, 1), (2,)) == found.prompt((1,), (2,)) == (5, 6, 1, 2)
    closed = dataclasses.replace(found, opened=False)
    assert closed.prompt((5, 1), (2,)) == (5, 5, 6, 1, 2)


def test_a_continuation_can_be_written():
    ar = random_ar()
    assert find_template(read_vocab(word_tokenizer())) is None
    hole = Hole((12, 3), 4, (5, 6))
    with pytest.raises(RequestError, match="trained to fill in the middle"):
        write(ar, [hole], DecodingSettings())
    marks = Template("toy", "psm", (9, Slot.PREFIX, 10, Slot.SUFFIX, 11), (13,), 12, 13)
    (found,) = write(ar, [as_continuation(hole, marks)], DecodingSettings())
    (same,) = write(ar, [Hole((12, 9, 3, 10, 5, 6, 11), 4)], DecodingSettings())
    assert found == same


@pytest.mark.parametrize(
    ("before", "after", "room", "expected"),
    [
        ([1, 2, 3], [4, 5, 6], 6, ([1, 2, 3], [4, 5, 6])),
        ([1, 2, 3], [4, 5, 6], 5, ([1, 2, 3], [4, 5])),
        ([1, 2, 3], [4, 5, 6], 2, ([3], [4])),
        ([1, 2, 3], [4], 3, ([2, 3], [4])),
        ([1], [4, 5, 6], 3, ([1], [4, 5])),
        ([1, 2], [], 1, ([2], [])),
        ([1, 2], [3], 0, ([], [])),
    ],
)
def test_what_is_nearest_to_the_hole_stays(before, after, room, expected):
    assert nearest(before, after, room) == expected


# --- by examples ---------------------------------------------------------------------------------


def chatty(chat_template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = chat_template
    return read_vocab(tokenizer)


def texts_of(vocab, found):
    """The decoded prompt in three parts, cut at the slots."""
    at = [found.pieces.index(slot) for slot in (Slot.PREFIX, Slot.SUFFIX)]
    assert sum(isinstance(piece, Slot) for piece in found.pieces) == 2
    parts = (found.pieces[: at[0]], found.pieces[at[0] + 1 : at[1]], found.pieces[at[1] + 1 :])
    return [vocab.decode(part, keep_special=True) for part in parts]


def test_examples_as_plain_text():
    vocab = byte_vocab()
    found = few_shot(vocab)
    head, between, tail = texts_of(vocab, found)
    assert head.endswith("</missing>\n\n<before>")
    assert head.startswith("A piece of code is missing")
    assert head.count("</missing>") == head.count("<missing>") == 3
    assert between == "</before>\n<after>"
    assert tail == "</after>\n<missing>"
    assert (found.family, found.order, found.end_ids) == ("few_shot", "psm", (ord("<"),))
    assert found.num_marks == len(head + between + tail)
    # The examples are code: each is whole when the missing part is put in.
    for example in head.split("\n<before>")[1:-1]:
        before, rest = example.split("</before>\n<after>")
        after, rest = rest.split("</after>\n<missing>")
        compile(
            before + rest.split("</missing>")[0] + after.replace("count", "x"), "example", "exec"
        )


def test_examples_as_turns_of_a_chat():
    vocab = chatty(CHAT_TEMPLATE)
    head, between, tail = texts_of(vocab, few_shot(vocab))
    turns = head.split("<|start|>")
    assert [turn.split("\n")[0] for turn in turns] == ["", *["user", "assistant"] * 3, "user"]
    assert all(turn.endswith("<|end|>") for turn in turns[1:-1])
    assert turns[2] == "assistant\n<missing>width * height</missing><|end|>"
    assert between == "</before>\n<after>"
    assert tail == "</after>\n<|end|><|start|>assistant\n<missing>"
    # Marks of the turns are special tokens, and the first one is the start of the text.
    found = few_shot(vocab)
    assert found.pieces[0] == START
    assert END in found.pieces
    assert found.prompt((START, 1), (2,)) == found.prompt((1,), (2,))


def test_tokens_around_the_slots_stay_as_they_are():
    """A prefix that would merge with what stands beside it is not encoded again."""
    found = few_shot(byte_vocab())
    before, after = (500, 501), (502,)  # ids that no text has
    prompt = found.prompt((START, *before), after)
    at = prompt.index(500)
    assert prompt[0] == START
    assert prompt[at : at + 2] == before
    assert len(prompt) == found.num_marks + 4


@pytest.mark.parametrize(
    "chat_template",
    [
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}{% endif %}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
    ],
)
def test_a_chat_template_that_loses_the_text(chat_template):
    with pytest.raises(VocabError, match="does not keep the text before and after a hole"):
        few_shot(chatty(chat_template))


def test_a_chat_template_that_refuses():
    with pytest.raises(VocabError, match="refuses these messages"):
        few_shot(chatty("{{ raise_exception(messages[0].content) }}"))
