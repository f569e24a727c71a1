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
from pathlib import Path
from typing import Any

import pytest

from lmtune.errors import DataError, LmtuneError
from lmtune.inference.chat import ChatSession
from lmtune.inference.load import LoadedModel
from lmtune.inference.request import Sampling
from lmtune.serve.terminal import TerminalChat
from tests.chat_models import chat_model, parrot
from tests.test_generation import scripted
from tests.tokenizers import R1

OPTIONS = Sampling(max_new_tokens=12)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return chat_model()


def piped(loaded: LoadedModel, text: bytes, sampling: Sampling = OPTIONS, **how: bool) -> None:
    TerminalChat(ChatSession(loaded), sampling).run_piped(io.BytesIO(text), **how)


def test_a_pipe_gets_answers_only(model: LoadedModel, capsys: pytest.CaptureFixture[str]) -> None:
    piped(model, "\ufeffHello\n\nWhat is the capital of France?\n".encode())
    questions = ("Hello", "What is the capital of France?")
    wanted = [ChatSession(model).reply(question, OPTIONS) for question in questions]
    assert capsys.readouterr() == ("".join(answer + "\n" for answer in wanted), "")
    piped(model, b"Hello\nAnd then?\n", conversation=True)
    together = ChatSession(model)
    wanted = [together.reply("Hello", OPTIONS), together.reply("And then?", OPTIONS)]
    assert capsys.readouterr().out == "".join(answer + "\n" for answer in wanted)
    assert wanted[1] != ChatSession(model).reply("And then?", OPTIONS)


def test_commands(model: LoadedModel, capsys: pytest.CaptureFixture[str]) -> None:
    warm = Sampling(temperature=1.0, max_new_tokens=12, seed=3)
    piped(model, b"Hello\n/retry\n/base\nHello\n/tuned\n/clear\nHello\n/help\n/rety\n/exit\nnever asked\n", warm)
    session = ChatSession(model)
    wanted = [session.reply("Hello", warm)]
    wanted.append("".join(session.retry(Sampling(1.0, 1.0, 12, seed=4))))
    wanted.append(ChatSession(model).reply("Hello", warm, use_base=True))
    wanted.append(wanted[0])
    captured = capsys.readouterr()
    assert captured.out == "".join(answer + "\n" for answer in wanted)
    assert wanted[0] != wanted[1]
    for said in ("without the adapter from now on", "/rety: unknown command", "/retry   another answer"):
        assert said in captured.err
    piped(chat_model(adapter=False), b"/base\n")
    assert "no adapter" in capsys.readouterr().err


def test_a_line_without_an_answer_does_not_keep_the_others_from_theirs(capsys: pytest.CaptureFixture[str]) -> None:
    small = chat_model(positions=64)
    text = b"Hi\n" + b"x" * 200 + b"\n\xff\nHi\n"
    for as_json in (False, True):
        with pytest.raises(LmtuneError, match=r"2 lines have no answer\n  stdin:2: .*at most 64.*\n  stdin:3: not UTF"):
            piped(small, text, as_json=as_json)
    written = capsys.readouterr().out.splitlines()
    wanted = ChatSession(small).reply("Hi", OPTIONS)
    assert written[:4] == [wanted, "", "", wanted]
    rows = [json.loads(line) for line in written[4:]]
    assert [row["line"] for row in rows] == [1, 2, 3, 4]
    assert [row.get("answer") for row in rows] == [wanted, None, None, wanted]
    assert "at most 64" in rows[1]["error"]
    with pytest.raises(DataError, match=r"^stdin:2: not UTF-8"):
        piped(small, b"Hi\n\xff\xfe\n")


def test_many_questions_get_as_many_answers(capsys: pytest.CaptureFixture[str]) -> None:
    """More than the context holds, each as if asked alone or all as one conversation."""
    questions = [f"Which shelf holds the box with the number {index}?" for index in range(12)]
    for conversation in (False, True):
        piped(
            parrot(positions=300), "\n".join(questions).encode(), Sampling(max_new_tokens=100),
            conversation=conversation, as_json=True,
        )  # fmt: skip
        captured = capsys.readouterr()
        rows = [json.loads(line) for line in captured.out.splitlines()]
        assert [row["answer"] for row in rows] == [f"You asked: {question}" for question in questions]
        assert {row["finish_reason"] for row in rows} == {"stop"}
        assert captured.err.count("oldest turns are left out") == conversation


def test_the_system_prompt_is_set_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    chat = TerminalChat(ChatSession(parrot(), "Be brief."), Sampling())
    for line in ("/system", "system", "/system Speak like a sailor.", "system", "/sytem Be kind.", "/etc/hosts is?"):
        assert chat.handle(line)
    piped(parrot(), b"/usr holds what?\n", Sampling())
    captured = capsys.readouterr()
    asked = ["You asked: /etc/hosts is?", "You asked: /usr holds what?"]
    assert captured.out.splitlines() == ["Be brief.", "Speak like a sailor.", *asked]
    assert captured.err.startswith("Be brief.\n")
    assert "/sytem: unknown command; /help lists all" in captured.err


def test_a_pipe_gets_the_answer_without_its_reasoning(capsys: pytest.CaptureFixture[str]) -> None:
    loaded = scripted(R1, "thinking", "why</think>\n\n  Item 5.<|im_end|>")
    piped(loaded, b"Hello\n", Sampling(max_new_tokens=64))
    assert capsys.readouterr().out == "  Item 5.\n"
    loaded = scripted(R1, "thinking", "why</think>\n\n  Item 5.<|im_end|>")
    piped(loaded, b"Hello\n", Sampling(max_new_tokens=64), as_json=True)
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (told["reasoning"], told["answer"], told["finish_reason"]) == ("why", "  Item 5.", "stop")
    piped(loaded, b"Hello\n", Sampling(max_new_tokens=1))
    captured = capsys.readouterr()
    assert captured.out == "\n"
    assert "ended while it was reasoning" in captured.err


PROGRAM = """
from lmtune.inference.chat import ChatSession
from lmtune.inference.request import Sampling
from lmtune.serve.terminal import TerminalChat
from tests.chat_models import chat_model, never_stops
options = Sampling(temperature=1.0, max_new_tokens=8000)
TerminalChat(ChatSession(never_stops(chat_model(positions=10000), 0.01)), options).run_interactive()
"""


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_then_leaves() -> None:
    terminal, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        cwd=Path(__file__).parents[2], env={**os.environ, "TERM": "xterm"},
    )  # fmt: skip
    os.close(theirs)
    seen = ""

    def wait_for(text: str, seconds: float = 60) -> None:
        nonlocal seen
        end = time.monotonic() + seconds
        while text not in seen:
            assert time.monotonic() < end, f"{text!r} did not appear in {seen[-2000:]!r}"
            if select.select([terminal], [], [], 0.2)[0]:
                with contextlib.suppress(OSError):  # the other end is closed
                    seen += os.read(terminal, 65536).decode(errors="replace")

    def write(line: str) -> None:
        nonlocal seen
        seen = ""
        os.write(terminal, line.encode())

    try:
        wait_for("> ")
        assert "with its adapter" in seen
        write("Hello\n")
        wait_for("Hello\r\n")
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        wait_for("(stopped)")
        wait_for("> ")
        assert "\x1b" not in seen.partition("\n")[2].partition("\x1b[2m(stopped)")[0]
        write("/nonsense\n")
        wait_for("/nonsense: unknown command")
        wait_for("> ")
        for _ in range(4):  # readline loses a Ctrl-C that comes just before it waits for a key
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
                break
        assert process.returncode == 0, seen
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
