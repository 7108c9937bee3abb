"""The denoising loop: against the slow reference, and what must hold whatever the model says.

Token ids: words 0 … 11, start 12, end 13, pad 14, mask 15.
"""

import itertools
import math
from dataclasses import replace

import oracles
import pytest
import torch
from students import ScriptedStudent, random_student, word_vocab
from tiny import tiny_model

from mdm.attention import BLOCK_ATTENTIONS
from mdm.canvas import NOTHING_READ, SamplerSettings
from mdm.convert import make_bidirectional
from mdm.denoiser import Denoiser
from mdm.errors import ConfigError
from mdm.proposals import propose
from mdm.sampler import denoise, make_canvas, open_logits, reached_end, take_step

START, END, MASK, V = 12, 13, 15, 16
G = 8
FULL = SamplerSettings(stop_at_eos=False)  # every open position is decided


def run(denoiser, canvases):
    """The finished rows and all steps; checks on the way what must always hold."""
    start = [canvas.ids_L.clone() for canvas in canvases]
    opened = [canvas.open_L.clone() for canvas in canvases]
    committed = [{} for _ in canvases]
    steps = []
    for step in denoise(denoiser, canvases):
        steps.append(step)
        for commit in step.commits:
            found = dict(zip(commit.positions_k.tolist(), commit.tokens_k.tolist(), strict=True))
            assert found, "a forward that commits nothing"
            assert not found.keys() & committed[commit.row].keys(), "decided twice"
            committed[commit.row] |= found
        for canvas, first_L, open_L, known in zip(canvases, start, opened, committed, strict=True):
            assert all(canvas.ids_L[i] == token for i, token in known.items()), "a token changed"
            assert torch.equal(canvas.ids_L[~open_L], first_L[~open_L]), "a given token changed"
            if not canvas.ended:
                assert (canvas.decided_L >= 0).sum() == len(known)
                assert torch.equal(canvas.open_L, canvas.ids_L == MASK)
    for canvas, open_L, known in zip(canvases, opened, committed, strict=True):
        assert not (canvas.ids_L == MASK).any(), "a mask is left"
        if not canvas.ended:
            assert known.keys() == set(open_L.nonzero().flatten().tolist())
    return [canvas.ids_L.tolist() for canvas in canvases], steps


def fill(denoiser, ids, settings=FULL, **more):
    (row,), _ = run(denoiser, [make_canvas(denoiser, ids, settings, **more)])
    return row


# --- against the slow reference ------------------------------------------------------------------


def raw_logits(denoiser, given=None, scale=0.0):
    """canvas -> (L, V) from the raw model: shift and guidance by hand."""

    @torch.no_grad()
    def one(ids):
        logits_LV = denoiser.model(torch.tensor([ids]), use_cache=False).logits[0]
        if denoiser.shift:
            logits_LV = torch.cat([torch.zeros_like(logits_LV[:1]), logits_LV[:-1]])
        return logits_LV

    def guided(ids):
        conditional = one(ids)
        if scale == 0:
            return conditional
        unconditional = one([MASK if i in given else token for i, token in enumerate(ids)])
        return (1 + scale) * conditional - scale * unconditional

    return guided


HOLES = {
    "continue": [START, 3, 1, *[MASK] * G],
    "fill": [START, 3, *[MASK] * G, 5, 5],
    "two holes": [START, *[MASK] * 3, 4, 4, *[MASK] * 5, 2],
    "far holes": [START, *[MASK] * 2, *[4] * 8, *[MASK] * 2],  # with blocks between them
}


@pytest.mark.parametrize("name", HOLES)
@pytest.mark.parametrize(
    ("family", "shift", "scale"),
    [("llama", False, 0.0), ("llama", True, 0.7), ("qwen3", True, 0.0), ("gpt2", False, 1.5)],
)
def test_equals_slow_greedy_low_confidence(name, family, shift, scale):
    denoiser = random_student(family, shift=shift, unused_rows=2)
    ids = HOLES[name]
    holes = [i for i, token in enumerate(ids) if token == MASK]
    given = [i for i in range(len(ids)) if i not in holes]
    for block_length, steps_per_block in itertools.product([None, 4, 3], [None, 1, 2, 3, 9]):
        size = block_length or len(ids)
        starts = range(holes[0], holes[-1] + 1, size)
        blocks = [[i for i in holes if first <= i < first + size] for first in starts]
        blocks = [block for block in blocks if block]
        per_block = steps_per_block or size
        counts = [
            oracles.llada_transfer_tokens(torch.tensor([len(block)]), per_block)[0].tolist()
            for block in blocks
        ]
        expected, order = oracles.slow_low_confidence_greedy(
            raw_logits(denoiser, given, scale), ids, holes, blocks, counts, forbidden=[MASK, 16, 17]
        )
        steps = steps_per_block and steps_per_block * len(blocks)
        settings = replace(FULL, steps=steps, block_length=block_length, cfg_scale=scale)
        canvas = make_canvas(denoiser, ids, settings)
        (row,), done = run(denoiser, [canvas])
        assert row == expected
        assert [step.commits[0].positions_k.tolist() for step in done] == order
        # T7: no forward without a commit; guidance is a second row of the same forward.
        assert canvas.nfe == len(order) * (2 if scale else 1)
        assert [step.step for step in done] == list(range(len(order)))


