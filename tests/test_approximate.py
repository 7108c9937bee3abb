"""Approximate caches against the same with explicit lists of old keys and values; how far off they are.

Token ids: words 0 … 11, start 12, end 13, pad 14, mask 15.
"""

import itertools
from dataclasses import replace

import oracles
import pytest
import torch
from students import random_student

from mdm.canvas import NOTHING_READ, SamplerSettings
from mdm.errors import ConfigError
from mdm.sampler import denoise, make_canvas, open_logits, take_step

START, END, MASK = 12, 13, 15
FULL = SamplerSettings(stop_at_eos=False, block_length=3)
HOLES = {
    "continue": [START, 3, 1, *[MASK] * 8],
    "fill": [START, 3, *[MASK] * 7, 5, 5],
    "two holes": [START, *[MASK] * 3, 4, 4, *[MASK] * 5, 2],
}
PLAIN = itertools.product(["prefix", "dual"], [None, 1, 2])


def run(denoiser, canvases):
    steps = list(denoise(denoiser, canvases))
    return [canvas.ids_L.tolist() for canvas in canvases], steps


def blocks_of(ids, size=3):
    holes = [i for i, token in enumerate(ids) if token == MASK]
    starts = range(holes[0], holes[-1] + 1, size)
    blocks = [list(range(first, min(first + size, holes[-1] + 1))) for first in starts]
    return holes, [block for block in blocks if set(block) & set(holes)]


@pytest.mark.parametrize("name", HOLES)
@pytest.mark.parametrize(
    ("family", "shift", "scale"),
    [("llama", False, 0.0), ("llama", True, 0.0), ("gpt2", True, 0.7), ("granite", True, 0.0)],
)
def test_equals_old_keys_and_values_by_hand(name, family, shift, scale):
    layers = {} if family == "granite" else {"layers": 2}
    denoiser = random_student(family, shift=shift, **layers)
    ids = HOLES[name]
    holes, blocks = blocks_of(ids)
    given = [i for i in range(len(ids)) if i not in holes]
    for cache, refresh in PLAIN:

        def fresh(cache=cache, refresh=refresh):
            return oracles.stale_logits(
                denoiser.model,
                cache=cache,
                refresh=refresh,
                blocks=blocks,
                mask_id=MASK,
                shift=shift,
            )

        one, other = fresh(), fresh()

        def guided(canvas, one=one, other=other):
            found = one(canvas)
            if not scale:
                return found
            # The current block is found by what is open, so the mask stands for given tokens only here.
            hidden = [-1 if i in given else token for i, token in enumerate(canvas)]
            return (1 + scale) * found - scale * other(hidden)

        if scale:
            inner = denoiser.model.forward

            def masked(x, *more, inner=inner, **options):
                return inner(x.masked_fill(x < 0, MASK), *more, **options)

            denoiser.model.forward = masked
        expected, order = oracles.slow_low_confidence_greedy(
            guided, ids, holes, blocks, [[1] * len(ids)] * len(blocks), forbidden=[MASK]
        )
        if scale:
            denoiser.model.forward = inner
        settings = replace(FULL, cache=cache, refresh=refresh, cfg_scale=scale)
        (row,), steps = run(denoiser, [make_canvas(denoiser, ids, settings)])
        assert row == expected
        assert [step.commits[0].positions_k.tolist() for step in steps] == order


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("shift", [False, True])
def test_a_cache_that_is_always_made_anew_is_exact(cache, shift):
    denoiser = random_student(shift=shift, layers=2)
    for ids in HOLES.values():
        exact, _ = run(denoiser, [make_canvas(denoiser, ids, FULL)])
        found, steps = run(
            denoiser, [make_canvas(denoiser, ids, replace(FULL, cache=cache, refresh=1))]
        )
        assert found == exact
        assert {step.commits[0].kind for step in steps} == {"refresh"}


def test_a_window_is_lifted_as_without_a_cache():
    denoiser = random_student("mistral", sliding_window=3, layers=2)
    ids = HOLES["continue"]
    exact, cached = (
        make_canvas(denoiser, ids, settings) for settings in (FULL, replace(FULL, cache="dual"))
    )
    (expected,), (found,) = open_logits(denoiser, [exact]), open_logits(denoiser, [cached])
    assert torch.allclose(found[:, :MASK], expected[:, :MASK], atol=1e-4, rtol=1e-4)


