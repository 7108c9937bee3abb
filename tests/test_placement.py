"""Where masks fall: the law of the masks, and what each makes of the bound, by enumeration.

Uniforms are replaced by all points of a grid where that makes every probability exact. The "denoisers"
are made-up tables: a cross-entropy for every set of masks and every position in it.
Shapes: B draws, L length.
"""

import itertools
import math

import pytest
import torch

from mdm.errors import ConfigError
from mdm.train import placement
from mdm.train.masking import MASKINGS, mask_batch
from mdm.train.objective import ObjectiveSettings
from mdm.train.placement import (
    BY_CHUNK,
    CHOICES,
    PLACES,
    Ground,
    MaskSettings,
    check_masks,
    class_weights,
    counted,
    inclusion,
    span_starts,
)
from mdm.train.weighting import CLASSES

BY_TOKEN = [where for where in PLACES if where not in BY_CHUNK]  # test_masking.py has the others
OTHER, NAME, LITERAL, KEYWORD, OPERATOR, COMMENT = range(6)
FINE = {"masking": "rate", "min_t": 1e-4}
ONE = {"masking": "exact", "kd_lambda": 0.5, "kd_positions": 1}


def ground(c, maskable=None, documents=None, rows=1):
    """Rows with these class weights; 0 = not maskable."""
    c_BL = torch.tensor([c] * rows, dtype=torch.float64)
    maskable_BL = c_BL > 0 if maskable is None else torch.tensor([maskable] * rows)
    ids_BL = torch.zeros_like(c_BL, dtype=torch.long)
    if documents is not None:
        ids_BL[:] = torch.tensor(documents)
    return Ground(maskable_BL, ids_BL, c_BL)


def noise(masking, level, total, rows, **settings):
    """The noise of `rows` rows at one level of [0, 1)."""
    level_B = torch.full((rows,), level, dtype=torch.float64)
    settings = ObjectiveSettings(masking=masking, **settings)
    return MASKINGS[masking](settings, level_B, torch.full((rows,), total), total)


def level_of(share, min_t=0.01):
    """The level at which the linear schedule masks this share."""
    return (share - min_t) / (1 - min_t)


def grid(*axes):
    """All combinations of points: (points, axes)."""
    return torch.tensor(list(itertools.product(*axes)), dtype=torch.float64)


def midpoints(n):
    return [(i + 0.5) / n for i in range(n)]


def law(masked_BL):
    """How often each set of masked positions occurs."""
    sets = [tuple(row.nonzero()[:, 0].tolist()) for row in masked_BL]
    return {one: sets.count(one) / len(sets) for one in set(sets)}


def drawn(masks, classes, *, tokens=None, maskable=None, count=40_000, seed=0, **settings):
    """A batch of `count` draws over one row, through the objective."""
    length = len(classes)
    tokens_BL = torch.tensor([tokens or list(range(length))] * count)
    maskable_BL = torch.tensor([maskable or [True] * length] * count)
    return mask_batch(
        ObjectiveSettings(**{"kd_lambda": 0.0, **settings}),
        tokens_BL,
        torch.zeros_like(tokens_BL),
        maskable_BL,
        torch.tensor([classes] * count),
        masks=masks,
        mask_id=99,
        seed=seed,
        step=0,
        samples=range(count),
        samples_per_step=count,
    )


def made_up_table(length, seed=0):
    """CE_i(M) for each set M (as bits) and position i: far from any real model, all different."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2**length, length, generator=generator, dtype=torch.float64) * 3


def losses(batch, table):
    """(B,) Σ w CE of each draw."""
    length = batch.masked_BL.shape[1]
    bits_B = (batch.masked_BL * 2 ** torch.arange(length)).sum(1)
    return (batch.ce_weight_BL * table[bits_B] * batch.masked_BL).sum(1).double()


def bits(positions):
    return sum(2**i for i in positions)


def uniform_bound(table):
    """Σ_M Σ_{i in M} CE_i(M) / (l C(L, l)): LLaDA's exact-l form."""
    length = table.shape[1]
    return sum(
        float(table[bits(chosen), list(chosen)].sum()) / (size * math.comb(length, size))
        for size in range(1, length + 1)
        for chosen in itertools.combinations(range(length), size)
    )


