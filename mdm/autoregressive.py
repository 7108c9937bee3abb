"""The AR teacher as a model to compare with: scored and sampled by the same calls as a student.

One causal pass gives every answer token its log-probability; text is written token by token with
cached keys and values. Each row has its own random numbers, as a canvas has.
Shapes: B rows, L length, N scored tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from .buffers import EAGER, Prefix, Runner
from .causal import read_on
from .config import require
from .denoiser import has_plain_head, max_length, probe_attention, row_chunks
from .diffusion import generator
from .errors import RequestError
from .generate import Generation, Hole, visible
from .likelihood import Likelihood, Pair, check_pair
from .proposals import draw
from .scoring import by_length
from .vocab import Vocab

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Autoregressive:
    """A causal language model and its vocabulary.

    `more_ends`: tokens that end a text besides those the model names itself, such as what closes a
    hole (fim.end_ids).
    """

    def __init__(
        self, model: PreTrainedModel, vocab: Vocab, more_ends: Collection[int] = ()
    ) -> None:
        probe_attention(model, causal=True)
        self.model = model
        self.vocab = vocab
        self.more_ends = more_ends
        self.plain_head = has_plain_head(model)
        self.runner: Runner = EAGER  # how forwards with a cache are run (acceleration.py)

    def head(self, rows_ND: torch.Tensor) -> torch.Tensor:
        """(N, V) float32 logits from the inputs of the head; unused rows of the head are left out."""
        head = self.model.get_output_embeddings() if self.plain_head else torch.nn.Identity()
        logits_NV: torch.Tensor = head(rows_ND)[:, : len(self.vocab)].float()
        return logits_NV

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def max_length(self) -> int:
        """Longest row the model was built for, in tokens."""
        return max_length(self.model.config)

    @functools.cached_property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end a text: the tokenizer's end, what the model's generation says, more_ends."""
        config = self.model.generation_config
        given = getattr(config, "eos_token_id", None)
        more = given if isinstance(given, list) else [] if given is None else [given]
        return frozenset((self.vocab.eos_id, *more, *self.more_ends))

    @functools.cached_property
    def ends(self) -> torch.Tensor:
        """The same on the device."""
        return torch.tensor(sorted(self.end_ids), device=self.device)

    @functools.cached_property
    def opening(self) -> tuple[int, ...]:
        """What its tokenizer puts before every text by itself: often a start token, often nothing."""
        return tuple(self.vocab.tokenizer("a")["input_ids"][: -len(self.vocab.encode("a"))])


@dataclasses.dataclass(frozen=True)
class DecodingSettings:
    """How an AR model writes.

    temperature   0 = greedy
    top_p         nucleus it draws from; 1 = all tokens
    suppress_eos  never end a text before its length
    """

    temperature: float = 0.0
    top_p: float = 1.0
    suppress_eos: bool = False

    def __post_init__(self) -> None:
        require(
            0 <= self.temperature < math.inf,
            f"temperature must be >= 0 (0 = greedy); got {self.temperature}",
        )
        require(0 < self.top_p <= 1, f"top_p must be in (0, 1] (1 = all tokens); got {self.top_p}")


# --- likelihood -------------------------------------------------------------------------------------


@torch.no_grad()
def log_likelihood(
    ar: Autoregressive,
    pairs: Sequence[Pair],
    *,
    batch_tokens: int = 4096,
    done: Callable[[int, Likelihood], None] | None = None,
) -> list[Likelihood]:
    """The exact log p(answer | prompt) of each pair, in nats; pairs of like length share a forward.

    Raises RequestError for a pair that cannot be scored, before any forward.
    """
    for pair in pairs:
        check_pair(pair, ar.max_length, None)
    results: list[Likelihood | None] = [None] * len(pairs)
    ids = [pair.prompt + pair.answer for pair in pairs]
    for batch in by_length([len(row) for row in ids], batch_tokens):
        length = max(len(ids[i]) for i in batch)
        x_BL = torch.full((len(batch), length), ar.vocab.pad_id)
        wanted_BL = torch.zeros_like(x_BL, dtype=torch.bool)  # outputs that predict the answer
        for row, i in enumerate(batch):
            x_BL[row, : len(ids[i])] = torch.tensor(ids[i])
            wanted_BL[row, len(pairs[i].prompt) - 1 : len(ids[i]) - 1] = True
        x_BL, wanted_BL = x_BL.to(ar.device), wanted_BL.to(ar.device)
        targets_N = x_BL.roll(-1, dims=1)[wanted_BL]
        # Padding is on the right, where a causal model does not look.
        log_probs_N, hits_N = _token_scores(ar, x_BL, wanted_BL, targets_N)
        counts = wanted_BL.sum(1).tolist()
        for i, own_n, hit_n in zip(
            batch, log_probs_N.split(counts), hits_N.split(counts), strict=True
        ):
            value, greedy = float(own_n.double().sum()), bool(hit_n.all())
            result = Likelihood(value, 0.0, 1, "ar", len(own_n), is_bound=False, greedy=greedy)
            results[i] = result
            if done is not None:
                done(i, result)
    return [result for result in results if result is not None]


