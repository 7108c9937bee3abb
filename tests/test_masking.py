"""The forward process by rows and by blocks: groups, levels, weights, and what each makes of the bound.

The "denoisers" are made-up tables: a cross-entropy for each token and each set of masks of its block.
Where levels and uniforms are replaced by all points of a grid, expectations are sums and exact.
Shapes: B rows, L length, G groups, S tokens of the longest group.
"""

import itertools
import math

import oracles
import pytest
import torch

from mdm.attention import positions
from mdm.diffusion import spread_uniforms
from mdm.train import masking
from mdm.train.masking import (
    block_size_at,
    by_block,
    by_row,
    group_levels,
    mask_batch,
    number_of_chunks,
)
from mdm.train.objective import ObjectiveSettings, loss_meaning
from mdm.train.placement import BY_CHUNK, MaskSettings

MASK = 99
# Two documents of 7 and 5 tokens, whose first is never masked, and padding. Blocks of 3: of the first
# document 2, 3 and 1 maskable tokens, of the second 2 and 2.
IDS = [0] * 7 + [1] * 5 + [-1] * 2
MASKABLE = [False] + [True] * 6 + [False] + [True] * 4 + [False] * 2
BLOCKS = [(1, 2), (3, 4, 5), (6,), (8, 9), (10, 11)]
LEARNT = [1, 2, 3, 4, 5, 6, 8, 9, 10, 11]


def rows(count, ids=IDS, maskable=MASKABLE):
    tokens_BL = torch.arange(len(ids)).repeat(count, 1)
    ids_BL, maskable_BL = torch.tensor([ids] * count), torch.tensor([maskable] * count)
    return tokens_BL, ids_BL, maskable_BL, torch.zeros_like(tokens_BL)


def drawn(
    data, *, block_size=3, samples=None, per_step=None, seed=0, step=0, masks=None, chunk_BL=None,
    **settings,
):  # fmt: skip
    samples = range(len(data[0])) if samples is None else samples
    return mask_batch(
        ObjectiveSettings(**{"noise": "block", **settings}),
        *data,
        masks=masks or MaskSettings(),
        mask_id=MASK,
        seed=seed,
        step=step,
        samples=samples,
        samples_per_step=per_step or len(data[0]),
        block_size=block_size,
        chunk_BL=chunk_BL,
    )


def over_many(function, count, *, per_batch=200, draw=drawn, **settings):
    """(count,) what the function makes of each row of a step that is drawn in micro-batches."""
    parts = []
    for first in range(0, count, per_batch):
        samples = range(first, min(first + per_batch, count))
        parts.append(function(draw(samples=samples, per_step=count, **settings)))
    return torch.cat(parts).double()


def made_up(i, masked):
    """CE of token i where these of its block are masked: all different, and nothing like a model's."""
    return 0.3 + (7 * i + 3 * sum(masked) + 5 * len(masked) ** 2) % 11 / 4


def losses(batch):
    """(b,) Σ w CE of each row, the mean over its copies."""
    found_B = torch.zeros(len(batch.masked_BL), dtype=torch.float64)
    for block in BLOCKS:
        table_GS = torch.zeros(2 ** len(block), len(block), dtype=torch.float64)
        for number in range(2 ** len(block)):
            hidden = frozenset(i for place, i in enumerate(block) if number >> place & 1)
            table_GS[number] = torch.tensor([made_up(i, hidden) * (i in hidden) for i in block])
        masked_Bn = batch.masked_BL[:, list(block)]
        number_B = (masked_Bn * 2 ** torch.arange(len(block))).sum(1)
        found_B += (batch.ce_weight_BL[:, list(block)] * table_GS[number_B]).sum(1)
    return found_B.view(batch.copies, -1).mean(0)


BOUND = oracles.block_bound_of_table(made_up, BLOCKS)


def agrees(value_B, expected, tightness=0.03):
    error = 4 * float(value_B.std()) / math.sqrt(len(value_B))
    assert error < tightness * abs(expected)  # or the next line says nothing
    assert abs(float(value_B.mean()) - expected) < error