def order_bound(table, rates):
    """The chain rule over orders drawn one by one in proportion to `rates` (Plackett-Luce)."""
    total = 0.0
    for order in itertools.permutations(range(len(rates))):
        probability, sum_ = 1.0, 0.0
        for place, i in enumerate(order):
            left = order[place:]
            probability *= rates[i] / sum(rates[j] for j in left)
            sum_ += float(table[bits(left), i])
        total += probability * sum_
    return total


def close(value_B, expected, tightness=0.03):
    error = 4 * float(value_B.std()) / math.sqrt(len(value_B))
    assert error < tightness * expected, "too few draws to say anything"
    assert abs(float(value_B.mean()) - expected) < error
    return True


# --- tilted --------------------------------------------------------------------------------------

C = [2.0, 0.0, 1.0, 1.0]  # C = 4; position 1 is not maskable


def test_tilted_by_rate_is_uniform_reweighted_set_by_set():
    uniforms_BL = grid(midpoints(4), [0.0], midpoints(4), midpoints(4), midpoints(4))
    rows = len(uniforms_BL)
    named = {"mask": uniforms_BL[:, :4], "tilt": uniforms_BL[:, 4:]}
    here = noise("rate", level_of(0.25), 3, rows)
    masked_BL, weight_BL = PLACES["tilted"](
        MaskSettings(), here, ground(C, rows=rows), named.__getitem__
    )
    found = law(masked_BL)
    for size in range(4):
        for chosen in itertools.combinations((0, 2, 3), size):
            usual = 0.25**size * 0.75 ** (3 - size)
            tilt = sum(C[i] for i in chosen) / (0.25 * 4)
            assert found.get(chosen, 0.0) == pytest.approx(usual * tilt)
            # Probability times weight is that of uniform masks for every set, so for every denoiser.
            at_B = (masked_BL.sum(1) == size) & masked_BL[:, list(chosen)].all(1)
            assert weight_BL[at_B, 0].tolist() == pytest.approx(
                [4 / tilt if chosen else 0.0] * int(at_B.sum())
            )
    assert () not in found


@pytest.mark.parametrize("count", [1, 2, 3])
def test_tilted_exactly_is_uniform_reweighted_set_by_set(count):
    orders = [list(order) for order in itertools.permutations([0.1, 0.2, 0.3])]
    rows = [[a, 0.0, b, c, aim] for a, b, c in orders for aim in midpoints(4)]
    uniforms_BL = torch.tensor(rows, dtype=torch.float64)
    named = {"mask": uniforms_BL[:, :4], "tilt": uniforms_BL[:, 4:]}
    here = noise("exact", (count - 0.5) / 3, 3, len(rows))
    masked_BL, weight_BL = PLACES["tilted"](
        MaskSettings(), here, ground(C, rows=len(rows)), named.__getitem__
    )
    assert masked_BL.sum(1).eq(count).all()
    found = law(masked_BL)
    for chosen in itertools.combinations((0, 2, 3), count):
        tilt = sum(C[i] for i in chosen) / (count / 3 * 4)
        assert found[chosen] == pytest.approx(tilt / math.comb(3, count))
        at_B = masked_BL[:, list(chosen)].all(1)
        assert weight_BL[at_B, 0].tolist() == pytest.approx([3 / count / tilt] * int(at_B.sum()))


def test_tilted_never_leaves_a_row_without_masks_and_never_masks_what_is_not_maskable():
    masks = MaskSettings(where="tilted", identifier=50.0)
    maskable = [False, True, True, False]
    batch = drawn(masks, [NAME] * 4, maskable=maskable, count=2000)
    assert batch.masked_BL.any(1).all()
    assert batch.masked_BL.any(0).tolist() == maskable
    # Nor where the uniforms are as small or as large as they can be.
    for c in ([1.0, 0.0], [0.0, 0.1, 0.2, 0.7, 0.0], [0.0, 3.0, 1e-2]):
        for aim in (0.0, 1 - 2**-24):
            here = noise("exact", 0.0, sum(x > 0 for x in c), 1)
            named = dict.fromkeys(("mask", "tilt"), torch.full((1, len(c)), aim))
            masked_BL, _ = PLACES["tilted"](MaskSettings(), here, ground(c), named.__getitem__)
            assert masked_BL.sum() == 1
            assert c[int(masked_BL.nonzero()[0, 1])] > 0


