"""States of rollouts against what the step at which each token was decided says, block by block.

Rollouts are made up: of a prompt, blocks whose tokens were decided in steps of their own, and an end or
none. Shapes: B rows, L length, b rollouts.
"""

import dataclasses
import itertools
import math
from collections import Counter
from fractions import Fraction

import oracles
import pytest
import torch

from mdm.train.masking import by_block, by_row, mask_batch
from mdm.train.objective import ObjectiveSettings
from mdm.train.on_policy import OnPolicySettings
from mdm.train.placement import MaskSettings
from mdm.train.rollouts import Rollout
from mdm.train.states import EOS_RULES, GIVEN, NEVER, STATES, masked_before, state_batch, steps_of
from mdm.train.weighting import OTHER

EOS, PAD, MASK = 13, 14, 15
RULES = sorted(EOS_RULES)
BY_STEPS = [name for name, made in STATES.items() if made is not None]


def rollout(tokens, steps):
    decided = sum(step not in (GIVEN, NEVER) for step in steps)
    ended = any(t == EOS and s != GIVEN for t, s in zip(tokens, steps, strict=True))
    return Rollout(torch.tensor(tokens), torch.tensor(steps), ended, decided, decided, -1.0)


def made_up(seed, *, block_size=4, prompt=3, length=9, ends_at=None):
    """A rollout as the sampler makes them: blocks in turn, several tokens a step, cut behind its end."""
    random = torch.Generator().manual_seed(seed)
    total = prompt + length
    if block_size:
        total = -(-total // block_size) * block_size
    tokens = torch.randint(0, 12, (total,), generator=random).tolist()
    steps, now = [GIVEN] * prompt + [NEVER] * (total - prompt), 0
    for block in oracles.row_blocks(total, block_size):
        left = [i for i in block if i >= prompt]
        order = [left[i] for i in torch.randperm(len(left), generator=random)]
        while order:
            count = int(torch.randint(1, 4, (), generator=random))
            for i in order[:count]:
                steps[i] = now
            order, now = order[count:], now + 1
        if ends_at is not None and prompt + ends_at in block:
            # Over once no mask stands before the end token; what is open then stays undecided.
            end = prompt + ends_at
            tokens[end] = EOS
            over = max(steps[i] for i in left if i <= end)
            steps = [NEVER if step > over else step for step in steps]
            tokens = [EOS if step == NEVER else t for t, step in zip(tokens, steps, strict=True)]
            stop = block[-1] + 1 if block_size else total
            return rollout(tokens[:stop], steps[:stop])
    return rollout(tokens, steps)


def states(
    rollouts,
    *,
    block_size=4,
    samples=None,
    seed=0,
    step=0,
    objective=None,
    per_step=None,
    **settings,
):
    samples = list(range(len(rollouts))) if samples is None else samples
    return state_batch(
        OnPolicySettings(fraction=1, **settings),
        objective or ObjectiveSettings(),
        rollouts,
        mask_id=MASK,
        eos_id=EOS,
        pad_id=PAD,
        seed=seed,
        step=step,
        samples=samples,
        samples_per_step=per_step or 10_000,
        block_size=block_size,
    )


def definition(found, block_size):
    """The states of each block that has any: (positions, states)."""
    steps = found.step_L.tolist()
    blocks = oracles.row_blocks(len(steps), block_size)
    pairs = [(block, oracles.block_states(steps, block, GIVEN, NEVER)) for block in blocks]
    return [(block, own) for block, own in pairs if own]


def end_of(found, rule):
    return oracles.rollout_end(found.tokens_L.tolist(), found.step_L.tolist(), EOS, rule, GIVEN)


def places(flag_L):
    return frozenset(i for i, flag in enumerate(flag_L.tolist()) if flag)


def chi2_allows(counts, probabilities):
    total = sum(counts.values())
    assert set(counts) <= set(probabilities)
    chi2 = sum(
        (counts[key] - total * float(p)) ** 2 / (total * float(p))
        for key, p in probabilities.items()
    )
    freedom = len(probabilities) - 1
    return chi2 <= freedom + 4.5 * math.sqrt(2 * freedom)


SHAPES = {
    "in the middle of a block": {"prompt": 3, "length": 10},
    "whole blocks": {"prompt": 4, "length": 8},
    "start alone": {"prompt": 1, "length": 7},
    # With a token decided behind the end and one that never was.
    "ended": {"prompt": 2, "length": 13, "ends_at": 7, "seed": 49},
    "ended at once": {"prompt": 5, "length": 9, "ends_at": 0},
    "ended at the end of a block": {"prompt": 2, "length": 13, "ends_at": 5},
    "one token": {"prompt": 3, "length": 1},
    "an end token alone": {"prompt": 3, "length": 1, "ends_at": 0},
}
ROLLOUTS = {
    (name, block_size): made_up(**{"seed": number, "block_size": block_size, **shape})
    for number, (name, shape) in enumerate(SHAPES.items())
    for block_size in (0, 1, 4)
}


def of_size(block_size):
    return [made for (_, size), made in ROLLOUTS.items() if size == block_size]


def test_the_made_up_rollouts_have_what_is_to_be_tested():
    for block_size in (0, 4):
        ended = ROLLOUTS["ended", block_size]
        behind = ended.step_L[int((ended.tokens_L == EOS).nonzero()[0]) + 1 :].tolist()
        assert NEVER in behind
        assert set(behind) - {NEVER}
        assert len(definition(ended, block_size)[-1][1]) > 1
    assert len(definition(ROLLOUTS["ended", 4], 4)) == 3
    assert len(ROLLOUTS["ended at once", 4].step_L) == 8


# --- which steps, and masks before one -------------------------------------------------------------


@pytest.mark.parametrize("block_size", [0, 1, 4])
def test_steps_of_a_block_are_its_distinct_ones(block_size):
    for found in of_size(block_size):
        step_bL = found.step_L[None]
        ids_bL = torch.zeros_like(step_bL)
        groups = by_block(ids_bL, block_size) if block_size else by_row(ids_bL)
        steps_GS, count_G = steps_of(groups, step_bL)
        blocks = oracles.row_blocks(len(found.step_L), block_size)
        assert len(blocks) == len(steps_GS)
        for block, steps_S, count in zip(blocks, steps_GS.tolist(), count_G.tolist(), strict=True):
            own = sorted({int(found.step_L[i]) for i in block} - {GIVEN, NEVER})
            assert steps_S == own + [NEVER] * (groups.size - len(own))
            assert count == len(own)


@pytest.mark.parametrize("block_size", [0, 1, 4])
def test_masks_before_a_step_are_those_of_the_definition_and_nested(block_size):
    for found in of_size(block_size):
        step_bL = found.step_L[None]
        ids_bL = torch.zeros_like(step_bL)
        groups = by_block(ids_bL, block_size) if block_size else by_row(ids_bL)
        for block, own in definition(found, block_size):
            when = sorted({int(found.step_L[i]) for i in block} - {GIVEN, NEVER})
            masks = [
                places(masked_before(groups, step_bL, torch.full((len(groups.row_G),), s))[0])
                & set(block)
                for s in when
            ]
            assert masks == own
            assert all(later < earlier for earlier, later in itertools.pairwise(masks))
            assert masks[0] == {i for i in block if int(found.step_L[i]) != GIVEN}
            assert all(masks)


# --- round -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [0, 1, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_every_state_is_as_likely_whatever_the_other_blocks_are_in(name, block_size):
    """By distinct steps: not by how many tokens they decided, nor by the time that has passed."""
    found = ROLLOUTS[name, block_size]
    batch = states([found] * 1000, block_size=block_size, states="round")
    assert batch.copies == 1
    blocks = definition(found, block_size)
    seen = [[places(row_L) & set(block) for row_L in batch.masked_BL] for block, _ in blocks]
    for (_, own), masks in zip(blocks, seen, strict=True):
        assert chi2_allows(Counter(masks), {state: Fraction(1, len(own)) for state in own})
    for one, other in itertools.combinations(range(len(blocks)), 2):
        first, second = blocks[one][1], blocks[other][1]
        pairs = {
            pair: Fraction(1, len(first) * len(second)) for pair in itertools.product(first, second)
        }
        assert chi2_allows(Counter(zip(seen[one], seen[other], strict=True)), pairs)
    # Nothing is masked that is in no block with states.
    assert not batch.masked_BL[:, found.step_L == GIVEN].any()


def test_states_are_functions_of_seed_step_and_sample():
    found = made_up(3, length=21)
    key = {"seed": 2, "step": 5, "samples": [7, 8]}
    once, again = (states([found] * 2, **key) for _ in range(2))
    assert once.masked_BL.equal(again.masked_BL)
    assert not once.masked_BL[0].equal(once.masked_BL[1])
    for other in ({"seed": 3}, {"step": 6}, {"samples": [9, 10]}):
        assert not once.masked_BL.equal(states([found] * 2, **{**key, **other}).masked_BL)
    # A row of other text in the same place has other random numbers.
    assert once.keys == ((2, -6, 7), (2, -6, 8))


@pytest.mark.parametrize("block_size", [0, 4])
@pytest.mark.parametrize("kd_positions", [0, 2])
@pytest.mark.parametrize("form", BY_STEPS)
def test_states_do_not_depend_on_the_other_rows(form, kd_positions, block_size):
    all_rows = [*of_size(block_size), made_up(2, block_size=block_size, length=60)]
    objective = ObjectiveSettings(kd_positions=kd_positions)
    whole = states(all_rows, block_size=block_size, states=form, objective=objective)
    for row, found in enumerate(all_rows):
        length = len(found.tokens_L)
        alone = states(
            [found], samples=[row], block_size=block_size, states=form, objective=objective
        )
        for name in ("masked_BL", "kd_weight_BL", "distilled_BL", "xt_BL", "x0_BL", "level_BL"):
            own, among = getattr(alone, name), getattr(whole, name)[row :: len(all_rows), :length]
            assert own.equal(among[: alone.copies]), name
        # `all` has the copies that one of the rows needs; they weigh nothing in the others.
        assert not whole.kd_weight_BL[row :: len(all_rows)][alone.copies :].any()
        assert form == "all" or alone.copies == whole.copies


def test_a_block_does_not_depend_on_other_blocks():
    """Other steps and other tokens there: the same masks here, which are those of the same key."""
    found = made_up(1, prompt=2, length=14)
    own = slice(4, 8)
    other_steps = torch.where(found.step_L == GIVEN, GIVEN, 100 - found.step_L)
    other_steps[own] = found.step_L[own]
    other_tokens = (found.tokens_L + 5) % 12
    other_tokens[own] = found.tokens_L[own]
    changed = dataclasses.replace(found, tokens_L=other_tokens, step_L=other_steps)
    for form in BY_STEPS:
        one, two = (states([made] * 50, states=form) for made in (found, changed))
        size = min(one.copies, two.copies) * 50
        assert one.masked_BL[:size, own].equal(two.masked_BL[:size, own]), form
        assert one.xt_BL[:size, own].equal(two.xt_BL[:size, own]), form
    assert not states([found] * 50).masked_BL.equal(states([changed] * 50).masked_BL)


# --- all and complement ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("block_size", [0, 1, 4])
def test_all_states_weigh_what_is_expected_of_one(block_size, rule):
    rollouts = of_size(block_size)
    batch = states(rollouts, block_size=block_size, states="all", eos=rule)
    total = Fraction(0)
    for row, found in enumerate(rollouts):
        length = len(found.tokens_L)
        masked_CL = batch.masked_BL[row :: len(rollouts)]
        weight_CL = batch.kd_weight_BL[row :: len(rollouts)]
        share = oracles.masked_share(found.step_L.tolist(), block_size, GIVEN, NEVER)
        learnt = end_of(found, rule).learnt
        expected_L = torch.zeros(masked_CL.shape[1])
        for i in learnt:
            expected_L[i] = float(share[i])
            total += share[i]
        torch.testing.assert_close(weight_CL.sum(0), expected_L)
        for block, own in definition(found, block_size):
            masks = [places(row_L[:length]) & set(block) for row_L in masked_CL]
            # Each once, and the finished block in the copies that are left.
            assert masks[: len(own)] == own
            assert not any(masks[len(own) :])
            for copy, mask in enumerate(masks):
                for i in block:
                    counts = i in mask and i in learnt
                    assert float(weight_CL[copy, i]) == pytest.approx(counts / len(own))
    assert batch.copies == max(
        len(own) for found in rollouts for _, own in definition(found, block_size)
    )
    assert batch.denominator == batch.kd_denominator == pytest.approx(float(total))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("block_size", [0, 4])
def test_one_round_has_the_weights_of_all_on_average(block_size, rule):
    found = ROLLOUTS["ended", block_size]
    one = states([found] * 4000, block_size=block_size, eos=rule)
    every = states([found], block_size=block_size, states="all", eos=rule)
    mean_L, expected_L = one.kd_weight_BL.mean(0), every.kd_weight_BL.sum(0)
    assert float((mean_L - expected_L).abs().max()) < 4 * 0.5 / math.sqrt(4000)
    # A weight is 1 or nothing.
    assert one.kd_weight_BL.equal((one.masked_BL & (expected_L > 0)).float())
    assert one.kd_denominator == float(one.kd_weight_BL.sum())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("block_size", [0, 1, 4])
def test_the_complement_masks_what_was_not(block_size, rule):
    rollouts = of_size(block_size) * 20
    once = states(rollouts, block_size=block_size, eos=rule)
    twice = states(rollouts, block_size=block_size, states="complement", eos=rule)
    first_bL, second_bL = twice.masked_BL.chunk(2)
    assert twice.copies == 2
    assert first_bL.equal(once.masked_BL)
    for row, found in enumerate(rollouts):
        written = places(found.step_L != GIVEN)
        assert places(first_bL[row]) | places(second_bL[row]) == written
        assert not places(first_bL[row]) & places(second_bL[row])
        learnt = end_of(found, rule).learnt
        weight_CL = twice.kd_weight_BL[row :: len(rollouts)]
        assert places(weight_CL.sum(0)) == learnt
        assert set(weight_CL.sum(0).tolist()) <= {0.0, 1.0}
    assert twice.keys == once.keys + tuple((*key, 1) for key in once.keys)
    assert len(set(twice.keys)) == len(twice.keys)


# --- ends ------------------------------------------------------------------------------------------

#            prompt          | block of 4 with the end in it   decided behind the end, and not
TOKENS = [12, EOS, 3, EOS, 5, 6, 7, 8, 9, EOS, 4, EOS]
STEPS = [GIVEN, GIVEN, GIVEN, GIVEN, 0, 0, 1, 2, 3, 4, 3, NEVER]
LATE = [EOS, EOS, EOS]
TEXT = [*TOKENS[:9], *LATE]


@pytest.mark.parametrize(
    ("rule", "learnt", "asked"),
    [
        ("padded", range(4, 12), range(4, 10)),
        ("learnt", range(4, 10), range(4, 10)),
        ("published", range(4, 9), range(4, 9)),
    ],
)
@pytest.mark.parametrize("block_size", [0, 4])
def test_the_end_of_a_text(block_size, rule, learnt, asked):
    """End tokens of a prompt (a chat's) are none; what was decided behind the end is seen as it was."""
    found = rollout(TOKENS, STEPS)
    assert end_of(found, rule) == (frozenset(learnt), frozenset(asked), TEXT)
    batch = states([found] * 60, block_size=block_size, eos=rule)
    assert batch.x0_BL.tolist() == [TEXT] * 60
    assert batch.maskable_BL.tolist() == [[False] * 4 + [True] * 8] * 60
    tokens_BL = torch.tensor([TOKENS] * 60)
    assert batch.xt_BL.equal(torch.where(batch.masked_BL, MASK, tokens_BL))
    # Token 4, behind the end, is shown where it had been decided.
    shown = {(int(batch.xt_BL[row, 9]), int(batch.xt_BL[row, 10])) for row in range(60)}
    assert shown == {(MASK, MASK), (MASK, 4)}
    assert places(batch.kd_weight_BL.sum(0)) == set(learnt)
    assert batch.distilled_BL.equal(batch.masked_BL & torch.tensor([i in asked for i in range(12)]))
    # A token that was never decided is masked in every state.
    assert batch.masked_BL[:, 11].all()
    assert not batch.ce_weight_BL.any()
    assert batch.own_text


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("block_size", [0, 1, 4])
@pytest.mark.parametrize("form", BY_STEPS)
def test_what_is_learnt_and_where_the_teacher_is_asked(form, block_size, rule):
    rollouts = of_size(block_size)
    batch = states(rollouts, block_size=block_size, states=form, eos=rule)
    length = batch.x0_BL.shape[1]
    for row, found in enumerate(rollouts):
        learnt, asked, text = end_of(found, rule)
        padding = length - len(text)
        for copy in range(batch.copies):
            at = copy * len(rollouts) + row
            masked = places(batch.masked_BL[at])
            assert places(batch.kd_weight_BL[at]) == masked & learnt
            assert places(batch.distilled_BL[at]) == masked & asked
            assert batch.x0_BL[at].tolist() == text + [PAD] * padding
            seen = [MASK if i in masked else t for i, t in enumerate(found.tokens_L.tolist())]
            assert batch.xt_BL[at].tolist() == seen + [PAD] * padding
            assert batch.document_ids_BL[at].tolist() == [0] * len(text) + [-1] * padding
            written = places(found.step_L != GIVEN)
            assert places(batch.maskable_BL[at]) == written
            for block in oracles.row_blocks(len(text), block_size):
                level_n = batch.level_BL[at, block]
                share = len(masked & set(block)) / max(1, len(written & set(block)))
                assert level_n.tolist() == pytest.approx([share] * len(block))
    assert batch.x0_bL.equal(batch.x0_BL[: len(rollouts)])
    assert batch.block_size == block_size
    assert batch.num_tokens == sum(len(found.tokens_L) for found in rollouts)
    assert batch.kd_denominator == batch.denominator
    assert batch.kd_denominator == pytest.approx(float(batch.kd_weight_BL.sum()))


def test_an_end_token_alone():
    """The shortest rollout there is: the prompt fills its block but for one token."""
    found = rollout([12, 1, 2, EOS], [GIVEN, GIVEN, GIVEN, 0])
    for form, rule in itertools.product(BY_STEPS, RULES):
        batch = states([found], states=form, eos=rule)
        counts = rule != "published"
        assert batch.kd_weight_BL.sum(0).tolist() == [0, 0, 0, counts]
        assert batch.distilled_BL.sum(0).tolist() == [0, 0, 0, counts]
        assert batch.kd_denominator == counts
        assert batch.xt_BL[0].tolist() == [12, 1, 2, MASK]
    assert states([found], states="complement").xt_BL[1].tolist() == found.tokens_L.tolist()


def test_rollouts_stay_as_they_are():
    before = {key: (r.tokens_L.clone(), r.step_L.clone()) for key, r in ROLLOUTS.items()}
    for form in STATES:
        for rule in RULES:
            states(of_size(4), states=form, eos=rule)
    for key, (tokens_L, step_L) in before.items():
        assert ROLLOUTS[key].tokens_L.equal(tokens_L)
        assert ROLLOUTS[key].step_L.equal(step_L)


# --- masks by the objective ------------------------------------------------------------------------

OBJECTIVES = {
    "rate": {},
    "exact": {"masking": "exact"},
    "plain mean": {"weight": "mean_masked"},
    "plain mean of distillation": {"kd_reduce": "mean_masked"},
    "complement": {"masking": "exact", "complementary": True},
    "some": {"kd_positions": 2},
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("noise", ["row", "block"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_random_masks_are_those_of_other_text(name, noise, rule):
    objective = ObjectiveSettings(noise=noise, **OBJECTIVES[name])
    rollouts = of_size(4) * 5
    samples = [3 * row + 1 for row in range(len(rollouts))]
    batch = states(
        rollouts, states="random", eos=rule, objective=objective, seed=4, step=6, samples=samples,
        per_step=200,
    )  # fmt: skip
    length = max(len(found.tokens_L) for found in rollouts)
    tokens, ids, maskable, learnt, asked = [], [], [], [], []
    for found in rollouts:
        end = end_of(found, rule)
        padding = length - len(end.text)
        tokens.append(end.text + [PAD] * padding)
        ids.append([0] * len(end.text) + [-1] * padding)
        maskable.append((found.step_L != GIVEN).tolist() + [False] * padding)
        learnt.append([i in end.learnt for i in range(length)])
        asked.append([i in end.asked for i in range(length)])
    plain = mask_batch(
        objective,
        torch.tensor(tokens),
        torch.tensor(ids),
        torch.tensor(maskable),
        torch.full((len(rollouts), length), OTHER, dtype=torch.uint8),
        masks=MaskSettings(),
        mask_id=MASK,
        seed=4,
        step=-7,
        samples=samples,
        samples_per_step=200,
        block_size=4,
    )
    assert batch.copies == plain.copies == 1 + (name == "complement")
    learnt_BL, asked_BL = (torch.tensor(part).repeat(plain.copies, 1) for part in (learnt, asked))
    for field in ("xt_BL", "x0_BL", "masked_BL", "level_BL", "document_ids_BL", "maskable_BL"):
        assert getattr(batch, field).equal(getattr(plain, field)), field
    assert batch.keys == plain.keys
    assert batch.block_size == plain.block_size == 4
    assert batch.kd_weight_BL.equal(plain.kd_weight_BL * learnt_BL)
    assert batch.distilled_BL.equal(plain.distilled_BL & asked_BL)
    assert not batch.ce_weight_BL.any()
    assert batch.own_text
    counted_BL = plain.masked_BL if "mean" in name else plain.maskable_BL
    assert batch.kd_denominator == float((counted_BL & learnt_BL).sum())
    if rule == "padded":
        assert batch.kd_denominator == plain.kd_denominator
    # Behind the end there are masks, too, whatever is learnt there.
    behind_BL = plain.maskable_BL & ~learnt_BL
    assert batch.masked_BL[behind_BL].any() or rule == "padded"


# --- a subset of the positions ---------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("reduce", ["token", "rollout"])
@pytest.mark.parametrize("form", BY_STEPS)
def test_a_subset_counts_as_much_as_all_of_them(form, reduce, rule):
    """k of m learnt positions of a row, uniformly chosen, each counting m / k times."""
    found, count = ROLLOUTS["ended", 4], 1000
    settings = {"states": form, "reduce": reduce, "eos": rule}
    whole = states([found] * count, **settings)
    part = states([found] * count, objective=ObjectiveSettings(kd_positions=2), **settings)
    assert part.masked_BL.equal(whole.masked_BL)
    assert part.kd_denominator == pytest.approx(whole.kd_denominator)
    asked = end_of(found, rule).asked
    chosen_BL = part.kd_weight_BL > 0
    learnt_B = (whole.kd_weight_BL > 0).sum(1)
    assert chosen_BL.sum(1).equal(learnt_B.clamp(max=2))
    assert not (chosen_BL & (whole.kd_weight_BL == 0)).any()
    factor_B1 = (learnt_B / learnt_B.clamp(min=1, max=2))[:, None]
    torch.testing.assert_close(part.kd_weight_BL, whole.kd_weight_BL * chosen_BL * factor_B1)
    asked_L = torch.tensor([i in asked for i in range(len(found.tokens_L))])
    assert part.distilled_BL.equal(chosen_BL & asked_L)
    # By positions: the same on average, in each of the states.
    kinds_KL, kind_B = whole.masked_BL.unique(dim=0, return_inverse=True)
    for kind in range(len(kinds_KL)):
        part_BL, whole_BL = (b.kd_weight_BL[kind_B == kind].double() for b in (part, whole))
        error_L = 4.5 * part_BL.std(0) / math.sqrt(len(part_BL))
        assert ((part_BL.mean(0) - whole_BL.mean(0)).abs() <= error_L + 1e-6).all()


# --- every rollout alike ---------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("block_size", [0, 1, 4])
@pytest.mark.parametrize("form", BY_STEPS)
def test_every_rollout_counts_alike(form, block_size, rule):
    rollouts = of_size(block_size) * 3
    alike = {"block_size": block_size, "states": form, "eos": rule}
    plain, batch = states(rollouts, **alike), states(rollouts, reduce="rollout", **alike)
    assert batch.masked_BL.equal(plain.masked_BL)
    sums_b = batch.kd_weight_BL.view(batch.copies, len(rollouts), -1).sum((0, 2))
    plain_b = plain.kd_weight_BL.view(batch.copies, len(rollouts), -1).sum((0, 2))
    # As published, nothing is left of a text that is nothing but its end, or whose state has no more.
    some_b = plain_b > 0
    torch.testing.assert_close(sums_b, some_b.float())
    assert not some_b.all() if rule == "published" else some_b.all()
    assert batch.kd_denominator == batch.denominator == pytest.approx(float(some_b.sum()))
    # Within a rollout they keep their proportions.
    repeated_B1 = plain_b.clamp(min=1e-6).repeat(batch.copies)[:, None]
    torch.testing.assert_close(batch.kd_weight_BL, plain.kd_weight_BL / repeated_B1)


# --- by rows ---------------------------------------------------------------------------------------


def test_students_without_blocks_are_in_one_state_a_row():
    # Its steps are those of blocks; the row is one group even so.
    found = ROLLOUTS["whole blocks", 4]
    batch = states([found] * 800, block_size=0)
    own = oracles.block_states(found.step_L.tolist(), range(len(found.step_L)), GIVEN, NEVER)
    seen = Counter(places(row_L) for row_L in batch.masked_BL)
    assert chi2_allows(seen, {state: Fraction(1, len(own)) for state in own})
    assert batch.block_size == 0
    assert batch.clean == {}
    level_B1 = batch.masked_BL.sum(1, keepdim=True) / int((found.step_L != GIVEN).sum())
    torch.testing.assert_close(batch.level_BL, level_B1.expand_as(batch.level_BL))
