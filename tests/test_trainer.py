"""Training from end to end on tiny models: exact where it must be, careful where things go wrong."""

import dataclasses
import errno
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import tiny
import tiny_run
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from test_mapped import TEACHER_WORDS, vocab_of
from tiny_run import LENGTH, VOCAB

from mdm.checkpoint import load_denoiser, read_settings, save_denoiser
from mdm.errors import CheckpointError, ConfigError, DataError, TrainingError, VocabError
from mdm.record import to_json
from mdm.train import state, trainer
from mdm.train.command import train as command
from mdm.train.held_out import held_out_bound
from mdm.train.objective import ObjectiveSettings
from mdm.train.progress import read_metrics
from mdm.train.run import new_run, read_run, start
from mdm.train.state import saved_steps
from mdm.train.targets import Measured
from mdm.train.trainer import train, train_step

# Everything that must survive an interruption: moments, an average, evaluations on the way.
EXACT = {
    "target": {"kind": "suffix", "candidates": 3, "window": 4},
    "objective": {"kd_positions": 2, "kd_ramp_steps": 3},
    "train": {"steps": 12, "checkpoint_every": 4, "eval_every": 4, "ema_decay": 0.9},
}


@pytest.fixture(scope="module")
def ar(tmp_path_factory):
    return tiny_run.ar_folder(tmp_path_factory.mktemp("ar"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tiny_run.corpus_folder(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def settings(ar, corpus):
    """`settings(train={"steps": 9})`: a tiny recipe."""
    return lambda **sections: tiny_run.recipe(ar, corpus, **sections)


@pytest.fixture(scope="module")
def uninterrupted(settings, tmp_path_factory):
    """The folder of a finished run of EXACT."""
    folder = new_run(settings(**EXACT), tmp_path_factory.mktemp("runs"))
    train(read_run(folder), folder)
    return folder


def new(recipe, runs):
    folder = new_run(recipe, runs)
    return start(recipe, folder)


def weights(folder):
    return (folder / "final" / "model.safetensors").read_bytes()


def steps_of(folder, key="loss"):
    return [e["step"] for e in read_metrics(folder / "metrics.jsonl") if key in e]


def numbers(folder):
    """What metrics.jsonl says, but for speed and memory."""
    entries = read_metrics(folder / "metrics.jsonl")
    return [
        {k: v for k, v in e.items() if k not in ("tokens_per_second", "memory_bytes")}
        for e in entries
    ]


def parameters(run):
    return {name: p.detach().clone() for name, p in run.denoiser.named_parameters()}


def gradients_of_a_step(recipe, runs):
    """Metrics of the first step, and the gradients that reach the optimizer."""
    run = new(recipe, runs)
    run.denoiser.train()
    found = {}

    def note(*_):
        found.update({n: p.grad.clone() for n, p in run.denoiser.named_parameters()})

    run.optimizer.register_step_pre_hook(note)
    return train_step(run, 0), found


def assert_same_gradients(one, other, tolerance):
    scale = max(float(g.abs().max()) for g in one.values())
    assert scale > 0
    for name, value in one.items():
        torch.testing.assert_close(
            value, other[name], atol=tolerance * scale, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


# --- a run and what it leaves --------------------------------------------------------------------


def test_a_finished_run(uninterrupted):
    names = {path.name for path in uninterrupted.iterdir()}
    assert names >= {"recipe.yaml", "data", "checkpoints", "metrics.jsonl", "record.jsonl", "final"}
    assert steps_of(uninterrupted) == list(range(1, 13))
    assert steps_of(uninterrupted, "held_out") == [0, 4, 8, 12]
    assert [p.name for p in saved_steps(uninterrupted / "checkpoints")] == [
        "step-000004", "step-000008"
    ]  # fmt: skip
    (line,) = (uninterrupted / "record.jsonl").read_text(encoding="utf-8").splitlines()
    record = json.loads(line)
    last = read_metrics(uninterrupted / "metrics.jsonl")[-1]["held_out"]
    assert record["results"]["after"] == last
    assert record["results"]["steps"] == 12
    assert record["results"]["improvement"] == pytest.approx(
        record["results"]["before"]["nelbo"] - last["nelbo"]
    )
    assert read_settings(uninterrupted / "final")["lineage"][-1]["steps"] == 12
    ramp = [e["kd_lambda"] for e in read_metrics(uninterrupted / "metrics.jsonl") if "loss" in e]
    assert ramp[:4] == pytest.approx([1 / 6, 1 / 3, 0.5, 0.5])


def test_final_holds_the_average(uninterrupted, settings, tmp_path):
    """And the last evaluation is of it: final/ is what was measured."""
    run = new(settings(**EXACT), tmp_path)
    run.denoiser.train()
    for step in range(12):
        train_step(run, step)
    final = load_denoiser(uninterrupted / "final")
    for name, value in final.named_parameters():
        assert torch.equal(value, run.average.values[name]), name
    assert not torch.equal(final.model.lm_head.weight, run.denoiser.model.lm_head.weight)
    options = {"num_rows": 8, "draws": 1, "batch_rows": 8, "seed": 0}
    measured = held_out_bound(final, run.data.held_out, **options).summary()
    assert (
        json.loads(to_json(measured))
        == read_metrics(uninterrupted / "metrics.jsonl")[-1]["held_out"]
    )


@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"precision": "fp32"}, "objective": {"kd_lambda": 0.0}},
        {"train": {"precision": "bf16"}, "objective": {"kd_lambda": 0.5}},
        {"train": {"precision": "bf16"}, "target": {"kind": "suffix", "window": 3},
         "objective": {"kd_positions": 2}},
    ],
)  # fmt: skip
def test_training_lowers_the_held_out_bound(settings, tmp_path, sections):
    sections = sections | {"train": {**sections["train"], "steps": 60, "learning_rate": 3e-3}}
    recipe = settings(**sections)
    outcome = train(recipe, new_run(recipe, tmp_path))
    fall, std_err = outcome.before.improvement(outcome.after)
    assert fall > max(0.3, 6 * std_err)
    assert outcome.steps == 60
    losses = [e["loss"] for e in read_metrics(outcome.folder / "metrics.jsonl") if "loss" in e]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_bf16_keeps_float32_weights_that_move_at_a_small_learning_rate(settings, tmp_path):
    changes = {"learning_rate": 5e-5, "warmup_steps": 0, "weight_decay": 0.0, "clip": 0.0}
    losses = {}
    for precision in ("bf16", "fp32"):
        recipe = settings(train={"precision": precision, **changes})
        run = new(recipe, tmp_path / precision)
        before = parameters(run)
        losses[precision] = train_step(run, 0)["loss"]
        for name, parameter in run.denoiser.named_parameters():
            assert parameter.dtype == torch.float32
            # Adam moves every weight that has a gradient by the learning rate in its first step.
            moved = (parameter - before[name]).abs()
            # The rounding of weights around 1 is a thousandth of it.
            assert float(moved.max().detach()) == pytest.approx(5e-5, rel=0.01), name
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["bf16"] != losses["fp32"]


