"""What goes over the wire on OpenAI's endpoints: OpenAI's names, and mdm's own settings beside them.

A field of OpenAI's that this server does not do may be there as long as it asks for nothing (null,
0, an empty list); otherwise it is refused by name, as unknown fields are. Null means left out.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from .schemas import HOLE, MAX_TOKENS, Name, Sampling, Seed, Stats, Stop, Strict

MOST_MESSAGES = 1024

# What a model is called is known at run time only; this is what `mdm demo` makes.
COMPLETIONS: list[Any] = [
    {"model": "demo", "prompt": "def fibonacci(n):", "max_tokens": 32},
    {
        "model": "demo",
        "prompt": HOLE["prefix"],
        "suffix": HOLE["suffix"],
        "max_tokens": HOLE["span"],
    },
]
CHATS: list[Any] = [
    {
        "model": "demo",
        "messages": [{"role": "user", "content": "Write a function that adds."}],
        "max_tokens": 32,
    }
]


def _form(text: str) -> WrapValidator:
    """One sentence in place of what each branch of a union has to say."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            raise PydanticCustomError("form", "must be {form}", {"form": text}) from error

    return WrapValidator(check)


def _only(*neutral: Any, why: str) -> AfterValidator:
    """The field asks for nothing, or is refused."""

    def check(value: Any) -> Any:
        same = [one for one in neutral if isinstance(value, bool) == isinstance(one, bool)]
        if value in same:
            return value
        raise PydanticCustomError(
            "not_supported", "this server does not do that; leave it out ({why})", {"why": why}
        )

    return AfterValidator(check)


def _text_of_parts(value: Any) -> Any:
    """The text of a message's content; several parts of text are one text."""
    if not isinstance(value, list):
        return value
    texts: list[str] = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" and isinstance(kind, str):
            raise PydanticCustomError(
                "part", "a part of type {kind} cannot be read, only text", {"kind": repr(kind[:64])}
            )
        if kind != "text" or set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise PydanticCustomError("part", 'a part must be {{"type": "text", "text": …}}', {})
        texts.append(part["text"])
    return "".join(texts)


def _not_empty(value: Any) -> Any:
    if value == []:
        raise PydanticCustomError("empty", "must not be an empty list; an empty text is ''", {})
    return value


TokenId = Annotated[int, Field(ge=0)]
Tokens = Annotated[list[TokenId], Field(fail_fast=True)]
Prompt = Annotated[
    str
    | Annotated[list[str], Field(fail_fast=True)]
    | Tokens
    | Annotated[list[Tokens], Field(fail_fast=True)],
    _form("a string, a list of strings, a list of token ids, or a list of lists of token ids"),
    AfterValidator(_not_empty),
]
Content = Annotated[
    str,
    BeforeValidator(
        _text_of_parts,
        json_schema_input_type=str | list[dict[Literal["type", "text"], str]],
    ),
]


class _NullIsLeftOut(Strict):
    """OpenAI's clients send null for what is not asked; it is as if the field were not there."""

    @model_validator(mode="before")
    @classmethod
    def _leave_out_null(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = cls.model_fields
        return {
            name: value for name, value in data.items() if value is not None or name not in known
        }


class StreamOptions(_NullIsLeftOut):
    """What a stream tells beside the text."""

    include_usage: bool = Field(
        False, description="A last chunk without choices that has the usage."
    )


class _Shared(_NullIsLeftOut, Sampling):
    """What both endpoints take."""

    model: Name = Field(description="Name of a model, one of GET /v1/models.")
    n: int = Field(1, ge=1, le=MAX_TOKENS, description="Texts for each prompt.")
    temperature: float = Field(
        0.0, ge=0, le=100, description="Of proposals; 0 = greedy, the default here (OpenAI's is 1)."
    )
    stop: Stop = Field([], description="Strings at whose first occurrence the text is cut off.")
    seed: Seed | None = Field(
        None, description="Equal seeds, equal texts; null = a new one, told in the answer."
    )
    stream: bool = Field(False, description="Answer with server-sent events as text is decided.")
    stream_options: StreamOptions | None = Field(
        None, description="With stream: what is told beside the text."
    )
    denoising: bool = Field(
        False,
        description="With stream: chunks also have `denoising`, which positions were filled and"
        " how surely; their text may be empty.",
    )
    timeout_s: float | None = Field(None, gt=0, le=10**6, description="Give up after so long.")
    user: str | None = Field(
        None, max_length=512, description="Name of the end user; not used, not kept."
    )
    presence_penalty: Annotated[Any, _only(0, why="all tokens count as they are")] = Field(
        None, description="Not supported: only 0."
    )
    frequency_penalty: Annotated[Any, _only(0, why="all tokens count as they are")] = Field(
        None, description="Not supported: only 0."
    )
    logit_bias: Annotated[Any, _only({}, why="all tokens count as they are")] = Field(
        None, description="Not supported: only {}."
    )

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


_LIKELIHOODS = "POST /score gives the likelihood of a text"


class CompletionRequest(_Shared):
    """Prompts to continue; with `suffix`, holes of `max_tokens` tokens to fill."""

    model_config = ConfigDict(json_schema_extra={"examples": COMPLETIONS})

    prompt: Prompt = Field(
        description="Text to continue, several, or token ids. Of several prompts, choice number"
        " prompt × n + i is the i-th text of a prompt."
    )
    suffix: str | None = Field(
        None,
        description="Text after the hole: max_tokens is then the number of tokens in between.",
    )
    max_tokens: int = Field(16, ge=1, le=MAX_TOKENS, description="New tokens (gen_length).")
    echo: bool = Field(False, description="Put the prompt before each text.")
    best_of: int | None = Field(None, ge=1, description="Not supported: only the value of n.")
    logprobs: Annotated[Any, _only(why=_LIKELIHOODS)] = Field(
        None, description="Not supported: only null."
    )

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one."""
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return cast("list[str | list[int]]", [self.prompt] if one else self.prompt)


class Message(_NullIsLeftOut):
    """One turn. A developer's message stands where the template has the system's."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content = Field(description="Text, or parts of text that are put together.")

    def as_template_has_it(self) -> dict[str, str]:
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.content}


