"""Settings of on-policy training, and which rollouts a step learns from: by counting all of them."""

import dataclasses
import itertools
import math
import re
from collections import Counter

import pytest

from mdm.canvas import SamplerSettings
from mdm.errors import ConfigError
from mdm.train.on_policy import (
    OnPolicySettings,
    batch_of,
    batch_size,
    chosen,
    first_of,
    is_due,
    length_limit,
    needed_batches,
)

# --- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("fraction", -0.1),
        ("fraction", 1.5),
        ("fraction", math.nan),
        ("replay", -0.25),
        ("replay", 1),
        ("replay", 1.25),
        ("start_step", -1),
        ("prompt_tokens", -1),
        ("max_prompt_tokens", 0),
        ("max_prompts", 0),
        ("length", 0),
        ("first_length", 0),
        ("growth_batches", -2),
        ("steps_per_batch", 0),
        ("decode_rows", 0),
        ("tokens_per_step", 0),
        ("max_staleness", 0),
        ("samples", -3),
        ("length_growth", "cosinus"),
        ("states", "rounds"),
        ("eos", "pad"),
        ("reduce", "rollouts"),
        ("temperature", -1.0),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("threshold", 0.0),
        ("threshold", 1.01),
        ("block_length", 0),
        ("remasking", "low_confidenc"),
    ],
)
def test_refusals_name_the_setting_and_its_value(field, value):
    # Counted without a threshold only, which is refused for itself.
    free = {"threshold": None} if field == "tokens_per_step" else {}
    said = rf"{field}\b.*{re.escape(str(value))}"
    if field == "remasking":
        said = f"{field} strategy.*{value}"
    with pytest.raises(ConfigError, match=said):
        OnPolicySettings(**{field: value, **free})


@pytest.mark.parametrize(
    ("field", "value", "meant"),
    [
        ("states", "rounds", "round"),
        ("eos", "paded", "padded"),
        ("length_growth", "cosin", "cosine"),
        ("reduce", "tokens", "token"),
    ],
)
def test_names_that_are_nearly_right_are_guessed(field, value, meant):
    with pytest.raises(ConfigError, match=f"on_policy.{field}.*{meant!r}"):
        OnPolicySettings(**{field: value})


def test_settings_that_do_not_go_together():
    for settings, said in (
        ({"first_length": 80, "length": 40, "growth_batches": 1}, "first_length=80 .*length=40"),
        ({"tokens_per_step": 3}, "tokens_per_step=3 .*threshold=null .*0.9"),
        ({"states": "random", "reduce": "rollout"}, "reduce=rollout with states=random"),
        ({"remasking": "entropy"}, "threshold needs .*'entropy'"),
    ):
        with pytest.raises(ConfigError, match=said):
            OnPolicySettings(**settings)


def test_what_looks_odd_and_is_not():
    assert not OnPolicySettings().active
    assert OnPolicySettings(fraction=1).active
    assert OnPolicySettings(max_prompts=None, start_step=0, prompt_tokens=0, samples=0)
    assert OnPolicySettings(tokens_per_step=3, threshold=None, remasking="entropy")
    # Without growth there is no first length to be too large.
    assert length_limit(OnPolicySettings(length=10), 0) == 10


def test_the_sampler_gets_what_it_has_in_common():
    given = {"block_length": 4, "temperature": 0.7, "top_p": 0.8, "remasking": "margin"}
    by_threshold = OnPolicySettings(threshold=0.6, **given)
    assert by_threshold.sampler == SamplerSettings(threshold=0.6, **given)
    static = OnPolicySettings(threshold=None, tokens_per_step=3, remasking="random")
    assert static.sampler == SamplerSettings(temperature=1.0, remasking="random")


def test_rows_are_a_whole_number():
    for fraction, batch_rows, rows in (
        (0, 7, 0),
        (0.25, 8, 2),
        (1, 5, 5),
        (1 / 3, 3, 1),
        (0.7, 10, 7),
    ):
        assert OnPolicySettings(fraction=fraction).rows(batch_rows) == rows
    said = r"fraction=0\.3 of train.batch_rows=8 is 2\.4 rows"
    with pytest.raises(ConfigError, match=said):
        OnPolicySettings(fraction=0.3).rows(8)


def test_some_rollouts_of_a_step_are_new():
    for replay, rows, new in ((0, 8, 8), (0.25, 8, 6), (0.5, 2, 1), (0.75, 4, 1)):
        assert OnPolicySettings(replay=replay).new_rows(rows) == new


@pytest.mark.parametrize(("replay", "rows"), [(0.5, 3), (0.9, 1), (0.1, 4), (0.99, 4)])
def test_replayed_rows_are_a_whole_number_too(replay, rows):
    with pytest.raises(ConfigError, match=rf"replay={replay} of {rows} rows .* leave one for new"):
        OnPolicySettings(fraction=1, replay=replay).rows(rows)


# --- how long they may be --------------------------------------------------------------------------


def test_length_grows_as_published():
    """Code of OPDLM: 100 + 3900 (1 - cos(π/2 min(s/100, 1))); the paper has it linear over 10 batches."""
    settings = OnPolicySettings(first_length=100, length=4000, growth_batches=100)
    cosine = dataclasses.replace(settings, length_growth="cosine")
    for s in (0, 1, 25, 50, 99, 100, 101, 200):
        published = 100 + 3900 * (1 - math.cos(math.pi / 2 * min(s / 100, 1)))
        assert abs(length_limit(cosine, s) - published) <= 0.5
    assert [length_limit(cosine, s) for s in (0, 50, 100, 200)] == [100, 1242, 4000, 4000]
    linear = dataclasses.replace(settings, growth_batches=10)
    assert [length_limit(linear, s) for s in (0, 1, 5, 9, 10, 11)] == [
        100,
        490,
        2050,
        3610,
        4000,
        4000,
    ]


