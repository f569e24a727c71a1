"""Who may use the app, which requests it answers, and how it ends; malformed calls are in tests/bad_input."""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio_client
import httpx
import pytest

from lmtune.errors import ConfigError
from lmtune.serve.server import MAX_BODY_BYTES, Address, _listen
from tests.chat_models import parrot
from tests.ui.client import GOOD, JOIN, Client, wait_until
from tests.ui.conftest import RunningApp

pytestmark = pytest.mark.slow  # seconds together; left out of `make test-fast`

# --- the address


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"host": "0.0.0.0"}, "--host: at 0.0.0.0 other machines.*--auth"), ({"host": "::"}, "--host: at ::"),
        ({"host": "192.168.1.4"}, "--auth"), ({"host": "my-pc"}, "--auth"), ({"share": True}, "--share.*--auth"),
        ({"auth": "nobody"}, "user:password"), ({"auth": ":secret"}, "user:password"), ({"auth": "me:"}, "--auth"),
        ({"port": 0}, "--port"), ({"port": 70000}, "--port: 70000"),
    ],
)  # fmt: skip
def test_an_address_without_a_password_is_local(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Address(**changes)


def test_in_a_space_the_hub_decides_who_gets_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPACE_ID", "me/chat")
    monkeypatch.setenv("SPACE_HOST", "me-chat.hf.space")
    assert Address(host="0.0.0.0").auth is None


def test_small_packets_are_sent_at_once() -> None:
    """The kernel holds a second small packet back until the first is confirmed, 40 ms later, unless asyncio, which
    looks at the protocol's number, tells it otherwise."""
    with _listen(Address(port=17860)) as listening:
        assert listening.proto == socket.IPPROTO_TCP


# --- requests


@pytest.mark.parametrize(
    ("host", "is_answered"),
    [
        ("127.0.0.1", True), ("localhost:9999", True), ("[::1]:7860", True), ("LOCALHOST", True),
        ("evil.example", False), ("127.0.0.1.evil.example", False), ("", False), ("localhost@evil.example", False),
    ],
)  # fmt: skip
def test_only_our_own_host_names_are_answered(app: RunningApp, host: str, is_answered: bool) -> None:
    answer = httpx.get(f"{app.url}/", headers={"Host": host})
    assert (answer.status_code == 200) == is_answered
    if is_answered:
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert "connect-src 'self'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:1"])
def test_requests_of_other_sites_are_refused(app: RunningApp, origin: str) -> None:
    for answer in (
        httpx.post(app.url + JOIN, json={"data": ["x"], "fn_index": 0}, headers={"Origin": origin}),
        httpx.get(f"{app.url}/config", headers={"Origin": origin}),
    ):
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/gradio_api/upload"), ("GET", "/monitoring"), ("GET", "/gradio_api/proxy=http://evil.example"),
        ("GET", "/gradio_api/file=/etc/passwd"), ("GET", "/openapi.json"), ("POST", "/gradio_api/component_server"),
        ("POST", "/gradio_api/run/send"), ("PUT", "/"), ("OPTIONS", "/config"), ("GET", "//evil.example"),
    ],
)  # fmt: skip
def test_routes_that_a_chat_does_not_need_are_closed(app: RunningApp, method: str, path: str) -> None:
    assert httpx.request(method, app.url + path).status_code == 404


