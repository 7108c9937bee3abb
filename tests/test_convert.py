"""AR checkpoint → initial student: which weights are kept, and the row of the mask."""

from pathlib import Path

import pytest
import torch
from tiny import FAMILIES, byte_tokenizer, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, Phi3Config

from mdm.checkpoint import load_ar, save_denoiser, weights_hash
from mdm.convert import StudentSettings, convert, initial, make_bidirectional, student_config
from mdm.errors import CheckpointError, ConfigError, VocabError

TOKENS = 259  # of the byte tokenizer; a new mask token is the 260th
X = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def ar_folder(tmp_path):
    """A function that writes a tiny AR model with the byte tokenizer and gives its folder."""

    def write(family="llama", *, rows=TOKENS, extra=(), edit=None, **settings):
        folder = tmp_path / f"{family}-ar"
        model = tiny_model(family, rows, **settings)
        if edit is not None:
            edit(model)
        model.save_pretrained(folder)
        byte_tokenizer(extra).save_pretrained(folder)
        return str(folder)

    return write


@torch.no_grad()
def logits(model, *, causal):
    model.config.is_causal = causal
    return model(X, use_cache=False).logits


# --- the same weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ar_model_comes_back_exactly(ar_folder, family):
    folder = ar_folder(family, rows=264)  # a row for the mask is there, as in padded vocabularies
    ancestor, _ = load_ar(folder)
    student = convert(StudentSettings(init=folder))
    assert student.model.get_input_embeddings().weight.shape[0] == 264  # not resized
    expected = logits(ancestor, causal=True)
    words = [i for i in range(264) if i != student.mask_id]
    assert torch.equal(logits(student.model, causal=True)[..., words], expected[..., words])
    assert not torch.allclose(logits(student.model, causal=False), expected, atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # gpt2: input and output rows are one
def test_a_new_mask_token_adds_one_row(ar_folder, family):
    folder = ar_folder(family)
    ancestor, _ = load_ar(folder)
    student = convert(StudentSettings(init=folder))
    weight_VD = student.model.get_input_embeddings().weight
    assert student.mask_id == TOKENS == weight_VD.shape[0] - 1
    assert len(student.vocab) == student.model.config.vocab_size == weight_VD.shape[0]
    assert torch.equal(weight_VD[:-1], ancestor.get_input_embeddings().weight)
    got = logits(student.model, causal=True)[..., :TOKENS]
    assert torch.allclose(got, logits(ancestor, causal=True), atol=1e-5)


def test_the_mask_row_is_the_mean_at_a_typical_norm(ar_folder):
    folder = ar_folder(rows=264, extra=("<|hole|>",))
    for token in (None, "<|hole|>"):  # a reused row starts without a meaning too
        student = convert(StudentSettings(init=folder, mask_token=token))
        assert student.mask_id == (259 if token else 260)
        weight_VD = student.model.get_input_embeddings().weight.detach()
        table_VD = torch.cat([weight_VD[: student.mask_id], weight_VD[student.mask_id + 1 : 260]])
        row_D = weight_VD[student.mask_id]
        cosine = torch.nn.functional.cosine_similarity(row_D, table_VD.mean(0), dim=0)
        assert float(cosine) == pytest.approx(1, abs=1e-4)
        assert float(row_D.norm()) == pytest.approx(float(table_VD.norm(dim=1).median()), rel=1e-4)


@pytest.mark.parametrize("settings", [{}, {"layers": 1}, {"width": 0.5}, {"random": True}])
def test_conversion_is_deterministic(ar_folder, tmp_path, settings):
    folder = ar_folder()
    students = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        students.append(convert(StudentSettings(init=folder, **settings)))
    one, other = (student.model.state_dict() for student in students)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_no_dropout_is_left(ar_folder):
    # Distillation wants one answer of a student. Some modules keep rates of their own.
    rates = {
        "llama": {"attention_dropout": 0.5},
        "gpt2": {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5},
        "starcoder2": {"attention_dropout": 0.5, "residual_dropout": 0.5, "embedding_dropout": 0.5},
        "gpt_neox": {"attention_dropout": 0.5, "hidden_dropout": 0.5},
    }
    for family, settings in rates.items():
        model = tiny_model(family, 32, **settings).train()
        x_BL = X % 32
        with torch.no_grad():
            assert not torch.equal(model(x_BL).logits, model(x_BL).logits), family
            make_bidirectional(model)
            assert torch.equal(model(x_BL).logits, model(x_BL).logits), family
        assert not any(getattr(model.config, name) for name in settings)


# --- fewer layers, less width, random weights ----------------------------------------------------


@pytest.mark.parametrize(("layers", "kept"), [(1, [0]), (2, [0, 4]), (3, [0, 2, 4]), (5, range(5))])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_layers_are_evenly_spread(ar_folder, family, layers, kept):
    folder = ar_folder(family, layers=5)
    ancestor, _ = load_ar(folder)
    student = convert(StudentSettings(init=folder, layers=layers))
    assert student.model.config.num_hidden_layers == layers
    source, found = ancestor.state_dict(), student.model.state_dict()
    path = {"gpt2": "transformer.h"}.get(family, "model.layers")
    of_layers = [name for name in found if name.startswith(path)]
    assert len({name.split(".")[2] for name in of_layers}) == layers
    for name in of_layers:
        *start, index, rest = name.split(".", 3)
        origin = ".".join([*start, str(kept[int(index)]), rest])
        assert torch.equal(found[name], source[origin])
    if family == "gemma3":  # a kept layer stays windowed or full
        types = ancestor.config.layer_types
        assert student.model.config.layer_types == [types[i] for i in kept]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "starcoder2", "gemma3"])
