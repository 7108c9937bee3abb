"""Teachers with another tokenizer in training: states by their definition, a run, what is refused."""

import dataclasses
import shutil

import pytest
import tiny
import torch
from test_mapped import STUDENT_WORDS, TEACHER_WORDS, TEXTS, read, teacher_of, vocab_of
from tiny_run import ar_folder, corpus_folder, recipe, tiny_denoiser
from transformers import AutoModelForCausalLM

from mdm.errors import ConfigError, DataError, TrainingError, VocabError
from mdm.token_bytes import encode_with_ends
from mdm.train.losses import DISTANCES
from mdm.train.progress import read_metrics
from mdm.train.run import new_run, start
from mdm.train.supervision import require_reading_room
from mdm.train.targets import StateTargets
from mdm.train.teachers.ar import ARTeacher, load_foreign
from mdm.train.teachers.embedding import states
from mdm.train.teachers.foreign import projection
from mdm.train.teachers.mapped import make_mapping
from mdm.train.trainer import micro_batches, train, train_step
from mdm.vocab import read_vocab


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A student to be, a teacher with another tokenizer, and a corpus."""
    folder = tmp_path_factory.mktemp("foreign")
    vocab = vocab_of(TEACHER_WORDS)
    tiny.tiny_model("qwen2", len(vocab), hidden=24, seed=4).save_pretrained(folder / "teacher")
    vocab.tokenizer.save_pretrained(folder / "teacher")
    return ar_folder(folder / "ar"), str(folder / "teacher"), corpus_folder(folder / "corpus")


def settings(folders, kind, **sections):
    ar, teacher, corpus = folders
    sections["target"] = {"kind": kind, **sections.get("target", {})}
    sections["teacher"] = {"model": teacher, "dtype": "fp32", **sections.get("teacher", {})}
    return recipe(ar, corpus, **sections)


def test_states_are_means_over_chunks(tmp_path):
    """By definition: one forward a text, common boundaries by sets, a mean for each."""
    student, other = vocab_of(STUDENT_WORDS), vocab_of(TEACHER_WORDS)
    teacher = teacher_of(other)
    rows = read(tmp_path / "r", student, other)
    found = states(teacher, rows.reading, rows.maskable_BL, rows.document_ids_BL)
    place = 0
    for text in TEXTS:
        ((theirs, ends),) = encode_with_ends(other, [text])
        ((_, own_ends),) = encode_with_ends(student, [text])
        common = sorted({0, *ends.tolist()} & {0, *own_ends.tolist()})
        with torch.no_grad():
            hidden_LC = teacher.model.base_model(torch.tensor([[other.start_id, *theirs]]))[0][0]
        for end in own_ends.tolist():
            low = max(c for c in common if c < end)
            high = min(c for c in common if c >= end)
            inside = [j for j, e in enumerate(ends.tolist()) if low < e <= high]
            expected_C = hidden_LC[inside].mean(
                0
            )  # output j predicts token j behind the start token
            assert bool(found.answered_N[place])
            torch.testing.assert_close(found.states_NC[place], expected_C, atol=1e-5, rtol=1e-4)
            place += 1
        assert not bool(found.answered_N[place])  # eos
        assert not bool(found.states_NC[place].any())
        place += 1
    assert place == len(found)


def test_distances():
    one_nD = torch.tensor([[3.0, 4.0], [1.0, 0.0], [-1.0, -2.0]])
    other_nD = torch.tensor([[6.0, 8.0], [0.0, 2.0], [1.0, 2.0]])
    torch.testing.assert_close(DISTANCES["cosine"](one_nD, other_nD), torch.tensor([0.0, 1.0, 2.0]))
    torch.testing.assert_close(DISTANCES["l2"](other_nD, other_nD), torch.zeros(3))
    torch.testing.assert_close(DISTANCES["l2"](0 * other_nD, other_nD), torch.ones(3))
    torch.testing.assert_close(DISTANCES["l2"](one_nD[2:], other_nD[2:]), torch.tensor([4.0]))


@pytest.mark.parametrize("kind", ["mapped", "embedding"])
def test_a_run(folders, tmp_path, kind):
    chosen = settings(folders, kind, train={"steps": 6, "micro_rows": 4})
    folder = new_run(chosen, tmp_path)
    outcome = train(chosen, folder)
    steps = [entry for entry in read_metrics(folder / "metrics.jsonl") if "kd" in entry]
    assert len(steps) == 6
    assert all(0.5 < entry["target_answered"] < 1 for entry in steps)
    assert all(entry["kd"] > 0 for entry in steps)
    assert ("target_lost" in steps[0]) == (kind == "mapped")
    assert steps[-1]["kd"] < steps[0]["kd"]
    assert outcome.after.values_R4.isfinite().all()


def test_micro_batches_and_the_loss_by_hand(folders, tmp_path):
    """The distillation term is Σ w d / D, and the hard target stands in where there is no answer."""
    chosen = settings(folders, "embedding", objective={"distance": "l2"})
    run = start(chosen, new_run(chosen, tmp_path / "one"))
    (batch,) = micro_batches(run, 0)
    targets = run.ask(batch, run.denoiser)
    assert isinstance(targets, StateTargets)
    assert 0 < int((~targets.answered_N).sum()) < len(targets)
    with torch.no_grad():
        rows_ND = run.denoiser.rows(
            batch.xt_BL, batch.masked_BL, document_ids_BL=batch.document_ids_BL
        )
        distance_N = DISTANCES["l2"](run.denoiser.projection(rows_ND), targets.states_NC)
        ce_N = torch.nn.functional.cross_entropy(
            run.denoiser.head(rows_ND), batch.x0_BL[batch.masked_BL], reduction="none"
        )
    apart_N = torch.where(targets.answered_N, distance_N, ce_N)
    weight_N = batch.kd_weight_BL[batch.masked_BL]
    expected = float((weight_N * apart_N).sum() / batch.denominator)
    run.denoiser.train()
    assert train_step(run, 0)["kd"] == pytest.approx(expected, rel=1e-5)
    again = settings(folders, "embedding", objective={"distance": "l2"}, train={"micro_rows": 2})
    other = start(again, new_run(again, tmp_path / "two"))
    other.denoiser.train()
    assert train_step(other, 0)["kd"] == pytest.approx(expected, rel=1e-5)


def test_the_projection_learns_and_is_kept_out_of_the_model(folders, tmp_path):
    chosen = settings(folders, "embedding", train={"steps": 2})
    folder = new_run(chosen, tmp_path)
    run = start(chosen, folder)
    before = run.denoiser.projection.weight.clone()
    assert before.shape == (24, 16)
    run.denoiser.train()
    train_step(run, 0)
    assert not torch.equal(run.denoiser.projection.weight, before)
    train(chosen, folder)
    from safetensors.torch import load_file

    assert not any("projection" in name for name in load_file(folder / "final/model.safetensors"))


def test_a_shared_tokenizer_is_no_special_case(folders, tmp_path):
    """The teacher of the student's own family, mapped: its left-only distributions themselves."""
    ar, _, corpus = folders
    answers = {}
    for kind in ("left", "mapped"):
        chosen = recipe(ar, corpus, target={"kind": kind, "top_k": 2**9})
        run = start(chosen, new_run(chosen, tmp_path / kind))
        (batch,) = micro_batches(run, 0)
        targets = run.ask(batch, run.denoiser)
        probs_NV = torch.zeros(len(targets), 2**9)
        probs_NV.scatter_add_(1, targets.token_ids_NK, targets.log_probs_NK.exp())
        answers[kind] = (probs_NV, targets.answered_N)
    left_NV, mapped_NV = answers["left"][0], answers["mapped"][0]
    answered_N = answers["mapped"][1]
    assert int(answered_N.sum()) > 20
    written = [i for i in range(2**9) if i not in (256, 258)]  # start and padding cannot be written
    left_NV = left_NV[:, written] / left_NV[:, written].sum(1, keepdim=True)
    torch.testing.assert_close(
        mapped_NV[:, written][answered_N], left_NV[answered_N], atol=1e-5, rtol=1e-3
    )


