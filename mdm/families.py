"""Published diffusion LMs: what their config.json and weight names mean, and how they were trained.

All but one are a Llama, Qwen2 or Qwen3 with another name and another attention, so they are loaded into
those classes of `transformers` and no code that comes with them is run. What is not in the weights is in
FAMILIES, by `model_type`: the shift, what a token sees, the tokens of a block, the name of the mask.

    LLaDA       arXiv 2502.09992; modeling_llada.py       Llama, renamed; also LLaDA-1.5
    Dream       arXiv 2508.15487; modeling_dream.py       Qwen2; also Dream-Coder and DiffuCoder
    Open-dLLM   pengzhangzhi/Open-dLLM                    Qwen2 under its own name; Open-dCoder
    SDAR        arXiv 2510.06303; modeling_sdar.py        Qwen3
    A2D         ZHZisZZ/dllm, dllm/pipelines/a2d          Llama, Qwen2, Qwen3
    WeDLM       Tencent/WeDLM; hf_compat/              Qwen2 or Qwen3, by its flags
    LLaDA2      inclusionAI, modeling_llada2_moe.py       a mixture of experts with code of its own
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .attention import FULL
from .errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Config = Mapping[str, Any]  # config.json


@dataclasses.dataclass(frozen=True)
class Family:
    """What the checkpoints of one `model_type` have in common.

    name        what people call it
    shift       position i is read from output i - 1
    attention   what a token sees, see attention.py
    block_size  tokens of a block if config.json does not say; None = not known, or no blocks
    told        the files of a checkpoint tell whether it has blocks; if not, the user has to say so
    mask_token  the mask's name in the tokenizer, if neither config.json nor tokenizer says which it is
    native      the config of a `transformers` model that computes the same; None = it has code of its own
    rename      name of a published weight -> its name in that model
    """

    name: str
    shift: bool
    attention: str
    native: Callable[[Config], PretrainedConfig] | None
    block_size: int | None = None
    told: bool = True
    mask_token: str | None = None
    rename: Callable[[str], str] = lambda name: name


def read_family(config: Config, mask_token: str | None = None) -> Family | None:
    """The family of a config.json; None if it is no published diffusion model that mdm knows.

    `mask_token` is the one that the tokenizer files name: Open-dLLM calls itself a Qwen2, and only its
    mask tells it from one.
    """
    family = FAMILIES.get(str(config.get("model_type", "")).lower())
    if family is OPEN_DLLM and config.get("mask_token_id") is None:
        return family if mask_token == OPEN_DLLM.mask_token else None
    return family


# --- config.json -> config of transformers -------------------------------------------------------

CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
SHAPE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    "num_attention_heads",
)
# Fields that mean the same in all these families and in `transformers`.
SHARED = (
    *SHAPE,
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps"),
    *("rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings"),
    *("attention_bias", "mlp_bias", "bos_token_id", "eos_token_id"),
)


def native_config(kind: str, config: Config) -> PretrainedConfig:
    """A bidirectional config of the `transformers` model `kind`, a key of CLASSES.

    Raises CheckpointError if config.json lacks a size, the length or the angles of positions (for which
    `transformers` has numbers of its own), or wants something such a model does not do.
    """
    from transformers import CONFIG_MAPPING

    _require(config, absent={"use_sliding_window": False, "use_mrope": False})
    missing = [key for key in (*SHAPE, "max_position_embeddings") if config.get(key) is None]
    if config.get("rope_theta") is None and "rope_theta" not in (
        config.get("rope_parameters") or ()
    ):
        missing.append("rope_theta")
    if missing:
        raise CheckpointError(f"config.json does not say {', '.join(missing)}")
    # Without these two, `transformers` has ids of its own; padding would freeze a row of the embeddings.
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    known = {key: config[key] for key in SHARED if config.get(key) is not None}
    native = CONFIG_MAPPING[kind].from_dict({**ids, **known})
    native.architectures = [CLASSES[kind]]
    native.is_causal = False
    native.use_cache = False
    return native


def _as(kind: str) -> Callable[[Config], PretrainedConfig]:
    return lambda config: native_config(kind, config)


def llada_config(config: Config) -> PretrainedConfig:
    """LLaDA as a Llama; with biases for query, key and value only, as a Qwen2."""
    if "num_experts" in config:
        raise CheckpointError(
            "config.json is that of LLaDA-MoE, which shares its model_type with LLaDA but is another"
            " architecture; mdm does not read it"
        )
    _require(
        config,
        present={"block_type": "llama", "layer_norm_type": "rms", "rope": True},
        absent={
            **{"alibi": False, "attention_layer_norm": False, "input_emb_norm": False},
            **{"scale_logits": False, "include_bias": False, "block_group_size": 1},
            **{"layer_norm_with_affine": True, "multi_query_attention": False},
        },
    )
    # Its "silu" gates, as Llama's does: act(ff_proj(x)) * up_proj(x). Its "swiglu" splits one projection.
    _require(config, present={"activation_type": "silu"})
    width, ratio = config.get("d_model"), config.get("mlp_ratio") or 4
    names = {
        "vocab_size": config.get("embedding_size") or config.get("vocab_size"),
        "hidden_size": width,
        "intermediate_size": config.get("mlp_hidden_size") or (ratio * width if width else None),
        "num_hidden_layers": config.get("n_layers"),
        "num_attention_heads": config.get("n_heads"),
        "num_key_value_heads": config.get("n_kv_heads") or config.get("n_heads"),
        "max_position_embeddings": config.get("max_sequence_length"),
        # What its code takes when config.json is silent is not what a Llama takes.
        "rms_norm_eps": config.get("rms_norm_eps", 1e-5),
        "tie_word_embeddings": config.get("weight_tying", True),
        "rope_theta": config.get("rope_theta", float(10**4)),
        "eos_token_id": config.get("eos_token_id"),
        "bos_token_id": config.get("bos_token_id"),
    }
    return native_config("qwen2" if config.get("include_qkv_bias") else "llama", names)


def wedlm_config(config: Config) -> PretrainedConfig:
    """WeDLM as a Qwen2 or a Qwen3: it has flags for what sets them apart."""
    norm, bias = config.get("qk_norm", False), config.get("attention_bias", True)
    if norm and bias:
        raise CheckpointError(
            "config.json wants qk_norm and attention_bias together, as no released WeDLM has them;"
            " mdm does not read it"
        )
    kind = "qwen3" if norm else "qwen2" if bias else "llama"
    return native_config(kind, {**config, "attention_bias": bias})


def _require(
    config: Config, *, present: Config | None = None, absent: Config | None = None
) -> None:
    """Raise CheckpointError unless all of `present` is said, and nothing against `absent`."""
    for key, wanted in {**(present or {}), **(absent or {})}.items():
        found = config.get(key)
        if found is None and key in (absent or {}):
            continue
        if found != wanted:
            raise CheckpointError(
                f"config.json has {key}={found!r}; mdm reads such models only with {wanted!r}"
            )


# --- names of weights ----------------------------------------------------------------------------

LLADA_OUTER = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
LLADA_INNER = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}


def llada_name(name: str) -> str:
    """`model.transformer.blocks.3.ff_proj.weight` -> `model.layers.3.mlp.gate_proj.weight`."""
    found = re.fullmatch(r"model\.transformer\.(?:blocks\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if found is None:
        return name
    layer, part, rest = found.groups()
    if layer is None:
        return f"{LLADA_OUTER.get(part, part)}.{rest}"
    return f"model.layers.{layer}.{LLADA_INNER.get(part, part)}.{rest}"


# --- the families --------------------------------------------------------------------------------

OPEN_DLLM = Family("Open-dLLM", True, FULL, _as("qwen2"), mask_token="<M>")
FAMILIES = {
    "llada": Family(
        "LLaDA", False, FULL, llada_config, mask_token="<|mdm_mask|>", rename=llada_name
    ),
    "dream": Family("Dream", True, FULL, _as("qwen2"), mask_token="<|mask|>"),
    "qwen2": OPEN_DLLM,
    # Its blocks have 4 to 64 tokens, by the name of the checkpoint.
    "sdar": Family("SDAR", False, "block", _as("qwen3"), mask_token="<|MASK|>"),
    # MDLM or BD3LM: config.json does not say, and they have the same weights.
    **{
        f"a2d-{kind}": Family("A2D", False, FULL, _as(kind), told=False, mask_token="<|mask|>")
        for kind in ("llama", "qwen2", "qwen3")
    },
    # 32 is what Tencent/WeDLM trains with (finetune/src/config.py); its decoder's window is 16.
    "wedlm": Family("WeDLM", False, "reordered", wedlm_config, block_size=32),
    # 32 is what its model card and its `generate` say.
    "llada2_moe": Family("LLaDA2", False, "block", None, block_size=32, mask_token="<|mask|>"),
}
