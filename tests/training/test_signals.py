"""Ctrl-C and SIGTERM: noted while training, the step is finished, and the handlers of before are back afterwards."""

import os
import signal

import pytest

from lmtune.parallel.signals import Interrupted, StopSignals, no_more_signals, sigterm_interrupts

CODES = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.mark.parametrize(("number", "code"), CODES)
def test_a_signal_is_noted_and_gives_its_exit_code(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert (signals.received, signals.exit_code) == (None, 143), "another process may have been asked"
        os.kill(os.getpid(), number)
        assert signals.received == number
    assert signals.exit_code == code
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_does_not_wait(first: signal.Signals) -> None:
    with StopSignals():
        os.kill(os.getpid(), first)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("number", "code"), CODES[1:])
def test_outside_of_training_sigterm_and_a_closed_terminal_are_exceptions(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="the same command resumes it") as caught, sigterm_interrupts():
        os.kill(os.getpid(), number)
    assert caught.value.exit_code == code
    assert signal.getsignal(number) == before


def test_a_closed_terminal_that_is_ignored_stays_ignored() -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with sigterm_interrupts(), StopSignals() as signals, no_more_signals():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_inside_of_training_it_waits_all_the_same() -> None:
    with sigterm_interrupts():
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGTERM)
        assert signals.exit_code == 143
