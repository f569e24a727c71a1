"""A server of files and fine-tuning jobs alone, for the `openai` client: in a thread, or as a process to kill.

python -m tests.serve.fine_tuning_server FOLDER PORT
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob

from lmtune.config.schema import ModelConfig
from lmtune.config.yaml import write_yaml
from lmtune.serve.fine_tuning.service import FineTuning, application_of
from tests.processes import free_port

BASE = ModelConfig(name="tiny", quantization="none")
DEFAULTS = {
    "tuning": {"rank": 4, "alpha": 8},
    "data": {"max_length": 128},
    "train": {"batch_size": 4},
    "evaluation": {"exact_match_rows": 0},
    "run": {"checkpoint_every_steps": 2},
}
ROWS = [
    {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"It is {7 * n % 10}."}]}
    for n in range(16)
]  # fmt: skip
PAIRS = [
    {"input": {"messages": [{"role": "user", "content": f"Number {n}?"}]},
     "preferred_output": [{"role": "assistant", "content": f"It is {n}."}],
     "non_preferred_output": [{"role": "assistant", "content": "No idea."}]}
    for n in range(8)
]  # fmt: skip


def lines(rows: list[Any]) -> bytes:
    """Rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@dataclass
class Served:
    """A server that runs.

    Attributes:
        folder: of its runs; its own files are in `.serve` there.
        tuning: what it serves.
        made: the models that it was told of.
    """

    folder: Path
    tuning: FineTuning
    address: str
    made: list[tuple[str, Path]] = field(default_factory=list)

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0)

    def upload(self, rows: list[Any], name: str = "rows.jsonl") -> str:
        """The id of an uploaded file."""
        return self.client.files.create(file=(name, lines(rows)), purpose="fine-tune").id


def service(folder: Path, on_model: Callable[[str, Path], None], **defaults: Any) -> FineTuning:
    """Fine-tuning of `tiny` in a folder, with a few defaults for short runs."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / ".defaults.yaml"
    settings.write_text(write_yaml({**DEFAULTS, **defaults}))
    return FineTuning(folder / ".serve", folder, lambda: {"tiny": BASE}, settings, on_model)


@contextlib.contextmanager
def serving(folder: Path, **defaults: Any) -> Iterator[Served]:
    """The server in a thread, as long as the block lasts."""
    made: list[tuple[str, Path]] = []
    tuning = service(folder, lambda name, run: made.append((name, run)), **defaults)
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(application_of(tuning), "127.0.0.1", port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield Served(folder, tuning, f"http://127.0.0.1:{port}", made)
    finally:
        server.should_exit = True
        thread.join(90)


def until(holds: Callable[[], Any], seconds: float = 120) -> Any:
    """Wait until something holds; what it is."""
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.2)
    return found


def ended(client: OpenAI, job: str) -> FineTuningJob:
    """A job once it has ended."""

    def look() -> FineTuningJob | None:
        found = client.fine_tuning.jobs.retrieve(job)
        return found if found.status in ("succeeded", "failed", "cancelled") else None

    return until(look)


if __name__ == "__main__":
    uvicorn.run(
        application_of(service(Path(sys.argv[1]), lambda name, run: None)), port=int(sys.argv[2]), log_level="warning"
    )
