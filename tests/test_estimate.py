"""`--dry-run`: sizes from configs alone."""

import pytest
import tiny
import yaml
from click.testing import CliRunner
from tiny_run import ar_folder, recipe, tiny_denoiser, write_recipe

from mdm.checkpoint import save_denoiser
from mdm.config import to_tree
from mdm.convert import student_config
from mdm.train.command import train
from mdm.train.estimate import count_parameters, describe, memory_bytes


@pytest.fixture
def ar(tmp_path):
    """A checkpoint without its weights: a dry run must not miss them."""
    folder = ar_folder(tmp_path / "ar", layers=4)
    (tmp_path / "ar" / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_without_weights(family, tied):
    model = tiny.tiny_model(family, 50, tie_word_embeddings=tied)
    assert count_parameters(model.config) == sum(p.numel() for p in model.parameters())


def test_what_is_described(ar, tmp_path):
    settings = recipe(ar, tmp_path, student={"layers": 2}, train={"steps": 7, "batch_rows": 4})
    lines = describe(settings).splitlines()
    listed = yaml.safe_load("\n".join(lines[: lines.index("")]))
    assert listed == to_tree(settings)
    text = "\n".join(lines)
    assert "2 layers, width 16" in text
    assert f"{7 * 4 * 24:,} in 7 steps of 4 rows of 24" in text
    assert "fp32" in next(line for line in lines if line.startswith("teacher  "))
    assert sum(line.endswith("GiB") for line in lines) == 4
    without = describe(recipe(ar, tmp_path, objective={"kd_lambda": 0.0}))
    assert "teacher     none (objective.kd_lambda is 0)" in without


def test_a_denoiser_is_described_too(tmp_path):
    save_denoiser(tiny_denoiser(ar_folder(tmp_path / "ar")), tmp_path / "student")
    assert "2 layers" in describe(recipe(tmp_path / "student", tmp_path))


def test_memory_follows_the_settings(tmp_path):
    config = student_config(tiny.tiny_config("llama", 259, layers=8), layers=None, width=1.0)
    number = count_parameters(config)

    def memory(**settings):
        return memory_bytes(recipe("x", tmp_path, train=settings), config, number)

    plain = memory()
    assert plain["weights and optimizer"] == 16 * number
    assert memory(ema_decay=0.9)["weights and optimizer"] == 20 * number
    assert memory(micro_rows=4)["activations"] == plain["activations"] / 2
    assert memory(gradient_checkpointing=True)["activations"] < plain["activations"] / 3
    assert memory(precision="bf16")["activations"] < plain["activations"]


def test_dry_run_writes_nothing(ar, tmp_path):
    path = write_recipe(tmp_path / "mine.yaml", recipe(ar, tmp_path))
    runs = tmp_path / "runs"
    arguments = ["--recipe", str(path), "--runs", str(runs), "--set", "train.steps=9", "--dry-run"]
    result = CliRunner().invoke(train, arguments)
    assert result.exit_code == 0, result.output
    assert "steps: 9" in result.output
    assert "memory      about" in result.output
    assert not runs.exists()
