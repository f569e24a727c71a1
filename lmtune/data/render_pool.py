"""Many rows rendered by all processors, in order, with few rows in memory at a time.

Rendering takes 0.3 to 1 ms a row, most of it tokenising, on one processor: an hour or two for ten million rows. Files
large enough for it to matter are rendered by a pool of processes; smaller ones here, because a process that has to
import transformers first takes seconds to start. The outcome is the same, row by row.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context, parent_process

from lmtune.data.rendering import Document, Renderer
from lmtune.data.types import Example
from lmtune.errors import DataError, LmtuneError

WORTH_BYTES = 32 << 20  # of data; about a minute's work for one processor
_CHUNK_ROWS = 256
_CHUNK_CHARACTERS = 1 << 20

Outcome = list[Document] | DataError
_renderer: Renderer | None = None  # a worker's own


def render_all(
    examples: Iterable[Example], renderer: Renderer, num_bytes: int, num_processes: int | None = None
) -> Iterator[tuple[Example, Outcome]]:
    """Each example with its documents, or with the `DataError` that says why there are none; in order.

    Args:
        examples: read as needed.
        renderer: renders them.
        num_bytes: size of the data, which decides whether a pool is worth starting.
        num_processes: by default as many as this process may use, 16 at most.

    Raises:
        LmtuneError: a process of the pool died.
    """
    if num_processes is None:
        num_processes = min(16, _num_processors()) if num_bytes >= WORTH_BYTES else 1
    if num_processes == 1:
        for example in examples:
            yield example, _render(renderer, example)
        return
    pool = ProcessPoolExecutor(num_processes, get_context("spawn"), initializer=_start_worker, initargs=(renderer,))
    waiting: deque[tuple[list[Example], Future[list[Outcome]]]] = deque()
    try:
        for chunk in _chunks(examples):
            waiting.append((chunk, pool.submit(_render_chunk, chunk)))
            if len(waiting) > 2 * num_processes:
                yield from _finished(waiting)
        while waiting:
            yield from _finished(waiting)
    except BrokenProcessPool:
        raise LmtuneError("a process that renders rows died, perhaps for want of memory; start again") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _finished(waiting: deque[tuple[list[Example], Future[list[Outcome]]]]) -> Iterator[tuple[Example, Outcome]]:
    chunk, future = waiting.popleft()
    yield from zip(chunk, future.result(), strict=True)


def _render(renderer: Renderer, example: Example) -> Outcome:
    try:
        return renderer.render(example)
    except DataError as fault:
        return fault


def _chunks(examples: Iterable[Example]) -> Iterator[list[Example]]:
    chunk: list[Example] = []
    num_characters = 0
    for example in examples:
        chunk.append(example)
        num_characters += example.num_characters
        if len(chunk) >= _CHUNK_ROWS or num_characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, num_characters = [], 0
    if chunk:
        yield chunk


def _num_processors() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        return os.cpu_count() or 1


# --- in a process of the pool ----------------------------------------------------------------------------------------


def _start_worker(renderer: Renderer) -> None:
    global _renderer
    _renderer = renderer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed cannot end its pool, so the pool looks for itself."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _render_chunk(chunk: list[Example]) -> list[Outcome]:
    assert _renderer is not None
    return [_render(_renderer, example) for example in chunk]
