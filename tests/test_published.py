"""Published layouts: the same logits as the published model has, and nothing run that was not asked for."""

import json
import shutil
import sys

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from tiny_published import (
    A2D,
    DREAM,
    LLADA,
    MASK,
    OPEN_DLLM,
    SDAR,
    WEDLM,
    WORDS,
    llada_logits,
    llada_weights,
    own_logits,
    own_weights,
    qwen,
    write_cached_code,
    write_folder,
    write_own_code,
    write_qwens_two_files,
)

import mdm.attention
from mdm.checkpoint import (
    is_denoiser,
    is_published,
    load_ar,
    load_config,
    load_denoiser,
    load_tokenizer,
    load_vocab,
    opens_as_denoiser,
    save_denoiser,
    source_identity,
    weights_hash,
)
from mdm.commands import convert as convert_command
from mdm.commands import generate as generate_command
from mdm.convert import StudentSettings, convert, student_vocab
from mdm.errors import CheckpointError, ConfigError, VocabError
from mdm.families import FAMILIES
from mdm.likelihood import LikelihoodSettings, Pair, log_likelihood
from mdm.published import TRUST_VARIABLE, code_hash, hub_file, stored_dtype

LENGTH = 12
X0 = torch.randint(97, 120, (2, LENGTH), generator=torch.Generator().manual_seed(0))
MASKED = (
    torch.tensor([[0, 1, 1, 0, 1, 0, 1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1, 0, 1, 0, 1, 1, 0]]) > 0
)
XT = X0.masked_fill(MASKED, MASK)
EVERYWHERE = torch.ones_like(MASKED)


@pytest.fixture(autouse=True)
def no_consent(monkeypatch):
    monkeypatch.delenv(TRUST_VARIABLE, raising=False)


@torch.no_grad()
def full_logits(denoiser, wanted_BL=EVERYWHERE):
    return denoiser(XT, wanted_BL)


@torch.no_grad()
def all_seen(model):
    """(B, L, V) of a `transformers` model, every position seeing every other."""
    mask = torch.zeros(2, 1, LENGTH, LENGTH)
    return model(XT, attention_mask=mask, use_cache=False).logits


def assert_same(got_NV, expected_NV):
    assert torch.allclose(got_NV[:, WORDS], expected_NV[:, WORDS], atol=1e-4)
    # The mask and the rows behind the tokenizer are never proposed.
    assert bool(got_NV[:, [MASK, *range(260, 264)]].eq(float("-inf")).all())


def shuffled(config, **changes):
    """A config with changes; `...` takes a key away."""
    return {key: value for key, value in {**config, **changes}.items() if value is not ...}


# --- full canvas ---------------------------------------------------------------------------------

LLADAS = {
    "as released": {},
    "grouped": {"n_kv_heads": 2},
    "tied": {"weight_tying": True},
    "qkv bias": {"include_qkv_bias": True},
    "what the code takes if config.json is silent": {
        **{"rms_norm_eps": ..., "rope_theta": ..., "mlp_hidden_size": ..., "n_kv_heads": ...},
        **{"embedding_size": ..., "alibi": ..., "scale_logits": ..., "mlp_ratio": 2},
        "weight_tying": ...,
    },
}


@pytest.mark.parametrize("name", LLADAS)
def test_llada_computes_what_its_own_code_does(tmp_path, name):
    config = shuffled(LLADA, **LLADAS[name])
    silent = {
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "weight_tying": True,
    }  # configuration_llada.py
    said = {**LLADA, **silent, **config}
    weights = llada_weights(said)
    folder = write_folder(tmp_path / "llada", config, weights, mask="<|mdm_mask|>")
    denoiser = load_denoiser(folder)
    assert_same(full_logits(denoiser), llada_logits(said, weights, XT).flatten(0, 1))
    assert (denoiser.shift, denoiser.block_size, denoiser.attention) == (False, None, "full")
    assert denoiser.max_length == 64
    assert not denoiser.training
    vocab = denoiser.vocab
    assert (vocab.mask_id, vocab.start_id, vocab.eos_id) == (MASK, 256, 257)
    # Not the ids that a Llama has of itself, and no row of the embeddings that does not learn.
    ids = denoiser.model.config
    assert (ids.bos_token_id, ids.eos_token_id, ids.pad_token_id) == (None, 257, None)


