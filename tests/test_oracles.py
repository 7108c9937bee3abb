"""The slow references checked against each other, against torch, and against values by hand.

An oracle that is wrong makes every comparison with it worthless, so each has a second, different
derivation here, and each published oddity it keeps on purpose has a test that shows it.
"""

import itertools
import math

import oracles
import pytest
import torch
import torch.nn.functional as F
from tiny import (
    FAMILIES,
    byte_tokenizer,
    next_log_probs,
    table_ar,
    tiny_model,
    toy_ar,
    toy_denoiser,
)

MASK, EOS, EOT = 16, 3, 4
V = 17
PROMPT_BL = torch.tensor([[5, 6, 7]])


def generate(model_fn, prompt_BL=PROMPT_BL, **changes):
    settings = {"steps": 8, "gen_length": 8, "block_length": 4}
    settings |= {"mask_id": MASK, "eos_id": EOS, "eot_id": EOT}
    return oracles.llada_generate(model_fn, prompt_BL, **(settings | changes))


def fixed_logits(rows_LV, dtype=torch.float32):
    """A model that ignores its input; a fresh tensor each call, as the sampler edits it."""
    rows_LV = torch.as_tensor(rows_LV, dtype=dtype)
    return lambda x_BL, attention_mask_BL: rows_LV.repeat(x_BL.shape[0], 1, 1)


def total_variation(p_V, q_V):
    return float((p_V - q_V).abs().sum() / 2)


def random_probs(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).softmax(-1)


# --- tiny.py ------------------------------------------------------------------------------------


def test_byte_tokenizer_is_lossless_and_ids_are_bytes():
    tokenizer = byte_tokenizer(("<|mask|>",))
    text = "def f(x):\r\n\treturn 'h\u00e9 \U0001f40d ' , x  # don't .\x00"
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        256,
        257,
        258,
    )
    assert tokenizer.convert_tokens_to_ids("<|mask|>") == 259
    assert tokenizer.mask_token_id is None


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models_are_seeded_causal_and_clearly_different(family):
    x_BL = torch.tensor([[1, 2, 3, 4, 5, 6]])
    model = tiny_model(family, 13)
    logits_BLV = model(x_BL).logits
    assert torch.equal(logits_BLV, tiny_model(family, 13)(x_BL).logits)
    assert logits_BLV.std() > 0.5
    assert not torch.allclose(logits_BLV, tiny_model(family, 13, seed=1)(x_BL).logits)
    assert torch.allclose(model(x_BL[:, :4]).logits, logits_BLV[:, :4], atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "starcoder2"])
def test_float64_models_agree_with_their_cache_to_float64(family):
    model = tiny_model(family, 13, dtype=torch.float64)
    x_BL = torch.randint(0, 13, (2, 9))
    with torch.no_grad():
        full_BLV = model(x_BL).logits
        start = model(x_BL[:, :5], use_cache=True)
        rest_BLV = model(x_BL[:, 5:], past_key_values=start.past_key_values).logits
    assert torch.allclose(full_BLV[:, 5:], rest_BLV, atol=1e-12, rtol=0)


def test_toy_denoiser_ignores_masked_out_left_padding():
    model_fn = toy_denoiser(V, mask_id=MASK)
    x_BL = torch.tensor([[1, 2, MASK, 4]])
    padded_BL = torch.tensor([[9, 9, 1, 2, MASK, 4]])
    attended_BL = torch.tensor([[0, 0, 1, 1, 1, 1]])
    assert torch.allclose(model_fn(padded_BL, attended_BL)[:, 2:], model_fn(x_BL), atol=1e-6)
    assert not torch.allclose(model_fn(padded_BL)[:, 2:], model_fn(x_BL), atol=1e-2)


# --- 1. LLaDA -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("masks", "steps", "expected"),
    [
        (5, 3, [2, 2, 1]),
        (4, 3, [2, 1, 1]),
        (3, 5, [1, 1, 1, 0, 0]),
        (0, 3, [0, 0, 0]),
        (8, 4, [2, 2, 2, 2]),
        (7, 4, [2, 2, 2, 1]),
    ],
)
def test_transfer_tokens(masks, steps, expected):
    budget_BS = oracles.llada_transfer_tokens(torch.tensor([masks, masks]), steps)
    assert budget_BS.dtype == torch.int64
    assert budget_BS.tolist() == [expected, expected]


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
@pytest.mark.parametrize(("block_length", "steps"), [(8, 1), (8, 4), (4, 8), (2, 4), (2, 16)])
def test_llada_fills_every_mask_and_keeps_the_prompt(
    remasking, temperature, cfg_scale, block_length, steps
):
    prompt_BL = torch.tensor([[0, 0, 5], [5, 6, 7], [0, 9, 9]])
    attended_BL = torch.tensor([[0, 0, 1], [1, 1, 1], [0, 1, 1]])
    x_BL = generate(
        toy_denoiser(V, mask_id=MASK),
        prompt_BL,
        attention_mask_BL=attended_BL,
        steps=steps,
        block_length=block_length,
        temperature=temperature,
        cfg_scale=cfg_scale,
        remasking=remasking,
    )
    assert x_BL.shape == (3, 11)
    assert torch.equal(x_BL[:, :3], prompt_BL)
    assert (x_BL != MASK).all()


