"""Sharded = DDP = one process: losses, weights, averages, checkpoints; and what is refused."""

import json
import shutil

import pytest
import tiny_run
import torch
import two_processes
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor

from mdm.checkpoint import load_ar, save_denoiser
from mdm.config import build
from mdm.convert import StudentSettings, convert
from mdm.errors import ConfigError
from mdm.train import processes
from mdm.train.command import train as command
from mdm.train.progress import read_metrics
from mdm.train.recipe import Recipe
from mdm.train.run import precision, start
from mdm.train.sharding import (
    check_sharding,
    clip_gradients,
    shard_teacher,
    whole,
    whole_state,
)
from mdm.train.state import saved_steps
from mdm.train.trainer import train_step

# Several micro-batches, an average, three batches of held-out rows for two processes.
TRAIN = {"micro_rows": 2, "eval_rows": 5, "ema_decay": 0.5, "learning_rate": 1e-2}
RUN = {"steps": 6, "checkpoint_every": 2, "eval_every": 3}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of AR models. The untied one has an odd number of rows, which two cannot share evenly."""
    folder = tmp_path_factory.mktemp("models")
    found = {
        "untied": tiny_run.ar_folder(folder / "untied", extra_special=("<x>",)),
        "tied": tiny_run.ar_folder(folder / "tied", tie_word_embeddings=True),
        "gemma3": tiny_run.ar_folder(folder / "gemma3", family="gemma3"),
        "gpt_neox": tiny_run.ar_folder(folder / "gpt_neox", family="gpt_neox"),
    }
    teacher = convert(StudentSettings(init=found["tied"], kind="bd3lm", block_size=4))
    save_denoiser(teacher, folder / "denoiser")
    return found | {"denoiser": str(folder / "denoiser")}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tiny_run.corpus_folder(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def tree(models, corpus):
    """`tree("tied", train={…})`: a recipe of a tiny run."""

    def make(model="untied", train=(), **sections):
        return tiny_run.tree(models[model], corpus, train=TRAIN | dict(train), **sections)

    return make


@pytest.fixture(scope="module")
def cases(tree, models):
    """By name: the arguments of `play`, without sharding."""
    states = {"teacher": {"model": models["tied"]}, "target": {"kind": "embedding"}}
    blocks = {"kind": "bd3lm", "block_size": 4, "attention": "context_causal"}
    seen = {
        "teacher": {"model": models["denoiser"]},
        "mix": {"first": 0.1, "last": 0.9, "by_noise": True},
    }
    found = {
        "blocks": {
            "tree": tree(
                student={"init": models["untied"], **blocks},
                target={"kind": "denoised", "comp_demo": "bernoulli"},
                objective={"noise": "block", "masking": "exact", "ar_weight": 0.5, "kd_weight": 1},
                **seen,
            )
        },
        "chunks": {
            "tree": tree(
                target={"kind": "chunks", "comp_demo": "exact"},
                objective={"kd_weight": 1, "kd_reduce": "mean_masked"},
                masks={"where": "chunks"},
                **seen,
            )
        },
        "untied": {"tree": tree()},
        "tied": {"tree": tree("tied", {"gradient_checkpointing": True, "micro_rows": 1})},
        "gemma3": {"tree": tree("gemma3", {"micro_rows": 8}, objective={"kd_lambda": 0.0})},
        "mapped": {"tree": tree(target={"kind": "mapped"})},
        "states": {"tree": tree(**states)},
        "half hidden": {"tree": tree(), "half_hidden": True},
        "states half hidden": {"tree": tree(**states), "half_hidden": True},
        "bf16": {"tree": tree(train={"precision": "bf16"})},
        "bf16 layer norm": {
            "tree": tree("gpt_neox", {"precision": "bf16", "gradient_checkpointing": True})
        },
    }
    for name in ("blocks", "chunks"):
        found[f"{name} half hidden"] = found[name] | {"half_hidden": True}
    return {name: {"steps": 3, **case} for name, case in found.items()}


def sharded(case, sharding="full", **changes):
    """The same case with another sharding."""
    settings = case["tree"] | {"train": case["tree"]["train"] | {"sharding": sharding}}
    return case | {"tree": settings} | changes


def play_in_two(folder, cases):
    """What each case comes to in two processes: {name: (numbers of each process, tensors)}."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    done = two_processes.launch(two_processes.__file__, folder / "cases.json", folder)
    assert done.returncode == 0, done.stderr
    return {
        case["name"]: (
            json.loads((folder / f"{case['name']}.json").read_text(encoding="utf-8")),
            load_file(folder / f"{case['name']}.safetensors"),
        )
        for case in cases
    }


