"""`check_data` and `lmtune check`: its report of good rows and of bad ones, and how light it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lmtune.data.checking import check_data, describe_check, inspect_data
from lmtune.data.report import RowCounter
from lmtune.errors import DataError

ROOT = Path(__file__).parents[2]


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(prompt: str, completion: str = "c") -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return written(
        Path("train.jsonl"), row("a"), row("b"), row("a"), row("b", "other"), row("longest", "x" * 93), row("a")
    )


def test_a_good_file(train: Path) -> None:
    check = check_data([train])
    assert check.train.num_rows == 6
    assert check.train.formats == {"train.jsonl": "prompt/completion"}
    assert check.train.duplicates == RowCounter(2, [f"train.jsonl:{line} (= train.jsonl:1)" for line in (3, 6)])
    assert check.train.same_prompt == RowCounter(1, ["train.jsonl:4 (as train.jsonl:2)"])
    assert check.train.characters == {"shortest": 2, "median": 2, "95 %": 100, "longest": 100}
    assert "2 rows equal to an earlier one" in describe_check(check)


def test_validation_rows_that_stand_in_train_are_counted(train: Path) -> None:
    validation = written(Path("validation.jsonl"), row("new"), row("b"), row("b", "third"))
    check = check_data([train], [validation])
    assert check.also_in_train == RowCounter(1, ["validation.jsonl:2"])
    assert "1 row also in train: validation.jsonl:2" in describe_check(check)


def test_a_second_check_does_not_read_the_rows_again(train: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = check_data([train])
    monkeypatch.setattr("lmtune.data.checking.read_examples", lambda *_: pytest.fail("read again"))
    assert check_data([train]).train == first.train
    written(train, row("changed"))
    with pytest.raises(pytest.fail.Exception, match="read again"):
        check_data([train])


def test_faults_are_raised_and_not_remembered(train: Path) -> None:
    with train.open("a") as file:
        file.write("nonsense\n")
    for _ in range(2):
        with pytest.raises(DataError, match=r"1 fault in the data(.|\n)*train.jsonl:7: "):
            check_data([train])
    assert inspect_data([train]).report.num_faults == 1
    assert inspect_data([train]).train.num_rows == 6


def test_faulty_rows_are_left_out_on_request_and_remembered(train: Path) -> None:
    with train.open("a") as file:
        file.write('nonsense\n{"prompt": 3, "completion": "c"}\n')
    for _ in range(2):
        check = check_data([train], (), "skip")
        assert (check.train.num_rows, check.train.faulty.count) == (6, 2)
    described = describe_check(check, skips=True)
    assert "2 faulty rows left out (data.faulty_rows: skip):" in described
    assert "1: prompt is a number (3); it must be a string: train.jsonl:8" in described
    with pytest.raises(DataError, match="2 faults"):
        check_data([train], (), "error")


def test_faulty_validation_rows_must_leave_one(train: Path) -> None:
    validation = written(Path("v.jsonl"), {"prompt": "x"})
    with pytest.raises(DataError, match=r"v.jsonl:1: completion missing"):
        check_data([train], [validation], "skip")


def test_what_a_folder_holds_besides_is_said_though_the_check_is_remembered(train: Path) -> None:
    Path("data").mkdir()
    train.rename("data/train.jsonl")
    assert check_data(["data"]).train.warnings == []
    Path("data/more.jsonl.gz").write_bytes(b"")
    assert "data: not read: more.jsonl.gz" in check_data(["data"]).train.warnings[0]


def test_duplicates_are_found_across_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(Path("a.jsonl"), row("a"))
    Path("b.json").write_text(
        json.dumps([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}]}])
    )
    assert check_data(["a.jsonl", "b.json"]).train.duplicates.first == ["b.json:1 (= a.jsonl:1)"]


def run_check(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`lmtune check` as a user runs it; the modules it loaded stand in the last line of stderr."""
    program = (
        "import atexit, sys; atexit.register(lambda: print(' '.join(sys.modules), file=sys.stderr));"
        "from lmtune.run import run; from lmtune.recipes.check import main; run(main)"
    )
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=cwd, timeout=60
    )


def test_the_command_says_what_is_there_without_torch(train: Path) -> None:
    done = run_check("train.jsonl", cwd=train.parent)
    assert done.returncode == 0, done.stderr
    assert "train.jsonl: 6 rows, prompt/completion" in done.stdout
    assert "lmtune preview train.jsonl" in done.stdout
    loaded = done.stderr.splitlines()[-1].split()
    assert "lmtune.data.checking" in loaded
    assert not {"torch", "transformers", "datasets", "pyarrow"} & set(loaded)


def test_the_command_prints_every_bad_line_and_ends_with_2(train: Path) -> None:
    with train.open("a") as file:
        file.write('{"prompt": "x"}\n' * 30)
    done = run_check("train.jsonl", cwd=train.parent)
    assert done.returncode == 2
    assert (
        sum(line.startswith("train.jsonl:") and "completion missing" in line for line in done.stdout.splitlines()) == 30
    )
    assert "30 faults" in done.stderr


def test_the_command_shows_what_is_left_without_faulty_rows(train: Path) -> None:
    with train.open("a") as file:
        file.write('{"prompt": "x"}\n' * 2)
    Path("c.yaml").write_text("model: {name: tiny}\ndata: {train: train.jsonl, faulty_rows: skip}\n")
    for arguments in (("train.jsonl", "--skip-faulty"), ("--config", "c.yaml")):
        done = run_check(*arguments, cwd=train.parent)
        assert done.returncode == 0, done.stderr
        assert "2 faulty rows left out" in done.stdout
        assert "2: completion missing beside prompt: train.jsonl:7, train.jsonl:8" in done.stdout
        assert "6 rows left" in done.stdout
    written(train, {"prompt": "x"})
    assert run_check("train.jsonl", "--skip-faulty", cwd=train.parent).returncode == 2


def test_the_command_takes_the_data_of_a_config(train: Path) -> None:
    written(Path("v.jsonl"), row("a"))
    Path("c.yaml").write_text("model: {name: tiny}\ndata: {train: train.jsonl, validation: v.jsonl}\n")
    done = run_check("--config", "c.yaml", cwd=train.parent)
    assert done.returncode == 0, done.stderr
    assert "v.jsonl: 1 row," in done.stdout
    assert "also in train" in done.stdout


@pytest.mark.parametrize(("arguments", "words"), [([], "say what to check"), (["nothing.jsonl"], "no such file")])
def test_mistakes_end_with_2_and_one_message(arguments: list[str], words: str, train: Path) -> None:
    done = run_check(*arguments, cwd=train.parent)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
