"""Runs that learn from their own text: resumed exactly, gradients recomputed, of every kind; refused.

Rollouts, states and settings have tests of their own; here they are parts of whole tiny runs.
"""

import contextlib
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import tiny_run
import torch
from test_batches import BLOCKS, FULL, WHOLE, ending_ar, ids_of, prompt_file, without_seconds
from test_trainer import Stopped, assert_same_gradients, gradients_of_a_step, new, numbers, weights

from mdm import attention
from mdm.checkpoint import load_vocab, save_denoiser
from mdm.config import build
from mdm.convert import decoder_layers
from mdm.errors import CheckpointError, ConfigError, TrainingError
from mdm.train import trainer
from mdm.train.batches import SAMPLES, show_samples
from mdm.train.command import train as command
from mdm.train.on_policy import length_limit
from mdm.train.progress import keep_until, read_metrics
from mdm.train.recipe import Recipe
from mdm.train.rollouts import Rollout, load
from mdm.train.run import new_run, start
from mdm.train.state import saved_steps
from mdm.train.states import GIVEN
from mdm.train.trainer import train, train_step

ON_POLICY = {"fraction": 1.0, "length": 8, "steps_per_batch": 2, "prompt_tokens": 7}


@pytest.fixture(scope="module")
def ar(tmp_path_factory):
    return ending_ar(tmp_path_factory.mktemp("ar"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tiny_run.corpus_folder(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def settings(ar, corpus):
    """`settings(on_policy={…}, train={…})`: a tiny recipe with rollouts."""

    def make(student=BLOCKS, train=(), on_policy=(), teacher=ar, **sections):
        sections |= {"on_policy": ON_POLICY | dict(on_policy), "teacher": {"model": teacher}}
        tree = tiny_run.tree(ar, corpus, student=student, train={"eval_rows": 4} | dict(train))
        return build(Recipe, tree | {n: {**tree.get(n, {}), **v} for n, v in sections.items()})

    return make


def told(folder):
    """What metrics.jsonl says, but for what differs from run to run."""
    return [without_seconds(entry) for entry in numbers(folder)]


def steps(folder):
    return [entry for entry in read_metrics(folder / "metrics.jsonl") if "loss" in entry]


def samples(folder):
    return [json.loads(line) for line in (folder / SAMPLES).read_text("utf-8").split("\n") if line]


def rollout_files(folder):
    return {path.name: path.read_bytes() for path in (folder / "rollouts").iterdir()}


# --- interruptions -----------------------------------------------------------------------------------

# Batches of rollouts before steps (0-based) 2, 5 and 8; before 0, 2, 4, 6.
EXACT = {
    "blocks": {
        "on_policy": {"fraction": 0.5, "start_step": 2, "steps_per_batch": 3, "replay": 0.5,
                      "first_length": 4, "growth_batches": 2, "samples": 2},
        "objective": {"kd_lambda": 0.3, "kd_ramp_steps": 4},
        "train": {"steps": 9, "ema_decay": 0.9, "eval_every": 4},
    },
    "full": {
        "student": FULL,
        "on_policy": {"replay": 0.25, "max_staleness": 1, "states": "complement", "threshold": 0.3},
        "objective": {"kd_lambda": 0.0},
        "target": WHOLE,
        "train": {"steps": 7, "ema_decay": 0.9},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def exact(settings):
    """`exact("blocks", checkpoint_every=4)`: a recipe of EXACT."""

    def make(name, **train):
        case = EXACT[name]
        return settings(**case | {"train": case["train"] | train})

    return make


@pytest.fixture(scope="module")
def whole(exact, tmp_path_factory):
    """By name: the folder of a finished run, made when it is asked for."""
    folders = {}

    def make(name):
        if name not in folders:
            recipe = exact(name)
            folders[name] = new_run(recipe, tmp_path_factory.mktemp("whole"))
            train(recipe, folders[name])
        return folders[name]

    return make


@contextlib.contextmanager
def stopping(monkeypatch, at):
    """Runs are cut off before their step `at` (0-based)."""
    real = trainer.train_step

    def train_step(run, step):
        if step == at:
            raise Stopped
        return real(run, step)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", train_step)
        with pytest.raises(Stopped):
            yield


def assert_same_run(folder, other):
    assert weights(folder) == weights(other)
    assert told(folder) == told(other)
    assert samples(folder) == samples(other)
    assert rollout_files(folder) == rollout_files(other)


@pytest.mark.parametrize(
    ("name", "every", "stop"),
    [
        ("blocks", 2, 3),  # before the first rollouts, which are written again
        ("blocks", 5, 8),  # before another batch is written
        ("blocks", 7, 8),  # within that, with one to replay
        ("full", 3, 5),
        ("full", 4, 5),
    ],
)
def test_resumed_to_the_same_bit(exact, whole, tmp_path, monkeypatch, name, every, stop):
    recipe = exact(name, checkpoint_every=every)
    folder = new_run(recipe, tmp_path)
    with stopping(monkeypatch, stop):
        train(recipe, folder)
    assert [p.name for p in saved_steps(folder / "checkpoints")] == [f"step-{every:06d}"]
    train(recipe, folder)
    assert_same_run(folder, whole(name))


def test_what_was_written_after_the_checkpoint_does_not_count(exact, whole, tmp_path, monkeypatch):
    recipe = exact("blocks", checkpoint_every=4)
    folder = new_run(recipe, tmp_path)
    with stopping(monkeypatch, 7):
        train(recipe, folder)
    assert [path.name for path in saved_steps(folder / "checkpoints")] == ["step-000004"]
    assert [line["step"] for line in samples(folder)] == [3, 3, 6, 6]
    later = folder / "rollouts" / "batch-000001.safetensors"
    later.write_bytes(later.read_bytes()[:100])
    train(recipe, folder)
    assert_same_run(folder, whole("blocks"))


def test_a_run_goes_on_with_the_prompts_it_began_with(exact, whole, tmp_path, monkeypatch):
    recipe = exact("full", checkpoint_every=3)
    folder = new_run(recipe, tmp_path)
    with stopping(monkeypatch, 3):
        train(recipe, folder)
    added = Path(recipe.data.sources[0]) / "new.py"
    try:
        added.write_text("another = 1\n" * 9, encoding="utf-8")
        train(recipe, folder)
    finally:
        added.unlink()
    assert_same_run(folder, whole("full"))


def test_a_run_without_its_rollouts(exact, tmp_path, monkeypatch):
    """Batch 0 is needed to the end, and was written by weights that are gone."""
    recipe = exact("blocks", checkpoint_every=4)
    folder = new_run(recipe, tmp_path)
    with stopping(monkeypatch, 4):
        train(recipe, folder)
    file = folder / "rollouts" / "batch-000000.safetensors"
    of_another_kind, whole = (folder / "before.safetensors").read_bytes(), file.read_bytes()
    file.unlink()
    message = rf"cannot read the rollouts .*{file.name}.*put the file back, or start a new run"
    for content in (b"", whole[:-9], of_another_kind):
        with pytest.raises(CheckpointError, match=message):
            train(recipe, folder)
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        train(recipe, folder)
    file.write_bytes(whole)
    assert train(recipe, folder).steps == 9


def test_resumed_from_the_command_line(exact, whole, tmp_path, monkeypatch):
    """After a signal, which ends a run behind its step and leaves a checkpoint."""
    recipe = exact("blocks", checkpoint_every=0)
    path = tiny_run.write_recipe(tmp_path / "mine.yaml", recipe)
    folder, real = tmp_path / "runs" / recipe.name, trainer.train_step

    def train_step(run, step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(run, step)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", train_step)
        arguments = ["--recipe", str(path), "--runs", str(tmp_path / "runs")]
        with pytest.raises(TrainingError, match="after step 6; continue with `mdm train --resume"):
            command.main(arguments, standalone_mode=False)
    assert [path.name for path in saved_steps(folder / "checkpoints")] == ["step-000006"]
    command.main(["--resume", str(folder)], standalone_mode=False)
    assert_same_run(folder, whole("blocks"))


def test_samples_are_the_same_to_the_byte(exact, whole, tmp_path, monkeypatch):
    recipe = exact("blocks", checkpoint_every=4)
    folder = new_run(recipe, tmp_path)
    with stopping(monkeypatch, 5):
        train(recipe, folder)
    train(recipe, folder)
    assert (folder / SAMPLES).read_bytes() == (whole("blocks") / SAMPLES).read_bytes()


@pytest.mark.parametrize("text", ["a\u2028b", "a\x85b", "a\x1cb", 'é"\n\x0c'])
def test_any_text_is_kept_in_samples(settings, tmp_path, text):
    run = new(settings(on_policy={"samples": 3}), tmp_path)
    ids = torch.tensor([256, *text.encode()])
    run.rollouts[0] = [Rollout(ids, torch.arange(len(ids)) + GIVEN, False, 1, len(ids) - 1, -1.0)]
    run.rollouts[0] *= 3
    show_samples(run, 4, 0)
    assert [line["response"] for line in samples(run.folder)] == [text] * 3
    keep_until(run.folder / SAMPLES, 5)
    assert [line["response"] for line in samples(run.folder)] == [text] * 3


# --- what a run leaves --------------------------------------------------------------------------------

ROLLOUT_METRICS = {
    "rollout_tokens_per_forward", "rollout_length", "rollout_ended", "rollout_entropy",
    "rollout_limit", "rollout_seconds",
}  # fmt: skip


def test_metrics_of_rollouts(whole, exact):
    folder = whole("blocks")
    for entry in steps(folder):
        due, own = entry["step"] in (3, 6, 9), entry["step"] > 2
        keys = {key for key in entry if key.startswith("rollout_")}
        assert keys == (ROLLOUT_METRICS if due else set())
        assert ("on_policy" in entry) == own
        if own:
            assert 0 <= entry["target_agreed"] <= 1
            assert entry["on_policy"] > 0
    for batch, entry in enumerate(e for e in steps(folder) if "rollout_limit" in e):
        rollouts = load(folder / "rollouts", batch)
        decided = [rollout.decided for rollout in rollouts]
        assert entry["rollout_limit"] == length_limit(exact("blocks").on_policy, batch)
        assert entry["rollout_length"] == pytest.approx(sum(decided) / len(rollouts))
        ended = [rollout.ended for rollout in rollouts]
        assert entry["rollout_ended"] == pytest.approx(sum(ended) / len(rollouts))
        per_forward = sum(decided) / sum(rollout.nfe for rollout in rollouts)
        assert entry["rollout_tokens_per_forward"] == pytest.approx(per_forward)
        entropy = -sum(rollout.log_prob for rollout in rollouts) / sum(decided)
        assert entry["rollout_entropy"] == pytest.approx(entropy)
    assert any(e["rollout_ended"] for e in steps(folder) if "rollout_ended" in e)
    assert [e["rollout_limit"] for e in steps(folder) if "rollout_limit" in e] == [4, 6, 8]


@pytest.mark.parametrize("name", EXACT)
def test_samples_show_the_first_rollouts_of_each_batch(whole, exact, name):
    folder, settings = whole(name), exact(name).on_policy
    vocab = load_vocab(str(folder / "final"))
    expected = []
    for batch in range(len(rollout_files(folder))):
        for rollout in load(folder / "rollouts", batch)[: settings.samples]:
            prompt, response = rollout.tokens_L.tolist(), []
            while rollout.step_L[len(response)] == GIVEN:
                response.append(prompt.pop(0))
            prompt, response = response, prompt
            ended = vocab.eos_id in response
            if ended:
                response = response[: response.index(vocab.eos_id)]
            expected.append(
                {
                    "step": 1 + settings.start_step + settings.steps_per_batch * batch,
                    "prompt": bytes(prompt[1:]).decode(),
                    "response": vocab.decode(response),
                    "ended": ended,
                    "tokens": rollout.decided,
                    "forwards": rollout.nfe,
                }
            )
    assert len(expected) >= 4
    assert samples(folder) == expected
    assert all(line["prompt"].startswith("def f") for line in expected)


def test_the_loss_curve_shows_the_rollouts(whole, monkeypatch, tmp_path):
    from matplotlib.axes import Axes

    folder, drawn = whole("blocks"), []
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    real = Axes.plot

    def plot(self, *arguments, **options):
        drawn.append(options["label"])
        return real(self, *arguments, **options)

    monkeypatch.setattr(Axes, "plot", plot)
    trainer.finish.__globals__["plot_loss"](folder / "metrics.jsonl", tmp_path / "loss.png")
    assert drawn == ["train loss", "train ce", "train kd", "train on_policy"]


def test_the_record_does_not_take_rollouts_for_a_bound(whole):
    record = json.loads((whole("full") / "record.jsonl").read_text(encoding="utf-8"))
    assert "rollouts" in record["results"]["loss"]


def test_rollouts_of_a_run_that_is_replaced(whole, exact, tmp_path):
    shutil.copytree(whole("full"), tmp_path / "tiny")
    recipe = exact("full")
    for part in ("rollouts", "prompts", SAMPLES):
        assert (tmp_path / "tiny" / part).exists()
    new_run(recipe, tmp_path, overwrite=True)
    for part in ("rollouts", "prompts", SAMPLES):
        assert not (tmp_path / "tiny" / part).exists()


# --- gradient checkpointing ----------------------------------------------------------------------------

STUDENTS = {
    "blocks": BLOCKS,
    "context": BLOCKS | {"attention": "context_causal", "block_size": 8},
    "full": FULL,
}


@pytest.mark.parametrize("name", STUDENTS)
def test_gradient_checkpointing_changes_nothing(settings, tmp_path, name):
    results = {}
    for on in (False, True):
        recipe = settings(
            student=STUDENTS[name],
            target=WHOLE if name == "full" else {},
            on_policy={"fraction": 0.5, "states": "all"},
            objective={"kd_lambda": 0.0},
            train={"gradient_checkpointing": on, "clip": 0.0, "micro_rows": 4},
        )
        results[on] = gradients_of_a_step(recipe, tmp_path / str(on))
    files = [rollout_files(tmp_path / str(on) / "tiny") for on in (False, True)]
    assert files[0] == files[1] != {}
    assert_same_gradients(results[False][1], results[True][1], 1e-6)
    assert without_seconds(results[True][0]) == pytest.approx(
        without_seconds(results[False][0]), rel=1e-6
    )


@pytest.mark.parametrize(
    ("name", "target"),
    [("blocks", {}), ("blocks", {"kind": "suffix", "block": 4, "candidates": 3}), ("full", WHOLE)],
)
def test_no_mask_is_changed_between_forward_and_backward(
    settings, tmp_path, monkeypatch, name, target
):
    """A layer computes again, for its gradients, with the very mask that it had (OPDLM's code has not)."""
    recipe = settings(
        student=STUDENTS[name],
        target=target,
        on_policy={"prompts": [prompt_file(tmp_path)]},  # rows of several lengths, which need masks
        train={"gradient_checkpointing": True},
    )
    run = new(recipe, tmp_path)
    masks, real = [], attention.float_mask

    def float_mask(*arguments):
        mask = real(*arguments)
        masks.append((mask, mask.clone()))
        return mask

    monkeypatch.setattr(attention, "float_mask", float_mask)
    calls: dict[int, list[torch.Tensor]] = {}
    layers = list(decoder_layers(run.denoiser.model))
    for number, layer in enumerate(layers):
        assert layer.gradient_checkpointing

        def note(module, _arguments, options, number=number):
            if module.training:  # not of rollouts
                calls.setdefault(number, []).append(options["attention_mask"].clone())

        layer.self_attn.register_forward_pre_hook(note, with_kwargs=True)
    run.denoiser.train()
    train_step(run, 0)
    assert len(masks) >= 3  # of rollouts, teacher and student
    for mask, as_made in masks:
        assert torch.equal(mask, as_made)
    assert sorted(calls) == list(range(len(layers)))
    for first, again in calls.values():
        assert torch.equal(first, again)


def test_rollouts_with_checkpointing_on_are_those_without(settings, tmp_path):
    found = []
    for on in (False, True):
        run = new(settings(train={"gradient_checkpointing": on}), tmp_path / str(on))
        run.denoiser.train()
        trainer.renew_rollouts(run, 0)
        assert run.denoiser.training
        assert all(module.training for module in run.denoiser.modules())
        found.append(ids_of(run))
    assert found[0] == found[1]


# --- students, targets, precisions ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def diffusion(ar, tmp_path_factory):
    """The folder of a diffusion teacher."""
    folder = tmp_path_factory.mktemp("diffusion")
    save_denoiser(tiny_run.tiny_denoiser(ar, kind="bd3lm", block_size=8), folder / "teacher")
    return str(folder / "teacher")


OWN = {"kind": "student", "reference": False, "block": 4, "fills": 3}
CASES = {
    "low rank": {"train": {"lora_rank": 2}},
    "low rank bf16": {
        "train": {"lora_rank": 2, "precision": "bf16", "gradient_checkpointing": True},
        "target": OWN,
    },
    "bf16": {"train": {"precision": "bf16"}, "target": WHOLE},
    "bf16 own": {"train": {"precision": "bf16"}, "target": OWN},
    "full": {
        "student": FULL,
        "on_policy": {"threshold": None, "tokens_per_step": 2, "block_length": 4, "length": 8},
    },
    "full random": {
        "student": FULL,
        "on_policy": {"states": "random", "remasking": "random", "threshold": None},
        "objective": {"masking": "exact", "weight": "mean_masked"},
    },
    "denoised": {"target": {"kind": "denoised"}},
    "denoised shown": {"target": {"kind": "denoised", "comp_demo": "exact"}, "student": FULL},
    "suffix": {"target": {"kind": "suffix", "block": 4, "candidates": 4, "tail_draws": 2}},
    "smc": {"target": {"kind": "smc", "block": 4, "fills": 4}},
    "student": {"target": OWN, "on_policy": {"states": "all"}},
    "chosen": {"objective": {"kd_positions": 2}, "on_policy": {"reduce": "rollout"}},
    "reordered": {
        "student": BLOCKS | {"attention": "reordered", "shift": False},
        "on_policy": {"states": "complement", "temperature": 0.5, "top_p": 0.9},
    },
}


@pytest.mark.parametrize("name", CASES)
def test_steps_of_every_kind(settings, diffusion, tmp_path, name):
    case = CASES[name]
    if "denoised" in name:
        case = case | {"teacher": diffusion}
    run = new(settings(**case), tmp_path)
    before = {n: p.detach().clone() for n, p in run.denoiser.named_parameters()}
    run.denoiser.train()
    for step in range(3):
        metrics = train_step(run, step)
        assert all(torch.tensor(value).isfinite() for value in metrics.values())
        assert metrics["loss"] == pytest.approx(metrics["on_policy"]) != 0
        assert metrics["gradient_norm"] > 0
    moved = [n for n, p in run.denoiser.named_parameters() if not torch.equal(p, before[n])]
    trained = [n for n, p in run.denoiser.named_parameters() if p.requires_grad]
    assert moved == trained != []


def test_a_student_of_low_rank_is_one_model_in_the_end(settings, tmp_path):
    recipe = settings(train={"lora_rank": 2, "steps": 3, "precision": "bf16"})
    folder = new_run(recipe, tmp_path)
    train(recipe, folder)
    assert len(steps(folder)) == 3
    again = settings(student={"init": str(folder / "final")}, train={"steps": 1})
    train(again, new_run(again, tmp_path / "again"))


@pytest.mark.parametrize(
    ("student", "target"),
    [
        (BLOCKS, WHOLE),
        pytest.param(BLOCKS, {"kind": "suffix", "block": 4}, marks=pytest.mark.slow),
        pytest.param(BLOCKS, OWN, marks=pytest.mark.slow),
        pytest.param(FULL, WHOLE, marks=pytest.mark.slow),
    ],
    ids=["left", "suffix", "student", "full"],
)
def test_a_student_comes_nearer_to_the_model_it_was(corpus, tmp_path, student, target):
    """Its text is its own at every step: the loss is what is left at masks, whatever it writes."""
    sure = ending_ar(tmp_path / "ar", scale=3.0, end=1.0)
    recipe = tiny_run.recipe(
        sure,
        corpus,
        student=student,
        target=target,
        on_policy=ON_POLICY,
        train={"steps": 40, "learning_rate": 1e-2},
    )
    run = new(recipe, tmp_path)
    run.denoiser.train()
    losses = [train_step(run, step)["on_policy"] for step in range(recipe.train.steps)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": {"kind": "i_sir"}}, r"target.kind=i_sir .* set target.kind=smc"),
        ({"target": {"kind": "csmc"}}, r"target.kind=csmc .* set target.kind=smc"),
        ({"target": {"kind": "student"}}, r"target.kind=student .* target.reference=false"),
        ({"target": {"kind": "mapped"}}, r"target.kind=mapped.* set target.kind=left, suffix"),
        ({"target": {"kind": "embedding"}}, r"target.kind=embedding.* set target.kind=left"),
        (
            {"target": {"kind": "chunks"}, "masks": {"where": "chunks"},
             "objective": {"kd_lambda": 0.5}},
            r"target.kind=chunks.* set target.kind=left",
        ),
        ({"target": {"cache": "answers"}}, r"target.cache=answers .* leave target.cache out"),
        ({"target": {"infill": "psm"}}, r"infill='psm' with .* without infill"),
        ({"mix": {"first": 0.1, "last": 0.9}}, r"mix.first=0.1.* leave mix out"),
        ({"mix": {"weight": "midrange"}}, r"mix.weight=midrange.* leave mix out"),
        (
            {"objective": {"grow_from": 1, "grow_steps": 4}},
            r"objective.grow_from=1 .* leave grow_from and grow_steps out",
        ),
    ],
)  # fmt: skip
def test_what_does_not_go_with_rollouts_is_no_recipe(settings, changes, message):
    settings(on_policy={"fraction": 0.0}, **changes)  # it is the rollouts that it does not go with
    with pytest.raises(ConfigError, match=message):
        settings(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train": {"sharding": "full"}},
            r"train.sharding=full with on_policy.fraction=1.0.* set train.sharding=none",
        ),
        (
            {"on_policy": {"fraction": 0.3}},
            r"on_policy.fraction=0.3 of train.batch_rows=8 is 2.4 rows; make it a whole number",
        ),
        (
            {"on_policy": {"length": 1020}},
            r"a prompt of 8 tokens and on_policy.length=1020 .* built for at most 1024; lower",
        ),
    ],
)
def test_what_is_refused_before_a_run(settings, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        new(settings(**changes), tmp_path)


def test_a_teacher_with_too_short_a_context(settings, tmp_path):
    short = tiny_run.ar_folder(tmp_path / "short", max_position_embeddings=24)
    with pytest.raises(ConfigError, match=r"but the teacher was built for at most 24; lower"):
        new(settings(teacher=short, on_policy={"length": 20}), tmp_path / "1")
    new(settings(teacher=short, on_policy={"length": 12}), tmp_path / "2")


@pytest.mark.parametrize(
    ("student", "on_policy"),
    [
        (BLOCKS, {"block_length": 3}),
        (FULL, {"block_length": 4, "length": 10, "threshold": None}),
        (
            FULL,
            {
                "block_length": 4,
                "length": 8,
                "first_length": 4,
                "growth_batches": 4,
                "threshold": None,
            },
        ),
    ],
)
def test_what_the_sampler_cannot_do_is_refused_before_a_run(settings, tmp_path, student, on_policy):
    recipe = settings(student=student, on_policy=on_policy)
    folder = new_run(recipe, tmp_path)
    try:
        run = start(recipe, folder)
    except ConfigError:
        return
    for step in range(0, 12, 2):
        trainer.renew_rollouts(run, step)


def test_blocks_nobody_has_named_need_room_too(corpus, tmp_path):
    """8 + 14 tokens are 24 in blocks of 4, which a student has if nothing else is said."""
    for room in (23, 24):
        short = tiny_run.ar_folder(tmp_path / f"room{room}", max_position_embeddings=room)
        recipe = tiny_run.recipe(
            short,
            corpus,
            student={"kind": "bd3lm"},
            data={"length": 20},
            on_policy=ON_POLICY | {"length": 14},
        )
        if room == 24:
            run = new(recipe, tmp_path / "runs")
            trainer.renew_rollouts(run, 0)
            assert max(len(rollout.tokens_L) for rollout in run.rollouts[0]) == room
            continue
        with pytest.raises(ConfigError, match=r"on_policy\.length"):
            new(recipe, tmp_path)
