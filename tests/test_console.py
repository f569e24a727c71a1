"""What is printed is what stands there: no emoji, no markup of others, no secret, and no end when nobody listens."""

import os
import sys

import pytest

from lmtune.console import err, escape, keep_without_stderr, out, warn


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
    keep_without_stderr()  # else Rich ends the program
    for _ in range(3):
        err.print("nobody")
        print("nobody", file=sys.stderr, flush=True)
