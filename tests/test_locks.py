"""Locks between processes, also where the file system has none: nobody is refused, nobody is said to run for ever."""

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest

from lmtune.io.atomic import get_or_build, new_folder, try_lock
from lmtune.parallel.launch import _wait_for_workers
from lmtune.parallel.worker import EXIT_CODES, hold_exit_codes
from lmtune.runs.history import overview
from tests.sample_run import write_records

KEY = "ab" * 32
NO_LOCKS = [errno.ENOTSUP, errno.ENOLCK]


@pytest.fixture(params=NO_LOCKS, ids=errno.errorcode.__getitem__)
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks."""

    def refuse(*args: Any) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_a_lock_is_refused_only_while_another_has_it(tmp_path: Path) -> None:
    with open(tmp_path / "x", "a") as first, open(tmp_path / "x") as second, open(tmp_path / "x") as third:
        assert try_lock(first)
        assert try_lock(second) is False
        first.close()
        assert try_lock(second, shared=True)
        assert try_lock(third, shared=True)


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_run_can_start_and_is_not_running_for_ever(tmp_path: Path) -> None:
    run = write_records(tmp_path / "runs" / "support")
    run.summary.write_text(json.dumps({"status": "running"}))
    with run.locked():
        assert run.is_running()
        assert overview(run).status == "running"
    assert not run.is_running()
    assert overview(run).status == "interrupted"
    (run.path / ".lock").write_text("999999999")  # of a process that was killed
    assert not run.is_running()


@pytest.mark.usefixtures("no_locks")
def test_without_locks_the_cache_and_new_folders_work(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "rows").write_text("x")

    assert (get_or_build(tmp_path / "cache", KEY, build) / "rows").read_text() == "x"
    with new_folder(tmp_path / "merged") as staging:
        (staging / "x").write_text("x")
    assert (tmp_path / "merged" / "x").is_file()


@pytest.mark.usefixtures("no_locks")
def test_without_locks_the_command_does_not_wait_for_its_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(EXIT_CODES, str(tmp_path / "codes"))
    hold_exit_codes()
    _wait_for_workers(tmp_path / "codes")
