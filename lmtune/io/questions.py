"""Questions asked in a terminal: a wrong answer is told and asked for again; Ctrl-C and Ctrl-D leave.

model, known = ask("Model", "tiny", known_model)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from lmtune.errors import ConfigError, LmtuneError
from lmtune.io.console import err, escape

T = TypeVar("T")
C = TypeVar("C", bound=str)


def ask(question: str, proposed: str | None, check: Callable[[str], T]) -> tuple[str, T]:
    """The answer, and what `check` makes of it; an empty one is what was proposed; KeyboardInterrupt leaves."""
    while True:
        hint = f" \\[{escape(proposed)}]" if proposed else ""
        err.print(f"[bold]{escape(question)}[/]{hint}: ", end="")
        line = sys.stdin.readline()
        if not line:
            err.print()
            raise KeyboardInterrupt
        answer = line.strip() or proposed
        if answer:
            try:
                return answer, check(answer)
            except LmtuneError as error:
                err.print(f"[red]{escape(str(error))}[/]")


def choose(question: str, choices: Sequence[C], proposed: C) -> C:
    """One of `choices`."""

    def check(answer: str) -> C:
        for choice in choices:
            if answer == choice:
                return choice
        raise ConfigError(f"{answer}: expected {', '.join(choices)}")

    return ask(f"{question} ({', '.join(choices)})", proposed, check)[1]


def confirm(question: str, proposed: bool) -> bool:
    """Yes or no; an empty answer is what is proposed."""

    def check(answer: str) -> bool:
        if answer.lower() in ("y", "yes", "n", "no"):
            return answer.lower().startswith("y")
        raise ConfigError(f"{answer}: expected y or n")

    return ask(question, "Y/n" if proposed else "y/N", lambda answer: proposed if "/" in answer else check(answer))[1]