@pytest.mark.parametrize("threshold", [0.1, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("scale", [0.0, 0.7])
def test_equals_slow_greedy_by_threshold(threshold, scale):
    denoiser = random_student(shift=True)
    at_once = set()
    for name, block_length in itertools.product(HOLES, [None, 4, 3]):
        ids = HOLES[name]
        holes = [i for i, token in enumerate(ids) if token == MASK]
        given = [i for i in range(len(ids)) if i not in holes]
        size = block_length or len(ids)
        blocks = [
            [i for i in holes if first <= i < first + size]
            for first in range(holes[0], holes[-1] + 1, size)
        ]
        blocks = [block for block in blocks if block]
        expected, order = oracles.slow_low_confidence_greedy(
            raw_logits(denoiser, given, scale),
            ids,
            holes,
            blocks,
            [[1] * len(block) for block in blocks],
            forbidden=[MASK],
            threshold=threshold,
        )
        settings = replace(FULL, threshold=threshold, block_length=block_length, cfg_scale=scale)
        canvas = make_canvas(denoiser, ids, settings)
        (row,), done = run(denoiser, [canvas])
        assert row == expected
        assert [step.commits[0].positions_k.tolist() for step in done] == order
        assert canvas.nfe == len(order) * (2 if scale else 1)
        at_once |= {len(positions) for positions in order}
    assert len(at_once) > 1 or threshold > 0.1


@pytest.mark.parametrize("failing", ["forward", "proposals"])
def test_a_step_that_fails_changes_nothing(failing, monkeypatch):
    denoiser = random_student()
    settings = [
        replace(FULL, temperature=1.0, cfg_scale=scale, remasking=remasking)
        for scale, remasking in ((0.0, "random"), (1.0, "low_confidence"), (0.0, "margin"))
    ]

    def canvases():
        holes = [HOLES["continue"]] * 3
        return [
            make_canvas(denoiser, ids, own, key=(3, i))
            for i, (ids, own) in enumerate(zip(holes, settings, strict=True))
        ]

    expected, _ = run(denoiser, canvases())
    rows = canvases()
    calls = itertools.count()

    def breaking(real):
        def call(*arguments, **more):
            if next(calls) == (1 if failing == "forward" else 2):  # the last group's proposals
                raise MemoryError
            return real(*arguments, **more)

        return call

    if failing == "forward":
        monkeypatch.setattr(denoiser, "rows", breaking(denoiser.rows))
        take_step(denoiser, dict(enumerate(rows)))
    else:
        monkeypatch.setattr("mdm.sampler.propose", breaking(propose))
    before = [(row.ids_L.tolist(), row.nfe, row.step, list(row.due)) for row in rows]
    with pytest.raises(MemoryError):
        take_step(denoiser, dict(enumerate(rows)))
    assert [(row.ids_L.tolist(), row.nfe, row.step, list(row.due)) for row in rows] == before
    for _ in denoise(denoiser, rows):
        pass
    assert [row.ids_L.tolist() for row in rows] == expected


def test_one_block_of_everything_is_plain_diffusion():
    denoiser = random_student()
    plain = fill(denoiser, HOLES["continue"])
    assert fill(denoiser, HOLES["continue"], replace(FULL, block_length=G)) == plain
    assert fill(denoiser, HOLES["continue"], replace(FULL, block_length=99)) == plain
    assert fill(denoiser, HOLES["continue"], replace(FULL, block_length=2)) != plain


def test_blocks_are_decoded_left_to_right():
    denoiser = random_student()
    canvas = make_canvas(denoiser, HOLES["continue"], replace(FULL, block_length=2))
    _, steps = run(denoiser, [canvas])
    order = [int(step.commits[0].positions_k) for step in steps]
    assert [(i - 3) // 2 for i in order] == [0, 0, 1, 1, 2, 2, 3, 3]


# --- one row does not depend on another ----------------------------------------------------------

ROWS = [
    ([START, 3, 1, *[MASK] * 6], FULL),
    ([START, *[MASK] * 9, 5], replace(FULL, temperature=0.8, remasking="random", steps=3)),
    ([START, 7, 7, 7, *[MASK] * 4], replace(FULL, cfg_scale=1.0, temperature=0.5)),
    ([START, *[MASK] * 2, 4, *[MASK] * 5], replace(FULL, block_length=4, remasking="margin")),
    ([START, 2, *[MASK] * 7], replace(FULL, temperature=1.3, block_length=3, remasking="entropy")),
    ([START, 2, *[MASK] * 7], replace(FULL, cfg_scale=0.4, suppress_eos=True, eos_last=True)),
    ([START, 1, 1, *[MASK] * 12], SamplerSettings(temperature=1.0)),
]


@pytest.mark.parametrize(("family", "shift"), [("llama", True), ("gpt2", False), ("gemma3", True)])
def test_a_row_is_the_same_alone_in_any_batch_and_padded(family, shift):
    denoiser = random_student(family, shift=shift)

    def canvases(order, padding=0):
        return [
            make_canvas(denoiser, [14] * padding + ids, settings, key=(5, i), padding=padding)
            for i in order
            for ids, settings in [ROWS[i]]
        ]

    alone = [run(denoiser, canvases([i]))[0][0] for i in range(len(ROWS))]
    for order in (range(7), [3, 6, 0, 5, 2, 1, 4], [4, 4, 1]):
        rows, _ = run(denoiser, canvases(order))
        assert rows == [alone[i] for i in order]
    rows, _ = run(denoiser, canvases(range(7), padding=3))
    assert [row[3:] for row in rows] == alone


def test_rows_that_are_done_cost_nothing_more():
    denoiser = random_student()
    canvases = [make_canvas(denoiser, [START, *[MASK] * n], FULL) for n in (2, 5, 0)]
    _, steps = run(denoiser, canvases)
    assert [canvas.nfe for canvas in canvases] == [2, 5, 0]
    assert [[commit.row for commit in step.commits] for step in steps] == [[0, 1]] * 2 + [[1]] * 3


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 100])
def test_a_row_is_the_same_when_it_joins_later(batch_size):
    denoiser = random_student("llama", shift=True)

    def canvases():
        return [make_canvas(denoiser, ids, s, key=(5, i)) for i, (ids, s) in enumerate(ROWS)]

    expected, _ = run(denoiser, canvases())
    later = canvases()
    widths = [len(step.commits) for step in denoise(denoiser, later, batch_size=batch_size)]
    assert [canvas.ids_L.tolist() for canvas in later] == expected
    assert max(widths) == min(batch_size, 7)
    # A place is never left empty while rows wait.
    assert sorted(widths, reverse=True) == widths


def test_a_key_may_hold_text():
    denoiser = random_student()
    settings = replace(FULL, temperature=1.5)
    keys = [("task", 1), ("task", 2), ("other", 1), (1,), ("1",), ()]
    texts = [tuple(fill(denoiser, HOLES["continue"], settings, key=key)) for key in keys]
    assert len(set(texts)) == len(keys)
    assert tuple(fill(denoiser, HOLES["continue"], settings)) == tuple(
        fill(denoiser, HOLES["continue"], settings, key=(0, 0))
    )


def test_seeds_reproduce_and_differ():
    denoiser = random_student()
    settings = replace(FULL, temperature=1.5, remasking="random")
    texts = {}
    for seed, row in itertools.product((0, 1), (0, 1)):
        one, other = (
            fill(denoiser, HOLES["continue"], settings, key=(seed, row)) for _ in range(2)
        )
        assert one == other
        texts[seed, row] = tuple(one)
        torch.manual_seed(seed + 17)  # the global generator has no say
    assert len(set(texts.values())) == 4


# --- what may be proposed ------------------------------------------------------------------------


def scripted(favourites, strength=5.0):
    """Logits that prefer one token, whatever the canvas: {token: bonus}."""
    logits_V = torch.zeros(V)
    for token, bonus in favourites.items():
        logits_V[token] = bonus * strength
    return ScriptedStudent(lambda xt_BL: logits_V.expand(*xt_BL.shape, V))


def sampled(logits_V, temperature, n=4000, top_p=1.0):
    """How often each token is proposed for a single open position."""
    denoiser = ScriptedStudent(lambda xt_BL: logits_V.expand(*xt_BL.shape, V))
    settings = replace(FULL, temperature=temperature, top_p=top_p)
    canvases = [make_canvas(denoiser, [START, MASK], settings, key=(0, i)) for i in range(n)]
    rows, _ = run(denoiser, canvases)
    return torch.bincount(torch.tensor([row[1] for row in rows]), minlength=V)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_tempered_softmax(temperature):
    logits_V = torch.full((V,), -math.inf)
    logits_V[:5] = torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0])
    n = 4000
    counts_V = sampled(logits_V, temperature, n)
    expected_V = n * (logits_V / temperature).softmax(-1)
    assert counts_V[5:].sum() == 0
    chi_squared = ((counts_V - expected_V) ** 2 / expected_V)[:5].sum()
    assert chi_squared < 23.5  # 4 degrees of freedom, p = 1e-4


