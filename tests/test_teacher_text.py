"""Text by the teacher: honest samples, the same file whatever interrupts it, rows to train on.

Token ids of the word vocabulary: words 0 … n - 1, then start, end and pad.
"""

import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import tiny_run
import torch
from click.testing import CliRunner
from students import random_ar
from tiny import CHAT_TEMPLATE, byte_tokenizer, next_log_probs, tiny_model

from mdm.autoregressive import Autoregressive
from mdm.checkpoint import save_denoiser
from mdm.convert import StudentSettings, convert
from mdm.errors import CheckpointError, ConfigError, DataError, VocabError
from mdm.train import processes, teacher_text, text_parts
from mdm.train.corpus import open_prompts, open_source
from mdm.train.data_command import data
from mdm.train.dataset import DataSettings, prepare
from mdm.train.documents import Document, Skips
from mdm.train.teacher_text import (
    TextSettings,
    batches,
    opening_text,
    read_prompts,
    sample_batch,
    sample_text,
)
from mdm.vocab import read_vocab

START, END = 12, 13
TEACHER = {"teacher": "abc", "dtype": "fp32"}
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def word_ar(end_factor=2.0, **settings):
    """Random, with an end token that comes now and then."""
    ar = random_ar(max_position_embeddings=64, **settings)
    ar.model.get_output_embeddings().weight.data[ar.vocab.eos_id] *= end_factor
    return ar


def byte_ar(**settings):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    model = tiny_model("llama", 259, layers=1, hidden=16, max_position_embeddings=64, **settings)
    return Autoregressive(model, read_vocab(tokenizer))


def prefer_ascii_and_ends(ar):
    """Make other bytes and special tokens rare in what a byte teacher writes."""
    bias_V = torch.full((259,), -4.0)
    bias_V[32:127] = 0.0
    bias_V[257] = 2.0
    head = ar.head
    ar.head = lambda rows_ND: 0.3 * head(rows_ND) + bias_V
    return ar


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_prompts(folder, n=9):
    """Prompts of words, of three lengths in turn."""
    rows = [
        {"prompt": " ".join(f"w{(i + j) % 12}" for j in range(1 + i % 3)), "response": "x"}
        for i in range(n)
    ]
    return write_rows(folder / "prompts.jsonl", rows)


def sample(ar, source, output, settings, **options):
    opened = {str(source): open_source(str(source), (".py",), 64)}
    return sample_text(ar, opened, settings, output, teacher=TEACHER, **options)


# --- prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "tokens", "expected"),
    [
        ("abcdef", 3, "abc"),
        ("abcdef", 6, "abcdef"),
        ("abcdef", 7, "abcdef"),
        ("abcdef", 0, ""),
        ("aé€", 2, "a"),  # not half of é
        ("aé€", 3, "aé"),
        ("aé€", 5, "aé"),
        ("aé€", 6, "aé€"),
        ("😀x", 3, ""),
        ("😀x", 4, "😀"),
        ("x" * 1000, 3, "xxx"),
    ],
)
def test_an_opening_is_whole_characters(text, tokens, expected):
    assert opening_text(byte_ar().vocab, text, tokens) == expected


class LongTokens:
    """One token for 50 characters: a cut text has few tokens, and its last one is another."""

    def encode_batch_with_spans(self, texts):
        (text,) = texts
        spans = [(i, min(i + 50, len(text))) for i in range(0, len(text), 50)]
        return [(list(range(len(spans))), spans)]


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_an_opening_is_that_of_the_whole_text(tokens):
    text = "".join(map(chr, range(200, 4000)))
    assert opening_text(LongTokens(), text, tokens) == text[: 50 * tokens]


