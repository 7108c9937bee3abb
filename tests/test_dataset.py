"""Prepared data: splits, limits, reuse, and what happens when something is wrong."""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence

import pytest

from mdm.config import build, to_tree
from mdm.errors import CheckpointError, ConfigError, DataError, VocabError
from mdm.train import splits
from mdm.train.dataset import DataSettings, PreparedData, open_prepared, prepare
from mdm.train.weighting import CLASSES


@dataclasses.dataclass(frozen=True)
class ByteVocab:
    """A token is a byte; the special tokens come after them."""

    start_id: int = 256
    eos_id: int = 257
    pad_id: int = 258
    mask_id: int | None = 259
    fingerprint: str = "bytes"

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def encode_batch_with_spans(self, texts):
        spans = [
            [(i, i + 1) for i, character in enumerate(text) for _ in character.encode()]
            for text in texts
        ]
        return list(zip(self.encode_batch(texts), spans, strict=True))

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return list("".join(f"<{m['role']}>{m['content']}" for m in messages).encode())


VOCAB = ByteVocab()


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_texts(path, count, size=40):
    return write_rows(path, [{"text": f"<{i:04}>" + "x" * (size - 6)} for i in range(count)])


def settings(*sources, **changes):
    return DataSettings(sources=sources, **({"length": 64, "min_tokens": 4} | changes))


def texts(rows):
    """The text of each row: ordinary tokens, with `|` where a segment is opened."""
    result = []
    for tokens, document_ids in zip(*rows.batch(range(len(rows)))[:2], strict=True):
        real = tokens[document_ids >= 0].tolist()
        result.append("".join("|" if t == VOCAB.start_id else chr(t) for t in real if t != 257))
    return result


def documents(data: PreparedData):
    """The documents of each split; a document of these tests is one segment or several."""
    return [
        set("".join(texts(rows)).replace("|", "").replace("<", " <").split())
        for rows in (data.train, data.held_out)
    ]


# --- splits --------------------------------------------------------------------------------------


def test_no_document_is_lost_or_in_both_splits(tmp_path):
    source = write_texts(tmp_path / "a.jsonl", 400)
    data = prepare(settings(source, held_out_fraction=0.1), VOCAB, tmp_path / "out")
    train, held_out = documents(data)
    assert len(train | held_out) == 400
    assert not train & held_out
    assert 20 < len(held_out) < 70
    counts = data.manifest["splits"]
    assert counts["train"]["documents"] == len(train)
    assert counts["train"]["rows"] == len(data.train)
    assert counts["train"]["tokens"] == int(
        (data.train.batch(range(len(data.train)))[1] >= 0).sum()
    )


def test_split_depends_on_the_text_alone(tmp_path):
    rows = [{"text": f"<{i:04}>" + "x" * 30} for i in range(200)]
    one = write_rows(tmp_path / "one.jsonl", rows)
    two = write_rows(tmp_path / "two.jsonl", rows[::-1] + rows[:50])
    base = settings(one, held_out_fraction=0.1)
    held_out = [
        documents(prepare(s, VOCAB, tmp_path / str(i)))[1]
        for i, s in enumerate(
            [
                base,
                dataclasses.replace(base, sources=(two,)),
                dataclasses.replace(base, split_seed=1),
            ]
        )
    ]
    assert held_out[0] == held_out[1] != held_out[2]


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
def test_a_small_corpus_still_fills_both_splits(tmp_path, fraction):
    source = write_texts(tmp_path / "a.jsonl", 5)
    data = prepare(settings(source, held_out_fraction=fraction), VOCAB, tmp_path / "out")
    train, held_out = documents(data)
    assert (len(train), len(held_out)) == (4, 1)
    assert data.manifest["splits"]["train"]["documents"] == 4


