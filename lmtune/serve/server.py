"""Serving the app: which address, behind the guard, until Ctrl-C or SIGTERM, with answers under way finished first.

The page is mounted on a FastAPI application of ours and run by uvicorn, rather than by `Blocks.launch`: so the guard
stands before every route of Gradio's, and stopping is ours to order.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lmtune.errors import ConfigError, LmtuneError
from lmtune.inference.load import LoadedModel
from lmtune.io.console import err, escape, out, progress
from lmtune.serve.guard import LOOPBACK, Guard
from lmtune.serve.studio.conversation import Activity

DEFAULT_PORT = 7860
_PORTS_TRIED = 100
_DRAIN_SECONDS = 30.0
_DELIVERY_SECONDS = 2.0


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
        if self.auth is not None:
            user, colon, password = self.auth.partition(":")
            if not (user and colon and password):
                raise ConfigError("--auth: should be user:password")
        if not 1 <= self.port <= 65535:
            raise ConfigError(f"--port: got {self.port}; should be from 1 to 65535")
        if self.auth is None and self.share:
            raise ConfigError("--share: anyone with the link could use the app; add --auth user:password")
        if self.auth is None and not self.is_local and not in_space():
            raise ConfigError(
                f"--host: at {self.host} other machines could use the app; add --auth user:password, "
                "or leave out --host to stay on this machine"
            )

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the app."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def hosts(self) -> frozenset[str] | None:
        """The names that a request may call us by; None is any, where we cannot know what others call this machine."""
        return LOOPBACK | {self.host} if self.is_local and not self.share else None


def in_space() -> bool:
    """Whether this runs in a Hub Space, whose own front decides who gets in."""
    return bool(os.environ.get("SPACE_ID")) and bool(os.environ.get("SPACE_HOST"))


def launch(
    models: LoadedModel | Sequence[LoadedModel],
    address: Address,
    examples: Sequence[str] | Sequence[Sequence[str]] = (),
) -> None:
    """Serve the app until Ctrl-C or SIGTERM.

    Raises:
        LmtuneError: no port is free, or the server cannot start.
    """
    activity = Activity()
    with progress("building the page"):
        application = build_application(models, address, activity, examples)
    with _listen(address) as listening, _signals() as received:
        port = listening.getsockname()[1]
        if port != address.port:
            err.print(f"port {address.port} is taken, so the app is on {port}")
        shown = f"[{address.host}]" if ":" in address.host else address.host
        out.print(f"lmtune app: http://{shown}:{port}")
        if address.share:
            out.print(f"public link: {escape(_tunnel(port))}")
        err.print("[dim]Ctrl-C stops it[/]")
        _serve(application, listening, activity, received)


def build_application(
    models: LoadedModel | Sequence[LoadedModel],
    address: Address,
    activity: Activity,
    examples: Sequence[str] | Sequence[Sequence[str]] = (),
) -> Guard:
    """The page as an ASGI application behind its guard."""
    from fastapi import FastAPI
    from gradio import mount_gradio_app

    from lmtune.serve.calls import Calls
    from lmtune.serve.studio.page import build_app
    from lmtune.serve.studio.script import HEAD
    from lmtune.serve.studio.style import CSS, theme
    from lmtune.serve.waiting import Waiting

    place = "Everything stays on this computer." if address.is_local and not address.share else ""
    outer = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    user, _, password = (address.auth or "").partition(":")
    page = build_app(models, examples, activity, place)
    mount_gradio_app(
        outer, page, path="/", server_name=address.host,
        server_port=address.port, auth=(user, password) if address.auth else None, footer_links=[], run_history=False,
        max_file_size="1kb", enable_monitoring=False, ssr_mode=False, pwa=False, mcp_server=False, show_error=True,
        theme=theme(), css=CSS, head=HEAD,
    )  # fmt: skip
    hosts = None if in_space() else address.hosts
    return Guard(outer, hosts, framed=in_space(), calls=Calls(page), waiting=Waiting(page))


def _serve(application: Guard, listening: socket.socket, activity: Activity, received: list[int]) -> None:
    """Run `application` until a signal is received; answers under way are finished, or at a second signal stopped.

    Raises:
        LmtuneError: the server cannot start.
    """
    import uvicorn

    config = uvicorn.Config(
        application, log_level="error", access_log=False, ws="none", proxy_headers=in_space(), server_header=False,
        timeout_graceful_shutdown=2, timeout_keep_alive=60,  # a busy server comes late to a connection used again
    )  # fmt: skip
    server = uvicorn.Server(config)
    # In a thread uvicorn leaves the signals to us.
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="lmtune-server", daemon=True)
    thread.start()
    while not received and thread.is_alive():
        time.sleep(0.1)
    if not received:
        raise LmtuneError("the app's server ended by itself; LMTUNE_TRACEBACK=1 may show why")
    _drain(activity, received)
    application.close()
    server.should_exit = True
    thread.join(10)


def _drain(activity: Activity, received: list[int]) -> None:
    """Let answers under way come to their end, but not for ever."""
    activity.closing = True
    if activity.num_answering:
        err.print(f"finishing {activity.num_answering} answer(s); Ctrl-C again stops at once")
    _wait(lambda: activity.num_answering == 0 or len(received) > 1, _DRAIN_SECONDS)
    activity.stop_all()
    if activity.num_pages_drawing:
        _wait(lambda: activity.num_pages_drawing == 0, _DELIVERY_SECONDS)
        time.sleep(_DELIVERY_SECONDS / 4)  # what was handed to Gradio is on its way to the browser


def _wait(until: Callable[[], bool], seconds: float) -> None:
    """Return when `until` holds, or after `seconds`."""
    end = time.monotonic() + seconds
    while not until() and time.monotonic() < end:
        time.sleep(0.05)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """The list fills with the signals that ask us to end."""
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _listen(address: Address) -> Iterator[socket.socket]:
    """A socket that listens at the first free port from `address.port` on.

    Raises:
        ConfigError: the host is not ours, or all ports are taken.
    """
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    last = min(address.port + _PORTS_TRIED, 65536)
    for port in range(address.port, last):
        # By the protocol's number asyncio knows to send small packets at once; else each answer may wait for 40 ms.
        listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((address.host, port))
            listening.listen(256)
        except OSError as error:
            listening.close()
            if error.errno not in (13, 98, 48):  # permission denied, and address in use on Linux and macOS
                raise ConfigError(f"--host: cannot listen at {address.host}: {error.strerror or error}") from None
            continue
        with contextlib.closing(listening):
            yield listening
        return
    raise ConfigError(f"--port: none from {address.port} to {last - 1} is free at {address.host}; give another --port")


def _tunnel(port: int) -> str:
    """A public link to the port, through Gradio's service.

    Raises:
        LmtuneError: the service cannot be reached.
    """
    from gradio.networking import setup_tunnel

    try:
        return str(setup_tunnel("127.0.0.1", port, secrets.token_urlsafe(32), None, None))
    except Exception as error:
        raise LmtuneError(f"--share: no public link to be had: {error}") from error