def test_proposals_do_not_depend_on_which_token_is_likely_elsewhere():
    # Two positions with their own distributions: each follows its own.
    logits_LV = torch.full((3, V), -9.0)
    logits_LV[1, 4] = logits_LV[2, 7] = 9.0
    denoiser = ScriptedStudent(lambda xt_BL: logits_LV.expand(len(xt_BL), -1, -1))
    settings = replace(FULL, temperature=1.0, steps=1)
    assert fill(denoiser, [START, MASK, MASK], settings) == [START, 4, 7]


@pytest.mark.parametrize("remasking", ["low_confidence", "random", "margin", "entropy"])
@pytest.mark.parametrize("temperature", [0.0, 5.0])
@pytest.mark.parametrize("cfg_scale", [0.0, 2.0])
def test_the_mask_is_never_proposed(remasking, temperature, cfg_scale):
    # T4. Under guidance -inf minus -inf is NaN, and argmax would pick it.
    settings = replace(FULL, remasking=remasking, temperature=temperature, cfg_scale=cfg_scale)
    denoiser = scripted({MASK: 10.0})
    canvas = make_canvas(denoiser, HOLES["two holes"], settings)
    for step in denoise(denoiser, [canvas]):
        assert not step.commits[0].confidence_k.isnan().any()
    assert not (canvas.ids_L == MASK).any()