def test_a_small_limit_does_not_hide_the_documents_to_hold_out(tmp_path, monkeypatch):
    monkeypatch.setattr(splits, "_BATCH_CHARACTERS", 100)
    source = write_texts(tmp_path / "a.jsonl", 5, size=200)
    limited = settings(source, held_out_fraction=1e-9, max_tokens=10)
    data = prepare(limited, VOCAB, tmp_path / "out")
    assert (len(data.train), data.manifest["splits"]["held_out"]["documents"]) == (1, 1)


def test_one_document_cannot_be_split(tmp_path):
    source = write_rows(tmp_path / "a.jsonl", [{"text": "only this"}, {"text": "x"}])
    with pytest.raises(DataError, match=r"one usable document.*1 too short.*held_out_fraction"):
        prepare(settings(source), VOCAB, tmp_path / "out")
    data = prepare(settings(source, held_out_fraction=0.0), VOCAB, tmp_path / "out")
    assert (texts(data.train), len(data.held_out)) == (["|only this"], 0)


def test_held_out_rows_are_limited_and_from_many_documents(tmp_path):
    source = write_texts(tmp_path / "a.jsonl", 60, size=640)
    data = prepare(
        settings(source, held_out_fraction=0.5, max_held_out_rows=32), VOCAB, tmp_path / "out"
    )
    assert len(data.held_out) == 32
    assert data.manifest["splits"]["held_out"]["documents"] >= 16


def test_duplicates_are_read_once(tmp_path):
    rows = [{"text": "the same text"}, {"text": "the same text\n\n"}, {"text": "another text"}]
    source = write_rows(tmp_path / "a.jsonl", rows)
    data = prepare(settings(source, held_out_fraction=0.0), VOCAB, tmp_path / "out")
    assert texts(data.train) == ["|the same text|another text"]
    assert data.manifest["duplicates"] == 1


# --- limits --------------------------------------------------------------------------------------


def test_max_tokens_stops_early_with_the_same_held_out_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(splits, "_BATCH_CHARACTERS", 100)
    source = write_texts(tmp_path / "a.jsonl", 500)
    base = settings(source, held_out_fraction=0.1)
    whole = prepare(base, VOCAB, tmp_path / "whole")
    part = prepare(dataclasses.replace(base, max_tokens=1000), VOCAB, tmp_path / "part")
    assert 1000 <= part.manifest["splits"]["train"]["tokens"] < 1000 + 64
    assert texts(part.train) == texts(whole.train)[: len(part.train)]
    assert texts(part.held_out) == texts(whole.held_out)


def test_reading_stops_when_nothing_more_is_wanted(tmp_path, monkeypatch):
    monkeypatch.setattr(splits, "_BATCH_CHARACTERS", 100)
    path = tmp_path / "a.jsonl"
    write_texts(path, 500)
    path.write_text(path.read_text() + "not JSON\n")
    limited = settings(str(path), max_tokens=500, held_out_fraction=0.5, max_held_out_rows=4)
    assert len(prepare(limited, VOCAB, tmp_path / "out").held_out) == 4
    with pytest.raises(DataError, match="line 501"):
        prepare(dataclasses.replace(limited, max_tokens=None), VOCAB, tmp_path / "out")


def test_a_long_document_is_cut_into_rows(tmp_path):
    text = "".join(chr(48 + i % 70) for i in range(1000))
    source = write_rows(tmp_path / "a.jsonl", [{"text": text}])
    data = prepare(settings(source, held_out_fraction=0.0), VOCAB, tmp_path / "out")
    assert "".join(texts(data.train)).replace("|", "") == text
    assert all(row.startswith("|") for row in texts(data.train))
    assert data.manifest["skipped"] == {}


# --- kinds of rows -------------------------------------------------------------------------------


def test_prompts_and_chats_are_read_but_not_learnt(tmp_path):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    rows = [{"messages": chat}, {"text": "plain"}, {"prompt": "2+2=", "response": "4"}]
    source = write_rows(tmp_path / "a.jsonl", rows)
    data = prepare(
        settings(source, held_out_fraction=0.0, eos_padding="none"), VOCAB, tmp_path / "out"
    )
    learnt = []
    batch = data.train.batch(range(3))
    for tokens, maskable in zip(batch.tokens_BL, batch.maskable_BL, strict=True):
        learnt.append("".join(chr(t) for t in tokens[maskable].tolist() if t != 257))
    assert texts(data.train) == ["|<user>hihello", "|2+2=4", "|plain"]
    assert learnt == ["hello", "4", "plain"]


