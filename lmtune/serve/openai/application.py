"""The application of `lmtune serve`: its routes, and who may use them.

Every route under `/v1` wants the key, as `Authorization: Bearer KEY`. So no website that the user visits can use the
server, though a browser may send requests to this machine. `/health` and `/metrics` tell names of models and counts.
"""

from __future__ import annotations

import hmac
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

from lmtune.serve.openai.answers import Answering
from lmtune.serve.openai.catalog import Catalog
from lmtune.serve.openai.chat import chat_routes
from lmtune.serve.openai.completions import completion_routes
from lmtune.serve.openai.errors import ApiError, add_error_handlers
from lmtune.serve.server import replay

MAX_BODY_BYTES = 16_000_000
MAX_TOKENS = 1024  # of an answer whose request does not say it
_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"]
_UPLOADS = "/v1/files"  # has a limit of its own


def build_api(
    catalog: Catalog, answering: Answering, key: str, hosts: Sequence[str] = ("*",), max_tokens: int = MAX_TOKENS,
    routers: Sequence[APIRouter] = (), page: FastAPI | None = None,
) -> FastAPI:  # fmt: skip
    """The application.

    Args:
        catalog: the models.
        answering: of all requests.
        key: that clients send.
        hosts: by which names a request may call the server.
        max_tokens: where an answer is cut whose request does not say it.
        routers: further routes.
        page: what a browser sees at `/`.
    """
    lifespan: Callable[[Any], Any] | None = None if page is None else page.router.lifespan_context
    application = FastAPI(
        title="lmtune", docs_url=None, redoc_url=None, openapi_url="/openapi.json", redirect_slashes=False,
        lifespan=lifespan,
    )  # fmt: skip
    add_error_handlers(application)
    for router in (_model_routes(catalog), chat_routes(catalog, answering, max_tokens),
                   completion_routes(catalog, answering), *routers):  # fmt: skip
        application.include_router(router)

    @application.get("/health")
    async def health() -> dict[str, object]:
        """Whether it answers; 503 while it closes."""
        if answering.closing:
            raise ApiError(503, "the server is closing", code="server_closing")
        return {"status": "ok", "models": catalog.names, "requests": answering.num_answering}

    @application.get("/metrics")
    async def metrics() -> Response:
        """Counts for Prometheus."""
        return Response(answering.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @application.api_route("/v1", methods=_METHODS, include_in_schema=False)
    @application.api_route("/v1/{path:path}", methods=_METHODS, include_in_schema=False)
    async def nothing(http: Request) -> Response:
        """What no route above answers; else the page would, and not in OpenAI's form."""
        is_known = any(route.matches(http.scope)[0] is Match.PARTIAL for route in application.router.routes)
        status, what = (405, "another method is expected") if is_known else (404, "no such route")
        raise ApiError(status, f"{http.method} {http.url.path}: {what}; /openapi.json lists the routes")

    async def outside(http: Request) -> Response:
        """What clients ask whose base URL lacks /v1."""
        raise ApiError(404, f"{http.method} {http.url.path}: no such route; the base URL ends in /v1")

    for path in ("/chat/completions", "/completions", "/models", "/files", "/fine_tuning/jobs"):
        application.add_api_route(path, outside, methods=["GET", "POST"], include_in_schema=False)
    if page is not None:
        application.mount("/", page)
    application.add_middleware(_Guard, key=key, hosts=hosts)
    return application


def _model_routes(catalog: Catalog) -> APIRouter:
    router = APIRouter(prefix="/v1")

    @router.get("/models")
    async def list_models() -> dict[str, object]:
        """All models."""
        return {"object": "list", "data": [catalog.entry(name) for name in catalog.names]}

    @router.get("/models/{name:path}")
    async def retrieve_model(name: str) -> dict[str, object]:
        """One model."""
        return catalog.entry(name)

    @router.delete("/models/{name:path}")
    def delete_model(name: str) -> dict[str, object]:
        """A model that a job has made; its run stays."""
        catalog.delete(name)
        return {"id": name, "object": "model", "deleted": True}

    return router


class _Guard:
    """ASGI middleware: requests call the server by its names, routes under `/v1` want the key, and bodies are small."""

    def __init__(self, app: ASGIApp, key: str, hosts: Sequence[str]) -> None:
        self._app, self._key, self._hosts = app, key.encode(), {host.strip("[]").lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (host := _host_of(scope)) not in self._hosts and "*" not in self._hosts:
            text = f"host: {host}; expected {', '.join(sorted(self._hosts))}; for other names start it with --host"
            await ApiError(400, text, code="invalid_host").response(scope, receive, send)
            return
        if scope["type"] != "http" or not (scope["path"] == "/v1" or scope["path"].startswith("/v1/")):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._key):
            text = "the API key is wrong or missing; send the server's as: Authorization: Bearer KEY"
            refusal = ApiError(401, text, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
            await refusal.response(scope, receive, send)
            return
        if scope["path"] != _UPLOADS:
            body, more = bytearray(), True
            while more and len(body) <= MAX_BODY_BYTES:
                message = await receive()
                body += message.get("body", b"")
                more = message.get("more_body", False)
            if len(body) > MAX_BODY_BYTES:
                refusal = ApiError(413, f"the body is over {MAX_BODY_BYTES:,} bytes; expected less")
                await refusal.response(scope, receive, send)
                return
            receive = replay(bytes(body), receive)
        await self._app(scope, receive, send)


def _host_of(scope: Scope) -> str:
    """By which name a request calls the server, without its port; empty if it says none."""
    try:
        return urllib.parse.urlsplit(f"//{Headers(scope=scope).get('host', '')}").hostname or ""
    except ValueError:
        return ""
