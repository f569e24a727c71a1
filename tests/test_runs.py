"""The run directory: no run climbs out of its folder, two processes never write one run, files are whole."""

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from lmtune.config.load import build_config
from lmtune.config.schema import RunConfig
from lmtune.errors import CheckpointError, ConfigError
from lmtune.io.atomic import keep_lines, write_json, write_text
from lmtune.runs.store import RunDirectory, find_run


def run_config(**settings: object) -> RunConfig:
    """Checked settings of a run."""
    return build_config(RunConfig, settings, "test")


def test_creating_the_object_touches_nothing(tmp_path: Path) -> None:
    run = RunDirectory.of(run_config(dir=str(tmp_path / "runs"), name="trial"))
    assert run.path == tmp_path / "runs" / "trial"
    assert run.name == "trial"
    assert not run.exists()
    assert not (tmp_path / "runs").exists()


def test_a_run_needs_a_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.name: missing; name the run"):
        RunDirectory.of(run_config(dir=str(tmp_path)))


def test_a_run_that_is_a_link_or_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "runs" / "file").touch()
    with pytest.raises(ConfigError, match=r"run\.name: .*link leads out of .*runs"):
        RunDirectory.of(run_config(dir=str(tmp_path / "runs"), name="link"))
    with pytest.raises(ConfigError, match=r"run\.name: .*file is a file"):
        RunDirectory.of(run_config(dir=str(tmp_path / "runs"), name="file"))


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "config.yaml", ".lock"])
def test_a_folder_where_a_run_writes_a_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "trial" / name).mkdir(parents=True)
    with pytest.raises(ConfigError, match=rf"run\.name: .*{name} is a folder, where a run writes a file; remove it"):
        RunDirectory.of(run_config(dir=str(tmp_path), name="trial"))


@pytest.mark.parametrize("name", ["metrics.jsonl", ".lock"])
def test_a_pipe_where_a_run_writes_a_file_is_refused(tmp_path: Path, name: str) -> None:
    """Who reads one waits for ever."""
    (tmp_path / "trial").mkdir()
    os.mkfifo(tmp_path / "trial" / name)
    with pytest.raises(ConfigError, match=rf"run\.name: .*{name} is no plain file, where a run writes a file; remove"):
        RunDirectory.of(run_config(dir=str(tmp_path), name="trial"))


@pytest.mark.parametrize("name", ["checkpoints", "adapter"])
def test_a_file_where_a_run_writes_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "trial").mkdir()
    (tmp_path / "trial" / name).touch()
    with pytest.raises(ConfigError, match=rf"run\.name: .*{name} is a file, where a run writes a folder; remove it"):
        RunDirectory.of(run_config(dir=str(tmp_path), name="trial"))


def test_run_dir_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    assert RunDirectory.of(run_config(dir=str(tmp_path / "runs"), name="trial")).path.name == "trial"


def test_a_run_in_use_is_refused_and_free_again_afterwards(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "trial")
    other, refusal = RunDirectory(tmp_path / "trial"), rf"in use by another lmtune process \(pid {os.getpid()}\)"
    with run.locked(), pytest.raises(CheckpointError, match=refusal), other.locked():
        raise AssertionError("two hold the run")
    with run.locked():
        pass


def hold_and_die(path: Path) -> None:
    """Take the run's lock and end without letting go."""
    with RunDirectory(path).locked():
        os._exit(9)


def test_a_crash_lets_go_of_the_run(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=hold_and_die, args=(tmp_path / "trial",))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    with RunDirectory(tmp_path / "trial").locked():
        pass


def test_setting_aside_takes_the_first_free_name(tmp_path: Path) -> None:
    for number in (1, 2):
        run = RunDirectory(tmp_path / "trial")
        run.path.mkdir()
        (run.path / "config.yaml").write_text(str(number))
        assert run.set_aside().name == f"trial-old-{number}"
    assert (tmp_path / "trial-old-1" / "config.yaml").read_text() == "1"
    assert not (tmp_path / "trial").exists()


def test_a_run_is_found_by_path_or_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "trial").mkdir(parents=True)
    assert find_run("trial") is None
    (tmp_path / "runs" / "trial" / "config.yaml").touch()
    for target in ("trial", "runs/trial", str(tmp_path / "runs" / "trial")):
        found = find_run(target)
        assert found is not None
        assert found.path.resolve() == (tmp_path / "runs" / "trial").resolve()
    assert find_run("other") is None


def test_a_run_is_found_in_either_form_of_its_letters(tmp_path: Path) -> None:
    run = RunDirectory.of(run_config(dir=str(tmp_path), name="U\u0308bung-客服"))
    run.path.mkdir()
    run.config.touch()
    for typed in ("Übung-客服", "U\u0308bung-客服"):
        found = find_run(typed, tmp_path)
        assert found is not None
        assert found.path == run.path


def test_a_json_file_that_is_damaged_says_so(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.read_json(run.summary) == {}
    run.summary.write_text('{"status": "comp')
    with pytest.raises(CheckpointError, match=r"summary\.json: not valid JSON .*; delete it or restore it"):
        run.read_json(run.summary)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "first\n")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half" + "\ud800")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lmtune.io.atomic.flush_to_disk", full)
        with pytest.raises(OSError, match="No space left"):
            write_text(path, "second\n")
    assert path.read_text() == "first\n"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_json_that_json_has_not_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"loss": 1.5, "name": "ä"})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8")) == {"loss": 1.5, "name": "ä"}


@pytest.mark.parametrize(
    ("before", "keep", "after"),
    [
        (b"1\n2\n3\n", 2, b"1\n2\n"),
        (b"1\n2\n3\n", 9, b"1\n2\n3\n"),
        (b"1\n2\nhalf", 9, b"1\n2\n"),
        (b"1\n2\nhalf", 1, b"1\n"),
        (b"half", 5, b""),
        (b"1\n", 0, b""),
    ],
)
def test_keeping_lines_drops_what_is_half_written(tmp_path: Path, before: bytes, keep: int, after: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(before)
    keep_lines(path, keep)
    assert path.read_bytes() == after


def test_keeping_lines_of_no_file_makes_none(tmp_path: Path) -> None:
    keep_lines(tmp_path / "none", 3)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("told", "time"),
    [
        ('{"rendered_at": "2026-01-02T03:04:05"}', "2026-01-02 03:04:05"), ("{}", None), ("{", None),
        ('{"rendered_at": 5}', None), (None, None),
    ],
)  # fmt: skip
def test_the_time_that_a_runs_rows_were_rendered_with(tmp_path: Path, told: str | None, time: str | None) -> None:
    run = RunDirectory(tmp_path)
    if told is not None:
        run.data.write_text(told)
    assert run.rendered_at() == time