@pytest.mark.parametrize("masking", ["rate", "exact"])
@pytest.mark.parametrize("where", ["uniform", "tilted"])
def test_tilted_masks_estimate_the_uniform_bound(where, masking):
    table = made_up_table(4)
    settings = FINE if masking == "rate" else {"masking": masking}
    masks = MaskSettings(where=where, identifier=5.0)
    batch = drawn(masks, [NAME, OTHER, KEYWORD, NAME], **settings)
    assert close(losses(batch, table), uniform_bound(table))
    if where == "tilted":
        often_L = batch.masked_BL.float().mean(0)
        assert often_L[0] > often_L[2] > often_L[1]


# --- weighted ------------------------------------------------------------------------------------


def test_weighted_tokens_are_masked_at_their_own_rate():
    c = [2.0, 1.0, 0.5, 0.0]
    uniforms_BL = grid(midpoints(16), midpoints(16), midpoints(16), [0.0])
    rows = len(uniforms_BL)
    here = noise("rate", level_of(0.25), 3, rows)
    masked_BL, weight_BL = PLACES["weighted"](
        MaskSettings(), here, ground(c, rows=rows), lambda name: uniforms_BL
    )
    assert masked_BL.double().mean(0).tolist() == [0.5, 0.25, 0.0625, 0.0]
    both = (masked_BL[:, 0] & masked_BL[:, 1]).double().mean()
    assert float(both) == 0.125  # independently
    least = 0.01
    expected = [4 / w * (1 - least) / (1 - least ** (1 / w)) for w in c[:3]]
    assert weight_BL[0, :3].tolist() == pytest.approx(expected)
    assert expected[1] == 4  # w itself


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_weighted_tokens_all_count_the_same(schedule):
    """Σ over noise levels of probability times weight: once, less what lies below min_t."""
    c = [3.0, 2.0, 1.0, 0.5]
    steps = 2**18
    level_B = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    settings = ObjectiveSettings(schedule=schedule, min_t=0.05)
    here = MASKINGS["rate"](settings, level_B, torch.tensor(4), 4)
    _, weight_BL = PLACES["weighted"](
        MaskSettings(), here, ground(c, rows=steps), lambda name: torch.zeros(1, 4)
    )
    share_BL = here.share_B[:, None] ** (1 / torch.tensor(c, dtype=torch.float64))
    once = (1 - here.least) / (1 - settings.min_t)
    assert (share_BL * weight_BL).mean(0).tolist() == pytest.approx([once] * 4, rel=1e-4)


def test_weighted_masks_are_the_chain_rule_over_orders_with_heavy_tokens_last():
    table = made_up_table(3, seed=1)
    classes, c = [NAME, OTHER, KEYWORD], [4.0, 0.5, 1.0]
    masks = MaskSettings(where="weighted", identifier=4.0, other=0.5, keyword=1.0)
    loss_B = losses(drawn(masks, classes, count=80_000, **FINE), table)
    expected = order_bound(table, [1 / w for w in c])
    assert close(loss_B, expected)
    # The other way round, and without weights, it is another number.
    for rates in (c, [1, 1, 1]):
        assert abs(order_bound(table, rates) - expected) > 0.05 * expected
    assert order_bound(table, [1, 1, 1]) == pytest.approx(uniform_bound(table))


