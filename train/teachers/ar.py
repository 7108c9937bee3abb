"""A frozen autoregressive teacher and its causal pass over clean, possibly packed, rows.

The mask token is never shown to the teacher: it has never seen one. Shapes: B batch, L length,
V teacher vocabulary, N positions asked for, D width.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from mdm.checkpoint import load_ar
from mdm.denoiser import (
    attention_layout,
    has_plain_head,
    has_sliding_window,
    max_length,
    probe_attention,
)
from mdm.errors import VocabError
from mdm.fim import Template, few_shot, template
from mdm.token_bytes import token_bytes
from mdm.vocab import Vocab, read_vocab, require_same_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclasses.dataclass(frozen=True)
class ARTeacher:
    """A causal language model whose first `num_tokens` ids mean the same to the student.

    `mask_id` is one of them if the student's mask is a reused token, which the student never predicts.
    `template` is how it is asked to fill in the middle, if it is. `vocab` is its own vocabulary if it
    is not the student's.
    """

    model: PreTrainedModel
    num_tokens: int
    plain_head: bool
    mask_id: int | None = None
    template: Template | None = None
    vocab: Vocab | None = None

    @property
    def max_length(self) -> int:
        """Longest row the model was built for, in tokens.

        No longer than a sliding window: the masks of packed rows and branches have none.
        """
        config = self.model.config.get_text_config()
        window = getattr(config, "sliding_window", None) if has_sliding_window(config) else None
        return min(max_length(config), window or max_length(config))

    def rows(
        self,
        x0_BL: torch.Tensor,
        wanted_BL: torch.Tensor,
        document_ids_BL: torch.Tensor,
        cache: Any = None,
    ) -> torch.Tensor:
        """(N, D) head inputs that predict the wanted positions from their left; fills `cache`.

        Position i is predicted by output i - 1, so position 0 cannot be asked for.
        """
        assert not bool(wanted_BL[:, 0].any()), "nothing stands to the left of position 0"
        layout = attention_layout(document_ids_BL, x0_BL, self.model.dtype, causal=True)
        return self.call(x0_BL, wanted_BL.roll(-1, dims=1), cache, **layout)

    def call(
        self, x_BL: torch.Tensor, outputs_BL: torch.Tensor, cache: Any, **layout: torch.Tensor
    ) -> torch.Tensor:
        """(N, D) head inputs at the marked outputs of one forward pass."""
        options = {"use_cache": cache is not None, "past_key_values": cache, **layout}
        if self.plain_head:
            return self.model.base_model(x_BL, **options)[0][outputs_BL]
        return self.model(x_BL, logits_to_keep=outputs_BL, **options).logits

    def head(self, rows_ND: torch.Tensor) -> torch.Tensor:
        """(N, num_tokens) float32 logits: rows of the head that are no token cut off, the mask -inf."""
        logits_NV = self.model.get_output_embeddings()(rows_ND) if self.plain_head else rows_ND
        logits_NV = logits_NV[:, : self.num_tokens].float()
        if self.mask_id is not None:
            logits_NV[:, self.mask_id] = float("-inf")
        return logits_NV


def load_teacher(
    source: str,
    student: Vocab,
    *,
    dtype: torch.dtype,
    infill: str = "",
    family: str = "",
    quantization: str = "",
    device: torch.device | None = None,
) -> ARTeacher:
    """A frozen teacher for a student with this vocabulary; on the CPU, if quantised on `device`.

    `infill` is how it will be asked: "" (it reads the text), "psm" or "spm" (its fill-in-the-middle
    marks; `family` names them if the tokenizer does not tell), or "few_shot" (examples).
    Raises VocabError if the tokenizers differ or there are no such marks, CheckpointError if the model
    is missing or not causal.
    """
    model, tokenizer = load_ar(source, dtype=dtype, quantization=quantization, device=device)
    probe_attention(model, causal=True)
    num_tokens = require_same_tokens(tokenizer, student.tokenizer)
    mask_id = student.mask_id if (student.mask_id or 0) < num_tokens else None
    asked = asked_through(read_vocab(tokenizer), infill, family) if infill else None
    return ARTeacher(model.requires_grad_(False), num_tokens, has_plain_head(model), mask_id, asked)


def load_foreign(
    source: str, *, dtype: torch.dtype, quantization: str = "", device: torch.device | None = None
) -> ARTeacher:
    """A frozen teacher with a tokenizer of its own; all of its tokens are its own.

    Raises CheckpointError if the model is missing or not causal.
    """
    model, tokenizer = load_ar(source, dtype=dtype, quantization=quantization, device=device)
    probe_attention(model, causal=True)
    vocab = read_vocab(tokenizer)
    head = model.get_output_embeddings().weight.shape[0]
    tokens = min(max(tokenizer.get_vocab().values()) + 1, head)
    if any(token_bytes(vocab)[head:]):
        raise VocabError(
            f"the tokenizer of {source!r} has words beyond the {head} that its model can write;"
            " tokenizer and weights do not belong together"
        )
    return ARTeacher(model.requires_grad_(False), tokens, has_plain_head(model), vocab=vocab)


def asked_through(vocab: Vocab, infill: str, family: str) -> Template:
    """The template of target.infill and target.family. Raises VocabError if there are no such marks."""
    return few_shot(vocab) if infill == "few_shot" else template(vocab, infill, family)
