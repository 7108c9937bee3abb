"""`--dry-run`: sizes from configs alone."""

import json
import re
import shutil
from dataclasses import replace
from importlib import resources

import pytest
import tiny
import torch
import yaml
from click.testing import CliRunner
from test_memory import peak_allocation
from tiny_published import A2D, DREAM, SDAR, WEDLM, write_own_code
from tiny_run import ar_folder, corpus_folder, recipe, tiny_denoiser, write_recipe

from mdm.checkpoint import save_denoiser
from mdm.config import to_tree
from mdm.convert import decoder_layers, student_config
from mdm.errors import CheckpointError, ConfigError, VocabError
from mdm.train.command import train
from mdm.train.estimate import describe, largest_rows
from mdm.train.memory import BYTES, OF_A_STEP, rollout_bytes, student_bytes, teacher_bytes
from mdm.train.on_policy import length_limit
from mdm.train.outlines import (
    RowShape,
    config_of_student,
    outline,
    prompt_lengths,
    student_outline,
    teacher_outline,
)
from mdm.train.recipe import read_recipe, shipped_recipes
from mdm.train.rollouts import roll_out
from mdm.train.run import initial_student, new_run, start
from mdm.train.sizes import mixture_size, size_of
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
    assert ", 2 layers, width 16" in text
    assert f"{7 * 4 * 24:,} in 7 steps of 4 rows of 24" in text
    assert "fp32" in next(line for line in lines if line.startswith("teacher  "))
    assert sum(line.endswith("GiB") for line in lines) == 8
    without = describe(recipe(ar, tmp_path, objective={"kd_lambda": 0.0}))
    assert "teacher     none (objective.kd_lambda or kd_weight is 0)" in without


def test_a_denoiser_is_described_too(tmp_path):
    save_denoiser(tiny_denoiser(ar_folder(tmp_path / "ar")), tmp_path / "student")
    alone = recipe(tmp_path / "student", tmp_path, objective={"kd_lambda": 0.0})
    assert "2 layers" in describe(alone)


@pytest.fixture
def config():
    shape = tiny.tiny_config("llama", 259, layers=8, tie_word_embeddings=False)
    return student_config(shape, layers=None, width=1.0)


def memory_of_student(config, processes=1, objective=None, block_size=None, **settings):
    changed = recipe("x", "y", train=settings, objective=objective or {})
    student = replace(outline(config, changed.train.lora_rank), block_size=block_size)
    return student_bytes(changed, student, processes)


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
    return teacher_bytes(changed, outline(config), processes)["teacher"]


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
    assert "GiB of CPU memory at the start and all the time\n" in offloaded
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
MANY = {"steps": 2, "batch_rows": 4, "micro_rows": 4}  # a step, and one with moments
BLOCKS = {"kind": "bd3lm", "block_size": 8}


def peak_of_steps(tmp_path, ar, *, length=128, train=None, **sections):
    """(settings, bytes that two steps allocate beyond the weights that were there)."""
    settings = recipe(
        ar,
        corpus_folder(tmp_path / "corpus", files=30),
        data={"length": length, "eos_padding": "none"},
        train={**MANY, **(train or {})},
        **sections,
    )
    run = start(settings, new_run(settings, tmp_path / "runs"))
    run.denoiser.train()

    def steps():
        for step in range(2):
            train_step(run, step)

    return settings, peak_allocation(steps)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weight_decay": 0.0},
        {"precision": "bf16"},
        {"gradient_checkpointing": True},
        {"ema_decay": 0.9},
        {"lora_rank": 8},
        {"lora_rank": 8, "gradient_checkpointing": True, "precision": "bf16"},
    ],
    ids=str,
)
def test_a_step_takes_what_was_estimated(tmp_path, changes):
    """As torch's profiler counts it."""
    student = BLOCKS if len(changes) != 1 else {}
    ar = ar_folder(tmp_path / "ar", **WIDE)
    settings, peak = peak_of_steps(tmp_path, ar, train=changes, student=student)
    outline = student_outline(settings)
    memory = student_bytes(settings, outline, 1)
    if settings.train.ema_decay:
        memory["moments, average"] -= 4 * outline.size.parameters
    estimated = sum(memory.values()) - memory["weights"]
    assert 0.9 * peak <= estimated <= 1.5 * peak, (estimated / peak, memory)


