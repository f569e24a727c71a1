"""The app in a process of its own, for tests of load: `python -m tests.ui.load_server PORT stub|tiny`.

The stub answers every question with its own words and then counts, at 100 tokens a second for any number of
conversations at once: no model, no lock, so what is more than that in a client's time is the app's. `tiny` is the
embedded model, which here goes on until its tokens are used up. The process tells on request, by a file, how many
threads and how much memory it has.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmtune.inference.chat import ChatSession, GenerationOptions
from lmtune.inference.load import load_for_inference
from lmtune.serve.server import Address, launch
from lmtune.serve.studio import conversation
from tests.chat_models import never_stops, parrot

TOKEN_SECONDS = 0.01


class CountingSession(ChatSession):
    """A conversation with the stub: all of the real one but the model."""

    def _prompt(self, history: Any) -> list[int]:
        return [0]

    def _pieces(self, prompt: list[int], memory: Any, options: GenerationOptions, turn: Any) -> Iterator[str]:
        begin, words = time.monotonic(), [*self._history[-1].content.split(), *map(str, range(1, 10_000))]
        for number in range(options.max_new_tokens):
            time.sleep(max(0.0, begin + number * TOKEN_SECONDS - time.monotonic()))
            if turn.stopped.is_set():
                return
            turn.num_tokens += 1
            yield f"{words[number]} "


def tell(path: Path) -> None:
    """Keep answering threads and resident bytes in a file, once every 0.2 s."""
    import psutil

    process = psutil.Process()
    while True:
        answering = sum(thread.name == "lmtune-answer" for thread in threading.enumerate())
        staged = path.with_suffix(".tmp")
        staged.write_text(f"{answering} {threading.active_count()} {process.memory_info().rss}")
        os.replace(staged, path)
        time.sleep(0.2)


if __name__ == "__main__":
    if sys.argv[2] == "stub":
        conversation.ChatSession = CountingSession  # type: ignore[misc]
    model = parrot() if sys.argv[2] == "stub" else never_stops(load_for_inference("tiny"))
    if len(sys.argv) > 3:
        threading.Thread(target=tell, args=(Path(sys.argv[3]),), daemon=True).start()
    launch(model, Address(port=int(sys.argv[1])))
