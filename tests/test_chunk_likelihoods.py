"""How likely a diffusion teacher with another tokenizer finds masked chunks, against a loop over tokens.

A chunk by definition: what lies between two neighbouring places, in bytes, at which tokens of both end.
Shapes: B rows, L the student's length, M the teacher's, N masked positions, C chunks.
"""

import dataclasses
import itertools

import pytest
import test_mapped
import tiny
import torch
from test_mapped import STUDENT_WORDS, TEACHER_WORDS, vocab_of

from mdm.convert import make_bidirectional
from mdm.denoiser import Denoiser
from mdm.errors import TrainingError
from mdm.train.comp_demo import halves
from mdm.train.masking import mask_batch
from mdm.train.objective import ObjectiveSettings
from mdm.train.placement import MaskSettings
from mdm.train.readings import Readings, chunks
from mdm.train.targets import ChunkTargets, TargetSettings
from mdm.train.teachers.chunk_likelihoods import IMPOSSIBLE, ask_chunks, chunk_targets
from mdm.train.teachers.denoised import DiffusionTeacher, demo_uniforms

# kl|mn|op|qs against k|lm|no|pq|s: a chunk of several tokens on both sides, which rows cut in two.
STUDENT = vocab_of((*STUDENT_WORDS, "kl", "mn", "op", "qs"))
TEACHER = vocab_of((*TEACHER_WORDS, "lm", "no", "pq"))
TEXTS = (*test_mapped.TEXTS, "klmnopqs" * 5)
PLAIN = TargetSettings(kind="chunks")
LENGTHS = [14, 30, 200]  # pieces of texts, two of them in a row, everything in one row


def read(folder, texts=TEXTS, **options):
    return test_mapped.read(folder, STUDENT, TEACHER, texts, **options)


def teacher(*, shift=True, block_size=None, attention=None, seed=4):
    model = tiny.tiny_model("qwen2", len(TEACHER), hidden=16, layers=1, seed=seed)
    make_bidirectional(model)
    layout = {"shift": shift, "block_size": block_size, "attention": attention}
    return Denoiser(model, TEACHER, **layout).eval().requires_grad_(False)


TEACHERS = {
    "full, shifted": lambda: teacher(),
    "full": lambda: teacher(shift=False),
    "causal context, shifted": lambda: teacher(block_size=4, attention="context_causal"),
    "reordered": lambda: teacher(shift=False, block_size=5, attention="reordered"),
}


def drawn(rows, *, chosen=None, masked_BL=None, where="chunks", step=0):
    """A batch of these rows, and the teacher's reading of them with its chunks."""
    chosen = list(range(len(rows.tokens_BL))) if chosen is None else chosen
    reading = type(rows.reading)(*(tensor[chosen] for tensor in rows.reading))
    ids_BL = rows.document_ids_BL[chosen]
    chunk_BL, chunk_BM = chunks(reading, ids_BL)
    batch = mask_batch(
        ObjectiveSettings(min_t=0.3),
        rows.tokens_BL[chosen],
        ids_BL,
        rows.maskable_BL[chosen],
        torch.zeros_like(ids_BL),
        masks=MaskSettings(where=where),
        mask_id=STUDENT.mask_id,
        seed=0,
        step=step,
        samples=chosen,
        samples_per_step=len(rows.tokens_BL),
        rows=chosen,
        chunk_BL=chunk_BL,
    )
    if masked_BL is not None:
        xt_BL = batch.x0_BL.masked_fill(masked_BL, STUDENT.mask_id)
        batch = dataclasses.replace(batch, masked_BL=masked_BL, distilled_BL=masked_BL, xt_BL=xt_BL)
    return batch, reading, chunk_BM