def test_supervised_rows(ar, tmp_path):
    """Prompt and response: only the response, with its end, is ever masked."""
    lines = [{"prompt": f"add {i}: ", "response": f"x + {i}\n"} for i in range(40)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    data = {"min_tokens": 4, "eos_block": 4}
    recipe = tiny_run.recipe(ar, file, data=data, train={"steps": 6})
    run = new(recipe, tmp_path)
    for step in range(20):
        for batch in trainer.micro_batches(run, step):
            for x0_L, xt_L in zip(batch.x0_BL.tolist(), batch.xt_BL.tolist(), strict=True):
                prompt = bytes(x0_L[1:]).split(b":")[0] if max(x0_L[1:]) < 256 else None
                assert prompt is None  # an end token closes every response
                colon = x0_L.index(ord(":"))
                assert xt_L[: colon + 2] == x0_L[: colon + 2]
            assert batch.masked_BL.any()
    outcome = train(recipe, run.folder)
    assert outcome.before.improvement(outcome.after)[0] > 0


def test_tensorboard(settings, tmp_path):
    pytest.importorskip("tensorboard")
    recipe = settings(train={"steps": 1, "tensorboard": True})
    train(recipe, new_run(recipe, tmp_path))
    assert list((tmp_path / "tiny" / "tensorboard").glob("events*"))
    new_run(recipe, tmp_path, overwrite=True)
    assert not (tmp_path / "tiny" / "tensorboard").exists()


# --- what must not matter ------------------------------------------------------------------------


@pytest.mark.parametrize("weight", ["bound", "mean_masked"])
@pytest.mark.parametrize("micro_rows", [1, 3])
def test_accumulation_changes_nothing(settings, tmp_path, micro_rows, weight):
    """Eight rows at once = one by one: one denominator for the whole step."""
    results = []
    for rows in (8, micro_rows):
        recipe = settings(train={"micro_rows": rows, "clip": 0.0}, objective={"weight": weight})
        results.append(gradients_of_a_step(recipe, tmp_path / str(rows)))
    (metrics, one), (others, other) = results
    assert_same_gradients(one, other, 1e-6)
    assert others == pytest.approx(metrics, rel=1e-6)


def test_gradient_checkpointing_changes_nothing(settings, tmp_path):
    results = []
    for on in (False, True):
        recipe = settings(train={"gradient_checkpointing": on, "clip": 0.0})
        run = new(recipe, tmp_path / str(on) / "probe")
        modules = run.denoiser.modules()
        assert any(getattr(m, "gradient_checkpointing", False) for m in modules) == on
        results.append(gradients_of_a_step(recipe, tmp_path / str(on)))
    assert results[0][0] == results[1][0]
    assert_same_gradients(results[0][1], results[1][1], 1e-7)


def test_clipping(settings, tmp_path):
    _, free = gradients_of_a_step(settings(train={"clip": 0.0}), tmp_path / "free")
    metrics, clipped = gradients_of_a_step(settings(train={"clip": 0.01}), tmp_path / "clipped")
    norm = math.sqrt(sum(float(g.square().sum()) for g in free.values()))
    assert metrics["gradient_norm"] == pytest.approx(norm, rel=1e-5)  # before clipping
    assert_same_gradients({n: g * 0.01 / norm for n, g in free.items()}, clipped, 1e-4)


def test_the_teacher_is_not_loaded_for_nothing(settings, tmp_path):
    recipe = settings(objective={"kd_lambda": 0.0}, teacher={"model": "/missing/teacher"})
    assert new(recipe, tmp_path).ask is None


def test_continues_from_a_denoiser(uninterrupted, settings, tmp_path):
    recipe = settings(student={"init": str(uninterrupted / "final")}, train={"steps": 2})
    train(recipe, new_run(recipe, tmp_path))
    lineage = [entry["step"] for entry in read_settings(tmp_path / "tiny" / "final")["lineage"]]
    assert lineage == ["convert", "train", "train"]
    other = settings(student={"init": str(uninterrupted / "final"), "layers": 1})
    with pytest.raises(ConfigError, match="is a student already"):
        new(other, tmp_path / "other")


# --- interruptions -------------------------------------------------------------------------------


def run_with_event(recipe, folder, patch):
    """`mdm train` in a process of its own, in which `patch` makes something happen."""
    path = tiny_run.write_recipe(folder / "recipe.yaml", recipe)
    code = "import os, signal, sys\nfrom mdm.train import state, trainer\n" + textwrap.dedent(patch)
    code += "\nfrom mdm.cli import main\nmain()\n"
    arguments = ["train", "--recipe", str(path), "--runs", str(folder / "runs")]
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=tiny_run.environment(),
    )


