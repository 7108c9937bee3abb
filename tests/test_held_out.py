"""The held-out bound against enumeration, its errors, and that its masks never change."""

import dataclasses
import itertools
import math

import oracles
import pytest
import torch
from tiny_run import VOCAB, ar_folder, tiny_denoiser

from mdm.likelihood import LikelihoodSettings, Pair, log_likelihood
from mdm.train import held_out, processes
from mdm.train.held_out import HeldOut, held_out_bound
from mdm.train.rows import RowBatch

START, MASK = 256, VOCAB
ROW = [START, *b"abcab"]
MASKABLE = [1, 2, 3, 4, 5]


@dataclasses.dataclass
class Listed:
    """Rows in memory: (tokens, number of leading positions that are never masked)."""

    rows: list[tuple[list[int], int]]

    def __len__(self):
        return len(self.rows)

    def batch(self, indices):
        tokens_BL = torch.tensor([self.rows[i][0] for i in indices])
        given_B = torch.tensor([self.rows[i][1] for i in indices])
        maskable_BL = torch.arange(tokens_BL.shape[1]) >= given_B[:, None]
        zeros_BL = torch.zeros_like(tokens_BL)
        return RowBatch(tokens_BL, zeros_BL, maskable_BL, zeros_BL)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return tiny_denoiser(ar_folder(tmp_path_factory.mktemp("ar"), seed=1))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return tiny_denoiser(ar_folder(tmp_path_factory.mktemp("ar"), seed=2))


DIFFERENT = Listed([([START, *text], given) for text, given in
                    [(b"abcde", 1), (b"fghij", 3), (b"klmno", 5), (b"pqrst", 2)]])  # fmt: skip


def evaluated(denoiser, rows, *, num_rows=10**6, draws=2, batch_rows=3, seed=0):
    return held_out_bound(
        denoiser, rows, num_rows=num_rows, draws=draws, batch_rows=batch_rows, seed=seed
    )


def log_probs_of(denoiser, xt_L):
    asked_BL = torch.tensor([[i > 0 for i in range(len(xt_L))]])
    with torch.no_grad():
        rows_NV = denoiser(torch.tensor([xt_L]), asked_BL).double().log_softmax(-1)
    return torch.cat([torch.zeros(1, rows_NV.shape[1]), rows_NV])


def test_agrees_with_enumeration(student):
    """One row many times: every set of masks is drawn, at its rate."""
    same = Listed([(ROW, 1)] * 100)
    found = evaluated(student, same, draws=6, batch_rows=100).summary()
    bound = -oracles.exact_bound(lambda x: log_probs_of(student, x), ROW, MASKABLE, MASK) / 5
    assert abs(found["nelbo"] - bound) < 4 * found["nelbo_std_err"]
    assert found["nelbo_std_err"] < 0.05 * bound
    assert (found["rows"], found["draws"], found["unit"]) == (100, 6, "nats per token")

    # Five maskable tokens: each bin of noise levels is one number of masks.
    assert len(found["by_noise_level"]) == 5
    for count, level in enumerate(found["by_noise_level"], start=1):
        ce, hits = [], []
        for hidden in itertools.combinations(MASKABLE, count):
            xt_L = [MASK if i in hidden else x for i, x in enumerate(ROW)]
            log_p_LV = log_probs_of(student, xt_L)
            ce += [-float(log_p_LV[i, ROW[i]]) for i in hidden]
            hits += [float(log_p_LV[i].argmax() == ROW[i]) for i in hidden]
        assert level["masked_tokens"] == 600 / 5 * count
        expected = sum(ce) / len(ce)
        assert abs(level["cross_entropy"] - expected) <= 4 * level["cross_entropy_std_err"] + 1e-6
        expected = sum(hits) / len(hits)
        assert abs(level["accuracy"] - expected) <= 4 * level["accuracy_std_err"] + 1e-6