def by_definition(rows, row):
    """For every chunk of a row: its student tokens, its document and its teacher tokens; and for every
    document what the teacher reads of it, and the places that are text in no chunk or behind it."""
    found, documents = [], []
    reading = rows.reading
    for document in range(int(rows.document_ids_BL[row].max()) + 1):
        ours = (rows.document_ids_BL[row] == document) & (reading.student_starts_BL[row] >= 0)
        theirs = reading.document_ids_BM[row] == document
        tokens = reading.tokens_BM[row][theirs].tolist()
        starts, ends = (x[row][theirs].tolist() for x in (reading.starts_BM, reading.ends_BM))
        text = [j for j, start in enumerate(starts) if start >= 0]
        places = ours.nonzero()[:, 0].tolist()
        spans = {
            i: (int(reading.student_starts_BL[row, i]), int(reading.student_ends_BL[row, i]))
            for i in places
        }
        common = []
        if text and places:
            own = {0} | {end for _, end in spans.values()}
            common = sorted(own & ({starts[text[0]]} | {ends[j] for j in text}))
        inside = set()
        for low, high in itertools.pairwise(common):
            members = [i for i in places if low <= spans[i][0] and spans[i][1] <= high]
            asked = [j for j in text if low <= starts[j] and ends[j] <= high]
            assert members
            assert asked
            inside |= set(asked)
            found.append((members, document, asked))
        behind = {j for j in range(len(tokens)) if text and j > text[-1]}
        documents.append((tokens, (set(text) - inside) | behind))
    return found, documents


def log_prob(denoiser, tokens, hidden, asked):
    """Σ log p of these tokens, one forward over the document alone."""
    x0_BL = torch.tensor([tokens])
    masked_BL = torch.tensor([[j in hidden for j in range(len(tokens))]])
    wanted_BL = torch.tensor([[j in asked for j in range(len(tokens))]])
    options = {} if denoiser.block_size is None else {"x0_bL": x0_BL}
    xt_BL = x0_BL.masked_fill(masked_BL, TEACHER.mask_id)
    log_p_NV = denoiser(xt_BL, wanted_BL, **options).double().log_softmax(-1)
    return float(log_p_NV.gather(1, x0_BL[wanted_BL][:, None]).sum())


def expected(denoiser, rows, batch, parts):
    """(C,) likelihoods of the masked chunks in order, and the masked positions of each."""
    likelihoods, members_C = [], []
    place_of = {tuple(at): n for n, at in enumerate(batch.masked_BL.nonzero().tolist())}
    for b, row in enumerate(batch.rows):
        found, documents = by_definition(rows, row)
        for members, document, asked in found:
            hidden = [bool(batch.masked_BL[b, i]) for i in members]
            assert all(hidden) or not any(hidden)
            if not any(hidden):
                continue
            (part_BL,) = [part_BL for part_BL in parts if part_BL[b, members[0]]]
            tokens, always = documents[document]
            masks = set(always)
            for others, other_document, other_asked in found:
                if other_document == document and part_BL[b, others[0]]:
                    masks |= set(other_asked)
            likelihoods.append(log_prob(denoiser, tokens, masks, set(asked)))
            members_C.append([place_of[b, i] for i in members])
    return torch.tensor(likelihoods), members_C


def compared(targets, likelihood_C, members_C):
    assert isinstance(targets, ChunkTargets)
    assert len(targets) == len(members_C) > 0
    assert targets.log_likelihood_C.dtype == torch.float32
    torch.testing.assert_close(targets.log_likelihood_C, likelihood_C, atol=1e-3, rtol=1e-4)
    number_N = torch.full((len(targets.chunk_N),), -1)
    for c, members in enumerate(members_C):
        number_N[members] = c
        assert int(targets.first_C[c]) == members[0]
    assert targets.chunk_N.equal(number_N)
    assert targets.measures["answered"].tolist() == [float(c >= 0) for c in number_N.tolist()]


# --- against the loop ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEACHERS)
@pytest.mark.parametrize("length", LENGTHS)
def test_likelihoods_are_those_of_a_loop(tmp_path, name, length):
    rows = read(tmp_path / "r", length=length)
    denoiser = TEACHERS[name]()
    batch, reading, chunk_BM = drawn(rows)
    targets = chunk_targets(denoiser, batch, reading, chunk_BM, PLAIN)
    compared(targets, *expected(denoiser, rows, batch, [batch.masked_BL]))
    assert targets.conditioned_on
    sizes = targets.chunk_N[targets.chunk_N >= 0].bincount()
    assert sizes.max() > 1
    assert sizes.min() == 1


