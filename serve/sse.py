"""Server-sent events, by hand: one JSON object a `data:` line."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from .errors import ServeError, as_serve_error, error_body

# A comment so often while nothing is said, so that proxies and clients do not give up.
PING_S = 15.0


def event(payload: dict[str, Any] | str) -> str:
    """One event. JSON has no raw line break, so it is one line."""
    text = payload if isinstance(payload, str) else json.dumps(payload, ensure_ascii=False)
    return f"data: {text}\n\n"


class EventStream(StreamingResponse):
    """A streamed answer. An error after its beginning becomes its last event.

    `leave` is called when it is over, however it ends: a client may be gone before the first part.
    """

    media_type = "text/event-stream"

    def __init__(self, parts: AsyncGenerator[str, None], leave: Callable[[], None]) -> None:
        super().__init__(_with_pings(_with_errors(parts)), headers={"x-accel-buffering": "no"})
        self.leave = leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.leave()


async def _with_errors(parts: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    async with contextlib.aclosing(parts):
        try:
            async for part in parts:
                yield part
        except ServeError as error:
            yield event(error_body(error))
        except Exception as error:  # the answer has begun: there is no status left to set
            yield event(error_body(as_serve_error(error)))
            raise


async def _with_pings(parts: AsyncGenerator[str, None]) -> AsyncIterator[str]:
    """The parts, and a comment whenever there was none for a while."""
    async with contextlib.aclosing(parts):
        following = asyncio.ensure_future(anext(parts, None))
        try:
            while True:
                done, _ = await asyncio.wait([following], timeout=PING_S)
                if not done:
                    yield ": still at work\n\n"
                    continue
                part = following.result()
                if part is None:
                    return
                yield part
                following = asyncio.ensure_future(anext(parts, None))
        finally:
            following.cancel()
            with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration):
                await following
