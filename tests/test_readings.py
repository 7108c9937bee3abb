"""Rows read a second time by a teacher: bytes, edges of pieces, chunks, files."""

import json

import numpy as np
import pytest
import tiny
import torch
from test_mapped import STUDENT_WORDS, TEACHER_WORDS, TEXTS, read, vocab_of

from mdm.errors import DataError
from mdm.token_bytes import encode_with_ends, token_bytes
from mdm.train.dataset import DataSettings, open_prepared, prepare
from mdm.train.readings import Reading, Readings, ReadingWriter, chunks
from mdm.vocab import read_vocab

STUDENT, TEACHER = vocab_of(STUDENT_WORDS), vocab_of(TEACHER_WORDS)
LONG = vocab_of((" in range", "return a", "print(i)"))  # tokens that rows of nine cut in two


def reading_of(text, student=STUDENT, teacher=TEACHER, context=(256,)):
    ((tokens, ends),) = encode_with_ends(teacher, [text])
    ((_, student_ends),) = encode_with_ends(student, [text])
    return Reading(context, np.array(tokens), ends, student_ends, teacher.eos_id)


@pytest.mark.parametrize("length", [12, 17, 30, 200])
def test_the_bytes_of_every_token_are_where_it_says(tmp_path, length):
    """Cut anywhere: student and teacher tokens spell the bytes of the piece they are said to."""
    rows = read(tmp_path / "r", STUDENT, TEACHER, length=length)
    spelt, other = token_bytes(STUDENT), token_bytes(TEACHER)
    seen = 0
    for row in range(len(rows.tokens_BL)):
        for document in range(int(rows.document_ids_BL[row].max()) + 1):
            own_L = (rows.document_ids_BL[row] == document) & (
                rows.reading.student_starts_BL[row] >= 0
            )
            text = b"".join(spelt[int(i)] for i in rows.tokens_BL[row][own_L])
            for token, low, high in zip(
                rows.tokens_BL[row][own_L].tolist(),
                rows.reading.student_starts_BL[row][own_L].tolist(),
                rows.reading.student_ends_BL[row][own_L].tolist(),
                strict=True,
            ):
                assert text[low:high] == spelt[token]
            their_M = (rows.reading.document_ids_BM[row] == document) & (
                rows.reading.starts_BM[row] >= 0
            )
            for token, low, high in zip(
                rows.reading.tokens_BM[row][their_M].tolist(),
                rows.reading.starts_BM[row][their_M].tolist(),
                rows.reading.ends_BM[row][their_M].tolist(),
                strict=True,
            ):
                assert text[low:high] == other[token]
                seen += 1
    no_text_BM = (rows.reading.document_ids_BM >= 0) & (rows.reading.starts_BM < 0)
    segments = int((rows.document_ids_BL.amax(1) + 1).sum())
    ends = int((rows.tokens_BL == STUDENT.eos_id)[rows.maskable_BL].sum())
    assert ends == len(TEXTS)
    assert int(no_text_BM.sum()) == segments + ends  # start and end, and no token of another row
    assert bool((rows.reading.starts_BM[no_text_BM] == -1).all())
    if length == 200:
        assert seen == sum(len(TEACHER.encode(text)) for text in TEXTS)
    assert seen > 20


def test_start_prompt_and_end_are_no_text(tmp_path):
    rows = read(tmp_path / "r", STUDENT, TEACHER, texts=("return a",), prompt=[7, 8])
    reading = rows.reading
    assert reading.tokens_BM[0, :3].tolist() == [TEACHER.start_id, 7, 8]
    assert reading.starts_BM[0, :3].tolist() == [-1, -1, -1]
    assert (
        rows.tokens_BL[0, 1:4].tolist() == [*STUDENT.encode("p"), *STUDENT.encode("return a")][:3]
    )
    assert reading.student_ends_BL[0, :2].tolist() == [-1, -1]  # start, prompt
    learnt = int(rows.maskable_BL[0].sum())
    assert reading.student_ends_BL[0, learnt + 1] == -1  # eos, the last that is learnt
    assert rows.tokens_BL[0, learnt + 1] == STUDENT.eos_id


