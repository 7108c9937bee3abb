"""`--dry-run`: sizes from configs alone."""

import re

import pytest
import tiny
import yaml
from click.testing import CliRunner
from test_memory import peak_allocation
from tiny_run import ar_folder, corpus_folder, recipe, tiny_denoiser, write_recipe

from mdm.checkpoint import save_denoiser
from mdm.config import to_tree
from mdm.convert import decoder_layers, student_config
from mdm.errors import ConfigError
from mdm.train.command import train
from mdm.train.estimate import (
    BYTES,
    config_of_student,
    describe,
    size_of,
    student_bytes,
    teacher_bytes,
)
from mdm.train.run import new_run, start
from mdm.train.trainer import train_step


@pytest.fixture
def ar(tmp_path):
    """A checkpoint without its weights: a dry run must not miss them."""
    folder = ar_folder(tmp_path / "ar", layers=4)
    (tmp_path / "ar" / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_without_weights(family, tied):
    model = tiny.tiny_model(family, 50, layers=3, tie_word_embeddings=tied)
    size, layers = size_of(model.config, lora_rank=2), decoder_layers(model)
    assert size.parameters == sum(p.numel() for p in model.parameters())
    assert size.layers == sum(p.numel() for p in layers.parameters())
    assert size.layer == max(sum(p.numel() for p in layer.parameters()) for layer in layers)
    assert size.ends == size.parameters - size.layers >= 50 * 32
    matrices = [p for p in layers.parameters() if p.ndim == 2]
    assert size.linear == sum(p.numel() for p in matrices)
    assert size.adapters == sum(2 * sum(p.shape) for p in matrices)
    assert size.matrix == max(p.numel() for p in model.parameters())


def test_what_is_described(ar, tmp_path):
    settings = recipe(ar, tmp_path, student={"layers": 2}, train={"steps": 7, "batch_rows": 4})
    lines = describe(settings).splitlines()
    listed = yaml.safe_load("\n".join(lines[: lines.index("")]))
    assert listed == to_tree(settings)
    text = "\n".join(lines)
    assert "2 layers, width 16" in text
    assert f"{7 * 4 * 24:,} in 7 steps of 4 rows of 24" in text
    assert "fp32" in next(line for line in lines if line.startswith("teacher  "))
    assert sum(line.endswith("GiB") for line in lines) == 7
    without = describe(recipe(ar, tmp_path, objective={"kd_lambda": 0.0}))
    assert "teacher     none (objective.kd_lambda is 0)" in without


def test_a_denoiser_is_described_too(tmp_path):
    save_denoiser(tiny_denoiser(ar_folder(tmp_path / "ar")), tmp_path / "student")
    assert "2 layers" in describe(recipe(tmp_path / "student", tmp_path))


@pytest.fixture
def config():
    shape = tiny.tiny_config("llama", 259, layers=8, tie_word_embeddings=False)
    return student_config(shape, layers=None, width=1.0)


def memory_of_student(config, processes=1, **settings):
    changed = recipe("x", "y", train=settings)
    size = size_of(config, changed.train.lora_rank)
    return student_bytes(changed, config, size, processes)


def test_memory_follows_the_settings(config):
    size, plain = size_of(config), memory_of_student(config)
    kept = ("weights", "gradients", "moments, average")
    assert [plain[name] for name in kept] == [n * size.parameters for n in (4, 4, 8)]
    assert memory_of_student(config, ema_decay=0.9)["moments, average"] == 12 * size.parameters
    assert memory_of_student(config, micro_rows=4)["activations"] == plain["activations"] / 2
    checkpointed = memory_of_student(config, gradient_checkpointing=True)
    assert checkpointed["activations"] < plain["activations"] / 3
    mixed = memory_of_student(config, precision="bf16")
    assert mixed["activations"] < plain["activations"]
    assert mixed["bf16 copies"] == 2 * (size.linear + 259 * 32)


def test_adapters_alone_have_gradients_and_moments(config):
    size, memory = size_of(config, 4), memory_of_student(config, lora_rank=4)
    assert memory["weights"] == 4 * (size.parameters + size.adapters)
    assert memory["gradients"] == 4 * size.adapters
    assert memory["moments, average"] == 8 * size.adapters


def test_what_is_sharded_is_divided(config):
    size, one = size_of(config), memory_of_student(config)
    copied = memory_of_student(config, processes=4)
    assert copied["weights"] == one["weights"]
    assert copied["gradient exchange"] == 4 * size.parameters
    shared = memory_of_student(config, processes=4, sharding="full")
    for name in ("weights", "gradients", "moments, average"):
        assert shared[name] == one[name] // 4
    assert shared["gathered weights"] == 8 * (2 * size.layer + size.ends)
    assert "gradient exchange" not in shared
    assert memory_of_student(config, sharding="full") == one  # there is nobody to share with
    # Eight rows of four processes are two each, whatever micro_rows says.
    assert copied["activations"] == one["activations"] / 4


def memory_of_teacher(config, processes=1, train=None, **settings):
    changed = recipe("x", "y", teacher={"dtype": "bf16", **settings}, train=train or {})
    return teacher_bytes(changed, config, size_of(config), processes)["teacher"]


def test_memory_of_the_teacher(config):
    size = size_of(config)
    rest = size.parameters - size.linear
    assert memory_of_teacher(config) == 2 * size.parameters
    assert memory_of_teacher(config, dtype="fp32") == 4 * size.parameters
    assert memory_of_teacher(config, quantization="int8") == size.linear + 2 * rest
    assert memory_of_teacher(config, quantization="nf4") == int(0.5625 * size.linear) + 2 * rest
    assert memory_of_teacher(config, offload=True) == 2 * 259 * 32
    sharded = memory_of_teacher(config, 4, train={"sharding": "full"})
    assert sharded == 2 * (size.layers // 4 + 2 * size.layer + size.ends)
    assert memory_of_teacher(config, train={"sharding": "full"}) == 2 * size.parameters
    assert set(BYTES) == {"bf16", "fp32", "int8", "nf4"}


def test_what_is_said_of_the_teacher(ar, tmp_path):
    def said(**sections):
        return describe(recipe(ar, tmp_path, **sections))

    assert re.search(r"teacher .* parameters, int8, fp32\n", said(teacher={"quantization": "int8"}))
    offloaded = said(teacher={"offload": True})
    assert "parameters, fp32, offloaded\n" in offloaded
    assert offloaded.endswith("GiB of CPU memory at the start and all the time")
    cached = said(target={"cache": "answers"})
    assert "teacher     not loaded: its answers are read from answers" in cached
    assert "teacher's forward" not in cached
    assert "in adapters, which alone are trained" in said(train={"lora_rank": 2})
    assert "teacher's forward" in said(target={"kind": "mapped"})
    assert "projection" in said(target={"kind": "embedding"})


def test_shares_and_what_a_dry_run_refuses(ar, tmp_path):
    settings = recipe(ar, tmp_path)
    assert "GiB a process:" in describe(settings)
    assert "GiB a process, of 4:" in describe(settings, 4)
    with pytest.raises(ConfigError, match=r"batch_rows \(8\) must be a multiple .* \(3\)"):
        describe(settings, 3)
    with pytest.raises(ConfigError, match=r"target\.kind=suffix has other answers for other masks"):
        describe(recipe(ar, tmp_path, target={"kind": "suffix", "cache": "answers"}))
    sharded = {"train": {"sharding": "full"}, "target": {"kind": "suffix"}}
    with pytest.raises(ConfigError, match=r"sharding=full with target\.kind=suffix"):
        describe(recipe(ar, tmp_path, **sharded), 2)


def test_a_tokenizer_of_its_own_changes_the_students_rows(ar, tmp_path):
    folder = tmp_path / "words"
    tiny.word_tokenizer(500).save_pretrained(folder)
    settings = recipe(ar, tmp_path, student={"tokenizer": str(folder)})
    assert config_of_student(settings).vocab_size == 500 + 3 + 1
    assert config_of_student(recipe(ar, tmp_path)).vocab_size == 259


WIDE = {"hidden": 256, "layers": 4, "tie_word_embeddings": False}
MANY = {"steps": 2, "batch_rows": 4, "micro_rows": 4}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "bf16"},
        {"gradient_checkpointing": True},
        {"ema_decay": 0.9},
        {"lora_rank": 8},
        {"lora_rank": 8, "gradient_checkpointing": True, "precision": "bf16"},
    ],
    ids=str,
)
def test_a_step_takes_what_was_estimated(tmp_path, changes):
    """What two steps allocate, counted by torch's profiler, beyond the weights that were there."""
    ar = ar_folder(tmp_path / "ar", **WIDE)
    data = {"length": 128}
    settings = recipe(ar, corpus_folder(tmp_path / "corpus"), data=data, train=MANY | changes)
    run = start(settings, new_run(settings, tmp_path / "runs"))
    run.denoiser.train()

    def steps():
        for step in range(2):
            train_step(run, step)

    peak = peak_allocation(steps)
    config = config_of_student(settings)
    size = size_of(config, settings.train.lora_rank)
    memory = student_bytes(settings, config, size, 1)
    memory["moments, average"] -= 4 * size.parameters if settings.train.ema_decay else 0
    estimated = sum(memory.values()) - memory["weights"]
    assert 0.9 * peak <= estimated <= 1.5 * peak, (estimated / peak, memory)


