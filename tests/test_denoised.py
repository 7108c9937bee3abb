"""A diffusion model as teacher: asked in its own layout, once or in two passes, over the shared tokens.

Token ids: words 0 … 11, start 12, end 13, pad 14, mask 15. The teacher's answers are compared with
`Denoiser` calls made by hand for each way of masking; test_two_stream.py has those against definitions.
Shapes: B rows, L length, N masked positions, V vocabulary.
"""

import pytest
import tiny
import torch
from students import random_student, word_vocab
from test_loss_sums import IDS, LEARNT, X0, blocks, drawn
from tiny_run import VOCAB, ar_folder, tiny_denoiser

from mdm.checkpoint import save_denoiser
from mdm.errors import CheckpointError, TrainingError, VocabError
from mdm.train.comp_demo import halves
from mdm.train.lambdas import MixSettings
from mdm.train.loss_sums import loss_sums
from mdm.train.objective import ObjectiveSettings, with_mix
from mdm.train.targets import HeadTargets, TargetSettings
from mdm.train.teachers.denoised import (
    DiffusionTeacher,
    ask_denoised,
    conditioned_on,
    demo_uniforms,
    load_diffusion_teacher,
    passes,
    shared_tokens,
)
from mdm.vocab import read_vocab

MASK, V = 15, 16
PLAIN = TargetSettings(kind="denoised")


def full(seed=5, **settings):
    return random_student(seed=seed, layers=2, **settings).requires_grad_(False)


def teacher_of(denoiser, shared=V, never=(MASK,)):
    return DiffusionTeacher(denoiser.eval(), shared, torch.tensor(never).long())


TEACHERS = {
    "full": lambda: full(),
    "full, shifted": lambda: full(shift=True),
    "a head that is not plain": lambda: random_student("granite", seed=5),
    "other blocks": lambda: blocks("block", seed=5, shift=False),
    "causal context, shifted": lambda: blocks("context_causal", seed=5),
    "reordered": lambda: blocks("reordered", seed=5, shift=False),
}


def alone(denoiser, x0_BL, masked_BL, wanted_BL, ids_BL):
    """(N, V) logits of one call, each row with clean tokens of its own, outside of any batch."""
    parts = []
    for b in range(len(x0_BL)):
        row = slice(b, b + 1)
        xt_BL = x0_BL[row].masked_fill(masked_BL[row], denoiser.mask_id)
        options = {} if denoiser.block_size is None else {"x0_bL": x0_BL[row]}
        with torch.no_grad():
            parts.append(denoiser(xt_BL, wanted_BL[row], document_ids_BL=ids_BL[row], **options))
    return torch.cat(parts)


def answers(teacher, batch, settings=PLAIN):
    targets = ask_denoised(teacher, settings)(batch, None)
    assert isinstance(targets, HeadTargets)
    assert bool(targets.answered_N.all())
    return targets.logits(targets.rows_NW)


def compared(found_NV, expected_NV):
    assert found_NV.dtype == torch.float32
    torch.testing.assert_close(found_NV, expected_NV, atol=1e-4, rtol=1e-4)


# --- one pass --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEACHERS)
@pytest.mark.parametrize("form", [{}, {"complementary": True, "kd_positions": 2}], ids=str)
def test_a_teacher_reads_its_own_layout(name, form):
    """Whatever blocks the student has at this step: here 2 tokens, the teacher's have 4."""
    denoiser = TEACHERS[name]()
    if denoiser.block_size:
        denoiser.block_size = 4
    batch = drawn(block_size=2, **form)
    found_NV = answers(teacher_of(denoiser), batch)
    expected = alone(
        denoiser, batch.x0_BL, batch.masked_BL, batch.distilled_BL, batch.document_ids_BL
    )
    compared(found_NV, expected)
    assert found_NV.shape == (int(batch.distilled_BL.sum()), V)


