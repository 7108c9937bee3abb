"""Decoding rules against their definitions by trying every number, and what they promise."""

import itertools
import math

import pytest
import torch
from students import ScriptedStudent

from mdm.canvas import SamplerSettings
from mdm.rules import CONFIDENCES, RULES, kept
from mdm.sampler import denoise, make_canvas

START, MASK = 12, 15
GRIDS = {
    "threshold": (0.05, 0.3, 0.5, 0.9, 1.0),
    "factor": (0.01, 0.2, 0.5, 1.0, 2.0, 50.0),
    "entropy_bound": (0.0, 0.05, 0.3, 1.0, 50.0),
}


def fits(rule, confidences, parameter):
    """May all of these, surest first, be decided together? By the words of the papers."""
    n = len(confidences)
    if rule == "threshold":
        return min(confidences) >= parameter
    if rule == "factor":
        return (n + 1) * (1 - min(confidences)) < parameter
    entropies = [-confidence for confidence in confidences]
    return sum(entropies) - max(entropies) <= parameter


def draws(rule, count=60):
    """Confidences of 1 … 6 positions, highest first; ties and certainty among them."""
    generator = torch.Generator().manual_seed(1)
    for number in range(count):
        values = torch.rand(number % 6 + 1, generator=generator).double() ** (1 + number % 3 * 4)
        values = 1 - values if rule != "entropy_bound" else -values
        if number % 5 == 0:
            values[:] = values[0]
        yield sorted(values.tolist(), reverse=True)
    yield [1.0, 1.0, 0.0] if rule != "entropy_bound" else [0.0, 0.0, -3.0]


@pytest.mark.parametrize("rule", RULES)
def test_the_most_that_fit_are_kept_and_always_one(rule):
    found = set()
    for confidences in draws(rule):
        for parameter in GRIDS[rule]:
            whole = range(1, len(confidences) + 1)
            expected = max((n for n in whole if fits(rule, confidences[:n], parameter)), default=1)
            assert kept(rule, parameter, confidences) == expected
            found.add(expected)
    assert found == {1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize("rule", RULES)
def test_rules_are_monotone_in_their_parameter(rule):
    for confidences in draws(rule):
        counts = [kept(rule, parameter, confidences) for parameter in GRIDS[rule]]
        assert counts == sorted(counts, reverse=rule == "threshold")


@pytest.mark.parametrize("rule", RULES)
def test_hopeless_confidences_keep_one(rule):
    assert kept(rule, GRIDS[rule][1], [-math.inf, -math.inf]) == 1
    assert kept(rule, GRIDS[rule][1], [-5.0, -math.inf]) == 1


def joints(count, length=3, words=2, power=6):
    """Random joint distributions of a few words, most of them peaked."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        p = torch.rand((words,) * length, generator=generator).double() ** power
        peak = torch.randint(words, (length,), generator=generator)
        p[tuple(peak)] += 20 * torch.rand((), generator=generator).double()
        yield p / p.sum()


def marginals(joint):
    axes = range(joint.dim())
    return [joint.sum([other for other in axes if other != axis]) for axis in axes]


def test_a_factor_of_1_decides_what_greedy_decoding_one_by_one_would():
    """Fast-dLLM, theorem 1: the product's mode is the joint's, for all positions that are kept."""
    together = 0
    for joint in joints(300):
        parts = marginals(joint)
        order = sorted(range(3), key=lambda i: -float(parts[i].max()))
        count = kept("factor", 1.0, [float(parts[i].max()) for i in order])
        chosen = order[:count]
        hidden = [axis for axis in range(3) if axis not in chosen]
        own = joint.sum(hidden) if hidden else joint
        mode = divmod_all(int(own.argmax()), own.shape)
        greedy = {axis: int(parts[axis].argmax()) for axis in chosen}
        if count > 1:
            together += 1
            assert mode == tuple(greedy[axis] for axis in sorted(chosen))
    assert together > 50


def divmod_all(index, shape):
    """The place of a flat index, last axis fastest."""
    return list(itertools.product(*map(range, shape)))[index]


def test_an_entropy_bound_bounds_what_the_product_loses():
    """KL(joint ‖ product of marginals) <= sum of the entropies less the largest (EB-Sampler, lemma)."""
    together = 0
    for joint in joints(300):
        parts = marginals(joint)
        entropies = [float(-(p * p.clamp(min=1e-300).log()).sum()) for p in parts]
        order = sorted(range(3), key=lambda i: entropies[i])
        count = kept("entropy_bound", 0.2, [-entropies[i] for i in order])
        chosen = order[:count]
        hidden = [axis for axis in range(3) if axis not in chosen]
        own = joint.sum(hidden) if hidden else joint
        entropy = float(-(own * own.clamp(min=1e-300).log()).sum())
        assert sum(entropies[i] for i in chosen) - entropy <= 0.2 + 1e-9
        together += count > 1
    assert together > 50


# --- in the sampler ----------------------------------------------------------------------------------

SURE = {3: 0.99, 2: 0.97, 5: 0.8, 4: 0.6, 1: 0.4}  # position: probability of its word


def student():
    logits_LV = torch.zeros(6, 16)
    for position, p in SURE.items():
        logits_LV[position] = math.log((1 - p) / 14)
        logits_LV[position, position] = math.log(p)
    return ScriptedStudent(lambda xt_BL: logits_LV.expand(len(xt_BL), -1, -1))


@pytest.mark.parametrize(
    ("settings", "groups"),
    [
        ({"threshold": 0.9}, [[3, 2], [5], [4], [1]]),
        ({"threshold": 0.59}, [[3, 2, 5, 4], [1]]),
        ({"threshold": 0.9, "remasking": "margin"}, [[3, 2], [5], [4], [1]]),
        ({"factor": 0.1}, [[3, 2], [5], [4], [1]]),
        ({"factor": 1.0}, [[3, 2, 5], [4], [1]]),
        ({"factor": 4.0}, [[3, 2, 5, 4, 1]]),
        ({"entropy_bound": 0.0, "remasking": "entropy"}, [[3], [2], [5], [4], [1]]),
        ({"entropy_bound": 0.1, "remasking": "entropy"}, [[3, 2], [5], [4], [1]]),
        ({"entropy_bound": 0.5, "remasking": "entropy"}, [[3, 2, 5], [4], [1]]),
    ],
)
def test_the_sampler_decides_by_the_rule(settings, groups):
    model = student()
    canvas = make_canvas(model, [START, *[MASK] * 5], SamplerSettings(**settings))
    steps = [step.commits[0].positions_k.tolist() for step in denoise(model, [canvas])]
    assert steps == groups
    assert canvas.nfe == len(groups)
    assert canvas.ids_L.tolist() == [START, 1, 2, 3, 4, 5]


def test_every_rule_says_what_confidence_it_needs():
    assert CONFIDENCES.keys() == RULES.keys()
