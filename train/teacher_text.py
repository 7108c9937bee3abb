"""Text by the teacher: prompts continued by an AR model, as rows that can be trained on.

At temperature 1 and top_p 1 the rows are samples of the teacher itself. Hard cross-entropy on them is
then an unbiased estimate of the cross-entropy to the teacher's conditionals: no soft targets needed.
A student with the teacher's tokens learns the tokens that were drawn (see given_tokens.py).

Rows have `prompt` and `response`, or `messages`; `cut` says that the length ended the response and
not the teacher, so no end token is learnt behind it (see documents.py). A row depends on the seed and
its place alone. Work is shared by batches, and batches are the same for any number of processes and
interruptions, so the file is the same as well; another batch size, number of threads or device can
change last digits, and a draw only where they decide it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mdm.autoregressive import Autoregressive, DecodingSettings, writing
from mdm.config import require, to_tree
from mdm.errors import CheckpointError, DataError
from mdm.generate import Generation, Hole
from mdm.vocab import Vocab

from . import processes
from .corpus import Source, read_in_turn
from .documents import Document, Message, Skips
from .prompts import first_tokens
from .text_parts import Part, StoredRow, make_way, merge, stored_rows

_FORMAT = 1
_WINDOW = 2**10  # rows that are sorted by length at a time
_DIGITS = 5  # of a log-probability: float32 has no more


@dataclasses.dataclass(frozen=True)
class TextSettings:
    """What is written; how fast (batch size, device, processes) is not part of it.

    temperature    1 = as the teacher is, 0 = greedy
    top_p          nucleus; 1 = all tokens
    max_tokens     longest response, its end token included
    prompt_tokens  of a plain text that make its prompt; 0 = the start token alone
    samples        responses a prompt
    limit          documents to read; null = all
    seed           of the samples
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256
    prompt_tokens: int = 32
    samples: int = 1
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _ = self.decoding  # checks temperature and top_p
        for name, least in (("max_tokens", 1), ("prompt_tokens", 0), ("samples", 1), ("limit", 1)):
            value = getattr(self, name)
            require(value is None or value >= least, f"{name} must be >= {least}; got {value}")
        require(
            self.samples == 1 or self.temperature > 0,
            f"{self.samples} samples of a prompt are all equal at temperature 0; raise the"
            " temperature, or take one",
        )

    @property
    def decoding(self) -> DecodingSettings:
        return DecodingSettings(self.temperature, self.top_p)

    @property
    def unbiased(self) -> bool:
        """Are the rows samples of the teacher's own distribution?"""
        return self.temperature == 1 and self.top_p == 1


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a finished file holds.

    tokens         drawn tokens, end tokens included
    mean_log_prob  of a token, in nats, with `std_err`: rows are independent, their tokens are not
    cut            share of rows that max_tokens ended
    same_tokens    share of rows whose text is encoded to the very tokens that were drawn; a student with
                   the teacher's tokens learns these in any case (given_tokens.py)
    empty          rows without text, which training leaves out
    written        tokens drawn by this call in `seconds`; the others were there
    """

    rows: int
    tokens: int
    mean_log_prob: float
    std_err: float
    cut: float
    same_tokens: float
    empty: int
    written: int
    seconds: float
    skips: Skips


# --- prompts ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt as a row shows it (text or messages) and as the teacher reads it."""

    index: int
    shown: str | tuple[Message, ...]
    origin: str
    before: tuple[int, ...]


def read_prompts(
    ar: Autoregressive, documents: Iterable[Document], settings: TextSettings, skips: Skips
) -> Iterator[Prompt]:
    """The prompt of each document: its own, or the beginning of a plain text.

    Prompts that leave no room for max_tokens in the context are counted in `skips`.
    """
    vocab = ar.vocab
    for index, document in enumerate(itertools.islice(documents, settings.limit)):
        shown = document.prompt
        if shown is None:
            shown = opening_text(vocab, document.text, settings.prompt_tokens)
        ids = vocab.encode(shown) if isinstance(shown, str) else vocab.encode_chat(shown)
        # As in training (packing.py): a chat template may have put a start token there already.
        before = ids if ids[:1] == [vocab.start_id] else [vocab.start_id, *ids]
        if len(before) + settings.max_tokens > ar.max_length:
            skips.add("prompt too long", document.origin)
        else:
            yield Prompt(index, shown, document.file_name, tuple(before))


