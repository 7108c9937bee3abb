"""The FastAPI app: endpoints, the page, errors in one shape."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
from collections.abc import AsyncIterator, Collection
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.staticfiles import StaticFiles

from mdm.errors import MdmError, unknown

from . import native, openai
from .errors import INVALID, SERVER, ServeError, as_serve_error, error_body, invalid
from .guards import App, Guards
from .service import Service

log = logging.getLogger("mdm.serve")
WEB = Path(__file__).parent / "web"

DESCRIPTION = """Masked diffusion language models of code: fill holes, continue prompts, score texts;
the autoregressive teacher beside the student. Errors have OpenAI's shape on every endpoint."""


def make_app(
    service: Service,
    *,
    keys: Collection[str] = (),
    hosts: Collection[str] | None = None,
    origins: Collection[str] = (),
) -> App:
    """The whole server as an ASGI app.

    keys     API keys; none = no key is asked for
    hosts    names it may be called by; None = any
    origins  web origins whose pages may call it (CORS); none = its own page only
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.engine.stop)

    app = FastAPI(
        title="mdm",
        version=importlib.metadata.version("mdm-code"),
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # they load scripts from elsewhere; /docs is a page of our own
        redoc_url=None,
    )
    app.state.service = service
    app.include_router(native.router)
    app.include_router(openai.router)
    app.mount("/web", StaticFiles(directory=WEB), name="web")

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(WEB / "index.html")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(WEB / "docs.html")

    app.openapi = lambda: _description(app)  # type: ignore[method-assign]
    app.add_exception_handler(MdmError, _mdm_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _any_error)
    limits = service.limits
    guarded = Guards(
        app,
        keys=keys,
        hosts=hosts,
        origins=origins,
        max_bytes=limits.max_body_bytes,
        most=4 * (limits.max_queue + limits.max_rows),
        refused=lambda error: service.telemetry.not_finished("refused", error),
    )
    if not origins:
        return guarded
    # Outermost, so that a refusal too can be read by the pages that are allowed.
    return CORSMiddleware(
        guarded,
        allow_origins=list(origins),
        allow_methods=["GET", "POST"],
        allow_headers=["authorization", "content-type"],
        expose_headers=["retry-after"],
    )


def _description(app: FastAPI) -> dict[str, Any]:
    """FastAPI's description, less the status 422 that it adds and that we answer as 400."""
    description = FastAPI.openapi(app)
    for methods in description["paths"].values():
        for operation in methods.values():
            operation["responses"].pop("422", None)
    description["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    description["security"] = [{}, {"key": []}]  # a key only if the server has any
    for name in ("HTTPValidationError", "ValidationError"):
        description["components"]["schemas"].pop(name, None)
    return description


def _answer(error: ServeError) -> JSONResponse:
    headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
    return JSONResponse(error_body(error), status_code=error.status, headers=headers)


def _refuse(request: Request, error: ServeError) -> JSONResponse:
    """Count it, log it (without anything of the request), answer it."""
    route = request.scope.get("route")
    endpoint = getattr(route, "path", "other")
    service: Service = request.app.state.service
    if "mdm.refused" not in request.scope:  # by the guards, who count it and answer
        service.telemetry.not_finished(endpoint, error)
    log.info("%s: %d %s", endpoint, error.status, error.code)
    return _answer(error)


async def _mdm_error(request: Request, error: Exception) -> JSONResponse:
    return _refuse(request, as_serve_error(error))


def known_fields(route: object) -> list[str]:
    """Names of the fields of a route's request, at the first level."""
    body = getattr(route, "body_field", None)
    model = getattr(getattr(body, "field_info", None), "annotation", None)
    return sorted(getattr(model, "model_fields", {}))


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    """The first thing that is wrong, with the name of its field. The value is not repeated."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    param = ".".join(place) or None
    if first["type"] == "json_invalid":
        return _refuse(request, invalid("the body is not valid JSON", code="invalid_json"))
    if first["type"] == "extra_forbidden":
        known = known_fields(request.scope.get("route")) if len(place) == 1 else []
        text = unknown("field", place[-1], known) if known else f"unknown field {param!r}"
        return _refuse(request, invalid(text, param=param, code="unknown_field"))
    return _refuse(request, invalid(f"{param or 'the body'}: {first['msg']}", param=param))


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    kind = INVALID if error.status_code < 500 else SERVER
    text = f"{error.detail}; see /docs" if error.status_code in (404, 405) else str(error.detail)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    answer = _refuse(request, ServeError(text, status=error.status_code, kind=kind, code=code))
    for name, value in (error.headers or {}).items():
        answer.headers[name] = value
    return answer


async def _any_error(request: Request, error: Exception) -> JSONResponse:
    log.exception("a request failed", exc_info=error)
    return _refuse(request, as_serve_error(error))