def test_prompts_are_what_training_reads():
    ar = byte_ar()
    start = ar.vocab.start_id
    template = b"user\nhi"
    documents = [
        Document("abcdef", "a.py"),
        Document("ignored", "rows line 3", "xyz", group="b.py"),
        Document("ignored", "rows line 4", "z" * 60),
        Document("ignored", "rows line 5", (CHAT[0],)),
        Document("<|end|>", "c.py"),
        Document("never read", "d.py"),
    ]
    skips = Skips()
    settings = TextSettings(prompt_tokens=2, max_tokens=4, limit=5)
    found = list(read_prompts(ar, iter(documents), settings, skips))
    assert [(p.index, p.shown, p.origin) for p in found] == [
        (0, "ab", "a.py"),
        (1, "xyz", "b.py"),
        (3, (CHAT[0],), "rows line 5"),
        (4, "<|", "c.py"),
    ]
    assert found[0].before == (start, *b"ab")
    assert found[1].before == (start, *b"xyz")
    # The template's own start token is the only one.
    opening = (start, *template, ar.vocab.eos_id, start, *b"assistant\n")
    assert found[2].before == opening
    assert found[3].before == (start, *b"<|")
    assert str(skips) == "1 prompt too long (rows line 4)"


def test_prompts_without_responses_are_continued(tmp_path):
    """As a file of prompts comes: no response, no assistant's turn, an empty text."""
    rows = [{"prompt": "ab"}, {"messages": CHAT[:1]}, {"text": ""}]
    path = write_rows(tmp_path / "prompts.jsonl", rows)
    source = open_prompts(str(path), (".py",), 64)
    settings = TextSettings(max_tokens=4)
    prompts = list(read_prompts(byte_ar(), source.documents(Skips()), settings, Skips()))
    assert [prompt.shown for prompt in prompts] == ["ab", tuple(CHAT[:1]), ""]


def test_a_prompt_may_fill_the_context_but_for_the_response():
    ar, skips = byte_ar(), Skips()
    documents = [Document("x", "fits", "z" * 59), Document("x", "not", "z" * 60)]
    found = list(read_prompts(ar, documents, TextSettings(max_tokens=4), skips))
    assert [p.origin for p in found] == ["fits"]
    rows = list(sample_batch(ar, [(found[0], 0)], TextSettings(max_tokens=4)))
    assert len(rows) == 1
    assert skips.counts == {"prompt too long": 1}


def test_batches_hold_prompts_of_like_length(monkeypatch):
    monkeypatch.setattr(teacher_text, "_WINDOW", 6)
    prompts = [
        teacher_text.Prompt(i, "", "", (0,) * length) for i, length in enumerate([3, 1, 2, 9, 9])
    ]
    found = [[(p.index, s) for p, s in batch] for batch in batches(prompts, 2, 4)]
    # Sorted among the first six, then among the rest.
    assert found == [
        [(1, 0), (1, 1), (2, 0), (2, 1)],
        [(0, 0), (0, 1)],
        [(3, 0), (3, 1), (4, 0), (4, 1)],
    ]


# --- samples -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.5, 0.8), (0.0, 1.0)])
def test_log_probs_are_the_teachers_own_at_temperature_one(tmp_path, temperature, top_p):
    ar = word_ar()
    settings = TextSettings(temperature=temperature, top_p=top_p, max_tokens=8)
    sample(ar, write_prompts(tmp_path), tmp_path / "out.jsonl", settings)
    p = next_log_probs(ar.model)
    rows = read_rows(tmp_path / "out.jsonl")
    for row in rows:
        before, ids = [START, *ar.vocab.encode(row["prompt"])], row["token_ids"]
        slow = [float(p([*before, *ids[:i]])[token]) for i, token in enumerate(ids)]
        assert row["log_probs"] == pytest.approx(slow, abs=1e-4)
        assert row["log_prob"] == pytest.approx(math.fsum(slow), abs=1e-3)
        assert row["cut"] is (END not in ids)
        assert len(ids) == 8 or not row["cut"]
        # The end is not in the text, but it is rated and is to be learnt.
        shown = [token for token in ids if token < START]
        assert row["response"] == " ".join(f"w{token}" for token in shown)
        assert row["same_tokens"] is (ids == shown + ([] if row["cut"] else [END]))
    assert len(rows) == 9
    assert {row["cut"] for row in rows} == {True, False}


