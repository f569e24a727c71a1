"""Chat in a terminal, or through a pipe: a question a line, answers streamed.

    lmtune chat runs/support
    printf 'Where is my parcel?\n' | lmtune chat runs/support > answer.txt

In a terminal Ctrl-C ends the answer under way; with none under way it leaves, as Ctrl-D and /exit do. Answers go to
stdout and everything else to stderr, so a pipe gets answers only. What a model says may hold any character; control
characters, with which a text can take over a terminal, are not passed on to one.
"""

from __future__ import annotations

import contextlib
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, BinaryIO

from lmtune.console import err, escape
from lmtune.errors import DataError, LmtuneError
from lmtune.generation import ChatSession, GenerationOptions

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_HELP = """\
/retry   another answer to the last question
/clear   begin a new conversation
/base    answers without the adapter
/tuned   answers with the adapter
/exit    leave; so does Ctrl-D
Ctrl-C   stop the answer; again: leave"""


class TerminalChat:
    """A conversation, and the commands that steer it."""

    def __init__(self, session: ChatSession, options: GenerationOptions, use_base: bool = False) -> None:
        self.session, self.options, self.use_base = session, options, use_base
        self._tries = 0
        self._commands: dict[str, Callable[[], None]] = {
            "/retry": self._retry, "/clear": self._clear, "/base": lambda: self._choose(True),
            "/tuned": lambda: self._choose(False), "/help": lambda: err.print(escape(_HELP)),
        }  # fmt: skip

    def run_interactive(self) -> None:
        """Ask at a prompt until the user leaves; what goes wrong is said, and the chat goes on."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() a history and line editing
        self._greet()
        while True:
            try:
                line = _ask()
            except (EOFError, KeyboardInterrupt):
                err.print()
                return
            try:
                if not self.handle(line):
                    return
            except LmtuneError as error:
                err.print(f"[red]{escape(str(error))}[/]")
            except KeyboardInterrupt:
                err.print()
                return

    def run_piped(self, lines: BinaryIO) -> None:
        """Answer each line of `lines`.

        Raises:
            DataError: a line is not UTF-8.
            LmtuneError: a question cannot be answered.
        """
        for number, raw in enumerate(lines, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"stdin:{number}: not UTF-8 ({error.reason}); convert the questions to UTF-8") from None
            if not self.handle(line):
                return

    def handle(self, line: str) -> bool:
        """Do what one line asks for; false if it asks to leave."""
        line = line.strip()
        if line in ("/exit", "/quit"):
            return False
        if line in self._commands:
            self._commands[line]()
        elif re.fullmatch(r"/\w+", line):
            err.print(f"no command {escape(line)}; /help lists them all")
        elif line:
            self._tries = 0
            self._say(self.session.stream(line, self.options, self.use_base))
        return True

    def _greet(self) -> None:
        model = self.session.model
        which = " without its adapter" if self.use_base else " with its adapter" if model.has_adapter else ""
        err.print(f"[bold]{escape(model.name)}[/]{which}")
        err.print("[dim]/help lists commands, Ctrl-C stops an answer, Ctrl-D leaves[/]")
        if not self.session.remembers:
            err.print("[dim]no chat template: each question stands alone[/]")

    def _retry(self) -> None:
        self._tries += 1
        seed = (self.options.seed + self._tries) % 2**32
        self._say(self.session.retry(replace(self.options, seed=seed), self.use_base))

    def _clear(self) -> None:
        self.session.clear()
        err.print("[dim]a new conversation[/]")

    def _choose(self, base: bool) -> None:
        if not self.session.model.has_adapter:
            err.print("this model has no adapter, so there is nothing to switch")
            return
        self.use_base = base
        err.print(f"[dim]answers {'without' if base else 'with'} the adapter from now on[/]")

    def _say(self, pieces: Iterator[str]) -> None:
        show = _printable if sys.stdout.isatty() else str
        with self._interruptible() as interrupted:
            for piece in pieces:
                sys.stdout.write(show(piece))
                sys.stdout.flush()
        sys.stdout.write("\n")
        sys.stdout.flush()
        if interrupted:
            err.print("[dim](stopped)[/]")

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[list[bool]]:
        """Inside the block the first Ctrl-C stops the answer, and is noted in the list; a second is a second."""
        interrupted: list[bool] = []

        def stop(signal_number: int, frame: Any) -> None:
            if interrupted:
                raise KeyboardInterrupt
            interrupted.append(True)
            self.session.stop()

        if not sys.stdin.isatty():
            yield interrupted
            return
        before = signal.signal(signal.SIGINT, stop)
        try:
            yield interrupted
        finally:
            signal.signal(signal.SIGINT, before)


def _ask() -> str:
    """A line that the user types; the prompt stays out of a file that stdout may be."""
    if sys.stdout.isatty():
        return input("> ")
    sys.stderr.write("> ")
    sys.stderr.flush()
    return input()


def _printable(text: str) -> str:
    """`text` without the characters that steer a terminal."""
    return _CONTROL.sub("\ufffd", text)
