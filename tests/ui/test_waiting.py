"""Questions that nobody waits for are dropped, and no session leaves anything behind in Gradio's queue."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from lmtune.serve.guard import Guard
from tests.chat_models import parrot
from tests.ui.client import GOOD, Client, wait_until_idle
from tests.ui.conftest import RunningApp

pytestmark = pytest.mark.slow  # seconds together; left out of `make test-fast`

JOIN = "/gradio_api/queue/join"
LONG = ["count", *GOOD[:5], 3000, ""]  # 30 seconds


@pytest.fixture(scope="module")
def app(start_app: Callable[..., Iterator[RunningApp]]) -> Iterator[RunningApp]:
    """A parrot that takes 10 ms a token and drops questions after 0.3 s."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmtune.serve.waiting.PATIENCE_SECONDS", 0.3)
        yield from start_app(parrot(0.01))


def wait_until_answering(app: RunningApp) -> None:
    end = time.monotonic() + 10
    while not app.activity.num_answering:
        assert time.monotonic() < end
        time.sleep(0.02)


def wait_until_nothing_is_left(app: RunningApp) -> None:
    queue, end = app.page._queue, time.monotonic() + 5
    while left := [*queue.pending_event_ids_session, *queue.pending_messages_per_session, *queue.event_ids_to_events]:
        assert time.monotonic() < end, left
        time.sleep(0.02)


def read_a_little(client: Client, path: str, parameters: dict[str, str]) -> None:
    with client.http.stream("GET", path, params=parameters) as answer:
        for line in answer.iter_lines():
            if "generating" in line:
                return


def test_a_question_whose_client_never_listens_is_dropped(app: RunningApp) -> None:
    client = Client(app, "never")
    assert client.join("send", LONG).status_code == 200
    client.http.close()
    wait_until_answering(app)
    wait_until_idle(app, 4)
    wait_until_nothing_is_left(app)
    late = httpx.get(f"{app.url}/gradio_api/queue/data", params={"session_hash": "never"})
    assert (late.status_code, "ask first" in late.text) == (404, True)


def test_so_is_one_by_name(app: RunningApp) -> None:
    assert httpx.post(f"{app.url}/gradio_api/call/send", json={"data": LONG}).status_code == 200
    wait_until_answering(app)
    wait_until_idle(app, 4)
    wait_until_nothing_is_left(app)


@pytest.mark.parametrize("session", [None, "named"])
def test_who_listens_hears_it_whole_however_long_it_takes(app: RunningApp, session: str | None) -> None:
    data = ["Hello", *GOOD[:5], 50, ""]
    body = {"data": ["count", *data[1:]]} | ({"session_hash": session} if session else {})
    event = httpx.post(f"{app.url}/gradio_api/call/send", json=body).json()["event_id"]
    by_name = httpx.get(f"{app.url}/gradio_api/call/send/{event}", timeout=20).text
    assert "event: complete" in by_name
    assert "50 tokens" in by_name
    wait_until_nothing_is_left(app)


def test_a_client_that_breaks_off_leaves_nothing(app: RunningApp) -> None:
    client = Client(app, "breaks off")
    assert client.join("send", LONG).status_code == 200
    read_a_little(client, "/gradio_api/queue/data", {"session_hash": "breaks off"})
    client.http.close()
    wait_until_idle(app, 4)
    wait_until_nothing_is_left(app)


def test_a_session_goes_on_after_pauses(app: RunningApp) -> None:
    client = Client(app, "goes on")
    for pause in (0.0, 0.4, 0.0):
        assert "You asked: Hello" in str(client.run("send", ["Hello", *GOOD])["output"])
        time.sleep(pause)
    wait_until_nothing_is_left(app)


@pytest.mark.parametrize("leaves", [True, False])
def test_a_client_that_leaves_while_its_question_is_taken_up_is_noted(leaves: bool) -> None:
    noted: list[Any] = []
    asked = [b'{"data": [], "session_hash": "s"}']

    class Waiting:
        def asked(self, session: str, has_gone: bool) -> None:
            noted.append((session, has_gone))

    async def receive() -> Any:
        if asked:
            return {"type": "http.request", "body": asked.pop(0)}
        if not (leaves and noted):
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def application(scope: Any, receive: Any, send: Any) -> None:
        noted.append("taken up")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b'{"event_id": "e"}'})

    async def send(message: Any) -> None:
        pass

    scope = {"type": "http", "method": "POST", "path": JOIN, "headers": [(b"host", b"localhost")]}
    asyncio.run(Guard(application, waiting=Waiting())(scope, receive, send))  # type: ignore[arg-type]
    assert noted == ["taken up", ("s", leaves)]