def test_rows_weigh_as_many_tokens_as_they_have(student):
    """Σ over rows of tokens · mean CE / Σ tokens, with the errors of a ratio, by hand."""
    found = evaluated(student, DIFFERENT, draws=2)
    level_R, ce_R, _, tokens_R = found.values_R4.unbind(-1)
    assert tokens_R.tolist() == [5, 3, 1, 4] * 2
    assert (level_R * tokens_R).round().long().gt(0).all()
    per_row = [(float(ce_R[r] + ce_R[r + 4]) / 2, float(tokens_R[r])) for r in range(4)]
    mean = sum(c * n for c, n in per_row) / 13
    variance = sum((n * (c - mean) / 13) ** 2 for c, n in per_row) * 4 / 3
    summary = found.summary()
    assert summary["nelbo"] == pytest.approx(mean)
    assert summary["nelbo_std_err"] == pytest.approx(math.sqrt(variance))


def test_the_masks_are_the_same_before_and_after(student, other, monkeypatch):
    seen = []
    real = held_out.apply_mask
    monkeypatch.setattr(held_out, "apply_mask", lambda *args: seen.append(real(*args)) or seen[-1])
    for denoiser in (student, other):
        evaluated(denoiser, DIFFERENT, batch_rows=4)
    before, after = torch.cat(seen[:2]), torch.cat(seen[2:])
    assert torch.equal(before, after)
    assert not torch.equal(before[:4], before[4:])  # but the draws of a row differ
    evaluated(student, DIFFERENT, batch_rows=4, seed=1)
    assert not torch.equal(before, torch.cat(seen[4:]))
    # And not in their number of masks alone, or the draws of a row would be nested.
    del seen[:]
    evaluated(student, Listed(DIFFERENT.rows[:1]), draws=8, batch_rows=1)
    hidden = [set((xt_BL[0] == MASK).nonzero()[:, 0].tolist()) for xt_BL in seen]
    assert any(not (a <= b or b <= a) for a, b in itertools.combinations(hidden, 2))
    assert torch.equal(before != MASK, before == torch.tensor([r for r, _ in DIFFERENT.rows] * 2))


def test_batches_and_processes_change_nothing(student, monkeypatch):
    whole = evaluated(student, DIFFERENT, draws=3, batch_rows=4).values_R4
    for batch_rows in (1, 3, 100):
        part = evaluated(student, DIFFERENT, draws=3, batch_rows=batch_rows).values_R4
        torch.testing.assert_close(part, whole, atol=1e-5, rtol=0)
    # Two processes, one after the other; each leaves the other's rows at 0 for the sum.
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    halves = []
    for rank in range(2):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        halves.append(evaluated(student, DIFFERENT, draws=3, batch_rows=1).values_R4)
    assert ((halves[0] != 0).any(1) ^ (halves[1] != 0).any(1)).all()
    torch.testing.assert_close(halves[0] + halves[1], whole, atol=1e-5, rtol=0)


def test_processes_call_the_model_equally_often(student, monkeypatch):
    """A sharded one waits for all of them: 4 rows, 3 draws and 5 processes make 12 jobs in 3 rounds."""
    whole = evaluated(student, DIFFERENT, draws=3, batch_rows=4).values_R4
    monkeypatch.setattr(processes, "world_size", lambda: 5)
    parts, calls = [], []
    hook = student.register_forward_hook(lambda *_: calls.append(None))
    for rank in range(5):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        parts.append(evaluated(student, DIFFERENT, draws=3, batch_rows=1).values_R4)
        assert len(calls) == 3 * (rank + 1)
    hook.remove()
    torch.testing.assert_close(sum(parts), whole, atol=1e-5, rtol=0)


def test_num_rows(student):
    some = evaluated(student, DIFFERENT, num_rows=2, draws=1)
    assert some.values_R4[:, 3].tolist() == [5, 3]
    assert some.summary()["rows"] == 2


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored(student, training):
    student.train(training)
    assert evaluated(student, DIFFERENT, draws=1).values_R4.isfinite().all()
    assert student.training == training
    assert not any(p.grad is not None for p in student.parameters())


