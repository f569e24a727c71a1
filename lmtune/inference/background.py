"""An engine that runs in a thread of its own and tells who waits: for a server, whose event loop may not wait.

    engine = BackgroundEngine(loaded.engine, tell=lambda waiting: loop.call_soon_threadsafe(wake, waiting))
    generation = engine.submit(request, future)      # `tell` gets `future` whenever there is something new
    while generation.has_news and ...: next(generation)

Whoever else uses the same engine, such as a chat, goes on as before: its tokens come from the same passes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from lmtune.inference.engine import TransformersEngine
from lmtune.inference.request import Generation, Request

Waiter = TypeVar("Waiter")


class BackgroundEngine(Generic[Waiter]):
    """Runs an engine while somebody waits for an answer.

    Args:
        engine: to run.
        tell: is called, from the engine's thread, after each pass with those whose answer has news or is over.
    """

    def __init__(self, engine: TransformersEngine, tell: Callable[[Sequence[Waiter]], None]) -> None:
        self.engine, self._tell = engine, tell
        self._waiting: dict[Generation, Waiter] = {}
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="lmtune-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, waiter: Waiter) -> Generation:
        """Answer a request; as of `Engine.submit`. Ask the answer for tokens only while it `has_news`."""
        generation = self.engine.submit(request)
        with self._changed:
            self._waiting[generation] = waiter
            self._changed.notify()
        return generation

    def close(self) -> None:
        """Answer no more; answers under way are cancelled."""
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
            self.engine.step()
            with self._changed:
                news = [(one, waiter) for one, waiter in self._waiting.items() if one.has_news or one.is_over]
                for generation, _ in news:
                    if generation.is_over:
                        del self._waiting[generation]
            if news:
                self._tell([waiter for _, waiter in news])
