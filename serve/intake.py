"""From a request to a job: text becomes tokens, settings are checked, units are made (units.py).

All that can be wrong with a request is found here, before it waits and before memory is taken.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence

from mdm import fim, likelihood
from mdm.autoregressive import DecodingSettings
from mdm.canvas import SamplerSettings
from mdm.denoiser import Denoiser
from mdm.errors import MdmError
from mdm.generate import Hole, Request, encode
from mdm.likelihood import Pair

from .errors import as_serve_error, invalid, too_large
from .jobs import Unit
from .limits import Limits
from .memory import MIB
from .models import Served
from .schemas import DIFFUSION_ONLY, GenerateRequest, Sampling, ScoreRequest, Text
from .telemetry import Telemetry
from .units import fill_unit, write_unit

# A token of code is rarely longer; a text longer than this many times the context cannot fit.
LONGEST_TOKEN = 64


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a request to generate came down to.

    holes      one a text
    left_only  the model will not see what stands after the hole, of some text at least
    predicted  bytes of the largest forward of one text, and of its caches
    """

    served: Served
    holes: list[Hole]
    units: list[Unit]
    seed: int
    prompt_tokens: int
    left_only: bool
    predicted: int


def new_seed() -> int:
    """A seed for a request that names none; small enough for every JSON reader."""
    return secrets.randbelow(2**31)


# --- text to holes ---------------------------------------------------------------------------------


def hole_of(served: Served, text: Text, *, left_only: bool = False) -> Hole:
    """The hole of a request, without a key. Raises ServeError naming the field at fault.

    `left_only`: what stands after the hole is left out if the model cannot see it.
    """
    _check_fields(text)
    for name in ("prompt", "prefix", "suffix"):
        check_size(served, getattr(text, name) or "", name)
    stop = tuple(text.stop)
    if text.prompt is not None:
        request = Request(text.prompt, None, text.gen_length, text.chat, stop)
    else:
        assert text.span is not None
        suffix = text.suffix or ""
        if suffix and not served.fills_holes:
            if not left_only:
                raise invalid(
                    f"model {served.name!r} sees the left side only: it was not trained to fill in"
                    " the middle; leave suffix out, or ask the student",
                    param="suffix",
                )
            suffix = ""
        request = Request(text.prefix or "", suffix, text.span, False, stop)
    return tokens_of(served, request)


def tokens_of(served: Served, request: Request) -> Hole:
    """A request as tokens for this model."""
    vocab = served.encoder
    if served.is_student:
        return encode(vocab, request)
    if request.chat:
        before = vocab.encode_chat([{"role": "user", "content": request.prefix}])
    else:
        before = [*served.opening, *vocab.encode(request.prefix)] or [vocab.start_id]
    after = vocab.encode(request.suffix) if request.suffix else []
    hole = Hole(tuple(before), request.length, tuple(after), request.stop)
    return fim.as_continuation(hole, served.template) if after and served.template else hole


def _check_fields(text: Text) -> None:
    """Raise ServeError unless the fields are those of a prompt or those of a hole."""
    hole_fields = [name for name in ("prefix", "suffix", "span") if getattr(text, name) is not None]
    if text.prompt is not None and hole_fields:
        raise invalid(
            f"give either prompt or prefix, suffix and span; got prompt and {hole_fields[0]}",
            param=hole_fields[0],
        )
    if text.prompt is None and not hole_fields:
        raise invalid(
            "give a prompt to continue, or prefix, suffix and span to fill", param="prompt"
        )
    if text.prompt is None and text.span is None:
        raise invalid(
            "span is missing: the number of tokens between prefix and suffix", param="span"
        )
    if text.prompt is None and text.chat:
        raise invalid("chat needs a prompt; it does not go with prefix and suffix", param="chat")
    if text.prompt is None and "gen_length" in text.model_fields_set:
        raise invalid(
            "gen_length goes with prompt; the length of a hole is span", param="gen_length"
        )