@pytest.mark.parametrize(
    ("config", "kind", "mask", "shift"),
    [
        (DREAM, "qwen2", "<|mask|>", True),
        (OPEN_DLLM, "qwen2", "<M>", True),
        (A2D, "qwen3", "<|mask|>", False),
        ({**A2D, "tie_word_embeddings": True}, "qwen3", "<|mask|>", False),
        ({**A2D, "model_type": "a2d-qwen2", "head_dim": ...}, "qwen2", "<|mask|>", False),
        ({**A2D, "model_type": "a2d-llama"}, "llama", "<|mask|>", False),
    ],
    ids=["dream", "open-dllm", "a2d-qwen3", "a2d-qwen3 tied", "a2d-qwen2", "a2d-llama"],
)
def test_renamed_models_see_everything(tmp_path, config, kind, mask, shift):
    config = shuffled(config)
    model = qwen(kind, config)
    weights = model.state_dict()
    if config["tie_word_embeddings"]:
        del weights["lm_head.weight"]
    folder = write_folder(tmp_path / "dllm", config, weights, mask=mask)
    told = config["model_type"] in ("Dream", "qwen2")
    denoiser = (
        load_denoiser(folder) if told else convert(StudentSettings(init=str(folder), kind="mdlm"))
    )
    assert (denoiser.shift, denoiser.block_size, denoiser.attention) == (shift, None, "full")
    assert denoiser.mask_id == MASK
    expected_BLV = all_seen(model)
    if shift:  # position i is read from output i - 1; nobody asks for position 0
        wanted_BL = EVERYWHERE.clone()
        wanted_BL[:, 0] = False
        assert_same(full_logits(denoiser, wanted_BL), expected_BLV[:, :-1].flatten(0, 1))
    else:
        assert_same(full_logits(denoiser), expected_BLV.flatten(0, 1))


def test_an_ordinary_qwen2_is_none_of_them(tmp_path):
    model = qwen("qwen2", OPEN_DLLM)
    for mask, named in (("<M>", False), ("<|mask|>", True)):
        folder = write_folder(
            tmp_path / mask, OPEN_DLLM, model.state_dict(), mask=mask, named=named
        )
        assert not is_published(folder)
        assert load_ar(str(folder))[0].config.model_type == "qwen2"
    named_in_config = {**OPEN_DLLM, "mask_token_id": MASK}
    assert is_published(write_folder(tmp_path / "c", named_in_config, model.state_dict()))


# --- blocks --------------------------------------------------------------------------------------


@torch.no_grad()
def block_logits(model, block_size):
    """(B, L, V): each noisy block after the clean blocks before it, which do not see what follows them."""
    logits_BLV = torch.zeros(2, LENGTH, model.config.vocab_size)
    for start in range(0, LENGTH, block_size):
        end = min(start + block_size, LENGTH)
        x_BL = torch.cat([X0[:, :start], XT[:, start:end]], dim=1)
        block_L = torch.arange(end) // block_size
        hidden_LL = block_L[None] > block_L[:, None]
        mask = torch.zeros(2, 1, end, end).masked_fill(hidden_LL, torch.finfo(torch.float32).min)
        logits_BLV[:, start:end] = model(x_BL, attention_mask=mask, use_cache=False).logits[
            :, start:
        ]
    return logits_BLV


@torch.no_grad()
def moved_logits(model, block_size):
    """(B, L, V): plain causal attention over a clean prefix, then the block's observed tokens, then its
    masks, each with the position it has in the text."""
    logits_BLV = torch.zeros(2, LENGTH, model.config.vocab_size)
    for row in range(2):
        for start in range(0, LENGTH, block_size):
            end = min(start + block_size, LENGTH)
            inside = range(start, end)
            order = [i for i in inside if not MASKED[row, i]] + [
                i for i in inside if MASKED[row, i]
            ]
            places = torch.tensor([*range(start), *order])
            x_L = torch.where(places < start, X0[row, places], XT[row, places])
            # Said outright: positions that do not grow are taken for a new document otherwise.
            causal = torch.full((1, 1, end, end), torch.finfo(torch.float32).min).triu(1)
            told = {"attention_mask": causal, "position_ids": places[None]}
            found = model(x_L[None], use_cache=False, **told).logits[0]
            logits_BLV[row, places[start:]] = found[start:]
    return logits_BLV


@torch.no_grad()
def two_stream_logits(denoiser):
    return denoiser(XT, EVERYWHERE, x0_bL=X0)


@pytest.mark.parametrize("said", ["config", "user"])
def test_sdar_sees_its_block_and_the_clean_ones_before_it(tmp_path, said):
    model = qwen("qwen3", SDAR)
    config = {**SDAR, "block_size": 4} if said == "config" else SDAR
    folder = write_folder(
        tmp_path / "sdar", config, model.state_dict(), mask="<|MASK|>", named=False
    )
    if said == "config":
        denoiser = load_denoiser(folder)
    else:
        denoiser = convert(StudentSettings(init=str(folder), kind="bd3lm", block_size=4))
    assert (denoiser.shift, denoiser.block_size, denoiser.attention) == (False, 4, "block")
    assert denoiser.mask_id == MASK
    assert_same(two_stream_logits(denoiser), block_logits(model, 4).flatten(0, 1))


