"""Prompts for rollouts: the beginnings that a student continues, as token ids, kept with the run.

A document with a prompt (text or chat) gives that, a plain text its first tokens; a response that is there
is not used. Documents that are held out give none, and equal prompts count once. They stay ids from here
on: what the student wrote is judged in the tokens it wrote.

A folder holds tokens.npy (T,) and ends.npy (P,), where each of P prompts ends among all T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mdm.checkpoint import replacing
from mdm.errors import DataError, VocabError
from mdm.vocab import Vocab

from .arrays import GrowingArray
from .corpus import open_prompts, read_in_turn
from .documents import Document, Skips

if TYPE_CHECKING:
    from .dataset import DataSettings
    from .on_policy import OnPolicySettings

LONGEST = 2**8  # characters; that far from a cut, tokens are what they are without it


class Prompts:
    """The prompts of a folder. Raises DataError if they cannot be read."""

    def __init__(self, folder: Path) -> None:
        try:
            self._tokens = np.load(folder / "tokens.npy", mmap_mode="r", allow_pickle=False)
            self._ends = np.load(folder / "ends.npy", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"cannot read the prompts in {folder}: {error}") from error
        if not len(self._ends) or int(self._ends[-1]) != len(self._tokens):
            raise DataError(f"{folder} does not hold the prompts it counts; start the run again")

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> list[int]:
        """Token ids of a prompt, its start token first."""
        first = int(self._ends[number - 1]) if number else 0
        return [int(token) for token in self._tokens[first : int(self._ends[number])]]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return int(np.diff(self._ends, prepend=0).max())


def write_prompts(
    settings: OnPolicySettings, data: DataSettings, vocab: Vocab, folder: Path, held_out_below: int
) -> None:
    """Read the prompts of a run and write them to `folder`, whole or not at all.

    Documents whose hash is below `held_out_below` are held out. Raises DataError if there is no prompt.
    """
    names = settings.prompts or data.sources
    sources = [open_prompts(name, data.extensions, data.max_file_kib) for name in names]
    skips = Skips()

    def trained_on() -> Iterator[Document]:
        for document in read_in_turn(sources, skips):
            if document.split_hash(data.split_seed) >= held_out_below:
                yield document
            else:
                skips.add("held out", document.origin)

    seen: set[tuple[int, ...]] = set()
    with replacing(folder) as draft:
        tokens = GrowingArray(draft / "tokens.npy", "<i4")
        ends = GrowingArray(draft / "ends.npy", "<i8")
        try:
            for ids in prompt_ids(trained_on(), vocab, settings, skips):
                if tuple(ids) in seen:
                    continue
                seen.add(tuple(ids))
                tokens.append(np.array(ids))
                ends.append(np.array([tokens.length]))
                if len(seen) == settings.max_prompts:
                    break
        finally:
            tokens.close()
            ends.close()
        if not seen:
            raise DataError(
                f"no prompt in {', '.join(names)} (left out: {skips}); name other sources in"
                f" on_policy.prompts, or change on_policy.prompt_tokens={settings.prompt_tokens} and"
                f" max_prompt_tokens={settings.max_prompt_tokens}"
            )


def prompt_ids(
    documents: Iterable[Document], vocab: Vocab, settings: OnPolicySettings, skips: Skips
) -> Iterator[list[int]]:
    """Token ids of the documents' prompts behind a start token; what gives none is counted in `skips`."""
    for document in documents:
        shown = document.prompt
        if shown is None:
            ids = first_tokens(vocab, document.text, settings.prompt_tokens)[0]
            if len(ids) < settings.prompt_tokens:
                skips.add("too short", document.origin)
                continue
        else:
            ids = vocab.encode(shown) if isinstance(shown, str) else vocab.encode_chat(shown)
        # As in training (packing.py): a chat template may have put a start token there already.
        ids = ids if ids[:1] == [vocab.start_id] else [vocab.start_id, *ids]
        if len(ids) > settings.max_prompt_tokens:
            skips.add("prompt too long", document.origin)
        elif vocab.mask_id in ids:
            raise VocabError(
                f"{document.origin} holds the mask token (id {vocab.mask_id}); choose another mask token"
            )
        else:
            yield ids


def first_tokens(vocab: Vocab, text: str, count: int) -> tuple[list[int], list[tuple[int, int]]]:
    """The first `count` tokens of a text (all, if it has no more) and the characters each covers."""
    if count == 0:
        return [], []
    size = 16 * count + LONGEST
    ids, spans = vocab.encode_batch_with_spans([text[:size]])[0]
    # A cut text can have other tokens, but only near its end.
    while size < len(text) and (len(spans) < count or spans[count - 1][1] + LONGEST > size):
        size *= 2
        ids, spans = vocab.encode_batch_with_spans([text[:size]])[0]
    return ids[:count], spans[:count]