def assert_same(one, other, *, tolerance=2e-5):
    """Metrics, held-out values and tensors of two plays; `other` is a pair as `play` returns it."""
    (numbers, tensors), (others, theirs) = one, other
    assert len(numbers["metrics"]) == len(others["metrics"]) > 0
    for mine, its in zip(numbers["metrics"], others["metrics"], strict=True):
        assert mine == pytest.approx(its, rel=tolerance, abs=1e-6)
    difference = torch.tensor(numbers["held_out"]) - torch.tensor(others["held_out"])
    assert float(difference.abs().max()) < tolerance
    assert tensors.keys() == theirs.keys()
    for name, value in tensors.items():
        torch.testing.assert_close(value, theirs[name], atol=5 * tolerance, rtol=0, msg=name)


def last_steps(played, number):
    """Without what was said of the steps before."""
    numbers, tensors = played
    return {part: numbers[part][-number:] for part in ("metrics", "held_out")}, tensors


def assert_same_in_both(two, one, **options):
    """What both processes say is the same, and the same as one process says."""
    (first, second), tensors = two
    assert first["metrics"] == second["metrics"]
    assert first["held_out"] == second["held_out"]
    assert_same((first, tensors), one, **options)
    alone = sorted(one[0]["targets"])
    together = sorted(first["targets"] + second["targets"])
    assert [sample for sample, _ in together] == [sample for sample, _ in alone]
    assert [v for _, v in together] == pytest.approx([v for _, v in alone], rel=1e-5)


# --- a group of one: the same code without other processes ------------------------------------------


@pytest.fixture
def group_of_one(monkeypatch):
    """As under `torchrun --nproc-per-node 1`."""
    for name, value in {
        "TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "1", "RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    with processes.process_group():
        yield


@pytest.mark.parametrize("name", ["tied", *(pytest.param(name, marks=pytest.mark.slow) for name in
                                  ("untied", "states half hidden", "bf16 layer norm"))])  # fmt: skip
def test_sharded_among_one(tmp_path, cases, name, request):
    alone = two_processes.play(tmp_path, "alone", **cases[name])
    early = cases[name] | {"steps": 2}
    early = two_processes.play(tmp_path, "early", **sharded(early))  # nobody to share with
    assert early[0]["metrics"] == alone[0]["metrics"][:2]
    request.getfixturevalue("group_of_one")
    together = two_processes.play(tmp_path, "together", **sharded(cases[name]))
    assert_same(together, alone)
    assert together[0]["targets"] == alone[0]["targets"]
    resumed = sharded(cases[name], resume=str(tmp_path / "early"))
    assert_same(two_processes.play(tmp_path, "resumed", **resumed), last_steps(alone, 1))


def test_what_is_sharded(tmp_path, tree, group_of_one):
    run = start(build(Recipe, sharded({"tree": tree("tied")})["tree"]), tmp_path)
    assert run.module is run.denoiser
    assert all(isinstance(p, DTensor) for p in run.denoiser.parameters())
    assert all(isinstance(value, DTensor) for value in run.average.values.values())
    state = whole_state(run.denoiser.model)
    assert not any(isinstance(value, DTensor) for value in state.values())
    assert state["lm_head.weight"] is state["model.embed_tokens.weight"]
    assert state.keys() == run.denoiser.model.state_dict().keys()
    assert torch.equal(state["model.norm.weight"], whole(run.denoiser.model.model.norm.weight))


@pytest.mark.parametrize("model", ["tied", "untied"])
def test_what_is_sharded_of_a_teacher(models, tree, group_of_one, model):
    loaded, _ = load_ar(models[model])
    tokens_BL = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = loaded(tokens_BL, use_cache=False).logits
        shard_teacher(loaded, build(Recipe, tree()).train)
        assert not any(isinstance(p, DTensor) for p in loaded.parameters())
        shard_teacher(loaded, build(Recipe, tree(train={"sharding": "full"})).train)
        torch.testing.assert_close(loaded(tokens_BL, use_cache=False).logits, before)
    embedding, head = loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight
    assert (embedding is head) == (model == "tied")
    whole_ones = {id(p) for p in loaded.parameters() if not isinstance(p, DTensor)}
    assert whole_ones == {id(embedding), id(head)}


def test_what_is_gathered_in_half_precision(tmp_path, tree, group_of_one):
    """Matrices of layers; what is between layers, norms and ends stays in float32."""
    full = {"sharding": "full", "precision": "bf16"}
    run = start(build(Recipe, tree("tied", full)), tmp_path)
    model, seen = run.denoiser.model.model, {}

    def note(name):
        return lambda module, given, _: seen.update({name: (module.weight.dtype, given[0].dtype)})

    layer = model.layers[1]
    layer.mlp.up_proj.register_forward_hook(note("matrix"))
    layer.input_layernorm.register_forward_hook(note("norm"))
    run.denoiser.model.lm_head.register_forward_hook(note("head"))
    with precision(run):
        train_step(run, 0)
    assert seen == {
        "matrix": (torch.bfloat16, torch.float32),
        "norm": (torch.float32, torch.float32),
        "head": (torch.float32, torch.float32),
    }
    assert {p.dtype for p in run.denoiser.parameters()} == {torch.float32}


def test_the_norm_of_gradients():
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1, 2))]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 2.0)
    assert clip_gradients(parameters, 0) == pytest.approx(4.0)
    assert clip_gradients(iter(parameters), 1.0) == pytest.approx(4.0)
    assert clip_gradients(parameters, 8.0) == pytest.approx(1.0)
    assert parameters[0].grad.tolist() == pytest.approx([0.5, 0.5])


