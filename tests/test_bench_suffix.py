"""`mdm bench suffix`: the loop is the definition, the exact mode agrees with it, the sums are right.

Nothing here measures time.
"""

import dataclasses
import itertools
import json
import math
import statistics

import oracles
import pytest
import tiny
import tiny_run
import torch
from click.testing import CliRunner

from mdm.benchmarks import suffix_cost as bench
from mdm.benchmarks.command import bench as command
from mdm.benchmarks.counting import CountingTeacher
from mdm.errors import ConfigError

SETTINGS = bench.SuffixBench(
    model="ar",
    candidates=8,
    length=20,
    rows=2,
    positions=4,
    loop_positions=2,
    repeats=2,
    prune=1e-3,
    tail_draws=4,
    seed=0,
)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "ar"
    return dataclasses.replace(SETTINGS, model=tiny_run.ar_folder(folder))


@pytest.fixture(scope="module")
def record(settings, tmp_path_factory):
    path = tmp_path_factory.mktemp("records") / "suffix.jsonl"
    found = bench.run(settings, path)
    assert json.loads(path.read_text())["kind"] == "bench suffix"
    return found


def toy_teacher(vocab_size=5):
    model = tiny.toy_ar(vocab_size)
    return CountingTeacher.of(tiny_run.ar_teacher(model)), tiny.next_log_probs(model)


def test_the_loop_is_the_definition():
    teacher, next_log_probs = toy_teacher()
    x0 = [0, 3, 1, 4, 2, 2]
    for position in range(1, 5):
        ids_C = torch.tensor([4, 0, 2])
        found_C = bench.loop_scores(teacher, torch.tensor(x0), position, ids_C)
        for token, score in zip(ids_C.tolist(), found_C.tolist(), strict=True):
            text = [*x0[:position], token, *x0[position + 1 :]]
            assert score == pytest.approx(oracles.ar_log_prob(next_log_probs, text, position, 6))


@pytest.mark.parametrize("together", [True, False])
def test_both_modes_give_the_full_conditional(together):
    teacher, next_log_probs = toy_teacher()
    x0_L = torch.tensor([0, 3, 1, 4, 2, 2])
    positions = [1, 2, 4]
    settings = dataclasses.replace(SETTINGS, candidates=5, prune=1e-9)
    for target in (settings.exact, settings.fast):
        if together:
            answers = [bench.ask(teacher, x0_L, positions, target)]
        else:
            answers = bench.ask_alone(teacher, x0_L, positions, target)
        assert sum(map(len, answers)) == 3
        found_NC = torch.cat([found.log_probs_NK for found in answers])
        ids_NC = torch.cat([found.token_ids_NK for found in answers])
        for n, position in enumerate(positions):
            truth_V = oracles.full_conditional(next_log_probs, x0_L.tolist(), position, 5, start=1)
            torch.testing.assert_close(
                found_NC[n].double().exp(), truth_V[ids_NC[n]], atol=1e-6, rtol=0
            )


