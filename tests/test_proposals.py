"""Tokens proposed for open positions: drawn as they should be, with the confidence asked for."""

import math
from dataclasses import replace

import oracles
import pytest
import torch

from mdm.canvas import SamplerSettings
from mdm.proposals import draw, guide, needs_uniforms, nucleus, propose, uniforms
from mdm.remasking import REMASKING

END, V = 13, 16
GREEDY = SamplerSettings()


def test_guidance_formula():
    conditional, unconditional = torch.randn(3, 4), torch.randn(3, 4)
    conditional[:, 2] = unconditional[:, 2] = -math.inf
    guided = guide(conditional, unconditional, 0.7)
    assert (guided[:, 2] == -math.inf).all()
    kept = [0, 1, 3]
    expected = 1.7 * conditional[:, kept] - 0.7 * unconditional[:, kept]
    assert torch.allclose(guided[:, kept], expected, atol=1e-6)


# --- the nucleus -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("top_p", "temperature", "kept"),
    [
        (1.0, 1.0, {0, 1, 2, 3}),
        (0.99, 1.0, {0, 1, 2, 3}),
        (0.9, 1.0, {0, 1, 2}),
        (0.79, 1.0, {0, 1}),
        (0.5, 1.0, {0, 1}),
        (0.49, 1.0, {0}),
        (1e-9, 1.0, {0}),
        (0.79, 0.5, {0, 1}),  # .658, .263, .066, .013
        (0.6, 0.5, {0}),
        (0.79, 4.0, {0, 1, 2}),  # flatter: .306, .255, .218, .221
    ],
)
def test_nucleus_is_the_fewest_tokens_that_hold_top_p(top_p, temperature, kept):
    probs = torch.tensor([0.495, 0.31, 0.155, 0.04], dtype=torch.float64)
    shuffle = torch.tensor([2, 0, 3, 1])
    found = nucleus(torch.stack([probs, probs[shuffle]]).log(), temperature, top_p)
    assert set(found[0].isfinite().nonzero()[:, 0].tolist()) == kept
    assert set(shuffle[found[1].isfinite()].tolist()) == kept
    inside = found[0].isfinite()
    assert torch.equal(found[0][inside], probs.log()[inside])


def test_nucleus_leaves_forbidden_tokens_out():
    logits_nV = torch.tensor([[1.0, -math.inf, 0.0], [-math.inf, -math.inf, 0.0]])
    before = logits_nV.clone()
    assert nucleus(logits_nV, 1.0, 0.999).isfinite().tolist() == [
        [True, False, True],
        [False, False, True],
    ]
    assert torch.equal(logits_nV, before)


# --- a draw ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, 512, 513, 2000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_draw_inverts_the_distribution_function(size, temperature):
    generator = torch.Generator().manual_seed(2)
    logits_nV = torch.randn(40, size, generator=generator) * 3
    logits_nV[:, size // 2] = -math.inf
    uniform_n = torch.rand(40, dtype=torch.float64, generator=generator)
    found_n = draw(logits_nV, uniform_n, temperature)
    probs_nV = (logits_nV / temperature).softmax(-1)
    for probs_V, u, found in zip(
        probs_nV.tolist(), uniform_n.tolist(), found_n.tolist(), strict=True
    ):
        share = [p / math.fsum(probs_V) for p in probs_V]
        # Where u is within rounding of a boundary either side will do.
        near = {
            oracles.inverse_cdf(share, min(max(u + e, 0.0), 1 - 1e-16)) for e in (-1e-6, 0, 1e-6)
        }
        assert found in near


def test_the_tail_can_be_drawn():
    """Noise of 32 bits would never draw the second token: its probability is 1e-12."""
    logits_nV = torch.full((3, 1000), -math.inf)
    logits_nV[:, 7], logits_nV[:, 900] = 0.0, math.log(1e-12)
    uniform_n = torch.tensor([0.5, 1 - 2e-12, 1 - 1e-13], dtype=torch.float64)
    assert draw(logits_nV, uniform_n, 1.0).tolist() == [7, 7, 900]


def test_the_ends_of_the_uniform_numbers_draw_what_has_probability():
    logits_nV = torch.full((4, 1030), -math.inf)
    logits_nV[:, 3] = logits_nV[:, 600] = 0.0
    uniform_n = torch.tensor([0.0, 0.4999, 0.5001, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits_nV, uniform_n, 1.0).tolist() == [3, 3, 600, 600]
    logits_nV[:, 600] = -50.0  # less than the largest uniform number leaves
    assert draw(logits_nV, uniform_n, 1.0).tolist() == [3, 3, 3, 3]


def test_a_draw_stays_in_the_nucleus():
    logits_nV = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(200, 1)
    uniform_n = torch.linspace(0, 1 - 1e-9, 200, dtype=torch.float64)
    assert set(draw(logits_nV, uniform_n, 1.0, top_p=0.8).tolist()) == {0, 1}
    assert set(draw(logits_nV, uniform_n, 1.0).tolist()) == {0, 1, 2, 3}


# --- proposals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("remasking", REMASKING)
def test_three_numbers_a_position(remasking):
    logits_nV = torch.randn(5, V)
    settings = replace(GREEDY, remasking=remasking)
    drawn_2n = torch.rand(2, 5, dtype=torch.float64)
    token_n, confidence_n, log_prob_n = propose(logits_nV, settings, END, drawn_2n)
    log_probs_nV = logits_nV.log_softmax(-1)
    assert token_n.tolist() == logits_nV.argmax(-1).tolist()
    expected_n = REMASKING[remasking](log_probs_nV, token_n.long(), drawn_2n[1])
    torch.testing.assert_close(confidence_n, expected_n.float())
    torch.testing.assert_close(log_prob_n, log_probs_nV.max(-1).values)


def test_large_ids_are_exact():
    logits_nV = torch.zeros(1, 2**18)
    logits_nV[0, -1] = 1.0
    assert int(propose(logits_nV, GREEDY, END)[0]) == 2**18 - 1


def test_proposing_leaves_the_logits_alone():
    # T10
    settings = replace(GREEDY, suppress_eos=True, eos_last=True, temperature=1.0)
    logits_nV = torch.randn(1, V)
    before = logits_nV.clone()
    propose(logits_nV, settings, END, torch.zeros(2, 1, dtype=torch.float64))
    assert torch.equal(logits_nV, before)


@pytest.mark.parametrize(
    ("settings", "which"),
    [
        ({}, ()),
        ({"temperature": 1.0}, (0,)),
        ({"remasking": "random"}, (1,)),
        ({"temperature": 0.5, "remasking": "random"}, (0, 1)),
    ],
)
def test_random_numbers_are_drawn_only_where_they_count(settings, which):
    settings = replace(GREEDY, **settings)
    generator = torch.Generator().manual_seed(5)
    drawn_2n = uniforms(settings, 4, generator)
    assert [row for row in (0, 1) if drawn_2n[row].any()] == list(which)
    expected = torch.rand(
        4 * len(which), dtype=torch.float64, generator=torch.Generator().manual_seed(5)
    )
    torch.testing.assert_close(drawn_2n[list(which)].flatten(), expected)
    assert needs_uniforms(settings) is bool(which)
