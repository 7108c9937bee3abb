"""`mdm bench cache`: both sides take the same step, the sums are right. Nothing here measures time."""

import dataclasses
import json
import math
import statistics
from types import SimpleNamespace

import pytest
import tiny_run
from click.testing import CliRunner

from mdm.benchmarks import cache as bench
from mdm.benchmarks.command import bench as command
from mdm.errors import ConfigError

SETTINGS = bench.CacheBench(
    model="ar",
    source="corpus",
    rows=3,
    length=24,
    cached_rows=20,
    pairs=3,
    top_k=64,
    precision="fp32",
    seed=0,
)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    place = tmp_path_factory.mktemp("bench")
    return dataclasses.replace(
        SETTINGS,
        model=tiny_run.ar_folder(place / "ar"),
        source=tiny_run.corpus_folder(place / "corpus"),
    )


@pytest.fixture(scope="module")
def record(settings, tmp_path_factory):
    path = tmp_path_factory.mktemp("records") / "cache.jsonl"
    found = bench.run(settings, path)
    assert json.loads(path.read_text())["kind"] == "bench cache"
    return found


def test_both_sides_take_the_same_step(record):
    results = record["results"]
    assert results["n"] == 3
    for name in bench.SIDES:
        assert len(results[name]["seconds_all"]) == 3
    assert results["loss"] > 1
    assert results["loss_difference"] < 1e-5 * results["loss"]


def test_what_the_cache_takes(record, settings):
    results = record["results"]
    assert results["cached_tokens"] >= settings.cached_rows * settings.length
    assert 388 <= results["bytes_per_token"] <= results["bytes_per_maskable_token"]
    assert record["checkpoint"]
    assert record["settings"]["pairs"] == 3


def test_the_sides_take_turns(monkeypatch):
    """The same step on both sides, after one that is not counted."""
    taken = []

    def step(run, number):
        taken.append((run, number))
        return bench.Step(1.0 + len(taken), 0.0, 1.0)

    monkeypatch.setattr(bench, "timed_step", step)
    found = bench.take_turns({"online": "a", "cached": "b"}, 2, lambda text: None)
    assert taken == [("a", 1), ("b", 1), ("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert [pair["online"].seconds for pair in found] == [4.0, 6.0]


def pairs_of(online, cached, tokens=100.0):
    return [
        {"online": bench.Step(a, 2.0, tokens), "cached": bench.Step(b, 2.0 + b / 1000, tokens)}
        for a, b in zip(online, cached, strict=True)
    ]


DONE = SimpleNamespace(bytes=39000, tokens=100, maskable=90, seconds=6.0, asked=100)


def test_the_sums():
    found = bench.summary(pairs_of([4.0, 6.0, 9.0], [2.0, 4.0, 3.0]), DONE)
    assert found["online"]["seconds"] == 6
    assert found["cached"]["steps_per_second"] == pytest.approx(1 / 3)
    assert found["cached"]["tokens_per_second"] == pytest.approx(100 / 3)
    assert found["ratio"] == 2
    assert found["ratio_std_err"] == pytest.approx(statistics.stdev([2, 1.5, 3]) / 3**0.5)
    assert found["loss_difference"] == pytest.approx(0.004)
    assert found["bytes_per_token"] == 390
    assert found["bytes_per_maskable_token"] == pytest.approx(433.3, abs=0.1)
    assert found["cache_tokens_per_second"] == pytest.approx(100 / 6)
    assert found["pays_after_epochs"] == pytest.approx(6 / (6 - 3))  # a step is an epoch here
    assert all(aim["met"] for aim in found["aims"].values())


def test_aims_can_be_missed_and_a_cache_may_never_pay():
    found = bench.summary(pairs_of([2.0], [2.0]), SimpleNamespace(**{**vars(DONE), "bytes": 41000}))
    assert found["pays_after_epochs"] == math.inf
    assert math.isnan(found["ratio_std_err"])
    assert not any(aim["met"] for aim in found["aims"].values())


def test_the_card(record):
    *card, last = bench.describe(record).splitlines()
    assert json.loads(last)["kind"] == "bench cache"
    assert sum(line.startswith(bench.SIDES) for line in card) == 3  # and the ratio
    assert sum(line.startswith("aim ") for line in card) == 2
    assert max(map(len, card)) < 140


def test_the_command(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["cache", "--model", settings.model, "--source", settings.source, "--rows", "2",
                 "--length", "24", "--cached-rows", "6", "--pairs", "1", "--top-k", "8"]  # fmt: skip
    done = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout.splitlines()[-1])
    assert record == json.loads((tmp_path / "benchmarks/results/cache.jsonl").read_text())
    assert record["results"]["ratio_std_err"] is None  # one pair
    assert record["results"]["bytes_per_token"] < 100
    assert record["settings"]["precision"] == "bf16"


@pytest.mark.parametrize("name", ["rows", "cached_rows", "pairs"])
def test_bad_settings_are_named(name):
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} must be at least 1; got 0"):
        dataclasses.replace(SETTINGS, **{name: 0})
