"""Tiny checkpoints in the layouts that others publish, and what they compute, written down once more.

Each writer makes a folder with random weights under the published names and the fields of a published
config.json. Shape letters: B batch, L length, V vocabulary, D width, H heads.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import byte_alphabet, byte_tokenizer, tiny_model
from torch import Tensor
from torch.nn import functional as F

ROWS = (
    264  # of the embeddings: 259 tokens of the byte tokenizer, the mask, and four that are unused
)
MASK = 259
WORDS = [i for i in range(260) if i != MASK]
SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
SIZES |= {"hidden_size": 32, "intermediate_size": 64, "vocab_size": ROWS}

LLADA = {
    **{"architectures": ["LLaDAModelLM"], "model_type": "llada", "activation_type": "silu"},
    **{"alibi": False, "attention_layer_norm": False, "bias_for_layer_norm": False},
    **{"block_group_size": 1, "block_type": "llama", "include_bias": False, "rope": True},
    **{"include_qkv_bias": False, "input_emb_norm": False, "layer_norm_type": "rms"},
    **{"layer_norm_with_affine": True, "multi_query_attention": None, "scale_logits": False},
    **{"auto_map": {"AutoModel": "modeling_llada.LLaDAModelLM"}, "mlp_ratio": 4},
    **{"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": 64},
    **{"embedding_size": ROWS, "vocab_size": ROWS, "rope_theta": 500.0, "rms_norm_eps": 1e-5},
    **{"max_sequence_length": 64, "weight_tying": False, "mask_token_id": MASK},
    **{"eos_token_id": 257, "pad_token_id": 257, "use_cache": False},
}
QWEN = {
    **SIZES,
    **{"hidden_act": "silu", "max_position_embeddings": 64, "rms_norm_eps": 1e-6},
    **{"rope_theta": 1000.0, "rope_scaling": None, "tie_word_embeddings": False},
    **{"use_sliding_window": False, "sliding_window": None, "max_window_layers": 2},
    **{"bos_token_id": 257, "eos_token_id": 257, "attention_dropout": 0.0},
}
DREAM = {
    **QWEN,
    **{"architectures": ["DreamModel"], "model_type": "Dream", "mask_token_id": MASK},
    **{"auto_map": {"AutoModel": "modeling_dream.DreamModel"}, "use_mrope": False},
}
OPEN_DLLM = {**QWEN, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = {**QWEN, "head_dim": 8, "attention_bias": False}
SDAR = {
    **QWEN3,
    **{"architectures": ["SDARForCausalLM"], "model_type": "sdar"},
    **{"auto_map": {"AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM"}},
}
A2D = {**QWEN3, "architectures": ["A2DQwen3LMHeadModel"], "model_type": "a2d-qwen3"}
WEDLM = {
    **QWEN3,
    **{"architectures": ["WeDLMForCausalLM"], "model_type": "wedlm", "mask_token_id": MASK},
    **{"auto_map": {"AutoModelForCausalLM": "modeling_wedlm.WeDLMForCausalLM"}, "qk_norm": True},
}


def write_folder(folder, config, weights, *, mask="<|mask|>", named=True, shards=1) -> Path:
    """A checkpoint with the byte tokenizer; `named`: the tokenizer says which token is the mask."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = byte_tokenizer((mask,))
    if named:
        tokenizer.add_special_tokens({"mask_token": mask})
    tokenizer.save_pretrained(folder)
    # Slices and tied tensors share memory, which the format refuses.
    weights = {name: tensor.detach().clone().contiguous() for name, tensor in weights.items()}
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = sorted(weights)
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    for i, file in enumerate(files):
        part = {name: weights[name] for name in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {
        "metadata": {},
        "weight_map": {name: files[i % shards] for i, name in enumerate(names)},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_qwens_two_files(folder, mask="<|mask|>") -> None:
    """Replace the tokenizer by the two files of a slow one, as Dream has them; the ids stay."""
    (folder / "tokenizer.json").unlink()
    vocab = {char: byte for byte, char in enumerate(byte_alphabet())}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    names = ("<|start|>", "<|end|>", "<|pad|>", mask)
    added = {
        str(256 + i): {"content": name, "special": True, **plain} for i, name in enumerate(names)
    }
    settings = {
        "added_tokens_decoder": added,
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "tokenizer_class": "DreamTokenizer",
        **{"bos_token": "<|start|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"},
        **{"mask_token": mask, "unk_token": "<|end|>"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def qwen(kind: str, config, seed: int = 0):
    """The `transformers` model whose weights a family of this kind has under the same names."""
    own = {key: config[key] for key in ("tie_word_embeddings", "head_dim") if key in config}
    return tiny_model(
        kind,
        ROWS,
        seed=seed,
        max_position_embeddings=64,
        rms_norm_eps=config["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
        **own,
    )


# --- LLaDA ---------------------------------------------------------------------------------------


def llada_weights(config, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the names of modeling_llada.py."""
    generator = torch.Generator().manual_seed(seed)
    width, hidden = config["d_model"], config["mlp_hidden_size"]
    kv = width // config["n_heads"] * config["n_kv_heads"]
    shapes = {"transformer.wte": (config["embedding_size"], width), "transformer.ln_f": (width,)}
    if not config["weight_tying"]:
        shapes["transformer.ff_out"] = (config["embedding_size"], width)
    for i in range(config["n_layers"]):
        parts = {
            **{"attn_norm": (width,), "ff_norm": (width,), "q_proj": (width, width)},
            **{"k_proj": (kv, width), "v_proj": (kv, width), "attn_out": (width, width)},
            **{"ff_proj": (hidden, width), "up_proj": (hidden, width), "ff_out": (width, hidden)},
        }
        shapes |= {f"transformer.blocks.{i}.{part}": shape for part, shape in parts.items()}
    weights = {
        f"model.{name}.weight": 0.3 * torch.randn(shape, generator=generator)
        if len(shape) > 1
        else 1 + 0.1 * torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }
    if config["include_qkv_bias"]:
        for name in [
            name for name in weights if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj")
        ]:
            bias = torch.randn(len(weights[name]), generator=generator)
            weights[name.replace(".weight", ".bias")] = bias
    return weights


def llada_logits(config, weights: dict[str, Tensor], x_BL: Tensor) -> Tensor:
    """(B, L, V): a LLaDA block after another, every position seeing every other."""
    heads, head_dim = config["n_heads"], config["d_model"] // config["n_heads"]
    half = torch.arange(0, head_dim, 2) / head_dim
    angle_LH = torch.arange(x_BL.shape[1])[:, None] / config["rope_theta"] ** half
    angle_LH = torch.cat([angle_LH, angle_LH], dim=-1)

    def linear(x, name):
        name = f"model.transformer.{name}"
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(x, name):
        scale = (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).rsqrt()
        return x * scale * weights[f"model.transformer.{name}.weight"]

    def rotate(x):
        first, second = x.chunk(2, dim=-1)
        return x * angle_LH.cos() + torch.cat([-second, first], dim=-1) * angle_LH.sin()

    x_BLD = weights["model.transformer.wte.weight"][x_BL]
    for i in range(config["n_layers"]):
        block = f"blocks.{i}"
        normed = norm(x_BLD, f"{block}.attn_norm")
        q, k, v = (
            linear(normed, f"{block}.{part}").unflatten(-1, (-1, head_dim)).transpose(1, 2)
            for part in ("q_proj", "k_proj", "v_proj")
        )
        q, k = rotate(q), rotate(k)
        k, v = (t.repeat_interleave(heads // config["n_kv_heads"], dim=1) for t in (k, v))
        attended = (q @ k.transpose(-1, -2) / head_dim**0.5).softmax(-1) @ v
        x_BLD = x_BLD + linear(attended.transpose(1, 2).flatten(2), f"{block}.attn_out")
        normed = norm(x_BLD, f"{block}.ff_norm")
        gated = F.silu(linear(normed, f"{block}.ff_proj")) * linear(normed, f"{block}.up_proj")
        x_BLD = x_BLD + linear(gated, f"{block}.ff_out")
    head = "wte" if config["weight_tying"] else "ff_out"
    return linear(norm(x_BLD, "ln_f"), head)


# --- a model with code of its own ----------------------------------------------------------------

OWN_CODE = '''
"""Tiny stand-in for a model that comes with its own code: one layer of attention, without a position."""
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

Path({marker!r}).write_text("the code was run")


class OwnConfig(PretrainedConfig):
    model_type = "llada2_moe"

    def __init__(self, vocab_size=264, hidden_size=16, max_position_embeddings=64, **rest):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.max_position_embeddings = max_position_embeddings
        self.num_hidden_layers = 1
        super().__init__(**rest)


class OwnBase(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def _init_weights(self, module):
        pass


class OwnModel(OwnBase):
    def __init__(self, config):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.word_embeddings

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None, **rest):
        x = self.word_embeddings(input_ids)
        if position_ids is None:
            position_ids = torch.arange(x.shape[1])[None]
        x = x + torch.sin(position_ids[..., None] * torch.arange(1, x.shape[-1] + 1) / 3).to(x.dtype)
        q, k, v = self.query_key_value(x)[:, None].chunk(3, dim=-1)
        causal = attention_mask is None and getattr(self.config, "is_causal", True)
        attend = nn.functional.scaled_dot_product_attention
        x = x + attend(q, k, v, attn_mask=attention_mask, is_causal=causal)[:, 0]
        return BaseModelOutputWithPast(last_hidden_state=x)


class OwnForCausalLM(OwnBase):
    def __init__(self, config):
        super().__init__(config)
        self.model = OwnModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.word_embeddings

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, use_cache=None, **rest):
        return CausalLMOutputWithPast(logits=self.lm_head(self.model(input_ids, **rest)[0]))
'''
OWN = {
    **{"architectures": ["OwnForCausalLM"], "model_type": "llada2_moe", "vocab_size": ROWS},
    **{"hidden_size": 16, "max_position_embeddings": 64, "num_hidden_layers": 1},
    "auto_map": {
        "AutoConfig": "modeling_own.OwnConfig",
        "AutoModel": "modeling_own.OwnModel",
        "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
    },
}


def own_weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"lm_head.weight": (ROWS, 16), "model.word_embeddings.weight": (ROWS, 16)}
    shapes |= {"model.query_key_value.weight": (48, 16), "model.query_key_value.bias": (48,)}
    return {name: torch.randn(shape, generator=generator) / 2 for name, shape in shapes.items()}


def write_own_code(folder, marker) -> Path:
    """A checkpoint with code of its own, which writes the file `marker` when it is run."""
    folder = write_folder(folder, OWN, own_weights())
    (folder / "modeling_own.py").write_text(OWN_CODE.replace("{marker!r}", repr(str(marker))))
    return folder


def write_cached_code(folder, marker) -> Path:
    """The same, which keeps its keys and values in the cache that it is given."""
    folder = write_own_code(folder, marker)
    file = folder / "modeling_own.py"
    text = file.read_text().replace("use_cache=None, **rest):\n        x =", "past_key_values=None,"
        " **rest):\n        x =")  # fmt: skip
    kept = "        k, v = past_key_values.update(k, v, 0) if past_key_values is not None else (k, v)\n"
    head, before, tail = text.partition("        causal = ")
    assert "past_key_values=None" in text
    file.write_text(head + kept + before + tail)
    return folder


def own_logits(weights: dict[str, Tensor], x_BL: Tensor, position_BL: Tensor, visible_LL: Tensor):
    """(B, L, V) of OWN_CODE, where query q sees key k if visible_LL[q, k]."""
    x_BLD = weights["model.word_embeddings.weight"][x_BL]
    x_BLD = x_BLD + torch.sin(position_BL[..., None] * torch.arange(1, 17) / 3)
    projected = F.linear(
        x_BLD, weights["model.query_key_value.weight"], weights["model.query_key_value.bias"]
    )
    q, k, v = projected.chunk(3, dim=-1)
    scores = (q @ k.transpose(-1, -2) / 4).masked_fill(~visible_LL, float("-inf"))
    return F.linear(x_BLD + scores.softmax(-1) @ v, weights["lm_head.weight"])
