"""Chat at a prompt and through a pipe."""

from __future__ import annotations

import contextlib
import io
import json
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
from lmtune.inference.chat import ChatSession
from lmtune.inference.engine import Sampling
from lmtune.inference.load import LoadedModel
from lmtune.serve.terminal import TerminalChat
from tests.chat_models import chat_model, parrot
from tests.test_generation import scripted
from tests.tokenizers import R1

OPTIONS = Sampling(max_new_tokens=12)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return chat_model()


def piped(chat: TerminalChat, text: bytes) -> None:
    chat.run_piped(io.BytesIO(text))


def test_a_pipe_gets_answers_only(model: LoadedModel, capsys: pytest.CaptureFixture[str]) -> None:
    piped(TerminalChat(ChatSession(model), OPTIONS), "\ufeffHello\n\nWhat is the capital of France?\n".encode())
    questions = ("Hello", "What is the capital of France?")
    wanted = [ChatSession(model).reply(question, OPTIONS) for question in questions]
    captured = capsys.readouterr()
    assert captured.out == "".join(answer + "\n" for answer in wanted)
    assert captured.err == ""


def test_commands(model: LoadedModel, capsys: pytest.CaptureFixture[str]) -> None:
    warm = Sampling(temperature=1.0, max_new_tokens=12, seed=3)
    chat = TerminalChat(ChatSession(model), warm)
    piped(chat, b"Hello\n/retry\n/base\nHello\n/tuned\n/clear\nHello\n/help\n/rety\n/exit\nnever asked\n")
    session = ChatSession(model)
    wanted = [session.reply("Hello", warm)]
    wanted.append("".join(session.retry(Sampling(1.0, 1.0, 12, seed=4))))
    wanted.append(ChatSession(model).reply("Hello", warm, use_base=True))
    wanted.append(wanted[0])
    captured = capsys.readouterr()
    assert captured.out == "".join(answer + "\n" for answer in wanted)
    assert wanted[0] != wanted[1]
    assert "without the adapter from now on" in captured.err
    assert "/rety: unknown command" in captured.err
    assert "/retry   another answer" in captured.err


def test_there_is_nothing_to_switch_without_an_adapter(capsys: pytest.CaptureFixture[str]) -> None:
    chat = TerminalChat(ChatSession(chat_model(adapter=False)), OPTIONS)
    piped(chat, b"/base\n")
    assert "no adapter" in capsys.readouterr().err
    assert not chat.use_base


def test_a_line_that_is_not_utf8_is_named(model: LoadedModel) -> None:
    with pytest.raises(DataError, match="stdin:2: not UTF-8"):
        piped(TerminalChat(ChatSession(model), OPTIONS), b"Hello\n\xff\xfe\n")


def test_a_line_without_an_answer_does_not_keep_the_others_from_theirs(capsys: pytest.CaptureFixture[str]) -> None:
    small = chat_model(positions=64)
    for as_json in (False, True):
        with pytest.raises(
            LmtuneError, match=r"2 lines have no answer\n  stdin:2: .*at most 64.*\n  stdin:3: not UTF-8"
        ):
            TerminalChat(ChatSession(small), OPTIONS).run_piped(
                io.BytesIO(b"Hi\n" + b"x" * 200 + b"\n\xff\nHi\n"), as_json=as_json
            )
    written = capsys.readouterr().out.splitlines()
    wanted = ChatSession(small).reply("Hi", OPTIONS)
    assert written[:4] == [wanted, "", "", wanted]
    rows = [json.loads(line) for line in written[4:]]
    assert [row["line"] for row in rows] == [1, 2, 3, 4]
    assert [row.get("answer") for row in rows] == [wanted, None, None, wanted]
    assert "at most 64" in rows[1]["error"]


def test_one_line_without_an_answer_is_the_error() -> None:
    with pytest.raises(LmtuneError, match=r"^stdin:1: .*at most 64"):
        piped(TerminalChat(ChatSession(chat_model(positions=64)), OPTIONS), b"x" * 200)