AT_STEP_7 = """
real = trainer.train_step
def train_step(run, step):
    if step == 6:
        os.kill(os.getpid(), signal.{name})
    return real(run, step)
trainer.train_step = train_step
"""
WITHIN_THE_SECOND_CHECKPOINT = """
real, calls = state.dcp.save, []
def save(tensors, *, storage_writer, **options):
    real(tensors, storage_writer=storage_writer, **options)
    calls.append(storage_writer.path)
    if len(calls) == 2:
        os.truncate(sorted(storage_writer.path.iterdir())[0], 100)
        os.kill(os.getpid(), signal.SIGKILL)
state.dcp.save = save
"""


@pytest.mark.parametrize(
    "patch", [AT_STEP_7.format(name="SIGKILL"), WITHIN_THE_SECOND_CHECKPOINT], ids=["step", "write"]
)
def test_killed_and_resumed_to_the_same_bit(settings, uninterrupted, tmp_path, patch):
    done = run_with_event(settings(**EXACT), tmp_path, patch)
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder = tmp_path / "runs" / "tiny"
    assert [path.name for path in saved_steps(folder / "checkpoints")] == ["step-000004"]
    assert not (folder / "final").exists()
    command.main(["--resume", str(folder)], standalone_mode=False)
    assert weights(folder) == weights(uninterrupted)
    assert numbers(folder) == numbers(uninterrupted)  # each step once, and the same
    assert (folder / "before.safetensors").read_bytes() == (
        uninterrupted / "before.safetensors"
    ).read_bytes()


