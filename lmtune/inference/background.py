"""An engine that is run by a thread of its own, which tells who waits.

    background = BackgroundEngine(engine, tell=lambda waiting: loop.call_soon_threadsafe(wake, waiting))

Whoever else uses the same engine, such as a chat, goes on as before: its tokens come from the same passes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, Protocol

from lmtune.inference.base import Waiter
from lmtune.inference.request import Generation, Request


class Stepped(Protocol):
    """An engine that somebody has to run."""

    def submit(self, request: Request) -> Generation:
        """See `Engine`."""

    def step(self) -> None:
        """Give every request under way a token."""


class BackgroundEngine(Generic[Waiter]):
    """Runs an engine while somebody waits for an answer; a `Background`."""

    def __init__(self, engine: Stepped, tell: Callable[[Sequence[Waiter]], None]) -> None:
        self._engine, self._tell = engine, tell
        self._waiting: dict[Generation, Waiter] = {}
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="lmtune-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, waiter: Waiter) -> Generation:
        """See `Background`."""
        generation = self._engine.submit(request)
        with self._changed:
            self._waiting[generation] = waiter
            self._changed.notify()
        return generation

    def close(self) -> None:
        """See `Background`."""
        with self._changed:
            self._is_closed = True
            for generation in self._waiting:
                generation.cancel()
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if self._is_closed:
                    self._tell(list(self._waiting.values()))
                    return
            self._engine.step()
            with self._changed:
                news = [(one, waiter) for one, waiter in self._waiting.items() if one.has_news or one.is_over]
                for generation, _ in news:
                    if generation.is_over:
                        del self._waiting[generation]
            if news:
                self._tell([waiter for _, waiter in news])