def test_long_prompts_are_counted(tmp_path):
    rows = [{"prompt": "p" * 61, "response": "r" * 9}, {"prompt": "p", "response": "r"}]
    source = write_rows(tmp_path / "a.jsonl", rows)
    data = prepare(settings(source, held_out_fraction=0.0), VOCAB, tmp_path / "out")
    assert data.manifest["skipped"] == {"prompt too long": 1}
    assert data.manifest["skipped_examples"] == {"prompt too long": [f"{source} line 1"]}


def test_the_mask_token_may_not_occur(tmp_path):
    source = write_rows(tmp_path / "a.jsonl", [{"text": "fine text"}, {"text": "a masked text"}])
    with pytest.raises(VocabError, match=r"line 2.*mask token"):
        prepare(settings(source), ByteVocab(mask_id=ord("k")), tmp_path / "out")


# --- classes of tokens ---------------------------------------------------------------------------


def classes_of(data):
    """The text of each class in the training rows, without start, eos, padding and white space."""
    found = dict.fromkeys(CLASSES, b"")
    for tokens, _, _, classes in zip(*data.train.batch(range(len(data.train))), strict=True):
        for token, number in zip(tokens.tolist(), classes.tolist(), strict=True):
            if token < 256:
                found[CLASSES[number]] += bytes([token])
            else:
                assert number == 0
    texts = {name: "".join(text.decode().split()) for name, text in found.items()}
    return {name: text for name, text in texts.items() if text}


PYTHON = "def f(x):\n    return 'abc'  # note\n"
UNKNOWN = {"other": "".join(PYTHON.split())}
EXPECTED = {"keyword": "defreturn", "identifier": "fx", "operator": "():", "literal": "'abc'"}
EXPECTED |= {"comment": "#note"}
SCRIPT = {"identifier": "a", "operator": "=", "literal": "1", "comment": "//b"}
CHAT = [{"role": "user", "content": "def"}, {"role": "assistant", "content": "return"}]


@pytest.mark.parametrize(
    ("row", "language", "expected"),
    [
        ({"text": PYTHON}, "python", EXPECTED),
        ({"text": PYTHON, "origin": "a/b.py"}, "auto", EXPECTED),
        ({"text": "a = 1 // b", "origin": "b.js"}, "auto", SCRIPT),
        ({"text": PYTHON}, "auto", UNKNOWN),
        ({"text": PYTHON, "origin": "a.py"}, "none", UNKNOWN),
        (
            {"prompt": "def g(y):", "response": " return 3", "origin": "a.py"},
            "auto",
            {"other": "defg(y):", "keyword": "return", "literal": "3"},
        ),
        ({"messages": CHAT}, "python", {"other": "<user>defreturn"}),
    ],
)
def test_tokens_have_classes_where_a_language_is_known(tmp_path, row, language, expected):
    source = write_rows(tmp_path / "a.jsonl", [row])
    chosen = settings(source, language=language, held_out_fraction=0.0)
    assert classes_of(prepare(chosen, VOCAB, tmp_path / "out")) == expected


def test_classes_are_counted_over_what_is_learnt(tmp_path):
    rows = [{"prompt": "def g(y):", "response": " return 3", "origin": "a.py"}]
    source = write_rows(tmp_path / "a.jsonl", rows)
    chosen = settings(source, language="auto", held_out_fraction=0.0, eos_padding="none")
    counts = prepare(chosen, VOCAB, tmp_path / "out").manifest["splits"]["train"]
    # Two spaces and the eos are "other".
    expected = dict.fromkeys(CLASSES, 0) | {"other": 3, "literal": 1, "keyword": 6}
    assert counts["classes"] == expected
    assert sum(expected.values()) == counts["maskable_tokens"]