# --- the nucleus -----------------------------------------------------------------------------------


def test_proposals_come_from_the_nucleus():
    logits_V = torch.randn(V)
    probs_V = logits_V[:15].double().div(0.8).softmax(-1)  # the mask is no token
    order = probs_V.argsort(descending=True)
    kept = order[: int((probs_V[order].cumsum(0) < 0.7).sum()) + 1]
    assert 2 < len(kept) < 12
    counts_V = sampled(logits_V, 0.8, 1500, top_p=0.7)
    assert set(counts_V.nonzero()[:, 0].tolist()) == set(kept.tolist())
    expected_k = 1500 * probs_V[kept] / probs_V[kept].sum()
    assert float(((counts_V[kept] - expected_k) ** 2 / expected_k).sum()) < 35


def test_confidence_is_that_of_all_tokens_whatever_the_nucleus():
    denoiser = scripted({3: 0.2})
    settings = replace(FULL, temperature=1.0, top_p=0.01)
    _, (step,) = run(denoiser, [make_canvas(denoiser, [START, MASK], settings)])
    assert step.commits[0].tokens_k.tolist() == [3]
    expected = math.exp(1.0) / (math.exp(1.0) + 14)
    assert float(step.commits[0].confidence_k) == pytest.approx(expected, rel=1e-5)


def test_ties_go_to_the_lowest_token_and_position():
    # T2: no ties may be broken by chance or by the device.
    denoiser = scripted({})
    canvas = make_canvas(denoiser, [START, *[MASK] * 6], FULL)
    (row,), steps = run(denoiser, [canvas])
    assert row == [START, *[0] * 6]
    assert [int(step.commits[0].positions_k) for step in steps] == [1, 2, 3, 4, 5, 6]


def test_confidence_is_float32_whatever_the_model_computes_in():
    # T2: in bfloat16 probabilities just below 1 are all equal.
    logits_LV = torch.zeros(4, V, dtype=torch.bfloat16)
    logits_LV[:, 3] = torch.tensor([0.0, 12.0, 12.5, 13.0])
    denoiser = ScriptedStudent(lambda xt_BL: logits_LV.expand(len(xt_BL), -1, -1))
    _, steps = run(denoiser, [make_canvas(denoiser, [START, *[MASK] * 3], FULL)])
    assert [int(step.commits[0].positions_k) for step in steps] == [3, 2, 1]


# --- the end token -------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_suppressed_end_is_never_proposed(temperature):
    settings = SamplerSettings(temperature=temperature, suppress_eos=True)
    row = fill(scripted({END: 10.0}), [START, *[MASK] * 20], settings)
    assert END not in row


@pytest.mark.parametrize("temperature", [0.0, 0.01])
def test_an_end_token_can_be_kept_last(temperature):
    # T3: at any temperature, unlike the published sampler. Position 2 wants the end, surely.
    logits_LV = torch.zeros(5, V)
    logits_LV[1:, 3] = torch.tensor([3.0, 0.0, 4.0, 2.0])
    logits_LV[2, END] = 9.0
    denoiser = ScriptedStudent(lambda xt_BL: logits_LV.expand(len(xt_BL), -1, -1))
    for eos_last, expected in ((False, [2, 3, 1, 4]), (True, [3, 1, 4, 2])):
        settings = replace(FULL, temperature=temperature, eos_last=eos_last)
        canvas = make_canvas(denoiser, [START, *[MASK] * 4], settings)
        (row,), steps = run(denoiser, [canvas])
        assert [int(step.commits[0].positions_k) for step in steps] == expected
        assert row == [START, 3, END, 3, 3]


def end_at(position, order):
    """A student that decides positions in this order, the end token at `position`, else word 3."""
    logits_LV = torch.zeros(len(order) + 1, V)
    for rank, i in enumerate(order):
        logits_LV[i, END if i == position else 3] = 20.0 - rank
    return ScriptedStudent(lambda xt_BL: logits_LV.expand(len(xt_BL), -1, -1))