@pytest.mark.parametrize("growth", ["linear", "cosine"])
def test_length_never_falls_and_stays_between_its_ends(growth):
    settings = OnPolicySettings(length=37, first_length=5, length_growth=growth, growth_batches=9)
    lengths = [length_limit(settings, batch) for batch in range(12)]
    assert lengths == sorted(lengths)
    assert (lengths[0], lengths[8] < 37, lengths[9:]) == (5, True, [37] * 3)
    at_once = dataclasses.replace(settings, growth_batches=0)
    assert {length_limit(at_once, batch) for batch in range(12)} == {37}


# --- which rollouts a step learns from -------------------------------------------------------------

CASES = [
    (start, per_batch, rows, replay)
    for start, per_batch, (rows, replay) in itertools.product(
        (0, 3), (1, 4), ((1, 0), (6, 0), (6, 0.5), (8, 0.25), (5, 0.8))
    )
]
BATCHES = 5


def schedule(start, per_batch, rows, replay, staleness=2):
    settings = OnPolicySettings(
        fraction=1, start_step=start, steps_per_batch=per_batch, replay=replay,
        max_staleness=staleness,
    )  # fmt: skip
    steps = range(start, start + BATCHES * per_batch)
    used = [[chosen(settings, rows, 7, step, i) for i in range(rows)] for step in steps]
    return settings, steps, used


@pytest.mark.parametrize(("start", "per_batch", "rows", "replay"), CASES)
def test_every_rollout_is_new_exactly_once(start, per_batch, rows, replay):
    settings, steps, used = schedule(start, per_batch, rows, replay)
    new = Counter()
    for step, places in zip(steps, used, strict=True):
        own = rows if batch_of(settings, step) == 0 else settings.new_rows(rows)
        new.update(places[:own])
        assert all(batch == batch_of(settings, step) for batch, _ in places[:own])
        assert all(batch < batch_of(settings, step) for batch, _ in places[own:])
    sizes = [batch_size(settings, rows, batch) for batch in range(BATCHES)]
    assert new == {(b, n): 1 for b, size in enumerate(sizes) for n in range(size)}
    # The prompts' places go on where the batch before stopped.
    for batch in range(BATCHES):
        assert first_of(settings, rows, batch) == sum(sizes[:batch])
    assert sizes[0] == rows * per_batch
    if not replay or rows == 1:
        assert set(sizes) == {sizes[0]}


@pytest.mark.parametrize(("start", "per_batch", "rows", "replay"), CASES)
def test_what_a_step_uses_is_at_hand_and_not_too_old(start, per_batch, rows, replay):
    settings, steps, used = schedule(start, per_batch, rows, replay)
    for step, places in zip(steps, used, strict=True):
        batch, wanted = batch_of(settings, step), list(needed_batches(settings, step))
        oldest = max(0, batch - 2) if replay else batch
        assert wanted == list(range(oldest, batch + 1))
        for number, place in places:
            assert number in wanted
            assert 0 <= place < batch_size(settings, rows, number)


@pytest.mark.parametrize(("start", "per_batch"), [(0, 1), (0, 4), (3, 1), (3, 4)])
def test_a_batch_is_due_when_its_first_step_comes(start, per_batch):
    settings = OnPolicySettings(start_step=start, steps_per_batch=per_batch)
    due = [step for step in range(start + 5 * per_batch) if is_due(settings, step)]
    assert due == [start + number * per_batch for number in range(5)]
    for step in range(start + 5 * per_batch):
        batch = batch_of(settings, step)
        assert (batch < 0) is (step < start)
        if step > start:
            assert is_due(settings, step) is (batch != batch_of(settings, step - 1))


@pytest.mark.parametrize("staleness", [1, 2, 9])
def test_replayed_rollouts_are_uniform_over_what_is_allowed(staleness):
    """The first batch, where nothing is replayed, is larger: rollouts are as likely, batches are not."""
    rows, per_batch = 40, 2
    settings = OnPolicySettings(
        fraction=1, steps_per_batch=per_batch, replay=0.5, max_staleness=staleness
    )
    batch = 3
    allowed = [
        (number, place)
        for number in range(max(0, batch - staleness), batch)
        for place in range(batch_size(settings, rows, number))
    ]
    counts, draws = Counter(), 0
    for seed in range(100):
        for step in range(batch * per_batch, (batch + 1) * per_batch):
            for sample in range(20, 40):
                counts[chosen(settings, rows, seed, step, sample)] += 1
                draws += 1
    assert set(counts) == set(allowed)
    expected = draws / len(allowed)
    chi2 = sum((counts[place] - expected) ** 2 / expected for place in allowed)
    assert chi2 < len(allowed) - 1 + 4 * math.sqrt(2 * len(allowed))


def test_replays_are_functions_of_seed_step_and_sample():
    settings = OnPolicySettings(fraction=1, steps_per_batch=4, replay=0.5)
    keys = [(seed, step, sample) for seed in (0, 1) for step in (8, 9) for sample in (8, 9, 15)]
    found = {key: chosen(settings, 16, *key) for key in keys}
    assert found == {key: chosen(settings, 16, *key) for key in reversed(keys)}
    assert len(set(found.values())) > len(keys) // 2
    # New ones do not depend on the seed.
    assert chosen(settings, 16, 0, 8, 3) == chosen(settings, 16, 5, 8, 3) == (2, 3)
