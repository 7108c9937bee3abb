"""The AR teacher: what it may be, which ids it shares, and that chunks change nothing."""

import pytest
import tiny
import torch
from tiny_run import VOCAB, ar_folder, ar_teacher, tiny_denoiser
from tiny_targets import question, random_proposals

from mdm.checkpoint import save_denoiser
from mdm.errors import CheckpointError, VocabError
from mdm.train.targets import TargetSettings
from mdm.train.teachers.ar import load_teacher
from mdm.train.teachers.chunks import in_chunks
from mdm.train.teachers.kinds import TARGETS, answer


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return tiny_denoiser(ar_folder(tmp_path_factory.mktemp("student")))


def test_loads_frozen_and_shares_all_its_tokens(tmp_path, student):
    teacher = load_teacher(ar_folder(tmp_path), student.vocab, dtype=torch.bfloat16)
    assert teacher.num_tokens == VOCAB  # the student has one more, its mask
    assert teacher.mask_id is None
    assert teacher.model.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert not teacher.model.training
    assert teacher.max_length == tiny.MAX_POSITIONS
    x_BL = torch.tensor([list(b"def f")])
    rows_ND = teacher.rows(x_BL, torch.tensor([[0, 1, 1, 0, 0]]).bool(), torch.zeros_like(x_BL))
    assert teacher.head(rows_ND).shape == (2, VOCAB)
    assert teacher.head(rows_ND).dtype == torch.float32


def test_another_tokenizer_is_refused(tmp_path, student):
    tokenizer = tiny.byte_tokenizer()
    table = tokenizer.get_vocab()
    swapped = tokenizer.backend_tokenizer.to_str().replace('"a":97', '"a":98#')
    swapped = swapped.replace('"b":98,', '"b":97,').replace("98#", "98")
    folder = ar_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text(swapped, encoding="utf-8")
    assert table["a"] == 97
    with pytest.raises(VocabError, match=r"differ at 2 of 259 ids.*97: 'b' / 'a'"):
        load_teacher(folder, student.vocab, dtype=torch.float32)


def test_a_diffusion_model_is_no_ar_teacher(tmp_path, student):
    save_denoiser(student, tmp_path / "student")
    with pytest.raises(CheckpointError, match="should be causal but is bidirectional"):
        load_teacher(str(tmp_path / "student"), student.vocab, dtype=torch.float32)


def test_a_missing_teacher(tmp_path, student):
    with pytest.raises(CheckpointError, match="no model folder"):
        load_teacher(str(tmp_path / "nothing"), student.vocab, dtype=torch.float32)


@pytest.mark.parametrize("kind", TARGETS)
def test_a_reused_mask_token_gets_no_mass(tmp_path, kind):
    """The student's logit of its mask is -inf, so any mass there would be an infinite KL."""
    folder = ar_folder(tmp_path, extra_special=("<|spare|>",))
    vocab = tiny_denoiser(folder, mask_token="<|spare|>").vocab
    teacher = load_teacher(folder, vocab, dtype=torch.float32)
    assert vocab.mask_id < teacher.num_tokens
    proposals = random_proposals(7, torch.Generator().manual_seed(0), vocab.mask_id + 1)
    asked = question([[256, *b"def f()"]], list(range(1, 8)), proposals=proposals)
    settings = TargetSettings(
        kind=kind,
        top_k=10**6,
        candidates=10**6,
        student_candidates=4,
        branch_tokens=10**6,
        fills=64,
    )
    targets = answer(teacher, asked, settings=settings, temperature=1.0)
    on_mask_NK = targets.token_ids_NK == vocab.mask_id
    assert (targets.log_probs_NK[on_mask_NK] == -torch.inf).all()
    torch.testing.assert_close(targets.log_probs_NK.exp().sum(1), torch.ones(7))


@pytest.mark.parametrize("kind", TARGETS)
def test_text_is_never_shown_with_a_mask(tmp_path, kind, monkeypatch):
    """Whatever a teacher is asked, no token it reads is the student's mask or outside its vocabulary."""
    folder = ar_folder(tmp_path, extra_special=("<|spare|>",))
    vocab = tiny_denoiser(folder, mask_token="<|spare|>").vocab
    teacher, shown = load_teacher(folder, vocab, dtype=torch.float32), []
    call = type(teacher).call

    def spied(self, x_BL, outputs_BL, cache, **layout):
        shown.append(x_BL)
        return call(self, x_BL, outputs_BL, cache, **layout)

    monkeypatch.setattr(type(teacher), "call", spied)
    proposals = random_proposals(5, torch.Generator().manual_seed(0), vocab.mask_id + 40)
    asked = question([[256, *b"def f()"]], [1, 2, 4, 5, 7], proposals=proposals)
    settings = TargetSettings(kind=kind, student_candidates=8, tail_draws=4, fills=64)
    answer(teacher, asked, settings=settings, temperature=1.0)
    fed = torch.cat([x_BL.flatten() for x_BL in shown])
    assert (fed != vocab.mask_id).all()
    assert fed.max() < teacher.num_tokens


@pytest.mark.parametrize(("family", "window"), [("mistral", 8), ("gemma3", 64)])
def test_rows_are_no_longer_than_a_sliding_window(family, window):
    overrides = {"sliding_window": 8} if family == "mistral" else {}
    assert ar_teacher(tiny.tiny_model(family, 7, **overrides)).max_length == window
    assert ar_teacher(tiny.tiny_model("llama", 7)).max_length == tiny.MAX_POSITIONS


@pytest.mark.parametrize("rows", [0, 1, 5, 8])
def test_chunks(rows, monkeypatch):
    monkeypatch.setattr("mdm.denoiser.CHUNK_BYTES", 4 * 10 * 3)  # 3 rows of width 10
    sizes = []

    def function(x_n, y_n):
        sizes.append(len(x_n))
        return x_n + y_n, x_n - y_n

    x_N, y_N = torch.rand(rows, 2), torch.rand(rows, 2)
    total, difference = in_chunks(function, 10, x_N, y_N)
    assert torch.equal(total, x_N + y_N)
    assert torch.equal(difference, x_N - y_N)
    assert max(sizes) <= 3
