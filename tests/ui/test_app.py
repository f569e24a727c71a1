"""Which model the app shows by itself, and the commands' first answers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lmtune.recipes.app import example_questions, newest_run

ROOT = Path(__file__).parents[2]


def make_run(folder: Path, name: str, train: str = "support.jsonl", model: str = "tiny", adapter_time: int = 0) -> Path:
    run = folder / name
    (run / "adapter").mkdir(parents=True)
    (run / "config.yaml").write_text(f"model: {{name: {model}}}\ndata: {{train: {train}}}\n")
    if adapter_time:
        (run / "adapter" / "adapter_config.json").write_text("{}")
        os.utime(run / "adapter" / "adapter_config.json", (adapter_time, adapter_time))
    return run


def test_the_newest_run_that_has_ended(tmp_path: Path) -> None:
    assert newest_run(tmp_path / "none") is None
    make_run(tmp_path, "older", adapter_time=1000)
    newer = make_run(tmp_path, "newer", adapter_time=2000)
    make_run(tmp_path, "unfinished")
    (tmp_path / "no-run" / "adapter").mkdir(parents=True)
    (tmp_path / "no-run" / "adapter" / "adapter_config.json").write_text("{}")
    assert newest_run(tmp_path) == str(newer)
    whole = make_run(tmp_path, "tuned-whole")
    (whole / "merged").mkdir()
    (whole / "merged" / "config.json").write_text("{}")
    assert newest_run(tmp_path) == str(whole)


def test_questions_are_offered_where_they_can_be_answered(tmp_path: Path) -> None:
    assert len(example_questions("tiny")) == 4
    assert any("park" in question for question in example_questions(str(make_run(tmp_path, "shop"))))
    assert example_questions(str(make_run(tmp_path, "own", train="own.jsonl"))) == ()
    assert example_questions(str(make_run(tmp_path, "large", model="Qwen/Qwen3-0.6B"))) == ()
    assert example_questions("Qwen/Qwen3-0.6B") == ()
    broken = make_run(tmp_path, "broken")
    (broken / "config.yaml").write_text("model: [")
    assert example_questions(str(broken)) == ()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["app.py", "tiny", "--host", "0.0.0.0"], "add --auth user:password"),
        (["recipes/app.py", "no/such/folder/anywhere"], "no/such/folder/anywhere"),
        (["recipes/chat.py", "tiny", "--temperature", "nan"], "temperature: nan"),
    ],
)
def test_what_is_wrong_is_said_in_one_message_with_exit_code_2(command: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, stdin=subprocess.DEVNULL,
        env={**os.environ, "COLUMNS": "200"}, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