def best_possible_loss(masks, classes_of):
    """Loss of the best denoiser for two independent fair bits, in nats: its entropy is log 4.

    The denoiser sees which positions are masked; what it should answer is counted, draw by draw.
    """
    count = 12_000
    weights = torch.zeros(2, 4, 3, 2, dtype=torch.float64)  # position, masks, what it sees, bit
    for seed, x in enumerate(itertools.product((0, 1), repeat=2)):
        batch = drawn(masks, classes_of(x), tokens=list(x), seed=seed, count=count, **FINE)
        set_B = (batch.masked_BL * torch.tensor([1, 2])).sum(1)
        for i in (0, 1):
            other_B = torch.where(batch.masked_BL[:, 1 - i], 2, x[1 - i])
            for pattern, other in itertools.product(range(4), range(3)):
                at_B = (set_B == pattern) & (other_B == other)
                weights[i, pattern, other, x[i]] += batch.ce_weight_BL[at_B, i].sum() / count / 4
    weights /= 2 * weights.sum((1, 2), keepdim=True)  # every bit counts once; less noise
    share = weights / weights.sum(-1, keepdim=True).clamp(min=1e-12)
    return float(torch.special.entr(share).sum(-1).mul(weights.sum(-1)).sum())


def by_token(x):
    return [NAME if bit else OTHER for bit in x]


def by_position(x):
    return [NAME, OTHER]


@pytest.mark.parametrize(
    ("where", "classes_of", "is_bound"),
    [
        ("tilted", by_token, True),
        ("tilted", by_position, True),
        ("weighted", by_position, True),
        ("weighted", by_token, False),
    ],
)
def test_what_is_a_bound_and_what_is_not(where, classes_of, is_bound):
    masks = MaskSettings(where=where, identifier=8.0)
    loss = best_possible_loss(masks, classes_of)
    if is_bound:
        assert loss == pytest.approx(math.log(4), rel=0.02)
    else:  # below the entropy, which no code can reach
        assert loss < 0.95 * math.log(4)


# --- spans ---------------------------------------------------------------------------------------


def slow_span_starts(maskable, documents, uniforms, length):
    starts = []
    for i, here in enumerate(maskable):
        follows = i > 0 and maskable[i - 1] and documents[i] == documents[i - 1]
        starts.append(here and (not follows or uniforms[i] < 1 / length))
    return starts


def test_where_spans_begin():
    maskable = [True, True, False, True, True, True, True, True, False]
    documents = [0, 0, 0, 0, 1, 1, 1, 2, -1]
    uniforms_BL = torch.rand(200, 9, generator=torch.Generator().manual_seed(0))
    here = ground([1.0] * 9, maskable, documents, rows=200)
    starts_BL = span_starts(here, 2.5, uniforms_BL)
    for found, uniforms in zip(starts_BL.tolist(), uniforms_BL.tolist(), strict=True):
        assert found == slow_span_starts(maskable, documents, uniforms, 2.5)


def test_the_mean_length_of_spans():
    uniforms_BL = torch.rand(20, 2000, generator=torch.Generator().manual_seed(0))
    starts_BL = span_starts(ground([1.0] * 2000, rows=20), 5.0, uniforms_BL)
    assert 2000 / float(starts_BL.sum(1).double().mean()) == pytest.approx(5.0, rel=0.05)


def test_spans_are_masked_as_a_whole():
    documents, classes = [0, 0, 0, 0, 1, 1, 1, 1], [OTHER] * 8
    tokens_BL = torch.zeros(3000, 8, dtype=torch.long)
    maskable_BL = torch.tensor([[False, *[True] * 7]] * 3000)

    def masked(length, where="spans"):
        return mask_batch(
            ObjectiveSettings(),
            tokens_BL,
            torch.tensor([documents] * 3000),
            maskable_BL,
            torch.tensor([classes] * 3000),
            masks=MaskSettings(where=where, span_length=length),
            mask_id=9,
            seed=0,
            step=0,
            samples=range(3000),
            samples_per_step=3000,
        )

    whole_BL = masked(1e6).masked_BL
    assert {tuple(row[1:4].tolist()) for row in whole_BL} == {(True,) * 3, (False,) * 3}
    assert {tuple(row[4:].tolist()) for row in whole_BL} == {(True,) * 4, (False,) * 4}
    assert (whole_BL[:, 1] != whole_BL[:, 4]).any()  # documents fall apart
    assert not whole_BL[:, 0].any()
    # Neighbours share a fate more often, the share of masks stays.
    some_BL, plain = masked(3.0).masked_BL, masked(3.0, where="uniform")
    together = (some_BL[:, 1:] == some_BL[:, :-1]).double().mean()
    assert together > (plain.masked_BL[:, 1:] == plain.masked_BL[:, :-1]).double().mean() + 0.1
    assert abs(some_BL.double().mean() - plain.masked_BL.double().mean()) < 0.02
    # Spans of one token are uniform masks.
    single = masked(1.0)
    assert single.masked_BL.equal(plain.masked_BL)
    assert single.ce_weight_BL.equal(plain.ce_weight_BL)


