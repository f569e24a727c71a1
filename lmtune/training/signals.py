"""Ctrl-C and SIGTERM during training: finish the step, save, then end with 130 or 143.

A second Ctrl-C does not wait for the step. Before and after training, while rows are scored or files written, both end
the run at once.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

from lmtune.errors import LmtuneError


class Interrupted(LmtuneError):
    """The run was asked to stop; its last step is saved. `exit_code` is 130 (Ctrl-C) or 143 (SIGTERM)."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM raises `Interrupted` inside the block, as Ctrl-C raises `KeyboardInterrupt`; inside `StopSignals` it
    waits for the step."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted("stopped before the run was complete; the same command goes on with it", 128 + number)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def no_more_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM change nothing inside the block, where a run that is ending writes down why."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopSignals:
    """A context manager that notes SIGINT and SIGTERM instead of dying from them."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def asked(self) -> bool:
        """Whether this process was asked to stop."""
        return self.received is not None

    @property
    def exit_code(self) -> int:
        """What the shell expects of a process that ended for this signal; SIGTERM's where another process got it."""
        return 128 + (self.received or signal.SIGTERM)

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number
