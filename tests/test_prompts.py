"""Prompts: which beginnings of which documents a student continues, and that none is held out.

In the byte tokenizer a token is a byte; 256 start, 257 end, 258 padding.
"""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest
import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mdm.errors import ConfigError, DataError, VocabError
from mdm.train.dataset import DataSettings, prepare
from mdm.train.documents import Document, Skips
from mdm.train.on_policy import OnPolicySettings
from mdm.train.prompts import Prompts, first_tokens, prompt_ids, write_prompts
from mdm.vocab import read_vocab

START, END, PAD = 256, 257, 258


def byte_vocab(*, template=tiny.CHAT_TEMPLATE, mask=None, extra=()):
    tokenizer = tiny.byte_tokenizer(extra)
    tokenizer.chat_template = template
    return read_vocab(tokenizer).with_mask(mask)


VOCAB = byte_vocab()


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def written(folder, sources, *, vocab=VOCAB, below=0, data=None, **settings):
    """The prompts of these sources, as lists of ids."""
    if isinstance(sources, list):
        sources = (write_rows(folder / "rows.jsonl", sources),)
    chosen = OnPolicySettings(**{"fraction": 1, "prompt_tokens": 4, **settings})
    chosen = dataclasses.replace(chosen, prompts=tuple(sources))
    write_prompts(chosen, data or DataSettings(), vocab, folder / "prompts", below)
    prompts = Prompts(folder / "prompts")
    found = [prompts[number] for number in range(len(prompts))]
    assert prompts.longest == max(map(len, found))
    assert all(type(token) is int for ids in found for token in ids)
    return found


def spelled(ids):
    """The text of a prompt behind its start token."""
    assert ids[0] == START
    return bytes(ids[1:]).decode()


# --- what a document gives -------------------------------------------------------------------------


def test_plain_text_gives_its_first_tokens(tmp_path):
    found = written(tmp_path, [{"text": "def f():\n"}, {"text": "naïve"}, {"text": "four"}])
    assert found == [
        [START, *b"def "],
        [START, *"naï".encode()],
        [START, *b"four"],
    ]


def test_a_prompt_is_given_as_it_is_and_its_response_is_not_used(tmp_path):
    rows = [
        {"prompt": "say it"},
        {"prompt": "a", "response": "never seen"},
        {"prompt": "", "response": "b"},
    ]
    assert written(tmp_path, rows) == [[START, *b"say it"], [START, *b"a"], [START]]


def test_chats_are_in_their_template_up_to_the_answer(tmp_path):
    user, other = ({"role": "user", "content": text} for text in ("hi", "and?"))
    answer = {"role": "assistant", "content": "ho"}
    found = written(
        tmp_path, [{"messages": turns} for turns in ([user], [user, answer], [other, answer, user])]
    )
    opened = [START, *b"assistant\n"]

    def turn(role, text):
        return [START, *role.encode(), *b"\n", *text.encode(), END]

    # The second is the first: its answer is not used. The template's start token is not doubled.
    assert found == [
        [*turn("user", "hi"), *opened],
        [*turn("user", "and?"), *turn("assistant", "ho"), *turn("user", "hi"), *opened],
    ]
    assert all(
        ids == VOCAB.encode_chat(turns)
        for ids, turns in zip(found, [[user], [other, answer, user]], strict=True)
    )


def test_a_template_without_a_start_token_gets_one(tmp_path):
    vocab = byte_vocab(template="{% for m in messages %}{{ m.content }}|{% endfor %}")
    found = written(tmp_path, [{"messages": [{"role": "user", "content": "hi"}]}], vocab=vocab)
    assert found == [[START, *b"hi|"]]


def test_a_vocabulary_without_template_refuses_chats(tmp_path):
    with pytest.raises(VocabError, match="no chat template"):
        written(
            tmp_path,
            [{"messages": [{"role": "user", "content": "hi"}]}],
            vocab=byte_vocab(template=None),
        )
    assert not (tmp_path / "prompts").exists()


def test_special_tokens_that_are_spelled_are_text(tmp_path):
    rows = [
        {"text": "<|mask|> and <|end|>"},
        {"prompt": "<|start|>"},
        {"messages": [{"role": "user", "content": "<|mask|>"}]},
    ]
    found = written(tmp_path, rows, prompt_tokens=8)
    assert found[:2] == [[START, *b"<|mask|>"], [START, *b"<|start|>"]]
    assert bytes(found[2][6:14]) == b"<|mask|>"
    assert VOCAB.mask_id not in itertools.chain(*found)