def test_a_teacher_of_a_student_without_blocks():
    batch = drawn(block_size=0, complementary=True)
    for name in ("full", "other blocks"):
        denoiser = TEACHERS[name]()
        expected = alone(
            denoiser, batch.x0_BL, batch.masked_BL, batch.distilled_BL, batch.document_ids_BL
        )
        compared(answers(teacher_of(denoiser), batch), expected)


@pytest.mark.parametrize("attention", ["block", "context_causal", "reordered"])
@pytest.mark.parametrize("mix", [MixSettings(), MixSettings(first=0.1, last=0.9, by_noise=True)])
def test_a_twin_has_nothing_to_teach(attention, mix):
    """The student itself as teacher: the divergence is 0 and has no gradient, at any temperature."""
    denoiser = blocks(attention)
    twin = blocks(attention).requires_grad_(False)
    for temperature in (1.0, 2.0):
        batch = with_mix(drawn(complementary=True), mix, 0.5)
        targets = ask_denoised(teacher_of(twin), PLAIN)(batch, None)
        settings = ObjectiveSettings(kd_temperature=temperature)
        kd = loss_sums(denoiser, batch, targets, settings)[1]
        assert abs(kd.item()) < 1e-4
        denoiser.zero_grad()
        kd.backward()
        assert all(float(p.grad.abs().max()) < 1e-4 for p in denoiser.parameters())
    # One of another layout has.
    other = ask_denoised(teacher_of(full(seed=0, shift=True)), PLAIN)(batch, None)
    assert loss_sums(denoiser, batch, other, settings)[1].item() > 0.1


def test_a_mask_of_the_teachers_own():
    """It is what stands in the teacher's input; neither mask can be written by either of them."""
    denoiser = full()
    denoiser.mask_id = 3
    denoiser.never_sampled = torch.tensor([3])
    batch = drawn()
    fed = []
    hook = denoiser.model.get_input_embeddings().register_forward_pre_hook(
        lambda _, inputs: fed.append(inputs[0])
    )
    found_NV = answers(teacher_of(denoiser, never=(3, MASK)), batch)
    hook.remove()
    assert fed[0].equal(batch.x0_BL.masked_fill(batch.masked_BL, 3))
    assert (found_NV == -torch.inf).any(0).nonzero()[:, 0].tolist() == [3, MASK]
    assert (found_NV == -torch.inf).sum(0).tolist()[3] == len(found_NV)


def test_only_shared_tokens_are_compared():
    batch, denoiser = drawn(), full()
    whole = answers(teacher_of(denoiser), batch)
    cut = answers(teacher_of(denoiser, shared=9, never=()), batch)
    assert cut.equal(whole[:, :9])


def test_nothing_of_the_teacher_is_learnt():
    denoiser = random_student(seed=5, layers=2)  # not even where somebody forgot to freeze it
    batch, student = drawn(), blocks()
    targets = ask_denoised(teacher_of(denoiser), PLAIN)(batch, None)
    assert not targets.rows_NW.requires_grad
    denoiser.requires_grad_(False)
    loss_sums(student, batch, targets, ObjectiveSettings()).sum().backward()
    assert all(p.grad is None for p in denoiser.parameters())
    assert all(p.grad is not None for p in student.parameters())


def test_the_teacher_computes_in_its_own_precision():
    """bfloat16 autocast of the student stays outside, of the passes and of the head."""
    batch = drawn()
    for settings in (PLAIN, TargetSettings(kind="denoised", comp_demo="exact")):
        for name in ("full", "other blocks", "a head that is not plain"):
            teacher = teacher_of(TEACHERS[name]())
            plain = answers(teacher, batch, settings)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert answers(teacher, batch, settings).equal(plain)


def test_answers_that_are_no_numbers_are_refused():
    denoiser = full()
    with torch.no_grad():
        denoiser.model.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(TrainingError, match=r"NaN; load it with teacher\.dtype=fp32"):
        ask_denoised(teacher_of(denoiser), PLAIN)(drawn(), None)


