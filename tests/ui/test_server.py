"""Which address, which port, and how the app ends."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lmtune.errors import ConfigError
from lmtune.serve.guard import LOOPBACK
from lmtune.serve.server import Address, _listen

PROGRAM = """
import sys
from lmtune.serve.server import Address, launch
from tests.chat_models import parrot
launch(parrot(0.01), Address(port=int(sys.argv[1])))
"""
SETTINGS = [0, "tuned", "", 0, 1, 200, ""]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"host": "0.0.0.0"}, "--host: at 0.0.0.0 other machines.*--auth"), ({"host": "::"}, "--host: at ::"),
        ({"host": "192.168.1.4"}, "--auth"), ({"host": "my-pc"}, "--auth"), ({"share": True}, "--share.*--auth"),
        ({"auth": "nobody"}, "user:password"), ({"auth": ":secret"}, "user:password"), ({"auth": "me:"}, "--auth"),
        ({"port": 0}, "--port"), ({"port": 70000}, "--port: got 70000"),
    ],
)  # fmt: skip
def test_an_address_that_lets_anyone_in_is_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Address(**changes)  # type: ignore[arg-type]


def test_which_names_an_address_answers_to() -> None:
    assert Address().hosts == LOOPBACK
    assert Address(host="127.0.0.9").hosts == LOOPBACK | {"127.0.0.9"}
    assert Address(host="0.0.0.0", auth="me:secret").hosts is None
    assert Address(share=True, auth="me:secret").hosts is None


def test_answers_do_not_wait_for_the_client_to_confirm_their_first_half() -> None:
    """The kernel holds a second small packet back until the first is confirmed, 40 ms later, unless told otherwise."""

    async def option() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            found.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with _listen(Address(port=17860)) as listening:
            async with await asyncio.start_server(accepted, sock=listening):
                _, writer = await asyncio.open_connection(*listening.getsockname())
                writer.close()
                return await asyncio.wait_for(found, 10)

    assert asyncio.run(option()) != 0


def test_in_a_space_the_hub_decides_who_gets_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPACE_ID", "me/chat")
    monkeypatch.setenv("SPACE_HOST", "me-chat.hf.space")
    assert Address(host="0.0.0.0").auth is None


class Served:
    """The app in a process of its own."""

    def __init__(self, port: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(port)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            cwd=Path(__file__).parents[2], env={**os.environ, "COLUMNS": "200"}, start_new_session=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert "lmtune app: " in line, line + self.process.stderr.read()  # type: ignore[union-attr]
        self.url = line.split("lmtune app: ")[1].strip()

    def end(self, number: int, seconds: float = 20) -> tuple[int, str]:
        """Exit code after a signal, and what was said on stderr."""
        self.process.send_signal(number)
        _, said = self.process.communicate(timeout=seconds)
        return self.process.returncode, said


@pytest.fixture
def served() -> Iterator[Callable[[int], Served]]:
    running: list[Served] = []

    def serve(port: int) -> Served:
        running.append(Served(port))
        return running[-1]

    yield serve
    for app in running:
        app.process.kill()
        app.process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.mark.long
def test_sigterm_lets_an_answer_finish(served: Callable[[int], Served]) -> None:
    from gradio_client import Client

    app = served(free_port())
    client = Client(app.url, verbose=False)
    answer = client.submit("count", *SETTINGS, api_name="/send")
    begin = time.monotonic()
    while not answer.outputs():
        assert time.monotonic() < begin + 20
        time.sleep(0.05)
    code, said = app.end(signal.SIGTERM)
    assert code == 0
    assert "finishing 1 answer(s)" in said
    assert "Traceback" not in said
    shown = answer.outputs()[-1][1]
    assert shown[-1]["content"][0]["text"].startswith("1 2 3 4 5 6 7 8 9 10")
    assert "200 tokens" in str(answer.outputs()[-1][3])


@pytest.mark.long
def test_the_next_port_is_taken_and_said_and_a_second_ctrl_c_stops_at_once(served: Callable[[int], Served]) -> None:
    from gradio_client import Client

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        app = served(port)
    assert app.url.startswith("http://127.0.0.1:")
    assert not app.url.endswith(f":{port}")
    answer = Client(app.url, verbose=False).submit("count", *SETTINGS[:5], 3000, "", api_name="/send")
    begin = time.monotonic()
    while not answer.outputs():
        assert time.monotonic() < begin + 20
        time.sleep(0.05)
    app.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert app.process.poll() is None
    begin = time.monotonic()
    code, said = app.end(signal.SIGINT)
    assert code == 0
    assert time.monotonic() - begin < 8
    assert f"port {port} is taken, so the app is on" in said
    assert "Traceback" not in said