def test_a2d_has_blocks_if_the_user_says_so(tmp_path):
    model = qwen("qwen3", A2D)
    folder = write_folder(tmp_path / "a2d", A2D, model.state_dict())
    settings = StudentSettings(init=str(folder), kind="bd3lm", block_size=5)
    denoiser = convert(settings)
    assert (denoiser.shift, denoiser.block_size, denoiser.attention) == (False, 5, "block")
    assert_same(two_stream_logits(denoiser), block_logits(model, 5).flatten(0, 1))
    with pytest.raises(ConfigError, match=r"family A2D, .* --kind bd3lm --block-size N"):
        convert(StudentSettings(init=str(folder), kind="bd3lm"))


def test_a_layout_that_no_file_tells_is_not_guessed(tmp_path):
    folder = write_folder(tmp_path / "a2d", A2D, qwen("qwen3", A2D).state_dict())
    text = r"family A2D.*mdm convert .*a2d --output DIR --kind mdlm`.* --kind bd3lm --block-size N`"
    for load in (load_denoiser, lambda path: convert(StudentSettings(init=str(path)))):
        with pytest.raises(ConfigError, match=text):
            load(folder)
    with pytest.raises(ConfigError, match="do not say whether it reads a full canvas"):
        run(generate_command, "ab", "--model", folder)
    run(convert_command, folder, "--kind", "mdlm", "--output", tmp_path / "ours")
    assert load_denoiser(tmp_path / "ours").block_size is None


@pytest.mark.parametrize("value", ["auto", -4, 0, 2.5, True])
@pytest.mark.parametrize("name", ["block_size", "block_length"])
def test_a_block_size_that_is_none(tmp_path, name, value):
    folder = write_folder(
        tmp_path / "sdar", {**SDAR, name: value}, qwen("qwen3", SDAR).state_dict()
    )
    with pytest.raises(
        CheckpointError, match=rf"config.json of .*sdar has {name}={value!r}, which"
    ):
        load_denoiser(folder)
    student = convert(StudentSettings(init=str(folder), kind="bd3lm", block_size=4))
    assert student.block_size == 4


@pytest.mark.parametrize(
    "config", [DREAM, SDAR, A2D, WEDLM], ids=lambda config: config["model_type"]
)
@pytest.mark.parametrize("field", ["rope_theta", "max_position_embeddings"])
def test_positions_are_not_left_to_defaults(tmp_path, config, field):
    weights = qwen("qwen2" if config is DREAM else "qwen3", config).state_dict()
    folder = write_folder(tmp_path / "model", shuffled(config, **{field: ...}), weights)
    with pytest.raises(CheckpointError, match=rf"config.json does not say {field}"):
        load_config(str(folder))


def test_angles_may_stand_where_newer_configs_have_them(tmp_path):
    angles = {"rope_type": "default", "rope_theta": 1000.0}
    weights = qwen("qwen2", DREAM).state_dict()
    newer = shuffled(DREAM, rope_theta=..., rope_parameters=angles)
    one, other = (
        load_denoiser(write_folder(tmp_path / name, config, weights))
        for name, config in (("old", DREAM), ("new", newer))
    )
    wanted_BL = EVERYWHERE.clone()
    wanted_BL[:, 0] = False
    assert torch.equal(full_logits(one, wanted_BL), full_logits(other, wanted_BL))
    for angles in ({"rope_type": "default"}, None):
        silent = shuffled(newer, rope_parameters=angles)
        folder = write_folder(tmp_path / str(angles), silent, weights)
        with pytest.raises(CheckpointError, match="does not say rope_theta"):
            load_denoiser(folder)


WEDLMS = {
    "Qwen3": (WEDLM, "qwen3"),
    "Qwen2.5": (shuffled(WEDLM, qk_norm=False, attention_bias=True, head_dim=...), "qwen2"),
    "silent": (shuffled(WEDLM, qk_norm=..., attention_bias=..., head_dim=...), "qwen2"),
    "neither": (shuffled(WEDLM, qk_norm=False), "llama"),
}


@pytest.mark.parametrize("name", WEDLMS)
def test_wedlm_is_causal_over_moved_tokens(tmp_path, name):
    config, kind = WEDLMS[name]
    model = qwen(kind, config)
    folder = write_folder(tmp_path / "wedlm", config, model.state_dict(), named=False)
    denoiser = convert(StudentSettings(init=str(folder), kind="bd3lm", block_size=5))
    assert (denoiser.shift, denoiser.block_size, denoiser.attention) == (False, 5, "reordered")
    assert_same(two_stream_logits(denoiser), moved_logits(model, 5).flatten(0, 1))
    assert load_denoiser(folder).block_size == 32


def test_wedlm_with_norms_and_biases_is_refused(tmp_path):
    config = {**WEDLM, "attention_bias": True}
    folder = write_folder(tmp_path / "wedlm", config, qwen("qwen3", WEDLM).state_dict())
    with pytest.raises(CheckpointError, match=r"wedlm \(WeDLM\): .* qk_norm and attention_bias"):
        load_denoiser(folder)


