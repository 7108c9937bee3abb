"""LoRA students: what is trained, that merging changes nothing, and runs on one and two processes."""

import importlib.util
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch
from tiny_run import (
    ar_folder,
    corpus_folder,
    environment,
    recipe,
    tiny_denoiser,
    write_recipe,
)

from mdm.checkpoint import load_denoiser, read_settings
from mdm.convert import make_bidirectional
from mdm.errors import ConfigError, TrainingError
from mdm.train import trainer
from mdm.train.lora import adapter_parameters, alpha, has_adapters, merged, with_adapters
from mdm.train.recipe import TrainSettings
from mdm.train.run import averaged_weights, new_run, start
from mdm.train.state import saved_steps
from mdm.train.trainer import train, train_step

RANK = 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("lora")
    return ar_folder(place / "ar"), corpus_folder(place / "corpus")


def lora(**settings):
    return TrainSettings(lora_rank=RANK, **settings)


def adapted(folder, **settings):
    """A student with adapters that do something: B is zero at first."""
    student = with_adapters(tiny_denoiser(folder), lora(**settings))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return student


def answers(student):
    """Logits of a row with a few masks."""
    xt_BL = torch.arange(60, 84)[None].clone()
    xt_BL[:, 5:9] = student.mask_id
    with torch.no_grad():
        return student(xt_BL, xt_BL == student.mask_id)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_every_family(family, tied):
    """New adapters do nothing, are counted without peft, spare the head, and can be merged."""
    model = tiny.tiny_model(family, 60, tie_word_embeddings=tied)
    make_bidirectional(model)
    student, x_BL = SimpleNamespace(model=model), torch.arange(18).reshape(2, 9)
    names, expected = list(model.state_dict()), adapter_parameters(model, RANK)
    with torch.no_grad():
        before = model(x_BL).logits
        with_adapters(student, lora())
        assert torch.equal(model(x_BL).logits, before)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert sum(parameter.numel() for parameter in trained.values()) == expected > 0
        assert all(".lora_A." in name or ".lora_B." in name for name in trained)
        assert type(model.get_output_embeddings()) is torch.nn.Linear
        for name, parameter in trained.items():
            if ".lora_B." in name:
                parameter.normal_(0, 0.1)
        changed = model(x_BL).logits
        assert (changed - before).abs().max() > 0.1
        merged(student)
        torch.testing.assert_close(model(x_BL).logits, changed, atol=1e-4, rtol=0)
    assert list(model.state_dict()) == names


def test_merging_adds_the_scaled_product(folders):
    """W + (alpha / rank) B A, written out."""
    for given, factor in ((0, 2.0), (12, 4.0)):
        student = adapted(folders[0], lora_alpha=given)
        assert alpha(lora(lora_alpha=given)) == factor * RANK
        layer = student.model.model.layers[1].mlp.down_proj
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        expected = layer.base_layer.weight + factor * b @ a
        assert has_adapters(student)
        assert not has_adapters(merged(student))
        found = student.model.model.layers[1].mlp.down_proj.weight
        torch.testing.assert_close(found, expected.detach())


def test_without_a_rank_nothing_happens(folders):
    student = tiny_denoiser(folders[0])
    assert with_adapters(student, TrainSettings()) is student
    assert merged(student) is student
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert adapter_parameters(student.model, 0) == 0


def test_adapters_depend_on_the_seed_alone(folders):
    def first(seed, state):
        student = tiny_denoiser(folders[0])
        torch.manual_seed(state)
        expected = torch.rand(3)
        torch.manual_seed(state)
        with_adapters(student, lora(seed=seed))
        assert torch.equal(torch.rand(3), expected)  # the draws of others are left alone
        return next(p for name, p in student.named_parameters() if ".lora_A." in name).detach()

    assert torch.equal(first(0, state=1), first(0, state=2))
    assert not torch.equal(first(1, state=1), first(0, state=1))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_changes_adapters_only(folders, tmp_path, checkpointing):
    options = {"lora_rank": RANK, "gradient_checkpointing": checkpointing, "warmup_steps": 0}
    run = start(recipe(*folders, train=options), new_run(recipe(*folders), tmp_path))
    before = {name: p.detach().clone() for name, p in run.denoiser.named_parameters()}
    run.denoiser.train()
    for step in range(2):  # A has a gradient only when B is no longer zero
        train_step(run, step)
    changed = {n for n, p in run.denoiser.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {name for name in before if ".lora_" in name}


def test_checkpointing_changes_no_gradient(folders, tmp_path):
    norms = []
    for name, checkpointing in (("with", True), ("without", False)):
        options = {"lora_rank": RANK, "gradient_checkpointing": checkpointing}
        settings = recipe(*folders, train=options)
        run = start(settings, new_run(settings, tmp_path / name))
        run.denoiser.train()
        norms.append([train_step(run, step)["gradient_norm"] for step in range(2)])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert norms[0][0] > 0


EXACT = {"lora_rank": RANK, "ema_decay": 0.8, "steps": 6, "checkpoint_every": 3}


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory):
    """A finished LoRA run."""
    settings = recipe(*folders, train=EXACT)
    folder = new_run(settings, tmp_path_factory.mktemp("runs"))
    train(settings, folder)
    return folder