def test_gaps_and_distances_are_told():
    teacher, _ = toy_teacher()
    x0_L = torch.tensor([0, 3, 1, 4, 2, 2])
    settings = dataclasses.replace(SETTINGS, candidates=5)
    exact = bench.ask(teacher, x0_L, [2, 3], settings.exact)
    scores_C = bench.loop_scores(teacher, x0_L, 3, exact.token_ids_NK[1])
    agreed = bench.gap(exact, 1, scores_C)
    assert max(agreed.values()) < 1e-6
    wrong_C = scores_C.log_softmax(0)
    rarest = int(wrong_C.argmin())
    wrong_C[rarest] = -40.0
    wrong_C[0] += 0.5
    told = bench.gap(exact, 1, wrong_C)
    wrong_C = wrong_C.log_softmax(0)
    apart_C = (wrong_C - exact.log_probs_NK[1]).abs()
    assert told["log_prob"] == pytest.approx(float(apart_C.max()), abs=1e-5)
    assert int(apart_C.argmax()) == rarest
    others = [n for n in range(5) if n != rarest]
    assert told["log_prob_likely"] == pytest.approx(float(apart_C[others].max()), abs=1e-5)
    tv = float((wrong_C.exp() - exact.log_probs_NK[1].exp()).abs().sum() / 2)
    assert told["tv"] == pytest.approx(tv, abs=1e-6)
    shuffled = dataclasses.replace(
        exact,
        token_ids_NK=exact.token_ids_NK.flip(1),
        log_probs_NK=exact.log_probs_NK.flip(1),
    )
    assert bench.total_variation(exact, shuffled, 5).max() < 1e-12
    swapped = dataclasses.replace(exact, token_ids_NK=exact.token_ids_NK.flip(1))
    p_NC = exact.log_probs_NK.double().exp()
    expected_N = (p_NC - p_NC.flip(1)).abs().sum(1) / 2
    torch.testing.assert_close(bench.total_variation(exact, swapped, 5), expected_N)


def test_positions_have_a_left_and_a_right_side():
    every = dataclasses.replace(SETTINGS, length=6, positions=4)
    assert bench.positions_of(every, 0) == [1, 2, 3, 4]
    few = [bench.positions_of(SETTINGS, row) for row in range(8)]
    assert all(own == sorted(set(own)) and len(own) == 4 for own in few)
    assert len({tuple(own) for own in few}) > 1


def test_the_record(record, settings):
    results = record["results"]
    assert set(results["sides"]) == set(bench.SIDES)
    assert set(results["ratios"]) == set(bench.OURS)
    for side, own in results["sides"].items():
        assert len(own["seconds_all"]) == settings.rows * settings.repeats
        assert own["seconds_per_position"] > 0
        assert (own["tokens_per_position"] == 8 * 20) == (side == "loop")
    tokens = {side: own["tokens_per_position"] for side, own in results["sides"].items()}
    assert tokens["fast"] < tokens["exact"] < tokens["loop"]
    places = [bench.positions_of(settings, row) for row in range(2)]
    branches = sum(
        7 * (19 - i) for own in places for i in own
    )  # the text's own token costs nothing
    assert tokens["exact"] == pytest.approx((branches + 2 * 20) / 8)
    few = [own[n] for own in places for n in (0, 2)]
    assert tokens["exact_alone"] == pytest.approx(sum(20 + 7 * (19 - i) for i in few) / 4)
    agreement = results["agreement"]
    assert agreement["n"] == 4
    assert agreement["log_prob_likely"] < 1e-4
    assert agreement["tv"] < 1e-4
    fast, outside = results["fast"], results["outside"]
    assert fast["n"] == outside["n"] == 8
    assert 0 <= fast["tv_mean"] <= fast["tv_95"] <= fast["tv_max"] <= 1
    assert 0 < fast["dropped_mean"] <= fast["dropped_max"] <= settings.prune
    assert 0 < outside["mass_mean"] <= outside["mass_max"] < 1
    for side in bench.OURS:
        assert results["ratios"][side]["n"] == 4


def test_seconds_are_those_of_one_position(settings, monkeypatch):
    """A clock that ticks once a look: every side takes one second for all that it does in a turn."""
    ticks = itertools.count()
    monkeypatch.setattr(bench.time, "perf_counter", lambda: float(next(ticks)))
    vocab_size = tiny_run.VOCAB
    model = tiny.tiny_model("llama", vocab_size, layers=1, hidden=16)
    teacher = CountingTeacher.of(tiny_run.ar_teacher(model))
    x0_RL = torch.arange(40).reshape(2, 20)
    places = [[1, 5, 9, 12], [2, 3, 4, 18]]
    results, answers = bench.times(teacher, x0_RL, places, settings, lambda text: None)
    took = {side: own["seconds_all"] for side, own in results["sides"].items()}
    assert took["loop"] == took["exact_alone"] == took["fast_alone"] == [1 / 2] * 4
    assert took["exact"] == took["fast"] == [1 / 4] * 4
    assert results["ratios"]["exact"]["ratio"] == 2
    assert len(answers) == 2  # of the first repeat


