"""What can go wrong with a request, as HTTP says it: status, type, code and the way out.

The body has OpenAI's shape on every endpoint: {"error": {"message", "type", "param", "code"}}.
"""

from __future__ import annotations

from typing import Any

from mdm.errors import CheckpointError, MdmError

INVALID, RATE, AUTH, SERVER = (
    "invalid_request_error",
    "rate_limit_error",
    "authentication_error",
    "server_error",
)


class ServeError(MdmError):
    """A request that is not answered, and why.

    status       HTTP status
    kind         OpenAI's `type`
    code         one word for programs
    param        the field of the request that is at fault, if one is
    retry_after  seconds after which it is worth trying again
    counted      is it in the metrics already?
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        kind: str,
        code: str,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.code = status, kind, code
        self.param, self.retry_after = param, retry_after
        self.counted = False


def invalid(message: str, *, param: str | None = None, code: str = "invalid_value") -> ServeError:
    return ServeError(message, status=400, kind=INVALID, code=code, param=param)


def too_large(message: str, *, param: str | None = None, code: str = "too_large") -> ServeError:
    return ServeError(message, status=413, kind=INVALID, code=code, param=param)


def queue_full(waiting: int, limit: int, retry_after: int) -> ServeError:
    return ServeError(
        f"{waiting} requests are waiting and the queue holds {limit};"
        f" try again in {retry_after} s, or start the server with a larger --max-queue",
        status=429,
        kind=RATE,
        code="queue_full",
        retry_after=retry_after,
    )


def deadline_exceeded(seconds: float, where: str) -> ServeError:
    return ServeError(
        f"the request was not finished within {seconds:g} s ({where}); ask for fewer tokens or"
        " steps, or give it more time (timeout_s, up to the server's --timeout)",
        status=504,
        kind=SERVER,
        code="deadline_exceeded",
    )


def shutting_down() -> ServeError:
    return ServeError(
        "the server is shutting down; send the request to another one, or again in a while",
        status=503,
        kind=SERVER,
        code="shutting_down",
        retry_after=5,
    )


def out_of_memory(detail: str) -> ServeError:
    return ServeError(
        f"the model ran out of memory on this request ({detail}); ask for a shorter canvas or"
        " smaller blocks, or start the server with a smaller --workspace-mib",
        status=503,
        kind=SERVER,
        code="out_of_memory",
    )


def internal(detail: str) -> ServeError:
    return ServeError(
        f"the server failed on this request ({detail}); its log says more",
        status=500,
        kind=SERVER,
        code="internal_error",
    )


def cancelled() -> ServeError:
    """Nobody is there to read it, but the log and the metrics."""
    return ServeError("the client is gone", status=499, kind=INVALID, code="cancelled")


def as_serve_error(error: Exception) -> ServeError:
    """Any exception as an answer: an MdmError is the request's fault, anything else is ours."""
    if isinstance(error, ServeError):
        return error
    if is_out_of_memory(error):
        return out_of_memory(" ".join(str(error).split())[:200])
    if isinstance(error, MdmError) and not isinstance(error, CheckpointError):
        return invalid(str(error))
    return internal(type(error).__name__)


def is_out_of_memory(error: Exception) -> bool:
    """torch has a class for it on a GPU only; on the CPU the allocator's message tells."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "not enough memory" in text
    )


def error_body(error: ServeError) -> dict[str, Any]:
    """The JSON that goes over the wire."""
    return {
        "error": {
            "message": str(error),
            "type": error.kind,
            "param": error.param,
            "code": error.code,
        }
    }