def test_it_is_an_approximation_and_an_old_one_a_worse_one():
    denoiser = random_student(layers=3, shift=True)
    ids = [START, 3, 1, *[MASK] * 24]
    settings = replace(FULL, block_length=12)
    drift = {}
    for cache, refresh in itertools.product(["prefix", "dual"], [None, 2]):
        canvas = make_canvas(denoiser, ids, replace(settings, cache=cache, refresh=refresh))
        worst = 0.0
        while not canvas.finished:
            whole = make_canvas(denoiser, canvas.ids_L.tolist(), settings)
            whole.blocks[0] = canvas.blocks[0]  # the first open position may be further on
            (exact,), (found,) = open_logits(denoiser, [whole]), open_logits(denoiser, [canvas])
            worst = max(worst, float((exact - found)[:, :MASK].abs().max()))
            take_step(denoiser, {0: canvas})
        drift[cache, refresh] = worst
    assert all(0.01 < worst < 50 for worst in drift.values())
    assert drift["dual", 2] < drift["dual", None]


@pytest.mark.parametrize(("cache", "reads"), [("prefix", [11, 9, 9, 11]), ("dual", [11, 4, 4, 11])])
def test_what_is_read_in_which_kind_of_forward(cache, reads):
    denoiser = random_student(shift=True)
    settings = replace(FULL, cache=cache)
    _, steps = run(denoiser, [make_canvas(denoiser, HOLES["continue"], settings)])
    commits = [step.commits[0] for step in steps]
    assert [commit.tokens_read for commit in commits[:4]] == reads
    kinds = ["refresh", "denoise", "denoise"] * 2 + ["refresh", "denoise"]
    assert [commit.kind for commit in commits] == kinds


@pytest.mark.parametrize("shift", [False, True])
def test_rows_of_any_kind_share_a_batch(shift):
    denoiser = random_student(shift=shift, layers=2)
    kinds = [("none", None), ("prefix", None), ("dual", 2), ("dual", None), ("prefix", 1)]
    rows = [
        (ids, replace(FULL, cache=cache, refresh=refresh, cfg_scale=scale))
        for (cache, refresh), ids, scale in zip(
            kinds, itertools.cycle(HOLES.values()), [0.0, 0.5, 0.0, 0.7, 0.0], strict=False
        )
    ]
    alone = [run(denoiser, [make_canvas(denoiser, *row)])[0][0] for row in rows]
    for order, size in [(range(5), None), ([4, 2, 0, 3, 1], None), (range(5), 2), ([2, 2, 3], 2)]:
        found, _ = run_with(denoiser, [make_canvas(denoiser, *rows[i]) for i in order], size)
        assert found == [alone[i] for i in order]


def run_with(denoiser, canvases, size):
    steps = list(denoise(denoiser, canvases, batch_size=size))
    return [canvas.ids_L.tolist() for canvas in canvases], steps


def test_a_step_that_fails_can_be_tried_again(monkeypatch):
    denoiser = random_student(shift=True, layers=2)
    settings = replace(FULL, cache="dual", temperature=1.0)
    expected, _ = run(denoiser, [make_canvas(denoiser, HOLES["continue"], settings)])
    canvas = make_canvas(denoiser, HOLES["continue"], settings)
    take_step(denoiser, {0: canvas})
    layer = denoiser.model.base_model.layers[-1]
    real, calls = layer.forward, itertools.count()

    def breaking(*arguments, **options):
        if next(calls) == 0:
            raise MemoryError
        return real(*arguments, **options)

    monkeypatch.setattr(layer, "forward", breaking)
    with pytest.raises(MemoryError):
        take_step(denoiser, {0: canvas})
    assert run(denoiser, [canvas])[0] == expected


def test_what_is_kept_is_freed_at_the_end():
    denoiser = random_student(shift=True)
    canvas = make_canvas(denoiser, HOLES["fill"], replace(FULL, cache="prefix"))
    take_step(denoiser, {0: canvas})
    assert canvas.prefixes[0].length == 11
    run(denoiser, [canvas])
    assert canvas.prefixes is NOTHING_READ


def test_a_model_with_blocks_has_an_exact_cache():
    denoiser = random_student(block_size=3)
    with pytest.raises(ConfigError, match=r"cache=dual is an approximation .* has an exact cache"):
        make_canvas(denoiser, HOLES["continue"], replace(FULL, cache="dual"))
