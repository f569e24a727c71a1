"""The `lmtune` command in this process, as a user meets it: exit code, what was said, what was left on the disk."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from lmtune.cli import main


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """All that was said."""
        return self.out + self.err


Command = Callable[..., Outcome]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "1000")
    return tmp_path


@pytest.fixture
def command(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `lmtune …` in `place`."""

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["lmtune", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return Outcome(int(ended.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def refused(place: Path, command: Command) -> Callable[..., Outcome]:
    """Runs `lmtune …`, which must end with 2, one message, no traceback, and nothing written."""

    def run(*arguments: str) -> Outcome:
        before = everything(place)
        outcome = command(*arguments)
        assert outcome.code == 2, outcome.said
        assert outcome.err.count("error: ") == 1, outcome.err
        assert "Traceback" not in outcome.said
        assert everything(place) == before, "something was written"
        return outcome

    return run


def everything(folder: Path) -> list[tuple[str, int]]:
    """Names and sizes of all that is below `folder`."""
    return sorted((str(path.relative_to(folder)), path.lstat().st_size) for path in folder.rglob("*"))
