"""The demo on a tiny model: numbers that fit together, and one JSON object last."""

import json
from dataclasses import replace

import pytest
import tiny_run
import torch
from click.testing import CliRunner

from mdm.benchmarks import demo
from mdm.benchmarks.command import demo as command
from mdm.errors import ConfigError
from mdm.train.teachers.ar import load_teacher


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    ar = tiny_run.ar_folder(folder / "ar")
    corpus = tiny_run.corpus_folder(folder / "code", files=40)
    sections = {"data": {"length": 96, "min_tokens": 8}, "train": {"steps": 30}}
    settings = replace(tiny_run.recipe(ar, corpus, **sections), name="demo")
    return tiny_run.write_recipe(folder / "demo.yaml", settings)


def test_the_demo_shows_a_gain_and_ends_with_json(recipe_file, tmp_path):
    arguments = ["--recipe", str(recipe_file), "--runs", str(tmp_path / "runs"), "--holes", "6"]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    numbers = json.loads(result.stdout.splitlines()[-1])["demo"]
    assert numbers["nelbo_after"] < numbers["nelbo_before"]
    fall = numbers["nelbo_before"] - numbers["nelbo_after"]
    assert numbers["improvement"] == pytest.approx(fall, rel=1e-6)
    assert numbers["improvement"] > 3 * numbers["improvement_std_err"] > 0
    assert numbers["infill_holes"] == 6
    assert {"infill_accuracy_before", "infill_accuracy_after", "infill_accuracy_teacher"} <= {
        *numbers
    }
    assert numbers["train_tokens"] == pytest.approx(30 * 8 * 96, rel=0.2)  # padding does not count
    assert numbers["seconds"] > numbers["train_seconds"] > 0
    assert "accuracy by noise level" in result.stdout
    assert (tmp_path / "runs/demo/final/mdm.json").is_file()
    again = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert (
        json.loads(again.stdout.splitlines()[-1])["demo"]["nelbo_after"] == numbers["nelbo_after"]
    )


def test_the_teacher_fills_from_the_left_alone(recipe_file):
    from mdm.config import build, read_yaml
    from mdm.train.recipe import Recipe
    from mdm.train.run import initial_student

    recipe = build(Recipe, read_yaml(recipe_file))
    student = initial_student(recipe)
    teacher = load_teacher(recipe.teacher.model, student.vocab, dtype=student.model.dtype)
    long = demo.Hole([256, 97, 98, 99, 100], [1, 2, 3], [7, 8, 9])
    other_right = demo.Hole(long.before, long.truth, [11, 12])
    short = demo.Hole([256, 97], [1, 2, 3], [5])
    together = demo.fill_from_left(teacher, [long, short])
    assert together == demo.fill_from_left(teacher, [long]) + demo.fill_from_left(teacher, [short])
    assert demo.fill_from_left(teacher, [other_right]) == together[:1]
    # Greedy, by definition: one forward over what is there, once a token.

    ids = list(long.before)
    for _ in range(demo.SPAN):
        logits_BLV = teacher.model(torch.tensor([ids])).logits
        ids.append(int(logits_BLV[0, -1, : teacher.num_tokens].argmax()))
    assert together[0] == ids[-demo.SPAN :]


def test_token_accuracy_counts_tokens_and_spreads_over_holes():
    holes = [demo.Hole([0], [1, 2, 3], [0]), demo.Hole([0], [4, 5, 6], [0])]
    assert demo.token_accuracy(holes, [[1, 2, 3], [4, 5, 6]]) == (1.0, 0.0)
    share, std_err = demo.token_accuracy(holes, [[1, 2, 3], [0, 0, 0]])
    assert share == 0.5
    assert std_err == pytest.approx(0.5)  # values 1 and 0: sd .707, over the root of 2


def test_only_the_demos_own_run_is_replaced(recipe_file, tmp_path):
    final = tmp_path / "runs" / "mine" / "final"
    final.mkdir(parents=True)
    arguments = ["--recipe", str(recipe_file), "--runs", str(tmp_path / "runs")]
    with pytest.raises(ConfigError, match="holds a run already"):
        CliRunner().invoke(command, [*arguments, "--set", "name=mine"], catch_exceptions=False)
    assert final.is_dir()


def test_rows_too_short_for_a_hole_are_named(recipe_file, tmp_path):
    final = tmp_path / "runs" / "demo" / "final"
    final.mkdir(parents=True)
    arguments = ["--recipe", str(recipe_file), "--runs", str(tmp_path / "runs")]
    with pytest.raises(ConfigError, match=r"raise data.length above 51"):
        CliRunner().invoke(command, [*arguments, "--set", "data.length=40"], catch_exceptions=False)
    assert final.is_dir()  # what was there is lost only when the demo can run