def test_samples_follow_the_teacher(tmp_path):
    ar = word_ar(1.0, num_words=2)
    write_rows(tmp_path / "p.jsonl", [{"prompt": "w1 w0", "response": "x"}])
    n = 3000
    settings = TextSettings(max_tokens=3, samples=n)
    sample(ar, tmp_path / "p.jsonl", tmp_path / "out.jsonl", settings, batch_size=500)
    counts = {}
    for row in read_rows(tmp_path / "out.jsonl"):
        key = tuple(row["token_ids"])
        counts[key] = counts.get(key, 0) + 1
    p, end, total = next_log_probs(ar.model), 3, 0.0
    outcomes = [
        ids
        for length in (1, 2, 3)
        for ids in itertools.product(range(5), repeat=length)
        if end not in ids[:-1] and (length == 3 or ids[-1] == end)
    ]
    for ids in outcomes:
        log_prob = sum(float(p([2, 1, 0, *ids[:i]])[token]) for i, token in enumerate(ids))
        q = math.exp(log_prob)
        total += q
        error = math.sqrt(q * (1 - q) / n)
        assert abs(counts.get(ids, 0) / n - q) < 4 * error + 1 / n, ids
    assert total == pytest.approx(1, abs=1e-5)
    assert set(counts) <= set(outcomes)
    assert len(counts) > 10


def test_a_row_depends_on_seed_and_place_alone(tmp_path):
    ar, prompts = word_ar(), write_prompts(tmp_path)
    found = {}
    for batch_size in (1, 4, 64):
        for seed in (0, 1):
            output = tmp_path / f"{batch_size}-{seed}.jsonl"
            settings = TextSettings(max_tokens=10, samples=3, seed=seed)
            sample(ar, prompts, output, settings, batch_size=batch_size)
            found[batch_size, seed] = read_rows(output)
    for seed in (0, 1):
        first = found[1, seed]
        assert [(row["index"], row["sample"]) for row in first] == [
            (i, s) for i in range(9) for s in range(3)
        ]
        for batch_size in (4, 64):
            for one, other in zip(first, found[batch_size, seed], strict=True):
                assert one | {"log_probs": 0, "log_prob": 0} == other | {
                    "log_probs": 0,
                    "log_prob": 0,
                }
                assert one["log_probs"] == pytest.approx(other["log_probs"], abs=3e-5)
    texts = [row["response"] for seed in (0, 1) for row in found[1, seed]]
    assert len(set(texts)) > 40
    # The first sample of a prompt is the same however many there are.
    sample(ar, prompts, tmp_path / "one.jsonl", TextSettings(max_tokens=10))
    ones = [row["token_ids"] for row in read_rows(tmp_path / "one.jsonl")]
    assert ones == [row["token_ids"] for row in found[1, 0] if row["sample"] == 0]


def test_a_text_that_is_not_read_back_as_it_was_drawn_says_so(tmp_path):
    ar = prefer_ascii_and_ends(byte_ar())
    (tmp_path / "a.txt").write_text("abc")
    settings = TextSettings(max_tokens=6, samples=60)
    summary = sample(ar, tmp_path / "a.txt", tmp_path / "out.jsonl", settings, batch_size=60)
    rows = read_rows(tmp_path / "out.jsonl")
    for row in rows:
        text = bytes(i for i in row["token_ids"] if i < 256).decode(errors="replace")
        assert row["response"] == text
        learnt = [*text.encode(), *([] if row["cut"] else [257])]
        assert row["same_tokens"] is (learnt == row["token_ids"])
    same = [row["same_tokens"] for row in rows]
    assert {True, False} == set(same)
    assert summary.same_tokens == pytest.approx(sum(same) / 60)


def test_chats_are_answered_and_plain_text_goes_on(tmp_path):
    ar = byte_ar()
    write_rows(tmp_path / "r.jsonl", [{"messages": CHAT, "origin": "x.py"}, {"text": "abcdef"}])
    sample(ar, tmp_path / "r.jsonl", tmp_path / "o.jsonl", TextSettings(max_tokens=3))
    chat, plain = read_rows(tmp_path / "o.jsonl")
    assert chat["messages"][:1] == CHAT[:1]
    assert len(chat["messages"]) == 2
    assert chat["messages"][1]["role"] == "assistant"
    assert "prompt" not in chat
    assert chat["origin"] == "x.py"
    assert plain["prompt"] == "abcdef"
    assert plain["origin"] == f"{tmp_path / 'r.jsonl'} line 2"
    sample(
        ar, tmp_path / "r.jsonl", tmp_path / "n.jsonl", TextSettings(max_tokens=3, prompt_tokens=0)
    )
    assert read_rows(tmp_path / "n.jsonl")[1]["prompt"] == ""


