"""`lmtune runs`: listing, showing and following runs, as far as each of them got."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from lmtune.errors import LmtuneError, ModelError
from lmtune.io.atomic import keep_lines
from lmtune.recipes import runs as runs_recipe
from lmtune.runs.events import follow_events
from lmtune.runs.history import RunGroup, grouped, list_runs, overview
from lmtune.runs.store import RunDirectory, choose_run
from tests.sample_run import METRICS, SUMMARY, write_records


def lmtune(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lmtune", "runs", *arguments]
    env = {**os.environ, "COLUMNS": "60"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return write_records(tmp_path / "runs" / "support")


@pytest.fixture
def running(run: RunDirectory) -> Iterator[RunDirectory]:
    """The run, held by this process as by one that trains."""
    run.summary.write_text('{"status": "running", "base": null}')
    with run.locked():
        yield run


def add_step(run: RunDirectory, step: int, end: str = "\n") -> None:
    line = json.dumps({**METRICS[0], "step": step})
    with run.metrics.open("a") as metrics, run.events.open("a") as events:
        metrics.write(line + end)
        time = datetime.now(UTC).isoformat()
        events.write(json.dumps({"type": "step", "time": time, **METRICS[0], "step": step}) + end)


def test_list_shows_every_run_newest_first(run: RunDirectory, tmp_path: Path) -> None:
    write_records(tmp_path / "runs" / "second", "tiny")
    for file in (run.config, run.summary, run.metrics):
        os.utime(file, (1, 1))
    (tmp_path / "runs" / "not-a-run").mkdir()
    assert [item.name for item in list_runs(tmp_path / "runs")] == ["second", "support"]
    item = overview(run)
    assert (item.status, item.model, item.quantization, item.steps, item.loss) == (
        "complete", "lab/base", "none", 120, 0.025,
    )  # fmt: skip
    assert (item.base_exact_match, item.tuned_exact_match) == (0.025, 0.925)
    assert item.validation_loss == SUMMARY["tuned"]["loss"]


def write_members(folder: Path) -> list[RunDirectory]:
    """The runs of a search: the second is the best, the third has failed."""
    runs = [write_records(folder / f"trial-00{number}") for number in range(3)]
    for run, loss in zip(runs, (0.5, 0.25), strict=False):
        run.summary.write_text(json.dumps({**SUMMARY, "tuned": {**SUMMARY["tuned"], "loss": loss}}))
    runs[2].summary.write_text('{"status": "failed"}')
    return runs


def test_runs_of_a_search_are_named_by_their_folder_and_shown_by_the_best(run: RunDirectory, tmp_path: Path) -> None:
    write_members(tmp_path / "runs" / "study")
    (tmp_path / "runs" / "study" / "config.yaml").write_text("train: {}")  # what the runs have in common is no run
    listed = list_runs(tmp_path / "runs")
    assert {item.name for item in listed} == {"support", "study/trial-000", "study/trial-001", "study/trial-002"}
    group = next(item for item in grouped(listed) if isinstance(item, RunGroup))
    assert [item.name for item in group.runs] == ["study/trial-001", "study/trial-000", "study/trial-002"]
    assert (group.name, group.status) == ("study/", "2 complete, 1 failed")
    assert choose_run("study/trial-001", tmp_path / "runs").name == "trial-001"


def test_status_is_the_truth(running: RunDirectory, tmp_path: Path) -> None:
    assert overview(running).status == "running"
    killed = write_records(tmp_path / "runs" / "killed")
    killed.summary.write_text('{"status": "running", "base": null}')  # as kill -9 leaves it, the lock let go
    (killed.path / ".lock").write_text("1")
    assert overview(killed).status == "interrupted"
    killed.summary.write_text('{"status": "failed"}')
    assert overview(killed).status == "failed"
    for file, text in ((killed.summary, "{"), (killed.config, "model: [")):
        file.write_text(text)
        assert overview(killed).status == "damaged"


def test_the_mean_loss_is_that_of_the_last_steps_tokens(run: RunDirectory) -> None:
    lines = [{**METRICS[0], "step": n, "loss": 1.0, "trained_tokens": 10} for n in range(1, 100)]
    lines += [{**METRICS[0], "step": 100, "loss": 5.0, "trained_tokens": 30}]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    add_step(run, 101, end="")  # half written
    assert overview(run).recent_loss == pytest.approx((19 * 10 + 5.0 * 30) / 220)
    run.metrics.unlink()
    assert (overview(run).steps, overview(run).recent_loss) == (120, None)  # from the summary


def test_unknown_run_names_near_ones(run: RunDirectory, tmp_path: Path) -> None:
    assert choose_run("support", tmp_path / "runs").path == choose_run(str(run.path)).path == run.path
    with pytest.raises(ModelError, match=r"suport: no such run; did you mean support\?"):
        choose_run("suport", tmp_path / "runs")
    with pytest.raises(ModelError, match="xyz: no such run; there is support"):
        choose_run("xyz", tmp_path / "runs")
    with pytest.raises(ModelError, match="holds no run yet"):
        choose_run("support", tmp_path / "nowhere")


def test_follow_tells_each_step_once_until_the_run_ends(running: RunDirectory) -> None:
    keep_lines(running.events, 2)
    turns = iter([
        lambda: add_step(running, 3),
        lambda: add_step(running, 4, end=""),  # caught in the middle of writing
        lambda: running.events.open("a").write("\nnot a step\n"),
        lambda: keep_lines(running.events, 1),  # stopped and resumed from a checkpoint after step 1
        lambda: add_step(running, 2),
        lambda: (keep_lines(running.events, 1), add_step(running, 2), add_step(running, 3)),  # again, between two looks
        lambda: (add_step(running, 4), running.path.joinpath(".lock").unlink()),
    ])  # fmt: skip
    events = follow_events(running, wait=lambda _: next(turns)())
    assert [event.step for event in events] == [1, 2, 3, 4, 2, 2, 3, 4]
    assert next(turns, None) is None


def test_following_shows_steps_live_and_ctrl_c_leaves(running: RunDirectory, tmp_path: Path) -> None:
    keep_lines(running.events, 1)
    command = [sys.executable, "-m", "lmtune", "runs", "follow", "support"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("step 1 · ")
    add_step(running, 2)
    assert process.stdout.readline() == "step 2 · epoch 0.03 · loss 3.0000 · 1,600 tok/s\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "the run itself continues" in errors


@pytest.mark.slow
def test_command(run: RunDirectory, tmp_path: Path) -> None:
    shown = lmtune(tmp_path)
    assert (shown.returncode, "support" in shown.stdout) == (0, True), shown.stderr
    assert max(len(line) for line in shown.stdout.splitlines()) <= 60
    shown = lmtune(tmp_path, "show", "support")
    assert shown.returncode == 0, shown.stderr
    for text in ("support  complete", "92.5 %", "tokens per second: 1,234.5", "  rank: 4", "3 dropped"):
        assert text in shown.stdout, text
    assert lmtune(tmp_path, "results", "runs/support").stdout == run.results.read_text()
    assert lmtune(tmp_path, "follow", "support").stdout.count("\n") == 120
    for arguments, message in (
        (["show"], "write lmtune runs show NAME; which run?"),
        (["compare", "support"], "write lmtune runs compare FIRST SECOND; which runs?"),
        (["cancel", "support"], "no process writes to this run; it is complete"),
        (["rm", "support"], "nothing deleted"),
        (["show", "suport"], "did you mean support?"),
        (["list", "--dir", "nowhere"], "no runs in nowhere/"),
    ):
        done = lmtune(tmp_path, *arguments)
        assert message in done.stderr.replace("\n", " "), done.stderr
        assert done.returncode == (0 if "list" in arguments else 130 if "rm" in arguments else 2)
        assert done.stdout == ""


ODD: dict[str, tuple[str, bytes]] = {  # file, content
    "scores that are a number": ("summary.json", b'{"status": "complete", "base": 3}'),
    "settings that are not UTF-8": ("config.yaml", b"model: {name: \xe9}\n"),
    "settings whose model is a word": ("config.yaml", b"model: tiny\n"),
    "a step of other keys": ("metrics.jsonl", b'{"step": 1}\n'),
    "counts without their parts": ("data.json", b'{"train": {"rows": 3}}'),
}


@pytest.mark.parametrize("what", ODD)
def test_odd_files_of_one_run_break_no_list_and_are_named(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    file, content = ODD[what]
    (run.path / file).write_bytes(content)
    for action in ("list", "show", "follow", "results"):
        try:
            runs_recipe.main(runs_recipe.Action(action), None if action == "list" else ["support"])
        except LmtuneError as error:
            assert action == "show"
            assert f"runs/support/{file}: " in str(error)  # noqa: PT017


def test_runs_needs_no_heavy_library(run: RunDirectory, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom lmtune.errors import LmtuneError\nfrom lmtune.recipes import runs\n"
        "runs.main()\n"
        "for action in ('show', 'follow', 'cancel', 'compare', 'rm'):\n"
        "    try: runs.main(runs.Action(action), ['support', 'support'][:1 + (action == 'compare')], as_json=True)\n"
        "    except LmtuneError as error: print(type(error))\n"
        "print([name for name in ('torch', 'transformers', 'peft', 'datasets', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
