"""Token ids: the only file that knows which id is the mask, the start, the end or the padding.

A `Vocab` is a Hugging Face fast tokenizer plus the four ids that diffusion needs. Text of users and of
corpora is encoded with special tokens disabled, so a literal "<|mask|>" in a file is ordinary text.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .errors import VocabError, unknown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEW_MASK_TOKEN = "<|mask|>"


@dataclasses.dataclass(frozen=True, eq=False)
class Vocab:
    """A tokenizer and the ids that have a meaning to mdm.

    mask_id   absorbing token of the forward process; None for an autoregressive model
    start_id  opens every document; never masked, so that a shifted model can predict position 1
    eos_id    closes every document
    pad_id    fills rows; its value is irrelevant, padding is excluded by document ids
    """

    tokenizer: PreTrainedTokenizerBase
    mask_id: int | None
    start_id: int
    eos_id: int
    pad_id: int

    def __len__(self) -> int:
        return len(self.tokenizer)

    @functools.cached_property
    def byte_ids(self) -> frozenset[int]:
        """Tokens that stand for one byte each (byte fallback of sentencepiece); often none.

        A run of them is decoded as a whole, so its text can change with the next one.
        """
        form = re.compile(r"<0x[0-9A-Fa-f]{2}>")
        return frozenset(
            i for token, i in self.tokenizer.get_vocab().items() if form.fullmatch(token)
        )

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: no special token is added and none is recognised in the text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts at once."""
        if not texts:
            return []
        return [list(ids) for ids in self._encoded(texts)["input_ids"]]

    def encode_batch_with_spans(
        self, texts: Sequence[str]
    ) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """`encode_batch`, and for each token the characters (from, to) of the text that it covers.

        Tokens that hold parts of one character (the bytes of an emoji) all cover the whole of it.
        """
        if not texts:
            return []
        encoded = self._encoded(texts, return_offsets_mapping=True)
        return [
            (list(ids), list(spans))
            for ids, spans in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ]

    def _encoded(self, texts: Sequence[str], **options: bool) -> Any:
        return self.tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
            **options,
        )

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation in the tokenizer's template, ready for the assistant's next words.

        Raises VocabError if the tokenizer has no chat template.
        """
        return self.chat(messages)[1]

    def chat(
        self, messages: Sequence[Mapping[str, str]], *, open_last: bool = False
    ) -> tuple[str, list[int]]:
        """A conversation in the tokenizer's template, as text and as ids.

        It ends ready for the assistant's next words; with `open_last` inside the last message,
        which goes on. Raises VocabError if the tokenizer has no chat template.
        """
        if not self.tokenizer.chat_template:
            raise VocabError(
                "this tokenizer has no chat template; use plain text, or rows with `prompt` and"
                " `response` instead of `messages`"
            )
        text = self._in_template(messages, open_last)
        texts = [message["content"] for message in messages]
        added = [str(token) for token in self.tokenizer.added_tokens_decoder.values()]
        if not any(token in content for token in added for content in texts):
            return text, self._template_ids(text)
        # A text that spells a special token must not become one: it is encoded by itself.
        marks = [f"\ue000{i}\ue001" for i in range(len(texts))]
        marked = [{**m, "content": mark} for m, mark in zip(messages, marks, strict=True)]
        ids: list[int] = []
        for piece in re.split("(\ue000[0-9]+\ue001)", self._in_template(marked, open_last)):
            if piece in marks:
                ids += self.encode(texts[marks.index(piece)])
            else:
                ids += self._template_ids(piece)
        return text, ids

    def _in_template(self, messages: Sequence[Mapping[str, str]], open_last: bool) -> str:
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=not open_last,
                continue_final_message=open_last,
                tokenize=False,
            )
        except TemplateError as error:
            raise VocabError(f"the chat template refuses these messages: {error}") from error
        return str(text)

    def _template_ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str:
        """Text of ids; special tokens are left out unless `keep_special`."""
        return str(
            self.tokenizer.decode(
                list(ids),
                skip_special_tokens=not keep_special,
                clean_up_tokenization_spaces=False,
            )
        )

    def token(self, token_id: int) -> str:
        """The tokenizer's own spelling of one id."""
        return str(self.tokenizer.convert_ids_to_tokens(token_id))

    @property
    def fingerprint(self) -> str:
        """Hash of every token, its id and the special ids: equal iff two vocabularies are equal."""
        table = [sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])]
        special = [self.mask_id, self.start_id, self.eos_id, self.pad_id]
        return hashlib.sha256(json.dumps([table, special]).encode()).hexdigest()

    def with_mask(self, mask_token: str | None) -> Vocab:
        """This vocabulary with a mask token: a new one (None), or a special token it already has.

        Raises VocabError if the named token is unknown, is a word of ordinary text, or already
        means start, end or padding (unless padding is its only meaning).
        """
        name = mask_token or NEW_MASK_TOKEN
        known = self.tokenizer.get_vocab()
        if mask_token is None and name not in known:
            self.tokenizer.add_special_tokens({"mask_token": name})
            return dataclasses.replace(self, mask_id=self.tokenizer.convert_tokens_to_ids(name))
        if name not in known:
            special = [str(token) for token in self.tokenizer.added_tokens_decoder.values()]
            raise VocabError(unknown("mask token", name, special))
        mask_id = known[name]
        if mask_id in (self.start_id, self.eos_id):
            raise VocabError(
                f"mask token {name!r} (id {mask_id}) already marks the start or end of a document;"
                " choose another special token, or none to add a new one"
            )
        if mask_id not in self.tokenizer.added_tokens_decoder:
            raise VocabError(
                f"mask token {name!r} (id {mask_id}) is a word of ordinary text;"
                " choose a special token, or none to add a new one"
            )
        self.tokenizer.add_special_tokens({"mask_token": name})
        return dataclasses.replace(self, mask_id=mask_id)


