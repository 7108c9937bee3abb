"""Which targets have the teacher's joint as the fixed point of training on one's own text, and when.

First in the limit of everything: a student that is a table, all rollouts enumerated (oracles.py). Then with
the real parts: a small block diffusion model, its rollouts, states, a teacher's targets, the loss.
What comes out is told in docs/on_policy.md. TV: total variation, half the sum of absolute differences.
Shapes: S states, n positions of a block, V words, Z texts, B rows.
"""

import functools
import itertools
from collections.abc import Callable

import pytest
import tiny
import torch
from oracles import (
    DECODING,
    all_above,
    ar_log_joint,
    decoding_step,
    enumerate_sequences,
    learn_once,
    sampled_joint,
    states_of,
    taught,
    trained_weights,
)
from students import ScriptedStudent, random_student
from tiny_run import ar_teacher
from tiny_targets import cut_teacher

from mdm.canvas import SamplerSettings
from mdm.sampler import denoise, make_canvas
from mdm.train.asking import soft_targets
from mdm.train.batches import on_rollouts
from mdm.train.loss_sums import loss_sums
from mdm.train.objective import ObjectiveSettings
from mdm.train.on_policy import OnPolicySettings
from mdm.train.rollouts import roll_out
from mdm.train.states import state_batch
from mdm.train.targets import TargetSettings

V, LENGTH = 3, 3
SEEDS = range(4)
EXACT = 1e-12
BY_STATE = ["left to right", "right to left", "random", "surest position"]
LOOSE = [
    0.5,
    1.0,
]  # Dirichlet concentrations; below, tokens hang together so much that suffix is slow


def total_variation(one, other):
    return float((one - other).abs().sum() / 2)


@functools.cache
def teacher(seed, concentration):
    """The joint (Z,) of a random table, and its targets by kind."""
    table = tiny.table_ar(V, seed, concentration=concentration)
    kinds = {kind: taught(table, V, LENGTH, kind) for kind in ("left", "suffix", "exact")}
    return ar_log_joint(table, LENGTH, V)[1].exp(), kinds


def start(kind="uniform", seed=0, concentration=0.5):
    """(S, n, V) an untaught student."""
    shape = ((V + 1) ** LENGTH, LENGTH, V)
    if kind == "uniform":
        return torch.full(shape, 1 / V, dtype=torch.float64)
    if kind == "contrary":  # sure of what the teacher finds least likely
        exact_SnV = teacher(seed, concentration)[1]["exact"]
        low_Sn1 = exact_SnV.argmin(-1, keepdim=True)
        return torch.full(shape, 0.01, dtype=torch.float64).scatter_(-1, low_Sn1, 0.98)
    weights = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return weights**3 / (weights**3).sum(-1, keepdim=True)


def learn(p_SnV, rule, targets, joint_Z, *, updates=60, pace=1.0, choice="round"):
    """The table after these updates, and the sampler's TV to the teacher before and after each."""
    found = [total_variation(sampled_joint(p_SnV, rule), joint_Z)]
    for _ in range(updates):
        new_SnV = learn_once(p_SnV, rule, targets, choice)
        change = float((new_SnV - p_SnV).abs().max())
        p_SnV = p_SnV + pace * (new_SnV - p_SnV)
        found.append(total_variation(sampled_joint(p_SnV, rule), joint_Z))
        if change < EXACT:
            break
    return p_SnV, found


def ends_at(rule, kind, concentration, *, begin="uniform", **options):
    """TV at the end, for each teacher."""
    found = []
    for seed in SEEDS:
        joint_Z, kinds = teacher(seed, concentration)
        p_SnV = start(begin, seed, concentration)
        found.append(learn(p_SnV, rule, kinds[kind], joint_Z, **options)[1][-1])
    return found


def mean(values):
    return sum(values) / len(values)


# --- the enumeration itself --------------------------------------------------------------------------