def test_classes_follow_a_document_through_rows(tmp_path):
    (tmp_path / "code").mkdir()
    text = "".join(f"name_{i} = {i}  # é\r\n" for i in range(60))
    (tmp_path / "code" / "a.py").write_bytes(text.encode())
    chosen = settings(str(tmp_path / "code"), language="auto", held_out_fraction=0.0)
    assert classes_of(prepare(chosen, VOCAB, tmp_path / "out")) == {
        "identifier": "".join(f"name_{i}" for i in range(60)),
        "literal": "".join(map(str, range(60))),
        "operator": "=" * 60,
        "comment": "#é" * 60,
    }


# --- nothing to learn from -----------------------------------------------------------------------


def test_unusable_sources_are_reported_with_the_reasons(tmp_path):
    (tmp_path / "code").mkdir()
    for name in "abcd":
        (tmp_path / "code" / f"{name}.py").write_bytes(b"# \xe9")
    (tmp_path / "code" / "e.py").write_text("x")
    with pytest.raises(DataError, match=r"code: 4 not UTF-8 \(.*, …\), 1 too short \(e\.py\)"):
        prepare(settings(str(tmp_path / "code")), VOCAB, tmp_path / "out")
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(DataError, match=r"nothing to learn from in .*none\.jsonl"):
        prepare(settings(str(tmp_path / "none.jsonl")), VOCAB, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["code", "none.jsonl"]


# --- the folder ----------------------------------------------------------------------------------


@pytest.fixture
def code(tmp_path):
    folder = tmp_path / "code"
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.py").write_text(f"value_{i} = {i}\n" * 5)
    return folder


def test_prepared_data_is_reused(tmp_path, code):
    first = prepare(settings(str(code)), VOCAB, tmp_path / "out")
    again = prepare(settings(str(code)), VOCAB, tmp_path / "out")
    assert (first.reused, again.reused) == (False, True)
    assert again.manifest == first.manifest
    assert texts(again.train) == texts(first.train)
    assert again.manifest["made_from"]["settings"] == to_tree(settings(str(code)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["code", "out"]


def test_any_change_prepares_anew(tmp_path, code):
    def is_reused(vocab=VOCAB, **changes):
        prepare(settings(str(code)), VOCAB, tmp_path / "out")
        return prepare(settings(str(code), **changes), vocab, tmp_path / "out").reused

    assert is_reused()
    assert not is_reused(length=65)
    assert not is_reused(split_seed=1)
    assert not is_reused(language="auto")
    assert not is_reused(vocab=ByteVocab(fingerprint="other"))
    assert not is_reused(vocab=ByteVocab(eos_id=260))
    prepare(settings(str(code)), VOCAB, tmp_path / "out")
    (code / "new.py").write_text("brand_new = True\n")
    data = prepare(settings(str(code)), VOCAB, tmp_path / "out")
    assert not data.reused
    assert data.manifest["splits"]["train"]["documents"] + 1 >= 8
    os.utime(code / "new.py", ns=(1, 1))
    assert not prepare(settings(str(code)), VOCAB, tmp_path / "out").reused


def make_old(out):
    """As a folder was before rows had classes."""
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["made_from"]["format"] = 1
    (out / "manifest.json").write_text(json.dumps(manifest))
    for split in ("train", "held_out"):
        (out / split / "classes.npy").unlink()


@pytest.mark.parametrize(
    "damage",
    [
        lambda out: (out / "manifest.json").unlink(),
        lambda out: (out / "manifest.json").write_text('{"made_from"'),
        lambda out: (out / "manifest.json").write_text("[]"),
        lambda out: (out / "train" / "tokens.npy").unlink(),
        lambda out: os.truncate(out / "train" / "tokens.npy", 200),
        lambda out: (out / "held_out" / "maskable.npy").write_bytes(b""),
        lambda out: (out / "held_out" / "classes.npy").unlink(),
        lambda out: make_old(out),
        lambda out: shutil.copytree(out / "held_out", out / "train", dirs_exist_ok=True),
    ],
)
def test_half_written_data_is_not_taken_for_finished(tmp_path, code, damage):
    first = prepare(settings(str(code)), VOCAB, tmp_path / "out")
    expected = texts(first.train)
    damage(tmp_path / "out")
    data = prepare(settings(str(code)), VOCAB, tmp_path / "out")
    assert not data.reused
    assert texts(data.train) == expected


def test_old_rows_are_not_read(tmp_path, code):
    """What a run sees that is resumed from before rows had classes."""
    prepare(settings(str(code)), VOCAB, tmp_path / "out")
    make_old(tmp_path / "out")
    with pytest.raises(DataError, match=r"rows of format 1.*reads format 2.*start a new run"):
        open_prepared(tmp_path / "out")


def test_a_failure_keeps_what_was_there(tmp_path, code, monkeypatch):
    before = prepare(settings(str(code)), VOCAB, tmp_path / "out")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mdm.train.rows.RowWriter._write_pending", full_disk)
        with pytest.raises(CheckpointError, match="No space left"):
            prepare(settings(str(code), length=65), VOCAB, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["code", "out"]
    assert prepare(settings(str(code)), VOCAB, tmp_path / "out").manifest == before.manifest


def test_a_folder_of_other_things_is_never_replaced(tmp_path, code):
    with pytest.raises(DataError, match=r"holds other things \(0\.py"):
        prepare(settings(str(code)), VOCAB, code)
    assert len(list(code.iterdir())) == 8
    with pytest.raises(DataError, match="is a file"):
        prepare(settings(str(code)), VOCAB, code / "0.py")


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"sources": []}, "data.sources"),
        ({"extensions": ["py"]}, r"data\.extensions.*'py'"),
        ({"length": 16, "min_tokens": 8}, r"data\.length.*\(8\); got 16"),
        ({"min_tokens": 0}, r"data\.min_tokens.*got 0"),
        ({"max_tokens": -1}, r"data\.max_tokens.*got -1"),
        ({"eos_padding": "blok"}, "did you mean 'block'"),
        ({"language": "pyton"}, r"data\.language 'pyton'; did you mean 'python'"),
        ({"held_out_fraction": 1.0}, r"data\.held_out_fraction.*got 1\.0"),
        ({"kind": "text"}, "unknown setting 'kind'"),
    ],
)
def test_wrong_settings_are_named(tree, message):
    with pytest.raises(ConfigError, match=message):
        build(DataSettings, tree)