def opening_text(vocab: Vocab, text: str, num_tokens: int) -> str:
    """The first tokens of a text as text; fewer, if the last ones hold a part of a character."""
    if num_tokens == 0:
        return ""
    spans = first_tokens(vocab, text, num_tokens + 1)[1]
    if len(spans) <= num_tokens:
        return text
    kept = num_tokens
    while kept and spans[kept][0] < spans[kept - 1][1]:
        kept -= 1
    return text[: spans[kept - 1][1]] if kept else ""


def batches(
    prompts: Iterable[Prompt], samples: int, batch_size: int
) -> Iterator[list[tuple[Prompt, int]]]:
    """All (prompt, sample) in batches of like length; some are read ahead, never all."""
    rows = ((prompt, sample) for prompt in prompts for sample in range(samples))
    while window := list(itertools.islice(rows, max(_WINDOW, batch_size))):
        window.sort(key=lambda row: (len(row[0].before), row[0].index, row[1]))
        for first in range(0, len(window), batch_size):
            yield window[first : first + batch_size]


# --- responses --------------------------------------------------------------------------------------


def sample_batch(
    ar: Autoregressive, batch: Sequence[tuple[Prompt, int]], settings: TextSettings
) -> Iterator[dict[str, Any]]:
    """The rows of one batch, each as soon as it is finished.

    Raises CheckpointError if the teacher's probabilities are not numbers.
    """
    holes = [
        Hole(
            prompt.before,
            settings.max_tokens,
            key=("teacher text", settings.seed, prompt.index, sample),
        )
        for prompt, sample in batch
    ]
    log_probs: list[list[float]] = [[] for _ in batch]
    for written in writing(ar, holes, settings.decoding):
        for token in written:
            if not math.isfinite(token.log_prob):
                raise CheckpointError(
                    f"the teacher gives a log-probability of {token.log_prob}; with bf16 weights,"
                    " try fp32, or choose another teacher"
                )
            log_probs[token.row].append(token.log_prob)
            if token.result is not None:
                yield _row(ar.vocab, *batch[token.row], token.result, log_probs[token.row])


def _row(
    vocab: Vocab, prompt: Prompt, sample: int, result: Generation, log_probs: list[float]
) -> dict[str, Any]:
    cut = result.finish_reason == "length"
    learnt = vocab.encode(result.text) + ([] if cut else [vocab.eos_id])
    if isinstance(prompt.shown, str):
        text: dict[str, Any] = {"prompt": prompt.shown, "response": result.text}
    else:
        answer = {"role": "assistant", "content": result.text}
        text = {"messages": [*map(dict, prompt.shown), answer]}
    return {
        **text,
        "origin": prompt.origin,
        "index": prompt.index,
        "sample": sample,
        "log_prob": _rounded(math.fsum(log_probs)),
        "log_probs": [_rounded(value) for value in log_probs],
        "token_ids": result.token_ids,
        "cut": cut,
        "same_tokens": learnt == result.token_ids,
    }


def _rounded(log_prob: float) -> float:
    return round(log_prob, _DIGITS) + 0.0  # no -0.0


# --- the whole file ---------------------------------------------------------------------------------


