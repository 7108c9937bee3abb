"""mdm's own endpoints: generate, score, compare, replay; health, metrics, statistics."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from mdm.canvas import SamplerSettings
from mdm.generate import Hole

from . import intake, sse
from .errors import INVALID, ServeError, invalid
from .following import Delta, Following, connected
from .intake import Plan
from .models import Served
from .schemas import (
    ERRORS,
    CompareRequest,
    CompareResponse,
    GenerateRequest,
    GenerateResponse,
    ScoreRequest,
    ScoreResponse,
)
from .service import HALF, Service

router = APIRouter()


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


@router.post(
    "/generate",
    response_model=GenerateResponse,
    responses={
        200: {
            "description": "Texts, or with `stream` events: pieces of text, then the same object.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        },
        **ERRORS,
    },
    summary="Continue a prompt or fill a hole",
    tags=["mdm"],
)
async def generate(body: GenerateRequest, request: Request) -> Any:
    """Continue `prompt` by `gen_length` tokens, or fill `span` tokens between `prefix` and `suffix`.

    With `stream` the answer is a stream of server-sent events: `{"index", "text"}` as text becomes
    certain (with `denoising` also which positions were filled and how surely), last the whole
    answer as `{"done": …}`.
    """
    service = service_of(request)
    served = service.model(body.model)
    arrival = service.arrive(body.timeout_s)
    if body.denoising and not body.stream:
        raise invalid(
            "denoising goes with stream; a finished request can be replayed from"
            " /generate/ID/trajectory",
            param="denoising",
        )
    async with connected(request):
        plan = await service.encoding(
            arrival,
            intake.plan_request,
            *(served, body, service.limits, service.workspace, service.telemetry),
        )
        if not body.stream:
            return await service.generate("/generate", plan, arrival)
        following = service.begin(plan, arrival)
    parts = _events(service, plan, following, denoising=body.denoising)
    return sse.EventStream(parts, lambda: service.leave("/generate", following))


async def _events(
    service: Service, plan: Plan, following: Following, *, denoising: bool
) -> AsyncGenerator[str, None]:
    yield sse.event({"id": following.job.id, "model": plan.served.name, "seed": plan.seed})
    async with contextlib.aclosing(service.items("/generate", plan, following)) as items:
        async for item in items:
            if isinstance(item, Delta):
                payload = _delta(item, denoising=denoising)
                if payload is not None:
                    yield sse.event(payload)
            else:
                yield sse.event({"done": item.model_dump(mode="json")})


def _delta(delta: Delta, *, denoising: bool) -> dict[str, Any] | None:
    """One event for a reader; None if it would say nothing."""
    payload: dict[str, Any] = {"index": delta.row, "text": delta.text}
    if denoising and delta.denoising is not None:
        payload["denoising"] = delta.denoising
    if delta.finished is not None:
        payload["finish_reason"] = delta.finished.finish_reason
    return payload if delta.text or len(payload) > 2 else None


@router.get(
    "/generate/{request_id}/trajectory",
    responses=ERRORS,
    summary="Replay a finished request",
    tags=["mdm"],
)
async def trajectory(request_id: str, request: Request) -> JSONResponse:
    """Every step of a finished request: positions, tokens, confidence, seconds.

    The last requests only (`--trajectories`), from memory.
    """
    found = service_of(request).trajectories.get(request_id)
    if found is None:
        raise ServeError(
            f"no finished request {request_id!r} is kept; this server keeps the last"
            f" {service_of(request).limits.trajectories}",
            status=404,
            kind=INVALID,
            code="trajectory_not_found",
        )
    return JSONResponse(found)


@router.post("/score", responses=ERRORS, summary="How likely a text is", tags=["mdm"])
async def score(body: ScoreRequest, request: Request) -> ScoreResponse:
    """The log-likelihood of `continuation` after `context`, or of a whole `text`, in nats.

    For a student a lower bound: exact over all masks of a short answer, otherwise an estimate with
    its standard error. For a teacher exact.
    """
    async with connected(request):
        return await service_of(request).score(body)


@router.post("/compare", responses=ERRORS, summary="Student and teacher", tags=["mdm"])
async def compare(body: CompareRequest, request: Request) -> CompareResponse:
    """One prompt through both models, one after the other; ratios are student over teacher.

    A teacher that was not trained to fill in the middle sees the prefix only (`left_only`).
    """
    service = service_of(request)
    if service.teacher is None:
        raise invalid("this server has no teacher; start it with --teacher", code="no_teacher")
    arrival = service.arrive(body.timeout_s)
    settings = intake.sampler_of(body)
    seed = intake.new_seed() if body.seed is None else body.seed
    async with connected(request):
        plans = [
            await service.encoding(arrival, _plan_of, service, served, body, settings, seed)
            for served in (service.student, service.teacher)
        ]
        student = await service.generate(HALF, plans[0], arrival)
        # The teacher's half has its own time, and its place: the request was taken on as a whole.
        teacher = await service.generate(
            "/compare", plans[1], service.arrive(body.timeout_s), first=student
        )
    return CompareResponse(student=student, teacher=teacher, ratio=_ratios(student, teacher))


def _plan_of(
    service: Service, served: Served, body: CompareRequest, settings: SamplerSettings, seed: int
) -> Plan:
    hole: Hole = intake.hole_of(served, body, left_only=True)
    return intake.plan(
        served,
        [hole],
        settings,
        service.limits,
        service.workspace,
        n=1,
        seed=seed,
        telemetry=service.telemetry,
        left_only=bool(body.suffix) and not served.fills_holes,
    )


def _ratios(student: GenerateResponse, teacher: GenerateResponse) -> dict[str, float | None]:
    def over(name: str) -> float | None:
        below = getattr(teacher.stats, name)
        return round(getattr(student.stats, name) / below, 3) if below else None

    return {name: over(name) for name in ("compute_s", "tokens_per_second", "tokens_per_forward")}


# --- for operators ---------------------------------------------------------------------------------


@router.head("/health", include_in_schema=False)
@router.get("/health", summary="Is the process able to work?", tags=["operation"])
async def health(request: Request) -> JSONResponse:
    """200 while the engine works, 503 with the reason if it cannot; then a restart is due."""
    illness = service_of(request).engine.illness
    body = {"status": "ok"} if illness is None else {"status": "ill", "reason": illness}
    return JSONResponse(body, status_code=200 if illness is None else 503)


@router.head("/ready", include_in_schema=False)
@router.get("/ready", summary="Should requests be sent here?", tags=["operation"])
async def ready(request: Request) -> JSONResponse:
    """200 if requests are taken on, 503 while the server shuts down or is ill."""
    engine = service_of(request).engine
    reason = "shutting down" if engine.draining else engine.illness
    body = {"status": "ready"} if reason is None else {"status": "not ready", "reason": reason}
    return JSONResponse(body, status_code=200 if reason is None else 503)


@router.get(
    "/metrics",
    response_class=PlainTextResponse,
    summary="Numbers for Prometheus",
    tags=["operation"],
)
async def metrics(request: Request) -> Response:
    """Requests, queue, batch sizes, tokens, forwards, latencies and memory."""
    return Response(
        service_of(request).telemetry.exposition(),
        media_type="text/plain; version=0.0.4; charset=utf-8",
    )


@router.get("/stats", summary="The same numbers for people", tags=["operation"])
async def stats(request: Request) -> dict[str, Any]:
    """Models, limits, and what was counted since the start."""
    return service_of(request).about()
