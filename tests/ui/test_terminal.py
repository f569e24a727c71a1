"""Chat at a prompt and through a pipe."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmtune.errors import DataError, LmtuneError
from lmtune.generation import ChatSession, GenerationOptions
from lmtune.models.inference import LoadedModel
from lmtune.ui.terminal import TerminalChat
from tests.chat_models import chat_model

OPTIONS = GenerationOptions(max_new_tokens=12)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return chat_model()


def piped(chat: TerminalChat, text: bytes) -> None:
    chat.run_piped(io.BytesIO(text))


def test_a_pipe_gets_answers_only(model: LoadedModel, capsys: pytest.CaptureFixture[str]) -> None:
    piped(TerminalChat(ChatSession(model), OPTIONS), "\ufeffHello\n\nWhat is the capital of France?\n".encode())
    alone = ChatSession(model)
    wanted = [alone.reply("Hello", OPTIONS), alone.reply("What is the capital of France?", OPTIONS)]
    captured = capsys.readouterr()
    assert captured.out == "".join(answer + "\n" for answer in wanted)
    assert captured.err == ""


def test_commands(model: LoadedModel, capsys: pytest.CaptureFixture[str]) -> None:
    warm = GenerationOptions(temperature=1.0, max_new_tokens=12, seed=3)
    chat = TerminalChat(ChatSession(model), warm)
    piped(chat, b"Hello\n/retry\n/base\nHello\n/tuned\n/clear\nHello\n/help\n/rety\n/exit\nnever asked\n")
    session = ChatSession(model)
    wanted = [session.reply("Hello", warm)]
    wanted.append("".join(session.retry(GenerationOptions(1.0, 1.0, 12, seed=4))))
    wanted.append(session.reply("Hello", warm, use_base=True))
    wanted.append(wanted[0])
    captured = capsys.readouterr()
    assert captured.out == "".join(answer + "\n" for answer in wanted)
    assert wanted[0] != wanted[1]
    assert "without the adapter from now on" in captured.err
    assert "no command /rety" in captured.err
    assert "/retry   another answer" in captured.err


def test_there_is_nothing_to_switch_without_an_adapter(capsys: pytest.CaptureFixture[str]) -> None:
    chat = TerminalChat(ChatSession(chat_model(adapter=False)), OPTIONS)
    piped(chat, b"/base\n")
    assert "no adapter" in capsys.readouterr().err
    assert not chat.use_base


def test_a_line_that_is_not_utf8_is_named(model: LoadedModel) -> None:
    with pytest.raises(DataError, match="stdin:2: not UTF-8"):
        piped(TerminalChat(ChatSession(model), OPTIONS), b"Hello\n\xff\xfe\n")


def test_a_question_that_does_not_fit_ends_a_pipe() -> None:
    with pytest.raises(LmtuneError, match="at most 64"):
        piped(TerminalChat(ChatSession(chat_model(positions=64)), OPTIONS), b"x" * 200)


class Terminal:
    """A chat with a random model in a terminal of its own."""

    _PROGRAM = """
import sys
from lmtune.generation import ChatSession, GenerationOptions
from lmtune.ui.terminal import TerminalChat
from tests.chat_models import chat_model, never_stops
options = GenerationOptions(temperature=1.0, max_new_tokens=8000)
TerminalChat(ChatSession(never_stops(chat_model(positions=10000), 0.01)), options).run_interactive()
"""

    def __init__(self) -> None:
        ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", self._PROGRAM], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            cwd=Path(__file__).parents[2], env={**os.environ, "TERM": "xterm"},
        )  # fmt: skip
        os.close(theirs)
        self.terminal, self.seen = ours, ""

    def wait_for(self, text: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, f"{text!r} did not appear in {self.seen[-2000:]!r}"
            if select.select([self.terminal], [], [], 0.2)[0]:
                with contextlib.suppress(OSError):  # the other end is closed
                    self.seen += os.read(self.terminal, 65536).decode(errors="replace")

    def type(self, line: str) -> None:
        self.seen = ""
        os.write(self.terminal, line.encode())

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def interrupt_until_it_leaves(self, seconds: float = 40) -> int:
        """Press Ctrl-C, and again if nothing happens: readline loses one that comes just before it waits for a key."""
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            self.interrupt()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
        assert self.process.returncode is not None, self.seen
        return self.process.returncode


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    chat = Terminal()
    yield chat
    chat.process.kill()
    chat.process.wait()
    os.close(chat.terminal)


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_then_leaves(terminal: Terminal) -> None:
    terminal.wait_for("> ")
    assert "with its adapter" in terminal.seen
    terminal.type("Hello\n")
    terminal.wait_for("Hello\r\n")
    time.sleep(0.5)
    terminal.interrupt()
    terminal.wait_for("(stopped)")
    terminal.wait_for("> ")
    assert "\x1b" not in terminal.seen.partition("\n")[2].partition("\x1b[2m(stopped)")[0]
    terminal.type("/nonsense\n")
    terminal.wait_for("no command /nonsense")
    terminal.wait_for("> ")
    assert terminal.interrupt_until_it_leaves() == 0


@pytest.mark.slow
def test_ctrl_d_leaves(terminal: Terminal) -> None:
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.process.wait(20) == 0