def test_llada_rows_do_not_depend_on_the_batch():
    model_fn = toy_denoiser(V, mask_id=MASK)
    alone = generate(model_fn, torch.tensor([[5, 6]]), attention_mask_BL=torch.tensor([[1, 1]]))
    batch = generate(
        model_fn,
        torch.tensor([[1, 2, 3], [0, 5, 6]]),
        attention_mask_BL=torch.tensor([[1, 1, 1], [0, 1, 1]]),
    )
    assert batch[1, 3:].tolist() == alone[0, 2:].tolist()


@pytest.mark.parametrize("steps", [8, 4, 2])
@pytest.mark.parametrize("block_length", [8, 4])
def test_two_samplers_agree_where_no_trap_is_sprung(steps, block_length):
    model_fn = toy_denoiser(V, mask_id=MASK)
    settings = {"steps": steps, "block_length": block_length}
    x_BL = generate(model_fn, **settings)
    blocks = [list(range(s, s + block_length)) for s in range(3, 11, block_length)]
    per_block = steps // len(blocks)
    budget = oracles.llada_transfer_tokens(torch.tensor([block_length] * len(blocks)), per_block)
    canvas, order = oracles.slow_low_confidence_greedy(
        lambda canvas: model_fn(torch.tensor([canvas]))[0],
        PROMPT_BL[0].tolist() + [MASK] * 8,
        range(3, 11),
        blocks,
        budget.tolist(),
        forbidden=[MASK],
    )
    assert canvas == x_BL[0].tolist()
    assert [len(step) for step in order] == budget.flatten().tolist()
    assert sorted(itertools.chain(*order)) == list(range(3, 11))


def test_slow_greedy_by_hand_with_ties_to_the_lowest_index():
    # Positions 0 and 2 tie, and so do tokens 1 and 2 there; 3 would win but is forbidden.
    logits_LV = torch.tensor([[0.0, 2, 2, 9], [0, 1, 0, 9], [0, 2, 2, 9]])
    canvas, order = oracles.slow_low_confidence_greedy(
        lambda canvas: logits_LV, [3, 3, 3], [0, 1, 2], [[0, 1, 2]], [[1, 1, 1, 0]], [3]
    )
    assert canvas == [1, 1, 1]
    # Confidences: e/(e+2) = .58 at position 1, e²/(2e²+1) = .47 at the other two.
    assert order == [[1], [0], [2]]


def test_noise_is_drawn_in_the_published_order():
    drawn = []

    def uniforms(shape, dtype):
        drawn.append((shape, dtype))
        return torch.rand(shape, dtype=dtype)

    common = {"steps": 4, "uniforms": uniforms}
    generate(toy_denoiser(V, mask_id=MASK), temperature=0.5, cfg_scale=1.0, **common)
    assert drawn == [((1, 11, V), torch.float64)] * 4
    drawn.clear()
    generate(toy_denoiser(V, mask_id=MASK), temperature=0.5, remasking="random", **common)
    assert drawn == [((1, 11, V), torch.float64), ((1, 11), torch.float32)] * 4
    drawn.clear()
    generate(toy_denoiser(V, mask_id=MASK), **common)
    assert drawn == []


def test_default_noise_is_the_global_generator():
    model_fn = toy_denoiser(V, mask_id=MASK)
    torch.manual_seed(5)
    first = generate(model_fn, temperature=1.0)
    torch.manual_seed(5)
    second = generate(model_fn, temperature=1.0, uniforms=oracles.default_uniforms)
    assert torch.equal(first, second)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_noisy_argmax_samples_the_tempered_softmax(temperature):
    logits_V = torch.tensor([0.0, 1.0, -1.0, 2.0])
    num = 20_000
    noisy = oracles.llada_noisy_logits(
        logits_V.repeat(num, 1), temperature, oracles.default_uniforms
    )
    frequency_V = noisy.argmax(-1).bincount(minlength=4) / num
    expected_V = (logits_V / temperature).softmax(-1)
    assert ((frequency_V - expected_V).abs() < 4 * (expected_V / num).sqrt()).all()


def test_guidance_is_1_plus_s_conditional_minus_s_unconditional():
    model_fn = toy_denoiser(V, dtype=torch.float64)
    x_BL = torch.tensor([[5, MASK, 7, MASK, 2]])
    given_BL = torch.tensor([[True, False, True, False, False]])  # 2 was generated: stays visible
    unconditional_BL = torch.tensor([[MASK, MASK, MASK, MASK, 2]])
    expected = 2.5 * model_fn(x_BL) - 1.5 * model_fn(unconditional_BL)
    guided = oracles.llada_logits(model_fn, x_BL, given_BL, None, 1.5, MASK)
    assert torch.allclose(guided, expected)
    for scale in (0.0, -1.0):  # a negative scale silently means none
        assert torch.equal(
            oracles.llada_logits(model_fn, x_BL, given_BL, None, scale, MASK), model_fn(x_BL)
        )


