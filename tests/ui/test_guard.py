"""Who the running app answers, about what, and what every answer carries."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from lmtune.serve.guard import MAX_BODY_BYTES, Guard
from tests.chat_models import parrot
from tests.ui.conftest import RunningApp

pytestmark = pytest.mark.slow  # seconds together; left out of `make test-fast`

JOIN = "/gradio_api/queue/join"


def raw_status(app: RunningApp, request: bytes) -> int:
    """The status that answers `request`, which need not be one that an HTTP library would send."""
    with socket.create_connection(("127.0.0.1", int(app.url.rpartition(":")[2])), timeout=10) as connection:
        connection.sendall(request)
        return int(connection.recv(65536).split()[1])


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "localhost:9999", "[::1]:7860", "LOCALHOST"])
def test_our_own_names_are_answered(app: RunningApp, host: str) -> None:
    answer = httpx.get(f"{app.url}/", headers={"Host": host})
    assert answer.status_code == 200
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert "connect-src 'self'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:7860",
        "127.0.0.1.evil.example",
        "",
        "localhost@evil.example",
        "[bad",
        "a b",
        "evil@127.0.0.1",
        "localhost#.evil.example",
        "localhost/evil",
        "localhost?x",
        "127.0.0.1:99999999",
    ],
)
def test_foreign_names_are_not(app: RunningApp, host: str) -> None:
    assert httpx.get(f"{app.url}/", headers={"Host": host}).status_code in (400, 421)


def test_two_host_headers_are_not_ours(app: RunningApp) -> None:
    assert raw_status(app, b"GET /config HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n") in (400, 421)


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:1", "file://", "http://[bad"])
def test_other_sites_may_not_ask(app: RunningApp, origin: str) -> None:
    body = {"data": [], "fn_index": 0, "session_hash": "a"}
    answer = httpx.post(app.url + JOIN, json=body, headers={"Origin": origin})
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
@pytest.mark.parametrize("path", ["/config", "/logout", "/theme.css", "/gradio_api/info"])
def test_other_sites_may_not_read_either(app: RunningApp, path: str, site: str) -> None:
    """A browser says where a picture or a script that a page asks for is wanted, though not by Origin."""
    headers = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "no-cors"}
    assert httpx.get(app.url + path, headers=headers).status_code == 403
    assert httpx.get(app.url + path, headers={**headers, "Sec-Fetch-Mode": "navigate"}).status_code == 403


def test_a_link_leads_to_the_page(app: RunningApp) -> None:
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert httpx.get(app.url + "/?__theme=dark", headers=headers).status_code == 200
    assert httpx.get(app.url + "/config", headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200


def test_a_body_that_does_not_come_is_not_waited_for(app: RunningApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmtune.serve.guard._BODY_SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", int(app.url.rpartition(":")[2])), timeout=5) as connection:
        connection.sendall(f"POST {JOIN} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{{".encode())
        assert connection.recv(65536).split()[1] == b"408"


def test_our_own_page_may(app: RunningApp) -> None:
    body = {"data": ["x"], "fn_index": 999, "session_hash": "a"}
    assert httpx.post(app.url + JOIN, json=body, headers={"Origin": app.url}).status_code != 403


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/gradio_api/upload"), ("POST", "/upload"), ("GET", "/gradio_api/upload_progress"),
        ("GET", "/monitoring"), ("GET", "/monitoring/summary"), ("GET", "/gradio_api/proxy=http://evil.example"),
        ("GET", "/gradio_api/file=/etc/passwd"), ("GET", "/gradio_api/file/etc/passwd"), ("GET", "/openapi.json"),
        ("POST", "/gradio_api/component_server"), ("POST", "/gradio_api/vibe-edit"), ("POST", "/gradio_api/run/send"),
        ("POST", "/gradio_api/process_recording"), ("GET", "/docs"), ("GET", "/gradio_api/runs"), ("PUT", "/"),
        ("DELETE", "/config"), ("OPTIONS", "/config"), ("GET", "//evil.example"), ("GET", "/gradio_api/dev/reload"),
    ],
)  # fmt: skip
def test_what_a_chat_does_not_need_is_closed(app: RunningApp, method: str, path: str) -> None:
    assert httpx.request(method, app.url + path).status_code == 404


@pytest.mark.parametrize(
    "path", ["/", "/config", "/theme.css", "/gradio_api/info", "/gradio_api/app_id", "/robots.txt"]
)
def test_what_it_needs_is_open(app: RunningApp, path: str) -> None:
    assert httpx.get(app.url + path).status_code == 200


def test_a_large_body_is_refused_with_and_without_its_length(app: RunningApp) -> None:
    large = b"x" * (MAX_BODY_BYTES + 1)
    assert httpx.post(app.url + JOIN, content=large).status_code == 413
    head = f"POST {JOIN} HTTP/1.1\r\nHost: localhost\r\nContent-Length: ".encode()
    assert raw_status(app, head + b"9" * 30 + b"\r\n\r\n{}") in (400, 413)
    assert raw_status(app, head + b"-1\r\n\r\n{}") in (400, 413)

    def parts() -> Iterator[bytes]:
        for _ in range(200):
            yield b"x" * 10_000

    try:
        code = httpx.post(app.url + JOIN, content=parts()).status_code
    except httpx.TransportError:
        code = 413  # cut off in the middle
    assert code >= 400
    assert httpx.get(f"{app.url}/config").status_code == 200


def test_with_a_password_nothing_is_told_without_it(start_app: Callable[..., Iterator[RunningApp]]) -> None:
    running = start_app(parrot(name="secret-name"), auth="me:pass:word")
    app = next(running)
    with httpx.Client(base_url=app.url) as client:
        assert client.get("/config").status_code == 401
        assert client.get("/gradio_api/info").status_code == 401
        assert client.post(JOIN, json={"data": [], "fn_index": 0, "session_hash": "a"}).status_code == 401
        assert client.post("/gradio_api/call/nobody", json={"data": []}).status_code == 401
        file = {"path": "/dev/zero", "meta": {"_type": "gradio.FileData"}}
        assert client.post(JOIN, json={"data": [file], "fn_index": 0, "session_hash": "a"}).status_code == 401
        assert client.post("/gradio_api/cancel", content=b'{"session_hash": NaN}').status_code == 400
        assert (
            client.post("/gradio_api/cancel", json={"session_hash": "a", "event_id": "b", "fn_index": 0}).status_code
            == 401
        )
        assert client.post("/gradio_api/reset", json={"event_id": "b"}).status_code == 401
        assert client.get("/gradio_api/queue/data", params={"session_hash": "a"}).status_code == 401
        assert "secret-name" not in client.get("/").text
        assert client.post("/login", data={"username": "me", "password": "pass"}).status_code == 400
        assert client.post("/login", data={"username": "me", "password": "pass:word"}).status_code == 200
        assert "secret-name" in client.get("/config").text
    next(running, None)


@pytest.mark.parametrize("stays", [True, False])
def test_a_question_is_passed_on_only_while_its_client_waits_for_it(stays: bool) -> None:
    parts = [b'{"data": ', b"[]}"]
    asked: list[bytes] = []

    async def receive() -> Any:
        if parts:
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}
        if stays:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def application(scope: Any, receive: Any, send: Any) -> None:
        more = True
        while more:
            message = await receive()
            asked.append(message["body"])
            more = message["more_body"]

    async def send(message: Any) -> None:
        raise AssertionError("nobody is there to be answered")

    scope = {"type": "http", "method": "POST", "path": JOIN, "headers": [(b"host", b"localhost")]}
    asyncio.run(Guard(application)(scope, receive, send))
    assert b"".join(asked) == (b'{"data": []}' if stays else b"")


def test_websockets_are_refused() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def never(*arguments: Any) -> None:
        raise AssertionError("let through")

    asyncio.run(Guard(never)({"type": "websocket", "path": "/", "headers": []}, never, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_an_address_that_others_reach_answers_to_any_name_but_to_its_own_pages_only() -> None:
    async def passed(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    transport = httpx.ASGITransport(app=Guard(passed, hosts=None))  # type: ignore[arg-type]

    async def codes() -> list[int]:
        async with httpx.AsyncClient(transport=transport, base_url="http://my-pc.example:7860") as client:
            origins = ["http://my-pc.example:7860", "http://evil.example"]
            return [(await client.get("/", headers={"Origin": origin})).status_code for origin in origins]

    assert asyncio.run(codes()) == [200, 403]