def test_tokens_without_bytes_go_with_what_is_before_them():
    """[4, 4, 6] cut at byte 4: the second token is in the first piece alone."""
    reading = Reading([9], np.array([1, 2, 3, 4]), np.array([4, 4, 4, 6]), np.array([4, 6]), 8)
    assert reading.piece(0, 1).tokens.tolist() == [9, 1, 2, 3]
    assert reading.piece(1, 3).tokens.tolist() == [9, 4, 8]
    assert reading.piece(1, 3).starts.tolist() == [-1, 0, -1]
    opened = Reading([9], np.array([1, 2, 3]), np.array([0, 5, 6]), np.array([2, 6]), 8)
    assert opened.piece(0, 1).tokens.tolist() == [9, 1]  # token 2 reaches over the edge
    assert opened.piece(1, 2).tokens.tolist() == [9, 3]
    assert opened.piece(1, 2).starts.tolist() == [-1, 3]


def test_a_drawn_text_is_read_as_it_was_drawn(tmp_path):
    """The reader's own sample: not encoded again."""
    student, drawn = read_vocab(tiny.byte_tokenizer()).with_mask(None), [*b"return"]
    assert TEACHER.encode("return") != drawn
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps({"prompt": "x", "response": "return", "token_ids": drawn}))
    settings = DataSettings(sources=(str(source),), length=48, held_out_fraction=0)
    data = prepare(settings, student, tmp_path / "data", TEACHER)
    assert data.readings.batch([0]).tokens_BM[0, -7:].tolist() == [*drawn, TEACHER.eos_id]


def test_padding_of_a_batch(tmp_path):
    folder = tmp_path / "r"
    writer = ReadingWriter(folder, 40)
    for text in ("return", "for i in range(10): print(i)", ""):
        reading = reading_of(text)
        writer.append([(1, reading.piece(0, len(reading.student_ends) + 1))])
    writer.append([])
    writer.close()
    batch = Readings(folder).batch([1, 0, 2, 3])
    sizes = [len(TEACHER.encode("for i in range(10): print(i)")) + 2, 4, 2, 0]
    assert (batch.document_ids_BM >= 0).sum(1).tolist() == sizes
    assert batch.tokens_BM.shape[1] == max(sizes)
    assert bool((batch.tokens_BM[batch.document_ids_BM < 0] == 0).all())
    again = Readings(folder).batch([0])
    assert again.tokens_BM.tolist() == [[256, *TEACHER.encode("return"), TEACHER.eos_id]]
    assert writer.longest == max(sizes)


@pytest.mark.parametrize("teacher", [TEACHER, LONG], ids=["short", "long"])
@pytest.mark.parametrize("length", [9, 10, 11, 13, 200])
def test_chunks_against_the_definition(tmp_path, length, teacher):
    """Two tokens are in one chunk if and only if no common boundary lies between them."""
    rows = read(tmp_path / "r", STUDENT, teacher, length=length)
    chunk_BL, chunk_BM = chunks(rows.reading, rows.document_ids_BL)
    assert bool((chunk_BL[rows.reading.student_starts_BL < 0] == -1).all())
    assert bool((chunk_BM[rows.reading.starts_BM < 0] == -1).all())
    numbers = [set(c[c >= 0].tolist()) for c in (chunk_BL, chunk_BM)]
    assert numbers[0] == numbers[1]
    assert len(numbers[0]) > 10
    places: dict[int, tuple[int, int]] = {}
    for row in range(len(chunk_BL)):
        for document in range(int(rows.document_ids_BL[row].max()) + 1):
            own = (rows.document_ids_BL[row] == document) & (
                rows.reading.student_starts_BL[row] >= 0
            )
            their = (rows.reading.document_ids_BM[row] == document) & (
                rows.reading.starts_BM[row] >= 0
            )
            if not bool(own.any()) or not bool(their.any()):
                continue
            sides = [
                (rows.reading.student_starts_BL[row], rows.reading.student_ends_BL[row], own),
                (rows.reading.starts_BM[row], rows.reading.ends_BM[row], their),
            ]
            edges = [
                set(starts[at].tolist()) | set(ends[at].tolist()) for starts, ends, at in sides
            ]
            common = sorted(edges[0] & edges[1])
            for (starts, ends, at), chunk in zip(
                sides, (chunk_BL[row], chunk_BM[row]), strict=True
            ):
                for low, high, number in zip(
                    starts[at].tolist(), ends[at].tolist(), chunk[at].tolist(), strict=True
                ):
                    around = (
                        max((c for c in common if c <= low), default=None),
                        min((c for c in common if c >= high), default=None),
                    )
                    whole = None not in around
                    assert (number >= 0) == whole, (low, high, common)
                    if whole:
                        assert places.setdefault(number, (row, document, *around)) == (
                            row, document, *around
                        )  # fmt: skip
    assert len(set(places.values())) == len(places)  # and not two numbers for one