def test_guidance_hides_the_prompt_and_shows_what_was_generated():
    seen = []
    inner = toy_denoiser(V, mask_id=MASK)

    def model_fn(x_BL, attention_mask_BL):
        seen.append((x_BL.tolist(), attention_mask_BL.tolist()))
        return inner(x_BL, attention_mask_BL)

    prompt_BL, attended_BL = torch.tensor([[0, 5, MASK, 7]]), torch.tensor([[0, 1, 1, 1]])
    generate(model_fn, prompt_BL, attention_mask_BL=attended_BL, cfg_scale=1.0)
    for (conditional, unconditional), attended in seen:
        # A mask inside the prompt is not "prompt": once filled it stays visible.
        assert unconditional[:4] == [MASK, MASK, conditional[2], MASK]
        assert unconditional[4:] == conditional[4:]
        assert attended == [[0] + [1] * 11] * 2
    last_conditional = seen[-1][0][0]
    assert sum(token == MASK for token in last_conditional) == 2  # its own, and trap 5's


def test_trap_2_confidence_saturates_in_bfloat16():
    logits_BLV = torch.tensor([[[7.0, 0.0], [9.0, 0.0]]])
    proposals_BL = torch.zeros(1, 2, dtype=torch.int64)
    exact = oracles.llada_confidence(logits_BLV, proposals_BL)
    rounded = oracles.llada_confidence(logits_BLV.bfloat16(), proposals_BL)
    assert exact[0, 0] < exact[0, 1] < 1
    assert rounded.dtype == torch.bfloat16
    assert rounded.tolist() == [[1.0, 1.0]]


def trap_3_model(end_id=EOS):
    """One generated pair: at the first position EOS (or EoT) wins, at the second word 6 does."""
    rows_LV = torch.full((2, V), -9.0)
    rows_LV[0, end_id], rows_LV[0, 5] = 4.0, 1.0
    rows_LV[1, 6], rows_LV[1, end_id] = 2.0, 1.5
    return fixed_logits(rows_LV)


def first_committed(model_fn, **changes):
    """Position and token of the first commit of a two-token canvas without prompt."""
    canvases = []

    def spy(x_BL, attention_mask_BL):
        canvases.append(x_BL.clone())
        return model_fn(x_BL, attention_mask_BL)

    empty_BL = torch.zeros(1, 0, dtype=torch.int64)
    generate(spy, empty_BL, steps=2, gen_length=2, block_length=2, **changes)
    (position,) = (canvases[1][0] != MASK).nonzero().flatten().tolist()
    return position, int(canvases[1][0, position])


def test_trap_3_eos_confidence_is_removed_at_temperature_zero_only():
    # u = 1/2 for every word adds the same noise everywhere: T > 0 with the greedy proposal.
    same_noise = {"temperature": 1.0, "uniforms": lambda s, d: torch.full(s, 0.5, dtype=d)}
    assert first_committed(trap_3_model()) == (0, EOS)
    assert first_committed(trap_3_model(), confidence_eos_eot_inf=True) == (1, 6)
    assert first_committed(trap_3_model(), confidence_eos_eot_inf=True, **same_noise) == (0, EOS)
    # EoT is removed at any temperature.
    assert first_committed(trap_3_model(EOT), **same_noise) == (0, EOT)
    for noise in ({}, same_noise):
        assert first_committed(trap_3_model(EOT), confidence_eos_eot_inf=True, **noise) == (1, 6)


def test_trap_3_an_eos_proposal_is_still_committed_when_the_budget_forces_it():
    empty_BL = torch.zeros(1, 0, dtype=torch.int64)
    shape = {"steps": 2, "gen_length": 2, "block_length": 2}
    x_BL = generate(trap_3_model(), empty_BL, confidence_eos_eot_inf=True, **shape)
    assert x_BL.tolist() == [[EOS, 6]]
    x_BL = generate(trap_3_model(), empty_BL, logits_eos_inf=True, **shape)
    assert x_BL.tolist() == [[5, 6]]


def test_trap_4_a_proposed_mask_uses_up_budget_and_stays():
    # One commit a step and a canvas that never changes: the no-op repeats to the end.
    x_BL = generate(toy_denoiser(V, mask_id=MASK, mask_logit=50.0))
    assert (x_BL[:, 3:] == MASK).all()


def test_a_mask_logit_of_minus_infinity_must_wait_until_after_guidance():
    model_fn = toy_denoiser(V, mask_id=MASK, mask_logit=-math.inf)
    logits_BLV = oracles.llada_logits(model_fn, PROMPT_BL, PROMPT_BL != MASK, None, 1.0, MASK)
    assert logits_BLV[..., MASK].isnan().all()  # -inf - (-inf), and argmax then picks the NaN


def test_trap_4_a_mask_left_behind_competes_in_later_blocks():
    # Position 0 proposes the mask while position 1 is open, and a sure token after that.
    def model_fn(x_BL, attention_mask_BL):
        logits_BLV = torch.zeros(1, 4, V)
        logits_BLV[0, 0, MASK if x_BL[0, 1] == MASK else 7] = 9.0
        logits_BLV[0, 1:, 8] = torch.tensor([8.0, 5.0, 4.0])
        return logits_BLV

    empty_BL = torch.zeros(1, 0, dtype=torch.int64)
    x_BL = generate(model_fn, empty_BL, steps=2, gen_length=4, block_length=2)
    # Two commits a step. Block 0 lost one to the mask, block 1 lost one to position 0.
    assert x_BL.tolist() == [[7, 8, 8, MASK]]


