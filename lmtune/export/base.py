"""What an export to another engine is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from lmtune.runs.store import RunDirectory

Engine = Literal["gguf", "ollama", "vllm"]
Kind = Literal["f32", "f16", "bf16", "q8_0", "q6_k", "q5_0", "q4_0", "q4_k_m"]  # of a GGUF file's weights


@dataclass(frozen=True)
class Request:
    """What is to be exported.

    Attributes:
        run: a complete run.
        kind: the type of a GGUF file's weights.
        adapter: the adapter alone, for a base that the engine has.
        output: the file or folder to write; None for one in the run's folder.
        base: where the base is now, if it was moved.
    """

    run: RunDirectory
    kind: Kind = "q8_0"
    adapter: bool = False
    output: Path | None = None
    base: str | None = None

    def place(self, name: str) -> Path:
        """Where to write: as asked, or under `name` in the run's folder."""
        return self.run.path / name if self.output is None else self.output


class Exporter(Protocol):
    """Writes a run for one engine."""

    def __call__(self, request: Request) -> list[str]:
        """Write, and return what to say of it, the command that serves it last.

        Raises:
            ModelError: the engine cannot hold this model.
            ConfigError: the output is there already.
        """