def test_the_summary_is_that_of_the_rows(tmp_path):
    ar, told = word_ar(4.0), []
    settings = TextSettings(max_tokens=6, samples=2)
    found = sample(
        ar,
        write_prompts(tmp_path),
        tmp_path / "o.jsonl",
        settings,
        batch_size=5,
        tell=lambda *seen: told.append(seen),
    )
    rows = read_rows(tmp_path / "o.jsonl")
    tokens = sum(len(row["token_ids"]) for row in rows)
    assert (found.rows, found.tokens, found.written) == (18, tokens, tokens)
    assert [rows for rows, _, _ in told] == [5, 10, 15, 18]
    assert told[-1][1] == tokens
    assert 0 < told[-1][2] <= found.seconds
    values = torch.tensor([[row["log_prob"], len(row["token_ids"])] for row in rows]).double()
    mean = values[:, 0].sum() / tokens
    assert found.mean_log_prob == pytest.approx(float(mean))
    residuals = values[:, 0] - mean * values[:, 1]
    assert found.std_err == pytest.approx(float(residuals.std() * math.sqrt(18) / tokens))
    assert found.cut == pytest.approx(sum(row["cut"] for row in rows) / 18)
    assert found.empty == sum(not row["response"] for row in rows) > 0


# --- interruptions -------------------------------------------------------------------------------

SETTINGS = TextSettings(max_tokens=8, samples=2)


class Stopped(Exception):
    pass


def stop_after(monkeypatch, rows):
    """Let `rows` rows be written, then fail."""
    append, left = text_parts.Part.append, [rows]

    def failing(self, row):
        if not left[0]:
            raise Stopped
        left[0] -= 1
        append(self, row)

    monkeypatch.setattr(text_parts.Part, "append", failing)