@pytest.mark.parametrize(
    ("precision", "complementary"), [("fp32", False), ("bf16", False), ("fp32", True)]
)
def test_masks_of_two_streams_count(tmp_path, precision, complementary):
    """A narrow model with long rows: most of it is who sees whom."""
    ar = ar_folder(tmp_path / "ar", layers=2, hidden=16)
    settings, peak = peak_of_steps(
        tmp_path,
        ar,
        length=400,
        train={"precision": precision},
        student=BLOCKS,
        objective={"kd_lambda": 0.0, "complementary": complementary},
    )
    memory = student_bytes(settings, student_outline(settings), 1)
    assert memory["attention mask"] > 0.25 * sum(memory.values())
    assert 0.8 * peak <= sum(memory.values()) <= 1.5 * peak, (peak, memory)


@pytest.mark.parametrize("comp_demo", ["", "exact"])
def test_logits_of_a_diffusion_teacher_count(tmp_path, comp_demo):
    """Many tokens and little else; all of the logits are within one chunk, half of them are masked."""
    ar = ar_folder(
        tmp_path / "ar", layers=1, hidden=32, extra_special=tuple(f"<{i}>" for i in range(2500))
    )
    save_denoiser(tiny_denoiser(ar, **BLOCKS), tmp_path / "teacher")
    settings, peak = peak_of_steps(
        tmp_path,
        ar,
        length=128,
        student=BLOCKS,
        teacher={"model": str(tmp_path / "teacher")},
        target={"kind": "denoised", "comp_demo": comp_demo},
        mix={"first": 0.1, "last": 0.9, "by_noise": True},
        objective={"masking": "exact", "noise": "block"},
    )
    memory = student_bytes(settings, student_outline(settings), 1)
    memory |= teacher_bytes(settings, teacher_outline(settings), 1)
    logits = memory.pop("logits") + memory.pop("teacher's logits")
    estimated = logits * (1 + 1 / 8) / 2 + sum(memory.values())
    assert logits > 5 * sum(memory.values())
    assert 0.9 * peak <= estimated <= 1.4 * peak, (peak, memory)


# --- block diffusion students and diffusion teachers ---------------------------------------------


def test_two_streams_double_what_a_row_takes(config):
    one, two = memory_of_student(config), memory_of_student(config, block_size=8)
    assert two["activations"] == 2 * one["activations"]
    assert two["attention mask"] == 4 * one["attention mask"] == 4 * 4 * 8 * 24**2
    assert two["logits"] == one["logits"]  # clean tokens have none
    again = memory_of_student(config, objective={"complementary": True}, block_size=8)
    assert again["activations"] == 3 * one["activations"]
    assert again["attention mask"] == 9 * one["attention mask"]
    assert again["logits"] == 2 * one["logits"]
    full = memory_of_student(config, objective={"complementary": True})
    assert full["activations"] == 2 * one["activations"]
    assert full["attention mask"] == 2 * one["attention mask"]
    mixed = memory_of_student(config, block_size=8, precision="bf16")
    assert mixed["attention mask"] == (4 + 2 * 8) * 8 * 48**2  # a copy for each of 8 layers
    once = memory_of_student(config, block_size=8, precision="bf16", gradient_checkpointing=True)
    assert once["attention mask"] == (4 + 2) * 8 * 48**2
    following = memory_of_student(config, objective={"ar_weight": 1.0}, block_size=8)
    assert following["logits"] == 2 * one["logits"]


def test_memory_of_a_diffusion_teacher(config):
    def memory(block_size=8, kind="denoised", dtype="bf16", **target):
        where = {"where": "chunks"} if kind == "chunks" else {}
        settings = recipe(
            "x",
            "y",
            teacher={"dtype": dtype},
            target={"kind": kind, **target},
            masks=where,
        )
        return teacher_bytes(settings, replace(outline(config), block_size=block_size), 1)

    blocks, full = memory(), memory(None)
    assert blocks["teacher's forward"] == 2 * full["teacher's forward"]
    assert blocks["teacher's mask"] == 4 * full["teacher's mask"] == 5 * 8 * 48**2
    assert blocks["teacher's answers"] == 2 * 32 * 8 * 24
    assert memory(comp_demo="exact")["teacher's answers"] == 2 * blocks["teacher's answers"]
    assert memory(comp_demo="exact")["teacher's forward"] == blocks["teacher's forward"]
    assert memory(dtype="fp32")["teacher"] == 2 * blocks["teacher"]
    assert "teacher's branches" not in blocks
    chunks = memory(kind="chunks")
    assert "teacher's answers" not in chunks
    assert 0 < chunks["teacher's logits"] < blocks["teacher's logits"]