@pytest.mark.parametrize(
    ("order", "forwards"),
    [
        ([1, 2, 3, 4, 5], 2),  # decided next to what is known
        ([2, 1, 3, 4, 5], 2),  # the gap before it is closed
        ([2, 3, 4, 5, 1], 5),  # a gap until the last step
        ([3, 4, 5, 1, 2], 5),
    ],
)
def test_a_row_stops_at_an_end_without_a_gap_before_it(order, forwards):
    denoiser = end_at(2, order)
    canvas = make_canvas(denoiser, [START, *[MASK] * 5], SamplerSettings())
    (row,), _ = run(denoiser, [canvas])
    assert canvas.nfe == denoiser.forwards == forwards
    filled = [END if i not in order[:forwards] else 3 for i in (3, 4, 5)]
    assert row == [START, 3, END, *filled]

    denoiser = end_at(2, order)
    assert fill(denoiser, [START, *[MASK] * 5], FULL) == [START, 3, END, 3, 3, 3]
    assert denoiser.forwards == 5


def test_a_given_end_token_stops_nothing():
    # A prompt may contain closed turns.
    denoiser = scripted({3: 1.0})
    canvas = make_canvas(denoiser, [START, END, *[MASK] * 3, END], SamplerSettings())
    (row,), _ = run(denoiser, [canvas])
    assert row == [START, END, 3, 3, 3, END]
    assert not reached_end(canvas, END)


# --- what a canvas must be -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"steps": 7, "block_length": 4}, "steps is 7, but there are 2 blocks of 4 tokens; make "
         "steps a multiple of 2, it is the total over all blocks"),
        ({"steps": 4, "block_length": 3}, "steps is 4, but there are 3 blocks of 3 tokens"),
    ],
)  # fmt: skip
def test_steps_that_do_not_divide_among_the_blocks(settings, text):
    with pytest.raises(ConfigError, match=text):  # T8
        make_canvas(random_student(), HOLES["continue"], replace(FULL, **settings))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\] \(1 = all tokens\); got 0.0"),
        ({"top_p": 1.1}, "top_p must be in .* got 1.1"),
        ({"top_p": math.nan}, "top_p must be in .* got nan"),
        ({"top_p": 0.5, "compat": "llada"}, "has no top_p; got 0.5 with compat=llada"),
    ],
)
def test_wrong_nucleus(settings, text):
    with pytest.raises(ConfigError, match=text):
        SamplerSettings(**settings)


def test_a_canvas_longer_than_the_context():
    denoiser = random_student(max_position_embeddings=8)
    make_canvas(denoiser, [START, *[MASK] * 7], FULL)
    with pytest.raises(ConfigError, match="has 9 tokens, but the model was built for at most 8"):
        make_canvas(denoiser, [START, *[MASK] * 8], FULL)


def test_a_shifted_model_needs_a_token_before_the_first_mask():
    with pytest.raises(ConfigError, match="must begin with a token"):
        make_canvas(random_student(shift=True), [MASK, 3], FULL)
    denoiser = random_student(shift=False)
    assert MASK not in fill(denoiser, [MASK, 3])


def test_a_canvas_without_holes_is_finished():
    denoiser = random_student()
    for settings in (FULL, replace(FULL, steps=4, block_length=2), SamplerSettings(compat="llada")):
        canvas = make_canvas(denoiser, [START, 3, 4], settings)
        assert canvas.finished
        assert list(denoise(denoiser, [canvas])) == []
    assert list(denoise(denoiser, [])) == []


def test_one_batch_has_one_compat_mode():
    denoiser = random_student()
    canvases = [
        make_canvas(denoiser, [START, MASK], SamplerSettings(compat=compat))
        for compat in ("default", "llada")
    ]
    with pytest.raises(ConfigError, match="must have the same compat mode"):
        list(denoise(denoiser, canvases))


def test_an_end_in_one_hole_leaves_the_holes_after_given_text_alone():
    def logits_fn(xt_BL):
        logits_BLV = torch.zeros(*xt_BL.shape, V)
        logits_BLV[:, 2:4, END] = 9.0  # the surest proposals of all
        logits_BLV[:, 4:, 5] = 3.0
        return logits_BLV

    student = ScriptedStudent(logits_fn)
    canvas = make_canvas(student, [START, 5, MASK, MASK, 6, 7, MASK, MASK], SamplerSettings())
    run(student, [canvas])
    assert canvas.ids_L.tolist() == [START, 5, END, END, 6, 7, 5, 5]


# --- models with blocks ----------------------------------------------------------------------------

SIZE = 3
PROMPTS = [START, 3, 1, 5, 2, 7, 7, 0]  # its beginnings: of 0 … 2 · SIZE + 1 tokens