def as_process(monkeypatch, rank, world_size):
    monkeypatch.setattr(processes, "rank", lambda: rank)
    monkeypatch.setattr(processes, "world_size", lambda: world_size)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(teacher, prompts, the file in one go, four rows a batch)."""
    folder = tmp_path_factory.mktemp("whole")
    ar, prompts = word_ar(), write_prompts(folder)
    sample(ar, prompts, folder / "o.jsonl", SETTINGS, batch_size=4)
    assert sorted(path.name for path in folder.iterdir()) == ["o.jsonl", "prompts.jsonl"]
    return ar, prompts, (folder / "o.jsonl").read_bytes()


@pytest.mark.parametrize("torn", [b"", b'{"prompt": "w1", "resp', b'{"made_from": {}'])
@pytest.mark.parametrize("rows", [1, 3, 4, 10, 17])
def test_an_interrupted_file_goes_on_to_the_same_bytes(monkeypatch, tmp_path, whole, rows, torn):
    ar, prompts, expected = whole
    output, part = tmp_path / "o.jsonl", tmp_path / "o.jsonl.part"
    with monkeypatch.context() as patch:
        stop_after(patch, rows)
        with pytest.raises(Stopped):
            sample(ar, prompts, output, SETTINGS, batch_size=4)
    assert len(part.read_bytes().splitlines()) == 1 + rows
    assert not output.exists()
    with open(part, "ab") as stream:
        stream.write(torn)
    redone = []
    summary = sample(
        ar, prompts, output, SETTINGS, batch_size=4, tell=lambda *seen: redone.append(seen)
    )
    assert output.read_bytes() == expected
    assert [path.name for path in tmp_path.iterdir()] == ["o.jsonl"]
    assert redone[-1][0] == 18 - rows
    assert len(redone) == 5 - rows // 4  # a batch that was finished is not written again
    assert summary.written <= summary.tokens


def test_a_header_that_was_being_written_is_nothing(tmp_path, whole):
    ar, prompts, expected = whole
    (tmp_path / "o.jsonl.part").write_bytes(b'{"made_from": {"format": 1, "temp')
    sample(ar, prompts, tmp_path / "o.jsonl", SETTINGS, batch_size=4)
    assert (tmp_path / "o.jsonl").read_bytes() == expected


def test_going_on_with_another_batch_size_changes_no_text(monkeypatch, tmp_path, whole):
    ar, prompts, expected = whole
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(Stopped):
            sample(ar, prompts, tmp_path / "o.jsonl", SETTINGS, batch_size=4)
    sample(ar, prompts, tmp_path / "o.jsonl", SETTINGS, batch_size=7)
    found = read_rows(tmp_path / "o.jsonl")
    rows = [json.loads(line) for line in expected.splitlines()]
    assert [row["token_ids"] for row in found] == [row["token_ids"] for row in rows]
    assert [(row["index"], row["sample"]) for row in found] == [
        (row["index"], row["sample"]) for row in rows
    ]


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_batches(monkeypatch, tmp_path, whole, world_size):
    ar, prompts, expected = whole
    output = tmp_path / "o.jsonl"
    for rank in reversed(range(1, world_size)):
        with monkeypatch.context() as patch:
            as_process(patch, rank, world_size)
            assert sample(ar, prompts, output, SETTINGS, batch_size=4) is None
        assert len(read_rows(tmp_path / f"o.jsonl.part-{rank}")) >= 5
    as_process(monkeypatch, 0, world_size)
    assert sample(ar, prompts, output, SETTINGS, batch_size=4).rows == 18
    assert output.read_bytes() == expected
    assert [path.name for path in tmp_path.iterdir()] == ["o.jsonl"]


def test_what_two_processes_began_one_can_end(monkeypatch, tmp_path, whole):
    ar, prompts, expected = whole
    output = tmp_path / "o.jsonl"
    for rank, rows in ((1, 6), (0, 3)):
        with monkeypatch.context() as patch:
            as_process(patch, rank, 2)
            stop_after(patch, rows)
            with pytest.raises(Stopped):
                sample(ar, prompts, output, SETTINGS, batch_size=4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.jsonl.part-0", "o.jsonl.part-1"]
    told = []
    sample(ar, prompts, output, SETTINGS, batch_size=4, tell=lambda *seen: told.append(seen))
    assert told[-1][0] == 18 - 9
    assert output.read_bytes() == expected


def test_a_process_whose_rows_are_not_there_is_missed(monkeypatch, tmp_path, whole):
    ar, prompts, _ = whole
    as_process(monkeypatch, 0, 2)
    with pytest.raises(DataError, match=r"10 of 18 rows .* must see the same folder"):
        sample(ar, prompts, tmp_path / "o.jsonl", SETTINGS, batch_size=4)


@pytest.mark.slow
def test_torchrun(tmp_path, whole):
    ar, prompts, _ = whole
    ar.model.save_pretrained(tmp_path / "ar")
    ar.vocab.tokenizer.save_pretrained(tmp_path / "ar")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node=2", "-m", "mdm.cli"]
    for name, command in (("two", torchrun), ("one", [sys.executable, "-m", "mdm.cli"])):
        arguments = ["data", "sample-teacher", prompts, "--teacher", tmp_path / "ar", "--samples"]
        arguments += ["2", "--max-tokens", "8", "--batch-size", "4", "--dtype", "fp32"]
        done = subprocess.run(
            [*command, *map(str, arguments), "--output", str(tmp_path / f"{name}.jsonl")],
            env=tiny_run.environment(),
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("18 rows") == 1
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


# --- what is there already -----------------------------------------------------------------------


def test_other_settings_do_not_go_on(monkeypatch, tmp_path, whole):
    ar, prompts, _ = whole
    output = tmp_path / "o.jsonl"
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Stopped):
            sample(ar, prompts, output, SETTINGS, batch_size=4)
    begun = (tmp_path / "o.jsonl.part").read_bytes()
    other = TextSettings(max_tokens=9, samples=2, temperature=0.5)
    text = r"o\.jsonl\.part was begun with other settings: temperature 1\.0 \(now 0\.5\),"
    text += r" max_tokens 8 \(now 9\)\. Repeat them .* --overwrite .* another --output"
    with pytest.raises(ConfigError, match=text):
        sample(ar, prompts, output, other)
    opened = {str(prompts): open_source(str(prompts), (".py",), 64)}
    with pytest.raises(ConfigError, match=r"teacher 'abc' \(now 'def'\)\. Repeat"):
        sample_text(ar, opened, SETTINGS, output, teacher={**TEACHER, "teacher": "def"})
    os.utime(prompts, ns=(1, 1))
    with pytest.raises(ConfigError, match="with other settings: content of the sources"):
        sample(ar, prompts, output, SETTINGS)
    with pytest.raises(ConfigError, match="with other settings: tokenizer"):
        sample(random_ar(num_words=5), prompts, output, SETTINGS)
    ar.vocab.tokenizer.chat_template = CHAT_TEMPLATE
    with pytest.raises(ConfigError, match="with other settings: chat template"):
        sample(ar, prompts, output, SETTINGS)
    ar.vocab.tokenizer.chat_template = None
    assert (tmp_path / "o.jsonl.part").read_bytes() == begun


def test_rows_of_other_settings_can_be_thrown_away(monkeypatch, tmp_path, whole):
    ar, prompts, expected = whole
    output = tmp_path / "o.jsonl"
    for rank in (1, 0):
        with monkeypatch.context() as patch:
            as_process(patch, rank, 2)
            stop_after(patch, 5)
            with pytest.raises(Stopped):
                sample(ar, prompts, output, replace(SETTINGS, seed=1), batch_size=4)
    with pytest.raises(ConfigError, match=r"part-0 was begun .*: seed 1 \(now 0\)\. Repeat"):
        sample(ar, prompts, output, SETTINGS, batch_size=4)
    sample(ar, prompts, output, SETTINGS, batch_size=4, overwrite=True)
    assert output.read_bytes() == expected
    assert [path.name for path in tmp_path.iterdir()] == ["o.jsonl"]


def test_a_row_is_in_the_file_at_once(tmp_path):
    part = text_parts.Part(tmp_path / "o.jsonl", {"seed": 0})
    assert list(tmp_path.iterdir()) == []
    for i in range(3):
        part.append({"index": i})
        assert read_rows(tmp_path / "o.jsonl.part")[-1] == {"index": i}
    part.close()


def test_an_output_is_kept_until_another_is_complete(monkeypatch, tmp_path, whole):
    ar, prompts, expected = whole
    output = tmp_path / "o.jsonl"
    output.write_text("old")
    with pytest.raises(ConfigError, match=r"o\.jsonl exists; add --overwrite, or choose another"):
        sample(ar, prompts, output, SETTINGS)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Stopped):
            sample(ar, prompts, output, SETTINGS, batch_size=4, overwrite=True)
    assert output.read_text() == "old"
    told = []
    sample(
        ar,
        prompts,
        output,
        SETTINGS,
        batch_size=4,
        overwrite=True,
        tell=lambda *seen: told.append(seen),
    )
    assert told[-1][0] == 13  # it went on
    assert output.read_bytes() == expected


def test_parts_that_are_damaged_or_not_ours(tmp_path, whole):
    ar, prompts, _ = whole
    output, part = tmp_path / "o.jsonl", tmp_path / "o.jsonl.part"
    for text in ("[1]\n", "hello\n", '{"made_from": 3}\n', "\n"):
        part.write_text(text)
        with pytest.raises(ConfigError, match="begun with other settings"):
            sample(ar, prompts, output, SETTINGS)
        assert part.read_text() == text
    part.unlink()
    (tmp_path / "o.jsonl.part-x").write_text("not a part")
    (tmp_path / "ooo.jsonl.part").write_text("not a part")
    sample(ar, prompts, output, SETTINGS)
    made = read_rows(output)
    assert {path.name for path in tmp_path.iterdir()} == {
        "o.jsonl",
        "o.jsonl.part-x",
        "ooo.jsonl.part",
    }
    for damage in ("{", '{"index": 0}', "3", json.dumps({**made[0], "response": 3})):
        rows = [made[0], made[1]]
        opened = {str(prompts): open_source(str(prompts), (".py",), 64)}
        header = teacher_text._made_from(ar, opened, SETTINGS, TEACHER)
        lines = [json.dumps({"made_from": header}), json.dumps(rows[0]), damage]
        part.write_text("\n".join([*lines, json.dumps(rows[1]), ""]))
        with pytest.raises(
            DataError, match=r"o\.jsonl\.part, line 3 is damaged .* remove the line"
        ):
            sample(ar, prompts, output, SETTINGS, overwrite=True)


# --- what cannot be done -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"temperature": -1.0}, "temperature must be >= 0"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"max_tokens": 0}, "max_tokens must be >= 1; got 0"),
        ({"prompt_tokens": -1}, "prompt_tokens must be >= 0; got -1"),
        ({"samples": 0}, "samples must be >= 1; got 0"),
        ({"limit": 0}, "limit must be >= 1; got 0"),
        ({"samples": 2, "temperature": 0.0}, "2 samples of a prompt are all equal"),
    ],
)
def test_wrong_settings(changes, text):
    with pytest.raises(ConfigError, match=text):
        TextSettings(**changes)
    TextSettings(prompt_tokens=0, max_tokens=1, limit=1, temperature=0.0)


def test_only_plain_samples_are_unbiased():
    assert TextSettings().unbiased
    assert not TextSettings(temperature=0.9).unbiased
    assert not TextSettings(top_p=0.9).unbiased


def test_nothing_to_continue_leaves_nothing_behind(tmp_path):
    ar = word_ar()
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": "w1 " * 70, "response": "x"}])
    with pytest.raises(
        DataError, match=r"no prompt in .*p\.jsonl: 1 prompt too long \(.* line 1\)"
    ):
        sample(ar, prompts, tmp_path / "o.jsonl", TextSettings(max_tokens=8))
    with pytest.raises(ConfigError, match="max_tokens is 64, but the teacher was built for 64"):
        sample(ar, prompts, tmp_path / "o.jsonl", TextSettings(max_tokens=64))
    with pytest.raises(ConfigError, match="batch_size must be at least 1; got 0"):
        sample(ar, prompts, tmp_path / "o.jsonl", TextSettings(max_tokens=8), batch_size=0)
    write_rows(tmp_path / "c.jsonl", [{"messages": CHAT}])
    with pytest.raises(VocabError, match="no chat template"):
        sample(ar, tmp_path / "c.jsonl", tmp_path / "o.jsonl", TextSettings(max_tokens=8))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.jsonl", "p.jsonl"]


def test_a_folder_that_is_not_there(tmp_path, whole):
    ar, prompts, _ = whole
    with pytest.raises(DataError, match=r"cannot write .*no/o\.jsonl: .*No such file"):
        sample(ar, prompts, tmp_path / "no" / "o.jsonl", SETTINGS)


def test_a_teacher_whose_numbers_are_none(tmp_path):
    ar = random_ar()
    ar.model.get_output_embeddings().weight.data[3] = math.nan
    with pytest.raises(
        CheckpointError, match="log-probability of nan; with bf16 weights, try fp32"
    ):
        sample(ar, write_prompts(tmp_path), tmp_path / "o.jsonl", SETTINGS)


# --- training on it ------------------------------------------------------------------------------


@pytest.mark.parametrize("eos_padding", ["none", "block", "row"])
def test_rows_are_learnt_with_an_end_unless_they_were_cut(tmp_path, eos_padding):
    ar = prefer_ascii_and_ends(byte_ar())
    rows = [{"text": "abcd"}, {"prompt": "xy", "response": "z"}, {"messages": CHAT}]
    write_rows(tmp_path / "r.jsonl", [row | {"origin": f"{i}.py"} for i, row in enumerate(rows)])
    settings = TextSettings(max_tokens=12, samples=8)
    sample(ar, tmp_path / "r.jsonl", tmp_path / "o.jsonl", settings)
    written = [row for row in read_rows(tmp_path / "o.jsonl") if row["same_tokens"]]
    written = [row for row in written if len(row["token_ids"]) > 1]
    write_rows(tmp_path / "same.jsonl", written)
    how = DataSettings(
        sources=(str(tmp_path / "same.jsonl"),),
        length=80,
        eos_padding=eos_padding,
        held_out_fraction=0.0,
    )
    prepared = prepare(how, ar.vocab, tmp_path / "data")
    tokens_BL, _, maskable_BL, *_ = prepared.train.batch(range(len(prepared.train)))
    learnt = [tokens_BL[i][maskable_BL[i]].tolist() for i in range(len(tokens_BL))]
    assert len(learnt) == len(written) > 5
    for row, tokens in zip(written, learnt, strict=True):
        ids = row["token_ids"]
        assert tokens[: len(ids)] == ids
        assert set(tokens[len(ids) :]) <= {257}
        # Without a cut, the padding is learnt as well; behind a cut, nothing is.
        padded = eos_padding != "none" and not row["cut"]
        assert (len(tokens) > len(ids)) is padded
    assert {row["cut"] for row in written} == {True, False}


# --- the command ---------------------------------------------------------------------------------


def run(*arguments):
    result = CliRunner().invoke(data, ["sample-teacher", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the teacher `ar`, a student of it and code."""
    folder = tmp_path_factory.mktemp("models")
    ar = byte_ar()
    ar.model.save_pretrained(folder / "ar")
    ar.vocab.tokenizer.save_pretrained(folder / "ar")
    save_denoiser(convert(StudentSettings(init=str(folder / "ar"))), folder / "student")
    (folder / "code").mkdir()
    for i in range(3):
        (folder / "code" / f"{i}.py").write_text(f"x{i} = {i}\n" * (i + 1))
    return folder


