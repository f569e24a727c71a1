"""What is printed is what stands there: no emoji, no markup of others, no secret, and no end when nobody listens."""

import io
import os
import sys
import time

import pytest

from lmtune.io import console
from lmtune.io.console import err, escape, out, tolerate_closed_stderr, warn


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("rows.jsonl:100: no JSON", "rows.jsonl:100: no JSON"),
        ("[/bold] and [/x]", "[/bold] and [/x]"),
        ("a\x1b[31m\x07\u202eb", "a\\x1b[31m\\x07\\u202eb"),
        ("hf_" + "a1B2" * 8, "…"),
        ("https://me:secret@host/x", "https://…@host/x"),
    ],
)
def test_a_text_is_shown_as_it_is(text: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    out.print(text)
    out.print(escape(text))
    warn(text)
    captured = capsys.readouterr()
    assert captured.out == f"{shown}\n" * 2
    assert captured.err == f"warning: {shown}\n"


def test_without_a_reader_of_stderr_the_work_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(sys, "stderr", open(writing, "w", buffering=1))  # noqa: SIM115
    tolerate_closed_stderr()  # else Rich ends the program
    for _ in range(3):
        err.print("nobody")
        print("nobody", file=sys.stderr, flush=True)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress is shown at once, where it takes two seconds otherwise."""
    monkeypatch.setattr(console, "_AFTER_SECONDS", 0.0)
    monkeypatch.setattr(console, "_LINE_EVERY_SECONDS", 0.0)
    monkeypatch.delenv("RANK", raising=False)


def shown_soon(progress: console.Progress) -> None:
    """Wait until it is shown."""
    end = time.monotonic() + 10
    while not (progress._said_at or progress._bar is not None) and time.monotonic() < end:
        time.sleep(0.005)


def test_what_takes_long_is_said_in_a_log(hurried: None, capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("scoring [the] base", 4) as shown:
        shown_soon(shown)
        shown.advance(3)
    with console.progress("reading", unit="rows") as shown:
        shown_soon(shown)
        shown.at(2000)
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        "scoring [the] base …", "scoring [the] base: 3 of 4", "reading …", "reading: 2,000 rows",
    ]  # fmt: skip
    assert captured.out == ""


@pytest.mark.parametrize("why", ["quiet", "another process"])
def test_progress_is_not_said_to_a_program_nor_by_every_process(
    hurried: None, why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with console.quiet(enabled=why == "quiet"):
        if why != "quiet":
            monkeypatch.setenv("RANK", "1")
        with console.progress("reading", 3) as shown:
            time.sleep(0.1)
            shown.advance(3)
    assert capsys.readouterr().err == ""


def test_progress_ends_with_an_error(hurried: None, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> console.Progress:
        with console.progress("reading") as shown:
            failed.append(shown)
            shown_soon(shown)
            raise ValueError("wrong")

    failed: list[console.Progress] = []
    with pytest.raises(ValueError, match="wrong"):
        fail()
    failed[0].show()  # a timer that comes too late
    assert capsys.readouterr().err == "reading …\n"


def test_a_terminal_shows_a_line_that_disappears(hurried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    terminal = console._Console(file=written, force_terminal=True, width=80)
    monkeypatch.setattr(console, "err", terminal)
    with console.progress("outer") as outer, console.progress("scoring [rows]", 4) as inner:
        shown_soon(outer)
        shown_soon(inner)
        inner.advance(2)
        outer._bar.refresh()
    assert "scoring [rows]: 2 of 4" in written.getvalue()
    assert not terminal._live_stack
