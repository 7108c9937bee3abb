"""From text to text: prompts are continued, holes between a prefix and a suffix are filled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from .canvas import Canvas, SamplerSettings
from .config import require
from .denoiser import Denoiser
from .errors import ConfigError
from .sampler import DenoisingStep, denoise, make_canvas

Watch = Callable[[DenoisingStep, list[Canvas]], None]


@dataclasses.dataclass(frozen=True)
class Request:
    """Tokens to be found for one text.

    prefix  what stands before
    suffix  what stands after; None = nothing, the text is continued
    length  number of open positions
    chat    the prefix is a user's message, to be put into the chat template
    """

    prefix: str
    suffix: str | None
    length: int
    chat: bool = False

    def __post_init__(self) -> None:
        require(self.length >= 1, f"the number of tokens to fill must be >= 1; got {self.length}")


@dataclasses.dataclass(frozen=True)
class Generation:
    """One result. `text` is what was filled in; end tokens and what follows them are left out.

    token_ids      the filled tokens as decided, end tokens included
    num_tokens     tokens before the end token
    finish_reason  "stop" if an end token was decided, otherwise "length"
    nfe            denoiser forwards of this row, guidance counts 2
    """

    text: str
    token_ids: list[int]
    num_tokens: int
    finish_reason: str
    nfe: int


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
    if not requests:
        return []
    encoded = [encode(denoiser, request) for request in requests]
    longest = max(map(len, encoded))
    canvases = []
    for row, (request, ids) in enumerate(zip(requests, encoded, strict=True)):
        hole = request.suffix is not None
        own = dataclasses.replace(settings, suppress_eos=settings.suppress_eos or hole)
        padding = longest - len(ids) if settings.compat == "llada" else 0
        ids = [denoiser.vocab.start_id] * padding + ids  # the pad token may double as the mask
        canvases.append(make_canvas(denoiser, ids, own, seed=seed, row=row, padding=padding))
    opened = [canvas.open_L.clone() for canvas in canvases]
    for step in denoise(denoiser, canvases):
        if watch is not None:
            watch(step, canvases)
    return [
        result(denoiser, canvas, open_L.nonzero()[:, 0].tolist())
        for canvas, open_L in zip(canvases, opened, strict=True)
    ]


def encode(denoiser: Denoiser, request: Request) -> list[int]:
    """The canvas of a request: start token, prefix, masks, suffix."""
    vocab = denoiser.vocab
    if request.chat:
        before = vocab.encode_chat([{"role": "user", "content": request.prefix}])
    else:
        before = vocab.encode(request.prefix)
    after = vocab.encode(request.suffix) if request.suffix is not None else []
    if before[:1] != [vocab.start_id]:  # a chat template may have put one there already
        before = [vocab.start_id, *before]
    return [*before, *[denoiser.mask_id] * request.length, *after]


def result(denoiser: Denoiser, canvas: Canvas, positions: list[int]) -> Generation:
    """The generation in a finished canvas whose open positions were `positions`."""
    vocab = denoiser.vocab
    ids = canvas.ids_L[positions].tolist()
    before_end = ids[: ids.index(vocab.eos_id)] if vocab.eos_id in ids else ids
    reason = "stop" if len(before_end) < len(ids) else "length"
    return Generation(vocab.decode(before_end), ids, len(before_end), reason, canvas.nfe)


def request_of(
    prompt: str | None,
    prefix: str | None,
    suffix: str | None,
    span: int | None,
    gen_length: int,
    *,
    chat: bool = False,
) -> Request:
    """The request of a command line: a prompt to continue, or prefix, suffix and span to fill."""
    if span is None and suffix is None and prefix is None:
        if prompt is None:
            raise ConfigError("give a PROMPT to continue, or --prefix, --suffix and --span to fill")
        return Request(prompt, None, gen_length, chat)
    if prompt is not None:
        raise ConfigError("give either a PROMPT or --prefix/--suffix, not both")
    if chat:
        raise ConfigError("--chat needs a PROMPT; it does not go with --prefix/--suffix")
    if span is None:
        raise ConfigError("--suffix and --prefix need --span N, the number of tokens between them")
    return Request(prefix or "", suffix or "", span)
