"""What goes over the wire: requests and answers of mdm's own endpoints, with examples.

Names are those of the command line and of the library. A field that is not known, or that means
nothing for the model asked, is an error: nothing is ignored silently.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, StringConstraints

from mdm.canvas import SamplerSettings
from mdm.likelihood import LikelihoodSettings

MAX_TOKENS = 2**20  # bounds the numbers; what a model can take is checked against the model
StopString = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Stop = Annotated[
    list[StopString],
    Field(max_length=16),
    BeforeValidator(
        lambda stop: [stop] if isinstance(stop, str) else stop,
        json_schema_input_type=str | list[str],
    ),
]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]

HOLE: dict[str, JsonValue] = {
    "prefix": "def add(a, b):\n    total = ",
    "suffix": "\n    return total",
    "span": 3,
}


class Strict(BaseModel):
    """Unknown fields are refused; numbers must be numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Text(Strict):
    """What is to be continued, or the hole that is to be filled."""

    prompt: str | None = Field(None, description="Text to continue.")
    prefix: str | None = Field(None, description="Text before the hole.")
    suffix: str | None = Field(None, description="Text after the hole.")
    span: int | None = Field(
        None, ge=1, le=MAX_TOKENS, description="Tokens between prefix and suffix."
    )
    chat: bool = Field(False, description="Put the prompt into the chat template.")
    gen_length: int = Field(64, ge=1, le=MAX_TOKENS, description="New tokens after a prompt.")
    stop: Stop = Field([], description="Strings at whose first occurrence the text is cut off.")


class Sampling(Strict):
    """How masks become tokens; `temperature` and `top_p` hold for a teacher too."""

    temperature: float = Field(0.0, ge=0, le=100, description="Of proposals; 0 = greedy.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus of the temperature; 1 = all.")
    steps: int | None = Field(
        None,
        ge=1,
        le=MAX_TOKENS,
        description="Denoising steps in total; null = one a token. A multiple of the blocks; of a model"
        " that has blocks itself, at least one for each.",
    )
    block_length: int | None = Field(
        None,
        ge=1,
        le=MAX_TOKENS,
        description="Tokens decoded together, left to right; null = all, or the model's own blocks,"
        " of whose size it must be a divisor.",
    )
    remasking: str = Field(
        "low_confidence",
        max_length=64,
        description="Which proposals are kept: low_confidence, random, margin or entropy.",
    )
    threshold: float | None = Field(
        None, gt=0, le=1, description="Keep every proposal at least this sure, instead of steps."
    )
    factor: float | None = Field(
        None,
        gt=0,
        description="Keep the n surest proposals while (n + 1)(1 - confidence of the n-th) is below"
        " this, instead of steps.",
    )
    entropy_bound: float | None = Field(
        None,
        ge=0,
        description="Keep the surest proposals while all entropies but the last sum to this, in nats,"
        " instead of steps; with remasking entropy.",
    )
    cfg_scale: float = Field(0.0, ge=0, le=100, description="Strength of guidance; 0 = off.")
    suppress_eos: bool = Field(False, description="Never propose the end token.")
    eos_last: bool = Field(False, description="Keep an end token only when nothing else is left.")
    stop_at_eos: bool = Field(
        True, description="End a row once an end token is reached without a gap before it."
    )
    cache: str = Field(
        "none",
        max_length=64,
        description="none, or approximate, of a model without blocks: prefix keeps keys and values of"
        " what stands before the current block, dual of all outside it.",
    )
    refresh: int | None = Field(
        None,
        ge=1,
        le=MAX_TOKENS,
        description="Steps after which such a cache is made anew; null = at the start of each block.",
    )

    def sampler(self) -> SamplerSettings:
        """The sampler's settings. Raises ConfigError if they do not go together."""
        return SamplerSettings(**{name: getattr(self, name) for name in Sampling.model_fields})


DIFFUSION_ONLY = tuple(
    name for name in Sampling.model_fields if name not in ("temperature", "top_p")
)