def config_only(folder, **config):
    """A folder with a config.json and nothing else."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


def test_configs_alone_are_enough_for_published_models(tmp_path, ar):
    student = config_only(tmp_path / "student", **A2D)
    teacher = config_only(tmp_path / "teacher", **WEDLM)
    sections = {
        "teacher": {"model": teacher},
        "target": {"kind": "denoised", "comp_demo": "bernoulli"},
        "data": {"eos_padding": "document", "eos_block": 8},
    }
    said = describe(recipe(student, tmp_path, student=BLOCKS, **sections))
    assert re.search(r"student     0\.0M parameters, blocks of 8 tokens, attention block, 2", said)
    assert "blocks of 32 tokens, attention reordered, fp32" in said
    assert f"not checked: whether it has the student's tokens (no tokenizer in {teacher})" in said
    assert "asked twice a step" in said
    full = config_only(tmp_path / "full", **DREAM)
    kind = {"kind": "mdlm"}
    said = describe(
        recipe(student, tmp_path, student=kind, teacher={"model": full}, target=DENOISED)
    )
    assert "blocks" not in said[said.index("\n\n") :]
    # The recipe's own student is an AR model, whose tokenizer is there; the teacher's is not.
    assert "not checked" in describe(recipe(ar, tmp_path, student=BLOCKS, **sections))


DENOISED = {"kind": "denoised"}


def denoisers(tmp_path, **settings):
    ar = ar_folder(tmp_path / "ar")
    save_denoiser(tiny_denoiser(ar, **settings), tmp_path / "teacher")
    (tmp_path / "teacher" / "model.safetensors").unlink()
    return ar, {"model": str(tmp_path / "teacher")}


def test_tokens_are_compared_where_there_are_tokenizers(tmp_path):
    ar, teacher = denoisers(tmp_path, **BLOCKS)
    said = describe(recipe(ar, tmp_path, teacher=teacher, target=DENOISED))
    assert "not checked" not in said
    words = tmp_path / "words"
    tiny.word_tokenizer(500).save_pretrained(words)
    others = recipe(
        ar, tmp_path, student={"tokenizer": str(words)}, teacher=teacher, target=DENOISED
    )
    with pytest.raises(VocabError, match=r"set target\.kind=chunks"):
        describe(others)


def test_a_teacher_with_other_tokens_reads_them_itself(tmp_path):
    ar, teacher = denoisers(tmp_path, **BLOCKS)
    chunks = {"teacher": teacher, "target": {"kind": "chunks"}, "masks": {"where": "chunks"}}
    said = describe(recipe(ar, tmp_path, **chunks))
    assert "reads the rows in its own tokens" in said
    assert "not checked" not in said


def test_what_the_run_would_refuse_is_refused(tmp_path):
    ar, teacher = denoisers(tmp_path)

    def refused(error, message, init=ar, **sections):
        with pytest.raises(error, match=message):
            describe(recipe(init, tmp_path, **sections))

    refused(ConfigError, "is for block diffusion students", objective={"noise": "block"})
    unshifted = {**BLOCKS, "attention": "context_causal", "shift": False}
    following = {"ar_weight": 1.0}
    refused(ConfigError, r"student\.shift=true", student=unshifted, objective=following)
    refused(ConfigError, "context_causal", student=BLOCKS, objective=following)
    odd = {"eos_padding": "document", "eos_block": 12}
    refused(ConfigError, r"data\.eos_block=12", student=BLOCKS, data=odd)
    refused(ConfigError, "a student already", teacher["model"], student={"layers": 1})
    refused(ConfigError, "is none", student={"trust_remote_code": True})
    refused(CheckpointError, "no mdm.json", target=DENOISED)
    refused(CheckpointError, "no model folder", teacher={"model": "./no"}, target=DENOISED)
    refused(CheckpointError, "is a diffusion model, but target.kind=left", teacher=teacher)
    refused(ConfigError, "names weights", teacher={"model": "weights:12"})
    long = {"length": 2000}
    refused(ConfigError, "the student was built", data=long)
    config = tmp_path / "teacher" / "config.json"
    config.write_text(config.read_text().replace("1024", "20"))
    refused(ConfigError, "the teacher was built", teacher=teacher, target=DENOISED)
    student = config_only(tmp_path / "student", **A2D)
    refused(ConfigError, "taken as it is", student, student={"layers": 1})
    sdar = config_only(tmp_path / "sdar", **SDAR)
    refused(ConfigError, "how many tokens its blocks have", sdar)
    refused(ConfigError, "full canvas or blocks", student)
    refused(ConfigError, "full canvas or blocks", teacher={"model": student}, target=DENOISED)
    assert student_outline(recipe(sdar, tmp_path, student=BLOCKS)).block_size == 8


def test_the_shift_is_that_of_the_run(tmp_path, ar):
    student = config_only(tmp_path / "student", **A2D)
    dream = config_only(tmp_path / "dream", **DREAM)
    for init, shift, found in (
        *((ar, True, True), (ar, False, False)),
        *((dream, True, True), (dream, False, False)),
    ):
        assert student_outline(recipe(init, tmp_path, student={"shift": shift})).shift is found
    assert student_outline(recipe(student, tmp_path, student={"kind": "mdlm"})).shift is False


@pytest.mark.parametrize("asked", [{}, {"kind": "mdlm"}, {"kind": "bd3lm", "block_size": 8},
                                   {"kind": "bd3lm", "attention": "block"}])  # fmt: skip
def test_a_dry_run_takes_the_students_that_the_run_takes(tmp_path, asked):
    ar = ar_folder(tmp_path / "ar")
    blocks = {"kind": "bd3lm", "block_size": 3, "attention": "reordered"}
    for name, settings in (("full", {}), ("blocks", blocks)):
        save_denoiser(tiny_denoiser(ar, **settings), tmp_path / name)
        made = recipe(tmp_path / name, tmp_path, student=asked)
        outlined, student = student_outline(made), initial_student(made)
        assert (outlined.block_size, outlined.attention) == (student.block_size, student.attention)
        wrong = recipe(tmp_path / name, tmp_path, student={**asked, "shift": False})
        for refuse in (student_outline, initial_student):
            with pytest.raises(ConfigError, match="only kind, block_size and attention can be"):
                refuse(wrong)


def test_code_that_comes_with_a_model_is_not_run(tmp_path, monkeypatch):
    ar = ar_folder(tmp_path / "ar")
    folder = write_own_code(tmp_path / "own", tmp_path / "was-run")
    sections = {"target": {"kind": "chunks"}, "masks": {"where": "chunks"}}

    def said(trusted):
        teacher = {"model": str(folder), "trust_remote_code": trusted}
        return describe(recipe(ar, tmp_path, teacher=teacher, **sections))

    with pytest.raises(CheckpointError, match="comes with its own code"):
        said(False)
    unknown = said(True)
    assert "size unknown: its code is not run" in unknown
    assert "memory      not known, as the size of the teacher is not" in unknown
    assert "computing   not known" in unknown
    monkeypatch.setenv("MDM_TRUST_REMOTE_CODE", "1")
    assert said(False) == unknown.replace("trust_remote_code: true", "trust_remote_code: false")
    monkeypatch.delenv("MDM_TRUST_REMOTE_CODE")
    shutil.copytree(folder, tmp_path / "ours")
    settings = {"format": 1, "shift": False, "block_size": 4, "lineage": []}
    settings |= {"mask_token": "<|mask|>", "start_token": "<|start|>", "end_token": "<|end|>"}
    (tmp_path / "ours" / "mdm.json").write_text(json.dumps(settings))
    for init in (folder, tmp_path / "ours"):
        with pytest.raises(CheckpointError, match="comes with its own code"):
            student_outline(recipe(init, tmp_path))
        trusted = {"trust_remote_code": True}
        assert student_outline(recipe(init, tmp_path, student=trusted)).block_size in (4, 32)
        trusted |= {"kind": "bd3lm", "block_size": 8}
        assert student_outline(recipe(init, tmp_path, student=trusted)).block_size == 8
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | EXPERTS))
    known = said(True)
    size = mixture_size(EXPERTS)
    assert f"about {size.parameters / 1e6:.1f}M parameters by its config.json" in known
    assert "GiB a process" in known
    assert not (tmp_path / "was-run").exists()


LLADA2 = {
    **{"hidden_size": 2048, "num_hidden_layers": 20, "num_attention_heads": 16, "head_dim": 128},
    **{"num_key_value_heads": 4, "vocab_size": 157_184, "intermediate_size": 5120},
    **{"moe_intermediate_size": 512, "num_experts": 256, "num_experts_per_tok": 8},
    **{"num_shared_experts": 1, "first_k_dense_replace": 1},
}
EXPERTS = {
    **{"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 99},
    **{"intermediate_size": 80, "moe_intermediate_size": 24, "num_experts": 6},
    **{"num_experts_per_tok": 2, "num_key_value_heads": 2, "head_dim": 16},
    **{"num_shared_experts": 1, "first_k_dense_replace": 1},
}


def test_a_mixture_is_reckoned():
    """Against the same numbers, matrix by matrix; and against what is known of LLaDA2.0-mini."""
    attention = [(32, 4 * 16), (32, 2 * 16), (32, 2 * 16), (4 * 16, 32)]
    feed = [(32, 24), (32, 24), (24, 32)]
    dense = [*attention, (32, 80), (32, 80), (80, 32)]
    mixture = [*attention, (32, 6), *feed * 7]
    passed = [*attention, (32, 6), *feed * 3]

    def total(shapes):
        return sum(a * b for a, b in shapes)

    size = mixture_size(EXPERTS)
    assert size.layers == size.linear == total(dense + 3 * mixture)
    assert size.used == total(dense + 3 * passed)
    assert size.ends == 2 * 99 * 32
    assert size.layer == total(mixture)
    assert mixture_size(EXPERTS | {"tie_word_embeddings": True}).ends == 99 * 32
    assert mixture_size(EXPERTS | {"num_experts": None}) is None
    llada2 = mixture_size(LLADA2)
    assert llada2.parameters / 1e9 == pytest.approx(16.3, rel=0.01)
    assert (llada2.used + llada2.ends) / 1e9 == pytest.approx(1.4, rel=0.05)  # "1.4B activated"


def test_dry_run_writes_nothing(ar, tmp_path):
    path = write_recipe(tmp_path / "mine.yaml", recipe(ar, tmp_path))
    runs = tmp_path / "runs"
    arguments = ["--recipe", str(path), "--runs", str(runs), "--set", "train.steps=9", "--dry-run"]
    result = CliRunner().invoke(train, arguments)
    assert result.exit_code == 0, result.output
    assert "steps: 9" in result.output
    assert "memory      about" in result.output
    assert "at 100 TFLOP/s" in result.output
    result = CliRunner().invoke(train, [*arguments, "--tflops", "7"])
    assert "at 7 TFLOP/s" in result.output
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


# --- rollouts ------------------------------------------------------------------------------------

OWN = {"fraction": 1.0, "length": 12, "first_length": 4, "prompt_tokens": 5}


def rolled(ar, tmp_path, *, on_policy=None, **sections):
    sections = {"student": BLOCKS, "data": {"eos_padding": "none"}, **sections}
    return recipe(ar, tmp_path, on_policy={**OWN, **(on_policy or {})}, **sections)


def said_of_rollouts(settings, processes=1):
    text = describe(settings, processes)
    return text[text.index("\n\n") :]


def test_rollouts_are_described(ar, tmp_path):
    growing = {"growth_batches": 2, "steps_per_batch": 3, "length_growth": "cosine"}
    said = said_of_rollouts(rolled(ar, tmp_path, on_policy=growing, train={"steps": 8}))
    assert "tokens      none of the data: every row is a rollout\n" in said
    assert "8 of 8 rows a step; 3 batches of 24, 72 in all, each batch for 3 steps\n" in said
    assert f"of at most 4 to 12 tokens (cosine, mean {(4 + 6 + 12) / 3:.1f}): 528 tokens" in said
    assert f"behind prompts of 6 tokens from {tmp_path}\n" in said
    assert "written in 1.5 tokens a forward: assumed" in said
    # Two times 16 and 8 rows; a prompt of 6, so rows of 16 and, from 6 + 6 on, of 16 and 24 tokens.
    written = sum(2 * (total - 6) / 1.5 for total in (16, 16, 24))
    assert f"in {written:,.0f} forwards one after another, of at most 16 rows" in said
    assert "FLOPs a step on average" in said
    assert "rollouts' layers" in said
    assert "asked about rollouts alone" not in said


def test_half_of_the_rows_after_some_steps(ar, tmp_path):
    changes = {"fraction": 0.5, "start_step": 3, "threshold": None, "tokens_per_step": 2}
    settings = rolled(
        ar, tmp_path, on_policy=changes, train={"steps": 8}, objective={"kd_lambda": 0.0}
    )
    said = said_of_rollouts(settings)
    assert re.search(r"teacher     .* parameters, fp32\n +asked about rollouts alone", said)
    assert "tokens      576 in 3 steps of 8 rows of 24, then 480 in 5 steps of 4 rows of 24" in said
    assert "4 of 8 rows a step from step 4 on; 2 batches of 16" in said
    assert "of at most 12 tokens: 384 tokens" in said
    assert "written in 2 tokens a forward" in said
    assert "teacher's forward" in said
    later = rolled(ar, tmp_path, on_policy={"start_step": 4}, train={"steps": 4})
    assert "rollouts    none: on_policy.start_step=4 is not before the last step" in describe(later)
    assert "rollouts'" not in describe(later)
    assert "rollouts" not in said_of_rollouts(recipe(ar, tmp_path))
    one = {"kind": "bd3lm", "block_size": 1}
    assert "in 1 token a forward" in describe(rolled(ar, tmp_path, student=one))
    again = said_of_rollouts(rolled(ar, tmp_path, on_policy={"replay": 0.5, "max_staleness": 3}))
    assert "4 of the 8 from the last 3 batches" in again


def test_prompts_of_rows_have_lengths_of_their_own(ar, tmp_path):
    chats = {"prompts": ["a.jsonl"], "max_prompt_tokens": 40}
    settings = rolled(ar, tmp_path, on_policy=chats)
    assert prompt_lengths(settings) == (6, 40)
    said = said_of_rollouts(settings)
    assert "from a.jsonl, whose lengths are not known: 6 tokens are assumed" in said
    assert "40 at most (max_prompt_tokens)" in said
    assert "would not fit" not in said
    for names in (["hub:owner/name"], ["b.json", "stdlib"], ["c.jsonl.gz"]):
        other = rolled(ar, tmp_path, on_policy={**chats, "prompts": names})
        assert prompt_lengths(other) == (6, 40)
    assert prompt_lengths(rolled(ar, tmp_path, on_policy={"prompts": ["a.py"]})) == (6, 6)
    data = {"sources": ["d.jsonl"], "eos_padding": "none"}
    assert prompt_lengths(rolled(ar, tmp_path, data=data))[1] == 1024
    # The model was built for 1024 tokens.
    long = said_of_rollouts(rolled(ar, tmp_path, on_policy={"prompts": ["a.jsonl"], "length": 900}))
    assert "more than 124 tokens would not fit into the context of the student" in long
    assert "set on_policy.max_prompt_tokens=124" in long


def test_what_a_run_with_rollouts_would_refuse_is_refused(ar, tmp_path):
    def refused(message, processes=1, **changes):
        with pytest.raises(ConfigError, match=message):
            describe(rolled(ar, tmp_path, **changes), processes)

    refused("is 0.8 rows", on_policy={"fraction": 0.1})
    refused("2 rollouts a step cannot be shared", 4, on_policy={"fraction": 0.25})
    refused("sharding=full with on_policy", 2, train={"sharding": "full"})
    refused("a prompt of 6 tokens and on_policy.length=1024", on_policy={"length": 1024})
    rows = {"prompts": ["a.jsonl"], "length": 1024}
    refused("a prompt of 1 tokens and on_policy.length=1024", on_policy=rows)
    refused("block_length=3, but the student has blocks of 8", on_policy={"block_length": 3})
    assert describe(rolled(ar, tmp_path, on_policy={"fraction": 0.25}), 2)


def parts_of(ar, tmp_path, **changes):
    settings = rolled(ar, tmp_path, **changes)
    return rollout_bytes(settings, student_outline(settings), 1)


def test_memory_of_rollouts_follows_the_settings(ar, tmp_path):
    found = parts_of(ar, tmp_path)
    # 4 layers of 2 key heads of 4; a prompt of 6 and 12 tokens are three blocks.
    student = student_outline(rolled(ar, tmp_path))
    assert found["rollouts' cache"] == 3 * 16 * 24 * 2 * 4 * student.keys * 4
    half = parts_of(ar, tmp_path, on_policy={"decode_rows": 8})
    assert 2 * half["rollouts' cache"] == found["rollouts' cache"]
    assert half["rollouts' forward"] < found["rollouts' forward"]
    # Prompt and block, and who sees the whole row and what is read beside it.
    read = parts_of(ar, tmp_path, on_policy={"prompt_tokens": 29})["rollouts' forward"]
    layer = 16 * 38 * 4 * (8 * student.width + 4 * student.inner)
    # Or what is drawn, for all rows together: eight numbers for every word, in chunks of 512.
    drawn = 16 * 8 * 512 * 8 * 4
    assert read == max(drawn, layer + 16 * 38 * (48 + 38) * 7)
    assert found["rollouts' forward"] == drawn
    few = parts_of(ar, tmp_path, on_policy={"steps_per_batch": 1})
    assert few == half  # there are no more than 8
    long = parts_of(ar, tmp_path, on_policy={"prompts": ["a.jsonl"], "max_prompt_tokens": 84})
    assert long["rollouts' cache"] == 4 * found["rollouts' cache"]
    assert long["rollouts' forward"] > 1.5 * found["rollouts' forward"]
    mixed = parts_of(
        ar, tmp_path, train={"precision": "bf16"}, on_policy={"prompt_tokens": 29, "length": 10}
    )
    assert mixed["rollouts' cache"] == 3 * 16 * 40 * 2 * 4 * student.keys * 4
    assert mixed["rollouts' forward"] == max(drawn, 0.75 * layer + 16 * 38 * (40 + 38) * 7)
    canvas = {"prompt_tokens": 29, "length": 10, "block_length": 2}
    full = parts_of(ar, tmp_path, student={}, on_policy=canvas)
    layer = 16 * 40 * 4 * (8 * student.width + 4 * student.inner)
    assert full == {"rollouts' forward": layer}
    rows = {"prompts": ["a.jsonl"], "max_prompt_tokens": 30}
    padded = parts_of(ar, tmp_path, student={}, on_policy={**canvas, **rows})
    assert padded == {"rollouts' forward": layer + 16 * 40 * 40 * 7}


def total_of(said):
    (found,) = re.findall(r"memory +about ([\d.]+) GiB", said)
    return float(found)


def test_a_step_and_writing_do_not_need_their_memory_at_once(ar, tmp_path):
    few, many = (
        said_of_rollouts(rolled(ar, tmp_path, on_policy={"length": 600, "decode_rows": rows}))
        for rows in (1, 32)
    )
    parts = {
        name.strip(): float(size)
        for name, size in re.findall(r"^ {14}(\D+?) +([\d.]+) GiB$", many, flags=re.MULTILINE)
    }
    step = sum(parts.get(name, 0) for name in OF_A_STEP)
    writing = sum(size for name, size in parts.items() if name.startswith("rollouts'"))
    always = sum(parts.values()) - step - writing
    assert f"instead of the {step:.2f} GiB" in many or abs(step - writing) < 0.1
    assert total_of(many) == pytest.approx(always + max(step, writing), abs=0.1)
    assert total_of(few) == pytest.approx(always + step, abs=0.1)


def test_the_longest_rows_count(ar, tmp_path):
    def shapes(**changes):
        settings = rolled(ar, tmp_path, **changes)
        return largest_rows(settings, student_outline(settings))

    own = RowShape(8, 24, 1)
    assert shapes() == [own]
    chats = {"prompts": ["a.jsonl"], "max_prompt_tokens": 30}
    assert shapes(on_policy=chats) == [RowShape(8, 48, 1)]  # of the longest prompts
    assert shapes(on_policy={"start_step": 1}) == [RowShape(8, 24, 1), own]
    half = shapes(on_policy={"fraction": 0.5, "states": "complement"})
    assert half == [RowShape(4, 24, 1), RowShape(4, 24, 2)]
    assert shapes(on_policy={"start_step": 9}) == [RowShape(8, 24, 1)]
    assert shapes(on_policy={"fraction": 0.0}) == [RowShape(8, 24, 1)]
    assert total_of(describe(rolled(ar, tmp_path, on_policy={"length": 900}))) > 2 * total_of(
        describe(rolled(ar, tmp_path))
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("student", [BLOCKS, {}], ids=["blocks", "full canvas"])
@pytest.mark.parametrize("length", [16, 160])
def test_writing_takes_what_was_estimated(tmp_path, student, precision, length):
    """As torch's profiler counts it; prompts are long or short, of the model layers and cache count."""
    prompt = 96 - length // 2
    ar = ar_folder(tmp_path / "ar", layers=6, hidden=64)
    settings = rolled(
        ar,
        tmp_path,
        student=student,
        train={"precision": precision},
        on_policy={
            **{"length": length, "first_length": length, "prompt_tokens": prompt - 1},
            **{"decode_rows": 8, "steps_per_batch": 1, "threshold": None, "tokens_per_step": 8},
        },
    )
    denoiser = initial_student(settings)

    def write():
        # Weights that are cast for a forward are counted elsewhere.
        with torch.autocast("cpu", torch.bfloat16, precision == "bf16", cache_enabled=False):
            roll_out(
                denoiser,
                [[256, *range(number, number + prompt - 1)] for number in range(8)],
                replace(settings.on_policy.sampler, suppress_eos=True),
                tokens_per_step=settings.on_policy.tokens_per_step,
                length=length,
                keys=[("rollout", number) for number in range(8)],
                decode_rows=8,
            )

    memory = rollout_bytes(settings, student_outline(settings), 1)
    peak, estimated = peak_allocation(write), sum(memory.values())
    assert 0.9 * peak <= estimated <= 2.5 * peak, (peak, memory)