# --- code that comes with a model ----------------------------------------------------------------


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    """A folder with code of its own, and the file that the code writes when it is run."""
    # transformers copies such code to a cache of modules; not to that of the user here.
    for module in ("transformers.dynamic_module_utils", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.HF_MODULES_CACHE", str(tmp_path / "modules"), raising=False)
    monkeypatch.setattr("sys.path", list(sys.path))
    before = set(sys.modules)
    yield write_own_code(tmp_path / "own", tmp_path / "marker"), tmp_path / "marker"
    for name in set(sys.modules) - before:
        if name.startswith("transformers_modules"):
            del sys.modules[name]


def test_code_is_not_run_without_consent(own_code, monkeypatch):
    folder, marker = own_code
    assert is_published(folder)
    assert load_vocab(str(folder)).mask_id == MASK
    text = (
        r"comes with its own code, .* --trust-remote-code`, student.trust_remote_code or"
        r" teacher.trust_remote_code of `mdm train`, or set MDM_TRUST_REMOTE_CODE=1"
    )
    for value in ("", "0", "yes"):
        monkeypatch.setenv(TRUST_VARIABLE, value)
        for load in (load_denoiser, lambda path: convert(StudentSettings(init=str(path)))):
            with pytest.raises(CheckpointError, match=text):
                load(folder)
    with pytest.raises(CheckpointError):
        load_config(str(folder))
    assert not marker.exists()


@torch.no_grad()
def own_expected(block_size):
    """(2L, V) of the model with code of its own in blocks, by the definition of block attention."""
    logits = []
    for row in range(2):
        for start in range(0, LENGTH, block_size):
            end = min(start + block_size, LENGTH)
            x_L = torch.cat([X0[row, :start], XT[row, start:end]])
            block_L = torch.arange(end) // block_size
            seen_LL = block_L[None] <= block_L[:, None]
            found = own_logits(own_weights(), x_L[None], torch.arange(end)[None], seen_LL)
            logits.append(found[0, start:])
    return torch.cat(logits)


@pytest.mark.parametrize("consent", ["keyword", "environment"])
def test_a_model_with_its_own_code(own_code, monkeypatch, tmp_path, consent):
    folder, marker = own_code
    agreed = {"trust_remote_code": True} if consent == "keyword" else {}
    if consent == "environment":
        monkeypatch.setenv(TRUST_VARIABLE, "1")
    denoiser = load_denoiser(folder, **agreed)
    assert marker.exists()
    assert (denoiser.shift, denoiser.block_size, denoiser.attention) == (False, 32, "block")
    student = convert(StudentSettings(init=str(folder), kind="bd3lm", block_size=5, **agreed))
    assert_same(two_stream_logits(student), own_expected(5))

    # Written by us it still has its own code, and still needs consent.
    save_denoiser(student, tmp_path / "ours")
    assert (tmp_path / "ours" / "modeling_own.py").is_file()
    assert_same(two_stream_logits(load_denoiser(tmp_path / "ours", **agreed)), own_expected(5))
    monkeypatch.delenv(TRUST_VARIABLE, raising=False)
    marker.unlink()
    with pytest.raises(CheckpointError, match="comes with its own code"):
        load_denoiser(tmp_path / "ours")
    assert not marker.exists()


def test_code_of_another_repository_is_never_run(own_code, tmp_path, monkeypatch):
    folder, marker = own_code
    save_denoiser(load_denoiser(folder, trust_remote_code=True), tmp_path / "ours")
    marker.unlink()
    monkeypatch.setenv(TRUST_VARIABLE, "1")
    calls = []
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *a, **k: calls.append(a))
    for place in (folder, tmp_path / "ours"):
        config = json.loads((place / "config.json").read_text())
        code = {**config["auto_map"], "AutoConfig": "some/other--modeling_own.OwnConfig"}
        edit_config(auto_map=code)(place)
        with pytest.raises(
            CheckpointError, match=r"names code of another repository in its auto_map"
        ):
            load_denoiser(place, trust_remote_code=True)
    assert not calls
    assert not marker.exists()


def test_code_at_a_hub_name_is_not_run(own_code, tmp_path, monkeypatch):
    folder, marker = own_code
    hub_of(tmp_path / "hub", folder, monkeypatch)
    assert is_published("some/model")
    with pytest.raises(
        CheckpointError, match=r"local folder only.*hf download some/model --local-dir"
    ):
        load_denoiser("some/model", trust_remote_code=True)
    assert not marker.exists()


def test_code_without_a_cache_cannot_read_blocks(own_code, tmp_path):
    """It would compute something else, or fail in the middle."""
    silent = convert(StudentSettings(init=str(own_code[0]), kind="bd3lm", block_size=4,
                                     trust_remote_code=True))  # fmt: skip
    pairs = [Pair((256, *b"abc"), tuple(b"defgh"))]
    settings = LikelihoodSettings(mc_samples=15)
    with pytest.raises(CheckpointError, match=r"OwnForCausalLM .* keeps no DynamicCache"):
        log_likelihood(silent, pairs, settings)
    folder = write_cached_code(tmp_path / "cached", tmp_path / "marker")
    keeps = convert(StudentSettings(init=str(folder), kind="bd3lm", block_size=4,
                                    trust_remote_code=True))  # fmt: skip
    assert log_likelihood(keeps, pairs, settings)[0].num_tokens == 5


