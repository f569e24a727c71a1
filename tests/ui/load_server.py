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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lmtune.inference.engine import Generation, Sampling
from lmtune.inference.load import load_for_inference
from lmtune.serve.server import Address, launch
from tests.chat_models import never_stops, parrot

TOKEN_SECONDS = 0.01


class CountingEngine:
    """Says the question's last words and then numbers, without a model."""

    max_positions = None

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def submit(self, prompt_ids: Sequence[int], sampling: Sampling, *_: Any) -> Generation:
        question = self._tokenizer.decode(prompt_ids).rpartition("user\n")[2].partition("<|im_end|>")[0]
        text = " ".join([question, *map(str, range(1, 10_000))])

        def count(generation: Generation) -> Iterator[int]:
            begin, ids = time.monotonic(), self._tokenizer.encode(text, add_special_tokens=False)
            for number in range(sampling.max_new_tokens):
                time.sleep(max(0.0, begin + number * TOKEN_SECONDS - time.monotonic()))
                if generation.is_cancelled:
                    return
                yield ids[number]
            generation.finish_reason = "length"

        return Generation(len(prompt_ids), count)


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
        model = parrot()
        model.__dict__["engine"] = CountingEngine(model.tokenizer)
    else:
        model = never_stops(load_for_inference("tiny"))
    if len(sys.argv) > 3:
        threading.Thread(target=tell, args=(Path(sys.argv[3]),), daemon=True).start()
    launch([model], Address(port=int(sys.argv[1])))