def test_a_signal_saves_and_stops(settings, uninterrupted, tmp_path):
    done = run_with_event(settings(**EXACT), tmp_path, AT_STEP_7.format(name="SIGTERM"))
    assert done.returncode == TrainingError.exit_code, done.stderr
    folder = tmp_path / "runs" / "tiny"
    message = done.stderr.strip().splitlines()[-1]
    assert message == (
        f"mdm: stopped by a signal after step 7; continue with `mdm train --resume {folder}`"
    )
    assert [path.name for path in saved_steps(folder / "checkpoints")][-1] == "step-000007"
    command.main(["--resume", str(folder)], standalone_mode=False)
    assert weights(folder) == weights(uninterrupted)
    assert numbers(folder) == numbers(uninterrupted)


def test_signals_are_handled_only_while_training():
    def usual(_number, _frame):
        raise Stopped

    handlers = {number: signal.signal(number, usual) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in handlers:
            with trainer.stop_signals() as received:
                os.kill(os.getpid(), number)
                assert received == [number]
                with pytest.raises(Stopped):  # the second one acts as usual
                    os.kill(os.getpid(), number)
            assert [signal.getsignal(number) for number in handlers] == [usual, usual]
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Stopped(Exception):
    """What a test stops a run with."""


@pytest.fixture
def interrupted(settings, tmp_path, monkeypatch):
    """The folder of a run of EXACT that ended in its sixth step, with a checkpoint of the fourth."""
    recipe = settings(**EXACT)
    folder = new_run(recipe, tmp_path)
    real = trainer.train_step

    def stop(run, step):
        if step == 5:
            raise Stopped
        return real(run, step)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", stop)
        with pytest.raises(Stopped):
            train(recipe, folder)
    return folder


def test_a_changed_corpus_does_not_change_a_run(ar, tmp_path, interrupted, uninterrupted):
    """It goes on with the rows it began with, and ends at the same bits."""
    recipe = read_run(interrupted)
    added = Path(recipe.data.sources[0]) / "new.py"
    try:
        added.write_text("def added(a, b, c):\n    return a * b * c\n" * 3)
        train(recipe, interrupted)
    finally:
        added.unlink()
    assert weights(interrupted) == weights(uninterrupted)


def test_other_rows_are_refused(interrupted):
    """The tokens of the remaining steps would be others."""
    manifest = interrupted / "data" / "manifest.json"
    counted = json.loads(manifest.read_text())
    counted["made_from"]["sources_state"] = "another"
    manifest.write_text(json.dumps(counted))
    with pytest.raises(DataError, match="are not those it was interrupted with"):
        train(read_run(interrupted), interrupted)


def test_a_damaged_checkpoint_is_named(interrupted):
    next((interrupted / "checkpoints" / "step-000004").glob("*.safetensors")).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"step-000004 is damaged.*delete it"):
        train(read_run(interrupted), interrupted)


def test_a_lost_first_evaluation_is_named(interrupted):
    (interrupted / "before.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"before\.safetensors"):
        train(read_run(interrupted), interrupted)


def test_a_full_disk(interrupted, uninterrupted, monkeypatch):
    real, full = state.dcp.save, []

    def save(tensors, *, storage_writer, **options):
        if "step-000008" in str(storage_writer.path):
            full.append(storage_writer.path)
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, storage_writer=storage_writer, **options)

    with monkeypatch.context() as patch:
        patch.setattr(state.dcp, "save", save)
        with pytest.raises(CheckpointError, match=r"No space left.*what was there before is kept"):
            train(read_run(interrupted), interrupted)
    assert full
    assert [path.name for path in (interrupted / "checkpoints").iterdir()] == ["step-000004"]
    train(read_run(interrupted), interrupted)
    assert weights(interrupted) == weights(uninterrupted)