def block_student(family="llama", *, attention="block", block_size=SIZE, **settings):
    layers = {} if family == "granite" else {"layers": 2}
    denoiser = random_student(family, block_size=block_size, **layers, **settings)
    denoiser.attention = attention
    return denoiser


def slow_blocks(denoiser, ids, settings):
    """Row and order by the slow reference, which reads everything anew at every step."""
    holes = [i for i, token in enumerate(ids) if token == MASK]
    size = settings.block_length or denoiser.block_size
    blocks = [[i for i in holes if i // size == number] for number in range(len(ids) // size + 1)]
    blocks = [block for block in blocks if block]
    shares = [len(block) for block in blocks]
    if settings.steps:  # by hand: in proportion to the open positions
        assert shares == [2, 3, 1]
        shares = {4: [1, 2, 1], 5: [2, 2, 1]}[settings.steps]
    counts = [
        oracles.llada_transfer_tokens(torch.tensor([len(block)]), share)[0].tolist()
        for block, share in zip(blocks, shares, strict=True)
    ]
    logits_fn = oracles.block_logits(
        denoiser.model,
        block_size=denoiser.block_size,
        attention=denoiser.attention,
        shift=denoiser.shift,
        mask_id=MASK,
        given=[i for i in range(len(ids)) if i not in holes],
        scale=settings.cfg_scale,
    )
    return oracles.slow_low_confidence_greedy(
        logits_fn, ids, holes, blocks, counts, [MASK], settings.threshold
    )


def count_forwards(denoiser):
    """A list that grows by (rows, tokens) with every forward of the model."""
    seen = []
    embeddings = denoiser.model.get_input_embeddings()
    embeddings.register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape)))
    return seen


@pytest.mark.parametrize("attention", BLOCK_ATTENTIONS)
@pytest.mark.parametrize(
    ("family", "shift"), [("llama", True), ("llama", False), ("granite", True)]
)
def test_every_step_with_a_cache_is_one_over_two_streams(family, shift, attention):
    denoiser = block_student(family, shift=shift, attention=attention)
    for length in range(int(shift), 2 * SIZE + 2):
        canvas = make_canvas(denoiser, [*PROMPTS[:length], *[MASK] * 5], FULL)
        while not canvas.finished:
            (found,) = open_logits(denoiser, [canvas])
            wanted_L = torch.zeros_like(canvas.open_L)
            wanted_L[canvas.blocks[0]] = canvas.open_L[canvas.blocks[0]]
            with torch.no_grad():
                expected = denoiser(canvas.ids_L[None], wanted_L[None], x0_bL=canvas.ids_L[None])
            assert torch.allclose(found[:, :MASK], expected[:, :MASK], atol=1e-4, rtol=1e-4)
            assert (found[:, MASK] == -math.inf).all()
            take_step(denoiser, {0: canvas})
            # Whole blocks of clean tokens are kept, as far as they have been read.
            kept = canvas.prefixes[0].length
            assert kept % SIZE == 0
            assert canvas.finished or kept + 2 * SIZE > canvas.blocks[0].start


VARIANTS = [
    {},
    {"steps": 4},
    {"steps": 5},
    {"threshold": 0.2},
    {"cfg_scale": 0.7},
    {"block_length": 1},
    {"block_length": 1, "cfg_scale": 0.7, "threshold": 0.1},
]


@pytest.mark.parametrize("attention", BLOCK_ATTENTIONS)
@pytest.mark.parametrize(("family", "shift"), [("llama", True), ("gpt2", False), ("granite", True)])
def test_blocks_equal_slow_greedy(family, shift, attention):
    denoiser = block_student(family, shift=shift, attention=attention)
    seen = count_forwards(denoiser)
    lengths = [
        *itertools.product([{}], (int(shift), 2, 3, 5)),
        *itertools.product(VARIANTS, (4, 7)),
    ]
    for variant, length in lengths:
        ids = [*PROMPTS[:length], *[MASK] * 6]
        settings = replace(FULL, **variant)
        expected, order = slow_blocks(denoiser, ids, settings)
        canvas = make_canvas(denoiser, ids, settings)
        seen.clear()
        (row,), done = run(denoiser, [canvas])
        assert row == expected
        assert [step.commits[0].positions_k.tolist() for step in done] == order
        # One forward a step: clean tokens are read with the block that comes after them.
        assert len(seen) == len(order)
        assert canvas.nfe == len(order) * (2 if settings.cfg_scale else 1)


def test_every_token_is_read_clean_once():
    denoiser = block_student(shift=True)
    seen = count_forwards(denoiser)
    run(denoiser, [make_canvas(denoiser, [*PROMPTS[:7], *[MASK] * 6], FULL)])
    # 6 of the prompt and the block 6 … 8; later its tokens and the next block; the last has one.
    assert seen == [(1, 9), (1, 3), (1, 6), (1, 3), (1, 3), (1, 4)]