def test_no_tokens_is_the_start_token_alone_once(tmp_path):
    found = written(tmp_path, [{"text": "a"}, {"text": "bb"}, {"prompt": "c"}], prompt_tokens=0)
    assert found == [[START], [START, *b"c"]]
    shutil.rmtree(tmp_path / "prompts")
    assert written(tmp_path, [{"text": ""}], prompt_tokens=0) == [[START]]


# --- what is left out ------------------------------------------------------------------------------


def ids_and_skips(documents, **settings):
    skips = Skips()
    chosen = OnPolicySettings(**{"prompt_tokens": 4, **settings})
    return list(prompt_ids(documents, VOCAB, chosen, skips)), skips


def test_texts_with_fewer_tokens_are_too_short():
    documents = [Document(text, f"row {text}") for text in ("", "abc", "abcd", "abcde")]
    found, skips = ids_and_skips(documents)
    assert found == [[START, *b"abcd"]] * 2
    assert skips.counts == {"too short": 2}
    assert skips.examples == {"too short": ["row ", "row abc"]}
    # A prompt that is given may have any length.
    found, skips = ids_and_skips([Document("", "o", prompt="a"), Document("", "o", prompt="")])
    assert found == [[START, *b"a"], [START]]
    assert not skips.counts


def test_prompts_that_are_too_long_are_left_out_whole():
    documents = [Document("x", str(n), prompt="p" * n) for n in range(8)]
    found, skips = ids_and_skips(documents, max_prompt_tokens=5)
    assert found == [[START, *b"p" * n] for n in range(5)]  # the start token counts
    assert skips.counts == {"prompt too long": 3}
    with pytest.raises(ConfigError, match="prompt_tokens=5 and a start token are more than"):
        OnPolicySettings(prompt_tokens=5, max_prompt_tokens=5)


def test_equal_prompts_count_once_and_the_first_ones_are_kept(tmp_path):
    rows = [{"text": text} for text in ("abcd1", "xxxx", "abcd2", "yyyy", "xxxx3", "zzzz")]
    rows.insert(4, {"prompt": "xxxx", "response": "r"})
    found = [spelled(ids) for ids in written(tmp_path, rows)]
    assert found == ["abcd", "xxxx", "yyyy", "zzzz"]
    for most in (1, 3, 4, 9):
        some = written(tmp_path, rows, max_prompts=most)
        assert [spelled(ids) for ids in some] == found[:most]


def test_reading_stops_with_the_last_prompt_wanted(tmp_path):
    """Or a stream of a hub would be read to its end."""
    source = tmp_path / "rows.jsonl"
    source.write_text('{"text": "abcd"}\n{"text": "efgh"}\nno row\n')
    assert len(written(tmp_path, (str(source),), max_prompts=2)) == 2
    with pytest.raises(DataError, match="line 3"):
        written(tmp_path, (str(source),), max_prompts=3)
    assert len(Prompts(tmp_path / "prompts")) == 2  # those that were there


def test_sources_are_read_in_turn_as_data_reads_them(tmp_path):
    folder = tmp_path / "code"
    folder.mkdir()
    for name, text in (("a.py", "aaaa"), ("b.py", "bbbb"), ("c.txt", "cccc"), ("d.py", "d" * 3000)):
        (folder / name).write_text(text)
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": f"row{n}"} for n in range(3)])
    data = DataSettings(sources=(str(folder), rows), max_file_kib=2)
    # Those of data, if no others are named; the others' kinds of file are those of data, too.
    for names in ((), (str(folder), rows)):
        write_prompts(
            OnPolicySettings(prompts=names, prompt_tokens=4), data, VOCAB, tmp_path / "prompts", 0
        )
        prompts = Prompts(tmp_path / "prompts")
        found = [spelled(prompts[number]) for number in range(len(prompts))]
        assert sorted(found[0:3:2]) == ["aaaa", "bbbb"]  # a folder has an order of its own
        assert found[1::2] == ["row0", "row1"]
        assert found[4:] == ["row2"]
    assert [spelled(ids) for ids in written(tmp_path, (rows,))] == ["row0", "row1", "row2"]


def test_the_mask_token_in_a_prompt_is_refused(tmp_path):
    """It can come from a template only; what is spelled in a text is text."""
    vocab = byte_vocab(template="<|pad|>{{ messages[0].content }}", mask=tiny.PAD)
    assert vocab.mask_id == PAD
    rows = [{"prompt": "<|pad|>"}, {"messages": [{"role": "user", "content": "hi"}]}]
    with pytest.raises(VocabError, match=r"rows\.jsonl line 2 holds the mask token \(id 258\)"):
        written(tmp_path, rows, vocab=vocab)
    assert not (tmp_path / "prompts").exists()
    assert written(tmp_path, rows[:1], vocab=vocab) == [[START, *b"<|pad|>"]]


