"""Give a model another tokenizer: rows of embedding and head for tokens it has never seen.

A new token starts as the mean of the old rows of the tokens that spell it ("fast vocabulary transfer",
Gee et al. 2022); one that spells nothing takes the row of the same old token by name, or else the mean
of all. The model has to learn its new tokens, but does not begin with noise.
Shapes: V old tokens, W new ones, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .errors import VocabError
from .token_bytes import token_bytes
from .vocab import Vocab

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def give_tokens(model: PreTrainedModel, old: Vocab, new: Vocab) -> None:
    """Replace the rows of embedding and head, in place; the head has as many rows as `new` tokens.

    The mask token of `new` is left out if it is the last: convert.py adds its row. Raises VocabError if
    the ids of `new` have gaps.
    """
    words = num_words(new)
    tables = {
        "input": model.get_input_embeddings().weight,
        "output": model.get_output_embeddings().weight,
    }
    known = len(tables["input"])  # a tokenizer may have more tokens than the model has rows
    spelling = [[i for i in ids if i < known] for ids in spelt(old, new)[:words]]
    tied = tables["input"] is tables["output"]
    rows = {
        name: _means(table_VD[: len(old)], spelling)
        for name, table_VD in tables.items()
        if not (tied and name == "output")
    }
    model.resize_token_embeddings(words, mean_resizing=False)
    model.get_input_embeddings().weight.copy_(rows["input"])
    if not tied:
        model.get_output_embeddings().weight.copy_(rows["output"])
    for config in (model.config, model.generation_config):
        if config is not None:
            set_tokens(config, new)


def set_tokens(config: Any, vocab: Vocab) -> None:
    """Number of tokens (without a mask at the end, whose row convert.py adds) and special ids."""
    for one in (config, getattr(config, "get_text_config", lambda: config)()):
        if hasattr(one, "vocab_size"):
            one.vocab_size = num_words(vocab)
        one.bos_token_id, one.eos_token_id, one.pad_token_id = vocab.start_id, vocab.eos_id, None


def num_words(vocab: Vocab) -> int:
    """Tokens without a mask token at the end. Raises VocabError if the ids have gaps."""
    highest = max(vocab.tokenizer.get_vocab().values())
    if highest >= len(vocab):
        raise VocabError(
            f"the new tokenizer has {len(vocab)} tokens but ids up to {highest}: ids must have no gaps"
        )
    return len(vocab) - 1 if vocab.mask_id == len(vocab) - 1 else len(vocab)


def spelt(old: Vocab, new: Vocab) -> list[list[int]]:
    """For every new token the old ones that spell it; empty if nothing is known of it."""
    texts = [(value or b"").decode("utf-8", "ignore") for value in token_bytes(new)]
    texts += [""] * (len(new) - len(texts))
    by_name = old.tokenizer.get_vocab()
    by_meaning = {new.start_id: old.start_id, new.eos_id: old.eos_id, new.pad_id: old.pad_id}
    one_byte = {value: token for token, value in enumerate(token_bytes(old)) if value}
    found = old.encode_batch(texts)
    result = []
    for token, (ids, value) in enumerate(zip(found, token_bytes(new), strict=False)):
        if ids:
            result.append(ids)
        elif value:  # part of a character
            pieces = [one_byte.get(bytes([byte])) for byte in value]
            result.append([piece for piece in pieces if piece is not None])
        else:
            same = by_meaning.get(token, by_name.get(new.token(token)))
            result.append([] if same is None else [same])
    return result


def _means(table_VD: torch.Tensor, spelling: list[list[int]]) -> torch.Tensor:
    """(W, D) the mean row of each list of ids; of all rows for an empty list."""
    counts_W = torch.tensor([len(ids) for ids in spelling])
    flat = torch.tensor([token for ids in spelling for token in ids], dtype=torch.long)
    sums_WD = torch.zeros(len(spelling), table_VD.shape[1], dtype=torch.float32)
    owner = torch.repeat_interleave(torch.arange(len(spelling)), counts_W)
    sums_WD.index_add_(0, owner, table_VD[flat].float())
    means_WD = sums_WD / counts_W.clamp(min=1)[:, None]
    return torch.where(counts_W[:, None] > 0, means_WD, table_VD.float().mean(0)).to(table_VD)