def test_improvement_is_paired(student, other):
    before, after = evaluated(student, DIFFERENT), evaluated(other, DIFFERENT)
    fall, std_err = before.improvement(after)
    assert fall == pytest.approx(before.summary()["nelbo"] - after.summary()["nelbo"])
    assert std_err > 0
    assert before.improvement(before) == (0.0, 0.0)
    # A constant fall is certain, however much the rows differ.
    values_R4 = before.values_R4.clone()
    values_R4[:, 1] -= 0.25
    fall, std_err = before.improvement(HeldOut(values_R4, before.draws))
    assert fall == pytest.approx(0.25)
    assert std_err == pytest.approx(0, abs=1e-12)
    assert before.summary()["nelbo_std_err"] > 0.01


def test_one_row_has_no_standard_error(student):
    assert math.isnan(evaluated(student, Listed([(ROW, 1)])).summary()["nelbo_std_err"])


def test_a_row_without_anything_to_mask_does_not_count(student):
    rows = Listed([*DIFFERENT.rows, ([START, *b"uvwxy"], 6)])
    found = evaluated(student, rows, draws=1).summary()
    assert math.isfinite(found["nelbo"])
    assert sum(level["masked_tokens"] for level in found["by_noise_level"]) <= 13


def test_neighbouring_rows_have_noise_levels_of_their_own(student):
    """They come from one file, whose text must not stand for a noise level."""
    level_R = evaluated(student, Listed([([START, *range(97, 117)], 1)] * 40), draws=1).values_R4[
        :, 0
    ]
    steps = level_R.diff().abs().mean()
    assert steps > 0.2  # in order it would be 1/40
    assert level_R.sort().values.diff().max() < 0.11  # and together they still cover 0..1 evenly


# --- block diffusion -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def block_students(tmp_path_factory):
    """`block_students(attention=…, shift=…)`: blocks of three tokens."""
    ar = ar_folder(tmp_path_factory.mktemp("ar"), seed=1)
    return lambda **settings: tiny_denoiser(ar, kind="bd3lm", block_size=3, **settings)


@pytest.mark.parametrize(
    ("attention", "shift"), [("block", True), ("context_causal", False), ("reordered", False)]
)
def test_the_bound_of_a_block_student_is_its_likelihood(block_students, attention, shift):
    """Masks of the whole row, as they fall in its blocks, give the sum of the blocks' own bounds."""
    student = block_students(attention=attention, shift=shift)
    same = Listed([(ROW, 1)] * 150)
    found = evaluated(student, same, draws=40, batch_rows=150).summary()
    pair = Pair((START,), tuple(ROW[1:]))
    (exact,) = log_likelihood(student, [pair], LikelihoodSettings(estimator="exact"))
    assert abs(found["nelbo"] + exact.value / 5) < 4 * found["nelbo_std_err"]
    assert found["nelbo_std_err"] < 0.006 * found["nelbo"]


def test_packed_documents_of_a_block_student(block_students):
    """The grid begins anew: two documents in a row are two rows, up to the masks."""
    student = block_students()

    class Packed(Listed):
        def batch(self, indices):
            found = super().batch(indices)
            ids_BL = torch.tensor([[0] * 4 + [1] * 5 + [-1]] * len(indices))
            maskable_BL = (found.tokens_BL != START) & (ids_BL >= 0)
            return found._replace(document_ids_BL=ids_BL, maskable_BL=maskable_BL)

    rows = Packed([([START, *b"abc", START, *b"fghi", 258], 0)] * 150)
    found = evaluated(student, rows, draws=40, batch_rows=150).summary()
    pairs = [Pair((START,), tuple(b"abc")), Pair((START,), tuple(b"fghi"))]
    results = log_likelihood(student, pairs, LikelihoodSettings(estimator="exact"))
    expected = -sum(result.value for result in results) / 7
    assert abs(found["nelbo"] - expected) < 4 * found["nelbo_std_err"]
    assert found["nelbo_std_err"] < 0.006 * expected