def test_trap_5_a_prompt_mask_takes_budget_from_the_first_block():
    prompt_BL = torch.tensor([[5, MASK, 7]])
    rows_LV = torch.zeros(7, V)
    rows_LV[:, 8] = torch.tensor([0.0, 9, 0, 4, 3, 2, 1])  # the prompt's mask is the surest
    x_BL = generate(fixed_logits(rows_LV), prompt_BL, steps=2, gen_length=4, block_length=2)
    assert x_BL.tolist() == [[5, 8, 7, 8, 8, 8, MASK]]


def test_trap_7_always_s_forwards_per_block():
    calls = []
    inner = toy_denoiser(V, mask_id=MASK)

    def model_fn(x_BL, attention_mask_BL):
        calls.append(x_BL.shape[0])
        return inner(x_BL)

    generate(model_fn, steps=32, cfg_scale=1.0)
    assert calls == [2] * 32


def test_trap_10_the_model_output_is_edited_in_place():
    kept_BLV = torch.zeros(1, 11, V)
    generate(lambda x_BL, attention_mask_BL: kept_BLV, logits_eos_inf=True)
    assert (kept_BLV[..., EOS] == -math.inf).all()


# --- 2. targets ---------------------------------------------------------------------------------

TEACHERS = {
    "table": lambda: (table_ar(3, seed=1), 3),
    "llama": lambda: (next_log_probs(toy_ar(3), bos_id=0), 3),
}


@pytest.fixture(params=TEACHERS)
def teacher(request):
    return TEACHERS[request.param]()


def test_enumeration_is_complete_and_ordered():
    sequences_NL = oracles.enumerate_sequences(3, 2)
    assert sequences_NL.tolist() == [[a, b] for a in range(3) for b in range(3)]
    assert oracles.enumerate_sequences(3, 0).shape == (1, 0)


def test_joint_sums_to_one(teacher):
    log_probs, vocab_size = teacher
    for prefix in ([], [2, 0]):
        _, log_joint_N = oracles.ar_log_joint(log_probs, 4, vocab_size, prefix)
        assert log_joint_N.exp().sum() == pytest.approx(1, abs=1e-12)


def test_posterior_is_the_conditional_of_the_joint(teacher):
    log_probs, vocab_size = teacher
    x_L, masked = [0, 2, 1, 2, 0], [0, 2, 3]
    sequences_NL, log_joint_N = oracles.ar_log_joint(log_probs, 5, vocab_size)
    agrees_N = (sequences_NL[:, [1, 4]] == torch.tensor([2, 0])).all(dim=1)
    for position in masked:
        joint_V = torch.zeros(vocab_size, dtype=torch.float64)
        joint_V.index_add_(0, sequences_NL[agrees_N, position], log_joint_N[agrees_N].exp())
        q_V = oracles.posterior_marginal(log_probs, x_L, masked, position, vocab_size)
        assert torch.allclose(q_V, joint_V / joint_V.sum(), atol=1e-12)


@pytest.mark.parametrize("position", range(5))
def test_suffix_scoring_is_exact_for_one_mask(teacher, position):
    log_probs, vocab_size = teacher
    x_L = [0, 2, 1, 2, 0]
    q_V = oracles.full_conditional(log_probs, x_L, position, vocab_size)
    scores = oracles.suffix_score_loop(log_probs, x_L, position, range(vocab_size))
    assert torch.allclose(scores.exp(), q_V, atol=1e-10)


def test_suffix_scoring_of_few_candidates_misses_exactly_the_posterior_mass_outside():
    log_probs, vocab_size = table_ar(4, seed=3), 4
    x_L, position, kept = [0, 3, 1, 2], 1, [2, 0]
    q_V = oracles.full_conditional(log_probs, x_L, position, vocab_size)
    truncated_V = torch.zeros(vocab_size, dtype=torch.float64)
    truncated_V[kept] = oracles.suffix_score_loop(log_probs, x_L, position, kept).exp()
    assert torch.allclose(truncated_V[kept], q_V[kept] / q_V[kept].sum(), atol=1e-12)
    assert total_variation(truncated_V, q_V) == pytest.approx(1 - float(q_V[kept].sum()))


def test_region_end_hides_what_comes_after(teacher):
    log_probs, vocab_size = teacher
    near, far = [0, 2, 1, 2, 0], [0, 2, 1, 0, 1]

    def q_V(x_L, end):
        return oracles.posterior_marginal(log_probs, x_L, [1, 4], 1, vocab_size, 1, end)

    assert torch.equal(q_V(near, 3), q_V(far, 3))
    assert torch.equal(q_V(near, 3), q_V(near[:3], None))
    assert total_variation(q_V(near, 5), q_V(far, 5)) > 1e-3
    # A mask before the region belongs to an earlier block: the student sees that one clean.
    earlier_V = oracles.posterior_marginal(log_probs, near, [0, 1], 1, vocab_size, 1, 3)
    assert torch.equal(earlier_V, q_V(near, 3))
    changed = [0, 2, 0, 2, 0]  # a visible token to the right, inside the region
    assert total_variation(q_V(near, 3), q_V(changed, 3)) > 1e-3


