"""`lmtune runs`: listing, showing and following runs, as far as each of them got."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lmtune.errors import LmtuneError, ModelError
from lmtune.io.atomic import keep_lines
from lmtune.recipes import runs as runs_recipe
from lmtune.runs.cards import runs_table
from lmtune.runs.history import choose_run, follow_steps, is_running, last_step, list_runs, overview
from lmtune.runs.store import RunDirectory
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
    with run.metrics.open("a") as file:
        file.write(json.dumps({**METRICS[0], "step": step}) + end)


def test_list_shows_every_run_newest_first(run: RunDirectory, tmp_path: Path) -> None:
    write_records(tmp_path / "runs" / "second", "tiny")
    for file in (run.config, run.summary, run.metrics):
        os.utime(file, (1, 1))
    (tmp_path / "runs" / "no-run").mkdir()
    (tmp_path / "runs" / "file").write_text("")
    assert [item.name for item in list_runs(tmp_path / "runs")] == ["second", "support"]
    item = overview(run)
    assert (item.status, item.model, item.quantization, item.steps, item.loss) == (
        "complete", "lab/base", "none", 120, 0.025,
    )  # fmt: skip
    assert (item.base_exact_match, item.tuned_exact_match) == (0.025, 0.925)


def test_status_is_the_truth(running: RunDirectory, tmp_path: Path) -> None:
    assert overview(running).status == "running"
    killed = write_records(tmp_path / "runs" / "killed")
    killed.summary.write_text('{"status": "running", "base": null}')  # as kill -9 leaves it, the lock let go
    assert overview(killed).status == "interrupted"
    (killed.path / ".lock").write_text("1")
    assert overview(killed).status == "interrupted"
    killed.summary.write_text('{"status": "failed"}')
    assert overview(killed).status == "failed"
    for file, text in ((killed.summary, "{"), (killed.config, "model: [")):
        file.write_text(text)
        assert overview(killed).status == "damaged"


def test_the_list_shows_the_mean_loss_of_the_last_steps_and_that_of_held_out_rows(run: RunDirectory) -> None:
    lines = [{**METRICS[0], "step": n, "loss": 1.0, "trained_tokens": 10} for n in range(1, 100)]
    lines += [{**METRICS[0], "step": 100, "loss": 5.0, "trained_tokens": 30}]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    item = overview(run)
    assert item.recent_loss == pytest.approx((19 * 10 + 5.0 * 30) / 220)
    assert item.validation_loss == SUMMARY["tuned"]["loss"]
    for width, titles in ((80, ["train loss"]), (130, ["train loss", "held-out loss"])):
        table = runs_table([item], width)
        assert [str(column.header) for column in table.columns if "loss" in str(column.header)] == titles
    assert f"{item.recent_loss:.4f}" in list(table.columns[5].cells)


def test_last_step_ignores_half_a_line(run: RunDirectory) -> None:
    add_step(run, 121, end="")
    assert last_step(run)["step"] == 120
    run.metrics.write_text("")
    assert last_step(run) == {}
    run.metrics.unlink()
    assert last_step(run) == {}
    assert overview(run).steps == 120  # from the summary


def test_unknown_run_names_near_ones(run: RunDirectory, tmp_path: Path) -> None:
    assert choose_run("support", tmp_path / "runs").path == choose_run(run.path).path == run.path
    with pytest.raises(ModelError, match=r"suport: no such run; did you mean support\?"):
        choose_run("suport", tmp_path / "runs")
    with pytest.raises(ModelError, match="xyz: no such run; there is support"):
        choose_run("xyz", tmp_path / "runs")
    with pytest.raises(ModelError, match="holds no run yet"):
        choose_run("support", tmp_path / "nowhere")


def test_follow_tells_each_step_once_until_the_run_ends(running: RunDirectory) -> None:
    keep_lines(running.metrics, 2)
    turns = iter([
        lambda: add_step(running, 3),
        lambda: add_step(running, 4, end=""),  # caught in the middle of writing
        lambda: running.metrics.open("a").write("\n"),
        lambda: keep_lines(running.metrics, 1),  # stopped and resumed from a checkpoint after step 1
        lambda: add_step(running, 2),
        lambda: (add_step(running, 3), running.path.joinpath(".lock").unlink()),
    ])  # fmt: skip
    steps = follow_steps(running, wait=lambda _: next(turns)())
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 2, 3]
    assert next(turns, None) is None


def test_follow_of_a_finished_run_ends_at_once(run: RunDirectory) -> None:
    assert len(list(follow_steps(run))) == 120


def test_following_shows_steps_live_and_ctrl_c_leaves(running: RunDirectory, tmp_path: Path) -> None:
    keep_lines(running.metrics, 1)
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
    assert "the run itself goes on" in errors


@pytest.mark.slow
def test_command(run: RunDirectory, tmp_path: Path) -> None:
    listed = lmtune(tmp_path)
    assert (listed.returncode, "support" in listed.stdout) == (0, True), listed.stderr
    assert max(len(line) for line in listed.stdout.splitlines()) <= 60
    shown = lmtune(tmp_path, "show", "support")
    assert shown.returncode == 0, shown.stderr
    for text in ("support  complete", "92.5 %", "tokens per second: 1,234.5", "  rank: 4", "3 dropped"):
        assert text in shown.stdout, text
    assert lmtune(tmp_path, "results", "runs/support").stdout == run.results.read_text()
    assert lmtune(tmp_path, "follow", "support").stdout.count("\n") == 120


ODD: dict[str, tuple[str, bytes]] = {  # file, content
    "scores that are a number": ("summary.json", b'{"status": "complete", "base": 3}'),
    "scores that are words": ("summary.json", b'{"status": "complete", "tuned": {"exact_match": "all"}}'),
    "steps that are a word": ("summary.json", b'{"status": "complete", "steps": "many"}'),
    "a summary of brackets": ("summary.json", b"[" * 100_000),
    "settings that are no UTF-8": ("config.yaml", b"model: {name: \xe9}\n"),
    "settings whose model is a word": ("config.yaml", b"model: tiny\n"),
    "steps that are no UTF-8": ("metrics.jsonl", b"\xff\xfe\n"),
    "a step of other keys": ("metrics.jsonl", b'{"step": 1}\n'),
    "a loss that is a word": ("metrics.jsonl", b'{"step": 1, "loss": "low", "epoch": 1, "tokens": 1, "seconds": 1}\n'),
    "counts without their parts": ("data.json", b'{"train": {"rows": 3}}'),
    "counts that are words": ("data.json", b'{"train": {"rows": "x", "formats": []}}'),
    "no counts of train": ("data.json", b'{"validation": null}'),
    "results that are no UTF-8": ("results.csv", b"step\n\xff\n"),
}


@pytest.mark.parametrize("what", ODD)
def test_odd_files_of_one_run_break_no_list_and_are_named(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    file, content = ODD[what]
    (run.path / file).write_bytes(content)
    for action in runs_recipe.Action:
        try:
            runs_recipe.main(action, "support")
        except LmtuneError as error:
            assert action is runs_recipe.Action.show
            assert f"runs/support/{file}: " in str(error)  # noqa: PT017


def test_a_folder_in_place_of_the_steps_breaks_no_list(run: RunDirectory) -> None:
    run.metrics.unlink()
    run.metrics.mkdir()
    assert overview(run).steps == 120
    assert list(follow_steps(run)) == []


@pytest.mark.parametrize("name", ["metrics.jsonl", ".lock"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_plain_file_is_not_waited_for(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None], name: str
) -> None:
    def opened(*_: object, **__: object) -> None:
        raise AssertionError("opened, so that a pipe is waited for")

    (run.path / name).unlink(missing_ok=True)
    make(run.path / name)
    if name == ".lock":
        monkeypatch.setattr("builtins.open", opened)
        assert not is_running(run)
    else:
        monkeypatch.setattr("pathlib.Path.open", opened)
        assert last_step(run) == {}
        assert list(follow_steps(run)) == []


def test_steps_of_numbers_too_large_are_passed_over(run: RunDirectory, tmp_path: Path) -> None:
    """Others are shown."""
    huge = "1" + 400 * "0"
    for key in ("tokens", "loss"):
        for value in (huge, "NaN", "1e999"):
            line = json.dumps({**METRICS[0], "step": 121, key: 0.5}).replace(f'"{key}": 0.5', f'"{key}": {value}')
            with run.metrics.open("a") as file:
                file.write(line + "\n")
    add_step(run, 122)
    assert [step["step"] for step in follow_steps(run)] == [*range(1, 121), 122]
    runs_recipe.print_steps(run)
    runs_recipe.print_list(tmp_path / "runs")


@pytest.mark.slow
def test_mistakes(run: RunDirectory, tmp_path: Path) -> None:
    for arguments, message in (
        (["show"], "which run? Write lmtune runs show NAME"),
        (["show", "suport"], "did you mean support?"),
        (["list", "--dir", "nowhere"], "no runs in nowhere/"),
    ):
        done = lmtune(tmp_path, *arguments)
        assert message in done.stderr.replace("\n", " "), done.stderr
        assert done.returncode == (0 if "list" in arguments else 2)
        assert done.stdout == ""
    run.results.unlink()
    assert "no results yet" in lmtune(tmp_path, "results", "support").stderr


def test_runs_needs_no_heavy_library(run: RunDirectory, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom lmtune.recipes import runs\n"
        "for action in ('list', 'show', 'follow'): runs.main(runs.Action(action), 'support')\n"
        "print([name for name in ('torch', 'transformers', 'peft', 'datasets', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