def test_the_command_writes_rows_and_says_how_to_train_on_them(folder, tmp_path):
    output = tmp_path / "o.jsonl"
    options = ["--teacher", folder / "ar", "--output", output, "--max-tokens", 8]
    text = run(folder / "code", *options, "--prompt-tokens", 4, "--device", "cpu")
    rows = read_rows(output)
    assert len(rows) == 3
    assert {row["prompt"] for row in rows} == {"x0 =", "x1 =", "x2 ="}
    assert {row["origin"] for row in rows} == {"0.py", "1.py", "2.py"}
    assert f"3 rows, {sum(len(row['token_ids']) for row in rows)} tokens, " in text
    assert f"mdm train --set 'data.sources=[{output}]'" in text
    assert "no samples of the teacher" not in text
    with pytest.raises(ConfigError, match="exists; add --overwrite"):
        run(folder / "code", *options)
    text = run(folder / "code", *options, "--overwrite", "--temperature", 0.5, "--limit", 1)
    assert "with temperature 0.5 and top-p 1 these are no samples of the teacher itself" in text
    assert "1 rows, " in text
    assert " ± " not in text


def test_the_command_tells_weights_apart(folder, tmp_path, monkeypatch):
    output = tmp_path / "o.jsonl"
    options = ["--output", output, "--max-tokens", 8, "--device", "cpu"]
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(Stopped):
            run(folder / "code", "--teacher", folder / "ar", *options)
    other = byte_ar(seed=1)
    other.model.save_pretrained(tmp_path / "ar")
    other.vocab.tokenizer.save_pretrained(tmp_path / "ar")
    with pytest.raises(ConfigError, match=r"with other settings: teacher '[0-9a-f]{16}' \(now"):
        run(folder / "code", "--teacher", tmp_path / "ar", *options)
    with pytest.raises(ConfigError, match=r"with other settings: dtype 'fp32' \(now 'bf16'\)"):
        run(folder / "code", "--teacher", folder / "ar", *options, "--dtype", "bf16")
    assert "3 rows" in run(folder / "code", "--teacher", folder / "ar", *options)