@pytest.mark.parametrize("attention", BLOCK_ATTENTIONS)
def test_a_hole_in_a_text_of_blocks(attention):
    denoiser = block_student(shift=True, attention=attention)
    ids = [START, 3, *[MASK] * 5, 4, 9, 9, 1, MASK, MASK, 2, 8, 8, 8, MASK]
    expected, order = slow_blocks(denoiser, ids, FULL)
    (row,), done = run(denoiser, [make_canvas(denoiser, ids, FULL)])
    assert row == expected
    assert [step.commits[0].positions_k.tolist() for step in done] == order


@pytest.mark.parametrize("attention", BLOCK_ATTENTIONS)
def test_of_the_text_after_a_hole_its_last_block_is_seen(attention):
    denoiser = block_student(attention=attention)

    def first(ids):
        (found,) = open_logits(denoiser, [make_canvas(denoiser, ids, FULL)])
        return found[:, :MASK]

    before = first([START, MASK, 4, 5, 6])
    assert not torch.allclose(first([START, MASK, 7, 5, 6]), before, atol=1e-3)
    assert torch.equal(first([START, MASK, 4, 8, MASK, 9]), before)


BLOCK_ROWS = [
    ([START, 3, 1, *[MASK] * 6], FULL),
    ([START, *[MASK] * 9, 5], replace(FULL, temperature=0.8, remasking="random", steps=4)),
    ([START, 7, 7, 7, 2, 2, 2, 7, *[MASK] * 4], replace(FULL, cfg_scale=1.0, temperature=0.5)),
    ([START, *[MASK] * 2, 4, *[MASK] * 5], replace(FULL, block_length=1, remasking="margin")),
    ([START, 2, *[MASK] * 7], replace(FULL, temperature=1.3, threshold=0.3)),
    ([START, 2, *[MASK] * 7], replace(FULL, cfg_scale=0.4, suppress_eos=True, eos_last=True)),
    ([START, 1, 1, *[MASK] * 12], SamplerSettings(temperature=1.0)),
]


@pytest.mark.parametrize("attention", BLOCK_ATTENTIONS)
@pytest.mark.parametrize(("family", "shift"), [("llama", True), ("gpt2", False), ("granite", True)])
def test_a_row_of_blocks_is_the_same_alone_and_in_any_batch(family, shift, attention):
    denoiser = block_student(family, shift=shift, attention=attention)

    def canvases(order):
        rows = [(i, *BLOCK_ROWS[i]) for i in order]
        return [make_canvas(denoiser, ids, settings, key=(5, i)) for i, ids, settings in rows]

    alone = [run(denoiser, canvases([i]))[0][0] for i in range(len(BLOCK_ROWS))]
    for order in (range(7), [3, 6, 0, 5, 2, 1, 4], [4, 4, 1]):
        assert run(denoiser, canvases(order))[0] == [alone[i] for i in order]
    for batch_size in (1, 2, 4):
        later = canvases(range(7))
        widths = [len(step.commits) for step in denoise(denoiser, later, batch_size=batch_size)]
        assert [canvas.ids_L.tolist() for canvas in later] == alone
        assert max(widths) == batch_size


def test_equal_keys_give_equal_text_in_blocks():
    denoiser = block_student(shift=True)
    settings = replace(FULL, temperature=1.5)
    ids = [START, 3, *[MASK] * 9]
    texts = [tuple(fill(denoiser, ids, settings, key=("k", i))) for i in (0, 1, 0, 2)]
    assert texts[0] == texts[2]
    assert len(set(texts)) == 3


@pytest.mark.parametrize("failing", ["forward", "proposals"])
@pytest.mark.parametrize("number", [0, 1, 3, 4])
def test_a_step_of_blocks_that_fails_changes_nothing(failing, number, monkeypatch):
    denoiser = block_student(shift=True)

    def canvases():
        return [
            make_canvas(
                denoiser,
                [*PROMPTS[:length], *[MASK] * 6],
                replace(FULL, temperature=1.0, cfg_scale=scale, remasking=remasking),
                key=(3, length),
            )
            for length, scale, remasking in ((2, 0.0, "random"), (7, 1.0, "margin"))
        ]

    expected, _ = run(denoiser, canvases())
    rows = canvases()
    for _ in range(number):
        take_step(denoiser, dict(enumerate(rows)))

    def state():
        own = [(r.ids_L.tolist(), r.nfe, r.step, list(r.due), list(r.blocks)) for r in rows]
        return own, [r.random.get_state().tolist() for r in rows]

    calls = itertools.count()

    def breaking(real, at):
        def call(*arguments, **more):
            if next(calls) == at:
                raise MemoryError
            return real(*arguments, **more)

        return call

    before, prefixes = state(), [row.prefixes for row in rows]
    parts = [p for row in rows for prefix in row.prefixes for layer in prefix.layers for p in layer]
    copies = [part.clone() for part in parts]
    if failing == "forward":  # in the last layer: the cache of the forward has grown by then
        layer = denoiser.model.base_model.layers[-1]
        monkeypatch.setattr(layer, "forward", breaking(layer.forward, 0))
    else:  # the forward has gone well, and one row has drawn its tokens
        monkeypatch.setattr("mdm.sampler.propose", breaking(propose, 1))
    with pytest.raises(MemoryError):
        take_step(denoiser, dict(enumerate(rows)))
    assert state() == before
    assert all(row.prefixes is own for row, own in zip(rows, prefixes, strict=True))
    assert all(torch.equal(part, copy) for part, copy in zip(parts, copies, strict=True))
    for _ in denoise(denoiser, rows):
        pass
    assert [row.ids_L.tolist() for row in rows] == expected