def test_last_position_of_a_region_needs_only_the_left(teacher):
    log_probs, vocab_size = teacher
    x_L = [0, 2, 1, 2, 0]
    left_V = oracles.left_only(log_probs, x_L, 2)
    assert torch.allclose(oracles.full_conditional(log_probs, x_L, 2, vocab_size, 0, 3), left_V)
    assert torch.allclose(oracles.suffix_score_loop(log_probs, x_L, 2, range(3), 3).exp(), left_V)


def test_everything_masked_is_the_plain_marginal(teacher):
    log_probs, vocab_size = teacher
    sequences_NL, log_joint_N = oracles.ar_log_joint(log_probs, 3, vocab_size)
    marginal_V = torch.zeros(vocab_size, dtype=torch.float64)
    marginal_V.index_add_(0, sequences_NL[:, 2], log_joint_N.exp())
    q_V = oracles.posterior_marginal(log_probs, [0, 0, 0], range(3), 2, vocab_size)
    assert torch.allclose(q_V, marginal_V, atol=1e-12)


def test_region_start_needs_no_earlier_probabilities():
    log_probs = next_log_probs(toy_ar(3))  # without bos: cannot score position 0
    x_L = [0, 2, 1, 2]
    with_bos = oracles.posterior_marginal(log_probs, x_L, [1, 2], 1, 3, start=1)
    shifted = oracles.posterior_marginal(next_log_probs(toy_ar(3), bos_id=0), x_L[1:], [0, 1], 0, 3)
    assert torch.allclose(with_bos, shifted, atol=1e-12)


# The toy of targets.md section 4: V = 4, L = 6, masks at 0, 2, 3, 5.
MASKED = [0, 2, 3, 5]
NOTES_X = [0, 1, 2, 0, 3, 1]


@pytest.fixture(scope="module")
def notes_toy():
    log_probs = table_ar(4, seed=7)
    return log_probs, oracles.enumerate_fills(log_probs, NOTES_X, MASKED, 4)


def averaged(fills, log_weights, estimate):
    """Σ over fills of normalised weight · estimate(fill)."""
    weights = torch.tensor(log_weights, dtype=torch.float64).softmax(0)
    return sum(weight * estimate(fill) for weight, fill in zip(weights, fills, strict=True))


def test_fill_weights_sum_to_the_evidence(notes_toy):
    log_probs, fills = notes_toy
    sequences_NL, log_joint_N = oracles.ar_log_joint(log_probs, 6, 4)
    agrees_N = (sequences_NL[:, 1] == 1) & (sequences_NL[:, 4] == 3)
    evidence = float(log_joint_N[agrees_N].exp().sum())
    assert len(fills) == 4**4
    # Forced decoding is itself a distribution over fills ...
    assert math.fsum(math.exp(f.log_proposal) for f in fills) == pytest.approx(1, abs=1e-12)
    # ... and E over it of the weight is P(visible).
    assert math.fsum(math.exp(f.log_joint) for f in fills) == pytest.approx(evidence, rel=1e-12)


@pytest.mark.parametrize("position", MASKED)
def test_posterior_average_of_full_conditionals_is_the_posterior(notes_toy, position):
    log_probs, fills = notes_toy
    q_V = oracles.posterior_marginal(log_probs, NOTES_X, MASKED, position, 4)
    average_V = averaged(
        fills,
        [f.log_joint for f in fills],
        lambda f: oracles.full_conditional(log_probs, f.tokens, position, 4),
    )
    assert total_variation(average_V, q_V) < 1e-12


@pytest.mark.parametrize("position", MASKED)
def test_literal_recipe_is_biased(notes_toy, position):
    log_probs, fills = notes_toy
    q_V = oracles.posterior_marginal(log_probs, NOTES_X, MASKED, position, 4)
    unweighted = [f.log_proposal for f in fills]

    def head(fill):
        return oracles.left_only(log_probs, fill.tokens, position)

    posterior_heads_V = averaged(fills, [f.log_joint for f in fills], head)
    unweighted_heads_V = averaged(fills, unweighted, head)
    histogram_V = oracles.marginal_of_fills(fills, unweighted, position, 4)
    # With unweighted fills, the head's average and the histogram are the same thing.
    assert total_variation(unweighted_heads_V, histogram_V) < 1e-12
    assert total_variation(unweighted_heads_V, q_V) > 0.02
    if position == MASKED[-1]:  # nothing visible to its right
        assert total_variation(posterior_heads_V, q_V) < 1e-12
    else:
        assert total_variation(posterior_heads_V, q_V) > 0.02


# --- 3. losses ----------------------------------------------------------------------------------


def test_kl_against_torch_and_by_hand():
    p, q = random_probs(5, 7), random_probs(5, 7, seed=1)
    expected = F.kl_div(q.log(), p, reduction="none").sum(-1)
    assert torch.allclose(oracles.forward_kl(p, q), expected)
    assert torch.allclose(oracles.reverse_kl(p, q), oracles.forward_kl(q, p))
    assert torch.equal(oracles.forward_kl(p, p), torch.zeros(5, dtype=torch.float64))
    half, quarter = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.5, 0.25])
    assert float(oracles.forward_kl(half, quarter)) == pytest.approx(0.5 * math.log(2))
    assert float(oracles.reverse_kl(half, quarter)) == math.inf