def test_a_teacher_with_too_short_a_context(folders, tmp_path):
    ar, _, corpus = folders
    vocab = vocab_of(())
    tiny.tiny_model("llama", len(vocab), max_position_embeddings=16).save_pretrained(tmp_path / "t")
    vocab.tokenizer.save_pretrained(tmp_path / "t")
    chosen = recipe(
        ar,
        corpus,
        target={"kind": "mapped"},
        teacher={"model": str(tmp_path / "t"), "dtype": "fp32"},
    )
    with pytest.raises(ConfigError, match=r"tokens for the teacher, but .* at most 16; lower"):
        start(chosen, new_run(chosen, tmp_path / "runs"))


def test_a_resumed_run_wants_the_tokenizer_it_was_read_with(folders, tmp_path):
    chosen = settings(folders, "mapped", train={"steps": 4, "checkpoint_every": 2})
    folder = new_run(chosen, tmp_path)
    train(chosen, folder)
    ar = folders[0]
    other = dataclasses.replace(
        chosen, teacher=dataclasses.replace(chosen.teacher, model=ar), name="other"
    )
    with pytest.raises(DataError, match=r"read by a teacher with another tokenizer than .*ar"):
        start(other, folder)


def test_tokenizers_that_spell_nothing(tmp_path):
    words = read_vocab(tiny.word_tokenizer()).with_mask(None)
    spelling = vocab_of(())
    with pytest.raises(
        VocabError, match=r"tokens of the teacher do not say .*target.kind=embedding"
    ):
        make_mapping(teacher_of(words), spelling)
    with pytest.raises(VocabError, match=r"tokens of the student do not say"):
        make_mapping(teacher_of(spelling), words)


