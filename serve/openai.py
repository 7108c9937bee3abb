"""OpenAI's endpoints: models, completions, chat completions.

What they add to OpenAI's: mdm's settings as further fields, the seed and what the request took in the
answer, and denoising steps as chunks whose text may be empty, so that a client that puts texts
together is not disturbed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any, ClassVar

from fastapi import APIRouter, Request

from mdm.generate import Hole

from . import intake, sse
from .errors import invalid, too_large
from .following import Delta, Following, connected
from .intake import Plan
from .models import Served
from .native import service_of
from .openai_schemas import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    ModelCard,
    ModelList,
    TokenUsage,
)
from .schemas import ERRORS, GenerateResponse, Text
from .service import Service

router = APIRouter(prefix="/v1", tags=["openai"])

ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Texts, or with `stream` chunks of them as events, last `data: [DONE]`.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    },
    **ERRORS,
}


@router.get("/models", summary="Models of this server")
async def models(request: Request) -> ModelList:
    """The student first, then the teacher if there is one."""
    return ModelList(data=[_card(served) for served in service_of(request).models.values()])


@router.get("/models/{model_id:path}", responses={404: ERRORS[404]}, summary="One model")
async def model(model_id: str, request: Request) -> ModelCard:
    """A name may contain slashes."""
    return _card(service_of(request).model(model_id))


def _card(served: Served) -> ModelCard:
    return ModelCard(id=served.name, created=served.created)


@router.post(
    "/completions",
    response_model=Completion,
    responses=ANSWERS,
    summary="Continue prompts, or fill a hole before a suffix",
)
async def completions(body: CompletionRequest, request: Request) -> Any:
    """OpenAI's completions, with mdm's settings as further fields (`extra_body` of its client).

    With `suffix` the hole between prompt and suffix is filled, `max_tokens` tokens long. An answer
    has besides `usage` the `seed` and, in `stats`, what it took; a stream has them in its chunks.
    """
    return await _answer(_Completions(body), request)


@router.post(
    "/chat/completions",
    response_model=ChatCompletion,
    responses=ANSWERS,
    summary="Continue a conversation",
)
async def chat_completions(body: ChatRequest, request: Request) -> Any:
    """OpenAI's chat completions, with mdm's settings as further fields.

    The messages are put into the model's chat template; a model without one is asked through
    /v1/completions.
    """
    return await _answer(_Chat(body), request)


# --- what the two endpoints do not share -------------------------------------------------------------


class _Completions:
    """Prompts in, texts out."""

    endpoint: ClassVar[str] = "/v1/completions"
    whole_name: ClassVar[str] = "text_completion"
    chunk_name: ClassVar[str] = "text_completion"

    def __init__(self, body: CompletionRequest) -> None:
        self.body = body
        self.leads = [""] * len(body.prompts)  # what is put before the texts of each prompt

    def check(self) -> None:
        """Raise ServeError for fields that do not go together."""
        best_of = self.body.best_of
        if best_of is not None and best_of != self.body.n:
            raise invalid(
                f"best_of is {best_of} and n is {self.body.n}: this server returns all texts that"
                " it writes; leave best_of out",
                param="best_of",
            )

    @property
    def num_prompts(self) -> int:
        return len(self.body.prompts)

    def holes(self, served: Served) -> list[Hole]:
        """One for each prompt."""
        prompts, decode = self.body.prompts, served.encoder.decode
        holes = [_hole_of(served, prompt, self.body) for prompt in prompts]
        if self.body.echo:
            self.leads = [one if isinstance(one, str) else decode(one) for one in prompts]
        return holes

    def opening(self, index: int) -> dict[str, Any] | None:
        """What the first chunk of a choice says; None if that is nothing."""
        lead = self.leads[index // self.body.n]
        return {"text": lead} if lead else None

    def piece(self, text: str) -> dict[str, Any]:
        """A piece of a choice's text."""
        return {"text": text}

    def whole(self, index: int, text: str) -> dict[str, Any]:
        """A choice's text in one piece."""
        return {"text": self.leads[index // self.body.n] + text}


class _Chat:
    """Messages in, the assistant's next words out."""

    endpoint: ClassVar[str] = "/v1/chat/completions"
    whole_name: ClassVar[str] = "chat.completion"
    chunk_name: ClassVar[str] = "chat.completion.chunk"
    num_prompts: ClassVar[int] = 1

    def __init__(self, body: ChatRequest) -> None:
        self.body = body

    def check(self) -> None:
        """Raise ServeError for fields that do not go together."""
        old, new = self.body.max_tokens, self.body.max_completion_tokens
        if old is not None and new is not None and old != new:
            raise invalid(
                f"max_tokens is {old} and max_completion_tokens is {new}; give one of them",
                param="max_tokens",
            )

    def holes(self, served: Served) -> list[Hole]:
        """One: what the assistant says next."""
        if not served.encoder.tokenizer.chat_template:
            raise invalid(
                f"model {served.name!r} has no chat template; ask it through /v1/completions",
                param="messages",
            )
        messages = [message.as_template_has_it() for message in self.body.messages]
        intake.check_size(served, "".join(one["content"] for one in messages), "messages")
        ids = served.encoder.encode_chat(messages)
        before = _opened(served, ids) if served.is_student else ids
        return [Hole(tuple(before), self.body.length, (), tuple(self.body.stop))]

    def opening(self, index: int) -> dict[str, Any]:
        """The role comes first, by itself."""
        return {"delta": {"role": "assistant", "content": ""}}

    def piece(self, text: str) -> dict[str, Any]:
        """A piece of a choice's text."""
        return {"delta": {"content": text} if text else {}}

    def whole(self, index: int, text: str) -> dict[str, Any]:
        """A choice's text in one piece."""
        return {"message": {"role": "assistant", "content": text}}


Asked = _Completions | _Chat


# --- from prompts to a plan --------------------------------------------------------------------------


def _hole_of(served: Served, prompt: str | list[int], body: CompletionRequest) -> Hole:
    """The hole after one prompt, and before the suffix if there is one."""
    before = prompt if isinstance(prompt, str) else ""
    intake.check_size(served, before, "prompt")
    length = {"span": body.max_tokens, "stop": body.stop}
    text = Text.model_validate({"prefix": before, "suffix": body.suffix or "", **length})
    hole = intake.hole_of(served, text)
    if isinstance(prompt, str):
        return hole
    _check_ids(served, prompt)
    if body.suffix and not served.is_student:
        raise invalid(
            f"model {served.name!r} is told of a suffix by marks in its prompt; send the prompt as"
            " text, not as token ids",
            param="prompt",
        )
    return dataclasses.replace(hole, before=tuple(_opened(served, prompt)))


def _check_ids(served: Served, ids: Sequence[int]) -> None:
    """Raise ServeError for ids that are no tokens of a text."""
    mask_id, size = served.encoder.mask_id, len(served.encoder)
    for token in ids:
        if token >= size:
            raise invalid(f"there is no token {token}: {served.name!r} has {size}", param="prompt")
        if token == mask_id:
            raise invalid(
                f"token {token} is the mask; it cannot be in a prompt, use suffix to fill a hole",
                param="prompt",
            )


def _opened(served: Served, ids: list[int]) -> list[int]:
    """Ids after what stands before every text; a client or a template may have put it there."""
    opening = [*served.opening]
    opened = ids if ids[: len(opening)] == opening else [*opening, *ids]
    return opened or [served.encoder.start_id]


def _plan(service: Service, served: Served, asked: Asked) -> Plan:
    """`n` texts of every prompt as one job: it succeeds, fails and is cancelled as one."""
    body = asked.body
    intake.refuse_diffusion_fields(served, body)
    if asked.num_prompts > service.limits.max_n:  # before any of them is encoded
        raise too_large(
            f"{asked.num_prompts} prompts; this server writes at most {service.limits.max_n} texts"
            " for a request",
            param="prompt",
        )
    return intake.plan(
        served,
        asked.holes(served),
        intake.sampler_of(body),
        service.limits,
        service.workspace,
        n=body.n,
        seed=body.seed,
        telemetry=service.telemetry,
    )


# --- answering ---------------------------------------------------------------------------------------


async def _answer(asked: Asked, request: Request) -> Any:
    body, service = asked.body, service_of(request)
    served = service.model(body.model)
    arrival = service.arrive(body.timeout_s)
    for name, there in (
        ("stream_options", body.stream_options is not None),
        ("denoising", body.denoising),
    ):
        if there and not body.stream:
            raise invalid(f"{name} goes with stream", param=name)
    asked.check()
    async with connected(request):
        plan = await service.encoding(arrival, _plan, service, served, asked)
        if not body.stream:
            return _whole(asked, plan, await service.generate(asked.endpoint, plan, arrival))
        following = service.begin(plan, arrival)
    parts = _events(service, asked, plan, following)
    return sse.EventStream(parts, lambda: service.leave(asked.endpoint, following))


def _whole(asked: Asked, plan: Plan, found: GenerateResponse) -> dict[str, Any]:
    """An answer in one piece."""
    return {
        **_head(found.id, plan, asked.whole_name),
        "choices": [
            {
                "index": choice.index,
                **asked.whole(choice.index, choice.text),
                "finish_reason": choice.finish_reason,
            }
            for choice in found.choices
        ],
        "usage": _usage(found),
        "stats": found.stats,
    }


def _head(job_id: str, plan: Plan, name: str) -> dict[str, Any]:
    """What every answer and every chunk begins with."""
    return {
        "id": job_id,
        "object": name,
        "created": int(time.time()),
        "model": plan.served.name,
        "system_fingerprint": plan.served.weights,
        "seed": plan.seed,
    }


def _usage(found: GenerateResponse) -> TokenUsage:
    return TokenUsage(
        prompt_tokens=found.prompt_tokens,
        completion_tokens=found.completion_tokens,
        total_tokens=found.prompt_tokens + found.completion_tokens,
    )


async def _events(
    service: Service, asked: Asked, plan: Plan, following: Following
) -> AsyncGenerator[str, None]:
    """The chunks of a stream. What the request took is in the last one."""
    body = asked.body
    head = _head(following.job.id, plan, asked.chunk_name)
    if body.include_usage:
        head["usage"] = None
    for index in range(len(plan.holes)):
        opening = asked.opening(index)
        if opening is not None:
            yield sse.event({**head, "choices": [_choice(index, opening)]})
    unfinished = len(plan.holes)
    last: dict[str, Any] = {}  # the last choice's end waits for the numbers, which follow at once
    async with contextlib.aclosing(service.items(asked.endpoint, plan, following)) as items:
        async for item in items:
            if isinstance(item, GenerateResponse):
                stats = item.stats.model_dump(mode="json")
                if body.include_usage:
                    yield sse.event(last)
                    usage = _usage(item).model_dump()
                    yield sse.event({**head, "choices": [], "usage": usage, "stats": stats})
                else:
                    yield sse.event({**last, "stats": stats})
                yield sse.event("[DONE]")
                continue
            unfinished -= item.finished is not None
            chunk = _chunk(asked, item)
            if chunk is not None and unfinished:
                yield sse.event({**head, **chunk})
            elif chunk is not None:
                last = {**head, **chunk}


def _chunk(asked: Asked, delta: Delta) -> dict[str, Any] | None:
    """What a chunk says; None if that would be nothing."""
    denoising = delta.denoising if asked.body.denoising else None
    reason = None if delta.finished is None else delta.finished.finish_reason
    if not (delta.text or denoising or reason):
        return None
    chunk: dict[str, Any] = {"choices": [_choice(delta.row, asked.piece(delta.text), reason)]}
    if denoising:
        chunk["denoising"] = {"index": delta.row, **denoising}
    return chunk


def _choice(index: int, content: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    return {"index": index, **content, "logprobs": None, "finish_reason": reason}