# --- recipes of OPDLM ----------------------------------------------------------------------------

SHAPES = {
    "opdlm-qwen3-0.6b": (
        "Qwen3-0.6B",
        {
            **{"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072},
            **{"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8},
            **{"head_dim": 128, "max_position_embeddings": 40_960},
        },
    ),
    "opdlm-qwen2.5-coder-0.5b": (
        "Qwen2.5-Coder-0.5B",
        {
            **{"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864},
            **{"num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2},
            **{"max_position_embeddings": 32_768},
        },
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_recipes_of_opdlm_fit_on_one_gpu(tmp_path, monkeypatch, name):
    """By their configs alone, with room left for what is not counted."""
    monkeypatch.chdir(tmp_path)
    model, config = SHAPES[name]
    config_only(tmp_path / "Qwen" / model, vocab_size=151_936, tie_word_embeddings=True, **config)
    said = describe(read_recipe(name))
    assert "483 batches of 128, 61,824 in all" in said  # an epoch of 61,816 prompts
    assert "from prompts.jsonl, whose lengths are not known" in said
    assert total_of(said) < 64


@pytest.mark.parametrize("name", SHAPES)
def test_the_published_settings_of_opdlm(name):
    settings = read_recipe(name)
    own, train = settings.on_policy, settings.train
    assert (settings.student.kind, settings.student.block_size) == ("bd3lm", 4)
    assert settings.student.init == settings.teacher.model
    assert (own.temperature, own.top_p, own.threshold, own.states) == (1.0, 1.0, 0.9, "round")
    assert (settings.target.kind, settings.target.top_k) == ("left", 0)
    assert settings.objective.divergence == "forward_kl"
    assert (train.batch_rows, own.steps_per_batch, train.steps) == (8, 16, 483 * 16)
    assert (train.learning_rate, train.lr_floor, train.lr_schedule) == (1e-5, 0.1, "cosine")
    assert (train.warmup_steps, train.weight_decay, train.betas) == (5 * 16, 0, (0.9, 0.999))
    assert (own.first_length, own.length, own.growth_batches) == (100, 4000, 100)
    assert [length_limit(own, batch) for batch in (0, 50, 100, 200)] == [100, 1242, 4000, 4000]
    assert own.max_prompt_tokens == 2000


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if name.startswith("opdlm")])
def test_opdlm_recipes_say_how_the_published_form_is_had(name):
    text = (resources.files("mdm.train.recipes") / f"{name}.yaml").read_text(encoding="utf-8")
    published = re.findall(r"--set ([\w.]+=[\w.]+)", text)
    settings = read_recipe(name, published)
    if not name.endswith("two-phase"):
        assert (settings.student.attention, settings.student.shift) == ("block", False)
        assert (settings.on_policy.eos, settings.on_policy.reduce) == ("published", "rollout")


def test_the_time_of_rollouts_is_said_to_be_longer(ar, tmp_path):
    line = "and more than that: forwards of rollouts come one after another"
    assert line in describe(rolled(ar, tmp_path))
    assert line in describe(rolled(ar, tmp_path), 1, 2.0)
    assert line not in describe(rolled(ar, tmp_path, on_policy={"fraction": 0.0}))