def span_bound(table, mean):
    """Expected over all cuts and all orders of the spans: Σ CE of a span filled at once."""
    length, total = table.shape[1], 0.0
    for cuts in itertools.product((False, True), repeat=length - 1):
        spans = [[0]]
        for i, cut in enumerate(cuts, start=1):
            spans.append([i]) if cut else spans[-1].append(i)
        chance = math.prod(1 / mean if cut else 1 - 1 / mean for cut in cuts)
        orders = list(itertools.permutations(spans))
        for order in orders:
            for place, span in enumerate(order):
                hidden = bits(i for left in order[place:] for i in left)
                total += chance / len(orders) * float(table[hidden, span].sum())
    return total


def test_spans_are_the_bound_of_a_decoder_that_fills_a_span_at_once():
    table = made_up_table(4, seed=2)
    # Like a real model: the more is hidden, the worse.
    for pattern in range(16):
        table[pattern] *= pattern.bit_count()
    masks = MaskSettings(where="spans", span_length=2.0)
    loss_B = losses(drawn(masks, [OTHER] * 4, count=60_000, **FINE), table)
    expected = span_bound(table, 2.0)
    assert close(loss_B, expected)
    assert span_bound(table, 1.0) == pytest.approx(uniform_bound(table))
    assert expected > 1.05 * uniform_bound(table)  # looser


# --- which masked positions are distilled --------------------------------------------------------


def slow_inclusion(c, count):
    """By hand: give every one its share; who would get more than 1 gets 1 and leaves."""
    result = dict.fromkeys(range(len(c)), 0.0)
    free = [i for i, x in enumerate(c) if x > 0]
    left = min(count, len(free))
    while free:
        share = {i: left * c[i] / sum(c[j] for j in free) for i in free}
        over = [i for i in free if share[i] > 1]
        result |= share
        if not over:
            break
        for i in over:
            result[i] = 1.0
            free.remove(i)
        left -= len(over)
    return [result[i] for i in range(len(c))]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_inclusion_by_definition(count):
    generator = torch.Generator().manual_seed(count)
    c_BL = torch.rand(50, 6, generator=generator, dtype=torch.float64) ** 4 + 0.01
    c_BL *= torch.rand(50, 6, generator=generator) < 0.7
    found_BL = inclusion(c_BL, count)
    for c, found in zip(c_BL.tolist(), found_BL.tolist(), strict=True):
        assert found == pytest.approx(slow_inclusion(c, count))
        assert sum(found) == pytest.approx(min(count, sum(x > 0 for x in c)))
        assert max(found) <= 1
        assert all((f > 0) == (x > 0) for f, x in zip(found, c, strict=True))


def test_inclusion_in_plain_cases():
    def one(c, count):
        return inclusion(torch.tensor([c], dtype=torch.float64), count)[0].tolist()

    assert one([1.0, 2.0, 1.0, 0.0], 2) == [0.5, 1.0, 0.5, 0.0]
    assert one([1.0, 1.0, 1.0, 1.0], 2) == [0.5] * 4
    assert one([2.0, 1.0], 2) == one([2.0, 1.0], 7) == [1.0, 1.0]
    assert one([10.0, 4.0, 1.0, 1.0], 3) == [1.0, 1.0, 0.5, 0.5]
    assert one([0.0, 0.0], 3) == [0.0, 0.0]


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_weighted_choices_come_as_often_as_said_and_are_of_one_size(count):
    c = [2.0, 1.0, 0.0, 1.5, 1.0, 3.0, 0.5]
    rows = 2**12
    here = ground(c, rows=rows)
    offsets_BL = torch.tensor(midpoints(rows))[:, None].expand(rows, 7)
    chosen_BL, inclusion_BL = CHOICES["weighted"](
        here.maskable_BL, here.c_BL, count, lambda name: offsets_BL
    )
    assert chosen_BL.sum(1).eq(min(count, 6)).all()
    assert chosen_BL.double().mean(0).tolist() == pytest.approx(slow_inclusion(c, count), abs=1e-3)
    assert inclusion_BL[0].tolist() == pytest.approx(slow_inclusion(c, count))
    # Horvitz-Thompson: the weights of the chosen stand for all
    mean_L = counted(chosen_BL, inclusion_BL).double().mean(0)
    assert mean_L.tolist() == pytest.approx([1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0], abs=0.01)


