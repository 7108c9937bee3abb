"""`mdm bench study` on a tiny model: paired numbers, finished runs that stay finished, honest intervals."""

import json
import math
import statistics
from dataclasses import replace

import pytest
import tiny_run
import torch
from click.testing import CliRunner

from mdm.benchmarks import demo, synthetic
from mdm.benchmarks import study as bench
from mdm.benchmarks import study_report as report
from mdm.benchmarks.study_command import study as command
from mdm.benchmarks.study_report import Units
from mdm.errors import ConfigError
from mdm.train.held_out import HeldOut


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny recipe file; settings of a study of it."""
    folder = tmp_path_factory.mktemp("study")
    ar = tiny_run.ar_folder(folder / "ar")
    corpus = tiny_run.corpus_folder(folder / "code", files=40)
    sections = {"data": {"length": 80, "min_tokens": 8, "max_held_out_rows": 6}}
    tree = tiny_run.tree(ar, corpus, **sections)
    tree["train"] |= {"batch_rows": 4, "micro_rows": 4, "learning_rate": 3e-3}
    tiny_run.write_recipe(folder / "tiny.yaml", tree)
    return folder


@pytest.fixture
def settings(place):
    return bench.StudyBench(
        arms=("ce", "left_2"),
        seeds=(0, 1),
        steps=4,
        layers=1,
        length=80,
        holes=4,
        recipe=str(place / "tiny.yaml"),
        assignments=("train.eval_rows=5",),
    )


@pytest.fixture(scope="module")
def done(place):
    """A finished study, its folder and its record."""
    settings = bench.StudyBench(
        arms=("ce", "left_2", "ce_weighted"),
        seeds=(0, 1),
        steps=4,
        layers=1,
        length=80,
        holes=4,
        recipe=str(place / "tiny.yaml"),
    )
    record = bench.run(settings, place / "runs", place / "study.jsonl", lambda text: None)
    return settings, place, record


def test_every_arm_is_a_recipe_with_little_changed(settings):
    recipes = {arm: bench.recipe_of(settings, arm, 7) for arm in bench.ARMS}
    base = recipes["ce"]
    for arm, recipe in recipes.items():
        assert recipe.name == f"{arm}-seed7"
        assert (recipe.data, recipe.student, recipe.teacher) == (
            base.data, base.student, base.teacher
        )  # fmt: skip
        assert recipe.train == replace(base.train, seed=7)
        assert recipe.objective.weight == base.objective.weight
        assert (recipe.objective.kd_lambda == 0) == arm.startswith("ce")
    assert base.data.language == "auto"
    assert base.train.eval_rows == 5  # from the command line, over what the study wants
    assert base.train.eval_draws == 2
    assert (base.target.fill, base.target.fills) == ("span", 4)
    cheap = replace(recipes["left_2"].target, kind="any")
    for arm in ("suffix", "i_sir", "student", "suffix_weighted"):
        assert recipes[arm].objective == recipes["left_2"].objective
        assert recipes[arm].target.kind == arm.removesuffix("_weighted")
        assert replace(recipes[arm].target, kind="any") == cheap
    assert recipes["left"].objective.kd_positions == 0
    assert recipes["left_weighted"].masks.where == recipes["ce_weighted"].masks.where == "weighted"
    assert recipes["suffix_weighted"].masks.distilled == "weighted"
    assert recipes["suffix"].masks == base.masks


def test_a_study_of_the_embedded_model_is_possible():
    """The settings that the command line gives fit together for every arm."""
    for arm in bench.ARMS:
        recipe = bench.recipe_of(bench.StudyBench(), arm, 0)
        assert (recipe.student.init, recipe.student.layers) == ("embedded", 6)
        assert (recipe.train.steps, recipe.data.length) == (80, 128)
    assert bench.recipe_of(bench.StudyBench(layers=None), "ce", 0).student.layers is None


def test_all_arms_of_a_seed_are_paired(done):
    _, _, record = done
    runs = {(line["arm"], line["seed"]): line for line in record["results"]["runs"]}
    assert [*runs] == [(arm, seed) for seed in (0, 1) for arm in ("ce", "left_2", "ce_weighted")]
    for seed in (0, 1):
        lines = [runs[arm, seed] for arm in ("ce", "left_2", "ce_weighted")]
        assert len({line["bound_before"] for line in lines}) == 1
        assert len({line["tokens"] for line in lines}) == 1
        assert len({line["bound"]["mean"] for line in lines}) == 3  # and trained differently
    assert runs["ce", 0]["bound_before"] != runs["ce", 1]["bound_before"]  # other masks
    assert runs["ce", 0]["teacher_seconds"] == 0
    assert runs["left_2", 0]["teacher_seconds"] > 0
    for line in runs.values():
        assert 0 <= line["exact_3"]["mean"] <= line["exact_1"]["mean"] <= 1
        assert line["steps"] == 4
        assert line["seconds"] > 0


def test_the_bound_is_the_one_of_training(done):
    """Read back from the metrics of the run, and the difference from the rows of both."""
    _, place, record = done
    for line in record["results"]["runs"]:
        folder = place / "runs" / f"{line['arm']}-seed{line['seed']}"
        records = [json.loads(text) for text in (folder / "record.jsonl").read_text().splitlines()]
        assert [entry["kind"] for entry in records] == ["train", bench.KIND]
        after = records[0]["results"]["after"]
        assert line["bound"]["mean"] == pytest.approx(after["nelbo"])
        assert line["bound"]["std_err"] == pytest.approx(after["nelbo_std_err"])
        low = after["by_noise_level"][0]
        assert low["t_low"] == 0
        assert line["accuracy_low"]["mean"] == pytest.approx(low["accuracy"])
        before = records[0]["results"]["before"]["nelbo"]
        assert line["bound_before"] == pytest.approx(before)
        # The weights and rows are gone, what was learnt stays.
        assert not any((folder / name).exists() for name in ("final", "checkpoints", "data"))
    bounds = {(r["arm"], r["seed"]): r["bound"]["mean"] for r in record["results"]["runs"]}
    (found,) = [
        line
        for line in record["results"]["differences"]
        if (line["arm"], line["minus"], line["measure"]) == ("left_2", "ce", "bound")
    ]
    gaps = [bounds["left_2", seed] - bounds["ce", seed] for seed in (0, 1)]
    assert [seed["difference"] for seed in found["seeds"]] == pytest.approx(gaps)
    assert found["mean"] == pytest.approx(statistics.fmean(gaps))
    low, high = found["interval"]
    assert high - low == pytest.approx(12.706 * abs(gaps[0] - gaps[1]))
    assert all(0 < seed["row_std_err"] < 1 for seed in found["seeds"])


def test_finished_runs_are_not_repeated(done, tmp_path, monkeypatch):
    settings, place, record = done

    def refuse(*_arguments):
        raise AssertionError("trained again")

    monkeypatch.setattr(bench, "train", refuse)
    said = []
    again = bench.run(settings, place / "runs", tmp_path / "again.jsonl", said.append)
    assert json.loads(json.dumps(again["results"])) == json.loads(json.dumps(record["results"]))
    assert not said
    some = bench.run(replace(settings, arms=("ce",)), place / "runs", tmp_path / "x", said.append)
    assert not said
    assert some["results"]["differences"] == []
    with pytest.raises(AssertionError, match="trained again"):
        bench.run(replace(settings, seeds=(0, 2)), place / "runs", tmp_path / "x", said.append)
    assert said == ["4/6 ce-seed2 …"]


def test_a_run_with_other_settings_is_not_taken_for_this_one(done, tmp_path):
    settings, place, _ = done
    for change in ({"steps": 5}, {"holes": 5}, {"assignments": ("train.clip=2",)}):
        with pytest.raises(ConfigError, match="ce-seed0 was measured with other settings"):
            bench.run(replace(settings, **change), place / "runs", tmp_path / "x", print)


def test_a_run_that_was_stopped_is_done_again(done, settings, tmp_path):
    """Trained but not measured, or stopped while its last line was written."""
    _, place, record = done
    for number, cut in enumerate((0, 50)):
        runs = tmp_path / str(number)
        folder = runs / "ce-seed0"
        folder.mkdir(parents=True)
        text = (place / "runs" / "ce-seed0" / "record.jsonl").read_text().splitlines()
        (folder / "record.jsonl").write_text(text[0] + "\n" + text[1][:cut])
        (folder / "final").mkdir()
        some = replace(settings, arms=("ce",), seeds=(0,), assignments=())
        found = bench.run(some, runs, tmp_path / "study.jsonl", lambda text: None, keep=bool(cut))
        assert found["results"]["runs"][0]["bound"] == record["results"]["runs"][0]["bound"]
        assert (folder / "final").exists() == bool(cut)


def test_shorter_holes_end_where_the_long_one_does():
    hole = demo.Hole([9, 8], [1, 2, 3], [7])
    assert bench.with_last(hole, 1) == demo.Hole([9, 8, 1, 2], [3], [7])
    assert bench.with_last(hole, 2) == demo.Hole([9, 8, 1], [2, 3], [7])
    assert bench.with_last(hole, 3) == hole


def test_held_out_values_as_units():
    values = torch.tensor(
        [[0.1, 2.0, 1.0, 10], [0.9, 3.0, 0.0, 20], [0.5, 4.0, 0.5, 10], [0.15, 1.0, 0.25, 20]]
    ).double()
    units = bench.held_out_units(HeldOut(values, draws=2))
    assert units["bound"] == Units([3.0, 2.0], [10.0, 20.0])
    assert units["accuracy_low"].values == [1.0, 0.25]
    assert units["accuracy_low"].weights == pytest.approx([1.0, 3.0])
    values[:, 0] = 0.5
    assert [*bench.held_out_units(HeldOut(values, draws=2))] == ["bound"]


def test_means_and_their_errors():
    assert report.weighted_mean(Units([1.0, 3.0], [1.0, 1.0])) == pytest.approx((2.0, 1.0))
    mean, std_err = report.weighted_mean(Units([1.0, 3.0, 5.0], [2.0, 1.0, 1.0]))
    assert mean == pytest.approx(2.5)
    by_hand = math.sqrt(1.5 * ((0.5 * 1.5) ** 2 + (0.25 * 0.5) ** 2 + (0.25 * 2.5) ** 2))
    assert std_err == pytest.approx(by_hand)
    assert math.isnan(report.weighted_mean(Units([1.0], [2.0]))[1])
    gap = report.paired(Units([5.0, 9.0], [1.0, 1.0]), Units([4.0, 8.0], [1.0, 1.0]))
    assert gap == (1.0, 0.0)  # rows differ much, their differences not at all
    with pytest.raises(AssertionError, match="same rows"):
        report.paired(Units([5.0], [1.0]), Units([4.0], [2.0]))


def test_intervals_are_as_wide_as_few_seeds_make_them():
    assert report.t_interval(1.0, 0.5, 1) is None
    assert report.t_interval(1.0, 0.5, 3) == pytest.approx((1 - 2.1515, 1 + 2.1515))
    low, high = report.t_interval(0.0, 1.0, 40)
    assert high == -low == 2.262  # never narrower than it should be


def test_comparisons_use_the_seeds_that_both_have():
    def unit(*values):
        return {"bound": Units([*values], [1.0] * len(values))}

    units = {
        ("left", 0): unit(1.0, 2.0),
        ("ce", 0): unit(0.0, 0.0),
        ("left", 1): unit(3.0, 3.0),
        ("suffix", 1): unit(1.0, 1.0),
    }
    found = {(line["arm"], line["minus"]): line for line in report.comparisons(units)}
    assert [*found] == [("left", "ce"), ("ce", "left"), ("suffix", "left")]
    assert found["left", "ce"]["mean"] == 1.5
    assert found["left", "ce"]["n"] == 1
    assert found["left", "ce"]["interval"] is None
    assert found["suffix", "left"]["seeds"] == [{"seed": 1, "difference": -2.0, "row_std_err": 0.0}]


def test_the_card_of_a_study(done, tmp_path):
    _, _, record = done
    text = report.describe(record)
    last = json.loads(text.splitlines()[-1])
    assert last["kind"] == "bench study"
    assert "units" not in json.dumps(last["results"])  # the rows stay with the runs
    rows = [line for line in text.splitlines() if line.startswith("| left_2 |")]
    assert len(rows) == 2  # means, minus ce
    bounds = [r["bound"]["mean"] for r in record["results"]["runs"] if r["arm"] == "left_2"]
    assert f"{statistics.fmean(bounds):.3f}" in rows[0]
    assert rows[1].startswith("| left_2 | ce |")
    assert sum(line.startswith("| ce | left_2 |") for line in text.splitlines()) == 1
    assert {line.count("|") for line in text.splitlines() if line.startswith("| ")} == {7, 6}
    report.plot(record, tmp_path / "study.png")
    assert (tmp_path / "study.png").stat().st_size > 1000


def test_the_command(place, tmp_path):
    arguments = [
        "--arms", "ce,suffix_weighted", "--seeds", "4", "--steps", "4", "--layers", "0",
        "--length", "80", "--holes", "3", "--recipe", str(place / "tiny.yaml"),
        "--set", "train.eval_rows=3", "--set", "train.eval_draws=1",
        "--runs", str(tmp_path / "runs"), "--record", str(tmp_path / "r.jsonl"),
        "--plot", str(tmp_path / "p.png"),
    ]  # fmt: skip
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    record = json.loads(result.stdout.splitlines()[-1])
    assert [line["arm"] for line in record["results"]["runs"]] == ["ce", "suffix_weighted"]
    assert record["settings"]["layers"] is None
    assert "2/2 suffix_weighted-seed4" in result.stderr
    assert (tmp_path / "p.png").is_file()
    assert json.loads((tmp_path / "r.jsonl").read_text()) == record


def test_the_command_on_the_synthetic_language(tmp_path, monkeypatch):
    whole = synthetic.run

    def smaller(settings, *rest):
        assert (settings.words, settings.length) == (5, 6)
        return whole(replace(settings, words=3, length=3), *rest)

    monkeypatch.setattr(synthetic, "run", smaller)
    arguments = ["--synthetic", "--arms", "ce", "--seeds", "3", "--steps", "4",
                 "--fills", "3", "--language", "5", "--record", str(tmp_path / "r.jsonl")]  # fmt: skip
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    record = json.loads(result.stdout.splitlines()[-1])
    assert record["kind"] == "bench study synthetic"
    assert (record["settings"]["fills"], record["settings"]["language"]) == (3, 5)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--seeds", "0,x"], "--seeds"),
        (["--seeds", "1,1"], "differ"),
        (["--arms", "sufix"], "suffix"),
        (["--holes", "1"], "holes"),
        (["--set", "target.kund=left"], "target.kind"),
        (["--synthetic", "--arms", "isir"], "i_sir"),
    ],
)
def test_bad_input_is_named(arguments, named, tmp_path):
    where = ["--runs", str(tmp_path / "runs"), "--record", str(tmp_path / "r.jsonl")]
    with pytest.raises(ConfigError, match=named):
        CliRunner().invoke(command, [*arguments, *where], catch_exceptions=False)
    assert not (tmp_path / "runs").exists()
