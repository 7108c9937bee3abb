"""Tiny denoisers for tests: few words, random weights, bidirectional; and one that is scripted.

Shape letters: B batch, L length, V vocabulary, N rows asked for.
"""

from collections.abc import Callable

import oracles
import torch
from tiny import randomise_, tiny_model, word_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig

from mdm.autoregressive import Autoregressive
from mdm.convert import make_bidirectional
from mdm.denoiser import Denoiser
from mdm.vocab import Vocab, read_vocab


def word_vocab(num_words: int = 12) -> Vocab:
    """Words have ids 0 … num_words - 1; then come start, end, pad and mask."""
    return read_vocab(word_tokenizer(num_words)).with_mask(None)


def random_student(
    family: str = "llama",
    *,
    shift: bool = False,
    block_size: int | None = None,
    attention: str | None = None,
    num_words: int = 12,
    unused_rows: int = 0,
    layers: int = 1,
    hidden: int = 16,
    **settings,
) -> Denoiser:
    """A random model of the family as denoiser. The mask has an ordinary random row of its own."""
    vocab = word_vocab(num_words)
    rows = len(vocab) + unused_rows
    if family in ("granite", "gemma2"):
        model = special_model(family, rows, **settings)
    else:
        model = tiny_model(family, rows, layers=layers, hidden=hidden, **settings)
    make_bidirectional(model)
    return Denoiser(model, vocab, shift=shift, block_size=block_size, attention=attention).eval()


class ScriptedStudent:
    """What the sampler needs of a denoiser, with logits from a function of the canvas.

    `logits_fn(xt_BL) -> (B, L, V)`; the mask is -inf as in a real one. Counts its forwards.
    """

    shift = False
    block_size = None
    max_length = 1024
    device = torch.device("cpu")

    def __init__(self, logits_fn: Callable[[Tensor], Tensor], num_words: int = 12) -> None:
        self.vocab = word_vocab(num_words)
        self.mask_id = self.vocab.mask_id
        self.logits_fn = logits_fn
        self.forwards = 0

    def rows(self, xt_BL: Tensor, wanted_BL: Tensor, *, document_ids_BL: Tensor) -> Tensor:
        self.forwards += 1
        logits_BLV = self.logits_fn(xt_BL).float().clone()
        logits_BLV[..., self.mask_id] = float("-inf")
        return logits_BLV[wanted_BL]

    def __call__(self, xt_BL: Tensor, wanted_BL: Tensor, *, document_ids_BL: Tensor) -> Tensor:
        return self.rows(xt_BL, wanted_BL, document_ids_BL=document_ids_BL)

    def head(self, logits_NV: Tensor) -> Tensor:
        return logits_NV

    def chunks(self, rows: int) -> list[slice]:
        return [slice(0, rows)]


def special_model(family: str, rows: int, *, seed: int = 0, dtype: torch.dtype = torch.float32):
    """A random AR model whose logits are more than head(hidden): scaled (granite), capped (gemma2)."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    config = {
        "granite": lambda: GraniteConfig(vocab_size=rows, logits_scaling=7.0, **sizes, **ids),
        "gemma2": lambda: Gemma2Config(
            vocab_size=rows,
            head_dim=4,
            final_logit_softcapping=2.0,
            sliding_window=64,
            **sizes,
            **ids,
        ),
    }[family]()
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config)
    randomise_(model, seed)
    return model.to(dtype).eval()


def random_ar(family: str = "llama", *, num_words: int = 12, **settings) -> Autoregressive:
    """A random causal model over words, start, end and pad; there is no mask."""
    vocab = read_vocab(word_tokenizer(num_words))
    if family in ("granite", "gemma2"):
        model = special_model(family, len(vocab), **settings)
    else:
        model = tiny_model(family, len(vocab), **{"layers": 1, "hidden": 16, **settings})
    return Autoregressive(model, vocab)


def slow_log_probs(denoiser: Denoiser, given=(), scale: float = 0.0):
    """`tokens -> (L, V)` log-probabilities of this denoiser's model by the slow reference."""
    return oracles.denoiser_log_probs(
        denoiser.model,
        shift=denoiser.shift,
        forbidden=denoiser.never_sampled.tolist(),
        mask_id=denoiser.mask_id,
        given=given,
        scale=scale,
        block_size=denoiser.block_size,
    )