class GenerateRequest(Sampling, Text):
    """A prompt to continue, or prefix, suffix and span to fill."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [HOLE, {"prompt": "def fibonacci(n):", "gen_length": 32, "steps": 16}]
        }
    )

    model: Name | None = Field(None, description="Name of a model; null = the student.")
    n: int = Field(1, ge=1, le=MAX_TOKENS, description="Texts to generate.")
    seed: Seed | None = Field(
        None, description="Equal seeds, equal texts; null = a new one, told in the answer."
    )
    stream: bool = Field(False, description="Answer with server-sent events as text is decided.")
    denoising: bool = Field(
        False, description="With stream: tell which positions were filled, and how surely."
    )
    timeout_s: float | None = Field(None, gt=0, le=10**6, description="Give up after so long.")


class Memory(BaseModel):
    """Bytes. Of the process while this request was in work, neighbours included.

    predicted  what this request's largest forward and caches were expected to take
    above_idle what the process took at most beyond what it holds when idle
    """

    predicted_bytes: int
    above_idle_bytes: int
    process_resident_bytes: int
    process_peak_bytes: int
    device_allocated_bytes: int | None = None
    device_peak_bytes: int | None = None


class Stats(BaseModel):
    """What a request took.

    queue_s            from its arrival to its first forward
    compute_s          its forwards; other requests may have shared them
    total_s            from its arrival to its result
    forwards           by kind, one for each row in a forward; guidance counts 2
    token_forwards     positions computed
    tokens_per_second  visible tokens over total_s - queue_s
    tokens_per_forward visible tokens over all its forwards
    mean_batch_rows    rows in the forwards it took part in, its neighbours' included
    """

    queue_s: float
    compute_s: float
    total_s: float
    forwards: dict[str, int]
    token_forwards: int
    tokens_per_second: float
    tokens_per_forward: float
    mean_batch_rows: float
    memory: Memory


class Choice(BaseModel):
    """One text: up to the end token or a stop string.

    completion_tokens  tokens of the text
    forwards           of this row; guidance counts 2
    confidence         mean log-probability at which tokens were decided; null if it is not one
    """

    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    completion_tokens: int
    forwards: int
    confidence: float | None


class GenerateResponse(BaseModel):
    """Texts, and what they took. With `left_only` the model did not see the suffix.

    A model with blocks sees as much of the suffix as lies in the last block of the hole.
    """

    id: str
    model: str
    seed: int
    prompt_tokens: int
    completion_tokens: int
    left_only: bool = False
    choices: list[Choice]
    stats: Stats


class ScoreRequest(Strict):
    """A continuation after a context, or a whole text in windows."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"context": "def add(a, b):", "continuation": "\n    return a + b"}]
        }
    )

    model: Name | None = Field(None, description="Name of a model; null = the student.")
    context: str | None = Field(None, description="What stands before; null = nothing.")
    continuation: str | None = Field(None, description="The text whose likelihood is asked.")
    text: str | None = Field(None, description="A whole text, scored in windows.")
    window: int | None = Field(
        None, ge=2, le=MAX_TOKENS, description="Tokens a window of text; null = the model's length."
    )
    estimator: str = Field(
        "auto", max_length=64, description="auto, exact, stratified, independent, llada or order."
    )
    mc_samples: int = Field(128, ge=1, le=MAX_TOKENS, description="Masks; auto may need fewer.")
    cfg_scale: float = Field(0.0, ge=0, le=100, description="Strength of guidance; 0 = off.")
    remasking: str = Field(
        "low_confidence", max_length=64, description="Position rule of estimator order."
    )
    block_length: int | None = Field(
        None, ge=1, le=MAX_TOKENS, description="Blocks of estimator order; null = all at once."
    )
    seed: Seed = Field(0, description="Of the masks.")
    timeout_s: float | None = Field(None, gt=0, le=10**6, description="Give up after so long.")

    def likelihood(self, batch_tokens: int) -> LikelihoodSettings:
        """The likelihood's settings. Raises ConfigError if they do not go together."""
        names = ("estimator", "mc_samples", "cfg_scale", "remasking", "block_length", "seed")
        own = {name: getattr(self, name) for name in names}
        return LikelihoodSettings(**own, batch_tokens=batch_tokens)


class ScoreResponse(BaseModel):
    """log p in nats, total; a lower bound (or an estimate of one) if `is_bound`.

    nats_per_token, bits_per_byte   of -log p: lower is better; spaces at the end of a context count
    std_err    of the Monte-Carlo estimate; 0 if nothing was sampled, null if it cannot be told
    greedy     would greedy decoding give this text? null where it was not asked
    """

    id: str
    model: str
    log_likelihood: float
    std_err: float | None
    is_bound: bool
    estimator: str
    num_tokens: int
    nats_per_token: float
    bits_per_byte: float
    greedy: bool | None
    stats: Stats


class CompareRequest(Sampling, Text):
    """One prompt for student and teacher; settings of the sampler hold for the student alone."""

    model_config = ConfigDict(json_schema_extra={"examples": [HOLE]})

    seed: Seed | None = Field(None, description="Of both.")
    timeout_s: float | None = Field(None, gt=0, le=10**6, description="Of each, in seconds.")


class CompareResponse(BaseModel):
    """Both answers, one after the other on the same machine, and student over teacher."""

    student: GenerateResponse
    teacher: GenerateResponse
    ratio: dict[str, float | None]


class ErrorDetail(BaseModel):
    """What is wrong and, in `param`, with which field."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorResponse(BaseModel):
    """The body of every answer that is not a result."""

    error: ErrorDetail


ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "The request is wrong; the text says how."},
    401: {"model": ErrorResponse, "description": "No API key, or a wrong one."},
    403: {"model": ErrorResponse, "description": "A page of an origin that is not allowed."},
    404: {"model": ErrorResponse, "description": "No such model or request."},
    413: {"model": ErrorResponse, "description": "Too large; the text names the number."},
    421: {"model": ErrorResponse, "description": "Called by a name it does not answer to."},
    429: {"model": ErrorResponse, "description": "The queue is full; see Retry-After."},
    500: {"model": ErrorResponse, "description": "The server failed on this request."},
    503: {"model": ErrorResponse, "description": "Shutting down, or out of memory."},
    504: {"model": ErrorResponse, "description": "Not finished before its deadline."},
}