_TEXT_ONLY = "the answer is plain text"
_NO_TOOLS = "the model calls no tools"


class ChatRequest(_Shared):
    """A conversation to continue with the assistant's next words."""

    model_config = ConfigDict(json_schema_extra={"examples": CHATS})

    messages: list[Message] = Field(
        min_length=1,
        max_length=MOST_MESSAGES,
        fail_fast=True,
        description="The conversation so far; the chat template is put around it.",
    )
    max_tokens: int | None = Field(
        None, ge=1, le=MAX_TOKENS, description="New tokens (gen_length); 64 if none is given."
    )
    max_completion_tokens: int | None = Field(
        None, ge=1, le=MAX_TOKENS, description="The same under its newer name."
    )
    logprobs: Annotated[Any, _only(False, why=_LIKELIHOODS)] = Field(
        None, description="Not supported: only false."
    )
    top_logprobs: Annotated[Any, _only(0, why=_LIKELIHOODS)] = Field(
        None, description="Not supported: only 0."
    )
    response_format: Annotated[Any, _only({"type": "text"}, why=_TEXT_ONLY)] = Field(
        None, description='Not supported: only {"type": "text"}.'
    )
    modalities: Annotated[Any, _only(["text"], why=_TEXT_ONLY)] = Field(
        None, description='Not supported: only ["text"].'
    )
    audio: Annotated[Any, _only(why=_TEXT_ONLY)] = Field(
        None, description="Not supported: only null."
    )
    tools: Annotated[Any, _only([], why=_NO_TOOLS)] = Field(
        None, description="Not supported: only []."
    )
    tool_choice: Annotated[Any, _only("none", "auto", why=_NO_TOOLS)] = Field(
        None, description='Not supported: only "none" or "auto".'
    )
    functions: Annotated[Any, _only([], why=_NO_TOOLS)] = Field(
        None, description="Not supported: only []."
    )
    function_call: Annotated[Any, _only("none", "auto", why=_NO_TOOLS)] = Field(
        None, description='Not supported: only "none" or "auto".'
    )

    @property
    def length(self) -> int:
        return self.max_completion_tokens or self.max_tokens or 64


# --- answers -----------------------------------------------------------------------------------------


class ModelCard(BaseModel):
    """One model; `created` is when it was loaded."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "mdm"


class ModelList(BaseModel):
    """All models of this server."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenUsage(BaseModel):
    """Tokens: each prompt once, and the visible ones of all texts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class _Answer(BaseModel):
    """What both answers have.

    system_fingerprint  hash of the weights; null if it is not known
    seed                the one given, or drawn
    stats               what the request took
    """

    id: str
    created: int
    model: str
    system_fingerprint: str | None
    seed: int
    usage: TokenUsage
    stats: Stats


class CompletionChoice(BaseModel):
    """One text."""

    index: int
    text: str
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class Completion(_Answer):
    """Texts of all prompts."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class AssistantMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    """One continuation of the conversation."""

    index: int
    message: AssistantMessage
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(_Answer):
    """The assistant's next words."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