def test_dry_run_writes_nothing(ar, tmp_path):
    path = write_recipe(tmp_path / "mine.yaml", recipe(ar, tmp_path))
    runs = tmp_path / "runs"
    arguments = ["--recipe", str(path), "--runs", str(runs), "--set", "train.steps=9", "--dry-run"]
    result = CliRunner().invoke(train, arguments)
    assert result.exit_code == 0, result.output
    assert "steps: 9" in result.output
    assert "memory      about" in result.output
    assert not runs.exists()


def test_processes_of_a_dry_run(ar, tmp_path, monkeypatch):
    path = str(write_recipe(tmp_path / "mine.yaml", recipe(ar, tmp_path)))

    def said(*arguments):
        return CliRunner().invoke(train, ["--recipe", path, *arguments])

    assert "GiB a process:" in said("--dry-run").output
    assert "GiB a process, of 2:" in said("--dry-run", "--processes", "2").output
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "GiB a process, of 4:" in said("--dry-run").output
    assert "GiB a process, of 2:" in said("--dry-run", "--processes", "2").output
    refused = said("--processes", "2").exception
    assert isinstance(refused, ConfigError)
    assert "torchrun --nproc-per-node 2" in str(refused)
    folder = new_run(recipe(ar, tmp_path), tmp_path / "runs")
    assert (
        "of 8:"
        in CliRunner()
        .invoke(train, ["--resume", str(folder), "--dry-run", "--processes", "8"])
        .output
    )