def test_a_time_limit_ends_the_session_not_the_run(settings, tmp_path):
    recipe = settings(train={"max_minutes": 1e-9, "steps": 3})
    folder = new_run(recipe, tmp_path)
    for session in (1, 2, 3):
        assert train(recipe, folder).steps == session
    assert steps_of(folder) == [1, 2, 3]
    unlimited = settings(train={"steps": 3})
    train(unlimited, new_run(unlimited, tmp_path / "other"))
    assert weights(folder) == weights(tmp_path / "other" / "tiny")


# --- when the numbers go wrong -------------------------------------------------------------------


def poisoned(kind, monkeypatch, at):
    """The loss (or only its gradient) of one step is not finite."""
    real_step, real_sums, now = trainer.train_step, trainer.loss_sums, []

    def step(run, number):
        now.append(number)
        return real_step(run, number)

    def loss_sums(module, *arguments):
        sums_2 = real_sums(module, *arguments)
        if now[-1] != at:
            return sums_2
        if kind == "loss":
            return sums_2 * math.nan
        weight = next(module.parameters())
        return sums_2 + ((weight * 0).sum()).sqrt()  # 0, with gradient 0 · inf

    monkeypatch.setattr(trainer, "train_step", step)
    monkeypatch.setattr(trainer, "loss_sums", loss_sums)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_not_finite(settings, tmp_path, monkeypatch, kind):
    recipe = settings(train={"steps": 6})
    run = new(recipe, tmp_path / "same")
    run.denoiser.train()
    for step in range(3):
        train_step(run, step)
    rows = ", ".join(map(str, trainer.step_rows(run, 3)))

    poisoned(kind, monkeypatch, at=3)
    folder = new_run(recipe, tmp_path)
    with pytest.raises(TrainingError, match=f"not finite at step 4 .* {rows}.*learning_rate"):
        train(recipe, folder)
    (kept,) = saved_steps(folder / "checkpoints")
    assert kept.name == "step-000003"
    saved = {}
    for file in kept.glob("*.safetensors"):
        saved |= load_file(file)
    for name, value in run.denoiser.named_parameters():
        assert torch.equal(saved[f"model/{name}"], value), name
    assert steps_of(folder) == [1, 2, 3]
    assert not (folder / "final").exists()


def test_a_huge_learning_rate(settings, tmp_path):
    recipe = settings(train={"learning_rate": 1e30, "warmup_steps": 0})
    folder = new_run(recipe, tmp_path)
    with pytest.raises(TrainingError, match="not finite at step 2"):
        train(recipe, folder)
    (kept,) = saved_steps(folder / "checkpoints")
    assert kept.name == "step-000001"


# --- what is refused before it starts ------------------------------------------------------------


def test_an_existing_run_is_not_touched(settings, tmp_path):
    recipe = settings(train={"steps": 1})
    path = tiny_run.write_recipe(tmp_path / "mine.yaml", recipe)
    runs = tmp_path / "runs"
    arguments = ["--recipe", str(path), "--runs", str(runs)]
    command.main(arguments, standalone_mode=False)
    before = (runs / "tiny" / "record.jsonl").read_bytes()
    result = CliRunner().invoke(command, arguments)
    assert isinstance(result.exception, ConfigError)
    assert "holds a run already" in str(result.exception)
    assert (runs / "tiny" / "record.jsonl").read_bytes() == before
    command.main([*arguments, "--overwrite"], standalone_mode=False)
    assert len((runs / "tiny" / "record.jsonl").read_text().splitlines()) == 1
    # A model somebody put there is no less theirs.
    (runs / "mine" / "final").mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds a run already"):
        new_run(dataclasses.replace(recipe, name="mine"), runs)


