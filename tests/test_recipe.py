"""Recipes: shipped ones, files, overrides, and what is refused."""

import dataclasses
import json

import pytest
import yaml
from click.testing import CliRunner

from mdm.config import build, to_tree
from mdm.errors import ConfigError
from mdm.train.command import train
from mdm.train.estimate import describe
from mdm.train.recipe import DEFAULT_RECIPE, Recipe, TrainSettings, read_recipe, shipped_recipes


def test_the_default_is_shipped():
    assert DEFAULT_RECIPE in shipped_recipes()


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads_and_survives_a_round_trip(name):
    recipe = read_recipe(name)
    assert recipe.name == name
    text = yaml.safe_dump(to_tree(recipe), sort_keys=False)  # as new_run writes it
    assert build(Recipe, yaml.safe_load(text)) == recipe


# --- TIDE ----------------------------------------------------------------------------------------

FULL_SIZE = {"tide-shared": "tide-shared-small", "tide-cross": "tide-cross-small"}
QWEN3 = {
    **{"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "head_dim": 128},
    **{"num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 151_936},
    **{"tie_word_embeddings": True, "max_position_embeddings": 40_960, "attention_bias": False},
    **{"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6},
}
PUBLISHED = {
    "Qwen3-0.6B": {**QWEN3, "model_type": "qwen3"},
    "Qwen3-0.6B-bd3lm": {**QWEN3, "model_type": "a2d-qwen3"},
    "WeDLM-8B": {
        **QWEN3,
        **{"model_type": "wedlm", "qk_norm": True, "tie_word_embeddings": False},
        **{"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36},
        **{"num_attention_heads": 32, "max_position_embeddings": 16384},
        "auto_map": {"AutoModelForCausalLM": "modeling_wedlm.WeDLMForCausalLM"},
    },
    "LLaDA2.0-mini": {
        **{"model_type": "llada2_moe", "hidden_size": 2048, "intermediate_size": 5120},
        **{"num_hidden_layers": 20, "num_attention_heads": 16, "num_key_value_heads": 4},
        **{"head_dim": 128, "vocab_size": 157_184, "max_position_embeddings": 32768},
        **{"num_experts": 256, "num_experts_per_tok": 8, "num_shared_experts": 1},
        **{"moe_intermediate_size": 512, "first_k_dense_replace": 1},
        "auto_map": {"AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM"},
    },
}


@pytest.mark.parametrize("student", ["Qwen3-0.6B", "Qwen3-0.6B-bd3lm"])
@pytest.mark.parametrize(
    ("name", "teacher", "size", "blocks"),
    [
        ("tide-shared", "WeDLM-8B", "8190.7M parameters", "reordered"),
        ("tide-cross", "LLaDA2.0-mini", "about 16255.5M parameters", "block"),
    ],
)
def test_full_size_recipes_run_dry_on_configs_alone(
    tmp_path, monkeypatch, student, name, teacher, size, blocks
):
    """No weights, no tokenizers, no data, no network."""
    monkeypatch.chdir(tmp_path)
    for folder in (student, teacher):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(PUBLISHED[folder]))
    changes = [f"student.init=./{student}", f"teacher.model=./{teacher}"]
    said = describe(read_recipe(name, changes), 8, 150.0)
    assert "student     596.0M parameters, blocks of 32 tokens" in said
    assert f"teacher     {size}" in said
    assert f"blocks of 32 tokens, attention {blocks}, bf16" in said
    assert "GiB a process, of 8" in said
    assert "TFLOP/s a process, of 8" in said


def test_the_published_settings_of_tide():
    shared, cross = map(read_recipe, FULL_SIZE)
    for recipe, rows in ((shared, 80), (cross, 64)):
        settings, objective = recipe.train, recipe.objective
        assert (recipe.student.kind, recipe.student.blocks, recipe.data.length) == (
            "bd3lm", 32, 512
        )  # fmt: skip
        assert (settings.learning_rate, settings.lr_schedule, settings.clip) == (5e-5, "cosine", 1)
        assert settings.warmup_steps == settings.steps // 10
        assert (settings.batch_rows, settings.betas) == (rows, (0.9, 0.999))
        assert settings.batch_rows == 8 * settings.micro_rows  # eight devices
        assert (objective.kd_weight, objective.kd_reduce) == (1, "mean_masked")
        assert (objective.weight, objective.masking, objective.noise) == ("bound", "rate", "row")
    assert (shared.mix.first, shared.mix.last, shared.mix.weight) == (0.1, 0.9, "midrange")
    assert (shared.mix.by_noise, shared.mix.by_training) == (True, True)
    assert (shared.target.comp_demo, shared.target.comp_demo_share) == ("bernoulli", 0.5)
    assert (shared.objective.kd_temperature, shared.objective.temperature_squared) == (2, True)
    assert (cross.objective.kd_temperature, cross.objective.temperature_squared) == (5, False)
    assert cross.objective.chunk_loss == "reverse_calm"
    assert (cross.mix.active, cross.target.comp_demo) == (False, "")


def test_small_twins_ask_the_same():
    teacher = read_recipe("tide-teacher")
    for large, small in FULL_SIZE.items():
        full, twin = read_recipe(large), read_recipe(small)
        assert twin.target.kind == full.target.kind
        assert twin.target.comp_demo == full.target.comp_demo
        assert twin.mix.active == full.mix.active
        assert twin.teacher.model == f"runs/{teacher.name}/final"
        assert twin.student.blocks == teacher.student.blocks
        assert twin.data == teacher.data


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
