"""Ctrl-C, SIGTERM and a closed terminal (SIGHUP) during training: finish the step, save, end with 130, 143 or 129.

A second Ctrl-C does not wait for the step. Before and after training, while rows are scored or files written, each ends
the run at once. A SIGHUP that is ignored from the start, as under `nohup`, stays ignored.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Mapping
from types import FrameType, TracebackType
from typing import Any

from lmtune.errors import LmtuneError


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals by which this process may be asked to stop."""
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        return signal.SIGINT, signal.SIGTERM
    return signal.SIGINT, signal.SIGTERM, signal.SIGHUP


class Interrupted(LmtuneError):
    """The run was asked to stop; its last step is saved. `exit_code`: 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM and SIGHUP raise `Interrupted` inside the block, as Ctrl-C raises `KeyboardInterrupt`; inside
    `StopSignals` they wait for the step."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted("stopped before the run was complete; the same command resumes it", 128 + number)

    before = {number: signal.signal(number, interrupt) for number in stop_signals() if number != signal.SIGINT}
    try:
        yield
    finally:
        _restore(before)


@contextlib.contextmanager
def no_more_signals() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP change nothing inside the block, where a run that is ending writes down why."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in stop_signals()}
    try:
        yield
    finally:
        _restore(before)


class StopSignals:
    """A context manager that notes SIGINT, SIGTERM and SIGHUP instead of dying from them."""

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
            self._before = {number: signal.signal(number, self._note) for number in stop_signals()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _restore(self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number


def _restore(handlers: Mapping[Any, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