def read_vocab(
    tokenizer: PreTrainedTokenizerBase,
    *,
    mask_token: str | None = None,
    start_token: str | None = None,
    end_token: str | None = None,
) -> Vocab:
    """The vocabulary of a tokenizer; names override what the tokenizer calls bos and eos.

    Raises VocabError if a named token does not exist or the tokenizer has no end token.
    """
    eos_id = _token_id(tokenizer, end_token, tokenizer.eos_token_id)
    if eos_id is None:
        raise VocabError("this tokenizer names no end-of-text token; give one with end_token")
    start_id = _token_id(tokenizer, start_token, tokenizer.bos_token_id)
    pad_id = tokenizer.pad_token_id
    return Vocab(
        tokenizer,
        mask_id=_token_id(tokenizer, mask_token, None),
        start_id=eos_id if start_id is None else start_id,
        eos_id=eos_id,
        pad_id=eos_id if pad_id is None else pad_id,
    )


def require_same_tokens(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> int:
    """The number of leading ids that mean the same to both: all of the teacher's.

    Raises VocabError naming the first ids that differ. A student may have tokens more (its mask).
    """
    theirs = {i: token for token, i in teacher.get_vocab().items()}
    ours = {i: token for token, i in student.get_vocab().items()}
    differ = sorted(i for i in theirs if theirs[i] != ours.get(i))
    if differ:
        shown = ", ".join(f"{i}: {theirs[i]!r} / {ours.get(i)!r}" for i in differ[:3])
        raise VocabError(
            f"teacher and student tokenizers differ at {len(differ)} of {len(theirs)} ids"
            f" (id: teacher / student — {shown}); soft targets need one tokenizer for both:"
            " convert the student from this teacher, choose a teacher of the same family, or set"
            " target.kind=mapped or embedding"
        )
    return len(theirs)


def _token_id(
    tokenizer: PreTrainedTokenizerBase, name: str | None, default: int | None
) -> int | None:
    if name is None:
        return default
    vocabulary = tokenizer.get_vocab()
    if name not in vocabulary:
        special = [str(token) for token in tokenizer.added_tokens_decoder.values()]
        raise VocabError(unknown("token", name, special))
    return int(vocabulary[name])