@pytest.mark.parametrize("kind", ["mapped", "embedding"])
def test_a_teacher_that_answers_nan_is_refused(folders, tmp_path, kind):
    """And not taken for one that has no answer."""
    ar, teacher, corpus = folders
    broken = tmp_path / "broken"
    shutil.copytree(teacher, broken)
    model = AutoModelForCausalLM.from_pretrained(broken)
    model.model.norm.weight.data[:] = float("nan")
    model.save_pretrained(broken)
    monkeypatched = pytest.MonkeyPatch()
    monkeypatched.setattr("mdm.train.teachers.ar.probe_attention", lambda *_, **__: None)
    monkeypatched.setattr("mdm.train.teachers.ar.has_plain_head", lambda _: True)
    try:
        chosen = recipe(
            ar, corpus, target={"kind": kind}, teacher={"model": str(broken), "dtype": "fp32"}
        )
        run = start(chosen, new_run(chosen, tmp_path / "runs"))
        with pytest.raises(TrainingError, match=r"NaN; load it with teacher.dtype=fp32"):
            train_step(run, 0)
    finally:
        monkeypatched.undo()


def test_a_model_with_fewer_rows_than_words(tmp_path):
    vocab = vocab_of(TEACHER_WORDS)
    tiny.tiny_model("llama", 260).save_pretrained(tmp_path)
    vocab.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(VocabError, match=r"words beyond the 260 that its model can write"):
        load_foreign(str(tmp_path), dtype=torch.float32)


def test_what_is_refused(folders, tmp_path):
    ar, _, corpus = folders
    with pytest.raises(ConfigError, match=r"target.infill=psm with target.kind=mapped"):
        settings(folders, "mapped", target={"infill": "psm"})
    with pytest.raises(ConfigError, match=r"distance.*did you mean 'cosine'"):
        recipe(ar, corpus, objective={"distance": "cosin"})
    for name, value in (("divergence", "jsd"), ("kd_temperature", 2.0), ("tail", "partial")):
        with pytest.raises(ConfigError, match=rf"objective.{name}=.* means nothing .*distance"):
            settings(folders, "embedding", objective={name: value})
    with pytest.raises(ConfigError, match=r"objective.distance=l2 means nothing .* distributions"):
        settings(folders, "mapped", objective={"distance": "l2"})
    with pytest.raises(ConfigError, match=r"set objective.tail=renormalise"):
        settings(folders, "mapped", objective={"divergence": "reverse_kl"})
    settings(folders, "mapped", objective={"divergence": "reverse_kl", "tail": "renormalise"})
    capped = ARTeacher(tiny.tiny_model("llama", 5), 5, plain_head=False)
    with pytest.raises(ConfigError, match="but the teacher scales or caps its logits; set"):
        projection(tiny_denoiser(ar), capped)
    short = ARTeacher(tiny.tiny_model("llama", 5, max_position_embeddings=32), 5, plain_head=True)
    require_reading_room(32, short)
    with pytest.raises(ConfigError, match=r"33 tokens for the teacher, but .* at most 32; lower"):
        require_reading_room(33, short)
