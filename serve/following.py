"""A job as the event loop sees it: events from the engine's thread, committed text, a trajectory."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from typing import Any

from mdm.generate import Generation
from mdm.vocab import Vocab

from .committed import CommittedText
from .engine import Engine
from .errors import cancelled
from .intake import Plan
from .jobs import Committed, Event, Failed, Job, JobDone, RowDone, Unit
from .models import Served

# Some hundred bytes each.
MOST_TOKENS = 2**17


@dataclasses.dataclass(frozen=True)
class Delta:
    """What one event means to a reader: text of a row that became certain, and why.

    denoising  the filled positions with tokens, their text and confidence; None at the row's end
    finished   the row's result, if this is its end
    """

    row: int
    text: str
    denoising: dict[str, Any] | None = None
    finished: Generation | None = None


class Following:
    """One job from submission to its end. Raises ServeError if the engine does not take it.

    Used as a context, leaving cancels what is not finished.
    """

    def __init__(
        self,
        engine: Engine,
        kind: str,
        served: Served,
        units: Sequence[Unit],
        timeout_s: float,
        *,
        arrived: float | None = None,
        follows: bool = False,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[Event] = asyncio.Queue()

        def listen(event: Event) -> None:  # in the engine's thread
            loop.call_soon_threadsafe(self.events.put_nowait, event)

        self.job = Job.of(kind, served.name, units, listen, timeout_s, arrived)
        self.done: JobDone | None = None
        self.begun = False  # has anybody begun to follow it?
        engine.submit(self.job, follows=follows)

    def __enter__(self) -> Following:
        self.begun = True
        return self

    def __exit__(self, *_: object) -> None:
        self.job.cancel()

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Events up to the end. Raises the ServeError of a job that failed."""
        while self.done is None:
            event = await self.events.get()
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, JobDone):
                self.done = event
            yield event


class Texts:
    """The texts of a request on their way: what can be sent, and what a replay needs."""

    def __init__(self, plan: Plan) -> None:
        served = self.served = plan.served
        self.plan = plan
        self.rows = [
            CommittedText(served.decoder, hole.length, hole.stop, served.end_ids)
            for hole in plan.holes
        ]
        self.steps: list[list[dict[str, Any]]] = [[] for _ in plan.holes]
        self.generations: list[Generation | None] = [None] * len(plan.holes)

    def take(self, event: Event) -> Delta | None:
        """What an event means; None if nothing to a reader of texts."""
        if isinstance(event, Committed):
            step = {
                "step": event.forward,
                "seconds": round(event.seconds, 4),
                "positions": list(event.positions),
                "token_ids": list(event.tokens),
                "tokens": [shown(self.served.decoder, token) for token in event.tokens],
                # An end token that eos_last puts off has confidence -inf, which JSON does not know.
                "confidence": [
                    round(value, 4) if math.isfinite(value) else None for value in event.confidence
                ],
            }
            self.steps[event.row].append(step)
            text = self.rows[event.row].add(event.positions, event.tokens)
            return Delta(event.row, text, step)
        if isinstance(event, RowDone):
            self.generations[event.row] = event.generation
            rest = self.rows[event.row].finish(event.generation.text)
            return Delta(event.row, rest, finished=event.generation)
        return None

    def results(self) -> list[Generation]:
        """The results of all rows of a finished job."""
        found = [one for one in self.generations if one is not None]
        assert len(found) == len(self.generations), "a row without a result"
        return found

    def trajectory(self, job: Job) -> dict[str, Any]:
        """The finished request for replay: what stood around each hole, and every step."""
        decode = self.served.decoder.decode
        rows = zip(self.plan.holes, self.results(), self.steps, strict=True)
        return {
            "id": job.id,
            "model": self.served.name,
            "created": int(time.time()),
            "seed": self.plan.seed,
            "rows": [
                {
                    "index": row,
                    "before": decode(hole.before),
                    "after": decode(hole.after),
                    "length": hole.length,
                    "text": found.text,
                    "finish_reason": found.finish_reason,
                    "steps": steps,
                }
                for row, (hole, found, steps) in enumerate(rows)
            ],
        }


def shown(vocab: Vocab, token: int) -> str:
    """The text of one token by itself; some decoders leave out the space it begins with."""
    text = vocab.decode([token])
    return f" {text}" if vocab.token(token).startswith("▁") and text[:1] != " " else text


class Trajectories:
    """The last finished requests, in memory only.

    The oldest goes when there are more than `most`, or more than MOST_TOKENS decided tokens in all.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._kept: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def keep(self, trajectory: dict[str, Any]) -> None:
        self._kept[trajectory["id"]] = trajectory
        while len(self._kept) > self.most or self._tokens() > MOST_TOKENS:
            self._kept.popitem(last=False)

    def _tokens(self) -> int:
        return sum(row["length"] for one in self._kept.values() for row in one["rows"])

    def get(self, request_id: str) -> dict[str, Any] | None:
        return self._kept.get(request_id)


@contextlib.asynccontextmanager
async def connected(request: Any) -> AsyncIterator[None]:
    """Raise ServeError inside the block soon after the client is gone.

    A handler that answers in one piece is not cancelled when its client goes; this watches for it.
    """
    task = asyncio.current_task()
    assert task is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while not await request.is_disconnected():
            await asyncio.sleep(0.05)
        gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if gone:
            task.uncancel()
            raise cancelled() from None
        raise
    finally:
        watcher.cancel()