def test_final_is_an_ordinary_student_with_the_averaged_adapters(
    folders, finished, tmp_path, monkeypatch
):
    """The logits of final/ are those of the adapted model with the averaged weights."""
    seen = []
    finish = trainer.finish

    def spied(run, outcome):
        with averaged_weights(run):
            assert has_adapters(run.denoiser)
            seen.append(answers(run.denoiser))
        seen.append(answers(run.denoiser))
        return finish(run, outcome)

    monkeypatch.setattr(trainer, "finish", spied)
    settings = recipe(*folders, train=EXACT)
    folder = new_run(settings, tmp_path)
    train(settings, folder)
    student = load_denoiser(folder / "final")
    torch.testing.assert_close(answers(student), seen[0], atol=1e-5, rtol=0)
    assert not torch.allclose(answers(student), seen[1], atol=1e-4, rtol=0)
    assert not has_adapters(student)
    files = {path.name for path in (folder / "final").iterdir()}
    assert not any("adapter" in name for name in files)
    base = tiny_denoiser(folders[0])
    assert set(student.state_dict()) == set(base.state_dict())
    entry = read_settings(folder / "final")["lineage"][-1]
    assert entry["recipe"]["train"]["lora_rank"] == RANK
    # Embeddings, the mask's row among them, are as they were.
    table = student.model.get_input_embeddings().weight
    assert torch.equal(table, base.model.get_input_embeddings().weight)


def test_it_can_be_trained_further(finished, folders, tmp_path):
    settings = recipe(*folders, student={"init": str(finished / "final")}, train={"steps": 1})
    run = start(settings, new_run(settings, tmp_path))
    assert all(parameter.requires_grad for parameter in run.denoiser.parameters())


def test_an_interrupted_run_ends_the_same(folders, finished, tmp_path, monkeypatch):
    settings = recipe(*folders, train=EXACT)
    folder = new_run(settings, tmp_path)
    monkeypatch.setattr(trainer, "stop_signals", lambda: Stop(after=4))
    with pytest.raises(TrainingError, match="stopped by a signal after step 4"):
        train(settings, folder)
    monkeypatch.undo()
    state = json.loads((saved_steps(folder / "checkpoints")[-1] / "state.json").read_text("utf-8"))
    assert all(".lora_" in name for name in state["tensors"])
    train(settings, folder)
    name = "model.safetensors"
    assert (folder / "final" / name).read_bytes() == (finished / "final" / name).read_bytes()


class Stop:
    """In place of signals: one arrives after some steps."""

    def __init__(self, after):
        self.left = after

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False

    def __bool__(self):
        self.left -= 1
        return self.left <= 0


@pytest.mark.slow
def test_two_processes_do_what_one_does(folders, tmp_path):
    """Copies of the student (none) and a sharded one (full), whose adapters are merged in parts."""
    finals = {}
    for processes, sharding in ((1, "none"), (2, "none"), (2, "full")):
        name = f"{processes}-{sharding}"
        changes = {**EXACT, "sharding": sharding, "checkpoint_every": 0}
        path = write_recipe(tmp_path / "mine.yaml", recipe(*folders, train=changes))
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launch += [f"--nproc-per-node={processes}", "-m", "mdm.cli", "train"]
        launch += ["--recipe", str(path), "--name", name, "--runs", str(tmp_path)]
        done = subprocess.run(launch, capture_output=True, text=True, env=environment())
        assert done.returncode == 0, done.stderr
        finals[name] = load_denoiser(tmp_path / name / "final").model.state_dict()
    before = tiny_denoiser(folders[0]).model.state_dict()
    alone = finals.pop("1-none")
    assert farthest(alone, before) > 1e-3
    for found in finals.values():
        assert farthest(alone, found) < 2e-6


def farthest(one, other):
    """The largest difference between two state dicts."""
    assert set(one) == set(other)
    return max(float((tensor - other[name]).abs().max()) for name, tensor in one.items())


def test_peft_missing(folders, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "peft" else find(name)
    )
    with pytest.raises(ConfigError, match=r"train\.lora_rank.*pip install mdm-code\[lora\]"):
        with_adapters(tiny_denoiser(folders[0]), lora())


@pytest.mark.parametrize("name", ["lora_rank", "lora_alpha"])
def test_negative_settings(folders, name):
    with pytest.raises(ConfigError, match=rf"train\.{name} must be >= 0; got -1"):
        recipe(*folders, train={name: -1})
