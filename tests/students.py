"""Tiny denoisers for tests: few words, random weights, bidirectional; and one that is scripted.

Shape letters: B batch, L length, V vocabulary, N rows asked for.
"""

from collections.abc import Callable

import torch
from tiny import tiny_model, word_tokenizer
from torch import Tensor

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
    num_words: int = 12,
    unused_rows: int = 0,
    layers: int = 1,
    hidden: int = 16,
    **settings,
) -> Denoiser:
    """A random model of the family as denoiser. The mask has an ordinary random row of its own."""
    vocab = word_vocab(num_words)
    model = tiny_model(family, len(vocab) + unused_rows, layers=layers, hidden=hidden, **settings)
    make_bidirectional(model)
    return Denoiser(model, vocab, shift=shift).eval()


class ScriptedStudent:
    """What the sampler needs of a denoiser, with logits from a function of the canvas.

    `logits_fn(xt_BL) -> (B, L, V)`; the mask is -inf as in a real one. Counts its forwards.
    """

    shift = False
    max_length = 1024
    device = torch.device("cpu")

    def __init__(self, logits_fn: Callable[[Tensor], Tensor], num_words: int = 12) -> None:
        self.vocab = word_vocab(num_words)
        self.mask_id = self.vocab.mask_id
        self.logits_fn = logits_fn
        self.forwards = 0

    def __call__(self, xt_BL: Tensor, wanted_BL: Tensor, *, document_ids_BL: Tensor) -> Tensor:
        self.forwards += 1
        logits_BLV = self.logits_fn(xt_BL).float().clone()
        logits_BLV[..., self.mask_id] = float("-inf")
        return logits_BLV[wanted_BL]
