"""Ctrl-C and SIGTERM: noted while training, the step is finished, and the handlers of before are back afterwards."""

import os
import signal
import threading

import pytest

from lmtune.parallel.signals import Interrupted, StopSignals, no_more_signals, sigterm_interrupts

CODES = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.mark.parametrize(("number", "code"), CODES)
def test_a_signal_is_noted_and_gives_its_exit_code(number: signal.Signals, code: int) -> None:
    with StopSignals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), number)
        assert signals.received == number
    assert signals.exit_code == code
    assert Interrupted("stopped", signals.exit_code).exit_code == code


def test_a_second_ctrl_c_does_not_wait() -> None:
    with StopSignals():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_second_sigterm_changes_nothing() -> None:
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert signals.exit_code == 143


def test_ctrl_c_after_sigterm_ends_at_once() -> None:
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signals.received == signal.SIGTERM


def test_the_handlers_of_before_are_back_even_after_an_error() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def fail() -> None:
        with StopSignals():
            assert signal.getsignal(signal.SIGTERM) not in before
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        fail()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_another_process_that_was_stopped_gives_sigterms_code() -> None:
    with StopSignals() as signals:
        pass
    assert signals.exit_code == 143


def test_in_a_thread_nothing_is_touched() -> None:
    before = signal.getsignal(signal.SIGINT)
    found: list[object] = []

    def body() -> None:
        with StopSignals() as signals:
            found.extend([signals.received, signal.getsignal(signal.SIGINT)])

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found == [None, before]


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
