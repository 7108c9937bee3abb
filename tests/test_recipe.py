"""Recipes: shipped ones, files, overrides, and what is refused."""

import dataclasses

import pytest
import yaml
from click.testing import CliRunner

from mdm.config import build, to_tree
from mdm.errors import ConfigError
from mdm.train.command import train
from mdm.train.recipe import DEFAULT_RECIPE, Recipe, TrainSettings, read_recipe, shipped_recipes


def test_the_default_is_shipped():
    assert DEFAULT_RECIPE in shipped_recipes()


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads_and_survives_a_round_trip(name):
    recipe = read_recipe(name)
    assert recipe.name == name
    text = yaml.safe_dump(to_tree(recipe), sort_keys=False)  # as new_run writes it
    assert build(Recipe, yaml.safe_load(text)) == recipe


def test_list():
    assert CliRunner().invoke(train, ["--list"]).output.split() == shipped_recipes()


def test_a_file_is_named_after_itself_and_can_be_overridden(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("train: {steps: 3}\n")
    assert (read_recipe(str(path)).name, read_recipe(str(path)).train.steps) == ("mine", 3)
    changed = read_recipe(str(path), ["train.steps=5", "name=other", "train.learning_rate=1e-3"])
    assert (changed.name, changed.train.steps, changed.train.learning_rate) == ("other", 5, 1e-3)
    path.write_text("name: given\n")
    assert read_recipe(str(path)).name == "given"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.stepz=3", r"unknown setting 'train\.stepz'; did you mean 'train\.steps'"),
        ("trian.steps=3", "did you mean 'train'"),
        ("train.steps=many", r"train\.steps must be a whole number"),
        ("train.steps=0", r"train\.steps must be at least 1"),
        ("train.keep_checkpoints=0", r"train\.keep_checkpoints"),
        ("train.weight_decay=-1", r"train\.weight_decay"),
        ("train.learning_rate=0", r"train\.learning_rate"),
        ("train.lr_floor=2", r"train\.lr_floor"),
        ("train.ema_decay=1", r"train\.ema_decay"),
        ("train.betas=[0.9]", r"train\.betas"),
        ("train.betas=[0.9, 1.0]", r"train\.betas"),
        ("train.lr_schedule=cosin", "did you mean 'cosine'"),
        ("train.precision=fp16", "fp32"),
        ("teacher.dtype=half", "bf16"),
        ("objective.masking=rat", "did you mean 'rate'"),
        ("target.kind=sufix", "did you mean 'suffix'"),
        ("masks.where=weight", "did you mean 'weighted'"),
        ("masks.identifer=2", r"did you mean 'masks\.identifier'"),
        ("masks.keyword=0", r"masks\.keyword"),
        ("data.language=pyton", "did you mean 'python'"),
        ("data.held_out_fraction=0", "held-out"),
        ("name=../up", "plain folder name"),
        ("name=.hidden", "plain folder name"),
        ("name=''", "plain folder name"),
    ],
)
def test_what_is_wrong_is_named(assignment, message):
    with pytest.raises(ConfigError, match=message):
        read_recipe(DEFAULT_RECIPE, [assignment])


def test_settings_are_checked_together():
    changes = ["target.kind=suffix", "objective.divergence=reverse_kl"]
    with pytest.raises(ConfigError, match=r"objective\.tail=renormalise"):
        read_recipe(DEFAULT_RECIPE, changes)
    assert read_recipe(DEFAULT_RECIPE, [*changes, "objective.tail=renormalise"])


def test_masks_are_checked_against_the_other_sections():
    weighted = ["masks.where=weighted", "data.language=auto"]
    assert read_recipe(DEFAULT_RECIPE, weighted).masks.where == "weighted"
    assert read_recipe(DEFAULT_RECIPE).masks.where == "uniform"
    chosen = ["masks.distilled=weighted", "data.language=python", "objective.kd_positions=2"]
    assert read_recipe(DEFAULT_RECIPE, chosen)
    for changes, message in (
        (weighted[:1], r"data\.language=auto"),
        ([*weighted, "objective.masking=exact"], r"objective\.masking=rate"),
        (chosen[:2], r"objective\.kd_positions to 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_recipe(DEFAULT_RECIPE, changes)
    assert read_recipe(DEFAULT_RECIPE, [*chosen[:2], "objective.kd_lambda=0"])


def test_unknown_recipes(tmp_path):
    with pytest.raises(ConfigError, match=r"did you mean 'demo'.*\.yaml file"):
        read_recipe("demos")
    with pytest.raises(ConfigError, match="cannot read"):
        read_recipe(str(tmp_path / "missing.yaml"))


def test_settings_cannot_change_later():
    with pytest.raises(dataclasses.FrozenInstanceError):
        read_recipe(DEFAULT_RECIPE).train.steps = 4
    assert TrainSettings() == TrainSettings()


def test_resume_takes_no_other_settings(tmp_path):
    for flags in (["--recipe", "demo"], ["--set", "train.steps=1"], ["--name", "x"]):
        result = CliRunner().invoke(train, ["--resume", str(tmp_path), *flags])
        assert isinstance(result.exception, ConfigError)
    result = CliRunner().invoke(train, ["--resume", str(tmp_path)])
    assert isinstance(result.exception, ConfigError)
    assert "no run to resume" in str(result.exception)
