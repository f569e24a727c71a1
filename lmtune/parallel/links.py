"""A connection from every process to rank 0's machine, by which a machine that is lost is noticed.

links = Links(rank, store, limit_seconds, waits, end)

A machine without power, or whose cable is pulled, closes no connection. The collectives and the store of the processes
then wait for data without a limit of their own. So the kernels of both machines ask each other on these connections
whether they are still there (TCP keep-alive, RFC 9293 3.8.4). They answer whatever the processes do: one that computes,
or is stopped, is not lost. A process that ends closes its connection, which says so at once; NCCL would not.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import Store  # type: ignore[attr-defined]

from lmtune.errors import LmtuneError

LINK_SECONDS = 60.0  # without an answer of the other machine; shorter cuts are survived
_KEY = "lmtune/links"
_PROBES = 5  # of keep-alive, after a first interval without data
_MEET_SECONDS = 60.0  # for rank 0 to say where it listens, and for it to accept
_GRACE_SECONDS = 10.0  # for the collective to fail by itself after a process has ended
_LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Lost:
    """A process that is gone, or cannot be reached."""

    who: str  # rank and machine
    reason: str  # it gave up for, or ""
    is_cut: bool  # no answer, as opposed to an end that its kernel told of
    at: float  # monotonic seconds


@dataclass
class _Peer:
    """The other end of a connection."""

    rank: int
    host: str
    heard: bytes = b""  # of a line that is not complete yet
    reason: str = ""

    @property
    def who(self) -> str:
        return f"rank {self.rank} on {self.host}"


class Links:
    """The connections of this process: on rank 0 to all others, elsewhere to rank 0; watched by a thread.

    Args:
        rank: of this process.
        store: where rank 0 says where it listens.
        limit_seconds: without an answer of the other machine, after which it is lost.
        waits: whether this process waits for the others now; one that works may finish that first.
        end: called with the reason when the job cannot go on.

    Raises:
        LmtuneError: rank 0's machine cannot be reached.
    """

    def __init__(
        self, rank: int, store: Store, limit_seconds: float, waits: Callable[[], bool], end: Callable[[str], None]
    ) -> None:
        self.lost: Lost | None = None  # the first one
        self._rank, self._limit, self._waits, self._end = rank, limit_seconds, waits, end
        self._selector, self._peers = selectors.DefaultSelector(), dict[socket.socket, _Peer]()
        self._stopped = threading.Event()
        if rank == 0:
            self._listen(store)
        else:
            self._connect(store)
        self._thread = threading.Thread(target=self._run, name="links", daemon=True)
        self._thread.start()

    def tell(self, reason: str) -> None:
        """Tell the other ends why this process gives up."""
        for connection in list(self._peers):
            self._send(connection, reason=reason)

    def wait_for_loss(self, seconds: float) -> Lost | None:
        """Who is lost, as soon as it is known."""
        until = time.monotonic() + seconds
        while self.lost is None and time.monotonic() < until:
            time.sleep(0.01)
        return self.lost

    def close(self) -> None:
        """Leave; the others see that this process has ended."""
        self._stopped.set()
        self._thread.join()
        for connection in [*self._peers, *([self._server] if self._rank == 0 else [])]:
            connection.close()
        self._selector.close()

    def _listen(self, store: Store) -> None:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._server = socket.create_server(("", 0), family=family, dualstack_ipv6=dual)
        self._server.setblocking(False)
        self._secret = secrets.token_hex(16)  # so that a stranger's connection does not count
        self._selector.register(self._server, selectors.EVENT_READ)
        store.set(_KEY, json.dumps([self._server.getsockname()[1], self._secret, socket.gethostname()]))

    def _connect(self, store: Store) -> None:
        store.wait([_KEY], timedelta(seconds=_MEET_SECONDS))
        port, secret, host = json.loads(store.get(_KEY))
        address = os.environ["MASTER_ADDR"]
        try:
            connection = socket.create_connection((address, port), timeout=_MEET_SECONDS)
        except OSError as error:
            raise LmtuneError(
                f"rank {self._rank}: no connection to {address}, port {port}: {error.strerror or error}; the machines "
                "of a run need all TCP ports between them"
            ) from None
        self._add(connection, _Peer(0, host))
        self._send(connection, secret=secret, rank=self._rank, host=socket.gethostname())

    def _add(self, connection: socket.socket, peer: _Peer) -> None:
        connection.settimeout(self._limit)  # of what is sent
        _keep_alive(connection, self._limit)
        self._peers[connection] = peer
        self._selector.register(connection, selectors.EVENT_READ)

    def _send(self, connection: socket.socket, **values: object) -> None:
        with contextlib.suppress(OSError):  # seen where it is read
            connection.sendall(json.dumps(values).encode() + b"\n")

    def _run(self) -> None:
        while not self._stopped.is_set():
            for key, _ in self._selector.select(_LOOK_SECONDS):
                if isinstance(key.fileobj, socket.socket) and key.fileobj in self._peers:
                    self._hear(key.fileobj)
                else:
                    self._add(self._server.accept()[0], _Peer(-1, ""))
            lost = self.lost
            if lost is not None and self._waits() and not self._stopped.is_set():
                grace = 0.0 if lost.is_cut or lost.reason else _GRACE_SECONDS
                if time.monotonic() - lost.at >= grace:
                    self._end(lost.reason or self.describe(lost))

    def describe(self, lost: Lost) -> str:
        """What to say of a process that is lost."""
        if lost.is_cut:
            return (
                f"{lost.who} cannot be reached: no answer for {self._limit:g} s; look at that machine and at the "
                "network between; the same command resumes from the last checkpoint"
            )
        return (
            f"{lost.who} has ended; what it printed there says why; the same command resumes from the last checkpoint"
        )

    def _hear(self, connection: socket.socket) -> None:
        peer = self._peers[connection]
        try:
            data, is_cut = connection.recv(65536), False
        except OSError as error:
            data, is_cut = b"", error.errno not in (errno.ECONNRESET, errno.EPIPE)
        *lines, peer.heard = (peer.heard + data).split(b"\n")
        for line in lines:
            self._read(peer, line)
        if data and (peer.rank >= 0 or len(peer.heard) < 1024):
            return
        self._selector.unregister(connection)
        del self._peers[connection]
        connection.close()
        if peer.rank >= 0 and self.lost is None:
            self.lost = Lost(peer.who, peer.reason, is_cut, time.monotonic())

    def _read(self, peer: _Peer, line: bytes) -> None:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # of a stranger
            told = json.loads(line)
            if peer.rank < 0 and secrets.compare_digest(str(told["secret"]), self._secret):
                peer.rank, peer.host = int(told["rank"]), str(told["host"])
            elif peer.rank >= 0:
                peer.reason = str(told["reason"])


def _keep_alive(connection: socket.socket, limit_seconds: float) -> None:
    """Have the kernel break a connection whose other end has not answered for so long."""
    interval = max(1, int(limit_seconds / (_PROBES + 1)))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    settings = {
        "TCP_KEEPIDLE": interval, "TCP_KEEPALIVE": interval,  # of Linux and of macOS
        "TCP_KEEPINTVL": interval, "TCP_KEEPCNT": _PROBES, "TCP_USER_TIMEOUT": int(1000 * limit_seconds),
    }  # fmt: skip
    for name, value in settings.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