def sample_text(
    ar: Autoregressive,
    sources: Mapping[str, Source],
    settings: TextSettings,
    output: Path,
    *,
    teacher: Mapping[str, Any],
    batch_size: int = 16,
    overwrite: bool = False,
    tell: Callable[[int, int, float], None] | None = None,
) -> Summary | None:
    """Write `output`, or go on with what an interrupted call has left; the summary on rank 0.

    `teacher` tells the weights from others (hash, dtype). `tell(rows, tokens, seconds)` hears of
    every batch of this process. Raises ConfigError if the output exists or was begun with other
    settings (neither with `overwrite`), DataError if there is no prompt or nothing can be written.
    """
    require(batch_size >= 1, f"batch_size must be at least 1; got {batch_size}")
    require(
        settings.max_tokens < ar.max_length,
        f"max_tokens is {settings.max_tokens}, but the teacher was built for {ar.max_length} tokens,"
        " prompt included",
    )
    began, skips, expected, new_rows, new_tokens = time.monotonic(), Skips(), 0, 0, 0
    made_from = _made_from(ar, sources, settings, teacher)
    try:
        make_way(output, made_from, overwrite)
        known = stored_rows(output).keys()
        processes.barrier()  # all have read before anyone writes
        prompts = read_prompts(ar, read_in_turn(list(sources.values()), skips), settings, skips)
        with contextlib.closing(Part(output, made_from)) as part:
            for number, batch in enumerate(batches(prompts, settings.samples, batch_size)):
                expected += len(batch)
                keys = {(prompt.index, sample) for prompt, sample in batch}
                if number % processes.world_size() != processes.rank() or keys <= known:
                    continue
                # What an interrupted batch lacks is written in the company of the whole batch: in
                # other company, a row could get other last digits.
                for row in sample_batch(ar, batch, settings):
                    new_tokens += len(row["token_ids"])
                    if (row["index"], row["sample"]) not in known:
                        new_rows += 1
                        part.append(row)
                if tell is not None:
                    tell(new_rows, new_tokens, time.monotonic() - began)
        if not expected:
            raise DataError(f"no prompt in {', '.join(sources)}: {skips}")
        seconds = time.monotonic() - began
        counted = torch.tensor([new_tokens], device=processes.device())
        written = int(processes.total(counted))
        processes.barrier()
        rows: list[StoredRow] = []
        if processes.rank() == 0:
            rows = _in_order(output, expected)
            merge(output, rows)
        processes.barrier()
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise DataError(f"cannot write {output}: {error}") from error
    return _summary(rows, skips, written, seconds) if rows else None


def _in_order(output: Path, expected: int) -> list[StoredRow]:
    rows = stored_rows(output)
    if len(rows) != expected:
        raise DataError(
            f"{len(rows)} of {expected} rows are in the files {output}.part*; all processes must"
            " see the same folder. The same command goes on"
        )
    return [rows[key] for key in sorted(rows)]


def _made_from(
    ar: Autoregressive,
    sources: Mapping[str, Source],
    settings: TextSettings,
    teacher: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything the rows depend on, as plain JSON values."""
    states = repr([source.state() for source in sources.values()])
    template = str(ar.vocab.tokenizer.chat_template)
    made_from: dict[str, Any] = {
        "format": _FORMAT,
        **teacher,
        "tokenizer": ar.vocab.fingerprint[:16],
        "chat template": hashlib.sha256(template.encode()).hexdigest()[:16],
        "end tokens": sorted(ar.end_ids),
        **to_tree(settings),
        "sources": list(sources),
        "content of the sources": hashlib.sha256(states.encode()).hexdigest()[:16],
    }
    made_from = json.loads(json.dumps(made_from))  # lists, as they will be read
    return made_from


def _summary(rows: Sequence[StoredRow], skips: Skips, written: int, seconds: float) -> Summary:
    tokens = sum(row.tokens for row in rows)
    mean = math.fsum(row.log_prob for row in rows) / tokens
    # A ratio of two sums over rows: its error by linearisation.
    squares = math.fsum((row.log_prob - mean * row.tokens) ** 2 for row in rows)
    n = len(rows)
    return Summary(
        rows=n,
        tokens=tokens,
        mean_log_prob=mean,
        std_err=math.sqrt(squares * n / (n - 1)) / tokens if n > 1 else math.nan,
        cut=sum(row.cut for row in rows) / n,
        same_tokens=sum(row.same_tokens for row in rows) / n,
        empty=sum(row.empty for row in rows),
        written=written,
        seconds=seconds,
        skips=skips,
    )