def test_many_questions_get_as_many_answers(capsys: pytest.CaptureFixture[str]) -> None:
    """More than the context holds, each as if asked alone or all as one conversation."""
    small = parrot(positions=300)
    questions = [f"Which shelf holds the box with the number {index}?" for index in range(12)]
    text = "\n".join(questions).encode()
    for conversation in (False, True):
        TerminalChat(ChatSession(small), Sampling(max_new_tokens=100)).run_piped(
            io.BytesIO(text), conversation, as_json=True
        )
        captured = capsys.readouterr()
        rows = [json.loads(line) for line in captured.out.splitlines()]
        assert [row["answer"] for row in rows] == [f"You asked: {question}" for question in questions]
        assert {row["finish_reason"] for row in rows} == {"stop"}
        assert captured.err.count("oldest turns are left out") == conversation


def test_a_conversation_through_a_pipe_remembers_until_it_is_full(
    model: LoadedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    TerminalChat(ChatSession(model), OPTIONS).run_piped(io.BytesIO(b"Hello\nAnd then?\n"), conversation=True)
    together = ChatSession(model)
    wanted = [together.reply("Hello", OPTIONS), together.reply("And then?", OPTIONS)]
    assert capsys.readouterr().out == "".join(answer + "\n" for answer in wanted)
    assert wanted[1] != ChatSession(model).reply("And then?", OPTIONS)


def test_a_cut_answer_is_told_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    TerminalChat(ChatSession(parrot()), Sampling(max_new_tokens=5)).run_piped(io.BytesIO(b"count\n"), as_json=True)
    row = json.loads(capsys.readouterr().out)
    assert (row["line"], row["question"], row["tokens"], row["finish_reason"]) == (1, "count", 5, "length")


def test_the_system_prompt_is_set_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    chat = TerminalChat(ChatSession(parrot(), "Be brief."), Sampling())
    for line in (
        "/system",
        "system",
        "/system Speak like a sailor.",
        "system",
        "/sytem Be kind.",
        "/etc/hosts is what?",
    ):
        assert chat.handle(line)
    captured = capsys.readouterr()
    assert captured.out.splitlines() == ["Be brief.", "Speak like a sailor.", "You asked: /etc/hosts is what?"]
    assert captured.err.startswith("Be brief.\n")
    assert "/sytem: unknown command; /help lists all" in captured.err


def test_a_question_in_a_pipe_may_begin_with_a_slash(capsys: pytest.CaptureFixture[str]) -> None:
    piped(TerminalChat(ChatSession(parrot()), Sampling()), b"/usr holds what?\n")
    assert capsys.readouterr().out == "You asked: /usr holds what?\n"


class Terminal:
    """A chat with a random model in a terminal of its own."""

    _PROGRAM = """
import sys
from lmtune.inference.chat import ChatSession
from lmtune.inference.engine import Sampling
from lmtune.serve.terminal import TerminalChat
from tests.chat_models import chat_model, never_stops
options = Sampling(temperature=1.0, max_new_tokens=8000)
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
    terminal.wait_for("/nonsense: unknown command")
    terminal.wait_for("> ")
    assert terminal.interrupt_until_it_leaves() == 0


@pytest.mark.long
def test_ctrl_d_leaves(terminal: Terminal) -> None:
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.process.wait(20) == 0


@pytest.mark.parametrize("as_json", [False, True])
def test_a_pipe_gets_the_answer_without_its_reasoning(as_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = scripted(R1, "thinking", "why</think>\n\n  Item 5.<|im_end|>")
    whole = Sampling(max_new_tokens=64)
    TerminalChat(ChatSession(loaded), whole).run_piped(io.BytesIO(b"Hello\n"), as_json=as_json)
    captured = capsys.readouterr()
    if as_json:
        told = json.loads(captured.out)
        assert (told["reasoning"], told["answer"], told["finish_reason"]) == ("why", "  Item 5.", "stop")
    else:
        assert captured.out == "  Item 5.\n"
    cut = Sampling(max_new_tokens=1)
    TerminalChat(ChatSession(loaded), cut).run_piped(io.BytesIO(b"Hello\n"))
    captured = capsys.readouterr()
    assert captured.out == "\n"
    assert "ended while it was reasoning" in captured.err