def test_changed_code_is_another_model(own_code):
    from mdm.eval.models import ModelSettings, identity_of

    folder, _ = own_code
    denoiser = load_denoiser(folder, trust_remote_code=True)
    settings = StudentSettings(init=str(folder), trust_remote_code=True)
    before = identity_of(denoiser, str(folder), ModelSettings().dtype)
    (step,) = convert(settings).lineage
    assert step["code"] == before["code"] == code_hash(folder)
    with open(folder / "modeling_own.py", "a") as stream:
        stream.write("# another line\n")
    after = identity_of(denoiser, str(folder), ModelSettings().dtype)
    assert after["code"] != before["code"]
    assert {**after, "code": ""} == {**before, "code": ""}
    assert convert(settings).lineage[0]["code"] == after["code"]
    (folder / "modeling_own.py").rename(folder / "modeling_other.py")
    assert code_hash(folder) != after["code"]


def test_code_that_is_not_needed_is_not_run_even_with_consent(tmp_path, monkeypatch):
    folder, marker = (
        write_folder(tmp_path / "llada", LLADA, llada_weights(LLADA)),
        tmp_path / "marker",
    )
    for name in ("modeling_llada", "configuration_llada", "tokenization_llada"):
        (folder / f"{name}.py").write_text(f"open({str(marker)!r}, 'w')\n")
    edit_config(
        auto_map={
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        }
    )(folder)
    file = folder / "tokenizer_config.json"
    code = {"auto_map": {"AutoTokenizer": ["tokenization_llada.T", "tokenization_llada.T"]}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **code}))
    monkeypatch.setenv(TRUST_VARIABLE, "1")
    student = convert(StudentSettings(init=str(folder), trust_remote_code=True))
    save_denoiser(student, tmp_path / "ours")
    load_denoiser(tmp_path / "ours", trust_remote_code=True)
    assert not marker.exists()
    assert not list((tmp_path / "ours").glob("*.py"))
    edit_config(auto_map={"AutoModelForCausalLM": "modeling_llada.LLaDAModelLM"})(tmp_path / "ours")
    monkeypatch.delenv(TRUST_VARIABLE)
    assert_same(full_logits(load_denoiser(tmp_path / "ours")), full_logits(student))


def test_missing_weights_of_a_model_with_its_own_code(own_code):
    folder, _ = own_code
    weights = own_weights()
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 missing \(lm_head.weight\)"):
        load_denoiser(folder, trust_remote_code=True)


# --- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
def test_saved_by_us_it_is_the_same(tmp_path, shards):
    folder = write_folder(tmp_path / "llada", LLADA, llada_weights(LLADA), shards=shards)
    denoiser = load_denoiser(folder)
    save_denoiser(denoiser, tmp_path / "ours")
    loaded = load_denoiser(tmp_path / "ours")
    assert torch.equal(full_logits(loaded), full_logits(denoiser))
    assert loaded.model.config.model_type == "llama"
    assert loaded.vocab.fingerprint == denoiser.vocab.fingerprint
    assert load_denoiser(folder, dtype=torch.bfloat16).model.dtype == torch.bfloat16
    assert source_identity(str(folder)) == weights_hash(folder)


def test_ours_are_not_published_and_published_are_not_ours(tmp_path):
    model = qwen("qwen2", OPEN_DLLM)
    folder = write_folder(tmp_path / "open", OPEN_DLLM, model.state_dict(), mask="<M>")
    assert [kind(folder) for kind in (is_denoiser, is_published, opens_as_denoiser)] == [0, 1, 1]
    save_denoiser(load_denoiser(folder), tmp_path / "ours")  # still a Qwen2 with the mask <M>
    ours = [kind(tmp_path / "ours") for kind in (is_denoiser, is_published, opens_as_denoiser)]
    assert ours == [1, 0, 1]
    assert load_denoiser(tmp_path / "ours").shift
    tiny_model("llama", 264).save_pretrained(tmp_path / "ar")
    for other in (tmp_path / "ar", tmp_path, tmp_path / "none", "org/name", "embedded"):
        assert not opens_as_denoiser(other)
    with pytest.raises(
        CheckpointError, match=r"is a diffusion model \(Open-dLLM\), not an autoreg"
    ):
        load_ar(str(folder))


def hub_of(place, folder, monkeypatch):
    """A cache of the hub in which `folder` is called some/model."""
    hub_file.cache_clear()
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(place))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place))
    place = place / "models--some--model"
    shutil.copytree(folder, place / "snapshots" / ("a" * 40))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("a" * 40)


@pytest.fixture(autouse=True)
def fresh_hub():
    yield
    hub_file.cache_clear()


