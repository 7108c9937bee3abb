"""A teacher's distributions in a student's tokens, against the definition and against enumeration."""

import json
import math
from types import SimpleNamespace

import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mdm.token_bytes import encode_with_ends, token_bytes
from mdm.train.packing import Packer
from mdm.train.readings import Reading, Readings, ReadingWriter
from mdm.train.targets import TargetSettings
from mdm.train.teachers.ar import ARTeacher
from mdm.train.teachers.mapped import find_places, make_mapping, mapped
from mdm.train.teachers.pieces import NO_PIECE, Continuations, Pieces
from mdm.vocab import read_vocab

TEXTS = (
    "def add(a, b):\n    return a + b\n",
    "for i in range(10):\n    print(i)  # naïve café\n",
    "x = 'añb'\nreturn\n",
)
STUDENT_WORDS = ("return", " return", "def", "    ", "in", " in", "range", "print", "(a", "é")
TEACHER_WORDS = ("re", "turn", " re", "def ", "  ", "int", "pr", " in range", "add(a,", "\n    ")
EVERYTHING = TargetSettings(kind="mapped", top_k=2**12)


def vocab_of(words, special=(tiny.START, tiny.END, tiny.PAD)):
    """A byte-level BPE that merges to exactly these words where it can; id = byte value below 256."""
    char_of = tiny.byte_alphabet()
    table = {char: byte for byte, char in enumerate(char_of)}
    merges = []
    for word in words:
        chars = [char_of[byte] for byte in word.encode()]
        joined = chars[0]
        for char in chars[1:]:
            pair = (joined, char)
            joined += char
            if joined not in table:
                table[joined] = len(table)
                merges.append(pair)
    tokenizer = Tokenizer(models.BPE(vocab=table, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[0],
        eos_token=special[1],
        pad_token=special[2],
        clean_up_tokenization_spaces=False,
    )
    return read_vocab(fast).with_mask(None)


def teacher_of(vocab, seed=0, family="llama"):
    model = tiny.tiny_model(family, len(vocab), seed=seed)
    return ARTeacher(model, len(vocab), plain_head=True, vocab=vocab)


def read(folder, student, teacher_vocab, texts=TEXTS, length=200, packing=True, prompt=None):
    """Rows of the texts and their readings, as preparation makes them."""
    packer = Packer(length, 4, packing, "none", 8, student.start_id, student.eos_id, student.pad_id)
    rows = []
    for text in texts:
        ((tokens, student_ends),) = encode_with_ends(student, [text])
        ((other, ends),) = encode_with_ends(teacher_vocab, [text])
        context = [teacher_vocab.start_id, *(prompt or [])]
        reading = Reading(
            context, torch.tensor(other).numpy(), ends, student_ends, teacher_vocab.eos_id
        )
        rows += packer.add(tokens, student.encode("p") if prompt else None, reading=reading)
    rows += packer.finish()
    writer = ReadingWriter(folder, length)
    for row in rows:
        writer.append(row.pieces)
    writer.close()
    readings = Readings(folder)
    columns = [torch.stack([torch.from_numpy(row[i]) for row in rows]).long() for i in (0, 1, 2)]
    tokens_BL, document_ids_BL, maskable_BL = columns
    reading = readings.batch(range(len(rows)))
    return SimpleNamespace(
        tokens_BL=tokens_BL,
        document_ids_BL=document_ids_BL,
        maskable_BL=maskable_BL.bool(),
        reading=reading,
    )


def encode_first(student, value):
    """The student's first token for bytes, by its tokenizer alone; half a character is its first byte."""
    for size in range(len(value), 0, -1):
        try:
            return student.encode(value[:size].decode())[0]
        except UnicodeDecodeError:
            continue
    return value[0]


def slow(teacher, student, text, position):
    """({student token: probability}, lost) at a position of a text (None: behind it), by the definition,
    with one full forward for every token of the teacher."""
    table = token_bytes(teacher.vocab)
    ((theirs, ends),) = encode_with_ends(teacher.vocab, [text])
    ((_, own_ends),) = encode_with_ends(student, [text])
    if position is None:
        low = high = int(own_ends[-1])
        theirs, ends = [*theirs, teacher.vocab.eos_id], [*ends.tolist(), high]
        first = len(theirs) - 1
    else:
        low = int(own_ends[position - 1]) if position else 0
        high = int(own_ends[position])
        first = next(j for j, end in enumerate(ends) if end > low)
    start = int(ends[first - 1]) if first else 0
    before = text.encode()[start:low]
    result: dict[int, float] = {}

    def next_probs(j):
        ids = torch.tensor([[teacher.vocab.start_id, *theirs[:j]]])
        with torch.no_grad():
            return teacher.model(ids).logits[0, -1, : teacher.num_tokens].double().softmax(-1)

    def give(token, mass):
        result[token] = result.get(token, 0.0) + mass

    probs = next_probs(first).tolist()
    able = {
        v: p
        for v, p in enumerate(probs)
        if table[v] and table[v].startswith(before) and len(table[v]) > len(before)
    }
    if not before:
        able = dict(enumerate(probs))
    total = sum(able.values())
    held, j, rest = None, first, b""
    for v, p in able.items():
        if v == theirs[first] and ends[first] < high:
            held, rest = p / total, table[v][len(before) :]
        elif v == teacher.vocab.eos_id:
            give(student.eos_id, p / total)
        elif table[v] is None:
            give(NO_PIECE, p / total)
        else:
            give(encode_first(student, table[v][len(before) :]), p / total)
    while held is not None:
        j += 1
        mass, held, base = held, None, rest
        probs_V = next_probs(j)
        likely = {*probs_V.topk(min(64, len(probs_V))).indices.tolist(), theirs[j]}
        give(encode_first(student, base), mass * (1 - float(probs_V[list(likely)].sum())))
        for v in likely:
            p = float(probs_V[v])
            if v == theirs[j] and ends[j] < high:
                held, rest = mass * p, base + table[v]
            else:
                give(encode_first(student, base + (table[v] or b"")), mass * p)
    lost = result.pop(NO_PIECE, 0.0)
    return {token: p / (1 - lost) for token, p in result.items() if p > 0}, lost


def as_dicts(targets):
    return [
        {
            int(i): math.exp(float(p))
            for i, p in zip(ids, log_probs, strict=True)
            if p > -math.inf and math.exp(float(p)) > 0
        }
        for ids, log_probs in zip(targets.token_ids_NK, targets.log_probs_NK, strict=True)
    ]


def ask(teacher, student, rows, settings=EVERYTHING, temperature=1.0, wanted_BL=None):
    wanted_BL = rows.maskable_BL if wanted_BL is None else wanted_BL
    return mapped(
        make_mapping(teacher, student),
        rows.reading,
        wanted_BL,
        rows.document_ids_BL,
        settings=settings,
        temperature=temperature,
    )


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(
    ("student_words", "teacher_words"),
    [(STUDENT_WORDS, TEACHER_WORDS), ((), TEACHER_WORDS), (STUDENT_WORDS, ()), (("re",), ("ret",))],
)
def test_equal_to_the_definition(tmp_path, family, student_words, teacher_words):
    student, other = vocab_of(student_words), vocab_of(teacher_words)
    teacher = teacher_of(other, family=family)
    rows = read(tmp_path / "r", student, other)
    targets = ask(teacher, student, rows)
    assert len(targets) == int(rows.maskable_BL.sum())
    found, answered = iter(as_dicts(targets)), iter(targets.answered_N.tolist())
    lost = iter(targets.measures["lost"].tolist())
    compared = 0
    for text in TEXTS:
        for position, _ in enumerate(student.encode(text)):
            value, is_answered, lost_mass = next(found), next(answered), next(lost)
            assert is_answered
            expected, expected_lost = slow(teacher, student, text, position)
            assert lost_mass == pytest.approx(expected_lost, abs=1e-6)
            assert sum(value.values()) == pytest.approx(1, abs=1e-5)
            for token in value.keys() | expected.keys():
                assert value.get(token, 0.0) == pytest.approx(expected.get(token, 0.0), abs=2e-6)
            compared += 1
        # Behind the text: how it goes on without its end, and that it ends.
        value, lost_mass = next(found), next(lost)
        assert next(answered)
        expected, expected_lost = slow(teacher, student, text, None)
        assert lost_mass == pytest.approx(expected_lost, abs=1e-6)
        assert value[student.eos_id] == pytest.approx(expected[student.eos_id], abs=2e-6)
        for token in value.keys() | expected.keys():
            assert value.get(token, 0.0) == pytest.approx(expected.get(token, 0.0), abs=2e-6)
    assert compared > 60


def test_two_byte_tokenizers_are_renamed_exactly(tmp_path):
    """Other ids for the same bytes: the teacher's own distributions, token by token."""
    student = vocab_of(())
    other = read_vocab(shifted_bytes())
    teacher = teacher_of(other)
    rows = read(tmp_path / "r", student, other, packing=False)
    targets = ask(teacher, student, rows)
    text = TEXTS[0]
    ids = torch.tensor([[other.start_id, *other.encode(text)]])
    with torch.no_grad():
        probs_LV = teacher.model(ids).logits[0, :-1].double().softmax(-1)
    byte_of = token_bytes(other)
    renamed_V = torch.tensor(
        [value[0] if value else (student.eos_id if i == other.eos_id else -1)
         for i, value in enumerate(byte_of)]
    )  # fmt: skip
    for value, probs_V in zip(as_dicts(targets), probs_LV, strict=False):
        kept = renamed_V >= 0
        expected_V = probs_V[kept] / probs_V[kept].sum()
        for token, p in zip(renamed_V[kept].tolist(), expected_V.tolist(), strict=True):
            assert value.get(token, 0.0) == pytest.approx(p, abs=1e-6)


def shifted_bytes():
    """Byte b has id b + 3; specials come first."""
    table = {tiny.START: 0, tiny.END: 1, tiny.PAD: 2}
    table |= {char: 3 + byte for byte, char in enumerate(tiny.byte_alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=table, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([tiny.START, tiny.END, tiny.PAD])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=tiny.START, eos_token=tiny.END, pad_token=tiny.PAD
    )


def test_a_student_of_bytes_gets_the_exact_byte_distribution(tmp_path):
    """Next-byte probabilities by enumeration over the teacher's tokens that continue what is there."""
    student, other = vocab_of(()), vocab_of(TEACHER_WORDS)
    teacher = teacher_of(other, seed=5)
    rows = read(tmp_path / "r", student, other, texts=("  int pr",))
    found = as_dicts(ask(teacher, student, rows))
    table = token_bytes(other)
    ((theirs, ends),) = encode_with_ends(other, ["  int pr"])
    assert len(theirs) < len(b"  int pr")
    for place in range(len(b"  int pr")):
        j = next(j for j, end in enumerate(ends) if end > place)
        start = int(ends[j - 1]) if j else 0
        before = b"  int pr"[start:place]
        with torch.no_grad():
            logits_V = teacher.model(torch.tensor([[other.start_id, *theirs[:j]]])).logits[0, -1]
        probs_V = logits_V.double().softmax(-1)
        mass: dict[int, float] = {}
        for v, value in enumerate(table):
            if value and value.startswith(before) and len(value) > len(before):
                byte = value[len(before)]
                mass[byte] = mass.get(byte, 0.0) + float(probs_V[v])
        if not before:
            mass[student.eos_id] = float(probs_V[other.eos_id])
        total = sum(mass.values())
        for byte, p in mass.items():
            assert found[place].get(byte, 0.0) == pytest.approx(p / total, abs=1e-6)


def test_top_k_temperature_and_tail(tmp_path):
    student, other = vocab_of(STUDENT_WORDS), vocab_of(TEACHER_WORDS)
    teacher = teacher_of(other)
    rows = read(tmp_path / "r", student, other)
    whole = as_dicts(ask(teacher, student, rows))
    few = ask(teacher, student, rows, TargetSettings(kind="mapped", top_k=3), temperature=2.0)
    for row, (value, tail, answered) in enumerate(
        zip(as_dicts(few), few.tail_mass_N.tolist(), few.answered_N.tolist(), strict=True)
    ):
        if not answered:
            assert tail == 0
            continue
        sharper = {token: p**0.5 for token, p in whole[row].items()}
        total = sum(sharper.values())
        best = sorted(sharper.values(), reverse=True)[:3]
        assert sorted(value.values(), reverse=True) == pytest.approx(
            [p / total for p in best], abs=1e-5
        )
        assert tail == pytest.approx(1 - sum(best) / total, abs=1e-5)
    assert few.temperature == 2.0


def test_some_positions_and_padded_rows(tmp_path):
    """What is asked for beside a position changes nothing about it."""
    student, other = vocab_of(STUDENT_WORDS), vocab_of(TEACHER_WORDS)
    teacher = teacher_of(other)
    rows = read(tmp_path / "r", student, other, length=48)
    whole = ask(teacher, student, rows)
    wanted_BL = rows.maskable_BL & (torch.arange(48) % 5 == 2)
    some = ask(teacher, student, rows, wanted_BL=wanted_BL)
    expected = whole.select(wanted_BL[rows.maskable_BL])
    assert len(some) == int(wanted_BL.sum()) > 5
    torch.testing.assert_close(some.log_probs_NK.exp(), expected.log_probs_NK.exp())
    none = ask(teacher, student, rows, wanted_BL=torch.zeros_like(wanted_BL))
    assert len(none) == 0


def test_pieces_cut_inside_a_teachers_token_are_not_answered_there(tmp_path):
    """A row ends between the bytes of one of the teacher's tokens: nobody guesses what it was."""
    student, other = vocab_of(()), vocab_of((" in range",))
    teacher = teacher_of(other)
    rows = read(tmp_path / "r", student, other, texts=("for i in range(3)\n",), length=11)
    places = find_places(
        rows.reading,
        rows.maskable_BL,
        rows.document_ids_BL,
        make_mapping(teacher, student).continuations.lengths_V,
    )
    assert len(rows.tokens_BL) == 2
    answered = [place is not None for place in places]
    text = bytes(rows.tokens_BL[rows.maskable_BL].tolist()[:-1])
    assert text == b"for i in range(3)\n"
    assert [answered[i] for i in range(len(text))] == [not 5 <= i < 14 for i in range(len(text))]
    targets = ask(teacher, student, rows)
    assert targets.answered_N.tolist() == answered
    assert targets.measures["answered"].tolist() == [float(a) for a in answered]
    assert targets.measures["lost"].isnan().tolist() == [not a for a in answered]


def test_a_prompt_is_read_and_not_answered(tmp_path):
    student, other = vocab_of(STUDENT_WORDS), vocab_of(TEACHER_WORDS)
    teacher = teacher_of(other)
    prompt = other.encode("say:")
    rows = read(tmp_path / "r", student, other, texts=("return a",), prompt=prompt)
    value = as_dicts(ask(teacher, student, rows))[0]
    with torch.no_grad():
        ids = torch.tensor([[other.start_id, *prompt]])
        probs_V = teacher.model(ids).logits[0, -1].softmax(-1)
    unwritable = [other.start_id, other.pad_id, other.mask_id]
    expected = float(probs_V[ord("(")]) / (1 - float(probs_V[unwritable].sum()))
    assert value[ord("(")] == pytest.approx(expected, abs=1e-5)


def test_tokens_that_are_not_the_bytes_of_the_text_are_not_answered(tmp_path):
    """A teacher whose tokenizer rewrites the text (ﬁ → fi): it is asked where it reads what is there."""
    backend = json.loads(vocab_of(TEACHER_WORDS).tokenizer.backend_tokenizer.to_str())
    backend["normalizer"] = {"type": "NFKC"}
    rewriting = read_vocab(
        PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
            bos_token=tiny.START,
            eos_token=tiny.END,
            pad_token=tiny.PAD,
        )
    )
    student, text = vocab_of(STUDENT_WORDS), "a ﬁx = ²"
    teacher = teacher_of(rewriting)
    rows = read(tmp_path / "r", student, rewriting, texts=(text,))
    answered = ask(teacher, student, rows).answered_N.tolist()
    spelt = token_bytes(student)
    plain = [bytes(spelt[i]).isascii() for i in student.encode(text)]
    assert answered == [*plain, True]
    assert 3 < sum(plain) < len(plain)


# --- pieces ------------------------------------------------------------------------------------------


def test_first_pieces():
    pieces = Pieces(vocab_of(("return", "é")))
    table = {
        value: token for token, value in enumerate(token_bytes(vocab_of(("return", "é")))) if value
    }
    wanted = [b"return x", b"retu", b"\xc3", b"\xa9x", "é".encode(), b"\xc3\xa9\xff", b"x"]
    expected = [
        table[b"return"], table[b"retu"], 0xC3, 0xA9, table["é".encode()], table["é".encode()], ord("x")
    ]  # fmt: skip
    assert pieces.first(wanted) == expected
    assert pieces.first(wanted) == expected  # from memory
    words = Pieces(read_vocab(tiny.word_tokenizer()).with_mask(None))
    assert words.first([b"w1"]) == [NO_PIECE]  # a tokenizer whose tokens have no bytes


def test_continuations_are_those_that_are_longer():
    other = vocab_of(("re", "ret", "return", "\ufffd"))
    continuations = Continuations(other, len(other), Pieces(vocab_of(())), {})
    tokens, firsts = continuations.behind(b"re")
    table = token_bytes(other)
    assert {table[int(v)] for v in tokens} == {b"ret", b"retu", b"retur", b"return"}
    assert firsts.tolist() == [ord("t")] * 4
    assert continuations.behind(b"\xff")[0].tolist() == []
    assert {table[int(v)] for v in continuations.behind(b"\xef")[0]} == {
        b"\xef\xbf",
        b"\xef\xbf\xbd",
    }


def test_all_mass_lost_is_no_answer(tmp_path):
    """A student that cannot write anything the teacher expects is not told nonsense."""
    student, other = vocab_of(STUDENT_WORDS), vocab_of(TEACHER_WORDS)
    teacher = teacher_of(other)
    with torch.no_grad():
        head = teacher.model.get_output_embeddings().weight
        head.mul_(0)
        head[other.pad_id] = 10 * torch.ones(head.shape[1])
        teacher.model.model.norm.weight.copy_(torch.ones_like(teacher.model.model.norm.weight))
    mapping = make_mapping(teacher, student)
    rows = read(tmp_path / "r", student, other)
    assert int(mapping.continuations.first_V[other.pad_id]) == NO_PIECE
    targets = ask(teacher, student, rows)
    sure = targets.measures["lost"] > 1 - 1e-6
    assert bool(sure.any())
    assert not bool(targets.answered_N[sure].any())
    assert not bool(targets.log_probs_NK.isnan().any())