@pytest.mark.parametrize("comp_demo", ["", "bernoulli"])
@pytest.mark.parametrize("name", ["full, shifted", "reordered", "a head that is not plain"])
def test_nothing_to_ask(name, comp_demo):
    batch = drawn(learnt=LEARNT & False)
    settings = TargetSettings(kind="denoised", comp_demo=comp_demo)
    assert answers(teacher_of(TEACHERS[name]()), batch, settings).shape == (0, V)


# --- two passes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["full, shifted", "other blocks", "reordered"])
@pytest.mark.parametrize("comp_demo", ["bernoulli", "exact"])
@pytest.mark.parametrize("form", [{}, {"complementary": True, "kd_positions": 2}], ids=str)
def test_every_answer_comes_from_the_pass_in_which_its_position_is_masked(name, comp_demo, form):
    denoiser = TEACHERS[name]()
    settings = TargetSettings(kind="denoised", comp_demo=comp_demo, comp_demo_share=0.3)
    batch = drawn(**form)
    parts = halves(batch.masked_BL, demo_uniforms(batch), 0.3, comp_demo == "exact")
    # The two passes by hand, each over all of its masks; then position by position.
    by_pass = []
    for part_BL in parts:
        whole_BLV = torch.full((*part_BL.shape, V), torch.nan)
        whole_BLV[part_BL] = alone(denoiser, batch.x0_BL, part_BL, part_BL, batch.document_ids_BL)
        by_pass.append(whole_BLV)
    expected, seen = [], [0, 0]
    for b, i in batch.distilled_BL.nonzero().tolist():
        (number,) = [n for n in (0, 1) if parts[n][b, i]]
        seen[number] += 1
        expected.append(by_pass[number][b, i])
    assert min(seen) >= 2
    found_NV = answers(teacher_of(denoiser), batch, settings)
    compared(found_NV, torch.stack(expected))
    # Which is another question than the one with all masks.
    assert not torch.allclose(
        found_NV[:, :MASK], answers(teacher_of(denoiser), batch)[:, :MASK], atol=1e-2
    )


def test_a_part_may_be_empty():
    learnt = torch.zeros_like(LEARNT)
    learnt[0, 3] = learnt[2, 5] = True  # one mask a row: exact halves are 0 and 1
    batch = drawn(learnt=learnt, masking="exact")
    assert batch.masked_BL.equal(learnt)
    for share in (0.4, 0.6):
        for comp_demo in ("exact", "bernoulli"):
            settings = TargetSettings(kind="denoised", comp_demo=comp_demo, comp_demo_share=share)
            found_NV = answers(teacher_of(full()), batch, settings)
            compared(found_NV, alone(full(), X0, learnt, learnt, IDS))


def test_the_split_depends_on_the_rows_key_alone():
    whole = demo_uniforms(drawn(samples=range(8)))
    assert demo_uniforms(drawn(samples=[6, 1])).equal(whole[[6, 1]])
    twice = demo_uniforms(drawn(samples=[6, 1], complementary=True))
    assert twice[:2].equal(whole[[6, 1]])
    assert not twice[2:].equal(whole[[6, 1]])  # a copy is split anew
    assert len(set(map(tuple, whole.tolist()))) == 8


def test_passes_ask_only_for_what_is_wanted():
    denoiser, batch = full(), drawn()
    wanted_BL = batch.masked_BL & (torch.rand(batch.masked_BL.shape) < 0.5)
    rows_NW = passes(denoiser, batch)(batch.masked_BL, wanted_BL)
    expected = alone(denoiser, batch.x0_BL, batch.masked_BL, wanted_BL, batch.document_ids_BL)
    compared(denoiser.head(rows_NW), expected)


def test_what_answers_are_conditioned_on():
    assert conditioned_on(full(), PLAIN) == "all that is visible"
    for attention in ("block", "context_causal", "reordered"):
        found = conditioned_on(
            blocks(attention), TargetSettings(kind="denoised", comp_demo="exact")
        )
        assert found.startswith("clean blocks before")
        assert found.endswith("of the masks shown")


# --- shared tokens ---------------------------------------------------------------------------------