def test_rows_longer_than_the_context(corpus, ar, tmp_path):
    short = tiny_run.ar_folder(tmp_path / "short", max_position_embeddings=LENGTH - 1)
    with pytest.raises(ConfigError, match=f"the student was built for at most {LENGTH - 1} tokens"):
        new(tiny_run.recipe(short, corpus), tmp_path / "1")
    with pytest.raises(ConfigError, match=f"the teacher was built for at most {LENGTH - 1} tokens"):
        new(tiny_run.recipe(ar, corpus, teacher={"model": short}), tmp_path / "2")


# --- two processes -------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_train_like_one(settings, tmp_path):
    recipe = settings(
        target={"kind": "suffix", "candidates": 3, "window": 4},
        objective={"kd_positions": 2},
        train={"steps": 6, "micro_rows": 2, "ema_decay": 0.5, "checkpoint_every": 3},
    )
    folders = {}
    for processes in (1, 2):
        runs = tmp_path / str(processes)
        runs.mkdir()
        path = tiny_run.write_recipe(runs / "tiny.yaml", recipe)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launch += [f"--nproc-per-node={processes}", "-m", "mdm.cli", "train"]
        done = subprocess.run(
            [*launch, "--recipe", str(path), "--runs", str(runs)],
            capture_output=True,
            text=True,
            env=tiny_run.environment(),
        )
        assert done.returncode == 0, done.stderr
        folders[processes] = runs / "tiny"
    one, two = (numbers(folders[processes]) for processes in (1, 2))
    assert [e["step"] for e in one] == [e["step"] for e in two] == [0, 1, 2, 3, 4, 5, 6, 6]
    for first, second in zip(one, two, strict=True):
        if "loss" in first:
            assert second == pytest.approx(first, rel=1e-4)
        else:
            for key in ("nelbo", "nelbo_std_err"):
                assert second["held_out"][key] == pytest.approx(first["held_out"][key], rel=1e-4)
    final = [load_file(folders[p] / "final" / "model.safetensors") for p in (1, 2)]
    for name, value in final[0].items():
        torch.testing.assert_close(value, final[1][name], atol=2e-5, rtol=0, msg=name)
    assert final[0]["lm_head.weight"].shape[0] == VOCAB + 1


@pytest.mark.slow
def test_rows_must_be_shared_out_evenly(settings, tmp_path):
    recipe = settings(train={"batch_rows": 3})
    path = tiny_run.write_recipe(tmp_path / "tiny.yaml", recipe)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, "-m", "mdm.cli", "train", "--recipe", str(path), "--runs", str(tmp_path)],
        capture_output=True,
        text=True,
        env=tiny_run.environment(),
    )
    assert done.returncode != 0
    assert "must be a multiple of the number of processes (2)" in done.stderr


def test_a_finished_run_is_not_repeated(settings, tmp_path):
    recipe = settings(train={"steps": 2, "checkpoint_every": 1})
    folder = new_run(recipe, tmp_path)
    train(recipe, folder)
    with pytest.raises(ConfigError, match=r"is finished; .* student.init="):
        train(recipe, folder)


# --- block diffusion students and diffusion teachers -----------------------------------------------


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Folders of diffusion teachers: one with the student's tokens, one with others."""
    folder = tmp_path_factory.mktemp("teachers")
    ar = tiny_run.ar_folder(folder / "ar", seed=5)
    layout = {"kind": "bd3lm", "block_size": 8, "attention": "reordered", "shift": False}
    save_denoiser(tiny_run.tiny_denoiser(ar, **layout), folder / "shared")
    vocab = vocab_of(TEACHER_WORDS)
    tiny.tiny_model("qwen2", len(vocab), hidden=16, seed=4).save_pretrained(folder / "other")
    vocab.tokenizer.save_pretrained(folder / "other")
    return folder


BLOCKS = {
    "student": {"kind": "bd3lm", "block_size": 4, "attention": "context_causal"},
    "data": {"eos_block": 4},
    "objective": {"kd_lambda": 0.0, "noise": "block", "complementary": True, "ar_weight": 0.25,
                  "grow_from": 1, "grow_steps": 6},
}  # fmt: skip


