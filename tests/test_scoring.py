"""Log-probabilities of masked tokens: against single forwards, whatever the batch they ran in.

Token ids: words 0 … 11, start 12, end 13, pad 14, mask 15.
"""

import itertools

import pytest
import torch
from students import random_student, slow_log_probs

from mdm import scoring
from mdm.scoring import Row, batches, collate

START, PAD, MASK = 12, 14, 15


def token_log_probs(*arguments, **options):
    """Row by row, whatever the forwards."""
    return itertools.chain.from_iterable(scoring.token_log_probs(*arguments, **options))


def row(index, length, masked, given=2):
    x0_L = torch.tensor([START, *[(3 * i + index) % 12 for i in range(1, length)]])
    masked_L = torch.zeros(length, dtype=torch.bool)
    masked_L[list(masked)] = True
    return Row(index, x0_L, masked_L, torch.arange(length) < given)


ROWS = [
    row(3, 9, [2, 5, 8]),
    row(0, 4, [3]),
    row(7, 12, range(2, 12)),
    row(7, 6, [], given=6),
    row(1, 6, [4, 5], given=4),
    row(2, 1 + 1, [1], given=1),
]


def expected(denoiser, rows, scale=0.0):
    found = []
    for r in rows:
        given = r.given_L.nonzero()[:, 0].tolist()
        x0, holes = r.x0_L.tolist(), r.masked_L.nonzero()[:, 0].tolist()
        noised = [MASK if i in holes else token for i, token in enumerate(x0)]
        log_p_LV = slow_log_probs(denoiser, given, scale)(noised)
        found.append((r.index, [float(log_p_LV[i, x0[i]]) for i in holes]))
    return found


def check(found, wanted):
    found = list(found)
    assert [index for index, _ in found] == [index for index, _ in wanted]
    for (_, log_probs_N), (_, numbers) in zip(found, wanted, strict=True):
        assert log_probs_N.dtype == torch.float32
        assert log_probs_N.tolist() == pytest.approx(numbers, abs=2e-5)


FAMILIES = ["llama", "gpt2", "gemma3", "granite", "gemma2"]


@pytest.mark.parametrize("scale", [0.0, 0.8])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_one_forward_a_row(family, shift, scale):
    denoiser = random_student(family, shift=shift)
    wanted = expected(denoiser, ROWS, scale)
    for batch_tokens in (1, 24, 4096):
        check(
            token_log_probs(denoiser, iter(ROWS), cfg_scale=scale, batch_tokens=batch_tokens),
            wanted,
        )


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_logits_in_chunks(monkeypatch, scale):
    denoiser = random_student(unused_rows=2)
    wanted = expected(denoiser, ROWS, scale)
    monkeypatch.setattr("mdm.denoiser.CHUNK_BYTES", 4 * 18 * 4)  # 4 rows of 18 logits
    assert [len(range(17)[chunk]) for chunk in denoiser.chunks(17)] == [4, 4, 4, 4, 1]
    check(token_log_probs(denoiser, ROWS, cfg_scale=scale), wanted)


def test_guidance_masks_what_is_given_and_nothing_else():
    # An open position that is not masked in this row stays visible in both forwards.
    denoiser = random_student(dtype=torch.float64)
    one = row(0, 8, [5], given=3)
    other = Row(0, one.x0_L.clone(), one.masked_L, one.given_L)
    other.x0_L[1] = 9
    scores = [
        next(float(found[0]) for _, found in token_log_probs(denoiser, [r], cfg_scale=s))
        for r in (one, other)
        for s in (0.0, 1.0)
    ]
    plain, guided = scores[0] - scores[2], scores[1] - scores[3]
    assert abs(plain) > 1e-3
    assert abs(guided) > 1e-3
    assert plain != pytest.approx(guided)
    visible = Row(0, one.x0_L.clone(), one.masked_L, one.given_L)
    visible.x0_L[6] = 9
    (_, before), (_, after) = token_log_probs(denoiser, [one, visible], cfg_scale=1.0)
    assert abs(float(before - after)) > 1e-3


def test_the_mask_is_no_candidate():
    denoiser = random_student()
    x0_L = torch.tensor([START, 3, 0, 5])
    flags_L = torch.tensor([False, False, True, False])
    total = 0.0
    for word in range(15):
        x0_L = x0_L.clone()
        x0_L[2] = word
        (_, log_prob), = token_log_probs(denoiser, [Row(0, x0_L, flags_L, ~flags_L)])  # fmt: skip
        total += float(log_prob.exp())
    assert total == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 12, 13, 24, 30, 10**6])
def test_batches_hold_what_fits_and_at_least_one(batch_tokens):
    rows = [row(i, length, [1]) for i, length in enumerate([3, 3, 4, 6, 6, 12, 12, 2, 2, 2])]
    found = list(batches(iter(rows), batch_tokens))
    assert [r.index for batch in found for r in batch] == list(range(10))

    def size(batch):
        return max(len(r.x0_L) for r in batch) * len(batch)

    assert all(size(batch) <= batch_tokens or len(batch) == 1 for batch in found)
    for batch, following in itertools.pairwise(found):  # greedy
        assert size([*batch, following[0]]) > batch_tokens
    assert list(batches([], 5)) == []


def test_guidance_counts_twice_in_the_size_of_a_batch(monkeypatch):
    denoiser = random_student()
    shapes = []
    rows_of = denoiser.rows
    monkeypatch.setattr(
        denoiser, "rows", lambda x, *a, **k: (shapes.append(tuple(x.shape)), rows_of(x, *a, **k))[1]
    )
    rows = [row(i, 10, [4]) for i in range(6)]
    list(token_log_probs(denoiser, rows, batch_tokens=40))
    assert shapes == [(4, 10), (2, 10)]
    shapes.clear()
    list(token_log_probs(denoiser, rows, batch_tokens=40, cfg_scale=0.5))
    assert shapes == [(2, 10)] * 6


def test_collate_masks_and_pads():
    denoiser = random_student()
    xt_BL, document_ids_BL, masked_BL, targets_N = collate(
        denoiser, [row(0, 4, [2, 3]), row(1, 2, [1])]
    )
    assert xt_BL.tolist() == [[START, 3, MASK, MASK], [START, MASK, PAD, PAD]]
    assert document_ids_BL.tolist() == [[0, 0, 0, 0], [0, 0, -1, -1]]
    assert masked_BL.tolist() == [[False, False, True, True], [False, True, False, False]]
    assert targets_N.tolist() == [6, 9, 4]