@pytest.mark.parametrize("name", ["full, shifted", "reordered"])
@pytest.mark.parametrize("comp_demo", ["bernoulli", "exact"])
@pytest.mark.parametrize("length", LENGTHS[1:])
def test_two_passes_split_chunks(tmp_path, name, comp_demo, length):
    rows = read(tmp_path / "r", length=length)
    denoiser = TEACHERS[name]()
    batch, reading, chunk_BM = drawn(rows)
    settings = TargetSettings(kind="chunks", comp_demo=comp_demo, comp_demo_share=0.4)
    targets = chunk_targets(denoiser, batch, reading, chunk_BM, settings)
    uniforms_BL = demo_uniforms(batch)
    parts = halves(batch.masked_BL, uniforms_BL, 0.4, comp_demo == "exact", batch.chunk_BL)
    compared(targets, *expected(denoiser, rows, batch, parts))
    one = chunk_targets(denoiser, batch, reading, chunk_BM, PLAIN)
    assert not torch.allclose(targets.log_likelihood_C, one.log_likelihood_C, atol=1e-2)


def test_a_prompt_is_read_and_never_masked(tmp_path):
    rows = read(tmp_path / "r", texts=TEXTS[:2], prompt=[7, 8], length=60)
    denoiser = teacher()
    batch, reading, chunk_BM = drawn(rows)
    assert reading.tokens_BM[0, :3].tolist() == [TEACHER.start_id, 7, 8]
    targets = chunk_targets(denoiser, batch, reading, chunk_BM, PLAIN)
    compared(targets, *expected(denoiser, rows, batch, [batch.masked_BL]))
    changed = reading._replace(tokens_BM=reading.tokens_BM.clone())
    changed.tokens_BM[0, 1] = 9
    other = chunk_targets(denoiser, batch, changed, chunk_BM, PLAIN)
    assert not torch.allclose(other.log_likelihood_C, targets.log_likelihood_C, atol=1e-2)


# --- what the teacher is shown ---------------------------------------------------------------------


def shown(denoiser, batch, reading, chunk_BM, settings=PLAIN):
    """The token ids that the teacher reads, pass by pass."""
    fed = []
    hook = denoiser.model.get_input_embeddings().register_forward_pre_hook(
        lambda _, inputs: fed.append(inputs[0])
    )
    chunk_targets(denoiser, batch, reading, chunk_BM, settings)
    hook.remove()
    return fed


@pytest.mark.parametrize("length", LENGTHS)
def test_ends_and_cut_tokens_are_always_masked_and_starts_never(tmp_path, length):
    rows = read(tmp_path / "r", length=length)
    nothing_BL = torch.zeros_like(rows.maskable_BL)
    for masked_BL in (None, nothing_BL):
        batch, reading, chunk_BM = drawn(rows, masked_BL=masked_BL)
        ends = cut = 0
        for fed_BM in shown(teacher(), batch, reading, chunk_BM):
            for row in range(len(fed_BM)):
                found, documents = by_definition(rows, row)
                at = 0
                for document, (tokens, always) in enumerate(documents):
                    hidden = set(always)
                    for members, its_document, asked in found:
                        if its_document == document and batch.masked_BL[row, members[0]]:
                            hidden |= set(asked)
                    expected = [TEACHER.mask_id if j in hidden else t for j, t in enumerate(tokens)]
                    assert fed_BM[row, at : at + len(tokens)].tolist() == expected
                    assert expected[0] == TEACHER.start_id
                    ends += tokens[-1] == TEACHER.eos_id
                    cut += len(always) - (tokens[-1] == TEACHER.eos_id)
                    at += len(tokens)
                assert not fed_BM[row, at:].any()  # padding
        assert ends == len(TEXTS)
        assert (cut > 0) is (length < 200)


def test_a_pass_shows_the_text_of_the_other_parts_chunks(tmp_path):
    rows = read(tmp_path / "r")
    everything = drawn(rows, masked_BL=rows.maskable_BL)
    settings = TargetSettings(kind="chunks", comp_demo="exact")
    (whole_BM,) = shown(teacher(), *everything)
    one_BM, other_BM = shown(teacher(), *everything, settings)
    _, _, chunk_BM = everything
    mask = TEACHER.mask_id
    assert ((whole_BM == mask) == ((one_BM == mask) | (other_BM == mask))).all()
    both_BM = (one_BM == mask) & (other_BM == mask)
    assert int(both_BM.sum()) == len(TEXTS)  # the ends
    assert bool((chunk_BM[both_BM] == -1).all())
    assert all(len(chunk_BM[x == mask].unique()) > 5 for x in (one_BM, other_BM))


