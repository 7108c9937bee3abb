"""Block diffusion: one clean and one noisy pass give what full forwards under a hand-made mask give.

Token ids: words 0 … 11, start 12, end 13, pad 14, mask 15.
"""

import oracles
import pytest
import torch
from students import random_ar, random_student, slow_log_probs
from tiny import tiny_model

from mdm.attention import BLOCK_ATTENTIONS
from mdm.autoregressive import Autoregressive
from mdm.autoregressive import log_likelihood as ar_log_likelihood
from mdm.blocks import answer_blocks, block_log_probs, cache_of
from mdm.convert import make_bidirectional
from mdm.denoiser import Denoiser
from mdm.diffusion import generator
from mdm.errors import RequestError
from mdm.estimators import Estimator, every_mask, independent, rows_std_err
from mdm.likelihood import LikelihoodSettings, Pair, log_likelihood

START, MASK = 12, 15
TEXT = (START, 3, 1, 5, 2, 7, 7, 0, 4, 11, 9, 9, 1, 6)


def pair(prompt_length, answer_length, key=""):
    end = prompt_length + answer_length
    return Pair(TEXT[:prompt_length], TEXT[prompt_length:end], key)


def block_student(family="llama", *, block_size, **settings):
    return random_student(family, block_size=block_size, **settings)


def oracle(denoiser, p):
    x = [*p.prompt, *p.answer]
    return oracles.block_bound(
        slow_log_probs(denoiser), x, len(p.prompt), denoiser.block_size, MASK
    )


# --- the grid ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "answer", "size", "expected"),
    [
        (1, 7, 4, [(1, 4), (4, 8)]),
        (4, 4, 4, [(4, 8)]),
        (3, 4, 4, [(3, 4), (4, 7)]),
        (5, 1, 4, [(5, 6)]),
        (2, 3, 1, [(2, 3), (3, 4), (4, 5)]),
        (2, 3, 99, [(2, 5)]),
    ],
)
def test_answer_blocks(prompt, answer, size, expected):
    found = answer_blocks(prompt, answer, size)
    assert [(block.start, block.stop) for block in found] == expected


def test_a_full_canvas_has_no_blocks():
    with pytest.raises(AssertionError, match="not a block diffusion model"):
        answer_blocks(1, 2, None)
    with pytest.raises(AssertionError, match="not a block diffusion model"):
        block_log_probs(random_student(), torch.tensor(TEXT), [slice(3, 6)], [torch.ones(1, 3) > 0])