def test_jsd_limits_and_symmetry():
    p, q = random_probs(7), random_probs(7, seed=1)
    tiny = 1e-7
    assert oracles.generalized_jsd(p, q, 0) == oracles.forward_kl(p, q)
    assert oracles.generalized_jsd(p, q, 1) == oracles.reverse_kl(p, q)
    near_0 = oracles.generalized_jsd(p, q, tiny)
    near_1 = oracles.generalized_jsd(p, q, 1 - tiny)
    assert float(near_0 / tiny) == pytest.approx(float(oracles.forward_kl(p, q)), rel=1e-5)
    assert float(near_1 / tiny) == pytest.approx(float(oracles.reverse_kl(p, q)), rel=1e-5)
    assert float(near_0) < 1e-5  # the unscaled value vanishes: the endpoints are not limits
    for beta in (0.2, 0.5, 0.9):
        here = oracles.generalized_jsd(p, q, beta)
        assert float(here) == pytest.approx(float(oracles.generalized_jsd(q, p, 1 - beta)))
        bound = -(beta * math.log(beta) + (1 - beta) * math.log(1 - beta))
        assert 0 < float(here) < bound  # never above the entropy of a coin with bias beta


def test_bucketed_kl_is_a_lower_bound_that_grows_with_the_ids():
    for seed in range(20):
        p, q = random_probs(6, seed=seed), random_probs(6, seed=100 + seed)
        order = p.argsort(descending=True).tolist()
        values = [float(oracles.bucketed_kl(p, q, order[:k])) for k in range(7)]
        assert values[0] == pytest.approx(0, abs=1e-12)
        assert all(a <= b + 1e-12 for a, b in itertools.pairwise(values))
        assert values[-1] == pytest.approx(float(oracles.forward_kl(p, q)))


def test_partial_kl_can_exceed_the_full_one_and_renormalised_can_vanish():
    p = torch.tensor([0.6, 0.2, 0.2], dtype=torch.float64)
    q = torch.tensor([0.3, 0.4, 0.3], dtype=torch.float64)
    full = float(oracles.forward_kl(p, q))
    assert float(oracles.partial_kl(p, q, [0])) == pytest.approx(0.6 * math.log(2))
    assert float(oracles.partial_kl(p, q, [0])) > full > float(oracles.bucketed_kl(p, q, [0])) > 0
    assert float(oracles.partial_kl(p, q, [1])) < 0
    proportional = torch.tensor([0.2, 0.4, 0.4], dtype=torch.float64)
    blind = float(oracles.renormalised_kl(p, proportional, [1, 2]))
    assert blind == pytest.approx(0, abs=1e-12)
    for loss in (oracles.partial_kl, oracles.renormalised_kl, oracles.bucketed_kl):
        assert float(loss(p, q, [2, 0, 1])) == pytest.approx(full)


@pytest.mark.parametrize("eps", [0.0, 0.1, 1.0])
def test_label_smoothing_is_torchs(eps):
    logits_V = torch.randn(9, dtype=torch.float64)
    expected = F.cross_entropy(logits_V, torch.tensor(4), label_smoothing=eps)
    assert torch.allclose(oracles.label_smoothed_cross_entropy(logits_V, 4, eps), expected)


# --- 4. the bound -------------------------------------------------------------------------------


def log_prob_fn(vocab_size=5, mask_id=4, seed=0):
    """A denoiser over words 0..vocab_size-2 that never proposes the mask."""
    model_fn = toy_denoiser(vocab_size, seed, mask_id=mask_id, dtype=torch.float64)
    return lambda xt: model_fn(torch.tensor([xt]))[0].log_softmax(-1)


def test_three_forms_of_the_bound_are_equal():
    x_L, maskable = [1, 0, 3, 2, 2, 1], [1, 2, 4, 5]
    values = [
        bound(log_prob_fn(), x_L, maskable, 4)
        for bound in (oracles.exact_bound, oracles.bernoulli_bound, oracles.any_order_bound)
    ]
    assert values[0] == pytest.approx(values[1], abs=1e-10)
    assert values[0] == pytest.approx(values[2], abs=1e-10)


def test_bernoulli_form_is_the_integral_over_noise_levels():
    x_L, maskable, num_points = [1, 0, 3], [0, 1, 2], 2000
    subsets = list(oracles.masks_with_log_probs(log_prob_fn(), x_L, maskable, 4))
    integral = 0.0
    for point in range(num_points):
        t = (point + 0.5) / num_points
        expected = math.fsum(t**n * (1 - t) ** (3 - n) * log_p for n, log_p in subsets)
        integral += expected / t / num_points
    value = oracles.bernoulli_bound(log_prob_fn(), x_L, maskable, 4)
    assert integral == pytest.approx(value, rel=1e-5)


def test_bound_of_one_token_is_its_log_probability_and_of_none_is_zero():
    denoise = log_prob_fn()
    expected = float(denoise([1, 4, 3])[1, 0])
    assert oracles.exact_bound(denoise, [1, 0, 3], [1], 4) == pytest.approx(expected)
    assert oracles.exact_bound(denoise, [1, 0, 3], [], 4) == 0