def _token_scores(
    ar: Autoregressive, x_BL: torch.Tensor, wanted_BL: torch.Tensor, targets_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(N,) log-probabilities of the targets, and whether each was the likeliest token."""
    if ar.plain_head:
        rows_ND = ar.model.base_model(x_BL, use_cache=False)[0][wanted_BL]
        head = ar.model.get_output_embeddings()
    else:
        rows_ND = ar.model(x_BL, use_cache=False, logits_to_keep=wanted_BL).logits
        head = torch.nn.Identity()
    width = ar.model.config.get_text_config().vocab_size
    scores, hits = [], []
    for chunk in row_chunks(len(targets_N), width):
        log_probs_nV = head(rows_ND[chunk]).float().log_softmax(-1)
        scores.append(log_probs_nV.gather(1, targets_N[chunk, None])[:, 0].cpu())
        hits.append((log_probs_nV.argmax(-1) == targets_N[chunk]).cpu())
    return torch.cat(scores), torch.cat(hits)


# --- generation -------------------------------------------------------------------------------------


def write(
    ar: Autoregressive,
    holes: Sequence[Hole],
    settings: DecodingSettings,
    *,
    batch_size: int = 8,
    done: Callable[[int, Generation], None] | None = None,
) -> list[Generation]:
    """Continue the text before each hole by at most its length, left to right.

    Stops a row at the end token or a stop string. Raises RequestError if a hole has text after it
    (see fim.py for models that can be told of it) or does not fit into the context.
    """
    for hole in holes:
        check_hole(ar, hole)
    results: list[Generation | None] = [None] * len(holes)
    order = sorted(range(len(holes)), key=lambda i: len(holes[i].before))
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        for written in writing(ar, [holes[i] for i in batch], settings):
            for token in written:
                if token.result is not None:
                    results[batch[token.row]] = token.result
                    if done is not None:
                        done(batch[token.row], token.result)
    return [result for result in results if result is not None]


def check_hole(ar: Autoregressive, hole: Hole) -> None:
    """Raise RequestError unless the model can continue the text before this hole."""
    if not hole.before:
        raise RequestError("nothing stands before the hole; begin with the start token")
    if hole.after:
        raise RequestError(
            f"an autoregressive model cannot see the {len(hole.after)} tokens after the hole;"
            " leave them out, or use a model trained to fill in the middle"
        )
    if hole.total > ar.max_length:
        raise RequestError(
            f"prompt and new tokens are {hole.total}, but the model was built for at most"
            f" {ar.max_length}; shorten the prompt or gen_length"
        )


@dataclasses.dataclass(frozen=True)
class Written:
    """One token more in a row, and the result if it was the row's last.

    log_prob  of the token under the model as it is (temperature 1, all tokens), in nats
    """

    row: int
    token: int
    log_prob: float
    result: Generation | None

    @property
    def confidence(self) -> float:
        """The token's probability."""
        return math.exp(self.log_prob)


@dataclasses.dataclass
class _Writer:
    """One row that is being written.

    unread  tokens that the model has not read yet
    prefix  those it has
    """

    row: int
    hole: Hole
    random: torch.Generator
    unread: Sequence[int]
    prefix: Prefix = Prefix()
    ids: list[int] = dataclasses.field(default_factory=list)
    log_prob: float = 0.0


def writing(
    ar: Autoregressive, holes: Sequence[Hole], settings: DecodingSettings
) -> Iterator[list[Written]]:
    """Write all rows in one batch; yields after every forward. The holes have been checked.

    A row leaves the batch as soon as it is finished, so that the last ones do not pay for all.
    """
    writers = [
        _Writer(row, hole, generator("sample", *hole.key), hole.before)
        for row, hole in enumerate(holes)
    ]
    while writers:
        rows = [(writer.unread, writer.prefix) for writer in writers]
        longest = max(writer.hole.total for writer in writers)
        states_BD, prefixes = read_on(ar, rows, ar.vocab.pad_id, longest)
        tokens, log_probs = _choose(ar, states_BD, [writer.random for writer in writers], settings)
        written = []
        for writer, prefix, token, log_prob in zip(
            writers, prefixes, tokens, log_probs, strict=True
        ):
            writer.prefix, writer.unread = prefix, (token,)
            written.append(_add_token(ar, writer, token, log_prob))
        yield written
        writers = [
            writer for writer, one in zip(writers, written, strict=True) if one.result is None
        ]


@torch.no_grad()
def _choose(
    ar: Autoregressive,
    states_BD: torch.Tensor,
    randoms: Sequence[torch.Generator],
    settings: DecodingSettings,
) -> tuple[list[int], list[float]]:
    """A token for each row, and its log-probability under the model as it is; waits for the device once."""
    logits_BV = ar.head(states_BD)
    log_probs_BV = logits_BV.log_softmax(-1)
    if settings.suppress_eos:
        logits_BV = logits_BV.index_fill(-1, ar.ends, float("-inf"))
    if settings.temperature > 0:
        drawn = [torch.rand((), dtype=torch.float64, generator=random) for random in randoms]
        uniform_B = torch.stack(drawn).to(logits_BV.device, non_blocking=True)
        token_B = draw(logits_BV, uniform_B, settings.temperature, settings.top_p)
    else:
        token_B = logits_BV.argmax(-1)
    log_prob_B = log_probs_BV.gather(-1, token_B[:, None])[:, 0]
    tokens, log_probs = torch.stack([token_B.double(), log_prob_B.double()]).tolist()
    return [int(token) for token in tokens], log_probs


def _add_token(ar: Autoregressive, writer: _Writer, token: int, log_prob: float) -> Written:
    writer.ids.append(token)
    writer.log_prob += log_prob
    finished = token in ar.end_ids or len(writer.ids) == writer.hole.length
    result = None
    # The text is made only where it counts: making it at every token would cost more and more.
    if finished or writer.hole.stop:
        text, ids, tokens, reason = visible(ar.vocab, writer.ids, writer.hole.stop, ar.end_ids)
        if finished or reason == "stop":
            mean, nfe = writer.log_prob / len(writer.ids), len(writer.ids)
            result = Generation(text, ids, tokens, reason, nfe, mean)
    return Written(writer.row, token, log_prob, result)
