"""The app under load, in a process of its own, with real clients on this machine's loopback.

The figures are printed (`-s` shows them); the bounds hold on two cores that have nothing else to do.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from lmtune.demo import support_heldout
from lmtune.serve.studio.conversation import MAX_TABS
from tests.ui.client import GOOD
from tests.ui.load import Stream, ask_at_once, figures

pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]

NUM_TOKENS = 100
MOST_BYTES_LEFT = 1024  # by each client that has gone: Gradio keeps half a kilobyte of each session
STEP_BYTES = 5_000_000  # by which the heap may grow when a moment is busier than any before
SPARE_THREADS = (
    64  # that are kept for a while for blocking calls; those of a busy moment, and fewer than come in a round
)
IDLE_SECONDS = 12  # after 10 the spare ones end, when the next call comes
SOAK_SECONDS = float(os.environ.get("LMTUNE_SOAK_SECONDS", "600"))


class Server:
    """`tests.ui.load_server` with the stub or `tiny`."""

    def __init__(self, kind: str, told: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = int(probe.getsockname()[1])
        self.told = told
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.ui.load_server", str(port), kind, str(told)], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
            env={**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert "lmtune app: " in line, line + self.process.stderr.read()  # type: ignore[union-attr]
        self.url = line.split("lmtune app: ")[1].strip()

    def ask(self, questions: Sequence[str], leave_after: float | None = None) -> list[Stream]:
        """As many clients as questions, at once."""
        return asyncio.run(ask_at_once(self.url, questions, NUM_TOKENS, leave_after))

    def state(self) -> tuple[int, int, int]:
        """Threads that answer, threads, resident bytes; as they were within the last 0.2 s."""
        time.sleep(0.5)
        answering, threads, resident = map(int, self.told.read_text().split())
        return answering, threads, resident

    def end(self) -> tuple[int, str]:
        """Exit code after SIGTERM, and what was said on stderr."""
        self.process.send_signal(signal.SIGTERM)
        _, said = self.process.communicate(timeout=60)
        return self.process.returncode, said


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[str], Server]]:
    running: list[Server] = []

    def start(kind: str) -> Server:
        running.append(Server(kind, tmp_path / "told"))
        return running[-1]

    yield start
    for server in running:
        server.process.kill()
        server.process.wait()


def clients(number: int) -> list[str]:
    """What so many clients ask the stub."""
    return [f"client {client}" for client in range(number)]


def counted(number: int) -> str:
    """What the stub answers to client `number`."""
    return " ".join(["client", str(number), *map(str, range(1, NUM_TOKENS - 1))])


def tell(name: str, streams: Sequence[Stream]) -> dict[str, float]:
    found = figures(streams)
    print(f"\n{name}: " + ", ".join(f"{key} {value:.2f} s" for key, value in found.items()))
    return found


@pytest.mark.parametrize("num_clients", [1, 4, 16, 64])
def test_every_stream_is_complete_and_its_own(serve: Callable[[str], Server], num_clients: int) -> None:
    server = serve("stub")
    server.ask(clients(1))  # what is loaded at the first request is no part of it
    for turn in range(3):
        streams = server.ask(clients(num_clients))
        found = tell(f"stub, {num_clients} clients, round {turn + 1}", streams)
        assert sorted(stream.text.strip() for stream in streams) == sorted(map(counted, range(num_clients)))
        assert all("100 tokens" in stream.said for stream in streams)
        assert all(len(stream.updates) > 1 for stream in streams)
        assert found["seconds p50"] <= 3.0
    code, said = server.end()
    assert (code, "Traceback" in said) == (0, False), said


@pytest.mark.parametrize("num_clients", [1, 4, 16, 64])
def test_a_real_model_answers_each_as_if_it_were_alone(serve: Callable[[str], Server], num_clients: int) -> None:
    server = serve("tiny")
    questions = [json.loads(line)["prompt"] for line in support_heldout().read_text().splitlines()[:num_clients]]
    alone = [server.ask([question])[0].text for question in questions]
    assert len(set(alone)) > 0.7 * num_clients, "answers that can be told apart"
    streams = server.ask(questions)
    found = tell(f"tiny, {num_clients} clients", streams)
    assert [stream.text for stream in streams] == alone
    assert all("100 tokens" in stream.said for stream in streams)
    assert found["seconds p99"] <= 2 + num_clients, "clients take turns, token by token"
    code, said = server.end()
    assert (code, "Traceback" in said) == (0, False), said


def test_gradio_s_own_clients(serve: Callable[[str], Server]) -> None:
    from gradio_client import Client

    server = serve("stub")
    clients = [Client(server.url, verbose=False) for _ in range(8)]

    def ask(number: int) -> str:
        values = [*GOOD[:5], NUM_TOKENS, ""]
        output = clients[number].submit(f"client {number}", *values, api_name="/send").result(timeout=60)
        return str(output[1][-1]["content"][0]["text"])

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert [text.strip() for text in pool.map(ask, range(8))] == [counted(number) for number in range(8)]


def test_a_full_queue_is_said_to_those_that_find_no_place(serve: Callable[[str], Server]) -> None:
    """64 are answered at a time, 256 wait; 80 more are told so, and when the others have gone a new one is answered."""
    server = serve("stub")
    told = asyncio.run(ask_at_once(server.url, clients(400), 5000, leave_after=40))
    assert len(told) == 80, "so many streams ended; the others went on until their clients left"
    assert all("queue is full" in stream.said.lower() for stream in told), {stream.said for stream in told}
    (stream,) = server.ask(clients(1))
    assert stream.text.strip() == counted(0)


def test_clients_that_leave_leave_nothing_behind(serve: Callable[[str], Server]) -> None:
    """200 at a time, again and again, on an app that already holds as many sessions as it keeps."""
    server = serve("stub")
    for _ in range(MAX_TABS // 64 + 1):
        server.ask(clients(64))
    num_threads = server.state()[1]
    begin, sizes = time.monotonic(), []
    while not sizes or time.monotonic() - begin < SOAK_SECONDS:
        server.ask(clients(200), leave_after=0.5)
        left = time.monotonic()
        (stream,) = server.ask(clients(1))
        assert stream.text.strip() == counted(0)
        assert stream.first <= 2.0, "a new request waits for those that have gone"
        while (state := server.state())[0]:
            assert time.monotonic() - left < 15, f"{state[0]} threads go on answering"
        assert state[1] <= num_threads + SPARE_THREADS
        sizes.append(state[2])
        if len(sizes) % 20 == 1:
            print(f"\nround {len(sizes)}: {state[1]} threads, {state[2] / 1e6:.0f} MB")
    time.sleep(IDLE_SECONDS)
    server.ask(clients(1))
    assert server.state()[1] <= num_threads, "threads are left"
    # What is compared are medians of a tenth of the rounds: one alone goes up and down by some MB with how many of the
    # 200 were answered at once. The first tenth is let go by: there the heap grows to what the busiest moment takes.
    tenth = len(sizes) // 10 + 1
    early, late = (statistics.median(part) for part in (sizes[tenth : 2 * tenth], sizes[-tenth:]))
    gone = 200 * (len(sizes) - 2 * tenth)
    print(f"\n{len(sizes)} rounds of 200: {early / 1e6:.1f} MB, after {gone:,} more clients {late / 1e6:.1f} MB")
    assert late - early < STEP_BYTES + MOST_BYTES_LEFT * gone
    assert server.end()[0] == 0


def test_sigterm_lets_streams_finish_and_takes_no_more(serve: Callable[[str], Server]) -> None:
    server = serve("stub")
    server.ask(clients(1))

    async def drain() -> list[Stream]:
        asked = asyncio.create_task(ask_at_once(server.url, clients(16), NUM_TOKENS))
        await asyncio.sleep(0.6)
        server.process.send_signal(signal.SIGTERM)
        return await asked

    streams = asyncio.run(drain())
    assert [stream.text.strip() for stream in streams] == [counted(number) for number in range(16)]
    _, said = server.process.communicate(timeout=60)
    assert server.process.returncode == 0
    assert "finishing 16 answer(s)" in said
    assert "Traceback" not in said