def test_bound_is_a_lower_bound_and_tight_for_consistent_conditionals():
    # A denoiser that knows the true posteriors of a joint: every order gives the joint itself.
    log_probs, vocab_size, mask_id = table_ar(3, seed=2), 3, 3

    def denoise(xt):
        holes = [i for i, token in enumerate(xt) if token == mask_id]
        log_p_LV = torch.zeros(len(xt), vocab_size, dtype=torch.float64)
        for i in holes:
            q_V = oracles.posterior_marginal(log_probs, xt, holes, i, vocab_size)
            log_p_LV[i] = q_V.log()
        return log_p_LV

    sequences_NL, log_joint_N = oracles.ar_log_joint(log_probs, 3, vocab_size)
    for row in (0, 13, 26):
        bound = oracles.exact_bound(denoise, sequences_NL[row].tolist(), range(3), mask_id)
        assert bound == pytest.approx(float(log_joint_N[row]), abs=1e-10)
    # Any denoiser: exp(bound) sums to at most 1, as a mean of log-probabilities over orders.
    total = sum(
        math.exp(oracles.exact_bound(log_prob_fn(4, 3), row, range(3), 3))
        for row in sequences_NL.tolist()
    )
    assert 0 < total < 1


# --- 6. the distillation loss -------------------------------------------------------------------


def test_naive_kd_loss_against_torch_with_gradient():
    student = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    teacher, x0_BL = torch.randn(2, 4, 6, dtype=torch.float64), torch.randint(0, 6, (2, 4))
    masked_BL = torch.tensor([[True, False, True, True], [False, False, True, False]])
    loss = oracles.naive_kd_loss(student, teacher, x0_BL, masked_BL, 0.3, temperature=2.0)
    ce = F.cross_entropy(student[masked_BL], x0_BL[masked_BL])
    kl = F.kl_div(
        (student[masked_BL] / 2).log_softmax(-1),
        (teacher[masked_BL] / 2).log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )
    expected = 0.7 * ce + 0.3 * 4 * kl
    assert torch.allclose(loss, expected)
    gradients = [torch.autograd.grad(value, student)[0] for value in (loss, expected)]
    assert torch.allclose(*gradients)
    assert (gradients[0][~masked_BL] == 0).all()


def test_naive_kd_loss_weight_and_denominator_apply_to_both_terms():
    student, teacher = torch.randn(1, 3, 5), torch.randn(1, 3, 5)
    x0_BL, masked_BL = torch.tensor([[1, 2, 3]]), torch.tensor([[True, True, False]])
    weight_BL = torch.tensor([[2.0, 0.5, 9.0]])
    each = [
        oracles.naive_kd_loss(student, teacher, x0_BL, one_BL, 0.5, 2.0)
        for one_BL in (masked_BL & (torch.arange(3) == i) for i in (0, 1))
    ]
    loss = oracles.naive_kd_loss(
        student, teacher, x0_BL, masked_BL, 0.5, 2.0, weight_BL=weight_BL, denominator=3
    )
    assert torch.allclose(loss, (2.0 * each[0] + 0.5 * each[1]) / 3)


# --- 8. Monte-Carlo targets ---------------------------------------------------------------------


def test_inverse_cdf_by_hand():
    probs = [0.0, 2.0, 0.0, 1.0, 1.0]
    for u, index in ((0.0, 1), (0.499, 1), (0.5, 3), (0.749, 3), (0.75, 4), (0.999, 4)):
        assert oracles.inverse_cdf(probs, u) == index
    with pytest.raises(AssertionError, match="below 1"):
        oracles.inverse_cdf(probs, 1.0)


def test_outcomes_are_all_sequences_of_choices_with_their_probabilities():
    def run(choose):
        first = choose([0.5, 0.0, 0.5], ("a",))
        return (first, choose([1.0, 3.0], ("b",))) if first else (first,)

    found = {result: probability for probability, result in oracles.outcomes(run)}
    assert found == {(0,): 0.5, (2, 0): 0.125, (2, 1): 0.375}


def test_choices_by_uniform_numbers_know_their_names():
    choose = oracles.chosen_by({("fill", 3, 0): 0.9, ("fill", 3, 1): 0.1}.__getitem__)
    assert [choose([1, 1], ("fill", 3, k)) for k in (0, 1)] == [1, 0]


@pytest.mark.parametrize(
    ("settings", "position", "holes", "end"),
    [
        ({}, 1, [1, 2, 5], 7),
        ({}, 8, [1, 2, 5, 7, 8], 9),  # nothing visible follows: it is its own end
        ({"window": 1}, 1, [1], 2),  # the window is all masked
        ({"window": 2}, 1, [1, 2], 4),
        ({"block": 4}, 5, [5], 7),
        ({"block": 3}, 5, [5], 6),
        ({"fill": "span"}, 1, [1, 2], 7),
        ({"fill": "span"}, 8, [7, 8], 9),
        ({"fill": "span", "block": 8}, 8, [8], 9),
    ],
)
def test_limits_by_hand(settings, position, holes, end):
    masked = [1, 2, 5, 7, 8, 9]  # visible: 0, 3, 4, 6
    assert oracles.limits(masked, position, 10, **settings) == (holes, end)