def check_size(served: Served, text: str, param: str) -> None:
    """Refuse, before it is tokenised, a text that cannot fit; and one that is not Unicode."""
    limit = LONGEST_TOKEN * served.max_length
    if len(text) > limit:
        raise invalid(
            f"{param} has {len(text)} characters, but the context of {served.name!r} holds"
            f" {served.max_length} tokens; shorten it",
            param=param,
            code="context_length_exceeded",
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise invalid(f"{param} is not valid Unicode: {error.reason}", param=param) from error


# --- holes to units --------------------------------------------------------------------------------


def plan(
    served: Served,
    prompts: Sequence[Hole],
    settings: SamplerSettings,
    limits: Limits,
    workspace: int,
    *,
    n: int,
    seed: int | None,
    telemetry: Telemetry,
    left_only: bool = False,
) -> Plan:
    """Units for `n` texts of every hole, as one job: row prompt · n + i is the i-th of a prompt.

    Raises ServeError if the server, the model or the memory cannot take them.
    """
    if len(prompts) * n > limits.max_n:
        several = f"{len(prompts)} prompts and n = {n}" if len(prompts) > 1 else f"n = {n}"
        raise too_large(
            f"{several} are {len(prompts) * n} texts, but this server writes at most"
            f" {limits.max_n} texts for a request",
            param="prompt" if len(prompts) > limits.max_n else "n",
        )
    for hole in prompts:
        check_total(served, hole)
    seed = new_seed() if seed is None else seed
    # A row's key is its number, so that equal prompts do not get equal texts.
    rows = [hole for hole in prompts for _ in range(n)]
    holes = [dataclasses.replace(hole, key=(seed, row)) for row, hole in enumerate(rows)]
    units: list[Unit] = []
    try:
        if isinstance(served.model, Denoiser):
            units += [
                fill_unit(served, served.model, row, own, settings) for row, own in enumerate(holes)
            ]
        else:
            decoding = DecodingSettings(settings.temperature, settings.top_p)
            for first in range(0, len(holes), limits.max_rows):
                batch = range(first, min(first + limits.max_rows, len(holes)))
                units.append(write_unit(served, served.model, holes, batch, decoding, telemetry))
    except MdmError as error:
        raise as_serve_error(error) from error
    needed = max(unit.step_bytes + unit.held_bytes for unit in units)
    check_memory(served, max(prompts, key=lambda hole: hole.total), needed, workspace)
    tokens = sum(len(hole.before) + len(hole.after) for hole in prompts)
    left_only = left_only or any(ends_with_block(served, hole) for hole in prompts)
    return Plan(served, holes, units, seed, tokens, left_only, needed)


def check_total(served: Served, hole: Hole) -> None:
    """Raise ServeError if prompt and new tokens are longer than the context."""
    if hole.total > served.max_length:
        raise invalid(
            f"prompt ({len(hole.before) + len(hole.after)} tokens) and {hole.length} new tokens are"
            f" {hole.total}, but {served.name!r} was built for at most {served.max_length};"
            " shorten the prompt or ask for fewer tokens",
            code="context_length_exceeded",
        )


def ends_with_block(served: Served, hole: Hole) -> bool:
    """Does what stands after the hole begin with a new block, which a model with blocks does not see?"""
    size, end = served.block_size, len(hole.before) + hole.length
    return size is not None and bool(hole.after) and end % size == 0


def check_memory(served: Served, hole: Hole, needed: int, workspace: int) -> None:
    """Raise ServeError if the request could not be worked on even alone."""
    if needed > workspace:
        raise too_large(
            f"a canvas of {hole.total} tokens with {hole.length} new ones needs about"
            f" {needed // MIB} MiB beside the weights of {served.name!r}, but this server may take"
            f" {workspace // MIB} MiB; ask for fewer tokens, a smaller block_length or n, or start it"
            " with a larger --workspace-mib",
            code="memory_limit",
        )


# --- requests --------------------------------------------------------------------------------------


def plan_request(
    served: Served,
    request: GenerateRequest,
    limits: Limits,
    workspace: int,
    telemetry: Telemetry,
) -> Plan:
    """The plan of `POST /generate`."""
    refuse_diffusion_fields(served, request)
    return plan(
        served,
        [hole_of(served, request)],
        sampler_of(request),
        limits,
        workspace,
        n=request.n,
        seed=request.seed,
        telemetry=telemetry,
    )


def sampler_of(request: Sampling) -> SamplerSettings:
    """The sampler's settings of a request. Raises ServeError."""
    try:
        return request.sampler()
    except MdmError as error:
        raise as_serve_error(error) from error


def refuse_diffusion_fields(served: Served, request: Sampling) -> None:
    """Raise ServeError for a field that means nothing to an autoregressive model."""
    if served.is_student:
        return
    for name in DIFFUSION_ONLY:
        if name in request.model_fields_set:
            raise invalid(
                f"{name} is a setting of diffusion; {served.name!r} is autoregressive: leave it out",
                param=name,
            )


def pairs_of(served: Served, request: ScoreRequest, limits: Limits) -> list[Pair]:
    """What `POST /score` asks about: one pair, or the windows of a text."""
    if request.mc_samples > limits.max_samples:
        raise too_large(
            f"mc_samples is {request.mc_samples}; this server takes at most {limits.max_samples}",
            param="mc_samples",
        )
    for name in ("context", "continuation", "text"):
        check_size(served, getattr(request, name) or "", name)
    if request.text is not None:
        if request.context is not None or request.continuation is not None:
            raise invalid("give either text, or context and continuation", param="text")
        window = request.window or served.max_length
        if window > served.max_length:
            raise invalid(
                f"window is {window}, but {served.name!r} was built for {served.max_length} tokens",
                param="window",
            )
        return check_forwards(
            served, likelihood.rolling_pairs(served.encoder, request.text, window), request, limits
        )
    if request.continuation is None:
        raise invalid("give a continuation (and its context), or a text", param="continuation")
    if request.window is not None:
        raise invalid("window goes with text", param="window")
    pair = likelihood.pair_of_texts(
        served.encoder, request.context or "", request.continuation, opening=served.opening
    )
    mask_id = served.model.mask_id if isinstance(served.model, Denoiser) else None
    likelihood.check_pair(pair, served.max_length, mask_id)
    return [pair]


def check_forwards(
    served: Served, pairs: list[Pair], request: ScoreRequest, limits: Limits
) -> list[Pair]:
    """The pairs. Raises ServeError if their masks are more than a request may take."""
    if not served.is_student:
        masks = len(pairs)
    elif request.estimator == likelihood.ORDER:
        masks = sum(len(pair.answer) for pair in pairs)
    else:
        masks = len(pairs) * request.mc_samples
    if masks > limits.max_samples:
        raise too_large(
            f"the text takes {masks} forwards ({len(pairs)} windows), but this server takes at most"
            f" {limits.max_samples} for a request; ask for fewer mc_samples, a larger window, or in"
            " parts",
            param="text",
        )
    return pairs
