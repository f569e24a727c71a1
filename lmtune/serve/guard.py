"""Who may talk to the app, and about what: a thin layer before Gradio that turns everything else away.

Gradio answers whatever host name a request carries, takes JSON from pages of other sites, and has routes that a chat
never uses: uploads, a proxy, monitoring. Here a request is let through only if it names a host that is ours (else a
foreign name that resolves to 127.0.0.1 could read the page), comes from our own page if it says where it comes from,
asks for something the chat needs, and is small. What goes back carries a policy that keeps the browser from fetching
anything from elsewhere, such as a picture that a model's answer links to.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import SplitResult, parse_qs, urlsplit

from lmtune.errors import LmtuneError
from lmtune.serve.calls import Calls, read_body
from lmtune.serve.waiting import Waiting

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY_BYTES = 1_000_000
_BODY_SECONDS = 60.0  # for all of it
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})

_READ = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json|pwa_icon(/\d+)?|logout)/?"
    r"|/(assets|static|svelte)/.+"
    r"|/gradio_api/(info|theme\.css|user|login_check|token|app_id|startup-events|queue/(data|status))/?"
    r"|/gradio_api/(heartbeat/.+|call/[^/]+/[^/]+/?)"
)
_WRITE = re.compile(r"/login/?|/gradio_api/(queue/join|cancel|reset|run/predict|call/[^/]+)/?")
_CONTROL = re.compile(r"/gradio_api/(cancel|reset)/?")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:\d{1,5})?")
_QUESTION = re.compile(r"/gradio_api/(queue/join|call/[^/]+)/?")
_CALL = re.compile(rf"{_QUESTION.pattern}|/gradio_api/run/predict/?")
_LOGIN = re.compile(r"/login/?")  # a form; every other body is JSON
_STREAM = re.compile(r"/gradio_api/(queue/data|call/[^/]+/([^/]+))/?")
_TOO_LARGE = (413, f"a request may hold at most {MAX_BODY_BYTES} bytes")
_LOGIN_CHECK = "/gradio_api/login_check"
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data: "
    "blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'"
)


class Guard:
    """An ASGI application around another.

    Args:
        app: the application.
        hosts: names that a request may call us by, without port; None is any name.
        framed: other sites may show the page in a frame, as a Hub Space needs.
        calls: what a call has to hold; None lets any pass.
        waiting: told who asks and who listens.
    """

    def __init__(
        self,
        app: App,
        hosts: frozenset[str] | None = LOOPBACK,
        framed: bool = False,
        calls: Calls | None = None,
        waiting: Waiting | None = None,
    ) -> None:
        self._app, self._hosts, self._calls, self._waiting = app, hosts, calls, waiting
        self._closing: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self._turn = asyncio.Lock()
        policy = _POLICY if framed else f"{_POLICY}; frame-ancestors 'none'"
        self._headers = [
            (b"content-security-policy", policy.encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"no-referrer"),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer why not."""
        if scope["type"] == "lifespan":
            self._closing = asyncio.get_running_loop(), asyncio.Event()
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif (refusal := self._refusal(scope)) is not None:
            await _answer(send, *refusal)
        else:
            await self._pass_on(scope, receive, send)

    def close(self) -> None:
        """Tell every open connection that its client has gone, so that streams without an end, as a page's heartbeat
        is one, do not keep the server from ending; may be called from any thread."""
        if self._closing is not None:
            loop, event = self._closing
            loop.call_soon_threadsafe(event.set)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Status and reason, or None for a request that may pass."""
        headers = _single_headers(scope)
        host = headers.get("host", "")
        if self._hosts is not None and _hostname(host) not in self._hosts:
            return 421, f"this app answers to {', '.join(sorted(self._hosts))} only"
        origin = headers.get("origin")
        if origin is not None and _split(origin).netloc.lower() != host.lower():
            return 403, "requests from other sites are refused"
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not _is_visit(scope, headers):
            return 403, "requests from other sites are refused"
        allowed = {"GET": _READ, "HEAD": _READ, "POST": _WRITE}.get(scope["method"])
        if allowed is None or allowed.fullmatch(scope["path"]) is None:
            return 404, "there is nothing here"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            return _TOO_LARGE
        return None

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application, unless it is called wrongly, or the client of a question has gone before its turn."""
        if scope["method"] == "GET" and self._waiting is not None and _STREAM.fullmatch(scope["path"]) is not None:
            session = _session(scope, self._waiting)
            if not self._waiting.knows(session) and await self._may_enter(scope):
                await _answer(send, 404, "nothing is waiting in this session: ask first, and listen soon")
                return
            with self._waiting.listening(session):
                await self._run(scope, receive, send, [])
        elif scope["method"] != "POST" or _LOGIN.fullmatch(scope["path"]) is not None:
            await self._run(scope, receive, send, [])
        else:
            try:
                body = await asyncio.wait_for(_whole_body(receive), _BODY_SECONDS)
            except TimeoutError:
                await _answer(send, 408, "the body did not come")
                return
            if body is not None:
                await self._pass_on_body(scope, receive, send, body)

    async def _pass_on_body(
        self, scope: Scope, receive: Receive, send: Send, body: list[MutableMapping[str, Any]]
    ) -> None:
        """Run the application for a request whose body is JSON, unless that is malformed or no call of ours."""
        content = b"".join(message.get("body", b"") for message in body)
        if len(content) > MAX_BODY_BYTES:
            await _answer(send, *_TOO_LARGE)
            return
        try:
            call = read_body(content)
        except LmtuneError as error:  # said to anyone, as it is about nothing of ours
            await _answer(send, 400, str(error))
            return
        is_call = _CALL.fullmatch(scope["path"]) is not None
        refusal = self._calls.refusal(scope["path"], call) if self._calls is not None and is_call else None
        if refusal is not None and await self._may_enter(scope):
            await _answer(send, *refusal)
        elif _CONTROL.fullmatch(scope["path"]) is not None and not await self._may_enter(scope):
            await _answer(send, 401, "log in first")
        elif _QUESTION.fullmatch(scope["path"]) is None:
            await self._run(scope, receive, send, body)
        else:
            await self._take_up(scope, receive, send, body, call)

    async def _take_up(
        self, scope: Scope, receive: Receive, send: Send, body: list[MutableMapping[str, Any]], call: dict[str, Any]
    ) -> None:
        """Hand on a question, and note whose it is."""
        answer: dict[str, Any] = {"status": 0, "body": b"", "gone": False}

        async def noted(message: MutableMapping[str, Any]) -> None:
            answer["status"] = message.get("status", answer["status"])
            answer["body"] += message.get("body", b"")
            answer["gone"] = answer["gone"] or await _has_gone(receive)  # after the answer nobody can tell any more
            await send(message)

        # One at a time: taking up a question is work for Gradio. A client that leaves while it stands in line is
        # seen then, where otherwise its question would be queued and answered for nobody.
        async with self._turn:
            if not await _has_gone(receive):
                await self._run(scope, receive, noted, body)
        if self._waiting is not None and answer["status"] == 200:
            session = call.get("session_hash") or read_body(answer["body"]).get("event_id")
            self._waiting.asked(str(session), answer["gone"])

    async def _may_enter(self, scope: Scope) -> bool:
        """Whether the application knows who asks: others are not even told what is wrong with their call."""
        found: list[int] = []

        async def nothing() -> MutableMapping[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def note(message: MutableMapping[str, Any]) -> None:
            found.append(message.get("status", 0))

        question = {"method": "GET", "path": _LOGIN_CHECK, "raw_path": _LOGIN_CHECK.encode(), "query_string": b""}
        await self._app({**scope, **question}, nothing, note)
        return found[0] == 200

    async def _run(self, scope: Scope, receive: Receive, send: Send, body: list[MutableMapping[str, Any]]) -> None:
        """Run the application, with what it reads bounded and what it sends marked; `body` was read already."""
        read = 0

        async def bounded() -> MutableMapping[str, Any]:
            nonlocal read
            message = body.pop(0) if body else await self._unless_closing(receive)
            read += len(message.get("body", b""))
            # A body without a length, in chunks: to the application it is as if the client had gone.
            return {"type": "http.disconnect"} if read > MAX_BODY_BYTES else message

        async def marked(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                names = {name for name, _ in self._headers}
                kept = [(name, value) for name, value in message.get("headers", []) if name.lower() not in names]
                message = {**message, "headers": [*kept, *self._headers]}
            await send(message)

        await self._app(scope, bounded, marked)

    async def _unless_closing(self, receive: Receive) -> MutableMapping[str, Any]:
        """What the client sends next; that it has gone, once we close."""
        if self._closing is None:
            return await receive()
        message, closing = asyncio.ensure_future(receive()), asyncio.ensure_future(self._closing[1].wait())
        try:
            await asyncio.wait((message, closing), return_when=asyncio.FIRST_COMPLETED)
            return message.result() if message.done() else {"type": "http.disconnect"}
        finally:
            message.cancel()
            closing.cancel()


async def _whole_body(receive: Receive) -> list[MutableMapping[str, Any]] | None:
    """The messages of a request's body, as far as it may go; None if the client leaves in the middle."""
    messages: list[MutableMapping[str, Any]] = []
    size = 0
    while size <= MAX_BODY_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        messages.append(message)
        size += len(message.get("body", b""))
        if not message.get("more_body"):
            break
    return messages


async def _has_gone(receive: Receive) -> bool:
    """Whether the client of a request that was read to its end has closed the connection."""
    message = asyncio.ensure_future(receive())
    await asyncio.wait((message,), timeout=0)
    if message.done():
        return bool(message.result()["type"] == "http.disconnect")
    message.cancel()
    return False


def _session(scope: Scope, waiting: Waiting) -> str:
    """Whose stream is asked for."""
    found = _STREAM.fullmatch(scope["path"])
    if found is not None and found[2]:
        return waiting.session_of(found[2])
    query: bytes = scope["query_string"]
    return parse_qs(query.decode("latin-1")).get("session_hash", [""])[-1]


def _single_headers(scope: Scope) -> dict[str, str]:
    """Header values by name; where a client repeats one, both, so that neither can hide behind the other."""
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        key = name.decode("latin-1").lower()
        text = value.decode("latin-1").strip()
        found[key] = f"{found[key]}, {text}" if key in found else text
    return found


def _hostname(host: str) -> str | None:
    """The name in a Host header, None where that is more than a name and a port."""
    return _split(f"//{host}").hostname if _HOST.fullmatch(host) else None


def _is_visit(scope: Scope, headers: dict[str, str]) -> bool:
    """Whether a link, or a frame, of another site leads to the page itself."""
    return scope["method"] == "GET" and scope["path"] == "/" and headers.get("sec-fetch-mode") == "navigate"


def _split(url: str) -> SplitResult:
    """The parts of `url`, all empty if it is malformed."""
    try:
        return urlsplit(url)
    except ValueError:
        return SplitResult("", "", "", "", "")


async def _answer(send: Send, code: int, reason: str) -> None:
    body = f"{reason}\n".encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": code, "headers": headers})
    await send({"type": "http.response.body", "body": body})
