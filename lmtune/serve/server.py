"""The app's server: which address it binds, who may use it, which requests it answers, and how it ends.

    launch([load_for_inference("runs/support")], Address(port=7860))

Gradio's page is mounted on a FastAPI application, so our middleware stands before every route of Gradio's. Gradio has
routes that a chat never uses (uploads, files, a proxy, monitoring), and any website that the user visits can send
requests to 127.0.0.1. So a request passes only if it names a host of ours (else a foreign name that resolves to
127.0.0.1 could read the page), comes from our own page, asks for a route on the list, and is small.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lmtune.errors import ConfigError, LmtuneError
from lmtune.io.console import err, escape, out, progress

if TYPE_CHECKING:
    from lmtune.inference.chat_model import ChatModel
    from lmtune.serve.studio.conversation import Activity

DEFAULT_PORT = 7860
MAX_BODY_BYTES = 1_000_000
_PORTS_TRIED = 100
_DRAIN_SECONDS = 30.0
_DELIVERY_SECONDS = 1.0  # until the browser has what was handed to Gradio

_ROUTES = {
    "GET": re.compile(
        r"/|/(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json|pwa_icon(/\d+)?|logout)/?"
        r"|/(assets|static|svelte)/.+"
        r"|/gradio_api/(info|theme\.css|user|login_check|token|app_id|startup-events|queue/(data|status))/?"
        r"|/gradio_api/(heartbeat/.+|call/[^/]+/[^/]+/?)"
    ),
    "POST": re.compile(r"/login/?|/gradio_api/(queue/join|cancel|reset|run/predict|call/[^/]+)/?"),
}
_ROUTES["HEAD"] = _ROUTES["GET"]
_FILE_KEYS = frozenset({"path", "url", "meta", "_type"})
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data: "
    "blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'"
)


@dataclass(frozen=True)
class Address:
    """Where the app is served, and to whom.

    Attributes:
        host: the address to bind; other machines reach the app only if it is not 127.0.0.1.
        port: the first port tried.
        share: also through a public link of Gradio's.
        auth: "user:password", demanded of everyone; needed for anything but 127.0.0.1.

    Raises:
        ConfigError: others could reach the app without a password, or `auth` or `port` is malformed.
    """

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    share: bool = False
    auth: str | None = None

    def __post_init__(self) -> None:
        if self.auth is not None and not all(self.auth.partition(":")):
            raise ConfigError("--auth: expected user:password")
        if not 1 <= self.port <= 65535:
            raise ConfigError(f"--port: {self.port}; expected 1 to 65535")
        if self.auth is None and self.share:
            raise ConfigError("--share: anyone with the link could use the app; add --auth user:password")
        if self.auth is None and not self.is_local and not in_space():
            raise ConfigError(
                f"--host: at {self.host} other machines could use the app; add --auth user:password, "
                "or leave out --host to stay on this machine"
            )

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the address."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def allowed_hosts(self) -> list[str]:
        """The names by which a request may call us; any, where we cannot know what others call this machine."""
        return ["127.0.0.1", "localhost", "[::1]", "::1", self.host] if self.is_local and not self.share else ["*"]


def in_space() -> bool:
    """Whether this runs in a Hub Space, whose own front decides who gets in."""
    return bool(os.environ.get("SPACE_ID")) and bool(os.environ.get("SPACE_HOST"))


class Work(Protocol):
    """Answers of one kind that a server gives.

    Attributes:
        closing: no further answer is begun.
    """

    closing: bool

    @property
    def num_answering(self) -> int:
        """How many are under way."""

    def stop_all(self) -> None:
        """End them."""


def launch(models: Sequence[ChatModel], address: Address, examples: Sequence[Sequence[str]] = ()) -> None:
    """Serve the app until Ctrl-C or SIGTERM; answers under way are finished first.

    Args:
        models: to talk to; the first is the one chosen at first.
        address: where, and to whom.
        examples: for each model the questions that an empty conversation offers.

    Raises:
        LmtuneError: no port is free, or the server cannot start.
    """
    from lmtune.serve.studio.conversation import Activity

    activity = Activity()
    with progress("building the page"):
        application = build_application(models, address, activity, examples)
    run_server(application, address, [activity], "lmtune app: {}")


def run_server(
    application: ASGIApp, address: Address, works: Sequence[Work], said: str, check: Callable[[], None] = lambda: None
) -> None:  # fmt: skip
    """Serve an application until Ctrl-C or SIGTERM; answers under way are finished first.

    Args:
        application: to serve.
        address: where.
        works: whose answers are finished.
        said: is printed once the server listens, with its URL in place of `{}`.
        check: is called often; raises LmtuneError where there is nothing to serve any more.

    Raises:
        LmtuneError: no port is free, or the server cannot start.
    """
    with _listen(address) as listening:
        received: list[int] = []  # before the address is said, since who reads it may end the app at once
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: received.append(number))
        port = listening.getsockname()[1]
        if port != address.port:
            err.print(f"port {address.port} is taken, so the app is on {port}")
        shown = f"[{address.host}]" if ":" in address.host else address.host
        out.print(said.format(f"http://{shown}:{port}"))
        if address.share:
            from gradio.networking import setup_tunnel

            try:
                link = setup_tunnel("127.0.0.1", port, secrets.token_urlsafe(32), None, None)
            except Exception as error:
                raise LmtuneError(f"--share: no public link: {error}") from error
            out.print(f"public link: {escape(link)}")
        err.print("[dim]Ctrl-C stops it[/]")
        _serve(application, listening, works, received, check)


def build_application(
    models: Sequence[ChatModel], address: Address, activity: Activity, examples: Sequence[Sequence[str]] = ()
) -> FastAPI:
    """The page behind its middleware; arguments as of `launch`."""
    from gradio import mount_gradio_app

    from lmtune.serve.studio.page import CSS, HEAD, Page, theme

    place = "Everything stays on this computer." if address.is_local and not address.share else ""
    user, _, password = (address.auth or "").partition(":")
    page = Page(models, examples or [()] * len(models), activity, place).blocks
    application = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    mount_gradio_app(
        application, page, path="/", server_name=address.host, server_port=address.port,
        auth=(user, password) if address.auth else None, footer_links=[], run_history=False,
        max_file_size="1kb", enable_monitoring=False, ssr_mode=False, pwa=False, mcp_server=False, show_error=True,
        theme=theme(), css=CSS, head=HEAD,
    )  # fmt: skip
    hosts = ["*"] if in_space() else address.allowed_hosts
    application.add_middleware(RequestFilter, framed=in_space())
    application.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)
    return application


class RequestFilter:
    """ASGI middleware: only small requests of our own page to routes that a chat needs, without files.

    Answers carry a policy that keeps the browser from fetching anything from elsewhere, such as a picture that a
    model's answer links to. `framed`: other sites may show the page in a frame, as a Hub Space needs.
    """

    def __init__(self, app: ASGIApp, framed: bool = False) -> None:
        self._app = app
        self._policy = _POLICY if framed else f"{_POLICY}; frame-ancestors 'none'"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or say why not."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["content-security-policy"] = self._policy
                headers["x-content-type-options"] = "nosniff"
                headers["referrer-policy"] = "no-referrer"
            await send(message)

        headers = Headers(scope=scope)
        origin, route = headers.get("origin"), _ROUTES.get(scope["method"])
        refusal: tuple[int, str] | None = None
        if origin is not None and origin.lower().partition("://")[2] != headers.get("host", "").lower():
            refusal = 403, "requests from other sites are refused"
        elif route is None or not route.fullmatch(scope["path"]):
            refusal = 404, "there is nothing here"
        elif scope["method"] == "POST":
            body, more = b"", True
            while more and len(body) <= MAX_BODY_BYTES:
                message = await receive()
                body += message.get("body", b"")
                more = message.get("more_body", False)
            refusal = _body_refusal(body, is_json=not scope["path"].startswith("/login"))
            receive = replay(body, receive)
        if refusal is None:
            await self._app(scope, receive, send_with_headers)
        else:
            await PlainTextResponse(f"{refusal[1]}\n", refusal[0])(scope, receive, send_with_headers)


def _body_refusal(body: bytes, is_json: bool) -> tuple[int, str] | None:
    """Status and reason for a body that is not small JSON without files.

    Gradio copies the file that `path` names, whatever that is, and fetches what `url` names, before it calls a function
    of ours.
    """

    def refuse_files(found: dict[str, Any]) -> None:
        if not _FILE_KEYS.isdisjoint(found):
            raise LmtuneError(f"body: an object with one of {', '.join(sorted(_FILE_KEYS))}; files are not accepted")

    if len(body) > MAX_BODY_BYTES:
        return 413, f"a request may hold at most {MAX_BODY_BYTES} bytes"
    try:
        if is_json:
            json.loads(body, object_hook=refuse_files)
    except LmtuneError as error:
        return 422, str(error)
    except (ValueError, RecursionError):
        return 400, "body: expected JSON"
    return None


def replay(body: bytes, receive: Receive) -> Receive:
    """Gives `body`, which was read already, then whatever comes: that the client leaves."""
    rest: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return rest.pop() if rest else await receive()

    return receive_again


def _serve(
    application: ASGIApp, listening: socket.socket, works: Sequence[Work], received: list[int],
    check: Callable[[], None],
) -> None:  # fmt: skip
    """Run `application` until a signal is in `received`; answers under way are finished, or at a second signal stopped.

    Raises:
        LmtuneError: the server cannot start.
    """
    import uvicorn

    config = uvicorn.Config(
        application, log_level="error", access_log=False, proxy_headers=in_space(), server_header=False,
        # The same server whatever is installed beside it: uvicorn would take uvloop and httptools where it finds them.
        loop="asyncio", http="h11", ws="none",
        timeout_keep_alive=60,  # a busy server comes late to a connection used again
    )  # fmt: skip
    server = uvicorn.Server(config)
    # In a thread uvicorn leaves the signals to us. Open pages keep their streams, so the thread ends with the process.
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="lmtune-server", daemon=True)
    thread.start()
    while not received and thread.is_alive():
        check()
        time.sleep(0.1)
    if not received:
        raise LmtuneError("the server ended by itself; LMTUNE_TRACEBACK=1 may show why")
    for work in works:
        work.closing = True

    def num_answering() -> int:
        return sum(work.num_answering for work in works)

    if num_answering():
        err.print(f"finishing {num_answering()} answer(s); Ctrl-C again stops at once")
        _wait(lambda: num_answering() == 0 or len(received) > 1, _DRAIN_SECONDS)
        for work in works:
            work.stop_all()
        _wait(lambda: num_answering() == 0, _DELIVERY_SECONDS)
        time.sleep(_DELIVERY_SECONDS)
    server.should_exit = True
    thread.join(1)


def _wait(until: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not until() and time.monotonic() < end:
        time.sleep(0.05)


def _listen(address: Address) -> socket.socket:
    """A socket that listens at the first free port from `address.port` on.

    Raises:
        ConfigError: the host is not ours, or all ports are taken.
    """
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    for port in range(address.port, min(address.port + _PORTS_TRIED, 65536)):
        # By the protocol's number asyncio knows to send small packets at once; else each answer may wait for 40 ms.
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((address.host, port))
            listening.listen(256)
        except OSError as error:
            listening.close()
            reason = error.strerror or str(error)
        else:
            return listening
    raise ConfigError(f"--host, --port: cannot listen at {address.host}:{address.port} or the ports after it: {reason}")
