"""What works is told from what hangs: computing, in this process or one that it started, and reading or writing."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmtune.parallel import watchdog
from lmtune.parallel.watchdog import Activity


def test_computing_counts_and_sleeping_does_not() -> None:
    """In a process of its own, in which no thread of another test is left."""
    code = """
import threading, time
from lmtune.parallel.watchdog import Activity

def compute():
    until = time.process_time() + 0.2
    while time.process_time() < until:
        sum(range(1000))

activity = Activity()
time.sleep(0.5)
print(activity.idle_seconds())
thread = threading.Thread(target=compute)  # the thread that asks does not count itself
thread.start()
thread.join()
print(activity.idle_seconds())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    slept, computed = map(float, done.stdout.split())
    assert slept > 0.4
    assert computed < 0.2


def test_what_a_started_process_computes_counts() -> None:
    activity = Activity()
    work = "import time\nuntil = time.process_time() + 60\nwhile time.process_time() < until: pass"
    process = subprocess.Popen([sys.executable, "-c", work])
    try:
        time.sleep(1.0)
        assert activity.idle_seconds() < 0.1
    finally:
        process.kill()
        process.wait()


def test_writing_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_CPU_SHARE", 1e9)  # whatever it computes meanwhile
    activity = Activity()
    descriptor = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    os.write(descriptor, bytes(8 << 20))
    os.close(descriptor)
    assert activity.idle_seconds() < 0.1
