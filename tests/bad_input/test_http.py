"""Requests as no page sends them: each is refused with a reason, and the next good one is answered.

Who may ask at all (foreign Host and Origin, closed routes, files, passwords) is in tests/ui/test_server.py.
"""

from __future__ import annotations

import html
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.chat_models import parrot
from tests.ui.client import GOOD, JOIN, Client, wait_until
from tests.ui.conftest import RunningApp, start

pytestmark = pytest.mark.slow  # after each request the app must answer another


@pytest.fixture(scope="module")
def app() -> Iterator[RunningApp]:
    """A parrot behind the middleware."""
    yield from start(parrot())


@pytest.fixture(autouse=True)
def goes_on(app: RunningApp) -> Iterator[None]:
    """Afterwards the app answers."""
    yield
    assert "You asked: Hello" in str(
        Client(app.url, f"after {time.monotonic()}").run("send", ["Hello", *GOOD])["output"]
    )
    wait_until(lambda: not app.activity.num_answering)


@pytest.mark.parametrize(
    "body",
    [
        b'{"data": ["Hello", 0, "tun', b"", b'{"data": ["\xff"]}', b"[]", b"[" * 100_000 + b"]" * 100_000,
        b'{"data": 3, "fn_index": 0, "session_hash": "a"}',
    ],
    ids=range(6),
)  # fmt: skip
def test_a_malformed_body_is_refused(app: RunningApp, body: bytes) -> None:
    for path in (JOIN, "/gradio_api/call/send", "/gradio_api/run/predict", "/gradio_api/cancel", "/gradio_api/reset"):
        answer = httpx.post(app.url + path, content=body, headers={"Content-Type": "application/json"}, timeout=20)
        assert 400 <= answer.status_code < 500, (path, answer.text)
        assert "File " not in answer.text


@pytest.mark.parametrize(
    ("place", "value", "message"),  # place in GOOD
    [
        (3, -1, "temperature: -1; expected a number, 0 or more"), (3, None, "temperature: None"),
        (4, 0, "top_p: 0; expected a number above 0 and at most 1"), (5, 2.5, "max_new_tokens: 2.5"),
        (6, "-1", "seed: '-1'; expected an integer from 0 to 4294967295"), (6, "\u00b2", "seed: "),
    ],
)  # fmt: skip
def test_a_setting_out_of_bounds_is_named(app: RunningApp, place: int, value: Any, message: str) -> None:
    settings = [*GOOD]
    settings[place] = value
    found = html.unescape(str(Client(app.url, f"{place} {value}").run("send", ["Hello", *settings])["output"]))
    assert message in found
    assert "Traceback" not in found
    assert "You asked" not in found


def test_an_empty_question_is_refused(app: RunningApp) -> None:
    for question in (None, " \n "):
        found = str(Client(app.url, f"text {question}").run("send", [question, *GOOD])["output"])
        assert "question is empty" in html.unescape(found)


def test_half_a_character_is_replaced(app: RunningApp) -> None:
    assert "You asked: Hi?" in str(Client(app.url, "half").run("send", ["Hi\ud83d", *GOOD])["output"])
