"""Confidence by its definition, and the choice of the highest."""

import math

import pytest
import torch

from mdm.remasking import REMASKING, keep_highest

PROBS = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.1, 0.2, 0.6, 0.1]])
PROPOSALS = torch.tensor([1, 2])


def entropy(p_V):
    return -sum(p * math.log(p) for p in p_V if p > 0)


EXPECTED = {
    "low_confidence": [0.3, 0.6],
    "margin": [0.2, 0.4],
    "entropy": [-entropy([0.5, 0.3, 0.2]), -entropy([0.1, 0.2, 0.6, 0.1])],
}


@pytest.mark.parametrize("name", REMASKING)
def test_confidence(name):
    uniform_n = torch.tensor([0.25, 0.75])
    confidence_n = REMASKING[name](PROBS.log(), PROPOSALS, uniform_n)
    expected = EXPECTED.get(name) or uniform_n.tolist()
    assert confidence_n.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", sorted(REMASKING.keys() - {"random"}))
def test_certainty_ranks_highest(name):
    sure_VV = torch.tensor([[1.0, 0.0], [0.5, 0.5]]).log()
    confidence_n = REMASKING[name](sure_VV, torch.tensor([0, 1]), None)
    assert confidence_n[0] > confidence_n[1]
    assert not confidence_n.isnan().any()


def test_highest_are_kept_ties_to_the_lowest_index():
    confidence_n = torch.tensor([0.5, 0.9, 0.5, 0.9, 0.5, -math.inf])
    assert keep_highest(confidence_n, 4).tolist() == [1, 3, 0, 2]
    # Long ties too: topk breaks them in no specified order.
    assert keep_highest(torch.ones(1000), 3).tolist() == [0, 1, 2]


def test_no_more_than_there_are():
    assert keep_highest(torch.tensor([0.1, 0.2]), 5).tolist() == [1, 0]
    assert keep_highest(torch.tensor([0.1, 0.2]), 0).tolist() == []