# --- two processes -----------------------------------------------------------------------------------


def test_two_processes_share_a_student_and_its_teacher(tmp_path, cases):
    """And one process goes on from where they stopped."""
    early = sharded(cases["untied"], name="two", steps=2)
    (first, second), _ = play_in_two(tmp_path, [early])["two"]
    alone = two_processes.play(tmp_path, "alone", **cases["untied"])
    assert first["metrics"] == second["metrics"]
    for mine, its in zip(first["metrics"], alone[0]["metrics"][:2], strict=True):
        assert mine == pytest.approx(its, rel=2e-5, abs=1e-6)
    for own in (first, second):
        assert own["student_bytes"] < 0.51 * alone[0]["student_bytes"]
        assert own["teacher_bytes"] < 0.9 * alone[0]["teacher_bytes"]  # its ends stay whole
        said, *left = own["full_disk"]
        assert "No space left on device" in said
        assert left == ["step-000002"]
    resumed = cases["untied"] | {"resume": str(tmp_path / "two")}
    assert_same(two_processes.play(tmp_path, "resumed", **resumed), last_steps(alone, 1))


@pytest.fixture(scope="module")
def in_two(tmp_path_factory, cases):
    """Every case in two processes, sharded and not."""
    listed = [
        sharded(case, sharding, name=f"{name}, {sharding}")
        for name, case in cases.items()
        for sharding in ("none", "full")
    ]
    return play_in_two(tmp_path_factory.mktemp("two"), listed)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "full"])
