"""Questions asked in a terminal: a wrong answer is told and asked for again; Ctrl-C and Ctrl-D leave.

model, known = ask("Model", "tiny", known_model)
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
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


def read_key(choices: str) -> str:
    """One of the characters `choices`: a key pressed in a terminal, else the next one of the input; empty at its end.

    Other characters are passed over. Ctrl-D in a terminal is the end, too.
    """
    with _one_key_at_a_time():
        while True:
            key = sys.stdin.read(1)
            if key in ("", "\x04"):
                return ""
            if key in choices:
                return key


@contextlib.contextmanager
def _one_key_at_a_time() -> Iterator[None]:
    """Inside the block a terminal gives each key as it is pressed, and does not show it."""
    if not sys.stdin.isatty():
        yield
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin, termios.TCSADRAIN)  # a key that was pressed before is not lost
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