def bytes_with(*extra, mask=None):
    return read_vocab(tiny.byte_tokenizer(extra)).with_mask(mask)


def test_tokens_are_shared_up_to_the_first_that_differs():
    plain = bytes_with()  # 259 tokens, then the mask
    assert len(plain) == 260
    assert shared_tokens(plain, plain) == 260
    # Masks do not count, wherever they are.
    other = bytes_with(
        "<|a|>", "<|b|>", mask="<|a|>"
    )  # a, the mask, where plain has its own; then b
    assert shared_tokens(other, plain) == 260
    assert shared_tokens(plain, other) == 260
    # Some more tokens on one side, or other ones behind the common ones.
    more = bytes_with("<|a|>", "<|b|>")
    assert shared_tokens(more, plain) == 260  # a stands where plain has its mask
    assert shared_tokens(bytes_with("<|c|>", "<|b|>"), more) == 259
    assert shared_tokens(more, bytes_with("<|a|>", "<|c|>")) == 260


def test_other_tokenizers_are_refused():
    with pytest.raises(VocabError, match=r"different tokenizers; set target\.kind=chunks"):
        shared_tokens(word_vocab(), bytes_with())
    with pytest.raises(VocabError, match=r"differ from id 0 on \('w0' / 'Ā'\)"):
        shared_tokens(word_vocab(), bytes_with())
    with pytest.raises(VocabError, match="differ from id 8 on"):
        shared_tokens(word_vocab(), word_vocab(8))  # its words end there


# --- from a folder ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The AR model both come from, and a block diffusion teacher with a mask token of its own."""
    folder = tmp_path_factory.mktemp("teachers")
    ar = ar_folder(folder / "ar", extra_special=("<|a|>",), seed=1)
    student = tiny_denoiser(
        ar, kind="bd3lm", block_size=4, attention="reordered", shift=False, mask_token="<|a|>"
    )
    save_denoiser(student, folder / "teacher")
    return ar, str(folder / "teacher")


def test_loaded_from_a_folder(folders):
    ar, path = folders
    student = tiny_denoiser(ar)
    assert student.mask_id == VOCAB + 1
    teacher = load_diffusion_teacher(path, student.vocab, dtype=torch.float32)
    assert (teacher.num_tokens, teacher.vocab) == (VOCAB + 1, None)
    assert teacher.never_N.tolist() == [VOCAB]  # its mask; the student's is not shared
    assert teacher.denoiser.mask_id == VOCAB
    assert (teacher.denoiser.block_size, teacher.denoiser.attention) == (4, "reordered")
    assert not teacher.denoiser.training
    assert not any(p.requires_grad for p in teacher.denoiser.parameters())
    assert teacher.model is teacher.denoiser.model
    assert teacher.max_length == tiny.MAX_POSITIONS
    again = load_diffusion_teacher(path, student.vocab, dtype=torch.bfloat16)
    assert again.model.dtype == torch.bfloat16
    foreign = load_diffusion_teacher(path, word_vocab(), dtype=torch.float32, foreign=True)
    assert foreign.vocab is foreign.denoiser.vocab
    with pytest.raises(VocabError, match="different tokenizers"):
        load_diffusion_teacher(path, word_vocab(), dtype=torch.float32)
    with pytest.raises(CheckpointError):
        load_diffusion_teacher(ar, student.vocab, dtype=torch.float32)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_a_teachers_mask_that_the_student_can_write_makes_nothing_infinite(folders, divergence):
    ar, path = folders
    student = tiny_denoiser(ar)
    teacher = load_diffusion_teacher(path, student.vocab, dtype=torch.float32)
    settings = ObjectiveSettings(divergence=divergence)
    batch = drawn(block_size=0)
    targets = ask_denoised(teacher, PLAIN)(batch, None)
    kd = loss_sums(student, batch, targets, settings)[1]
    assert kd.isfinite()
    kd.backward()
    assert all(p.grad.isfinite().all() for p in student.parameters())