def test_the_hub_is_asked_once_and_not_for_a_mistyped_folder(tmp_path, monkeypatch):
    asked = []

    def offline(source, name, **options):
        asked.append(source)
        raise OSError("offline")

    monkeypatch.setattr("transformers.utils.hub.cached_file", offline)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for load in (load_denoiser, load_ar, load_vocab, lambda s: convert(StudentSettings(init=s))):
        with pytest.raises(CheckpointError, match="no model folder at 'runs/typo'"):
            load("runs/typo")
    assert asked == []
    for _ in range(3):
        assert not is_published("some/model")
    assert asked == ["some/model"]


def test_a_hub_name_in_the_layout_of_its_cache(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "llada", LLADA, llada_weights(LLADA))
    hub_of(tmp_path / "hub", folder, monkeypatch)
    assert is_published("some/model")
    denoiser = load_denoiser("some/model")
    assert_same(full_logits(denoiser), llada_logits(LLADA, llada_weights(LLADA), XT).flatten(0, 1))


def edit_weights(change):
    def edit(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def edit_config(**changes):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(shuffled(config, **changes)))

    return edit


def lose_a_shard(folder):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def only_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


NORM = "model.transformer.ln_f.weight"
DAMAGE = {
    "missing": (
        edit_weights(lambda w: w.pop("model.transformer.blocks.1.ff_out.weight")),
        r"do not fit its config.json: 1 missing \(model.layers.1.mlp.down_proj.weight\), 0 of another",
    ),
    "missing head": (
        edit_weights(lambda w: w.pop("model.transformer.ff_out.weight")),
        r"1 missing \(lm_head.weight\)",
    ),
    "unexpected": (
        edit_weights(lambda w: w.update({"model.transformer.wpe.weight": torch.ones(3)})),
        r"1 without a place \(wpe.weight\)",
    ),
    "not its names": (
        edit_weights(lambda w: w.update({"model.mlp.x": w.pop(NORM)})),
        r"1 missing \(model.norm.weight\), .* 1 without a place \(model.mlp.x\)",
    ),
    "wrong shape": (edit_weights(lambda w: w.update({NORM: torch.ones(7)})), "cannot load a model"),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes(
            (f / "model.safetensors").read_bytes()[:-99]
        ),
        "cannot load a model from",
    ),
    "lost shard": (
        lose_a_shard,
        "has no model-1.safetensors; mdm reads weights from safetensors only",
    ),
    "broken index": (
        lambda f: (f / "model.safetensors.index.json").write_text("{"),
        "cannot load a model from",
    ),
    "pickle": (only_pickle, "has no safetensors file; mdm reads weights from safetensors only"),
    "no size": (
        edit_config(n_heads=...),
        r"\(LLaDA\): config.json does not say num_attention_heads",
    ),
    "another block": (
        edit_config(block_type="sequential"),
        "has block_type='sequential'; mdm reads such models only with 'llama'",
    ),
    "silent about rope": (
        edit_config(rope=...),
        "has rope=None; mdm reads such models only with True",
    ),
    "scaled": (edit_config(scale_logits=True), "has scale_logits=True; .* only with False"),
    "biases": (edit_config(include_bias=True), "has include_bias=True; .* only with False"),
    "experts": (edit_config(num_experts=64), r"\(LLaDA\): config.json is that of LLaDA-MoE"),
    "no tokenizer": (
        lambda f: (f / "tokenizer.json").unlink(),
        "has no tokenizer.json, and no vocab",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_says_what_is_wrong(tmp_path, name):
    folder = write_folder(tmp_path / "llada", LLADA, llada_weights(LLADA))
    damage, text = DAMAGE[name]
    damage(folder)
    with pytest.raises(CheckpointError, match=text) as caught:
        load_denoiser(folder)
    assert "\n" not in str(caught.value)


def test_a_sliding_window_is_refused(tmp_path):
    config = {**DREAM, "use_sliding_window": True, "sliding_window": 4}
    folder = write_folder(tmp_path / "dream", config, qwen("qwen2", DREAM).state_dict())
    with pytest.raises(CheckpointError, match="has use_sliding_window=True"):
        load_denoiser(folder)


def test_a_table_of_angles_is_no_weight(tmp_path):
    weights = {**qwen("qwen2", DREAM).state_dict(), "model.rotary_emb.inv_freq": torch.ones(4)}
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    denoiser = load_denoiser(write_folder(tmp_path / "dream", DREAM, weights))
    assert torch.equal(denoiser.model.model.norm.weight, weights["model.norm.weight"])


def test_blocks_whose_size_nobody_says(tmp_path):
    folder = write_folder(tmp_path / "sdar", SDAR, qwen("qwen3", SDAR).state_dict())
    with pytest.raises(
        ConfigError, match=r"family SDAR, .*`mdm convert .*sdar --kind bd3lm --block"
    ):
        load_denoiser(folder)
    assert load_vocab(str(folder)).mask_id == MASK  # its tokens do not depend on it
    assert load_config(str(folder)).model_type == "qwen3"


def test_every_family_names_an_attention_that_exists():
    for family in FAMILIES.values():
        assert family.attention in mdm.attention.ATTENTIONS
        assert (family.block_size is None) or family.attention != mdm.attention.FULL


# --- tokens --------------------------------------------------------------------------------------


def dream(folder, **changes):
    return write_folder(folder, shuffled(DREAM, **changes), qwen("qwen2", DREAM).state_dict())


def forget_tokens(folder, *names):
    file = folder / "tokenizer_config.json"
    settings = {k: v for k, v in json.loads(file.read_text()).items() if k not in names}
    file.write_text(json.dumps(settings))


def test_a_tokenizer_of_two_files(tmp_path):
    folder = dream(tmp_path / "dream")
    before = load_vocab(str(folder))
    write_qwens_two_files(folder)
    vocab = load_vocab(str(folder))
    assert vocab.tokenizer.get_vocab() == before.tokenizer.get_vocab()
    assert (vocab.mask_id, vocab.start_id, vocab.eos_id, vocab.pad_id) == (MASK, 256, 257, 258)
    text = "def f(x):\n    return 'é<|mask|>'"
    assert vocab.encode(text) == list(text.encode())
    assert vocab.decode(vocab.encode(text)) == text
    save_denoiser(load_denoiser(folder), tmp_path / "ours")
    assert load_denoiser(tmp_path / "ours").vocab.fingerprint == vocab.fingerprint


def test_the_tokenizer_is_asked_before_the_config(tmp_path):
    folder = dream(tmp_path / "a", bos_token_id=5, eos_token_id=6)
    assert (load_vocab(str(folder)).start_id, load_vocab(str(folder)).eos_id) == (256, 257)
    forget_tokens(folder, "bos_token", "eos_token")
    assert (load_vocab(str(folder)).start_id, load_vocab(str(folder)).eos_id) == (5, 6)
    folder = dream(tmp_path / "b", bos_token_id=None, eos_token_id=[6, 7])
    forget_tokens(folder, "bos_token", "eos_token")
    assert (load_vocab(str(folder)).start_id, load_vocab(str(folder)).eos_id) == (6, 6)


def test_which_token_the_mask_is(tmp_path):
    # config.json before the tokenizer; a word of the vocabulary becomes special.
    assert load_vocab(str(dream(tmp_path / "a", mask_token_id=7))).mask_id == 7
    assert load_vocab(str(dream(tmp_path / "b", mask_token_id=...))).mask_id == MASK
    # The first id that the tokenizer does not have is a token that was added and not saved.
    vocab = load_vocab(str(write_folder(tmp_path / "c", {**DREAM, "mask_token_id": 260},
                                        qwen("qwen2", DREAM).state_dict(), mask="<m>")))  # fmt: skip
    assert (vocab.mask_id, len(vocab)) == (260, 261)
    # The user before all.
    folder = str(dream(tmp_path / "d"))
    student = convert(StudentSettings(init=folder, mask_token="<|pad|>", end_token="<|mask|>"))
    assert (student.mask_id, student.vocab.eos_id, student.lineage[0]["mask_token"]) == (
        *(258, MASK),
        "<|pad|>",
    )


@pytest.mark.parametrize(
    ("changes", "mask", "text"),
    [
        (
            {"mask_token_id": 999},
            "<|mask|>",
            "token 999 is the mask, which its tokenizer of 260 tok",
        ),
        (
            {"mask_token_id": 260},
            "<|mask|>",
            "token 260 is the mask, which its tokenizer of 260 tok",
        ),
        (
            {"mask_token_id": ...},
            "<m>",
            "neither the config.json nor the tokenizer .* --mask-token",
        ),
        ({"mask_token_id": 257}, "<|mask|>", "already marks the start or end"),
    ],
)
def test_a_mask_that_cannot_be_found(tmp_path, changes, mask, text):
    config = shuffled(DREAM, **changes)
    folder = write_folder(
        tmp_path / "dream", config, qwen("qwen2", DREAM).state_dict(), mask=mask, named=False
    )
    with pytest.raises(VocabError, match=text):
        load_vocab(str(folder))


def test_more_tokens_than_rows(tmp_path):
    config = {**LLADA, "embedding_size": 200, "vocab_size": 200}
    folder = write_folder(tmp_path / "llada", config, llada_weights(config))
    with pytest.raises(VocabError, match="has 260 tokens but the model only 200 rows"):
        load_denoiser(folder)


# --- mdm convert, and what runs on it ------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{"layers": 1}, {"width": 0.5}, {"random": True}, {"tokenizer": "x"}]
)
def test_settings_that_make_no_sense_here(tmp_path, settings):
    folder = dream(tmp_path / "dream")
    ((name, value),) = settings.items()
    with pytest.raises(
        ConfigError, match=rf"student.{name}={value} is for students made from an AR"
    ):
        convert(StudentSettings(init=str(folder), **settings))