@pytest.mark.parametrize("offset", [0.0, 2**-24, 1 - 2**-24])
@pytest.mark.parametrize("c", [[1.0] * 7, [0.1, 0.2, 0.3, 0.1, 0.3], [1.0, 0.0, 1.0]])
def test_weighted_choices_at_the_ends_of_the_offset(c, offset):
    here = ground(c)
    at = torch.full((1, len(c)), offset)
    for count in range(1, 6):
        chosen_BL, _ = CHOICES["weighted"](here.maskable_BL, here.c_BL, count, lambda name: at)
        assert chosen_BL.sum() == min(count, sum(x > 0 for x in c))
        assert not (chosen_BL & ~here.maskable_BL).any()


@pytest.mark.parametrize("offset", [0.0, 1 - 2**-24])
def test_rounding_errors_change_the_size_of_no_choice(offset):
    generator = torch.Generator().manual_seed(0)
    c_BL = torch.rand(2000, 40, generator=generator, dtype=torch.float64) + 0.01
    at = torch.full((2000, 40), offset)
    for count in (1, 3, 7):
        chosen_BL, _ = CHOICES["weighted"](c_BL > 0, c_BL, count, lambda name: at)
        assert chosen_BL.sum(1).eq(count).all()


def test_uniform_choices_are_as_probable_as_said():
    here = ground([1.0, 5.0, 0.0, 1.0], rows=6)
    orders = [[a, b, 0.0, c] for a, b, c in itertools.permutations([0.1, 0.2, 0.3])]
    for count in (1, 2, 3, 4):
        chosen_BL, inclusion_BL = CHOICES["uniform"](
            here.maskable_BL, here.c_BL, count, lambda name: torch.tensor(orders)
        )
        share = min(1.0, count / 3)
        assert chosen_BL.double().mean(0).tolist() == pytest.approx([share, share, 0, share])
        assert inclusion_BL[0].tolist() == pytest.approx([share, share, 0, share])


def test_counted():
    part = torch.tensor([[True, False, True], [False] * 3])
    probability = torch.tensor([[0.5, 0.5, 1.0], [0.0] * 3])
    assert counted(part, probability).tolist() == [[2, 0, 1], [0, 0, 0]]


# --- through the objective -----------------------------------------------------------------------


def test_heavy_classes_are_distilled_more_often_and_counted_less():
    masks = MaskSettings(distilled="weighted", identifier=4.0)
    batch = drawn(masks, [NAME, OTHER, OTHER, OTHER], count=4000, **ONE)
    full_B = batch.masked_BL.all(1)
    share_L = batch.distilled_BL[full_B].double().mean(0)
    assert share_L.tolist() == pytest.approx([4 / 7, 1 / 7, 1 / 7, 1 / 7], abs=0.06)
    at = batch.distilled_BL & full_B[:, None]
    assert batch.kd_weight_BL[:, 0][at[:, 0]].tolist() == pytest.approx(
        [7 / 4] * int(at[:, 0].sum())
    )
    assert batch.kd_weight_BL[:, 2][at[:, 2]].tolist() == pytest.approx([7.0] * int(at[:, 2].sum()))


def test_the_rest_counts_at_most_as_much_as_with_uniform_choices():
    masks = MaskSettings(distilled="weighted", identifier=50.0, comment=10.0)
    batch = drawn(masks, [NAME, OTHER, COMMENT], count=3000, **ONE, ce_positions="rest")
    plain_BL = batch.masked_BL * (3 / batch.masked_BL.sum(1, keepdim=True))
    factor_BL = torch.where(batch.masked_BL, batch.ce_weight_BL / plain_BL, 0.0)
    assert float(factor_BL.max()) == pytest.approx(2.0)  # kd_positions + 1
    full_B = batch.masked_BL.all(1) & (batch.ce_weight_BL[:, 1] > 0)
    assert factor_BL[full_B, 1].tolist() == pytest.approx([61 / 60] * int(full_B.sum()))


