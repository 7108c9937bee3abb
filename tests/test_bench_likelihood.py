"""`mdm bench likelihood`: its table is the model's, its numbers are those of the estimators."""

import json
import math

import pytest
import torch
from students import random_student
from tiny import byte_tokenizer, tiny_model

from mdm.benchmarks import likelihood as bench
from mdm.checkpoint import save_denoiser
from mdm.convert import StudentSettings, convert
from mdm.diffusion import generator
from mdm.errors import ConfigError
from mdm.estimators import ESTIMATORS
from mdm.likelihood import LikelihoodSettings, Pair, log_likelihood

PAIR = Pair((12, 1, 2), (4, 5, 6, 7), "q")
SETTINGS = bench.LikelihoodBench(
    model="student",
    items=2,
    length=4,
    long_items=1,
    long_length=6,
    context=8,
    budgets=(2, 4, 99),
    draws=3,
    long_draws=2,
    seed=0,
)


@pytest.fixture
def student(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model("llama", 259, layers=1).save_pretrained("ar")
    byte_tokenizer().save_pretrained("ar")
    save_denoiser(convert(StudentSettings(init="ar")), "student")


@pytest.mark.parametrize("shift", [False, True])
def test_the_table_holds_what_the_estimators_would_ask(shift):
    denoiser = random_student(shift=shift)
    table = bench.table_of(denoiser, PAIR)
    exact = log_likelihood(denoiser, [PAIR], LikelihoodSettings())[0]
    assert table.truth == pytest.approx(exact.value, abs=1e-5)
    for name in bench.COMPARED:
        settings = LikelihoodSettings(estimator=name, mc_samples=8, seed=3)
        asked = log_likelihood(denoiser, [PAIR], settings)[0]
        masks = ESTIMATORS[name].draw(4, 8, generator("likelihood", 3, "q", 0))
        assert masks.value(table.look_up(masks)) == pytest.approx(asked.value, abs=1e-5)


def test_errors_are_told_apart_from_the_truth():
    """A table whose tokens have one log-probability each: any unbiased estimator of one level hits it."""
    flat_MA = torch.full((16, 4), -2.0, dtype=torch.float64)
    table = bench.Table(PAIR, flat_MA, -8.0)
    settings = bench.LikelihoodBench("x", 1, 4, 0, 1, 1, (8,), 20, 2, 0)
    line = bench.short_line("stratified", 8, [(table, table)], settings)
    assert line["rmse"] == pytest.approx(0, abs=1e-9)
    assert line["flips_own_masks"] == line["flips_shared_masks"] == 0
    off = bench.short_line("stratified", 8, [(bench.Table(PAIR, flat_MA, -7.0), table)], settings)
    assert off["rmse"] == pytest.approx(1)
    assert off["bias"] == pytest.approx(-1)
    assert off["coverage"] == 0


def test_a_record_and_its_tables(student, tmp_path):
    record = bench.run(SETTINGS, tmp_path / "records.jsonl")
    assert json.loads((tmp_path / "records.jsonl").read_text())["results"] == json.loads(
        json.dumps(record["results"]).replace("NaN", "null")
    )
    short = record["results"]["short"]
    assert [(line["forwards"], line["estimator"]) for line in short] == [
        (budget, name) for budget in (2, 4) for name in bench.COMPARED
    ]  # 99 forwards are more than there are masks
    assert len(record["results"]["long"]) == 9
    text = bench.describe(record)
    assert text.count("stratified") == 2 + 3 + 5  # two tables, and the JSON line
    assert json.loads(text.splitlines()[-1])["kind"] == "bench likelihood"
    assert not any(math.isnan(line["rmse"]) for line in short)
    bench.plot(record, tmp_path / "errors.png")
    assert (tmp_path / "errors.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("change", "named"),
    [({"length": 20}, "20"), ({"draws": 1}, "draws"), ({"budgets": ()}, "budgets")],
)
def test_bad_settings_are_named(change, named):
    with pytest.raises(ConfigError, match=named):
        bench.LikelihoodBench(**{**vars(SETTINGS), **change})


@pytest.mark.parametrize(
    ("change", "named"), [({"long_items": -1}, "long_items"), ({"budgets": (15, 16)}, "nothing")]
)
def test_nothing_to_measure_is_refused(change, named):
    with pytest.raises(ConfigError, match=named):
        bench.LikelihoodBench(**{**vars(SETTINGS), **change})
