"""The run directory: no run climbs out of its folder, two processes never write one run, files are whole or named."""

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from lmtune.config.load import build_config
from lmtune.config.schema import RunConfig
from lmtune.errors import CheckpointError
from lmtune.io.atomic import keep_lines, write_json, write_text
from lmtune.runs.store import RunDirectory, find_run


def run_config(**settings: object) -> RunConfig:
    """Checked settings of a run."""
    return build_config(RunConfig, settings, "test")


def test_a_run_in_use_is_refused_and_free_again_afterwards(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "trial")
    with run.locked():
        refusal = rf"in use by another lmtune process \(pid {os.getpid()}\)"
        with pytest.raises(CheckpointError, match=refusal), RunDirectory(run.path).locked():
            raise AssertionError("two hold the run")
        assert run.is_running()
    assert not run.is_running()
    assert (run.path / ".lock").read_text() == ""
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


def test_an_archived_run_takes_the_first_free_name(tmp_path: Path) -> None:
    for number in (1, 2):
        run = RunDirectory(tmp_path / "trial")
        run.path.mkdir()
        (run.path / "config.yaml").write_text(str(number))
        assert run.archive().name == f"trial-old-{number}"
    assert (tmp_path / "trial-old-1" / "config.yaml").read_text() == "1"
    assert not (tmp_path / "trial").exists()


def test_a_run_is_found_by_path_or_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunDirectory.of(run_config(dir="runs", name="U\u0308bung-客服"))
    assert find_run("Übung-客服") is None
    run.path.mkdir(parents=True)
    run.config.touch()
    for target in ("Übung-客服", "U\u0308bung-客服", "runs/Übung-客服", tmp_path / "runs" / "Übung-客服"):
        found = find_run(target)
        assert found is not None, target
        assert found.path.resolve() == run.path.resolve()
    assert find_run("other") is None


DAMAGED: dict[str, tuple[str, str]] = {  # summary.json, and what is said of it
    "half of it": ('{"status": "comp', "Unterminated string"),
    "a list": ("[1]", "holds list, not an object"),
    "an unpaired surrogate": ('{"status": "failed", "reason": "\\ud800"}', "holds an unpaired surrogate"),
    "nested without end": ('{"a": ' + "[" * 100_000, "nested too deeply"),
    "another status": ('{"status": "[/x]"}', r"status: got '\[/x\]'; expected running or "),
    "a score that is a text": ('{"tuned": {"loss": "low"}}', "tuned: got .*; expected scores"),
    "steps that are a text": ('{"steps": "3"}', "steps: got '3'; expected int"),
    "scores that are a number": ('{"base": 3}', "base: got 3; expected scores"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_summary_is_named(tmp_path: Path, what: str) -> None:
    run = RunDirectory(tmp_path)
    assert run.read_summary().status == "running"  # before there is one
    content, message = DAMAGED[what]
    run.summary.write_text(content)
    with pytest.raises(CheckpointError, match=rf"summary\.json: damaged: {message}.*; delete it or restore it"):
        run.read_summary()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "first\n")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half" + "\ud800")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": float("nan")})

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lmtune.io.atomic.flush_to_disk", full)
        with pytest.raises(OSError, match="No space left"):
            write_text(path, "second\n")
    assert path.read_text() == "first\n"
    assert os.listdir(tmp_path) == ["file.txt"]
    write_json(path, {"loss": 1.5, "name": "ä"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"loss": 1.5, "name": "ä"}


@pytest.mark.parametrize(
    ("before", "keep", "after"),
    [
        (b"1\n2\n3\n", 2, b"1\n2\n"), (b"1\n2\n3\n", 9, b"1\n2\n3\n"), (b"1\n2\nhalf", 9, b"1\n2\n"), (b"half", 5, b""),
        (b"1\n", 0, b""),
    ],
)  # fmt: skip
def test_keeping_lines_drops_what_is_half_written(tmp_path: Path, before: bytes, keep: int, after: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(before)
    keep_lines(path, keep)
    assert path.read_bytes() == after
    keep_lines(tmp_path / "none", 3)
    assert os.listdir(tmp_path) == ["metrics.jsonl"]
