"""Who is lost between machines, and who is a stranger."""

import json
import socket
import time
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from lmtune.parallel.links import Links


def test_a_process_that_ends_is_lost_and_a_stranger_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    store = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=10))
    first, second = (Links(rank, store, 60.0, lambda: False, lambda reason: None) for rank in (0, 1))
    port = json.loads(store.get("lmtune/links"))[0]
    for said in (b'{"secret": "guessed", "rank": 1, "host": "stranger"}\n', b"GET / HTTP/1.1\r\n\r\n", b"x" * 10_000):
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(said)
    assert first.wait_for_loss(1.5) is None
    second.tell("rank 1 gives up")
    second.close()
    lost = first.wait_for_loss(5)
    assert lost is not None
    assert (lost.who, lost.reason, lost.is_cut) == (f"rank 1 on {socket.gethostname()}", "rank 1 gives up", False)
    first.close()


def test_one_that_waits_is_told_once_the_collective_has_had_time_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr("lmtune.parallel.links._GRACE_SECONDS", 0.1)
    store = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=10))
    works, reasons = [True], list[str]()
    first = Links(0, store, 60.0, lambda: not works, reasons.append)
    second = Links(1, store, 60.0, lambda: False, reasons.append)
    time.sleep(0.6)  # the first one has read who it is
    second.close()
    assert first.wait_for_loss(5) is not None
    time.sleep(1)
    assert not reasons  # while it works
    works.clear()
    until = time.monotonic() + 5
    while not reasons and time.monotonic() < until:
        time.sleep(0.05)
    assert "rank 1 on" in reasons[0]
    assert "has ended" in reasons[0]
    first.close()