def test_width_keeps_whole_heads_and_even_channels(ar_folder, family):
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 6}
    folder = ar_folder(family, rows=264, **heads)
    ancestor, _ = load_ar(folder)
    student = convert(StudentSettings(init=folder, width=0.5, layers=1))
    config = student.model.config
    assert (config.hidden_size, config.intermediate_size) == (16, 32)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    source, found = ancestor.state_dict(), student.model.state_dict()
    channels = [round(i * 31 / 15) for i in range(16)]
    name = "model.embed_tokens.weight"
    assert torch.equal(found[name][:TOKENS], source[name][:TOKENS, channels])
    # Key/value heads 0 and 3 are kept, and of the query heads those that read them.
    heads = {"q_proj": [0, 1, 6, 7], "k_proj": [0, 3], "v_proj": [0, 3]}
    for projection, kept in heads.items():
        name = f"model.layers.0.self_attn.{projection}.weight"
        rows = [head * 6 + i for head in kept for i in range(6)]
        assert torch.equal(found[name], source[name][rows][:, channels])
    name = "model.layers.0.self_attn.o_proj.weight"
    columns = [head * 6 + i for head in heads["q_proj"] for i in range(6)]
    assert torch.equal(found[name], source[name][channels][:, columns])


def fused(family):
    if family == "phi3":
        common = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
        config = Phi3Config(vocab_size=TOKENS, hidden_size=32, intermediate_size=64, **common,
                            num_hidden_layers=1, num_attention_heads=4)  # fmt: skip
        return AutoModelForCausalLM.from_config(config)
    return tiny_model(family, TOKENS)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi3"])
def test_width_of_fused_projections_is_refused(tmp_path, family):
    folder = str(tmp_path / family)
    fused(family).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    text = rf"student.width cannot shrink .* of a {family} model; use student.layers instead"
    with pytest.raises(ConfigError, match=text):
        convert(StudentSettings(init=folder, width=0.5))


def test_random_weights_of_the_same_shape(ar_folder):
    folder = ar_folder()
    ancestor, _ = load_ar(folder)
    students = {
        seed: convert(StudentSettings(init=folder, random=True, seed=seed)) for seed in (0, 1)
    }
    name = "model.layers.0.self_attn.q_proj.weight"
    weights = [
        model.state_dict()[name] for model in (ancestor, students[0].model, students[1].model)
    ]
    assert len({tuple(weight.shape) for weight in weights}) == 1
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"layers": 0}, "student.layers must be at least 1 or null; got 0"),
        ({"layers": 3}, "student.layers is 3, but the checkpoint has only 2"),
        ({"width": 0.0}, r"student.width must be in \(0, 1\]; got 0.0"),
        ({"width": 1.5}, r"student.width must be in \(0, 1\]; got 1.5"),
    ],
)
def test_shapes_that_cannot_be(ar_folder, settings, text):
    with pytest.raises(ConfigError, match=text):
        convert(StudentSettings(init=ar_folder(), **settings))


def test_the_config_given_is_not_changed():
    config = tiny_config("gemma3", 32, layers=4)
    before = config.to_dict()
    small = student_config(config, layers=2, width=0.5)
    assert config.to_dict() == before
    assert (small.num_hidden_layers, small.hidden_size) == (2, 16)


# --- tokens and lineage --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"mask_token": "<|end|>"}, "already marks the start or end"),
        ({"mask_token": "a"}, "is a word of ordinary text"),
        ({"mask_token": "<|hole|>"}, "unknown mask token"),
        ({"end_token": "<|eot|>"}, "unknown token"),
        # The clash is with what the words mean here, not with the tokenizer's names.
        ({"start_token": "<|pad|>", "mask_token": "<|pad|>"}, "already marks the start or end"),
    ],
)
def test_tokens_that_clash(ar_folder, settings, text):
    with pytest.raises(VocabError, match=text):
        convert(StudentSettings(init=ar_folder(), **settings))