def test_rows_cut_from_one_file_are_on_one_side_of_the_split(tmp_path):
    rows = [
        {"prompt": f"p{i}", "response": f"{group} " * 12 + str(i), "origin": f"{group}.py"}
        for group in "abcdef"
        for i in range(5)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = DataSettings(
        sources=(str(path),), length=64, packing=False, held_out_fraction=0.5, split_seed=1
    )
    data = prepare(settings, ByteVocab(), tmp_path / "data")
    sides = {}
    for name, part in (("train", data.train), ("held_out", data.held_out)):
        for index in range(len(part)):
            batch = part.batch([index])
            learnt = bytes(batch.tokens_BL[batch.maskable_BL].tolist()[:1]).decode()
            sides.setdefault(learnt, set()).add(name)
    assert set(sides) == set("abcdef")
    assert all(len(names) == 1 for names in sides.values())


def test_rows_of_an_earlier_version_are_made_again(tmp_path, code):
    """They do not say which documents are held out, which the prompts of rollouts have to know."""
    folder = tmp_path / "out"
    before = prepare(settings(str(code)), VOCAB, folder)
    assert prepare(settings(str(code)), VOCAB, folder).reused
    manifest = dict(before.manifest)
    del manifest["held_out_below"]
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    again = prepare(settings(str(code)), VOCAB, folder)
    assert not again.reused
    assert again.manifest["held_out_below"] == before.manifest["held_out_below"]