def two_words(seed):
    """(27, 3, 2) a table that no joint goes with: every order of decoding writes by another law."""
    p_SnV = torch.rand(27, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return p_SnV / p_SnV.sum(-1, keepdim=True)


def by_hand(p_SnV, rule_name, targets, choice):
    """One update of a table by following every rollout, one token a step."""
    _, length, words = p_SnV.shape
    all_states = [tuple(s) for s in states_of(words, length).tolist()]
    place = {state: i for i, state in enumerate(all_states)}
    texts = [tuple(z) for z in enumerate_sequences(words, length).tolist()]
    sums: dict = {}

    def learn_from(state, positions, text, weight):
        for i in positions:
            total, target = sums.get((state, i), (0.0, 0.0))
            sums[state, i] = (
                total + weight,
                target + weight * targets[texts.index(text), i],
            )

    def moves(state):
        """(probability, position, token) of what a step can decide."""
        open_ = [i for i in range(length) if state[i] == words]
        p = p_SnV[place[state]]
        if rule_name == "random":
            return [(p[i, v] / len(open_), i, v) for i in open_ for v in range(words)]
        if rule_name == "left to right":
            return [(p[open_[0], v], open_[0], v) for v in range(words)]
        found = []
        for text in texts:  # "surest draw": of all proposals the one that was likeliest
            if any(text[i] != state[i] for i in range(length) if i not in open_):
                continue
            chance = 1.0
            for i in open_:
                chance = chance * p[i, text[i]]
            best = max(open_, key=lambda i: (float(p[i, text[i]]), -i))
            found.append((chance, best, text[best]))
        return found

    def follow(state, chance, passed):
        if words not in state:
            for seen, decided in passed if choice != "random" else []:
                masked = [i for i in range(length) if seen[i] == words]
                learn_from(seen, [decided] if choice == "decided" else masked, state, chance)
                if choice == "complement":
                    other = tuple(
                        z if s == words else words for s, z in zip(seen, state, strict=True)
                    )
                    learn_from(other, [i for i in range(length) if i not in masked], state, chance)
            if choice == "random":
                for seen in all_states:
                    if all(s in (z, words) for s, z in zip(seen, state, strict=True)):
                        masked = [i for i in range(length) if seen[i] == words]
                        learn_from(seen, masked, state, chance)
            return
        for p, i, v in moves(state):
            follow((*state[:i], v, *state[i + 1 :]), chance * p, [*passed, (state, i)])

    follow((words,) * length, 1.0, [])
    new_SnV = p_SnV.clone()
    for (state, i), (total, target) in sums.items():
        new_SnV[place[state], i] = target / total
    return new_SnV


@pytest.mark.parametrize("choice", ["round", "decided", "complement", "random"])
@pytest.mark.parametrize("order", ["left to right", "random", "surest draw"])
def test_an_update_is_the_mean_of_the_targets_over_all_rollouts(order, choice):
    words, length, p_SnV = 2, 3, two_words(1)
    table = tiny.table_ar(words, 3, concentration=1.0)
    for kind in ("left", "suffix"):
        targets = taught(table, words, length, kind)
        found = learn_once(p_SnV, DECODING[order], targets, choice)
        expected = by_hand(p_SnV, order, targets, choice)
        masked_Sn = states_of(words, length) == words
        torch.testing.assert_close(found[masked_Sn], expected[masked_Sn])


def test_rollouts_of_many_tokens_a_step_count_alike():
    """However many rounds a rollout has, its weights sum to 1."""
    p_SnV = teacher(0, 0.5)[1]["exact"]
    rule = all_above(0.7, "best")
    weight_SZ = trained_weights(p_SnV, rule, "round")[0]
    torch.testing.assert_close(weight_SZ.sum(0), sampled_joint(p_SnV, rule))
    assert float(decoding_step(p_SnV, rule).sum(1)[-1]) == pytest.approx(1)


SAMPLERS = {
    "left to right": {"block_length": 1},
    "random": {"remasking": "random"},
    "surest draw": {"remasking": "low_confidence"},
    "surest position": {"remasking": "margin"},  # of two words margin and entropy say the same
    "entropy": {"remasking": "entropy"},
    "drawn above .8": {"threshold": 0.8},
    "best above .6": {"remasking": "margin", "threshold": 0.2},  # .6 - .4
}
RULES = DECODING | {
    "entropy": DECODING["surest position"],
    "drawn above .8": all_above(0.8, "drawn"),
    "best above .6": all_above(0.6, "best"),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_sampler_writes_by_the_enumerated_law(name):
    words, length, rows = 2, 3, 600
    p_SnV = two_words(19)  # the laws of the orders differ by .12 and more

    def logits(xt_BL):
        block_Bn = xt_BL[:, 1:].clamp(max=words)  # the mask has the largest id
        found = torch.full((*xt_BL.shape, 16), -1e9)
        digits_n = (words + 1) ** torch.arange(length - 1, -1, -1)
        found[:, 1:, :words] = p_SnV[(block_Bn * digits_n).sum(-1)].log().float()
        return found

    student = ScriptedStudent(logits)
    ids = [12, *[student.mask_id] * length]
    settings = SamplerSettings(temperature=1.0, **SAMPLERS[name])
    canvases = [make_canvas(student, ids, settings, key=(1, row)) for row in range(rows)]
    for _ in denoise(student, canvases):
        pass
    counts_Z = torch.zeros(words**length, dtype=torch.float64)
    for canvas in canvases:
        counts_Z[int((canvas.ids_L[1:] * torch.tensor([4, 2, 1])).sum())] += 1
    assert total_variation(counts_Z / rows, sampled_joint(p_SnV, RULES[name])) < 0.06


# --- targets and orders ------------------------------------------------------------------------------


@pytest.mark.parametrize("concentration", [0.2, *LOOSE])
def test_left_only_targets_lead_to_the_joint_left_to_right_and_nowhere_else(concentration):
    left_to_right = ends_at(DECODING["left to right"], "left", concentration)
    assert max(left_to_right) < EXACT
    for order, least in (("right to left", 0.15), ("random", 0.09)):
        assert mean(ends_at(DECODING[order], "left", concentration)) > least
    # The order depends on the teacher here, and can happen to be left to right.
    assert max(ends_at(DECODING["surest position"], "left", concentration)) > 0.05


@pytest.mark.parametrize("order", ["left to right", "right to left", "random"])
def test_left_only_targets_have_one_fixed_point(order):
    """A token depends on those to its left alone, so it is reached after a few updates, from anywhere."""
    for seed in SEEDS:
        joint_Z, kinds = teacher(seed, 0.5)
        ends = []
        for begin in ("uniform", "random", "contrary"):
            p_SnV, way = learn(start(begin, seed), DECODING[order], kinds["left"], joint_Z)
            assert len(way) <= LENGTH + 4
            ends.append(sampled_joint(p_SnV, DECODING[order]))
        torch.testing.assert_close(ends[0], ends[1])
        torch.testing.assert_close(ends[0], ends[2])


@pytest.mark.parametrize("concentration", [0.2, *LOOSE])
@pytest.mark.parametrize("order", BY_STATE)
def test_the_exact_posterior_leads_to_the_joint_in_any_order(order, concentration):
    for begin in ("uniform", "contrary"):
        ends = ends_at(DECODING[order], "exact", concentration, begin=begin, updates=LENGTH + 2)
        assert max(ends) < EXACT


@pytest.mark.parametrize("concentration", [0.2, *LOOSE])
@pytest.mark.parametrize("order", BY_STATE)
def test_the_joint_is_a_fixed_point_of_suffix_scoring_in_any_order(order, concentration):
    for seed in SEEDS:
        joint_Z, kinds = teacher(seed, concentration)
        p_SnV = learn_once(kinds["exact"], DECODING[order], kinds["suffix"])
        assert total_variation(sampled_joint(p_SnV, DECODING[order]), joint_Z) < EXACT


@pytest.mark.parametrize("begin", ["uniform", "random", "contrary"])
@pytest.mark.parametrize("order", BY_STATE)
def test_suffix_scoring_comes_to_the_joint_from_anywhere(order, begin):
    """Every update is a Gibbs step on the text. One by one for a fixed order, but not for confidences:
    what is decided first can change on the way."""
    for seed in SEEDS:
        joint_Z, kinds = teacher(seed, 1.0)
        p_SnV = start(begin, seed, 1.0)
        way = learn(p_SnV, DECODING[order], kinds["suffix"], joint_Z, updates=30)[1]
        assert way[15] < 0.02
        assert way[-1] < 2e-3
        if order != "surest position":
            assert all(later <= before + 1e-6 for before, later in itertools.pairwise(way))


def test_suffix_scoring_is_slow_where_tokens_hang_together():
    """As Gibbs sampling is; the exact posterior is there after one update."""
    ends = ends_at(DECODING["random"], "suffix", 0.2, updates=60)
    assert max(ends) > 0.1
    assert max(ends_at(DECODING["random"], "exact", 0.2, updates=1)) < EXACT


# --- what no target mends ----------------------------------------------------------------------------


@pytest.mark.parametrize("concentration", LOOSE)
def test_no_target_mends_a_sampler_that_looks_at_what_it_drew(concentration):
    """Tokens that were drawn likely are decided, the others drawn anew: likely texts become likelier.

    So it is with remasking=low_confidence at temperature 1, as published; margin and entropy look at the
    distribution alone.
    """
    rule = DECODING["surest draw"]
    exact = ends_at(rule, "exact", concentration)
    suffix = ends_at(rule, "suffix", concentration, updates=50, pace=0.5)
    left = ends_at(rule, "left", concentration, updates=50, pace=0.5)
    assert min(exact) > 0.2
    # Rollouts that are too likely teach suffix and left what is too likely, again and again.
    assert mean(suffix) > mean(exact) + 0.05
    assert mean(left) > mean(exact) + 0.02
    for seed in SEEDS:
        joint_Z, kinds = teacher(seed, concentration)
        entropy, sharp = (
            -float(torch.xlogy(p, p).sum()) for p in (joint_Z, sampled_joint(kinds["exact"], rule))
        )
        assert sharp < entropy - 0.2


def test_left_only_targets_and_a_sampler_that_looks_at_what_it_drew_never_settle():
    joint_Z, kinds = teacher(0, 0.5)
    rule = DECODING["surest draw"]
    p_SnV, way = learn(start(), rule, kinds["left"], joint_Z, updates=200)
    assert len(way) == 201
    assert float((learn_once(p_SnV, rule, kinds["left"]) - p_SnV).abs().max()) > 0.01


@pytest.mark.slow
def test_tokens_decided_together_are_independent_whatever_the_target():
    ends = {
        (threshold, kind): mean(ends_at(all_above(threshold, "best"), kind, 1.0, pace=0.6))
        for threshold in (0.5, 0.9)
        for kind in ("left", "exact")
    }
    assert ends[0.9, "exact"] < 1e-3  # no two are that sure of these teachers
    assert ends[0.9, "left"] > 0.1
    assert ends[0.5, "exact"] > 0.1


# --- which states are learnt from --------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["decided", "complement", "random"])
@pytest.mark.parametrize("order", BY_STATE)
def test_the_choice_of_states_does_not_move_right_aware_fixed_points(order, choice):
    for seed in SEEDS:
        joint_Z, kinds = teacher(seed, 0.5)
        p_SnV = learn_once(kinds["exact"], DECODING[order], kinds["suffix"], choice)
        assert total_variation(sampled_joint(p_SnV, DECODING[order]), joint_Z) < EXACT
        p_SnV = learn(start(), DECODING[order], kinds["exact"], joint_Z, choice=choice)[0]
        assert total_variation(sampled_joint(p_SnV, DECODING[order]), joint_Z) < EXACT


@pytest.mark.slow
def test_learning_only_what_was_decided_lets_the_start_choose_the_order():
    """Positions that are never decided first are never learnt there, and so never become sure."""
    rule = DECODING["surest position"]
    ends = {
        (choice, begin): ends_at(rule, "left", 1.0, begin=begin, choice=choice, pace=0.6)
        for choice in ("round", "decided")
        for begin in ("uniform", "contrary")
    }
    assert ends["round", "uniform"] == pytest.approx(ends["round", "contrary"], abs=1e-6)
    # From the uniform table ties go to the left, and then left to right is sure of itself.
    assert max(ends["decided", "uniform"]) < EXACT
    assert max(ends["decided", "contrary"]) > 0.15


def test_the_choice_of_states_moves_left_only_fixed_points_little():
    means = {
        choice: mean(ends_at(DECODING["random"], "left", 0.5, choice=choice))
        for choice in ("round", "decided", "complement", "random")
    }
    assert max(means.values()) - min(means.values()) < 0.02
    assert min(means.values()) > 0.15


# --- the real parts ----------------------------------------------------------------------------------

START = V  # the prompt; the block of a student is the start token and LENGTH words
STUDENT_ORDERS = {"left to right": {"block_length": 1}, "random": {}}


def real_teacher(seed):
    """A random AR model over V words, and its joint (Z,) behind the start token."""
    model = tiny.tiny_model("llama", V + 3, layers=1, hidden=16, seed=seed)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2)
    slow: Callable = cut_teacher(tiny.next_log_probs(model), V)
    return ar_teacher(model, V), slow, ar_log_joint(slow, LENGTH, V, [START])[1].exp()


def real_student(seed):
    """An untaught model that writes words alone: no end, no padding."""
    student = random_student(
        num_words=V, block_size=LENGTH + 1, layers=2, hidden=32, seed=100 + seed
    )
    student.never_sampled = torch.arange(V, V + 4)
    return student


@torch.no_grad()
def table_of(student):
    """(S, n, V) what it says in every state."""
    state_Sn = states_of(V, LENGTH)
    xt_SL = torch.cat([torch.full((len(state_Sn), 1), START), state_Sn], dim=1)
    xt_SL[:, 1:][state_Sn == V] = student.mask_id
    wanted_SL = xt_SL == student.mask_id
    p_SLV = torch.zeros(*xt_SL.shape, V, dtype=torch.float64)
    p_SLV[wanted_SL] = student(xt_SL, wanted_SL, x0_bL=xt_SL)[:, :V].double().softmax(-1)
    return p_SLV[:, 1:]


def train(student, teacher, kind, order, *, seed, steps, rows, rate=5e-3, lasts=4):
    """Training on rollouts of its own, all states of each."""
    settings = OnPolicySettings(
        fraction=1.0,
        threshold=None,
        remasking="random",
        length=LENGTH,
        states="all",
        **STUDENT_ORDERS[order],
    )
    objective = on_rollouts(ObjectiveSettings(tail="renormalise"))  # all V words are kept
    limits = {} if kind == "left" else {"block": LENGTH + 1, "window": 0}
    asked = TargetSettings(kind=kind, candidates=V, fills=16, **limits)
    optimizer = torch.optim.AdamW(student.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    student.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 10, 2 * (1 - step / steps))
        if step % lasts == 0:
            rollouts = roll_out(
                student,
                [[START]] * rows,
                settings.sampler,
                length=LENGTH,
                keys=[("rollout", seed, step, row) for row in range(rows)],
                decode_rows=rows,
            )
        batch = state_batch(
            settings,
            objective,
            rollouts,
            mask_id=student.mask_id,
            eos_id=student.vocab.eos_id,
            pad_id=student.vocab.pad_id,
            seed=seed,
            step=step,
            samples=range(rows),
            samples_per_step=rows,
            block_size=LENGTH + 1,
        )
        targets = soft_targets(teacher, batch, asked, 1.0, student)
        loss = loss_sums(student, batch, targets, objective)[1] / batch.kd_denominator
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return student.eval()


def distance(student, joint_Z, order):
    """TV of what this student writes, by enumeration."""
    return total_variation(sampled_joint(table_of(student), DECODING[order]), joint_Z)


def real_distances(seed, *, steps=160):
    """TV to the teacher by (target, order), and what enumeration predicts for left-only targets.

    The right-aware targets begin where left-only ones have led.
    """
    teacher_, slow, joint_Z = real_teacher(seed)
    left_ZnV = taught(slow, V, LENGTH, "left", [START])
    found = {
        ("predicted", order): learn(start(), DECODING[order], left_ZnV, joint_Z)[1][-1]
        for order in ("left to right", "random")
    }
    for order in ("left to right", "random"):
        student = train(
            real_student(seed), teacher_, "left", order, seed=seed, steps=steps, rows=64
        )
        found["left", order] = distance(student, joint_Z, order)
    begun = {name: value.clone() for name, value in student.state_dict().items()}
    for kind, rows, of_kind in (("suffix", 32, steps), ("smc", 16, steps // 2)):
        student.load_state_dict(begun)
        train(student, teacher_, kind, "random", seed=seed, steps=of_kind, rows=rows)
        found[kind, "random"] = distance(student, joint_Z, "random")
        found[kind, "surest draw"] = distance(student, joint_Z, "surest draw")
    return found


@pytest.mark.slow
def test_real_training_comes_to_the_fixed_points():
    found = real_distances(1)
    assert found["predicted", "left to right"] < EXACT
    assert found["predicted", "random"] == pytest.approx(0.21, abs=0.01)
    assert found["left", "left to right"] < 0.09
    assert found["left", "random"] == pytest.approx(found["predicted", "random"], abs=0.06)
    for kind in ("suffix", "smc"):
        assert found[kind, "random"] < 0.11
        assert found[kind, "random"] < found["left", "random"] - 0.08
        # The same distributions, decoded by the probability of what was drawn.
        assert found[kind, "surest draw"] > found[kind, "random"] + 0.1
