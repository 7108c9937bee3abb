"""What the endpoints share: the models, the engine, and a request from its text to its answer."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any, TypeVar

import torch

from mdm.autoregressive import Autoregressive
from mdm.denoiser import Denoiser
from mdm.errors import MdmError, unknown
from mdm.generate import Generation
from mdm.likelihood import Likelihood, Pair, bits_per_byte, total

from .engine import Engine
from .errors import (
    INVALID,
    ServeError,
    as_serve_error,
    cancelled,
    deadline_exceeded,
    too_large,
)
from .following import Delta, Following, Texts, Trajectories
from .intake import Plan, pairs_of
from .jobs import Scored, Usage
from .limits import Limits
from .memory import MIB, Footprint, free_bytes
from .models import Served, warm_up
from .schemas import Choice, GenerateResponse, Memory, ScoreRequest, ScoreResponse, Stats
from .telemetry import Telemetry
from .units import score_unit

log = logging.getLogger("mdm.serve")

T = TypeVar("T")

# The endpoint of an answer that is only a part of one; the whole is counted with its last part.
HALF = "/compare, student"


@dataclasses.dataclass(frozen=True)
class Arrival:
    """When a request came, and how long it may take from then on; waiting to be encoded counts."""

    timeout_s: float
    at: float = dataclasses.field(default_factory=time.monotonic)

    def check(self) -> None:
        """Raise ServeError if its time is over."""
        if time.monotonic() - self.at > self.timeout_s:
            raise deadline_exceeded(self.timeout_s, "waiting to be encoded")


class Service:
    """One server's models and its engine.

    workspace     bytes that forwards and caches may take
    idle          memory when the models are loaded and nothing is in work
    threads       CPU threads of a forward; null = torch's number
    log_requests  also log what was asked and answered
    """

    def __init__(
        self,
        student: Served,
        teacher: Served | None,
        limits: Limits,
        *,
        threads: int | None = None,
        log_requests: bool = False,
    ) -> None:
        assert isinstance(student.model, Denoiser)
        self.student, self.teacher, self.limits = student, teacher, limits
        self.models: Mapping[str, Served] = {
            served.name: served for served in (student, teacher) if served is not None
        }
        device = student.model.device
        self.workspace = limits.workspace_mib * MIB or free_bytes(device) // 2
        self.telemetry = Telemetry(device)
        footprint: Footprint = student.footprint
        self.engine = Engine(
            student.model,
            footprint,
            limits,
            self.workspace,
            self.telemetry,
            threads or torch.get_num_threads(),
        )
        for served in self.models.values():
            warm_up(served)
        self.engine.meter.reset()
        self.idle = self.engine.meter.read()
        self.trajectories = Trajectories(limits.trajectories)
        self.log_requests = log_requests
        self._encoding = asyncio.Lock()

    def model(self, name: str | None) -> Served:
        """The model of a request. Raises ServeError if there is none of that name."""
        if name is None:
            return self.student
        if name not in self.models:
            raise ServeError(
                unknown("model", name, self.models),
                status=404,
                kind=INVALID,
                code="model_not_found",
                param="model",
            )
        return self.models[name]

    def arrive(self, timeout_s: float | None) -> Arrival:
        """A request has come. Raises ServeError if it asks for more time than the server gives."""
        if timeout_s is not None and timeout_s > self.limits.timeout_s:
            raise too_large(
                f"timeout_s is {timeout_s:g}; this server gives a request at most"
                f" {self.limits.timeout_s:g} s",
                param="timeout_s",
            )
        return Arrival(timeout_s or self.limits.timeout_s)

    async def encoding(self, arrival: Arrival, function: Callable[..., T], *arguments: Any) -> T:
        """Run what tokenises a text off the event loop, one at a time. Raises ServeError.

        A request that would find the queue full is told so before.
        """
        self.engine.check_room()
        async with self._encoding:
            arrival.check()
            work = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
            try:
                return await asyncio.shield(work)
            except MdmError as error:
                raise as_serve_error(error) from error
            finally:
                # A thread cannot be cancelled, and the tokenizer is in use until it is done.
                while not work.done():
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.wait([work])
                if not work.cancelled():
                    work.exception()  # seen, so that nobody is told it was not

    # --- generating --------------------------------------------------------------------------------

    def begin(self, plan: Plan, arrival: Arrival, *, follows: bool = False) -> Following:
        """Hand a plan to the engine. Raises ServeError if the queue is full.

        `follows`: it is the second half of a request that was taken on.
        """
        return Following(
            self.engine,
            "generate",
            plan.served,
            plan.units,
            arrival.timeout_s,
            arrived=arrival.at,
            follows=follows,
        )

    def leave(self, endpoint: str, following: Following) -> None:
        """The reader of a stream is gone, or has all of it."""
        following.job.cancel()
        if not following.begun:  # nobody was there to count it
            self.telemetry.not_finished(endpoint, cancelled())

    async def generate(
        self, endpoint: str, plan: Plan, arrival: Arrival, *, first: GenerateResponse | None = None
    ) -> GenerateResponse:
        """All texts of a plan, in one piece. `first`: the other half of one request, answered before."""
        following = self.begin(plan, arrival, follows=first is not None)
        items = self.items(endpoint, plan, following, first=first, streamed=False)
        async for item in items:
            if isinstance(item, GenerateResponse):
                return item
        raise AssertionError("a job that ends without a result raises")

    async def items(
        self,
        endpoint: str,
        plan: Plan,
        following: Following,
        *,
        first: GenerateResponse | None = None,
        streamed: bool = True,
    ) -> AsyncGenerator[Delta | GenerateResponse, None]:
        """`Delta`s as text is decided, then the `GenerateResponse`. Leaving it cancels the job.

        `streamed`: the answer has begun, so that no handler of errors will see one and count it.
        """
        texts, job = Texts(plan), following.job
        try:
            with following:
                async for event in following:
                    delta = texts.take(event)
                    if delta is not None:
                        yield delta
        except ServeError as error:
            if streamed:
                self.telemetry.not_finished(endpoint, error)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            if streamed:
                self.telemetry.not_finished(endpoint, cancelled())
            raise
        answer = self.response(job.id, plan, texts.results(), job.usage)
        self.trajectories.keep(texts.trajectory(job))
        self.telemetry.finished(
            None if endpoint == HALF else endpoint,
            plan.served.name,
            prompt=plan.prompt_tokens,
            tokens=answer.completion_tokens,
            forwards=sum(job.usage.forwards.values()),
            seconds=job.usage.total_s + (first.stats.total_s if first is not None else 0.0),
            queue_s=job.usage.queue_s,
        )
        self._log_finished(endpoint, plan, answer)
        yield answer

    def _log_finished(self, endpoint: str, plan: Plan, answer: GenerateResponse) -> None:
        stats = answer.stats
        log.info(
            "%s %s: %d tokens in %.2f s (%.2f s waiting), %d forwards",
            endpoint,
            answer.id,
            answer.completion_tokens,
            stats.total_s,
            stats.queue_s,
            sum(stats.forwards.values()),
        )
        if self.log_requests:
            decode = plan.served.decoder.decode
            rows = [
                {"before": decode(hole.before), "text": choice.text, "after": decode(hole.after)}
                for hole, choice in zip(plan.holes, answer.choices, strict=True)
            ]
            log.info("%s %s", answer.id, json.dumps(rows))  # ASCII: no line break of a stranger's

    def response(
        self, job_id: str, plan: Plan, found: list[Generation], usage: Usage
    ) -> GenerateResponse:
        tokens = sum(one.num_tokens for one in found)
        return GenerateResponse(
            id=job_id,
            model=plan.served.name,
            seed=plan.seed,
            prompt_tokens=plan.prompt_tokens,
            completion_tokens=tokens,
            left_only=plan.left_only,
            choices=[
                Choice(
                    index=index,
                    text=one.text,
                    finish_reason="stop" if one.finish_reason == "stop" else "length",
                    completion_tokens=one.num_tokens,
                    forwards=one.nfe,
                    confidence=_or_none(one.confidence),
                )
                for index, one in enumerate(found)
            ],
            stats=self.stats(usage, tokens, plan.predicted),
        )

    def stats(self, usage: Usage, tokens: int, predicted: int) -> Stats:
        """What a finished job took, for its answer."""
        peak = usage.peak or self.idle
        running = max(usage.total_s - usage.queue_s, 1e-9)
        forwards = sum(usage.forwards.values())
        if peak.device_peak is None:
            above = peak.rss_peak - self.idle.rss
        else:
            above = peak.device_peak - (self.idle.device or 0)
        return Stats(
            queue_s=round(usage.queue_s, 4),
            compute_s=round(usage.compute_s, 4),
            total_s=round(usage.total_s, 4),
            forwards=dict(usage.forwards),
            token_forwards=usage.token_forwards,
            tokens_per_second=round(tokens / running, 2),
            tokens_per_forward=round(tokens / forwards, 3) if forwards else 0.0,
            mean_batch_rows=round(usage.batch_rows / max(1, usage.passes), 2),
            memory=Memory(
                predicted_bytes=predicted,
                above_idle_bytes=max(0, above),
                process_resident_bytes=peak.rss,
                process_peak_bytes=peak.rss_peak,
                device_allocated_bytes=peak.device,
                device_peak_bytes=peak.device_peak,
            ),
        )

    # --- scoring -----------------------------------------------------------------------------------

    async def score(self, request: ScoreRequest) -> ScoreResponse:
        """The answer to `POST /score`."""
        served = self.model(request.model)
        arrival = self.arrive(request.timeout_s)
        if isinstance(served.model, Autoregressive):
            _refuse_estimators(served, request)
        try:
            settings = request.likelihood(min(1024, self.limits.batch_tokens))
        except MdmError as error:
            raise as_serve_error(error) from error
        pairs: list[Pair] = await self.encoding(arrival, pairs_of, served, request, self.limits)
        unit = score_unit(served, pairs, settings, self.workspace, self.telemetry)
        found: dict[int, Likelihood] = {}
        with Following(
            self.engine, "score", served, [unit], arrival.timeout_s, arrived=arrival.at
        ) as following:
            async for event in following:
                if isinstance(event, Scored):
                    found[event.index] = event.likelihood
        whole = total([found[index] for index in range(len(pairs))])
        greedy = found[0].greedy if len(found) == 1 else None
        context = request.context or ""
        # Spaces at the end of the context are scored with the continuation.
        scored = context[len(context.rstrip()) :] + (request.continuation or "")
        text = request.text if request.text is not None else scored
        usage = following.job.usage
        self.telemetry.finished(
            "/score",
            served.name,
            prompt=sum(len(pair.prompt) for pair in pairs),
            tokens=0,
            forwards=0,
            seconds=usage.total_s,
            queue_s=usage.queue_s,
        )
        return ScoreResponse(
            id=following.job.id,
            model=served.name,
            log_likelihood=whole.value,
            std_err=_or_none(whole.std_err),
            is_bound=whole.is_bound,
            estimator=whole.estimator,
            num_tokens=whole.num_tokens,
            nats_per_token=-whole.value / whole.num_tokens,
            bits_per_byte=bits_per_byte(whole, text),
            greedy=greedy,
            stats=self.stats(usage, 0, unit.step_bytes + unit.held_bytes),
        )

    # --- about the server --------------------------------------------------------------------------

    def about(self) -> dict[str, Any]:
        """What `GET /stats` says."""
        return {
            "models": {
                served.name: {
                    "kind": served.kind,
                    "source": served.source,
                    "parameters": served.parameters,
                    "dtype": served.dtype,
                    "quantization": served.quantization or None,
                    "device": str(served.model.device),
                    "max_length": served.max_length,
                    "block_size": served.block_size,
                    "fills_holes": served.fills_holes,
                    "chat": bool(served.decoder.tokenizer.chat_template),
                    "weights": served.weights,
                }
                for served in self.models.values()
            },
            "limits": dataclasses.asdict(self.limits),
            "workspace_bytes": self.workspace,
            "draining": self.engine.draining,
            "counters": self.telemetry.summary(),
        }


def _refuse_estimators(served: Served, request: ScoreRequest) -> None:
    for name in ("estimator", "mc_samples", "cfg_scale", "remasking", "block_length", "seed"):
        if name in request.model_fields_set:
            raise ServeError(
                f"{name} is a setting of diffusion; the likelihood of {served.name!r} is exact:"
                " leave it out",
                status=400,
                kind=INVALID,
                code="invalid_value",
                param=name,
            )


def _or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value