def test_nothing_left_says_what_to_change(tmp_path):
    rows = [{"text": "abc"}, {"text": "de"}, {"prompt": "p" * 99}]
    said = (
        r"no prompt in .*rows\.jsonl \(left out: 2 too short \(.*line 1, .*line 2\), 1 prompt too long"
        r" .*on_policy\.prompts, or change on_policy\.prompt_tokens=4 and max_prompt_tokens=50"
    )
    with pytest.raises(DataError, match=said):
        written(tmp_path, rows, max_prompt_tokens=50)
    assert not (tmp_path / "prompts").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]
    with pytest.raises(DataError, match="no prompt in"):
        written(tmp_path, [{"text": "abcdef"}], below=2**64)  # everything is held out
    with pytest.raises(DataError, match="no source 'nowhere'"):
        written(tmp_path, ("nowhere",))


# --- held-out documents ----------------------------------------------------------------------------


def text_row(n):
    return {"text": f"<{n:04}>" + "x" * 40}


def prompt_row(n):
    return {"prompt": f"<{n:04}>", "response": "the same answer to all"}


def chat_row(n):
    answer = {"role": "assistant", "content": "the same answer to all"}
    return {"messages": [{"role": "user", "content": f"<{n:04}>"}, answer]}


def piece_row(n):
    """Pieces of one file fall on one side together."""
    return {**text_row(n), "origin": f"file{n // 3}.py"}


FORMS = [text_row, prompt_row, chat_row, piece_row]


def sides(tmp_path, rows, fraction):
    """Numbers of the documents that are trained on and held out, read off the rows; and the prompts'."""
    source = write_rows(tmp_path / "rows.jsonl", rows)
    settings = DataSettings(
        sources=(source,), length=96, packing=False, held_out_fraction=fraction, split_seed=5
    )
    data = prepare(settings, VOCAB, tmp_path / "data")

    def numbers(texts):
        return {text.split("<")[1][:4] for text in texts}

    def texts(split):
        tokens_BL, ids_BL = split.batch(range(len(split)))[:2]
        real_BL = (ids_BL >= 0) & (tokens_BL < START)
        return [
            bytes(tokens_L[real_L].tolist()).decode()
            for tokens_L, real_L in zip(tokens_BL, real_BL, strict=True)
        ]

    chosen = OnPolicySettings(fraction=1, prompt_tokens=6)
    below = int(data.manifest["held_out_below"])
    write_prompts(chosen, settings, VOCAB, tmp_path / "prompts", below)
    prompts = Prompts(tmp_path / "prompts")
    found = [
        bytes(token for token in prompts[number] if token < START).decode()
        for number in range(len(prompts))
    ]
    return numbers(texts(data.train)), numbers(texts(data.held_out)), numbers(found)


@pytest.mark.parametrize("form", FORMS)
def test_no_prompt_comes_from_a_held_out_document(tmp_path, form):
    train, held_out, prompts = sides(tmp_path, [form(n) for n in range(90)], 0.3)
    assert len(held_out) > 10
    assert len(train | held_out) == 90
    assert not train & held_out
    assert prompts == train


@pytest.mark.parametrize("form", FORMS)
def test_nor_in_a_corpus_so_small_that_the_smallest_hash_is_held_out(tmp_path, form):
    count = 9 if form is piece_row else 3
    train, held_out, prompts = sides(tmp_path, [form(n) for n in range(count)], 1e-6)
    assert len(held_out) == count // 3
    assert len(train | held_out) == count
    assert prompts == train


def test_what_is_held_out_has_a_hash_below_the_manifests(tmp_path):
    rows, data = [{"text": text} for text in ("abcd", "efgh", "ijkl")], DataSettings(split_seed=3)
    hashes = {row["text"]: Document(row["text"], "").split_hash(3) for row in rows}
    middle = sorted(hashes.values())[1]
    for below, count in ((middle, 2), (middle + 1, 1)):
        found = [spelled(ids) for ids in written(tmp_path, rows, data=data, below=below)]
        assert found == [text for text, own in hashes.items() if own >= below]
        assert len(found) == count


def test_all_of_them_where_nothing_is_held_out(tmp_path):
    train, held_out, prompts = sides(tmp_path, [text_row(n) for n in range(20)], 0.0)
    assert (len(train), held_out, prompts) == (20, set(), train)


def test_nor_from_a_held_out_chat_that_goes_on_after_its_answer(tmp_path):
    again = {"role": "user", "content": "go on"}
    rows = [{"messages": [*chat_row(n)["messages"], again]} for n in range(90)]
    _, held_out, prompts = sides(tmp_path, rows, 0.3)
    assert len(held_out) > 10
    assert not held_out & prompts