def test_one_tokenizer_gives_one_chunk_a_token(tmp_path):
    rows = read(tmp_path / "r", STUDENT, STUDENT)
    chunk_BL, chunk_BM = chunks(rows.reading, rows.document_ids_BL)
    assert torch.equal(chunk_BL[chunk_BL >= 0], torch.arange(int((chunk_BL >= 0).sum())))
    assert torch.equal(chunk_BM[chunk_BM >= 0], torch.arange(int((chunk_BL >= 0).sum())))


def test_prompts_and_chats_as_prepared(tmp_path):
    """Each in the reader's own tokens and template, behind one start token."""
    student, reader = read_vocab(tiny.byte_tokenizer()).with_mask(None), vocab_of(TEACHER_WORDS)
    for vocab in (student, reader):
        vocab.tokenizer.chat_template = tiny.CHAT_TEMPLATE
    chat = [{"role": "user", "content": "add?"}, {"role": "assistant", "content": "return a + b"}]
    rows = [{"prompt": "def add(a, b):", "response": " return a"}, {"messages": chat}]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = DataSettings(sources=(str(source),), length=128, held_out_fraction=0)
    data = prepare(settings, student, tmp_path / "data", reader)
    assert len(data.train) == len(data.readings) == 2
    batch = data.readings.batch([0, 1])
    expected = [
        [
            reader.start_id,
            *reader.encode("def add(a, b):"),
            *reader.encode(" return a"),
            reader.eos_id,
        ],
        [*reader.encode_chat(chat[:1]), *reader.encode("return a + b"), reader.eos_id],
    ]
    assert expected[1][0] == reader.start_id
    for row, tokens in enumerate(expected):
        there = batch.document_ids_BM[row] >= 0
        assert batch.tokens_BM[row][there].tolist() == tokens
    texts = [len(reader.encode(" return a")), len(reader.encode("return a + b"))]
    assert (batch.starts_BM >= 0).sum(1).tolist() == texts
    assert data.manifest["splits"]["train"]["longest_reading"] == max(map(len, expected))
    assert prepare(settings, student, tmp_path / "data", reader).reused
    assert not prepare(settings, student, tmp_path / "data").reused  # read by nobody: other data


def test_damaged_files(tmp_path):
    read(tmp_path / "r", STUDENT, TEACHER)
    with pytest.raises(
        DataError, match=r"cannot read the teacher's reading of the rows in .*prepare"
    ):
        Readings(tmp_path / "none")
    np.save(tmp_path / "r" / "ends.npy", np.zeros(3, np.int32))
    with pytest.raises(DataError, match="differ in length"):
        Readings(tmp_path / "r")


def test_every_row_has_a_reading(tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_text(
        "".join(json.dumps({"prompt": "x", "response": f"{i}"}) + "\n" for i in (1, 2))
    )
    settings = DataSettings(sources=(str(source),), length=48, held_out_fraction=0)
    data = prepare(settings, STUDENT, tmp_path / "data", TEACHER)
    writer = ReadingWriter(tmp_path / "data" / "train" / "readings", 48)
    writer.append([])
    writer.close()
    with pytest.raises(DataError, match="does not hold a teacher's reading of every row"):
        open_prepared(data.directory)
