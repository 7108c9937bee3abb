"""From text to text: prompts are continued, holes between a prefix and a suffix are filled."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence

import torch

from .canvas import Canvas, Commit, SamplerSettings
from .config import require
from .denoiser import Denoiser
from .errors import ConfigError
from .sampler import DenoisingStep, Key, denoise, make_canvas
from .vocab import Vocab

Watch = Callable[[DenoisingStep, list[Canvas]], None]


@dataclasses.dataclass(frozen=True)
class Request:
    """Tokens to be found for one text.

    prefix  what stands before
    suffix  what stands after; None = nothing, the text is continued
    length  number of open positions
    chat    the prefix is a user's message, to be put into the chat template
    stop    strings at whose first occurrence the result is cut off
    """

    prefix: str
    suffix: str | None
    length: int
    chat: bool = False
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(self.length >= 1, f"the number of tokens to fill must be >= 1; got {self.length}")


@dataclasses.dataclass(frozen=True)
class Hole:
    """A request as tokens: `length` open positions after `before` and in front of `after`.

    key  names the random numbers: equal holes with equal keys get equal tokens in any company
    """

    before: tuple[int, ...]
    length: int
    after: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    key: Key = (0, 0)

    @property
    def total(self) -> int:
        """Length of the canvas."""
        return len(self.before) + self.length + len(self.after)

    def __post_init__(self) -> None:
        require(self.length >= 1, f"a hole has at least 1 open position; got {self.length}")
        require(all(self.stop), f"a stop string must not be empty; got {list(self.stop)}")


@dataclasses.dataclass(frozen=True)
class Generation:
    """One result. `text` is what was filled in, up to the end token or a stop string.

    token_ids      the filled tokens as decided, end tokens included
    num_tokens     tokens of `text`
    finish_reason  "stop" if an end token or a stop string was reached, otherwise "length"
    nfe            denoiser forwards of this row, guidance counts 2
    confidence     mean log-probability at which the tokens were decided; NaN if unknown
    """

    text: str
    token_ids: list[int]
    num_tokens: int
    finish_reason: str
    nfe: int
    confidence: float = math.nan


def generate(
    denoiser: Denoiser,
    requests: Sequence[Request],
    settings: SamplerSettings,
    *,
    seed: int = 0,
    watch: Watch | None = None,
) -> list[Generation]:
    """Fill all requests in one batch; `watch` is called after every denoising step.

    The end token is suppressed between a prefix and a suffix: a hole has the length asked for.
    """
    holes = [encode(denoiser.vocab, r, key=(seed, row)) for row, r in enumerate(requests)]
    return fill(denoiser, holes, settings, watch=watch)


def fill(
    denoiser: Denoiser,
    holes: Sequence[Hole],
    settings: SamplerSettings,
    *,
    batch_size: int | None = None,
    watch: Watch | None = None,
    done: Callable[[int, Generation], None] | None = None,
) -> list[Generation]:
    """Fill all holes, at most `batch_size` at a time; `done(i, result)` as soon as hole i is filled.

    A row whose text contains a stop string is ended there, without the rest of its steps.
    """
    longest = max((hole.total for hole in holes), default=0)
    compat = settings.compat == "llada"
    fillings = [
        open_filling(denoiser, hole, settings, padding=longest - hole.total if compat else 0)
        for hole in holes
    ]
    canvases = [filling.canvas for filling in fillings]
    results: list[Generation | None] = [None] * len(holes)
    for step in denoise(denoiser, canvases, batch_size=batch_size):
        if watch is not None:
            watch(step, canvases)
        for commit in step.commits:
            found = fillings[commit.row].follow(denoiser.vocab, commit)
            results[commit.row] = found
            if found is not None and done is not None:
                done(commit.row, found)
    finished = [one for one in results if one is not None]
    assert len(finished) == len(holes), "a hole without an open position"
    return finished


@dataclasses.dataclass
class Filling:
    """A hole on its way to a text: the canvas, which the sampler moves on, and what came of it.

    opened_n  the positions of the hole in the canvas
    """

    hole: Hole
    canvas: Canvas
    opened_n: torch.Tensor
    log_confidence: float = 0.0

    def follow(self, vocab: Vocab, commit: Commit) -> Generation | None:
        """Take note of what a step decided here; the result if that was the last one.

        A row whose text contains a stop string is ended, without the rest of its steps.
        """
        canvas, stop = self.canvas, self.hole.stop
        known_k = commit.confidence_k[commit.tokens_k != canvas.mask_id].double()
        self.log_confidence += float(known_k.clamp(min=1e-300).log().sum())
        if stop and not canvas.finished:
            end_at_stop(vocab, canvas, self.opened_n, stop)
        if not canvas.finished:
            return None
        settings = canvas.settings
        # Only here is the confidence of a commit the probability of its token.
        rated = settings.remasking == "low_confidence" and not settings.eos_last
        decided = int((canvas.decided_L >= 0).sum())
        mean = self.log_confidence / decided if rated and decided else math.nan
        return result(vocab, canvas, self.opened_n, stop, mean)


def open_filling(
    denoiser: Denoiser, hole: Hole, settings: SamplerSettings, *, padding: int = 0
) -> Filling:
    """The hole as a canvas of masks; the end token is suppressed if text stands after it.

    Raises ConfigError if the hole and the settings do not fit the model or each other.
    """
    if hole.after and not settings.suppress_eos:
        settings = dataclasses.replace(settings, suppress_eos=True)
    before = [denoiser.vocab.start_id] * padding + list(hole.before)  # pad may double as mask
    ids = [*before, *[denoiser.mask_id] * hole.length, *hole.after]
    canvas = make_canvas(denoiser, ids, settings, key=hole.key, padding=padding)
    return Filling(hole, canvas, canvas.open_L.nonzero()[:, 0])


def encode(vocab: Vocab, request: Request, *, key: Key = (0, 0)) -> Hole:
    """A request as tokens; the start token stands first."""
    if request.chat:
        before = vocab.encode_chat([{"role": "user", "content": request.prefix}])
    else:
        before = vocab.encode(request.prefix)
    after = vocab.encode(request.suffix) if request.suffix is not None else []
    if before[:1] != [vocab.start_id]:  # a chat template may have put one there already
        before = [vocab.start_id, *before]
    return Hole(tuple(before), request.length, tuple(after), request.stop, key)


def end_at_stop(vocab: Vocab, canvas: Canvas, opened_n: torch.Tensor, stop: Sequence[str]) -> None:
    """End the canvas if the decided text without a gap contains a stop string."""
    still_open = canvas.open_L[opened_n].nonzero()
    decided_n = opened_n[: int(still_open[0])] if len(still_open) else opened_n
    text = vocab.decode(canvas.ids_L[decided_n].tolist())
    if any(string in text for string in stop):
        canvas.end(vocab.eos_id)


def result(
    vocab: Vocab,
    canvas: Canvas,
    opened_n: torch.Tensor,
    stop: Sequence[str] = (),
    confidence: float = math.nan,
) -> Generation:
    """The generation in a finished canvas whose open positions were `opened_n`."""
    ids = canvas.ids_L[opened_n].tolist()
    return Generation(*visible(vocab, ids, stop), canvas.nfe, confidence)


def visible(
    vocab: Vocab, ids: list[int], stop: Sequence[str], end_ids: Collection[int] | None = None
) -> tuple[str, list[int], int, str]:
    """(text, ids, tokens of the text, finish reason): up to an end token or the first stop string.

    `end_ids`: tokens that end a text, by default the vocabulary's end token.
    """
    ends = (vocab.eos_id,) if end_ids is None else end_ids
    before_end = ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]
    text = vocab.decode(before_end)
    places = [text.find(string) for string in stop if string in text]
    if places:
        cut = min(places)
        kept = len(before_end)
        while kept and len(vocab.decode(before_end[:kept])) > cut:
            kept -= 1
        return text[:cut], ids, kept, "stop"
    reason = "stop" if len(before_end) < len(ids) else "length"
    return text, ids, len(before_end), reason


def request_of(
    prompt: str | None,
    prefix: str | None,
    suffix: str | None,
    span: int | None,
    gen_length: int,
    *,
    chat: bool = False,
    stop: Sequence[str] = (),
) -> Request:
    """The request of a command line: a prompt to continue, or prefix, suffix and span to fill."""
    if span is None and suffix is None and prefix is None:
        if prompt is None:
            raise ConfigError("give a PROMPT to continue, or --prefix, --suffix and --span to fill")
        return Request(prompt, None, gen_length, chat, tuple(stop))
    if prompt is not None:
        raise ConfigError("give either a PROMPT or --prefix/--suffix, not both")
    if chat:
        raise ConfigError("--chat needs a PROMPT; it does not go with --prefix/--suffix")
    if span is None:
        raise ConfigError("--suffix and --prefix need --span N, the number of tokens between them")
    return Request(prefix or "", suffix or "", span, stop=tuple(stop))
