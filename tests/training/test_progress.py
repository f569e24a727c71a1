"""Progress for people: a bar in a terminal of any width, plain lines in a log, nothing from the other processes."""

import io

import pytest
from rich.console import Console

from lmtune.training import progress as module
from lmtune.training.progress import StepProgress


def console(monkeypatch: pytest.MonkeyPatch, terminal: bool, width: int = 80) -> io.StringIO:
    """Send what goes to stderr into a string."""
    stream = io.StringIO()
    made = Console(file=stream, force_terminal=terminal, width=width, highlight=False, soft_wrap=True)
    monkeypatch.setattr(module, "err", made)
    return stream


def run(steps: int, first: int = 1, enabled: bool = True) -> None:
    """Steps of 100 tokens and half a second each."""
    with StepProgress(steps, first, enabled=enabled) as progress:
        for step in range(first, steps + 1):
            progress.advance(step, 2.5, 100, 0.5)
            if step == 2:
                progress.say("step 2: validation loss 1.0000 (best so far)")


def test_a_log_gets_plain_lines_now_and_then_and_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = console(monkeypatch, terminal=False)
    run(5)
    assert stream.getvalue().splitlines() == [
        "step 2: validation loss 1.0000 (best so far)",
        "step 5/5 · loss 2.500 · 200 tok/s · 0 s left",
    ]


@pytest.mark.parametrize("width", [40, 80])
def test_a_terminal_of_any_width_shows_loss_and_rate(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    stream = console(monkeypatch, terminal=True, width=width)
    run(5)
    shown = stream.getvalue()
    assert "5/5" in shown
    assert "validation loss 1.0000" in shown
    if width >= 60:
        assert "loss 2.500 · 200 tok/s" in shown


@pytest.mark.parametrize("terminal", [False, True])
def test_other_processes_are_silent(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    stream = console(monkeypatch, terminal)
    run(3, enabled=False)
    assert stream.getvalue() == ""