# --- groups ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 14, 50])
def test_groups_are_the_blocks_of_documents(block_size):
    ids_BL = torch.tensor([IDS, [0] * 14, [-1] * 14, [0, 1, 2] + [3] * 11])
    groups = by_block(ids_BL, block_size)
    position_BL = positions(ids_BL)
    members = {}
    for b, i in itertools.product(range(4), range(14)):
        start = i - int(position_BL[b, i])
        members.setdefault((b, start, int(position_BL[b, i]) // block_size), []).append((b, i))
    assert len(members) == len(groups.row_G)
    numbers = set()
    for (row, _, _), places in members.items():
        (number,) = {int(groups.number_BL[place]) for place in places}
        assert number not in numbers
        numbers.add(number)
        assert int(groups.row_G[number]) == row
        assert [int(groups.place_BL[place]) for place in places] == list(range(len(places)))
    assert groups.size == min(block_size, 14)


@pytest.mark.parametrize("block_size", [0, 1, 3, 50])
def test_what_is_gathered_can_be_spread_again(block_size):
    ids_BL = torch.tensor([IDS, [0] * 14])
    groups = by_block(ids_BL, block_size) if block_size else by_row(ids_BL)
    value_BL = torch.arange(28).view(2, 14)
    found_GS = groups.gather(value_BL, -7)
    assert groups.spread(found_GS).equal(value_BL)
    assert int((found_GS == -7).sum()) == found_GS.numel() - 28
    own_G1 = torch.arange(len(groups.row_G))[:, None]
    assert groups.spread(own_G1).equal(groups.number_BL)
    if not block_size:
        assert found_GS.equal(value_BL)


# --- noise levels ----------------------------------------------------------------------------------


def levels(step, ids_BL, learnt_BL, *, samples, count, block_size=3, seed=0):
    groups = by_block(ids_BL, block_size) if block_size else by_row(ids_BL)
    learnt_G = groups.gather(learnt_BL).any(1)
    return group_levels(groups, learnt_G, seed, step, samples, count), groups, learnt_G


def test_rows_keep_the_levels_they_always_had():
    _, ids_BL, maskable_BL, _ = rows(4)
    for step, samples in ((0, [0, 1, 2, 3]), (5, [6, 2, 7, 3])):
        found_G, *_ = levels(step, ids_BL, maskable_BL, samples=samples, count=8, block_size=0)
        assert found_G.equal(spread_uniforms("noise level", 0, step, samples, 8))


def test_every_level_is_uniform_by_itself():
    _, ids_BL, maskable_BL, _ = rows(2)
    found = []
    for step in range(1000):
        level_G, _, learnt_G = levels(step, ids_BL, maskable_BL, samples=[0, 3], count=4)
        found.append(level_G[learnt_G])
    level_TG = torch.stack(found)
    assert level_TG.shape == (1000, 10)
    assert float(level_TG.min()) >= 0
    assert float(level_TG.max()) < 1
    for level_T in level_TG.T:
        counts = (level_T * 10).long().bincount(minlength=10)
        assert int((counts - 100).abs().max()) < 5 * math.sqrt(100 * 0.9)
    # Neighbours are not tied to one another by more than their even spread.
    order_TG = level_TG[:, :5].argsort(1)
    assert len(order_TG.unique(dim=0)) == math.factorial(5)
    same = (level_TG[:, :5].argsort(1) == level_TG[:, 5:].argsort(1)).all(1).double().mean()
    assert float(same) < 0.03  # rows have orders of their own: 1 of 120


# Five blocks a row: 4 and 5 have no factor in common, 5 and 5 do.
@pytest.mark.parametrize("count", [4, 5])
def test_blocks_of_a_row_and_rows_of_a_step_cover_the_levels_evenly(count):
    _, ids_BL, maskable_BL, _ = rows(count)
    for step in range(10):
        level_G, groups, learnt_G = levels(
            step, ids_BL, maskable_BL, samples=range(count), count=count
        )
        assert int(learnt_G.sum()) == 5 * count
        for row in range(count):
            own_g = level_G[learnt_G & (groups.row_G == row)].sort().values
            gaps = torch.cat([own_g, own_g[:1] + 1]).diff()
            torch.testing.assert_close(gaps, torch.full((5,), 1 / 5), atol=1e-6, rtol=0)
        gaps = level_G[learnt_G].sort().values.diff()
        even = torch.full((5 * count - 1,), 1 / (5 * count))
        torch.testing.assert_close(gaps, even, atol=1e-6, rtol=0)


def test_blocks_with_nothing_to_learn_take_no_part():
    _, ids_BL, maskable_BL, _ = rows(2)
    maskable_BL[0, :6] = False  # of row 0, three blocks are left
    maskable_BL[1] = False
    level_G, groups, learnt_G = levels(0, ids_BL, maskable_BL, samples=[0, 1], count=2)
    own_g = level_G[learnt_G].sort().values
    assert learnt_G[groups.row_G == 0].sum() == len(own_g) == 3
    torch.testing.assert_close(own_g.diff(), torch.full((2,), 1 / 3), atol=1e-6, rtol=0)
    assert not level_G[~learnt_G].any()
    batch = drawn((*rows(2)[:2], maskable_BL, rows(2)[3]))
    assert not batch.masked_BL[1].any()
    assert batch.ce_weight_BL.isfinite().all()


# --- masks -----------------------------------------------------------------------------------------

FORMS = [
    {"masking": masks, "noise": noise, "complementary": complementary, "min_t": 1e-3}
    for masks, noise, complementary in itertools.product(
        ("rate", "exact"), ("row", "block"), (False, True)
    )
]
CLIPPED = {"masking": "clipped", "min_t": 1e-3}


def said(form):
    return "-".join(str(value) for value in form.values())


@pytest.mark.parametrize("form", [*FORMS, CLIPPED], ids=said)
def test_masks_weights_and_levels_fit_together(form):
    data = rows(300)
    batch = drawn(data, **form)
    tokens_BL, ids_BL, maskable_BL, _ = (t.repeat(batch.copies, 1) for t in data)
    assert batch.copies == (2 if form.get("complementary") else 1)
    assert batch.masked_BL.any(0).tolist() == MASKABLE
    assert batch.xt_BL.equal(tokens_BL.masked_fill(batch.masked_BL, MASK))
    assert batch.x0_BL.equal(tokens_BL)
    assert batch.x0_bL.equal(data[0])
    assert batch.document_ids_BL.equal(ids_BL)
    assert batch.maskable_BL.equal(maskable_BL)
    assert batch.distilled_BL.equal(batch.masked_BL)
    assert (batch.ce_weight_BL > 0).equal(batch.masked_BL)
    assert batch.kd_weight_BL.equal(batch.ce_weight_BL)
    assert batch.denominator == batch.kd_denominator == batch.copies * 300 * 10
    assert batch.num_tokens == 300 * 12
    assert batch.block_size == 3
    assert batch.level_BL.dtype == batch.ce_weight_BL.dtype == torch.float32
    groups = [LEARNT] if form.get("noise") == "row" else BLOCKS
    for group in groups:
        level_Bn = batch.level_BL[:, list(group)]
        assert (level_Bn == level_Bn[:, :1]).all()
        weight_Bn = batch.ce_weight_BL[:, list(group)]
        count_B = batch.masked_BL[:, list(group)].sum(1)
        assert (weight_Bn.amax(1) == weight_Bn.masked_fill(weight_Bn == 0, 1e9).amin(1))[
            count_B > 0
        ].all()
        some_B = count_B > 0
        weight_B = weight_Bn.amax(1)[some_B]
        if form["masking"] == "exact":
            torch.testing.assert_close(level_Bn[:, 0], count_B / len(group))
            whole = len(group) + 1 if form["complementary"] else len(group)
            torch.testing.assert_close(weight_B, whole / count_B[some_B])
        else:
            torch.testing.assert_close(weight_B, 1 / level_Bn[some_B, 0])
    if form.get("noise") == "row":
        assert (batch.level_BL == batch.level_BL[:, :1]).all()
    else:
        assert len(batch.level_BL[0, LEARNT].unique()) > 1


@pytest.mark.parametrize("form", [*FORMS, CLIPPED], ids=said)
def test_masks_depend_on_seed_step_and_sample_alone(form):
    """Not on the other rows of the micro-batch, whatever their documents."""
    data = rows(8)
    whole = drawn(data, per_step=8, kd_positions=2, **form)
    other_ids = torch.tensor([[0] * 14, [0, 1] * 7])
    for samples in ([3], [6, 2], [1, 3, 5, 7]):
        extra = [torch.zeros(2, 14).long(), other_ids, torch.ones(2, 14).bool(), other_ids * 0]
        mixed = [torch.cat([e, t[samples]]) for e, t in zip(extra, data, strict=True)]
        part = drawn(mixed, samples=[0, 4, *samples], per_step=8, kd_positions=2, **form)
        for name in ("xt_BL", "distilled_BL", "ce_weight_BL", "kd_weight_BL", "level_BL"):
            one = getattr(part, name).view(part.copies, -1, 14)[:, 2:]
            other = getattr(whole, name).view(whole.copies, 8, 14)[:, samples]
            assert one.equal(other), name
        assert part.keys[2 : 2 + len(samples)] == tuple((0, 0, sample) for sample in samples)
    again = {at: drawn(data, seed=at[0], step=at[1], **form) for at in ((0, 0), (0, 1), (1, 0))}
    assert again[0, 0].xt_BL.equal(whole.xt_BL)
    assert not again[0, 1].xt_BL.equal(whole.xt_BL)
    assert not again[1, 0].xt_BL.equal(whole.xt_BL)


def test_keys_tell_copies_apart():
    batch = drawn(rows(2), complementary=True, samples=[4, 1], per_step=8, seed=7, step=3)
    assert batch.keys == ((7, 3, 4), (7, 3, 1), (7, 3, 4, 1), (7, 3, 1, 1))
    assert len(set(batch.keys)) == 4


def test_rows_are_those_of_every_copy():
    settings = ObjectiveSettings(complementary=True)
    batch = mask_batch(
        settings, *rows(2), masks=MaskSettings(), mask_id=MASK, seed=0, step=0, samples=[0, 1],
        samples_per_step=2, rows=[31, 17],
    )  # fmt: skip
    assert batch.rows == (31, 17, 31, 17)
    assert (batch.block_size, batch.copies) == (0, 2)


# --- the bound -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS, ids=said)
def test_every_form_of_noise_estimates_the_bound_of_the_blocks(form):
    form = {**form, "min_t": 1e-4}
    agrees(over_many(losses, 6000, data=rows(200), **form), BOUND, tightness=0.08)


@pytest.mark.parametrize("complementary", [False, True])
def test_exact_masks_of_blocks_give_the_bound_by_enumeration(monkeypatch, complementary):
    """Every number of masks, in every order of the tokens: a sum, not an estimate."""
    sizes = [len(block) for block in BLOCKS]
    every = math.lcm(*(size + complementary for size in sizes))
    orders = list(itertools.permutations(range(3)))
    draws = list(itertools.product(range(every), orders))
    uniforms_BL = torch.zeros(len(draws), 14)
    for b, (_, order) in enumerate(draws):
        for block in BLOCKS:
            for place, i in enumerate(block):
                uniforms_BL[b, i] = (order[place] + 0.5) / 3
    level_B = torch.tensor([(number + 0.5) / every for number, _ in draws])

    def at_all_points(groups, learnt_G, *_):
        return torch.where(learnt_G, level_B[groups.row_G], 0.0)

    monkeypatch.setattr(masking, "group_levels", at_all_points)
    monkeypatch.setattr(masking, "row_uniforms", lambda name, **_: uniforms_BL)
    batch = drawn(rows(len(draws)), masking="exact", complementary=complementary)
    assert float(losses(batch).mean()) == pytest.approx(BOUND, rel=1e-6)


@pytest.mark.parametrize("masks", [MaskSettings(where="tilted"), MaskSettings(where="weighted")])
def test_places_work_within_blocks(masks):
    data = list(rows(200))
    data[3] = torch.tensor([[0, 1, 2, 3] * 3 + [0, 0]] * 200)
    batch = drawn(data, masks=masks)
    assert not (batch.masked_BL & ~batch.maskable_BL).any()
    if masks.where == "tilted":
        agrees(over_many(losses, 4000, data=data, masks=masks, min_t=1e-3), BOUND, tightness=0.05)
        for block in BLOCKS:  # no block is wasted
            assert batch.masked_BL[:, list(block)].any(1).all()


def test_a_mean_over_masks_is_not_the_bound():
    batch = drawn(rows(1000), masking="exact", weight="mean_masked")
    assert batch.ce_weight_BL.equal(batch.masked_BL.float())
    assert batch.denominator == int(batch.masked_BL.sum())
    found = float(losses(batch).sum()) / batch.denominator
    assert abs(found - BOUND / 10) > 0.1


# --- clipped ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 2, 3, 8])
def test_clipped_masks_one_token_of_every_block_at_least(block_size):
    batch = drawn(rows(300), block_size=block_size, masking="clipped")
    groups = by_block(torch.tensor([IDS] * 300), block_size)
    masked_G = groups.gather(batch.masked_BL).any(1)
    assert masked_G.equal(groups.gather(batch.maskable_BL).any(1))
    assert float(batch.level_BL[:, LEARNT].min()) >= 1 / block_size
    assert float(batch.level_BL[:, LEARNT].min()) < 1 / block_size + 0.02
    assert float(batch.ce_weight_BL.max()) <= block_size * (1 + 1e-6)
    assert float(batch.level_BL.max()) <= 1


def test_clipped_levels_keep_to_min_t_too():
    batch = drawn(rows(500), block_size=8, masking="clipped", min_t=0.6)
    assert 0.6 <= float(batch.level_BL[:, LEARNT].min()) < 0.61


def test_clipped_is_no_bound():
    """Already a constant cross-entropy counts too often: in a block of two, 2 + E (1-t)² / t times."""

    def total(maskable, block_size):
        data = rows(200, [0] * len(maskable), maskable)
        options = {"data": data, "block_size": block_size, "masking": "clipped"}
        return over_many(lambda batch: batch.ce_weight_BL.sum(1), 4000, **options)

    agrees(total([True, True], 2), 2 + 2 * (math.log(2) - 0.625))
    # The only token of a block is always masked, and counts E 1/t with t in [1/B, 1].
    agrees(total([False, True], 2), 2 * math.log(2))
    assert total([False, True, True], 1).eq(2).all()  # one token a block: the exact likelihood
    assert loss_meaning(ObjectiveSettings(**CLIPPED, noise="block"), MaskSettings()).startswith(
        "no likelihood bound"
    )


# --- complements -----------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["row", "block"])
@pytest.mark.parametrize("form", ["rate", "exact"])
def test_complements_mask_what_the_other_does_not(form, noise):
    batch = drawn(rows(200), masking=form, noise=noise, complementary=True)
    one_bL, other_bL = batch.masked_BL.chunk(2)
    assert not (one_bL & other_bL).any()
    assert (one_bL | other_bL).equal(batch.maskable_BL[:200])
    one_bL, other_bL = batch.level_BL[:, LEARNT].chunk(2)
    torch.testing.assert_close(one_bL + other_bL, torch.ones(200, 10))
    if form == "rate":
        assert float(batch.level_BL[:, LEARNT].min()) >= 0.01 - 1e-6  # in both
    else:  # nothing and everything is masked as often as any other number
        blocks = [LEARNT] if noise == "row" else BLOCKS
        for block in blocks:
            count_B = batch.masked_BL[:, list(block)].sum(1)
            assert set(count_B.tolist()) == set(range(len(block) + 1))


def test_a_complement_has_a_choice_of_its_own():
    batch = drawn(rows(300), masking="exact", complementary=True, kd_positions=2)
    assert batch.distilled_BL.sum(1).equal(batch.masked_BL.sum(1).clamp(max=2))
    assert not (batch.distilled_BL & ~batch.masked_BL).any()
    count_B1 = batch.masked_BL.sum(1, keepdim=True)
    expected_BL = batch.ce_weight_BL * (count_B1 / 2).clamp(min=1)
    torch.testing.assert_close(batch.kd_weight_BL, expected_BL * batch.distilled_BL)


# --- how distillation is weighed -------------------------------------------------------------------


@pytest.mark.parametrize("weight", ["bound", "mean_masked"])
@pytest.mark.parametrize("kd_positions", [0, 2])
def test_a_plain_mean_of_distillation(weight, kd_positions):
    """Whatever the cross-entropy is; a chosen subset still counts for all masks."""
    form = {"masking": "exact", "weight": weight, "kd_positions": kd_positions}
    same = drawn(rows(500), **form)
    mean = drawn(rows(500), kd_reduce="mean_masked", **form)
    assert mean.ce_weight_BL.equal(same.ce_weight_BL)
    assert mean.denominator == same.denominator
    assert mean.kd_denominator == int(mean.masked_BL.sum())
    assert same.kd_denominator == same.denominator
    if not kd_positions:
        assert mean.kd_weight_BL.equal(mean.masked_BL.float())
    else:
        # Of a row's m masks two stand for all: their weights sum to m.
        torch.testing.assert_close(mean.kd_weight_BL.sum(1), mean.masked_BL.sum(1).float())


# --- chunks ----------------------------------------------------------------------------------------

#             start 0  0   1   1  1  -1   start  2 -1  3  3   padding
CHUNK_L = [-1, 0, 0, 1, 1, 1, -1, -1, 2, -1, 3, 3, -1, -1]
SIZES = {1: 2, 2: 2, 3: 3, 4: 3, 5: 3, 6: 1, 8: 1, 9: 1, 10: 2, 11: 2}


def chunked(count, where, **settings):
    chunk_L = torch.tensor(CHUNK_L)
    chunk_BL = torch.where(chunk_L < 0, -1, chunk_L + 4 * torch.arange(count)[:, None])
    settings = {"noise": "row", "min_t": 1e-3, "block_size": 0, **settings}
    return drawn(rows(count), masks=MaskSettings(where=where), chunk_BL=chunk_BL, **settings)


@pytest.mark.parametrize("where", BY_CHUNK)
def test_chunks_are_masked_whole(where):
    batch = chunked(500, where)
    for group in ((1, 2), (3, 4, 5), (10, 11)):
        masked_Bn = batch.masked_BL[:, list(group)]
        assert (masked_Bn == masked_Bn[:, :1]).all()
        weight_Bn = batch.ce_weight_BL[:, list(group)]
        assert (weight_Bn == weight_Bn[:, :1]).all()
        assert 0 < int(masked_Bn[:, 0].sum()) < 500
    assert batch.masked_BL.any(0).tolist() == MASKABLE
    # Chunks are apart: of any two each is masked without the other.
    for one, other in itertools.permutations([1, 3, 6, 8, 9, 10], 2):
        assert (batch.masked_BL[:, one] & ~batch.masked_BL[:, other]).any()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("where", BY_CHUNK)
def test_expected_weight_of_a_token_in_a_chunk(where, schedule):
    """1 with a uniform for a chunk or the corrected weight; H_n as published."""
    batch = chunked(6000, where, schedule=schedule)
    for i, size in SIZES.items():
        expected = 1.0
        if where == "chunks_published" and schedule == "linear":
            expected = sum(1 / k for k in range(1, size + 1))
        elif where == "chunks_published":
            continue
        agrees(batch.ce_weight_BL[:, i].double(), expected, tightness=0.3)
    assert batch.denominator == 6000 * 10


@pytest.mark.parametrize("where", BY_CHUNK)
def test_a_token_that_is_not_learnt_is_never_masked(where):
    """Not even in a chunk with one that is; and the others do not wait for it."""
    ids, maskable = [0] * 4, [False, False, True, True]
    chunk_BL = torch.tensor([[-1, 0, 0, -1]] * 300)
    chunk_BL = torch.where(chunk_BL < 0, -1, torch.arange(300)[:, None])
    batch = drawn(
        rows(300, ids, maskable), noise="row", block_size=0, chunk_BL=chunk_BL,
        masks=MaskSettings(where=where),
    )  # fmt: skip
    assert batch.masked_BL.any(0).tolist() == maskable
    assert batch.ce_weight_BL.isfinite().all()


@pytest.mark.parametrize("where", BY_CHUNK)
def test_a_mean_over_chunks(where):
    """The denominator of distillation counts chunks; that of the cross-entropy does not change."""
    batch = chunked(200, where, kd_reduce="mean_masked")
    hidden = {
        (b, chunk)
        for b, row in enumerate(batch.masked_BL.tolist())
        for chunk, masked in zip(CHUNK_L, row, strict=True)
        if masked and chunk >= 0
    }
    assert batch.kd_denominator == len(hidden)
    assert batch.kd_weight_BL.equal(batch.masked_BL.float())
    assert batch.denominator == 200 * 10
    assert number_of_chunks(torch.tensor([-1, 5, 5, 3, -1])) == 2
    assert number_of_chunks(torch.tensor([-1]).long()) == 0
    assert number_of_chunks(torch.empty(0).long()) == 0


def test_chunks_of_a_micro_batch_are_masked_by_row():
    """Their numbers differ between micro-batches; the masks do not."""
    for where in BY_CHUNK:
        whole = chunked(6, where)
        chunk_BL = torch.where(torch.tensor(CHUNK_L) < 0, -1, torch.tensor(CHUNK_L)).repeat(1, 1)
        part = drawn(
            rows(1), samples=[4], per_step=6, masks=MaskSettings(where=where), chunk_BL=chunk_BL,
            noise="row", min_t=1e-3, block_size=0,
        )  # fmt: skip
        assert part.xt_BL.equal(whole.xt_BL[4:5])
        assert part.ce_weight_BL.equal(whole.ce_weight_BL[4:5])


# --- the rest --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("final", "first", "steps", "expected"),
    [
        (8, 2, 6, [2, 2, 4, 4, 8, 8, 8]),
        (32, 4, 7, [4, 4, 8, 8, 16, 16, 32, 32]),
        (6, 3, 2, [3, 6, 6]),
        (4, 1, 2, [1, 2, 4]),  # fewer steps than sizes: some are left out
        (4, 0, 0, [4, 4]),
        (4, 4, 3, [4, 4, 4, 4]),
    ],
)
def test_block_size_grows_by_doubling(final, first, steps, expected):
    assert [block_size_at(final, first, steps, step) for step in range(len(expected))] == expected


def test_noise_by_blocks_needs_blocks():
    with pytest.raises(AssertionError, match="noise by blocks needs blocks"):
        drawn(rows(1), block_size=0)


def test_the_same_on_another_device():
    batch = chunked(3, "chunks")
    moved = batch.to(torch.device("meta"))
    assert moved.xt_BL.device.type == moved.chunk_BL.device.type == "meta"
    assert moved.share_BL is None
    assert (moved.keys, moved.copies, moved.denominator) == (batch.keys, 1, batch.denominator)
