"""Which sessions wait for answers, and dropping what is kept for those that do not.

A client asks in one request and hears the answer in another, a stream. Gradio stops an answer when its stream breaks
off, but not when there never was one, and it keeps a record of every session that ever asked: half a kilobyte each,
and all the messages of those that nobody came for. So here is counted who listens. A session with questions that has
had no stream for a while is dropped; one whose questions were all heard to the end leaves nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import gradio as gr

PATIENCE_SECONDS = 30.0  # a page opens its stream at once; a full server on two cores came to some after ten seconds


class Waiting:
    """The sessions of a page; to be used in the server's event loop.

    Gradio has no route by which a record could be removed, so this goes to its queue, and does what Gradio does for a
    stream that breaks off: `clean_events`, and taking the session out of two dictionaries.
    """

    def __init__(self, blocks: gr.Blocks) -> None:
        self._blocks = blocks
        self._streams: Counter[str] = Counter()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._dropping: set[asyncio.Task[None]] = set()  # the loop itself holds its tasks but weakly

    def asked(self, session: str, has_gone: bool = False) -> None:
        """A question was taken up; its client will listen, if it has not gone meanwhile."""
        if not self._streams[session]:
            self._drop_in(session, 0.0 if has_gone else PATIENCE_SECONDS)

    @contextlib.contextmanager
    def listening(self, session: str) -> Iterator[None]:
        """A stream is open while the block runs."""
        self._streams[session] += 1
        self._keep(session)
        try:
            yield
        finally:
            self._streams[session] -= 1
            if not self._streams[session]:
                del self._streams[session]
                if self._is_busy(session):
                    self._drop_in(session, PATIENCE_SECONDS)
                else:
                    self._forget(session)

    def knows(self, session: str) -> bool:
        """Whether there is anything to hear; of another session's stream Gradio makes a traceback on the terminal."""
        return session in self._queue.pending_messages_per_session

    def session_of(self, event: str) -> str:
        """The session that a question was asked in; its own if it named none."""
        pending = self._queue.pending_event_ids_session
        return next((session for session, events in pending.items() if event in events), event)

    @property
    def _queue(self) -> Any:
        return self._blocks._queue

    def _is_busy(self, session: str) -> bool:
        """A question came while the last stream closed, or Gradio is still ending what the client has left."""
        events = list(self._queue.event_ids_to_events.values())
        pending = self._queue.pending_event_ids_session.get(session)
        return bool(pending) or any(event.session_hash == session for event in events)

    def _keep(self, session: str) -> None:
        if (timer := self._timers.pop(session, None)) is not None:
            timer.cancel()

    def _drop_in(self, session: str, seconds: float) -> None:
        self._keep(session)
        self._timers[session] = asyncio.get_running_loop().call_later(seconds, self._begin_to_drop, session)

    def _begin_to_drop(self, session: str) -> None:
        del self._timers[session]
        task = asyncio.create_task(self._drop(session))
        self._dropping.add(task)
        task.add_done_callback(self._dropping.discard)

    async def _drop(self, session: str) -> None:
        await self._queue.clean_events(session_hash=session)
        if session not in self._timers and not self._streams[session]:  # it may have come back
            self._forget(session)

    def _forget(self, session: str) -> None:
        self._queue.pending_messages_per_session.pop(session, None)
        self._queue.pending_event_ids_session.pop(session, None)
