"""What `prepare` has done, as `OUT.prepare.json` says it; `--replay` does the same again.

It holds counts, settings and hashes, no text of a row: what was masked must not stand beside the file.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lmtune.data.prepare.settings import Settings
from lmtune.data.types import RowKind
from lmtune.errors import ConfigError

VERSION = 1


@dataclass(frozen=True)
class Input:
    """A file that was read, and as what."""

    name: str
    sha256: str
    read_as: str
    rows: int


@dataclass(frozen=True)
class StepDone:
    """A step: whether it was applied, and to how many rows; `kinds` tells apart what it found."""

    name: str
    applied: bool
    rows: int
    kinds: dict[str, int] = field(default_factory=dict)


@dataclass
class Plan:
    """What was done.

    Attributes:
        kind: of the rows.
        rows: read, written, held out, and copies that `lmtune augment` made of these.
        report: about the rows that were written.
    """

    settings: Settings
    kind: RowKind = "answer"
    inputs: list[Input] = field(default_factory=list)
    steps: list[StepDone] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    def to_tree(self) -> dict[str, Any]:
        """The plan as JSON has it."""
        return {"version": VERSION, **asdict(self)}


@dataclass(frozen=True)
class Replay:
    """The decisions of an earlier plan; `sha256` of its inputs by name."""

    settings: Settings
    steps: frozenset[str]
    sha256: dict[str, str]


def require_jsonl(output: Path) -> None:
    """Raise ConfigError for a name by which training would read another kind of file."""
    if output.suffix.lower() != ".jsonl":
        raise ConfigError(f"--output: {output}: rows are written one a line; expected a name that ends in .jsonl")


def plan_path(output: Path) -> Path:
    """`rows.prepare.json` beside `rows.jsonl`."""
    return output.with_name(f"{output.stem}.prepare.json")


def validation_path(output: Path) -> Path:
    """`rows.validation.jsonl` beside `rows.jsonl`."""
    return output.with_name(f"{output.stem}.validation{output.suffix}")


def read_plan(path: Path) -> Replay:
    """The decisions in a plan.

    Raises:
        ConfigError: it cannot be read, or is not a plan.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree["version"] != VERSION:
            raise ConfigError(f"--replay: {path}: version {tree['version']}; expected {VERSION}; prepare again")
        settings = TypeAdapter(Settings).validate_python(tree["settings"])
        steps = frozenset(step["name"] for step in tree["steps"] if step["applied"])
        return Replay(settings, steps, {one["name"]: one["sha256"] for one in tree["inputs"]})
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise ConfigError(f"--replay: {path}: is not a plan of `lmtune prepare` ({error})") from error