def test_what_is_published_can_be_overruled(tmp_path):
    folder = str(dream(tmp_path / "dream"))
    assert convert(StudentSettings(init=folder)).shift
    assert not convert(StudentSettings(init=folder, shift=False)).shift
    wedlm = str(write_folder(tmp_path / "w", WEDLM, qwen("qwen3", WEDLM).state_dict()))
    full = convert(StudentSettings(init=wedlm, kind="mdlm"))
    assert (full.block_size, full.attention) == (None, "full")
    other = StudentSettings(init=wedlm, kind="bd3lm", attention="context_causal")
    assert (convert(other).block_size, convert(other).attention) == (32, "context_causal")
    assert student_vocab(StudentSettings(init=folder, mask_token="<|pad|>")).mask_id == 258


def test_consent_is_for_published_models(tmp_path):
    tiny_model("llama", 264).save_pretrained(tmp_path / "ar")
    with pytest.raises(ConfigError, match="trust_remote_code is for published diffusion models"):
        convert(StudentSettings(init=str(tmp_path / "ar"), trust_remote_code=True))


def run(command, *arguments):
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_convert_writes_it_in_our_layout_and_generate_fills(tmp_path):
    folder = write_folder(tmp_path / "llada", LLADA, llada_weights(LLADA), mask="<|mdm_mask|>")
    vocab = student_vocab(StudentSettings(init=str(folder)))  # before any weight is read
    assert vocab.fingerprint == load_vocab(str(folder)).fingerprint
    out = run(convert_command, folder, "--output", tmp_path / "ours")
    assert "2 layers, width 32, full canvas, mask <|mdm_mask|> (id 259), shift off" in out
    (step,) = load_denoiser(tmp_path / "ours").lineage
    assert (step["step"], step["from"], step["family"]) == ("convert", str(folder), "LLaDA")
    assert step["weights"] == weights_hash(folder)
    assert (step["shift"], step["block_size"], step["attention"]) == (False, None, "full")
    assert (step["random"], step["trust_remote_code"]) == (False, False)
    options = ["--gen-length", 6, "--suppress-eos", "--json"]
    one, other = (
        json.loads(run(generate_command, "ab", "--model", place, *options))["generations"]
        for place in (folder, tmp_path / "ours")
    )
    assert one == other
    assert one[0]["num_tokens"] == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_convert_keeps_the_number_type(tmp_path, dtype):
    weights = {name: tensor.to(dtype) for name, tensor in llada_weights(LLADA).items()}
    folder = write_folder(tmp_path / "llada", LLADA, weights, shards=2)
    run(convert_command, folder, "--output", tmp_path / "ours")
    blocks = ["--kind", "bd3lm", "--block-size", 4, "--output", tmp_path / "blocks"]
    run(convert_command, tmp_path / "ours", *blocks)
    assert [stored_dtype(tmp_path / name) for name in ("ours", "blocks")] == [dtype, dtype]
    one, other = load_denoiser(folder), load_denoiser(tmp_path / "ours")
    assert other.model.dtype == torch.float32  # to compute in, unless asked for another
    assert torch.equal(full_logits(one), full_logits(other))
    # Training begins in float32.
    assert convert(StudentSettings(init=str(folder))).model.dtype == torch.float32


