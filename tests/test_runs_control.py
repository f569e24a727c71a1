"""`lmtune runs compare`, `cancel` and `rm`: what differs, who is asked to stop, what is deleted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmtune.errors import CheckpointError, ConfigError, LmtuneError, ModelError
from lmtune.recipes import report, runs
from lmtune.recipes.runs import Action
from lmtune.runs.comparison import best_of, compare_runs, shown_setting
from lmtune.runs.control import cancel, deletable, delete, holder_of
from lmtune.runs.store import RunDirectory
from tests.sample_run import METRICS, SUMMARY, write_records

HOLD = (  # a process that holds a run, and ends as training does
    "import signal, sys, time\nfrom lmtune.runs.store import RunDirectory\n"
    "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
    "with RunDirectory(sys.argv[1]).locked():\n    print('holds', flush=True)\n    time.sleep(100)"
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    monkeypatch.chdir(tmp_path)
    return write_records(tmp_path / "runs" / "support")


@pytest.fixture
def held(run: RunDirectory) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the run."""
    command = [sys.executable, "-c", HOLD, str(run.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holds\n"
        yield process
        process.kill()


def test_compare_tells_the_settings_that_differ_beside_the_scores(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_records(run.path.with_name("other"))
    other.config.write_text(other.config.read_text().replace("rank: 4", "rank: 16").replace("alpha: 8", "alpha: 32"))
    other.summary.write_text(json.dumps({**SUMMARY, "tuned": {**SUMMARY["tuned"], "loss": 0.01}}))
    runs.main(Action.compare, ["support", "other"], as_json=True)
    tree = json.loads(capsys.readouterr().out)
    assert tree["runs"] == ["support", "other"]
    assert tree["settings"] == {"tuning.rank": [4, 16], "tuning.alpha": [8, 32]}
    assert (tree["tuned"]["loss"], tree["base"]["loss"]) == ([0.02, 0.01], [3.5, 3.5])
    assert tree["figures"]["peak_memory_gib"] == [0.75, 0.75]
    assert tree["notes"] == []
    runs.main(Action.compare, ["support", "other"])
    assert "tuning.rank" in capsys.readouterr().out


def test_compare_knows_how_far_an_interrupted_run_got_and_writes_settings_as_a_config(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_records(run.path.with_name("other"))
    changed = {"trackers: []": "trackers: [tensorboard, trackio]", "use_dora: false": "use_dora: true"}
    for before, after in changed.items():
        other.config.write_text(other.config.read_text().replace(before, after))
    other.summary.write_text('{"status": "interrupted"}')
    found = compare_runs([run, other])
    assert found.figures["steps"] == (SUMMARY["steps"], METRICS[-1]["step"])
    runs.main(Action.compare, ["support", "other"])
    shown = capsys.readouterr().out
    assert "[tensorboard, trackio]" in shown
    assert " true" in shown
    assert shown_setting([{"path": "a.jsonl", "share": None}]) == "[{path: a.jsonl, share: null}]"
    report.main(["support", "other"], output=Path("both.html"))
    assert "<td>[]</td><td>[tensorboard, trackio]</td>" in Path("both.html").read_text(encoding="utf-8")


def test_compare_says_that_other_rows_were_held_out(run: RunDirectory) -> None:
    other = write_records(run.path.with_name("other"))
    other.config.write_text(other.config.read_text().replace("seed: 0", "seed: 1"))
    (note,) = compare_runs([run, other]).notes
    assert "different held-out rows" in note


@pytest.mark.parametrize(
    ("name", "values", "best"),
    [("loss", (3.0, 1.0, 2.0), 1), ("mean_absolute_error", (0.5, 0.25), 1), ("reward_rejected", (-1.0, 1.0), None),
     ("exact_match", (0.5, None, 0.75), 2), ("loss", (1.0, 1.0), None),
     ("rows", (3, 4), None), ("loss", (None, 2.0), None), ("loss", (1.0, 1.0, 2.0), None)],
)  # fmt: skip
def test_the_best_score_is_known_by_its_name(name: str, values: tuple[float | None, ...], best: int | None) -> None:
    assert best_of(name, values) == best


def test_cancel_asks_the_process_that_holds_the_run(
    run: RunDirectory, held: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run.summary.write_text('{"status": "running"}')
    runs.main(Action.cancel, ["support"], as_json=True)
    said = {"name": "support", "process": held.pid, "stopped": True, "status": "interrupted"}
    assert json.loads(capsys.readouterr().out) == said
    assert held.wait(10) == 143
    with pytest.raises(ModelError, match="no process writes to this run; it is interrupted"):
        cancel(run)


@pytest.mark.parametrize("number", ["1", "ours", "4194304", "", "word"])
def test_no_process_but_the_holder_gets_a_signal(
    run: RunDirectory, held: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch, number: str
) -> None:
    """The lock of another machine on a shared disk may name any process of this one."""
    (run.path / ".lock").write_text(str(os.getpid()) if number == "ours" else number)
    with monkeypatch.context() as patch:
        patch.setattr(os, "kill", lambda *_: pytest.fail("a signal was sent"))
        with pytest.raises(LmtuneError, match=r"not on this machine|of another user"):
            cancel(run)
    assert held.poll() is None


def test_the_holder_is_found_by_its_lock(run: RunDirectory) -> None:
    with run.locked():
        assert holder_of(run) == os.getpid()


def test_rm_deletes_what_it_was_told_to(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    write_records(run.path.with_name("other"))
    runs.main(Action.rm, ["support"], yes=True, as_json=True)
    (deleted,) = json.loads(capsys.readouterr().out)
    assert (deleted["path"], deleted["files"]) == ("runs/support", 6)
    assert os.listdir("runs") == ["other"]


def test_rm_asks_first(run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for answer, is_there in (("\n", True), ("n\n", True), ("y\n", False)):
        monkeypatch.setattr("sys.stdin.readline", lambda answer=answer: answer)
        runs.main(Action.rm, ["support"])
        assert run.exists() is is_there
        assert "runs/support (complete): 6 files" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="add --yes"):
        runs.main(Action.rm, [str(write_records(run.path).path)], as_json=True)


def test_rm_refuses_a_run_that_is_written_to(run: RunDirectory) -> None:
    trial = write_records(run.path.with_name("study") / "trial-000")
    for target, held in (("support", run), ("study", trial)):
        with held.locked(), pytest.raises(CheckpointError, match=rf"in use .*runs cancel .*{held.name}"):
            delete(deletable(target, Path("runs")))
        assert held.exists()


def test_rm_deletes_a_search_with_its_runs(run: RunDirectory) -> None:
    write_records(run.path.with_name("study") / "trial-000")
    (run.path.with_name("study") / "study.db").touch()
    found = deletable("study", Path("runs"))
    assert [one.name for one in found.runs] == ["trial-000"]
    delete(found)
    assert os.listdir("runs") == ["support"]


@pytest.mark.parametrize("target", ["runs", ".", "project", "link", "nothing"])
def test_rm_deletes_no_folder_but_a_run(run: RunDirectory, target: str) -> None:
    Path("config.yaml").write_text("model: mine")  # of another program
    Path("project").mkdir()
    Path("project", "config.yaml").write_text("model: mine")
    Path("link").symlink_to(run.path)
    with pytest.raises(ModelError):
        deletable(target, Path("runs"))


def test_following_a_run_that_is_cancelled_ends(run: RunDirectory, held: subprocess.Popen[str]) -> None:
    following = subprocess.Popen([sys.executable, "-m", "lmtune", "runs", "follow", "support"], stdout=subprocess.PIPE)
    held.send_signal(signal.SIGTERM)
    said, _ = following.communicate(timeout=30)
    assert following.returncode == 0
    assert len(said.splitlines()) == 120
