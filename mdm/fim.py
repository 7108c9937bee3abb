"""Fill in the middle for AR models that were trained for it: prefix, suffix, then the middle.

Models mark the three parts with special tokens of their own; the family is told by which of them a
tokenizer has. All templates are prefix-suffix-middle (arXiv 2207.14255).
"""

from __future__ import annotations

import dataclasses

from .generate import Hole
from .vocab import Vocab

# (prefix, suffix, middle): Qwen2.5-Coder and CodeGemma; StarCoder 1 and 2; DeepSeek-Coder; CodeLlama
MARKS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)


def marks(vocab: Vocab) -> tuple[int, int, int] | None:
    """Ids of the prefix, suffix and middle marks; None if this model has none."""
    known = vocab.tokenizer.get_vocab()
    for names in MARKS:
        if all(name in known for name in names):
            prefix, suffix, middle = (known[name] for name in names)
            return prefix, suffix, middle
    return None


def as_continuation(hole: Hole, vocab: Vocab, marks: tuple[int, int, int]) -> Hole:
    """The hole as a text to continue: start, prefix mark, before, suffix mark, after, middle mark."""
    prefix, suffix, middle = marks
    starts = hole.before[:1] == (vocab.start_id,)
    before = hole.before[1:] if starts else hole.before
    lead = hole.before[:1] if starts else ()
    return dataclasses.replace(
        hole, before=(*lead, prefix, *before, suffix, *hole.after, middle), after=()
    )
