"""Likelihood along the decoding order: a distribution, and the one of the slow walk.

Token ids of 12 words: start 12, end 13, pad 14, mask 15.
"""

import itertools
import math

import oracles
import pytest
import torch
from students import ScriptedStudent, random_student, slow_log_probs

from mdm.canvas import SamplerSettings
from mdm.errors import ConfigError
from mdm.order import RULES, decoding_order_steps
from mdm.sampler import denoise, make_canvas

START, MASK = 12, 15


def decoding_order_scores(denoiser, pairs, *, done=None, **settings):
    """Drain the steps: (log p, forwards, greedy) of each pair."""
    found = {}

    def keep(index, *values):
        found[index] = values
        if done is not None:
            done(index, *values)

    for _ in decoding_order_steps(denoiser, pairs, done=keep, **settings):
        pass
    return [found[index] for index in range(len(pairs))]


PAIRS = [
    ([START, 3, 1], [5, 2, 7, 7, 0]),
    ([START], [4]),
    ([START, 8, 8, 8, 2, 1], [1, 9, 3]),
    ([START, 2], [6, 6, 0, 11, 5, 10, 13]),
]


def test_rules_are_those_that_need_no_chance():
    assert RULES == ("low_confidence", "margin", "entropy")


@pytest.mark.parametrize("block_length", [None, 1, 2])
@pytest.mark.parametrize("rule", RULES)
def test_sums_to_one_over_all_answers(rule, block_length):
    denoiser = random_student(num_words=2, dtype=torch.float64)  # and start, end, pad
    start = denoiser.vocab.start_id
    pairs = [([start, 1], answer) for answer in itertools.product(range(5), repeat=3)]
    scored = decoding_order_scores(denoiser, pairs, rule=rule, block_length=block_length)
    assert math.fsum(math.exp(value) for value, _, _ in scored) == pytest.approx(1, abs=1e-5)
    # Exactly one answer is the greedy one, and it need not be the likeliest.
    assert sum(greedy for _, _, greedy in scored) == 1
    assert all(forwards == 3 for _, forwards, _ in scored)


@pytest.mark.parametrize("scale", [0.0, 0.6])
@pytest.mark.parametrize("block_length", [None, 1, 2, 3, 99])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("family", "shift"), [("llama", True), ("gpt2", False)])
def test_equals_the_slow_walk(family, shift, rule, block_length, scale):
    denoiser = random_student(family, shift=shift)
    scored = decoding_order_scores(
        denoiser, PAIRS, rule=rule, block_length=block_length, cfg_scale=scale, batch_tokens=30
    )
    for (prompt, answer), (value, forwards, greedy) in zip(PAIRS, scored, strict=True):
        expected, _, is_greedy = oracles.order_log_prob(
            slow_log_probs(denoiser, range(len(prompt)), scale),
            [*prompt, *answer],
            len(prompt),
            MASK,
            rule,
            block_length,
        )
        assert value == pytest.approx(expected, abs=1e-4)
        assert forwards == len(answer) * (2 if scale else 1)
        assert greedy is is_greedy


@pytest.mark.parametrize("batch_tokens", [1, 9, 20, 4096])
def test_neighbours_do_not_matter(batch_tokens):
    denoiser = random_student(shift=True)
    alone = [decoding_order_scores(denoiser, [pair])[0] for pair in PAIRS]
    for order in ([0, 1, 2, 3], [3, 1, 1, 0, 2]):
        told = {}
        found = decoding_order_scores(
            denoiser,
            [PAIRS[i] for i in order],
            batch_tokens=batch_tokens,
            done=lambda i, *result, told=told: told.update({i: result}),
        )
        assert [told[i] for i in range(len(order))] == found
        for i, (value, forwards, greedy) in zip(order, found, strict=True):
            assert value == pytest.approx(alone[i][0], abs=1e-5)
            assert (forwards, greedy) == alone[i][1:]
    assert decoding_order_scores(denoiser, []) == []


def test_blocks_of_one_go_left_to_right():
    # Logits depend on what is visible: with one open position a block, only the left is.
    denoiser = random_student(dtype=torch.float64)
    prompt, answer = PAIRS[3]
    log_probs = slow_log_probs(denoiser)
    noised, total = [*prompt, *[MASK] * len(answer)], 0.0
    for i, token in enumerate(answer, start=len(prompt)):
        total += float(log_probs(noised)[i, token])
        noised[i] = token
    ((value, _, _),) = decoding_order_scores(denoiser, [(prompt, answer)], block_length=1)
    assert value == pytest.approx(total, abs=1e-5)


def test_ties_go_to_the_left():
    logits_LV = torch.zeros(4, 16)
    logits_LV[1:, 3] = torch.tensor([2.0, 5.0, 5.0])
    seen = []

    def logits_fn(xt_BL):
        seen.append(xt_BL[0].tolist())
        return logits_LV.expand(len(xt_BL), -1, -1)

    decoding_order_scores(ScriptedStudent(logits_fn), [([START], [3, 4, 5])])
    assert seen == [[START, MASK, MASK, MASK], [START, MASK, 4, MASK], [START, MASK, 4, 5]]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("block_length", [None, 2])
def test_greedy_is_what_the_sampler_writes(rule, block_length):
    denoiser = random_student(shift=True)
    settings = SamplerSettings(stop_at_eos=False, remasking=rule, block_length=block_length)
    prompt = [START, 3, 1]
    canvas = make_canvas(denoiser, [*prompt, *[MASK] * 5], settings)
    for _ in denoise(denoiser, [canvas]):
        pass
    answer = canvas.ids_L[3:].tolist()
    others = [[*answer[:i], (answer[i] + 1) % 12, *answer[i + 1 :]] for i in range(5)]
    pairs = [(prompt, text) for text in [answer, *others]]
    scored = decoding_order_scores(denoiser, pairs, rule=rule, block_length=block_length)
    assert [greedy for _, _, greedy in scored] == [True] + [False] * 5


def test_a_block_has_at_least_one_position():
    with pytest.raises(ConfigError, match="block_length must be at least 1; got -1"):
        decoding_order_scores(random_student(), PAIRS, block_length=-1)
