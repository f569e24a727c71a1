"""Requests as no page sends them: each is refused with a reason, no traceback, and the next good one is answered.

Who may ask at all (foreign Host and Origin, closed routes, passwords) is in tests/ui/test_guard.py.
"""

from __future__ import annotations

import html
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.ui.client import GOOD, Client, wait_until_idle
from tests.ui.conftest import RunningApp, start

pytestmark = pytest.mark.slow  # after each request the app must answer another

JOIN, RUN, CALL = "/gradio_api/queue/join", "/gradio_api/run/predict", "/gradio_api/call"
TAKING_JSON = (JOIN, f"{CALL}/send", RUN, "/gradio_api/cancel", "/gradio_api/reset")
EDIT, MODE = 2, 8  # numbers of functions


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where Gradio puts the files that it is handed."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("gradio")
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def app(cache: Path) -> Iterator[RunningApp]:
    """A parrot behind the guard."""
    from tests.chat_models import parrot

    yield from start(parrot())


@pytest.fixture(autouse=True)
def goes_on(app: RunningApp, capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Afterwards the app has said nothing of it on the terminal, and answers."""
    yield
    said = capfd.readouterr()
    assert "Traceback" not in said.out + said.err
    assert "You asked: Hello" in str(Client(app, f"after {time.monotonic()}").run("send", ["Hello", *GOOD])["output"])
    wait_until_idle(app)


def posted(app: RunningApp, content: bytes, kind: str = "application/json", path: str = JOIN) -> httpx.Response:
    return httpx.post(app.url + path, content=content, headers={"Content-Type": kind}, timeout=20)


BODIES: dict[str, bytes] = {
    "cut off": b'{"data": ["Hello", 0, "tun',
    "no JSON": b"prompt=Hello",
    "no byte": b"",
    "no UTF-8": b'{"data": ["\xff"]}',
    "a list": b"[]",
    "a text": b'"a"',
    "null": b"null",
    "data a number": b'{"data": 3, "fn_index": 0, "session_hash": "a"}',
    "function a text": b'{"data": [1], "fn_index": "x", "session_hash": "a"}',
    "function a list": b'{"data": [1], "fn_index": [0], "session_hash": "a"}',
    "session a number": b'{"data": [1], "fn_index": 0, "session_hash": 3}',
    "nested 100,000 deep": b"[" * 100_000 + b"]" * 100_000,
    "an integer of 5,000 digits": b'{"data": [1], "fn_index": ' + b"9" * 5000 + b', "session_hash": "a"}',
    "NaN": b"NaN",
    "data NaN": b'{"data": NaN}',
    "data beyond all numbers": b'{"data": 1e999}',
    "half a character": b'"\\ud83d"',
    "half a character for a key": b'{"\\ud83d": 1}',
    "half a character for data": b'{"data": "\\ud83d"}',
    "NaN beside a good call": b'{"data": [0, "both"], "fn_index": 8, "session_hash": "a", "trigger_id": NaN}',
    "minus infinity in a value": b'{"data": [0, -Infinity], "fn_index": 8, "session_hash": "a"}',
    "half a character in a value": b'{"data": [0, ["\\udc00"]], "fn_index": 8, "session_hash": "a"}',
    "values nested 900 deep": b'{"data": [0, ' + b"[" * 900 + b"]" * 900 + b'], "fn_index": 8, "session_hash": "a"}',
    "UTF-16": '{"data": NaN}'.encode("utf-16"),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_malformed_body_is_refused(app: RunningApp, name: str) -> None:
    with httpx.Client(base_url=app.url, headers={"Content-Type": "application/json"}, timeout=20) as client:
        for path in TAKING_JSON:
            answer = client.post(path, content=BODIES[name])
            assert 400 <= answer.status_code < 500, (path, answer.text)
            assert "File " not in answer.text


def test_a_malformed_body_of_another_type_is_refused(app: RunningApp) -> None:
    for path in TAKING_JSON:
        assert 400 <= posted(app, b"\xff", "text/plain", path).status_code < 500


def test_another_content_type_is_no_way_in(app: RunningApp) -> None:
    body = json.dumps({"data": ["Hello", *GOOD], "fn_index": 0, "session_hash": "a"}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        assert 400 <= posted(app, body, kind).status_code < 500


@pytest.mark.parametrize("megabytes", [2, 50])
def test_a_large_body_is_refused_without_being_read(app: RunningApp, megabytes: int) -> None:
    begin = time.monotonic()
    try:
        code = posted(app, b'{"data": ["' + b"x" * (megabytes * 1_000_000) + b'"]}').status_code
    except httpx.TransportError:  # cut off while it was still sending
        code = 413
    assert code == 413
    assert time.monotonic() - begin < 5


SETTINGS: dict[str, tuple[int, Any, str]] = {  # place in GOOD, value, what is said
    "a model that is not there": (0, 7, "model: got 7; should be a whole number from 0 to 0"),
    "no model": (0, None, "model: got None"),
    "a model that is a truth": (0, False, "model: got False"),
    "a mode that is not there": (1, "neither", "answers from: got 'neither'; should be one of tuned, base, both"),
    "a system prompt that is a number": (2, 3, "system prompt: got 3; should be text"),
    "temperature below 0": (3, -1, "temperature: -1"),
    "temperature a text": (3, "hot", "temperature: 'hot'"),
    "temperature a truth": (3, True, "temperature: True"),
    "temperature a list": (3, [1], "temperature: [1]"),
    "top p 0": (4, 0, "top_p: 0"),
    "tokens below 0": (5, -5, "max_new_tokens: -5"),
    "tokens and a half": (5, 2.5, "max_new_tokens: 2.5"),
    "a seed below 0": (6, "-1", "seed: '-1'"),
    "a seed of 30 digits": (6, "9" * 30, "seed: '999"),
    "a seed in words": (6, "twelve", "seed: 'twelve'"),
    "a seed that only looks like a number": (6, "\u00b2", "seed: "),
    "a seed that is a list": (6, [7], "seed: got [7]; should be text"),
    "a seed that is a truth": (6, True, "seed: True"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_out_of_bounds_is_named(app: RunningApp, name: str) -> None:
    place, value, said = SETTINGS[name]
    settings = [*GOOD]
    settings[place] = value
    found = html.unescape(str(Client(app, name).run("send", ["Hello", *settings])["output"]))
    assert said in found
    assert "Traceback" not in found
    assert "You asked" not in found


TEXTS: dict[str, tuple[Any, str]] = {
    "null": (None, "the question is empty"), "nothing": ("", "the question is empty"),
    "blanks": (" \n ", "the question is empty"), "a number": (3, "question: got 3; should be text"),
    "a list": (["Hello"], "question: got ['Hello']; should be text"),
    "200,000 letters": ("x" * 200_000, "question: got 200,000 characters; should be at most 100,000"),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_a_question_that_is_none_is_told_so(app: RunningApp, name: str) -> None:
    question, said = TEXTS[name]
    found = html.unescape(str(Client(app, f"text {name}").run("send", [question, *GOOD])["output"]))
    assert said in found
    assert "You asked" not in found


CALLS: dict[str, tuple[str, dict[str, Any], int, str]] = {  # path, what differs from a good call, status, what is said
    "no value": (JOIN, {"data": []}, 422, "data: got 0 values; send takes 8"),
    "one value": (JOIN, {"data": ["Hello"]}, 422, "data: got 1 values; send takes 8"),
    "one value by name": (f"{CALL}/send", {"data": ["Hello"]}, 422, "data: got 1 values; send takes 8"),
    "no value at once": (RUN, {"data": [], "fn_index": MODE}, 422, "data: got 0 values; on_mode takes 2"),
    "function 999": (JOIN, {"fn_index": 999}, 404, "fn_index: got 999; there is no function"),
    "function -1": (JOIN, {"fn_index": -1}, 404, "fn_index: got -1; there is no function"),
    "function 999 at once": (RUN, {"fn_index": 999}, 404, "fn_index: got 999; there is no function"),
    "no function": (JOIN, {"fn_index": None}, 422, "fn_index: got None; should be the number"),
    "no function at once": (RUN, {"fn_index": None}, 422, "fn_index: got None; should be the number"),
    "a truth for a function": (JOIN, {"fn_index": True}, 422, "fn_index: got True; should be the number"),
    "a name that is none": (f"{CALL}/nobody", {}, 404, "there is no function of this name"),
    "a session without a name": (JOIN, {"session_hash": ""}, 422, "session_hash: got ''; should be a name"),
    "one by name": (f"{CALL}/send", {"session_hash": ""}, 422, "session_hash: got ''; should be a name"),
    "the second form by name": (f"{CALL}/v2/send", {}, 404, "there is nothing here"),
    "an edit of nothing": (JOIN, {"data": GOOD, "fn_index": EDIT}, 422, "event_data: got None; edit takes an object"),
    "an edit of a text": (
        JOIN, {"data": GOOD, "fn_index": EDIT, "event_data": "x"}, 422, "event_data: got 'x'; edit takes an object"
    ),
    "an object for a question": (JOIN, {"data": [{"text": "Hello"}, *GOOD]}, 422, "data: holds an object; send takes"),
    "a mode that is a list": (RUN, {"data": [0, ["both"]], "fn_index": MODE}, 500, "answers from: got ['both']"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_fits_no_function_is_refused(app: RunningApp, name: str) -> None:
    path, changes, status, said = CALLS[name]
    body = {"data": ["Hello", *GOOD], "fn_index": 0, "session_hash": name, **changes}
    answer = httpx.post(app.url + path, json=body, timeout=20)
    assert (answer.status_code, said in answer.text) == (status, True), answer.text


def test_values_beyond_the_last_are_not_read(app: RunningApp) -> None:
    output = Client(app, "more values").run("send", ["Hello", *GOOD, "more", "and more"])["output"]
    assert "You asked: Hello" in str(output)


EVENTS: dict[str, dict[str, Any]] = {
    "nothing": {}, "a text for a place": {"index": "x", "value": "Hello"}, "no place": {"value": "Hello"},
    "an empty list": {"index": [], "value": "Hello"}, "a truth": {"index": True, "value": "Hello"},
}  # fmt: skip


@pytest.mark.parametrize("name", EVENTS)
def test_an_edit_of_no_message_is_told_so(app: RunningApp, name: str) -> None:
    body = {"data": GOOD, "fn_index": EDIT, "session_hash": f"edit {name}", "event_data": EVENTS[name]}
    assert httpx.post(app.url + JOIN, json=body).status_code == 200
    found = html.unescape(str(Client(app, f"edit {name}").wait_for("process_completed")["output"]))
    assert "message: got" in found
    assert "should be the number of the one that was changed" in found


@pytest.mark.parametrize("path", ["/gradio_api/queue/data?session_hash=nobody", "/gradio_api/call/send/nobody"])
def test_a_stream_that_nobody_asked_for_is_refused(app: RunningApp, path: str) -> None:
    assert httpx.get(app.url + path).status_code == 404


# What Gradio takes for a file: it copies `path`, or has what `url` names fetched, before a function of ours is called.
META = {"_type": "gradio.FileData"}
WRAPPINGS: dict[str, Callable[[Any], Any]] = {
    "as it is": lambda file: file, "in a list": lambda file: [file], "in lists": lambda file: [[], [[[file]]]],
    "in an object": lambda file: {"a": {"b": [file]}}, "beside other keys": lambda file: {**file, "size": 1, "b": []},
    "without meta": lambda file: {"path": file["path"]},
    "with a URL": lambda file: {**file, "url": "http://127.0.0.1:9/x"},
    "as a URL": lambda file: {**file, "path": "http://127.0.0.1:9/x"},
    "as a stream": lambda file: {**file, "is_stream": True},
    "as a message": lambda file: [{"role": "user", "content": [{"type": "file", "file": file}]}],
}  # fmt: skip


def calls_with(file: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every place where a file can stand in a call, for each way to call."""
    places = {
        "data": {"data": [0, file, "", 0, 1, 20, "", ""]},
        "more data": {"data": ["Hello", *GOOD, file]},
        "event": {"data": [*GOOD, ""], "event_data": {"index": 0, "value": [file]}},
        "state": {"data": [*GOOD, ""], "state": {"0": file}},
        "session": {"data": [*GOOD, ""], "session_hash": file},
    }
    for (name, place), (path, function) in itertools.product(
        places.items(), ((JOIN, 0), (JOIN, EDIT), (RUN, MODE), (f"{CALL}/send", 0), (f"{CALL}/edit", EDIT))
    ):
        yield path, {"fn_index": function, "session_hash": f"file {name}", **place}


@pytest.mark.parametrize("name", WRAPPINGS)
def test_no_file_is_read_for_a_call(app: RunningApp, cache: Path, tmp_path: Path, name: str) -> None:
    marked = tmp_path / "marked.txt"
    marked.write_text("marked-and-private")
    wrap = WRAPPINGS[name]
    before = sorted(cache.rglob("*"))
    said: dict[Path, list[str]] = {marked: [], tmp_path / "missing.txt": []}
    with httpx.Client(base_url=app.url, timeout=20) as client:
        for path, answers in said.items():
            for where, body in calls_with(wrap({"path": str(path), "meta": META})):
                answer = client.post(where, json=body)
                assert answer.status_code == 422, (where, body, answer.text)
                answers.append(answer.text)
    assert said[marked] == said[tmp_path / "missing.txt"], "a file that is there is told from one that is not"
    assert sorted(cache.rglob("*")) == before


def test_a_device_without_end_does_not_hang_the_app(app: RunningApp) -> None:
    begin = time.monotonic()
    with httpx.Client(base_url=app.url, timeout=5) as client:
        for where, body in calls_with({"path": "/dev/zero", "meta": META}):
            assert client.post(where, json=body).status_code == 422
    assert time.monotonic() - begin < 5