def test_a_large_body_is_refused_with_and_without_its_length(app: RunningApp) -> None:
    large = b"x" * (MAX_BODY_BYTES + 1)
    for content in (large, iter([large[: MAX_BODY_BYTES // 2]] * 4)):
        with contextlib.suppress(httpx.TransportError):  # cut off while it was still sending
            assert httpx.post(app.url + JOIN, content=content).status_code == 413
    assert httpx.get(f"{app.url}/config").status_code == 200


# What Gradio takes for a file: it copies `path`, or has what `url` names fetched, before a function of ours is called.
META = {"_type": "gradio.FileData"}
WRAPPINGS: list[Callable[[Any], Any]] = [
    lambda file: file, lambda file: {"a": {"b": [[[file]]]}}, lambda file: {"path": file["path"]},
    lambda file: {**file, "url": "http://127.0.0.1:9/x"},
]  # fmt: skip


@pytest.mark.parametrize("wrap", WRAPPINGS)
def test_no_file_is_read_for_a_call(app: RunningApp, tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    answers = set()
    (tmp_path / "there").write_text("private")
    for path in (tmp_path / "there", tmp_path / "missing", Path("/dev/zero")):
        file = wrap({"path": str(path), "meta": META})
        places: list[dict[str, Any]] = [
            {"data": [0, file, "", 0, 1, 20, "", ""]}, {"data": GOOD, "session_hash": file},
            {"data": [*GOOD, ""], "event_data": {"index": 0, "value": [file]}},
        ]  # fmt: skip
        for place, route in itertools.product(places, (JOIN, "/gradio_api/call/send")):
            answer = httpx.post(app.url + route, json={"fn_index": 0, "session_hash": "f", **place}, timeout=5)
            answers.add((answer.status_code, answer.text))
    assert {status for status, _ in answers} == {422}
    assert len(answers) == 1, "a file that is there is told from one that is not"


def test_with_a_password_nothing_is_told_without_it(start_app: Callable[..., Iterator[RunningApp]]) -> None:
    running = start_app(parrot(name="secret-name"), auth="me:pass:word")
    app = next(running)
    with httpx.Client(base_url=app.url) as client:
        assert client.get("/config").status_code == 401
        assert client.get("/gradio_api/info").status_code == 401
        assert client.post(JOIN, json={"data": [], "fn_index": 0, "session_hash": "a"}).status_code == 401
        assert client.get("/gradio_api/queue/data", params={"session_hash": "a"}).status_code == 401
        assert "secret-name" not in client.get("/").text
        assert client.post("/login", data={"username": "me", "password": "pass"}).status_code == 400
        assert client.post("/login", data={"username": "me", "password": "pass:word"}).status_code == 200
        assert "secret-name" in client.get("/config").text
    next(running, None)


# --- answers


def test_many_clients_at_once_get_each_its_own_answer(app: RunningApp) -> None:
    def ask(number: int) -> str:
        return str(Client(app.url, f"client {number}").run("send", [f"number {number}", *GOOD])["output"])

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        outputs = list(pool.map(ask, range(8)))
    for number, output in enumerate(outputs):
        assert set(re.findall(r"number \d", output)) == {f"number {number}"}
        assert "tokens" in output


def test_a_client_that_leaves_or_stops_ends_its_answer(app: RunningApp) -> None:
    client = Client(app.url, "leaver")
    assert client.join("send", ["count", *GOOD[:5], 3000, ""]).status_code == 200
    client.wait_for("process_generating")
    client.http.close()
    wait_until(lambda: not app.activity.num_answering)

    client = Client(app.url, "stopper")
    client.join("send", ["count", *GOOD[:5], 3000, ""])
    wait_until(lambda: app.activity.num_answering)
    stop = next(d["id"] for d in client.dependencies if any(target[1] == "stop" for target in d["targets"]))
    body = {"data": [], "fn_index": stop, "session_hash": "stopper"}
    assert client.http.post("/gradio_api/run/predict", json=body).status_code == 200
    wait_until(lambda: not app.activity.num_answering, 3)


def test_nothing_but_the_four_calls_is_offered_to_programs(app: RunningApp) -> None:
    offered = httpx.get(f"{app.url}/gradio_api/info", headers={"Origin": app.url}).json()["named_endpoints"]
    assert set(offered) <= {"/send", "/retry", "/edit", "/example"}


# --- its end

PROGRAM = """
import sys
from lmtune.serve.server import Address, launch
from tests.chat_models import parrot
launch([parrot(0.01)], Address(port=int(sys.argv[1])))
"""


@pytest.mark.long
def test_sigterm_lets_an_answer_finish_and_a_second_ctrl_c_does_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        for signals, tokens in (([signal.SIGTERM], 200), ([signal.SIGINT, signal.SIGINT], 3000)):
            process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(port)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                cwd=Path(__file__).parents[2], env={**os.environ, "COLUMNS": "200"}, start_new_session=True,
            )  # fmt: skip
            try:
                url = process.stdout.readline().split("lmtune app: ")[1].strip()  # type: ignore[union-attr]
                assert not url.endswith(f":{port}"), "the port is taken"
                client = gradio_client.Client(url, verbose=False)
                answer = client.submit("count", *GOOD[:5], tokens, "", api_name="/send")
                wait_until(answer.outputs)
                for number in signals:
                    assert process.poll() is None
                    process.send_signal(number)
                    time.sleep(0.5)
                _, stderr = process.communicate(timeout=20)
                output = answer.outputs()[-1]
            finally:
                process.kill()
                process.wait()
            assert process.returncode == 0
            assert "finishing 1 answer(s)" in stderr
            assert f"port {port} is taken, so the app is on" in stderr
            assert "Traceback" not in stderr
            assert output[1][-1]["content"][0]["text"].startswith("1 2 3 4 5 6 7 8 9 10")
            assert ("200 tokens" in str(output[3])) == (tokens == 200)