# --- exact -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_exact_bound_equals_enumeration_by_full_forwards(size, shift):
    denoiser = block_student(block_size=size, shift=shift, layers=2)
    pairs = [pair(n, 5) for n in range(1, 2 * size + 2)]
    found = log_likelihood(denoiser, pairs, LikelihoodSettings(estimator="exact"))
    for p, likelihood in zip(pairs, found, strict=True):
        assert likelihood.value == pytest.approx(oracle(denoiser, p), abs=1e-4)
        assert (likelihood.std_err, likelihood.estimator) == (0, "exact")
        assert likelihood.num_tokens == 5
        assert likelihood.is_bound is (size > 1)
        first = min(5, size - len(p.prompt) % size)
        widest = max(first, min(size, 5 - first))
        assert likelihood.nfe == 2**widest - 1


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "starcoder2", "gpt2", "gemma3", "granite", "gemma2"])
def test_families(family, shift):
    layers = {} if family in ("granite", "gemma2") else {"layers": 2}
    denoiser = block_student(family, block_size=3, shift=shift, **layers)
    for p in (pair(1, 4), pair(5, 6)):
        (found,) = log_likelihood(denoiser, [p], LikelihoodSettings())
        assert found.value == pytest.approx(oracle(denoiser, p), abs=2e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_blocks_of_one_are_the_autoregressive_likelihood(family):
    # Same weights, same softmax without the mask: a shifted model that denoises one token a block.
    denoiser = block_student(family, block_size=1, shift=True)
    causal = tiny_model(family, 16, layers=1, hidden=16)
    with torch.no_grad():  # no logit for the mask
        rows = torch.arange(16) != MASK
        log_probs_LV = causal(torch.tensor([TEXT])).logits[0][:, rows].double().log_softmax(-1)
    for p in (pair(1, 9), pair(6, 3)):
        end = len(p.prompt) + len(p.answer)
        expected = sum(float(log_probs_LV[i - 1, TEXT[i]]) for i in range(len(p.prompt), end))
        (found,) = log_likelihood(denoiser, [p], LikelihoodSettings())
        assert found.value == pytest.approx(expected, abs=1e-4)
        assert not found.is_bound


def test_blocks_of_one_and_the_teacher_agree():
    ar = random_ar()
    model = random_ar().model
    make_bidirectional(model)
    vocab = ar.vocab.with_mask("<|pad|>")
    denoiser = Denoiser(model, vocab, shift=True, block_size=1).eval()
    with torch.no_grad():  # a pad that is never likely: then both have the same softmax
        for m in (ar.model, model):
            m.get_output_embeddings().weight[vocab.mask_id] = 0
    p = pair(3, 6)
    (student,) = log_likelihood(denoiser, [p], LikelihoodSettings())
    (teacher,) = ar_log_likelihood(Autoregressive(ar.model, ar.vocab), [p])
    assert student.value > teacher.value  # by the mass of the pad, which only the teacher has
    with torch.no_grad():
        logits_LV = ar.model(torch.tensor([p.prompt + p.answer])).logits[0, 2:-1].double()
    missing = logits_LV.logsumexp(-1) - logits_LV[:, :14].logsumexp(-1)
    assert student.value - teacher.value == pytest.approx(float(missing.sum()), abs=1e-4)


def attentive(attention, family="llama", **settings):
    layers = {} if family in ("granite", "gemma2") else {"layers": 2}
    denoiser = block_student(family, **layers, **settings)
    denoiser.attention = attention
    return denoiser


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("family", ["llama", "granite"])
@pytest.mark.parametrize("attention", BLOCK_ATTENTIONS)
def test_what_a_block_sees(attention, family, shift):
    denoiser = attentive(attention, family, block_size=3, shift=shift)
    logits_fn = oracles.block_logits(
        denoiser.model, block_size=3, attention=attention, shift=shift, mask_id=MASK
    )

    def log_probs(tokens):
        logits_LV = logits_fn(tokens)
        logits_LV[:, MASK] = -torch.inf
        return logits_LV.log_softmax(-1)

    for p in (pair(1, 4), pair(3, 5), pair(5, 6)):
        x = [*p.prompt, *p.answer]
        expected = oracles.block_bound(log_probs, x, len(p.prompt), 3, MASK)
        (found,) = log_likelihood(denoiser, [p], LikelihoodSettings())
        assert found.value == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("attention", BLOCK_ATTENTIONS)
@torch.no_grad()
def test_log_probs_are_those_of_one_pass_over_two_streams(attention, family, shift):
    denoiser = attentive(attention, family, block_size=4, shift=shift)
    grid = answer_blocks(2, 11, 4)
    masks = [torch.rand(5, block.stop - block.start) < 0.6 for block in grid]
    x0_L = torch.tensor(TEXT[:13])
    found = block_log_probs(denoiser, x0_L, grid, masks, batch_tokens=30)
    for r in range(5):
        masked_L = torch.zeros(13, dtype=torch.bool)
        masked_L[2:] = torch.cat([mask_RA[r] for mask_RA in masks])
        xt_L = x0_L.masked_fill(masked_L, MASK)
        logits_NV = denoiser(xt_L[None], masked_L[None], x0_bL=x0_L[None])
        expected_N = logits_NV.log_softmax(-1).gather(1, x0_L[masked_L][:, None])[:, 0]
        found_N = torch.cat([found_RA[r] for found_RA in found])[masked_L[2:]]
        assert torch.allclose(found_N.float(), expected_N, atol=1e-4)


@pytest.mark.parametrize("shift", [False, True])
def test_a_head_that_is_not_plain_runs_on_needed_outputs_alone(shift, monkeypatch):
    denoiser = block_student("granite", block_size=4, shift=shift)
    head = denoiser.model.get_output_embeddings()
    rows, inner = [], head.forward
    monkeypatch.setattr(head, "forward", lambda x: rows.append(x.numel() // 16) or inner(x))
    masks = [torch.tensor([[True, False], [True, True]]), torch.ones(2, 4) > 0]
    block_log_probs(denoiser, torch.tensor(TEXT[:12]), [slice(6, 8), slice(8, 12)], masks)
    # Clean: the ends of 3 blocks; noisy: 11 masks, the two at the start of a block are read from those.
    assert rows == [3, 11 - 2 * shift]


def test_one_block_of_everything_is_the_full_canvas():
    full = random_student(shift=True)
    blocks = block_student(block_size=99, shift=True)
    p = pair(3, 5)
    (one,) = log_likelihood(full, [p], LikelihoodSettings())
    (other,) = log_likelihood(blocks, [p], LikelihoodSettings())
    assert one.value == pytest.approx(other.value, abs=1e-5)


# --- masks of different blocks ---------------------------------------------------------------------


def test_blocks_do_not_see_one_anothers_masks():
    denoiser = block_student(block_size=3, shift=True)
    grid = answer_blocks(4, 7, 3)
    masks = [every_mask(b.stop - b.start, 1, generator(0)).masked_RL for b in grid]
    x0_L = torch.tensor(TEXT[:11])
    together = block_log_probs(denoiser, x0_L, grid, masks)
    assert [tuple(found_RA.shape) for found_RA in together] == [(3, 2), (7, 3), (3, 2)]
    for i, (mask_RA, found_RA) in enumerate(zip(masks, together, strict=True)):
        assert found_RA.dtype == torch.float64
        assert (found_RA[~mask_RA] == 0).all()
        assert (found_RA[mask_RA] < 0).all()
        # Other blocks without any mask, or all masked: nothing changes here.
        for other in (torch.zeros_like, torch.ones_like):
            changed = [m if j == i else other(m) for j, m in enumerate(masks)]
            again = block_log_probs(denoiser, x0_L, grid, changed)[i]
            assert torch.allclose(again, found_RA, atol=1e-6)


def test_later_blocks_do_not_matter_and_earlier_ones_do():
    denoiser = block_student(block_size=3)
    grid, masks = [slice(3, 6)], [torch.tensor([[True, False, True]])]
    x0_L = torch.tensor(TEXT[:6])
    (before,) = block_log_probs(denoiser, x0_L, grid, masks)
    longer = block_log_probs(denoiser, torch.tensor(TEXT[:9]), grid, masks)[0]
    assert torch.allclose(longer, before, atol=1e-6)
    earlier_L = x0_L.clone()
    earlier_L[1] = 8
    (after,) = block_log_probs(denoiser, earlier_L, grid, masks)
    assert not torch.allclose(after, before, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "granite"])
@pytest.mark.parametrize("batch_tokens", [1, 20, 50])
def test_splitting_changes_nothing(monkeypatch, family, batch_tokens):
    denoiser = block_student(family, block_size=4, shift=True)
    pairs = [pair(2, 9), pair(7, 4)]
    whole = log_likelihood(denoiser, pairs, LikelihoodSettings())
    monkeypatch.setattr("mdm.denoiser.CHUNK_BYTES", 4 * 16 * 5)
    split = log_likelihood(denoiser, pairs, LikelihoodSettings(batch_tokens=batch_tokens))
    for one, other in zip(whole, split, strict=True):
        assert other.value == pytest.approx(one.value, abs=1e-5)
        assert other.nfe == one.nfe


# --- sampled ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["stratified", "independent"])
def test_sampled_masks_give_the_bound_on_average(estimator):
    denoiser = block_student(block_size=6, shift=True)
    p = pair(4, 9)  # blocks of 2, 6 and 1
    exact = oracle(denoiser, p)
    values, squares = [], []
    for seed in range(60):
        settings = LikelihoodSettings(estimator=estimator, mc_samples=18, seed=seed)
        (found,) = log_likelihood(denoiser, [p], settings)
        values.append(found.value)
        squares.append(found.std_err**2)
        assert (found.estimator, found.nfe) == (estimator, 18)
    values = torch.tensor(values, dtype=torch.float64)
    assert abs(float(values.mean()) - exact) < 4 * float(values.std()) / len(values) ** 0.5
    # Their errors add in squares.
    ratio = (sum(squares) / len(squares)) ** 0.5 / float(values.std())
    assert 0.6 < ratio < 2.2


def test_errors_of_blocks_add_in_squares(monkeypatch):
    errors = iter([3.0, 4.0, 12.0])
    counted = Estimator(independent, lambda masks, log_probs_RL: next(errors))
    monkeypatch.setattr("mdm.likelihood.ESTIMATORS", {"independent": counted})
    settings = LikelihoodSettings(estimator="independent", mc_samples=2)
    (found,) = log_likelihood(block_student(block_size=4), [pair(2, 9)], settings)
    assert found.std_err == pytest.approx(13.0)


def test_each_block_has_masks_of_its_own(monkeypatch):
    denoiser = block_student(block_size=6)
    seen = []

    def spy(length, samples, random):
        masks = independent(length, samples, random)
        seen.append(masks.masked_RL)
        return masks

    monkeypatch.setattr("mdm.likelihood.ESTIMATORS", {"independent": Estimator(spy, rows_std_err)})
    settings = LikelihoodSettings(estimator="independent", mc_samples=8)
    log_likelihood(denoiser, [pair(6, 8, "a"), pair(6, 8, "a")], settings)
    assert [tuple(m.shape) for m in seen] == [(8, 6), (8, 2)] * 2
    assert seen[0].equal(seen[2])
    assert seen[1].equal(seen[3])
    seen.clear()
    log_likelihood(denoiser, [Pair(TEXT[:6], TEXT[2:14], "a")], settings)
    assert [tuple(m.shape) for m in seen] == [(8, 6), (8, 6)]
    assert not seen[0].equal(seen[1])


def test_auto_is_exact_for_the_blocks_it_can_be():
    denoiser = block_student(block_size=4)
    (exact,) = log_likelihood(denoiser, [pair(2, 7)], LikelihoodSettings(mc_samples=15))
    assert (exact.estimator, exact.std_err, exact.nfe) == ("exact", 0, 15)
    (mixed,) = log_likelihood(denoiser, [pair(2, 7)], LikelihoodSettings(mc_samples=14))
    assert (mixed.estimator, mixed.nfe) == ("stratified", 14)
    (mixed,) = log_likelihood(denoiser, [pair(3, 7)], LikelihoodSettings(mc_samples=14))
    assert (mixed.estimator, mixed.std_err > 0) == ("stratified", True)  # 1, 4 and 2 tokens
    with pytest.raises(
        RequestError, match=r"4 tokens have 2\^4 - 1 masks, more than mc_samples = 14"
    ):
        log_likelihood(denoiser, [pair(2, 7)], LikelihoodSettings(estimator="exact", mc_samples=14))


def test_what_blocks_cannot_do():
    denoiser = block_student(block_size=2)
    with pytest.raises(RequestError, match=r"guidance \(cfg_scale = 0.5\) has no meaning"):
        log_likelihood(denoiser, [pair(2, 3)], LikelihoodSettings(cfg_scale=0.5))
    with pytest.raises(RequestError, match="order needs a full-canvas model; this one has blocks"):
        log_likelihood(denoiser, [pair(2, 3)], LikelihoodSettings(estimator="order"))


def test_a_cache_begins_without_a_copy():
    keys, values = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    cache = cache_of([(keys.expand(3, -1, -1, -1), values)])
    assert cache.get_seq_length() == 5
    assert cache.layers[0].keys.data_ptr() == keys.data_ptr()
    assert cache.layers[0].values is values
    assert cache_of([]).get_seq_length() == 0
