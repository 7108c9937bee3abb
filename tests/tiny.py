"""Small things made on the spot for tests: a byte tokenizer, random models, enumerable teachers.

Nothing is downloaded and nothing comes from `mdm`. Models are tiny and *spiky* (weights ten times
larger than the usual initialisation), so that logits differ clearly between positions, tokens and
contexts, and a test that compares two code paths cannot pass because everything is near zero.

Shape letters: V vocabulary.
"""

from collections.abc import Callable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Starcoder2Config,
)

NextLogProbs = Callable[[list[int]], Tensor]

START, END, PAD = "<|start|>", "<|end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
WEIGHT_STD = 0.3
MAX_POSITIONS = 1024
RMS_NORM_CLASSES = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")

FAMILIES = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "starcoder2",
    "gpt2",
    "gpt_neox",
    "gemma3",
)


# --- tokenizer ---------------------------------------------------------------------------------


def byte_alphabet() -> list[str]:
    """The 256 printable characters that stand for bytes 0..255 in GPT-2 style vocabularies."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    char_of = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        # Unprintable bytes take the code points from 256 on, in order.
        char_of.setdefault(byte, chr(256 + len(char_of) - len(printable)))
    return [char_of[byte] for byte in range(256)]


def byte_tokenizer(extra_special: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """One token per UTF-8 byte, **id = byte value**; 256 = start (bos), 257 = end, 258 = pad.

    Lossless on any text. `extra_special` tokens follow from id 259 on. There is no mask token
    unless it is asked for there, and no template that adds bos or eos.
    """
    vocab = {char: byte for byte, char in enumerate(byte_alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([START, END, PAD, *extra_special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )


def word_tokenizer(num_words: int = 12) -> PreTrainedTokenizerFast:
    """One token per word `w0 w1 …`, id = number; then start (bos), end and pad. No mask token."""
    words = {f"w{i}": i for i in range(num_words)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([START, END, PAD])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=START, eos_token=END, pad_token=PAD
    )


# --- random models -----------------------------------------------------------------------------


def tiny_config(family: str, vocab_size: int, *, layers: int = 2, hidden: int = 32, **overrides):
    """Configuration of a tiny decoder: 4 heads, 2 key/value heads where the family has them."""
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    common = {"vocab_size": vocab_size, **ids}
    usual = common | {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_POSITIONS,
    }
    grouped = usual | {"num_key_value_heads": 2, "sliding_window": None}
    head_dim = {"head_dim": hidden // 4}
    # Gemma 3 mixes windowed and full layers, in that order; the last layer is full here.
    layer_types = ["sliding_attention"] * (layers - 1) + ["full_attention"]
    settings = {
        "llama": (LlamaConfig, usual | {"num_key_value_heads": 2}),
        "qwen2": (Qwen2Config, grouped),
        "qwen3": (Qwen3Config, grouped | head_dim),
        "mistral": (MistralConfig, grouped | head_dim),
        "starcoder2": (Starcoder2Config, grouped),
        "gpt2": (
            GPT2Config,
            common
            | {"n_embd": hidden, "n_layer": layers, "n_head": 4, "n_positions": MAX_POSITIONS}
            | {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
        ),
        "gpt_neox": (GPTNeoXConfig, usual),
        "gemma3": (
            Gemma3TextConfig,
            grouped
            | head_dim
            | {"sliding_window": 64, "layer_types": layer_types, "query_pre_attn_scalar": 8},
        ),
    }
    config_class, values = settings[family]
    return config_class(**(values | overrides))


def randomise_(model: nn.Module, seed: int, std: float = WEIGHT_STD) -> None:
    """Draw all weights anew: matrices N(0, std²); biases and norm gains default + N(0, 0.1²).

    Done here and not by `initializer_range`, so that biases and gains are not at their trivial
    0 and 1 either, and a new release of the library does not change the tests' numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(std * noise)
            else:
                parameter.add_(0.1 * noise)