def test_several_number_types_become_the_widest(tmp_path):
    weights = llada_weights(LLADA)
    weights[NORM] = weights[NORM].bfloat16()
    assert stored_dtype(write_folder(tmp_path / "llada", LLADA, weights)) == torch.float32


def test_convert_says_the_blocks(tmp_path):
    folder = write_folder(tmp_path / "sdar", SDAR, qwen("qwen3", SDAR).state_dict())
    options = ["--kind", "bd3lm", "--block-size", 4, "--output", tmp_path / "ours"]
    assert "blocks of 4 (block), mask <|mask|>" in run(convert_command, folder, *options)
    denoiser = load_denoiser(tmp_path / "ours")
    assert (denoiser.block_size, denoiser.attention) == (4, "block")


def test_convert_with_consent(own_code, tmp_path):
    folder, marker = own_code
    out = run(convert_command, folder, "--trust-remote-code", "--output", tmp_path / "ours")
    assert "blocks of 32 (block)" in out
    assert marker.exists()
    assert load_tokenizer(str(tmp_path / "ours")).mask_token_id == MASK


def test_eval_and_serve_take_it_for_a_student(tmp_path):
    from mdm.eval.models import STUDENT, ModelSettings, open_evaluated
    from mdm.serve.models import open_student, open_teacher

    folder = str(write_folder(tmp_path / "llada", LLADA, llada_weights(LLADA)))
    evaluated = open_evaluated(folder, ModelSettings(), "cpu")
    assert evaluated.kind == STUDENT
    assert evaluated.identity["weights"] == weights_hash(folder)
    assert open_student(folder, name=None, dtype="float32", device="cpu").is_student
    with pytest.raises(ConfigError, match="is a student; name an autoregressive model"):
        open_teacher(folder, name=None, dtype="float32", device="cpu")
