"""The process of `vllm serve`: started with a key of its own, at an address that only this machine reaches.

with VllmProcess(["vllm", "serve", "Qwen/Qwen3-0.6B"]) as process:
    process.wait_until_ready()
    process.url, process.key
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import httpx

from lmtune.errors import LmtuneError

_END_SECONDS = 20.0  # for the answers under way
_LAST_LINES = 15
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux's prctl


class VllmProcess:
    """A server of vLLM, which ends with this process.

    Attributes:
        url: without `/v1`.
        key: that it wants.
    """

    def __init__(self, command: Sequence[str]) -> None:
        """Start `command`, the words of a `vllm serve` without address and key."""
        self.key = secrets.token_urlsafe(24)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._folder = tempfile.TemporaryDirectory(prefix="lmtune-vllm-")
        self._log = Path(self._folder.name) / "vllm.log"
        environment = {**os.environ, "VLLM_API_KEY": self.key, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
        environment.pop("LMTUNE_API_KEY", None)  # of our clients
        # A session of its own: Ctrl-C is for us, who let answers end first.
        with self._log.open("wb") as log:
            self._child = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", str(port)], stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, env=environment, start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )  # fmt: skip

    def __enter__(self) -> VllmProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) \
            -> None:  # fmt: skip
        self.close()

    def wait_until_ready(self) -> None:
        """Return when it answers: it loads the model, and on a GPU compiles it, which takes minutes.

        Raises:
            LmtuneError: it has ended before.
        """
        while True:
            self.check()
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            time.sleep(0.5)

    def check(self) -> None:
        """LmtuneError with what it said last, if it has ended."""
        if (code := self._child.poll()) is not None:
            said = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-_LAST_LINES:]
            raise LmtuneError("\n".join([f"vLLM has ended (exit code {code}); its last words:", *said]))

    def close(self) -> None:
        """End it, and what it has started."""
        if self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(_END_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        self._folder.cleanup()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGTERM)
