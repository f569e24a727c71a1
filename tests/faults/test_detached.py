"""`finetune --detach`: it survives the terminal that started it and is cancelled, or says its error."""

from __future__ import annotations

import os
import pty
import sys
import time
from pathlib import Path

import pytest

from lmtune.runs.control import cancel, wait_until_free
from lmtune.runs.events import CheckpointSaved, StatusChanged, read_events
from lmtune.runs.store import RunDirectory
from tests.processes import completed, lmtune
from tests.workplace import environment, make_workplace, write_config

pytestmark = pytest.mark.slow


def in_terminal(folder: Path, *arguments: str) -> str:
    """Run the command in a terminal that closes as soon as the command has ended; what it showed."""
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(folder)
        os.execve(sys.executable, [sys.executable, "-m", "lmtune", *arguments], {**os.environ, **environment(folder)})
    shown = b""
    while True:
        try:
            shown += os.read(terminal, 4096)
        except OSError:  # the other side has ended
            break
    os.close(terminal)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 0, shown.decode()
    return shown.decode()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_detached_run_outlives_its_terminal_and_is_cancelled(tmp_path: Path, processes: int) -> None:
    folder = make_workplace(tmp_path)
    write_config(folder, train__max_steps=100_000, data__validation=None, data__validation_fraction=0.0)
    several = ["--processes", str(processes)] if processes > 1 else []
    shown = in_terminal(folder, "finetune", "run.yaml", "--detach", *several)
    assert "runs follow runs/trial" in shown
    assert "runs cancel runs/trial" in shown
    run = RunDirectory(folder / "runs" / "trial")
    done = 0
    for _ in range(300):
        done = max((event.step for event in read_events(run)), default=0)
        if done >= 3:
            break
        time.sleep(0.1)
    assert done >= 3, run.output.read_text()
    cancel(run)
    assert wait_until_free(run, 60)
    *_, last = events = read_events(run)
    assert isinstance(last, StatusChanged)
    assert last.status == "interrupted"
    assert [event.step for event in events if isinstance(event, CheckpointSaved)][-1] == last.step
    assert "24 rows, 24 kept" in run.output.read_text()
    assert [path.name for path in (folder / "runs").iterdir()] == ["trial"]


def test_a_detached_run_that_cannot_begin_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    folder = make_workplace(tmp_path)
    write_config(folder)
    (folder / "base" / "config.json").write_text("{}")
    done = completed(folder, "finetune", "run.yaml", "--detach", variables=environment(folder))
    assert done.returncode == 2
    assert "error:" in done.stderr
    assert "config.json" in done.stderr
    assert not (folder / "runs").exists()


def test_a_detached_run_that_is_complete_says_so(tmp_path: Path) -> None:
    folder = make_workplace(tmp_path)
    write_config(folder)
    assert lmtune(folder, "finetune", "run.yaml") == 0
    done = completed(folder, "finetune", "run.yaml", "--detach", variables=environment(folder))
    assert (done.returncode, "complete already" in done.stderr) == (0, True), done.stderr
    assert "runs follow" not in done.stderr