def test_what_is_kept_is_freed_at_the_end():
    denoiser = block_student(shift=True)
    ids = [*PROMPTS[:4], *[MASK] * 4]
    canvas = make_canvas(denoiser, ids, replace(FULL, cfg_scale=1.0))
    take_step(denoiser, {0: canvas})
    assert [prefix.length for prefix in canvas.prefixes] == [3, 3]
    plain = make_canvas(denoiser, ids, FULL)
    take_step(denoiser, {0: plain})
    assert [prefix.length for prefix in plain.prefixes] == [3, 0]
    for _ in denoise(denoiser, [canvas, plain]):
        assert all(row.finished is (row.prefixes is NOTHING_READ) for row in (canvas, plain))
    assert canvas.finished
    assert plain.finished


def test_a_row_of_blocks_stops_at_an_end(monkeypatch):
    denoiser = block_student(shift=True)
    logits_V = torch.zeros(V)
    logits_V[END], logits_V[MASK] = 9.0, -math.inf
    monkeypatch.setattr(denoiser, "head", lambda rows_ND: logits_V.expand(len(rows_ND), -1))
    canvas = make_canvas(denoiser, [*PROMPTS[:5], *[MASK] * 7], SamplerSettings())
    (row,), _ = run(denoiser, [canvas])
    assert row == [*PROMPTS[:5], *[END] * 7]
    assert (canvas.nfe, canvas.ended) == (1, True)
    assert canvas.prefixes is NOTHING_READ


@pytest.mark.parametrize("attention", ["block", "context_causal"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_blocks_of_one_token_write_as_the_causal_model_does(family, attention):
    # Greedy, without the mask; a shifted model reads each token from the clean one before it.
    model = tiny_model(family, 16, layers=2, hidden=16)
    causal = tiny_model(family, 16, layers=2, hidden=16)
    make_bidirectional(model)
    denoiser = Denoiser(model, word_vocab(), shift=True, block_size=1, attention=attention).eval()
    ids = PROMPTS[:4]
    row = fill(denoiser, [*ids, *[MASK] * 12])
    with torch.no_grad():
        for _ in range(12):
            logits_V = causal(torch.tensor([ids])).logits[0, -1]
            ids = [*ids, int(logits_V[:MASK].argmax())]
    assert row == ids
    assert len(set(row[4:])) > 1


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"block_length": 3}, "block_length is 3, but this model denoises in blocks of 4 tokens"),
        ({"block_length": 8}, "block_length is 8, .* blocks of 4 tokens; leave block_length out"),
        (
            {"compat": "llada"},
            "compat=llada is a sampler for models without blocks, .* blocks of 4",
        ),
        (
            {"steps": 2},
            "steps is 2, but there are 3 blocks to denoise, .* set steps to 3 or more",
        ),
        ({"steps": 3, "block_length": 2}, "steps is 3, but there are 5 blocks"),
    ],
)
def test_settings_that_do_not_go_with_blocks(settings, text):
    denoiser = random_student(block_size=4)
    with pytest.raises(ConfigError, match=text):
        make_canvas(denoiser, HOLES["continue"], replace(FULL, **settings))


def test_blocks_are_counted_from_the_start_of_the_text():
    denoiser = random_student(block_size=4)

    def blocks(settings, ids):
        found = make_canvas(denoiser, ids, settings)
        return [(block.start, block.stop) for block in found.blocks], found.block_steps

    assert blocks(FULL, HOLES["continue"]) == ([(3, 4), (4, 8), (8, 11)], [1, 4, 3])
    assert blocks(replace(FULL, steps=6), HOLES["continue"])[1] == [1, 3, 2]
    assert blocks(replace(FULL, steps=3), HOLES["continue"])[1] == [1, 1, 1]
    sub = replace(FULL, block_length=2)
    assert blocks(sub, HOLES["continue"]) == (
        [(3, 4), (4, 6), (6, 8), (8, 10), (10, 11)],
        [1, 2, 2, 2, 1],
    )
    assert blocks(FULL, [1, MASK, 2, 3, 4, 5, 6, 7, 8, MASK, 9]) == ([(1, 4), (8, 10)], [1, 1])
    with pytest.raises(AssertionError, match="counted from position 0"):
        make_canvas(denoiser, [START, START, MASK], FULL, padding=1)