@pytest.fixture(scope="module")
def tide(settings, teachers):
    """Recipes by name: blocks alone; a teacher with the same tokens (TIDAL, CompDemo); one with others
    (CALM). `tide("chunks", steps=9)`."""
    save_denoiser(tiny_run.tiny_denoiser(teachers / "other"), teachers / "foreign")
    kd = {"kd_lambda": ObjectiveSettings.kd_lambda, "kd_weight": 0.7, "kd_temperature": 2.0,
          "kd_reduce": "mean_masked"}  # fmt: skip
    tidal = {"first": 0.1, "last": 0.9, "by_noise": True}
    changes = {
        "blocks": {},
        "denoised": {
            "teacher": {"model": str(teachers / "shared")},
            "target": {"kind": "denoised", "comp_demo": "bernoulli"},
            "objective": {**BLOCKS["objective"], **kd},
            "mix": {**tidal, "weight": "midrange"},
        },
        "chunks": {
            "teacher": {"model": str(teachers / "foreign")},
            "target": {"kind": "chunks", "comp_demo": "exact"},
            "masks": {"where": "chunks_corrected"},
            "objective": {**kd, "ar_weight": 0.25, "temperature_squared": False},
            "mix": tidal,
        },
    }

    def make(name, *, objective=None, **train):
        sections = {**BLOCKS, **changes[name]}
        sections["objective"] = {**sections["objective"], **(objective or {})}
        return settings(**sections, train=train)

    return make


TIDE = ["blocks", "denoised", "chunks"]


@pytest.mark.parametrize("name", TIDE[1:])
def test_training_with_blocks_lowers_the_held_out_bound(tide, tmp_path, name):
    recipe = tide(name, steps=30, learning_rate=3e-3, precision="bf16")
    outcome = train(recipe, new_run(recipe, tmp_path))
    fall, std_err = outcome.before.improvement(outcome.after)
    assert fall > max(0.3, 6 * std_err)
    entries = [e for e in read_metrics(outcome.folder / "metrics.jsonl") if "loss" in e]
    for entry in entries:  # the loss is the sum of its terms as they are logged
        expected = entry["ce"] + 0.7 * entry["kd"] + 0.25 * entry["next_token"]
        assert entry["loss"] == pytest.approx(expected, rel=1e-4)
        assert math.isfinite(entry["kd"])
    first, last = (sum(e["next_token"] for e in part) for part in (entries[:8], entries[-8:]))
    assert last < 0.95 * first
    final = load_denoiser(outcome.folder / "final")
    assert (final.block_size, final.attention) == (4, "context_causal")


@pytest.mark.parametrize("name", TIDE[1:])
def test_runs_with_blocks_resume_to_the_same_bit(tide, tmp_path, monkeypatch, name):
    recipe = tide(name, steps=8, checkpoint_every=3, eval_every=4, ema_decay=0.9)
    whole = new_run(recipe, tmp_path / "whole")
    train(recipe, whole)
    folder, real = new_run(recipe, tmp_path), trainer.train_step

    def stop(run, step):
        if step == 5:
            raise Stopped
        return real(run, step)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", stop)
        with pytest.raises(Stopped):
            train(recipe, folder)
    assert [path.name for path in saved_steps(folder / "checkpoints")] == ["step-000003"]
    train(recipe, folder)
    assert weights(folder) == weights(whole)
    assert numbers(folder) == numbers(whole)


@pytest.mark.parametrize("micro_rows", [1, 3])
@pytest.mark.parametrize("name", TIDE)
def test_accumulation_with_blocks_changes_nothing(tide, tmp_path, name, micro_rows):
    results = []
    for rows in (8, micro_rows):
        recipe = tide(name, micro_rows=rows, clip=0.0)
        results.append(gradients_of_a_step(recipe, tmp_path / str(rows)))
    (metrics, one), (others, other) = results
    assert metrics["kd"] > 0 or name == "blocks"
    assert metrics["next_token"] > 0
    assert_same_gradients(one, other, 1e-5)
    assert others == pytest.approx(metrics, rel=1e-5)


@pytest.mark.parametrize("name", ["denoised", "chunks"])
def test_gradient_checkpointing_with_blocks_changes_nothing(tide, tmp_path, name):
    results = [
        gradients_of_a_step(tide(name, gradient_checkpointing=on, clip=0.0), tmp_path / str(on))
        for on in (False, True)
    ]
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert_same_gradients(results[0][1], results[1][1], 1e-6)