def test_systematic_outcomes_are_the_rule_at_any_uniform_number():
    weights = [0.1, 0.45, 0.05, 0.4]
    possible = oracles.systematic_outcomes(weights)
    assert math.fsum(prob for prob, _ in possible) == pytest.approx(1)
    for step in range(200):
        u = (step + 0.5) / 200
        index = oracles.inverse_cdf([prob for prob, _ in possible], u)
        by_hand = [oracles.inverse_cdf(weights, (k + u) / 4) for k in range(4)]
        assert possible[index][1] == by_hand
    # Every fill has on average as many children as its weight says, and never more than one off.
    for k, weight in enumerate(weights):
        children = [(prob, parents.count(k)) for prob, parents in possible]
        assert math.fsum(prob * count for prob, count in children) == pytest.approx(4 * weight)
        assert all(abs(count - 4 * weight) < 1 for _, count in children)


def test_estimates_of_one_fill_are_forced_decoding(notes_toy):
    """One fresh fill is distributed as left-to-right decoding, and its weight is the evidence."""
    log_probs, _ = notes_toy
    x_L, holes = [0, *NOTES_X], [1, 3, 4]  # a start token, which the table takes for a 0
    runs = oracles.outcomes(
        lambda choose: oracles.importance_estimate(
            log_probs, x_L, holes, 1, 6, 1, choose, heads=False
        )
    )
    by_text = {tuple(run.texts[0]): (p, run.weights[0]) for p, run in runs}
    for fill in oracles.enumerate_fills(log_probs, x_L, holes, 4, start=1, end=6):
        p, weight = by_text.pop(fill.tokens)
        assert p == pytest.approx(math.exp(fill.log_proposal), rel=1e-9)
        assert weight == pytest.approx(math.exp(fill.log_weight), rel=1e-9)
    assert not by_text


@pytest.mark.parametrize(
    ("estimate", "options", "equal"),
    [
        (oracles.importance_estimate, {}, True),
        (oracles.smc_estimate, {"threshold": 1.01}, True),
        # Conditional fills hold the text's own token: only over texts do the two agree.
        (oracles.csmc_estimate, {"threshold": 1.01}, False),
    ],
)
def test_heads_and_tokens_have_the_same_expectation(estimate, options, equal):
    arguments = (table_ar(3, seed=4), [0, 2, 1, 0, 2], [1, 3, 4], 4, 5, 2)

    def mean(heads):
        runs = oracles.outcomes(lambda choose: estimate(*arguments, choose, heads=heads, **options))
        return sum(probability * run.target_V for probability, run in runs)

    distance = total_variation(mean(heads=True), mean(heads=False))
    assert distance < 1e-12 if equal else distance > 0.01


def test_student_mixtures_by_hand():
    slots = [(3, 0.5), (9, 0.3), (1, 0.1), (3, 0.1)]
    assert oracles.mixture(slots, [0, 1, 3], 0.3) == pytest.approx(
        {0: 0.1, 1: 0.1 + 0.1, 3: 0.1 + 0.6}
    )
    draws = [oracles.mixture_draw(slots, [0, 1, 3], 0.3, u) for u in (0.0, 0.15, 0.29, 0.31, 0.85)]
    assert draws == [0, 1, 3, 3, 1]
    assert oracles.mixture_draw(slots, [0, 1, 3], 0.3, 0.99) == 3  # the second slot of token 3


# --- 9. suffix scoring with a tail, and with pruning ----------------------------------------------


def test_suffix_estimate_without_tail_is_the_loop():
    log_probs, x_L = table_ar(4, seed=3), [0, 3, 1, 2]
    q_C, outside = oracles.tail_estimate(log_probs, x_L, 1, [2, 0], 4, 0, None)
    assert torch.allclose(q_C, oracles.suffix_score_loop(log_probs, x_L, 1, [2, 0]).exp())
    assert outside == 0


def test_candidates_include_the_true_token():
    log_probs, x_L = table_ar(4, seed=3), [0, 3, 1, 2]
    order = log_probs([0]).argsort(descending=True).tolist()
    for text_token in range(4):
        found = oracles.suffix_candidates(log_probs, [0, text_token, 1, 2], 1, 2)
        want = order[:2] if text_token in order[:2] else [order[0], text_token]
        assert found == want
    assert oracles.suffix_candidates(log_probs, x_L, 1, 4) == order


def test_pruning_by_hand():
    """Masses after 0, 2, 4 tokens of the right side; a budget of a quarter each for three rounds."""
    log_probs, x_L = table_ar(3, seed=5, concentration=1.0), [0, 1, 2, 0, 1, 1, 2]
    alive, dropped = oracles.pruned(log_probs, x_L, 1, [0, 1, 2], 7, prune=0.0)
    assert (sorted(alive), dropped) == ([0, 1, 2], 0.0)
    alive, dropped = oracles.pruned(log_probs, x_L, 1, [0, 1, 2], 7, prune=4.0)
    assert alive == [1]  # the true token; all else went in the first round
    assert dropped == pytest.approx(1 - float(log_probs([0])[1].exp()))