def test_the_mean_over_masks_takes_them_as_they_fall():
    for where in BY_TOKEN:
        masks = MaskSettings(where=where)
        batch = drawn(masks, [NAME, OTHER, KEYWORD], count=500, weight="mean_masked")
        assert batch.ce_weight_BL.equal(batch.masked_BL.float())
        assert batch.denominator == int(batch.masked_BL.sum())


@pytest.mark.parametrize("where", BY_TOKEN)
def test_weights_stay_finite(where):
    masks = MaskSettings(where=where, identifier=100.0, comment=0.01, distilled="weighted")
    batch = drawn(masks, [NAME, COMMENT, OTHER], maskable=[True, True, False], count=5000)
    empty = drawn(masks, [NAME, COMMENT], maskable=[False, False], count=3)
    for one in (batch, empty):
        assert one.ce_weight_BL.dtype == torch.float32
        assert one.ce_weight_BL.isfinite().all()
        assert (one.ce_weight_BL > 0).equal(one.masked_BL)
    assert not empty.masked_BL.any()


# --- settings ------------------------------------------------------------------------------------


def test_every_class_has_its_weight():
    masks = MaskSettings(**{name: 1.0 + i for i, name in enumerate(CLASSES)})
    weights = class_weights(masks, torch.tensor([[0, 1, 2, 3, 4, 5]], dtype=torch.uint8))
    assert weights.tolist() == [[1, 2, 3, 4, 5, 6]]
    assert placement.MEANINGS.keys() == PLACES.keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"where": "span"}, r"masks\.where 'span'; did you mean 'spans'"),
        ({"distilled": "weight"}, r"masks\.distilled 'weight'; did you mean 'weighted'"),
        ({"identifier": 0.0}, r"masks\.identifier must be in \[0\.01, 100\]; got 0\.0"),
        ({"other": -1.0}, r"masks\.other"),
        ({"comment": float("inf")}, r"masks\.comment"),
        ({"literal": float("nan")}, r"masks\.literal"),
        ({"span_length": 0.5}, r"masks\.span_length must be at least 1"),
        ({"span_length": float("inf")}, r"masks\.span_length"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        MaskSettings(**settings)


FITTING = {
    "masking": "rate",
    "language": "auto",
    "distils": True,
    "kd_positions": 0,
    "ce_positions": "all",
}


@pytest.mark.parametrize(
    ("settings", "others", "message"),
    [
        ({"where": "weighted"}, {"masking": "exact"}, r"objective\.masking=rate; got exact"),
        ({"where": "spans"}, {"masking": "exact"}, r"objective\.masking=rate"),
        ({"where": "weighted"}, {"language": "none"}, r"data\.language=auto"),
        ({"where": "tilted"}, {"language": "none"}, r"data\.language=auto"),
        (
            {"distilled": "weighted"},
            {"language": "none", "kd_positions": 1},
            r"data\.language=auto",
        ),
        ({"distilled": "weighted"}, {}, r"objective\.kd_positions to 1"),
        (
            {"distilled": "weighted"},
            {"kd_positions": 1, "ce_positions": "rest"},
            r"objective\.ce_positions=all",
        ),
    ],
)
def test_what_does_not_fit_together(settings, others, message):
    with pytest.raises(ConfigError, match=message):
        check_masks(MaskSettings(**settings), **{**FITTING, **others})


def test_what_fits_together():
    check_masks(MaskSettings(), **{**FITTING, "masking": "exact", "language": "none"})
    check_masks(MaskSettings(where="spans"), **{**FITTING, "language": "none"})
    check_masks(MaskSettings(where="tilted"), **{**FITTING, "masking": "exact"})
    check_masks(MaskSettings(where="weighted"), **FITTING)
    check_masks(MaskSettings(distilled="weighted"), **{**FITTING, "kd_positions": 2})
    check_masks(MaskSettings(distilled="weighted"), **{**FITTING, "distils": False})
