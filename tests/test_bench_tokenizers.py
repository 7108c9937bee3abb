"""The study of tokenizers in small: what it trains, what it pairs, what it says."""

import json

import pytest
from click.testing import CliRunner
from tiny_run import corpus_folder

from mdm.benchmarks.command import bench
from mdm.benchmarks.tokenizers import ARMS, TokenizersBench, recipe_of
from mdm.errors import ConfigError
from mdm.train.recipe import Recipe


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    options = {
        "seeds": "0,1", "sources": corpus_folder(folder / "corpus", files=40), "documents": "30",
        "small": "270", "large": "300", "width": "16", "layers": "1", "length": "24", "rows": "4",
        "teacher-steps": "12", "steps": "4", "runs": str(folder / "runs"),
        "record": str(folder / "record.jsonl"),
    }  # fmt: skip
    arguments = ["tokenizers", *(part for k, v in options.items() for part in (f"--{k}", v))]
    result = CliRunner().invoke(bench, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_a_study(output):
    record = json.loads(output.splitlines()[-1])
    results = record["results"]
    runs = {(run["arm"], run["seed"]): run for run in results["runs"]}
    assert set(runs) == {(arm, seed) for arm in ARMS for seed in (0, 1)}
    for seed in (0, 1):
        # same weights, same held-out masks before the first step, same number of tokens
        assert len({runs[arm, seed]["bound_before"] for arm in ARMS}) == 1
        assert len({runs[arm, seed]["tokens"] for arm in ARMS}) == 1
        assert len({runs[arm, seed]["bound"] for arm in ARMS}) == len(ARMS)
    assert runs["ce", 0]["bound_before"] != runs["ce", 1]["bound_before"]
    assert "target_lost" in runs["mapped", 0]
    assert "target_lost" not in runs["embedding", 0]
    teachers = results["teachers"]
    assert teachers["small"]["tokens"] == 270 < teachers["large"]["tokens"] <= 300
    assert teachers["large"]["bytes_per_token"] > teachers["small"]["bytes_per_token"]
    pairs = {(line["arm"], line["minus"]): line for line in results["differences"]}
    assert pairs.keys() == {(a, r) for a in ARMS for r in ("ce", "shared") if a != r}
    expected = [runs["mapped", s]["bound"] - runs["ce", s]["bound"] for s in (0, 1)]
    assert pairs["mapped", "ce"]["mean"] == pytest.approx(sum(expected) / 2)
    assert pairs["mapped", "ce"]["n"] == 2


def test_the_tables(output):
    assert "| embedding_l2 |" in output
    (line,) = [line for line in output.splitlines() if line.startswith("| ce |")]
    assert line.split("|")[3].strip() == "-"


def test_arms_differ_in_the_target_alone(tmp_path):
    settings = TokenizersBench()
    recipes = {arm: recipe_of(settings, tmp_path, arm, 1) for arm in ARMS}
    for part in ("student", "data", "train", "masks"):
        assert len({repr(getattr(recipe, part)) for recipe in recipes.values()}) == 1
    assert all(isinstance(recipe, Recipe) for recipe in recipes.values())
    assert recipes["shared"].teacher.model.endswith("small")
    assert recipes["mapped"].teacher.model.endswith("large")


def test_what_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"arm 'maped'.*did you mean 'mapped'"):
        TokenizersBench(arms=("maped",))
    with pytest.raises(ConfigError, match=r"--small \(9\) must be below --large \(8\)"):
        TokenizersBench(small=9, large=8)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    result = CliRunner().invoke(bench, ["tokenizers", "--runs", str(tmp_path / "full")])
    assert "is not empty" in str(result.exception)
    result = CliRunner().invoke(bench, ["tokenizers", "--seeds", "0,a"])
    assert "must be whole numbers like 0,1,2; got '0,a'" in result.output
