"""Train a tokenizer on a corpus: byte-level BPE, lossless on any text.

Text is split into words, at most three digits, punctuation and white space before merges are learnt, so
that no token reaches over a line of code into the next statement (GPT-2's idea; the pattern is in
substance that of its successors, which also keep a word's leading punctuation).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mdm.checkpoint import replacing
from mdm.errors import ConfigError, DataError

END = "<|endoftext|>"
BYTES = 256
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
# A word with the character before it; digits; punctuation with its space; line breaks; other space.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def train_tokenizer(texts: Iterable[str], size: int, output: Path) -> int:
    """Learn a tokenizer of at most `size` tokens and write it to a folder; returns how many it has.

    Raises ConfigError if the folder holds other things or the size has no room for the bytes,
    DataError if there is no text.
    """
    if size <= BYTES:
        raise ConfigError(f"--size must be above {BYTES}, which the bytes take; got {size}")
    if output.exists():
        foreign = sorted({entry.name for entry in output.iterdir()} - set(_FILES))
        if foreign:
            raise ConfigError(
                f"{output} holds other things than a tokenizer ({', '.join(foreign[:3])}), so it is kept;"
                " choose another folder"
            )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    read = 0

    def counted() -> Iterable[str]:
        nonlocal read
        for text in texts:
            read += 1
            yield text

    tokenizer.train_from_iterator(counted(), trainer)
    if not read:
        raise DataError("there is no text to train a tokenizer on")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
    )
    with replacing(output) as folder:
        fast.save_pretrained(folder)
    return len(fast)