def test_ratios_are_of_the_sums_over_turns():
    found = bench.ratio([4.0, 9.0, 40.0], [2.0, 3.0, 4.0])
    assert found["ratio"] == pytest.approx(53 / 9)
    apart = [(4 - 53 / 9 * 2) / 3, (9 - 53 / 9 * 3) / 3, (40 - 53 / 9 * 4) / 3]
    assert found["std_err"] == pytest.approx(statistics.stdev(apart) / 3**0.5)
    assert found["n"] == 3
    # An easy text is no proof of speed.
    assert bench.ratio([10.0, 10.0], [0.1, 9.9])["ratio"] == pytest.approx(2)
    assert math.isnan(bench.ratio([4.0], [2.0])["std_err"])


def test_spread_has_the_tail():
    value_N = torch.arange(101, dtype=torch.float32)
    found = bench.spread("tv", value_N, torch.arange(101))
    assert found["tv_mean"] == 50
    assert found["tv_95"] == pytest.approx(95)
    assert found["tv_max"] == 100
    assert found["tv_std_err"] == pytest.approx(value_N.std().item() / 101**0.5)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("exact_ratio", 2.0, 1.9),
        ("fast_ratio", 25.0, 19.0),
        ("agreement", 1e-5, 2e-4),
        ("fast_tv", 1e-3, 2e-3),
    ],
)
def test_aims_are_met_or_missed(name, good, bad):
    for value, met in ((good, True), (bad, False)):
        found = {key: value if key == name else aim for key, aim in bench.AIMS.items()}
        told = bench.aims(
            {
                "ratios": {
                    "exact": {"ratio": found["exact_ratio"]},
                    "fast": {"ratio": found["fast_ratio"]},
                },
                "agreement": {"tv": found["agreement"]},
                "fast": {"tv_mean": found["fast_tv"]},
            }
        )
        assert [key for key, line in told.items() if not line["met"]] == ([] if met else [name])


def test_the_card(record):
    text = bench.describe(record)
    *card, last = text.splitlines()
    assert json.loads(last)["kind"] == "bench suffix"
    assert sum(line.startswith(tuple(bench.SIDES)) for line in card) >= len(bench.SIDES)
    assert sum(line.startswith("aim ") for line in card) == len(bench.AIMS)
    assert max(map(len, card)) < 200


def test_the_command(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["suffix", "--model", settings.model, "--candidates", "4", "--length", "12",
                 "--rows", "1", "--positions", "3", "--loop-positions", "2", "--tail-draws", "2",
                 "--record", "suffix.jsonl"]  # fmt: skip
    done = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout.splitlines()[-1])
    assert record == json.loads((tmp_path / "suffix.jsonl").read_text())
    assert record["results"]["agreement"]["n"] == 2
    assert record["results"]["fast"]["tv_std_err"] is None  # one row


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"positions": 19}, "18"),
        ({"loop_positions": 5}, "loop-positions"),
        ({"tail_draws": 0}, "tail-draws"),
        ({"prune": 1.0}, "prune"),
        ({"length": 1}, "positions"),
    ],
)
def test_bad_settings_are_named(change, named):
    with pytest.raises(ConfigError, match=named):
        dataclasses.replace(SETTINGS, **change)


@pytest.mark.parametrize(
    ("change", "named"), [({"candidates": 256}, "260 tokens"), ({"length": 2000}, "2000")]
)
def test_what_the_model_cannot_do_is_refused(settings, tmp_path, change, named):
    with pytest.raises(ConfigError, match=named):
        bench.run(dataclasses.replace(settings, **change), tmp_path / "x.jsonl")
