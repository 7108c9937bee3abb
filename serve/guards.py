"""What stands before every request: the host it asks for, the key it brings, the size of its body.

Plain ASGI, so that streams and disconnects pass through untouched. Covered: other people's web
pages that make a browser call a server on loopback (DNS rebinding), strangers without the key,
bodies larger than allowed even if they do not say so. Not covered: encryption; put a proxy with TLS
in front of a server that others can reach.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from .errors import AUTH, INVALID, SERVER, ServeError, error_body, too_large

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# The page and its files say nothing about the models; health and readiness are for orchestrators.
OPEN_PATHS = ("/", "/docs", "/health", "/ready")
OPEN_PREFIX = "/web/"

CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = (
    (b"content-security-policy", CONTENT_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)


class Guards:
    """Wraps an app.

    keys       any of them opens it; none = no key is asked for
    hosts      names a request may call the server by; None = any
    origins    whose pages may ask it, besides its own
    max_bytes  of a body
    most       requests at a time, whatever they are; each may hold a body in memory
    refused    told of every request that comes no further
    """

    def __init__(
        self,
        app: App,
        *,
        keys: Collection[str],
        hosts: Collection[str] | None,
        origins: Collection[str],
        max_bytes: int,
        most: int,
        refused: Callable[[ServeError], None] = lambda error: None,
    ) -> None:
        self.app = app
        self.refused = refused
        self.most = most
        self.open = 0
        self.keys = [key.encode() for key in keys]
        self.hosts = None if hosts is None else frozenset(host.lower() for host in hosts)
        self.origins = frozenset(origin.lower() for origin in origins)
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        problem = (
            self._wrong_host(headers)
            or self._strange_page(scope, headers)
            or self._no_key(scope, headers)
            or self._too_large(headers.get(b"content-length"))
            or self._too_many(scope)
        )
        if problem is not None:
            self.refused(problem)
            await answer(problem, send)
            return
        self.open += 1
        try:
            await self._pass_on(scope, receive, send)
        finally:
            self.open -= 1

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """To the app, with the body counted and the headers added."""
        taken = 0
        refused: ServeError | None = None
        begun = False

        async def counting() -> Message:
            nonlocal taken, refused
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.max_bytes:  # a body that did not say how long it is
                refused = _body_too_large(taken, self.max_bytes, exact=False)
                scope["mdm.refused"] = True
                raise refused
            return message

        async def with_headers(message: Message) -> None:
            nonlocal begun
            if refused is not None and not begun:
                return  # the app has an answer of its own to a body that breaks off
            if message["type"] == "http.response.start":
                begun = True
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        try:
            await self.app(scope, counting, with_headers)
        except ServeError:
            if refused is None:
                raise
        if refused is not None and not begun:
            self.refused(refused)
            await answer(refused, send)

    def _wrong_host(self, headers: dict[bytes, bytes]) -> ServeError | None:
        host = host_name(headers.get(b"host", b"").decode("latin-1"))
        if self.hosts is None or host in self.hosts:
            return None
        return ServeError(
            f"this server does not answer to the name {host!r}; add it with --allow-host",
            status=421,
            kind=INVALID,
            code="wrong_host",
        )

    def _strange_page(self, scope: Scope, headers: dict[bytes, bytes]) -> ServeError | None:
        """Without a key, a page of a stranger could let a browser on this machine ask for it."""
        origin = headers.get(b"origin")
        if self.keys or origin is None or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return None
        origin_text = origin.decode("latin-1").lower()
        own = headers.get(b"host", b"").decode("latin-1").lower()
        if origin_text in self.origins or origin_text.partition("://")[2] == own:
            return None
        return ServeError(
            "a page of another origin may not ask this server; allow it with --allow-origin",
            status=403,
            kind=INVALID,
            code="wrong_origin",
        )

    def _no_key(self, scope: Scope, headers: dict[bytes, bytes]) -> ServeError | None:
        path = scope["path"]
        if not self.keys or path in OPEN_PATHS or path.startswith(OPEN_PREFIX):
            return None
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        # Every key is compared, and in constant time: the answer's time tells nothing about them.
        fits = [secrets.compare_digest(given.strip(), key) for key in self.keys]
        if scheme.lower() == b"bearer" and any(fits):
            return None
        return ServeError(
            "a valid API key is needed: send the header `Authorization: Bearer KEY`",
            status=401,
            kind=AUTH,
            code="invalid_api_key",
        )

    def _too_many(self, scope: Scope) -> ServeError | None:
        if self.open < self.most or scope["path"] in OPEN_PATHS:
            return None
        return ServeError(
            f"{self.open} requests are open, as many as this server takes; try again",
            status=503,
            kind=SERVER,
            code="too_many_connections",
            retry_after=1,
        )

    def _too_large(self, length: bytes | None) -> ServeError | None:
        if length is None or not length.isdigit() or int(length) <= self.max_bytes:
            return None
        return _body_too_large(int(length), self.max_bytes)


def _body_too_large(size: int, limit: int, *, exact: bool = True) -> ServeError:
    return too_large(
        f"the body has {'' if exact else 'more than '}{size if exact else limit} bytes;"
        f" this server takes at most {limit} (--max-body-kib)",
        code="body_too_large",
    )


def host_name(value: str) -> str:
    """The name in a Host header, without its port."""
    if value.startswith("["):  # an IPv6 address
        return value.partition("]")[0].lower() + "]"
    return value.partition(":")[0].lower()


async def answer(error: ServeError, send: Send) -> None:
    """Send an error by hand."""
    body = json.dumps(error_body(error)).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *HEADERS,
    ]
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if error.retry_after is not None:
        headers.append((b"retry-after", str(error.retry_after).encode()))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