def test_an_interrupt_says_what_is_kept(folder, tmp_path, monkeypatch):
    append = text_parts.Part.append

    def interrupted(self, row):
        append(self, row)
        raise KeyboardInterrupt

    options = ["--teacher", folder / "ar", "--output", tmp_path / "o.jsonl", "--max-tokens", 8]
    with monkeypatch.context() as patch:
        patch.setattr(text_parts.Part, "append", interrupted)
        arguments = ["sample-teacher", folder / "code", *options]
        result = CliRunner().invoke(data, list(map(str, arguments)))
    assert result.exit_code == 1
    assert "finished rows are kept beside" in result.output
    assert "the same command goes on" in result.output
    assert len(read_rows(tmp_path / "o.jsonl.part")) == 2
    assert "3 rows" in run(folder / "code", *options)


def test_the_command_refuses(folder, tmp_path):
    output = ["--output", tmp_path / "o.jsonl"]
    with pytest.raises(ConfigError, match="student is a diffusion model; --teacher needs an auto"):
        run(folder / "code", "--teacher", folder / "student", *output)
    with pytest.raises(DataError, match="no source 'nothing'"):
        run("nothing", "--teacher", folder / "ar", *output)
    with pytest.raises(CheckpointError, match="no model folder"):
        run(folder / "code", "--teacher", tmp_path / "none", *output)
    with pytest.raises(ConfigError, match="cannot use --device"):
        run(folder / "code", "--teacher", folder / "ar", *output, "--device", "nonsense")
    assert list(tmp_path.iterdir()) == []