def test_a_tokenizer_with_more_tokens_than_the_model_has_rows(ar_folder):
    folder = ar_folder(rows=200)
    with pytest.raises(
        VocabError, match="the tokenizer has 260 tokens but the model only 200 rows"
    ):
        convert(StudentSettings(init=folder))


def test_lineage_says_where_the_weights_came_from(ar_folder):
    folder = ar_folder()
    settings = StudentSettings(init=folder, layers=1, shift=False)
    student = convert(settings)
    assert student.shift is False
    assert not student.training
    (step,) = student.lineage
    assert step["step"] == "convert"
    assert step["from"] == folder
    assert step["weights"] == weights_hash(folder)
    assert (step["layers"], step["shift"], step["random"]) == (1, False, False)


def test_a_denoiser_is_not_the_end_of_a_missing_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no model folder at"):
        convert(StudentSettings(init=str(tmp_path / "none")))


def test_random_weights_need_a_config_and_a_tokenizer_only(ar_folder, tmp_path):
    folder = ar_folder("llama")
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in Path(folder).iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    student = convert(StudentSettings(init=str(bare), random=True, layers=1))
    assert student.model.config.num_hidden_layers == 1
    assert student.lineage[0]["weights"] is None
    with pytest.raises(CheckpointError):
        convert(StudentSettings(init=str(bare)))


def test_a_student_is_not_converted_again(ar_folder, tmp_path):
    save_denoiser(convert(StudentSettings(init=ar_folder("llama"))), tmp_path / "student")
    with pytest.raises(ConfigError, match="is a student already"):
        convert(StudentSettings(init=str(tmp_path / "student")))


@pytest.mark.parametrize(
    "settings",
    [
        {"layers": 1},
        {"kind": "bd3lm", "layers": 1},
        {"kind": "bd3lm", "shift": False},
        {"kind": "bd3lm", "tokenizer": "embedded"},
    ],
)
def test_of_a_student_only_the_blocks_can_be_changed(ar_folder, tmp_path, settings):
    save_denoiser(convert(StudentSettings(init=ar_folder("llama"))), tmp_path / "student")
    with pytest.raises(ConfigError, match="only kind, block_size and attention can be changed"):
        convert(StudentSettings(init=str(tmp_path / "student"), **settings))


@pytest.mark.parametrize(
    ("before", "asked", "after"),
    [
        ((8, "reordered"), {"block_size": 4}, (4, "reordered")),
        ((8, "reordered"), {"attention": "block"}, (8, "block")),
        ((8, "reordered"), {}, (8, "reordered")),
        ((8, "reordered"), {"block_size": 2, "attention": "context_causal"}, (2, "context_causal")),
        ((None, "full"), {}, (4, "block")),
        ((None, "full"), {"block_size": 16}, (16, "block")),
        ((None, "full"), {"attention": "reordered"}, (4, "reordered")),
    ],
)
def test_what_is_not_named_stays(ar_folder, tmp_path, before, asked, after):
    size, seen = before
    blocks = {} if size is None else {"kind": "bd3lm", "block_size": size, "attention": seen}
    save_denoiser(convert(StudentSettings(init=ar_folder("llama"), **blocks)), tmp_path / "s")
    settings = StudentSettings(init=str(tmp_path / "s"), kind="bd3lm", **asked)
    for student in (convert(settings), initial(settings)):
        assert (student.block_size, student.attention) == after
        step = student.lineage[-1]
        assert (step["block_size"], step["attention"]) == after
    unchanged = initial(StudentSettings(init=str(tmp_path / "s")))
    assert (unchanged.block_size, unchanged.attention) == before
    assert len(unchanged.lineage) == 1


def test_a_student_gets_blocks_and_loses_them_again(ar_folder, tmp_path):
    first = convert(StudentSettings(init=ar_folder("llama"), shift=False))
    save_denoiser(first, tmp_path / "full")
    blocks = convert(
        StudentSettings(
            init=str(tmp_path / "full"), kind="bd3lm", block_size=8, attention="context_causal"
        )
    )
    assert (blocks.block_size, blocks.attention, blocks.shift) == (8, "context_causal", False)
    assert [step["step"] for step in blocks.lineage] == ["convert", "convert"]
    assert blocks.lineage[1]["block_size"] == 8
    save_denoiser(blocks, tmp_path / "blocks")
    full = convert(StudentSettings(init=str(tmp_path / "blocks"), kind="mdlm"))
    assert (full.block_size, full.attention) == (None, "full")
    for name, weight in first.model.state_dict().items():
        assert full.model.state_dict()[name].equal(weight)