def make_float64_exact_(model: nn.Module) -> None:
    """Swap RMS norms, which compute in float32 whatever their input, for torch's own.

    Without this a "float64" Llama agrees with itself only to 1e-7 across batch shapes.
    Parameter names stay the same; a saved and reloaded model has the library's norms again.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ in RMS_NORM_CLASSES:
                norm = nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(parent, name, norm)


def tiny_model(
    family: str,
    vocab_size: int,
    *,
    layers: int = 2,
    hidden: int = 32,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attn: str = "sdpa",
    **overrides,
):
    """A random `...ForCausalLM` of one of FAMILIES in eval mode; global random state untouched.

    Further keyword arguments go to the configuration. In float64 the RMS-norm families really
    compute in float64 (with attn="sdpa"); gemma3 does not.
    """
    config = tiny_config(family, vocab_size, layers=layers, hidden=hidden, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=attn, dtype=torch.float32
        )
    randomise_(model, seed)
    model.to(dtype)
    if dtype == torch.float64:
        make_float64_exact_(model)
    return model.eval()


# --- teachers small enough to enumerate --------------------------------------------------------


def toy_ar(vocab_size: int = 5, seed: int = 0, *, family: str = "llama", layers: int = 1):
    """A float64 AR model over `vocab_size` words, for enumeration; see `next_log_probs`."""
    return tiny_model(family, vocab_size, layers=layers, hidden=16, seed=seed, dtype=torch.float64)


def next_log_probs(model, bos_id: int | None = None) -> NextLogProbs:
    """`prefix ids -> (V,)` float64 log-probabilities of the next token, by a full forward.

    No cache, one row, no padding: the definition. With `bos_id` it stands before every prefix
    and an empty prefix is allowed. Answers are remembered, so enumeration stays cheap.
    """
    remembered: dict[tuple[int, ...], Tensor] = {}

    def answer(prefix: list[int]) -> Tensor:
        ids = tuple(int(i) for i in prefix)
        if bos_id is not None:
            ids = (bos_id, *ids)
        assert ids, "an empty prefix needs a bos_id"
        if ids not in remembered:
            with torch.no_grad():
                logits_V = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
            remembered[ids] = torch.log_softmax(logits_V.double(), dim=-1)
        return remembered[ids]

    return answer


def table_ar(vocab_size: int = 4, seed: int = 0, *, concentration: float = 0.35) -> NextLogProbs:
    """A lookup-table teacher: every prefix gets its own Dirichlet(concentration) draw."""
    remembered: dict[tuple[int, ...], Tensor] = {}

    def answer(prefix: list[int]) -> Tensor:
        ids = tuple(int(i) for i in prefix)
        if ids not in remembered:
            # The seed depends on the prefix only, not on the order in which prefixes are asked.
            code = seed
            for token in ids:
                code = code * (vocab_size + 1) + token + 1
            generator = torch.Generator().manual_seed(code % 2**63)
            alpha_V = torch.full((vocab_size,), concentration, dtype=torch.float64)
            gamma_V = torch._standard_gamma(alpha_V, generator=generator)
            remembered[ids] = torch.log_softmax(gamma_V.clamp_min(1e-30).log(), dim=-1)
        return remembered[ids]

    return answer


# --- a denoiser that is a plain function -------------------------------------------------------


def toy_denoiser(
    vocab_size: int = 17,
    seed: int = 0,
    *,
    mask_id: int | None = None,
    mask_logit: float = -50.0,
    dtype: torch.dtype = torch.float32,
):
    """`model_fn(x_BL, attention_mask_BL=None) -> logits_BLV`: deterministic, without ties.

    Every position sees every attended position through a mixing weight that depends on their
    distance only, so left padding that is masked out changes nothing. Computed in float64 and
    rounded to `dtype` at the end, so batch shape changes nothing either. With `mask_id`, that
    column is `mask_logit`; the default is never proposed, and unlike -inf it survives guidance,
    which subtracts logits. A fresh tensor on every call.
    """
    generator = torch.Generator().manual_seed(seed)
    width = 16

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    embed_VD, mix_DD, own_DD, head_DV = (
        draw(vocab_size, width),
        draw(width, width) / 2,
        draw(width, width) / 4,
        draw(width, vocab_size),
    )

    def model_fn(x_BL: Tensor, attention_mask_BL: Tensor | None = None) -> Tensor:
        positions_L = torch.arange(x_BL.shape[1], dtype=torch.float64)
        distance_LL = positions_L[:, None] - positions_L[None, :]
        # Not symmetric in the sign of the distance: left and right context differ.
        weight_LL = torch.cos(1.3 * distance_LL + 0.5) * torch.exp(-distance_LL.abs() / 3)
        seen_BLD = embed_VD[x_BL]
        if attention_mask_BL is not None:
            seen_BLD = seen_BLD * attention_mask_BL[..., None]
        context_BLD = torch.einsum("qk,bkd->bqd", weight_LL, seen_BLD)
        hidden_BLD = torch.tanh(context_BLD @ mix_DD + embed_VD[x_BL] @ own_DD)
        logits_BLV = hidden_BLD @ head_DV
        if mask_id is not None:
            logits_BLV[..., mask_id] = mask_logit
        return logits_BLV.to(dtype)

    return model_fn
