"""Chat in a terminal, or through a pipe: a question a line, answers streamed.

    lmtune chat runs/support
    lmtune chat runs/support --json < questions.txt > answers.jsonl

In a terminal Ctrl-C ends the answer under way; with none under way it leaves, as Ctrl-D and /exit do. Answers go to
stdout and everything else to stderr. Control characters, with which a text can take over a terminal, are not passed on
to one.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, BinaryIO

from lmtune.data.replies import is_still_reasoning, split_reply
from lmtune.errors import DataError, LmtuneError
from lmtune.inference.chat import ChatSession
from lmtune.inference.request import Sampling
from lmtune.io.console import err, escape
from lmtune.io.text import format_list

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_HELP = """\
/retry   another answer to the last question
/clear   begin a new conversation
/system TEXT   begin a new conversation with this system prompt; without TEXT: show it
/base    answers without the adapter
/tuned   answers with the adapter
/help    this list
/exit    leave; so does Ctrl-D
Ctrl-C   stop the answer; again: leave"""
_LEAVE = ("/exit", "/quit")


class TerminalChat:
    """A conversation, and the commands that steer it."""

    def __init__(self, session: ChatSession, sampling: Sampling, use_base: bool = False) -> None:
        self.session, self.sampling, self.use_base = session, sampling, use_base
        self._tries, self._told_full = 0, False
        self._commands: dict[str, Callable[[], None]] = {
            "/retry": self._retry, "/clear": self._clear, "/base": lambda: self._choose(True),
            "/tuned": lambda: self._choose(False), "/help": lambda: err.print(escape(_HELP)),
        }  # fmt: skip

    def run_interactive(self) -> None:
        """Ask at a prompt until the user leaves; an error is printed, and the chat goes on."""
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

    def run_piped(self, lines: BinaryIO, conversation: bool = False, as_json: bool = False) -> None:
        """Answer each line of `lines`; a line without an answer leaves an empty one, and the others are answered.

        Args:
            lines: questions in UTF-8; commands work here too.
            conversation: the lines are one conversation, whose oldest turns are left out where it outgrows the model;
                else each is asked alone.
            as_json: write one JSON object a line: line, question, reasoning if any, answer, tokens, finish_reason;
                or line, question, error.

        Raises:
            DataError: lines were not UTF-8.
            LmtuneError: questions could not be answered.
        """
        problems: list[str] = []
        kind: type[LmtuneError] = DataError
        for number, raw in enumerate(lines, 1):
            line = raw.decode("utf-8-sig", "replace").strip()
            try:
                raw.decode()
                if self._command(line, alone=not conversation):
                    continue
                if line in _LEAVE:
                    break
                self._answer_line(number, line, conversation, as_json)
            except (LmtuneError, UnicodeDecodeError) as error:
                is_text = isinstance(error, LmtuneError)
                kind = LmtuneError if is_text else kind
                problems.append(f"stdin:{number}: {error if is_text else 'not UTF-8; convert the questions to UTF-8'}")
                _write_json(line=number, question=line, error=problems[-1]) if as_json else _write("\n")
        if problems:
            more = f"{len(problems)} lines have no answer\n{format_list(problems)}"
            raise kind(problems[0] if len(problems) == 1 else more)

    def handle(self, line: str) -> bool:
        """Do what one line asks for; false if it asks to leave."""
        line = line.strip()
        if line in _LEAVE:
            return False
        if not self._command(line):
            self._tries = 0
            self._say(self.session.stream(line, self.sampling, self.use_base))
        return True

    def _command(self, line: str, alone: bool = False) -> bool:
        """Do what the command `line` asks for; whether it is one, or empty. Where lines are asked `alone`, only a lone
        word after a slash is taken for a misspelt command."""
        name, _, rest = line.partition(" ")
        if line in self._commands:
            self._commands[line]()
        elif name == "/system":
            self._set_system(rest.strip())
        elif re.fullmatch(r"/\w+" if alone else r"/\w+( .*)?", line) and line not in _LEAVE:
            err.print(f"{escape(name)}: unknown command; /help lists all")
        elif line:
            return False
        return True

    def _answer_line(self, number: int, line: str, conversation: bool, as_json: bool) -> None:
        self._tries = 0
        if conversation:
            self._make_room(line)
        else:
            self.session.clear()
        pieces = self.session.stream(line, self.sampling, self.use_base)
        if not as_json:
            self._say(pieces)
            return
        reasoning, answer = split_reply("".join(pieces))
        info = self.session.turns[-1][1]
        _write_json(
            line=number, question=line, **({} if reasoning is None else {"reasoning": reasoning}), answer=answer,
            tokens=self.session.num_answer_tokens, finish_reason=info and info.finish_reason,
        )  # fmt: skip

    def _make_room(self, question: str) -> None:
        """Leave out the oldest turns of the conversation until an answer of full length fits behind `question`."""
        session, messages = self.session, self.session.messages
        while messages and session.remembers:
            room = session.room_for_answer(question)
            if room is None or room >= self.sampling.max_new_tokens:
                break
            messages = messages[2:]
            session = ChatSession(session.model, session.system, messages)
        if session is not self.session and not self._told_full:
            self._told_full = True
            err.print("[dim]the conversation is full; its oldest turns are left out from here on[/]")
        self.session = session

    def _set_system(self, text: str) -> None:
        session = self.session
        if not text:
            err.print(escape(session.system or session.model.system or "system prompt: not set; /system TEXT sets one"))
            return
        session.system = text
        session.clear()
        err.print("[dim]a new conversation with this system prompt[/]")

    def _greet(self) -> None:
        model = self.session.model
        which = " without its adapter" if self.use_base else " with its adapter" if model.has_adapter else ""
        err.print(f"[bold]{escape(model.name)}[/]{which}")
        err.print("[dim]/help lists commands, Ctrl-C stops an answer, Ctrl-D leaves[/]")
        if self.session.classifier is not None:
            err.print("[dim]a classifier: it says what each message is[/]")
        elif not self.session.remembers:
            err.print("[dim]no chat template: each question stands alone[/]")

    def _retry(self) -> None:
        self._tries += 1
        seed = (self.sampling.seed + self._tries) % 2**32
        self._say(self.session.retry(replace(self.sampling, seed=seed), self.use_base))

    def _clear(self) -> None:
        self.session.clear()
        err.print("[dim]a new conversation[/]")

    def _choose(self, base: bool) -> None:
        if not self.session.model.has_adapter:
            err.print("this model has no adapter to switch off or on")
            return
        self.use_base = base
        err.print(f"[dim]answers {'without' if base else 'with'} the adapter from now on[/]")

    def _say(self, pieces: Iterator[str]) -> None:
        show = _printable if sys.stdout.isatty() else str
        reply, thought, answer = "", "", ""
        with self._interruptible() as interrupted:
            for piece in pieces:
                reply, before = reply + piece, answer
                reasoning, answer = split_reply(reply)
                if sys.stdout.isatty() and (more := (reasoning or "")[len(thought) :]):
                    thought += more
                    err.print(f"[dim]{escape(_printable(more))}[/]", end="")
                if thought and not before and answer:
                    err.print("\n")
                _write(show(answer[len(before) :]))
        if is_still_reasoning(reply):
            err.print("[dim](ended while it was reasoning, before an answer)[/]")
        _write("\n")
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


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _write_json(**values: Any) -> None:
    _write(json.dumps(values, ensure_ascii=False) + "\n")


def _printable(text: str) -> str:
    """`text` without the characters that steer a terminal."""
    return _CONTROL.sub("\ufffd", text)