# --- the first tokens of a text --------------------------------------------------------------------

PIECES = (
    *("def f(x):\n", "    ", "return x", " + 1", "\n\n", "naïve 🦔", "a" * 37, " " * 70, "\t\t"),
    *("é" * 9, "import os, sys\n", "'''doc'''", "0x1234", "aa ab ba bb ", "🦔" * 5),
)


def trained_vocab(use_regex):
    """A byte-level BPE with several hundred merges; without the regex whole texts are one piece to it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[tiny.START, tiny.END, tiny.PAD],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts_of(PIECES, 40), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tiny.START,
        eos_token=tiny.END,
        pad_token=tiny.PAD,
        clean_up_tokenization_spaces=False,
    )
    return read_vocab(fast).with_mask(None)


def texts_of(pieces, count):
    random = np.random.default_rng(0)
    return ["".join(random.choice(pieces, size=60)) for _ in range(count)]


def check_first_tokens(vocab, texts, counts):
    """The length of the longest token that was among them."""
    longest = 0
    for text in texts:
        ((whole, spans),) = vocab.encode_batch_with_spans([text])
        assert whole == vocab.encode(text)
        for count in (*counts, max(0, len(whole) - 1), len(whole), len(whole) + 5):
            assert first_tokens(vocab, text, count) == (whole[:count], spans[:count]), count
            longest = max([longest, *(stop - start for start, stop in spans[:count])])
    return longest


@pytest.mark.parametrize("use_regex", [True, False])
def test_first_tokens_are_those_of_the_whole_text(use_regex):
    texts = [*texts_of(PIECES, 30), " " * 4000, "a" * 3000, "x", "", "🦔" * 300]
    longest = check_first_tokens(trained_vocab(use_regex), texts, (0, 8, 9, 20, 50))
    assert longest > 64  # so more text than was looked at first is needed


@pytest.mark.parametrize("use_regex", [True, False])
def test_few_first_tokens_can_be_long(use_regex):
    check_first_tokens(trained_vocab(use_regex), texts_of(PIECES, 200), (1, 2, 3, 4))


def test_first_tokens_of_a_long_text_do_not_read_it_all(monkeypatch):
    vocab, sizes = trained_vocab(True), []
    real = type(vocab).encode_batch_with_spans

    def counting(self, texts):
        sizes.append(sum(map(len, texts)))
        return real(self, texts)

    monkeypatch.setattr(type(vocab), "encode_batch_with_spans", counting)
    text = "def f(x):\n    return x + 1\n" * 4000
    ids, _ = first_tokens(vocab, text, 8)
    assert len(ids) == 8
    assert sum(sizes) < 1000


# --- on disk ---------------------------------------------------------------------------------------


def test_prompts_on_disk_are_those_of_the_last_writing(tmp_path):
    rows = [{"text": "abcd"}, {"prompt": "longer than that"}]
    first = written(tmp_path, rows)
    prompts = Prompts(tmp_path / "prompts")
    assert [prompts[0], prompts[1]] == first
    assert (len(prompts), prompts.longest) == (2, 17)
    with pytest.raises(DataError, match="no prompt"):
        written(tmp_path, [{"text": "a"}])
    assert Prompts(tmp_path / "prompts")[1] == first[1]
    assert written(tmp_path, [{"text": "wxyz"}]) == [[START, *b"wxyz"]]
    assert sorted(path.name for path in (tmp_path / "prompts").iterdir()) == [
        "ends.npy",
        "tokens.npy",
    ]


@pytest.mark.parametrize("name", ["tokens.npy", "ends.npy"])
@pytest.mark.parametrize(
    "damage", ["missing", "empty", "cut in its header", "cut", "text", "of others", "nothing in it"]
)
def test_a_damaged_folder(tmp_path, name, damage):
    written(tmp_path, [{"text": "abcd"}, {"text": "efgh"}])
    folder = tmp_path / "prompts"
    path = folder / name
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "of others":
        np.save(path, np.arange(3, dtype=np.int32))
    elif damage == "nothing in it":
        np.save(path, np.zeros(0, dtype=np.int32))
    else:
        size = {"empty": 0, "cut in its header": 20, "cut": len(whole) - 8, "text": 0}[damage]
        path.write_bytes(b"what is this\n" * 20 if damage == "text" else whole[:size])
    with pytest.raises(DataError, match=str(folder)):
        Prompts(folder)


def test_no_folder(tmp_path):
    with pytest.raises(DataError, match=r"cannot read the prompts in .*nowhere"):
        Prompts(tmp_path / "nowhere")