def test_blocks_grow(tide, tmp_path):
    """1, 2, 4 tokens for two steps each, then 4; copies of a row follow its first ones."""
    run = new(tide("blocks", steps=9), tmp_path)
    for step, size in enumerate([1, 1, 2, 2, 4, 4, 4, 4, 4]):
        (batch,) = trainer.micro_batches(run, step)
        assert (batch.block_size, batch.copies) == (size, 2)
        assert batch.x0_BL[:8].equal(batch.x0_BL[8:])
        assert batch.rows[:8] == batch.rows[8:] == tuple(trainer.step_rows(run, step))
        blocks = (batch.level_BL[0] != batch.level_BL[0].roll(1)).sum()
        assert blocks > LENGTH // size / 2
    full = new(tiny_run.recipe(run.recipe.student.init, run.recipe.data.sources[0]), tmp_path / "2")
    assert trainer.micro_batches(full, 0)[0].block_size == 0


def test_a_full_canvas_step_has_no_next_token_metric(settings, tmp_path):
    run = new(settings(), tmp_path)
    assert "next_token" not in train_step(run, 0)


@pytest.mark.parametrize("name", ["denoised", "chunks"])
def test_the_terms_of_a_step_by_hand(tide, tmp_path, name):
    """Each sum by its own denominator, and targets mixed as far as the training has come."""
    run = new(tide(name, steps=4, micro_rows=3), tmp_path)
    run.denoiser.train()
    for step in range(4):
        share = 0.1 + 0.8 * (1 - math.cos(math.pi * step / 4)) / 2
        sums, over = torch.zeros(3), torch.zeros(3)
        for batch in trainer.micro_batches(run, step):
            torch.testing.assert_close(batch.share_BL, share * (1 - batch.level_BL))
            sums += trainer.step_terms(run, batch, 0.7, Measured()).detach()
            learnt = int(batch.maskable_BL.sum())
            kd = int(batch.masked_BL.sum())
            if name == "chunks":
                chunk_N = batch.chunk_BL[batch.masked_BL]
                kd = len(chunk_N[chunk_N >= 0].unique())
            over += torch.tensor([learnt, kd, learnt // batch.copies])
        metrics = train_step(run, step)
        found = [metrics[term] for term in ("ce", "kd", "next_token")]
        assert found == pytest.approx((sums / over).tolist(), rel=1e-4)


def test_chunks_reach_the_batches(tide, tmp_path):
    """Masked together, numbered anew in every micro-batch, and as the teacher numbers them."""
    run = new(tide("chunks", micro_rows=4), tmp_path)
    for step in range(3):
        for batch in trainer.micro_batches(run, step):
            inside_BL = batch.chunk_BL >= 0
            assert not (inside_BL & ~batch.maskable_BL).any()
            for chunk in batch.chunk_BL[inside_BL].unique():
                assert batch.masked_BL[batch.chunk_BL == chunk].unique().numel() == 1
            targets = run.ask(batch, run.denoiser)
            assert len(targets) == batch.kd_denominator > 0
            assert batch.share_BL is not None
            found = trainer.step_terms(run, batch, 0.7, Measured())
            assert found.isfinite().all()


@pytest.mark.parametrize(
    ("name", "objective", "message"),
    [
        ("blocks", {"grow_from": 3}, "does not become the block size 4"),
        ("denoised", {"tail": "partial"}, "means nothing with target.kind=denoised"),
        ("chunks", {"noise": "block"}, "objective.noise=row"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_a_run(
    tide, tmp_path, name, objective, message
):
    with pytest.raises(ConfigError, match=message):
        new(tide(name, objective=objective), tmp_path)


def test_a_teacher_with_other_tokens_needs_chunks(tide, settings, teachers, tmp_path):
    recipe = settings(teacher={"model": str(teachers / "foreign")}, target={"kind": "denoised"})
    with pytest.raises(VocabError, match=r"different tokenizers; set target\.kind=chunks"):
        new(recipe, tmp_path)
    recipe = settings(teacher={"model": str(teachers / "ar")}, target={"kind": "denoised"})
    with pytest.raises(CheckpointError):
        new(recipe, tmp_path / "2")