# --- batches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["full, shifted", "reordered"])
def test_a_row_is_answered_alike_in_every_batch(tmp_path, name):
    rows = read(tmp_path / "r", length=30)
    readings, settings = (
        Readings(tmp_path / "r"),
        TargetSettings(kind="chunks", comp_demo="bernoulli"),
    )
    asked = DiffusionTeacher(TEACHERS[name](), 0, torch.empty(0).long())
    ask = ask_chunks(asked, readings, settings)
    whole_batch, *_ = drawn(rows)
    whole = ask(whole_batch, None)
    row_C = whole_batch.masked_BL.nonzero()[whole.first_C, 0]
    for chosen in ([1], [2, 0], [2, 1, 0]):
        batch, *_ = drawn(rows, chosen=chosen)
        found = ask(batch, None)
        own_C = batch.masked_BL.nonzero()[found.first_C, 0]
        for b, row in enumerate(chosen):
            torch.testing.assert_close(
                found.log_likelihood_C[own_C == b],
                whole.log_likelihood_C[row_C == row],
                atol=1e-4,
                rtol=1e-4,
            )


def test_nothing_to_ask(tmp_path):
    rows = read(tmp_path / "r")
    ends_BL = (rows.tokens_BL == STUDENT.eos_id) & rows.maskable_BL
    assert int(ends_BL.sum()) == len(TEXTS)
    for comp_demo in ("", "exact", "bernoulli"):
        settings = TargetSettings(kind="chunks", comp_demo=comp_demo)
        for masked_BL in (ends_BL & False, ends_BL):
            batch, reading, chunk_BM = drawn(rows, masked_BL=masked_BL)
            targets = chunk_targets(teacher(), batch, reading, chunk_BM, settings)
            assert len(targets) == len(targets.first_C) == 0
            assert targets.chunk_N.tolist() == [-1] * int(masked_BL.sum())


def test_the_teacher_computes_in_its_own_precision_and_learns_nothing(tmp_path):
    rows = read(tmp_path / "r")
    denoiser = teacher()
    denoiser.requires_grad_(True)
    batch, reading, chunk_BM = drawn(rows)
    plain = chunk_targets(denoiser, batch, reading, chunk_BM, PLAIN)
    assert not plain.log_likelihood_C.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        other = chunk_targets(denoiser, batch, reading, chunk_BM, PLAIN)
    assert other.log_likelihood_C.equal(plain.log_likelihood_C)


def test_a_token_that_the_teacher_never_writes(tmp_path):
    """It makes its chunk as good as impossible, but not infinitely so."""
    rows = read(tmp_path / "r")
    batch, reading, chunk_BM = drawn(rows, masked_BL=rows.maskable_BL)
    plain = chunk_targets(teacher(), batch, reading, chunk_BM, PLAIN)
    token = int(reading.tokens_BM[chunk_BM >= 0][0])
    denoiser = teacher()
    denoiser.never_sampled = torch.tensor([TEACHER.mask_id, token])
    found = chunk_targets(denoiser, batch, reading, chunk_BM, PLAIN)
    hit = {int(chunk) for chunk in chunk_BM[(reading.tokens_BM == token) & (chunk_BM >= 0)]}
    ids = batch.chunk_BL[batch.masked_BL].unique()
    hit_C = torch.tensor([int(chunk) in hit for chunk in ids[ids >= 0]])
    assert 0 < int(hit_C.sum()) < len(hit_C)
    assert found.log_likelihood_C[hit_C].eq(IMPOSSIBLE).all()
    # The others only gain what the token loses.
    assert (found.log_likelihood_C >= plain.log_likelihood_C - 1e-4)[~hit_C].all()


def test_answers_that_are_no_numbers_are_refused(tmp_path):
    rows = read(tmp_path / "r")
    denoiser = teacher()
    with torch.no_grad():
        denoiser.model.get_input_embeddings().weight.fill_(torch.nan)
    asked = DiffusionTeacher(denoiser, 0, torch.empty(0).long())
    with pytest.raises(TrainingError, match=r"NaN; load it with teacher\.dtype=fp32"):
        ask_chunks(asked, Readings(tmp_path / "r"), PLAIN)(drawn(rows)[0], None)