@pytest.mark.parametrize(
    "name",
    [
        "untied",
        "tied",
        "gemma3",
        "mapped",
        "states",
        "half hidden",
        "states half hidden",
        "blocks",
        "blocks half hidden",
        "chunks",
        "chunks half hidden",
    ],
)
def test_two_processes_are_as_good_as_one(tmp_path, in_two, cases, name, sharding):
    alone = two_processes.play(tmp_path, "alone", **cases[name])
    assert_same_in_both(in_two[f"{name}, {sharding}"], alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16", "bf16 layer norm"])
def test_half_precision_is_that_of_autocast(tmp_path, in_two, cases, name):
    """Rounding differs between batches, so one process is not the yardstick, but DDP is."""
    numbers, tensors = in_two[f"{name}, none"]
    assert_same((in_two[f"{name}, full"][0][0], in_two[f"{name}, full"][1]), (numbers[0], tensors))
    exact = sharded(cases[name], "none")
    exact["tree"]["train"]["precision"] = "fp32"
    exact, _ = two_processes.play(tmp_path, "exact", **exact)
    first = numbers[0]["metrics"][0]["loss"]
    assert first == pytest.approx(exact["metrics"][0]["loss"], rel=0.02)
    assert first != exact["metrics"][0]["loss"]


@pytest.mark.slow
def test_resumed_by_others(tmp_path, cases):
    """One process, then two that share, then two that do not, then one: as if by one."""
    case = cases["tied"]
    two_processes.play(tmp_path, "one", **case | {"steps": 2})
    pair = [
        sharded(case, "full", name="full", steps=3, resume=str(tmp_path / "one")),
        sharded(case, "none", name="none", steps=4, resume=str(tmp_path / "two" / "full")),
        sharded(case, "full", name="again", steps=5, resume=str(tmp_path / "two" / "none")),
    ]
    play_in_two(tmp_path / "two", pair)
    last = case | {"steps": 6, "resume": str(tmp_path / "two" / "again")}
    whole_run = two_processes.play(tmp_path, "whole", **case | {"steps": 6})
    assert_same(two_processes.play(tmp_path, "last", **last), last_steps(whole_run, 1))


# --- the command, killed and resumed -----------------------------------------------------------------

EVENT = """
import os, signal
from mdm.cli import main
from mdm.train import trainer
real = trainer.train_step
def train_step(run, step):
    if step == {step} and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.{name})
    return real(run, step)
trainer.train_step = train_step
main()
"""


@pytest.mark.slow
def test_killed_and_resumed(tmp_path, tree):
    """Once for good and once politely: the same bits as without."""
    settings = build(Recipe, tree("tied", RUN | {"sharding": "full"}))
    path = tiny_run.write_recipe(tmp_path / "tiny.yaml", settings)
    new = ["train", "--recipe", path, "--runs"]
    done = two_processes.launch("-m", "mdm.cli", *new, tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "broken" / "tiny"

    def steps():
        return [path.name for path in (folder / "checkpoints").glob("step-*")]

    event = tmp_path / "event.py"
    event.write_text(EVENT.format(step=3, name="SIGKILL"), encoding="utf-8")
    done = two_processes.launch(event, *new, tmp_path / "broken")
    assert done.returncode != 0
    assert steps() == ["step-000002"]
    event.write_text(EVENT.format(step=2, name="SIGTERM"), encoding="utf-8")
    done = two_processes.launch(event, "train", "--resume", folder)
    assert done.returncode != 0
    assert "stopped by a signal after step 3" in done.stderr
    assert sorted(steps()) == ["step-000002", "step-000003"]
    shutil.copytree(folder, tmp_path / "alone")
    done = two_processes.launch("-m", "mdm.cli", "train", "--resume", folder)
    assert done.returncode == 0, done.stderr
    final = tmp_path / "whole" / "tiny" / "final" / "model.safetensors"
    assert (folder / "final" / "model.safetensors").read_bytes() == final.read_bytes()
    whole_run = read_metrics(tmp_path / "whole" / "tiny" / "metrics.jsonl")
    for mine, its in zip(read_metrics(folder / "metrics.jsonl"), whole_run, strict=True):
        assert mine.get("loss") == its.get("loss")
        assert mine.get("held_out") == its.get("held_out")

    # One process takes over, for which there is nothing to share.
    command.main(["--resume", str(tmp_path / "alone")], standalone_mode=False)
    expected = load_file(final)
    for name, value in load_file(tmp_path / "alone" / "final" / "model.safetensors").items():
        torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=0, msg=name)
    assert len(saved_steps(tmp_path / "alone" / "checkpoints")) == 2


# --- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"target": {"kind": "suffix"}},
            r"target\.kind=suffix.*train\.sharding=none.*target\.cache",
        ),
        ({"target": {"kind": "smc"}}, r"target\.kind=smc"),
        ({"target": {"infill": "psm"}}, r"target\.infill=psm"),
    ],
)
def test_a_teacher_that_cannot_be_shared(tree, tmp_path, sections, message):
    full = build(Recipe, tree(train={"sharding": "full"}, **sections))
    with pytest.raises(ConfigError, match=message):
        start(full, tmp_path)
    check_sharding(build(Recipe, tree(**sections)))
    alone = {"objective": {"kd_lambda": 0.0}}
    check_sharding(build(Recipe, tree(train={"sharding": "full"}, **sections | alone)))


@pytest.mark.parametrize("kind", ["left", "mapped", "embedding", "denoised"])
def test_teachers_that_can_be_shared(tree, kind):
    check_sharding(build(Recipe, tree(train={"sharding": "full"}, target={"kind": kind})))


def test_a_cache_needs_no_teacher(tree):
    target = {"kind": "left", "cache": "somewhere"}
    check_sharding(build(Recipe, tree(train={"sharding": "full"}, target=target)))


def test_an_unknown_sharding(tree):
    with pytest.raises(ConfigError, match=r"train\.sharding.*'ful'.*did you mean 'full'"):
        build(Recipe, tree(train={"sharding": "ful"}))
