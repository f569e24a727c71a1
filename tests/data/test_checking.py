"""`check_data`: what it tells of good rows and of bad ones; the command is in tests/bad_input/test_data.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lmtune.data.checking import check_data, describe_check
from lmtune.data.report import RowCounter
from lmtune.errors import DataError


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
    validation = written(Path("v.jsonl"), row("new"), row("b"), row("b", "third"))
    check = check_data([train], [validation])
    assert check.also_in_train == RowCounter(1, ["v.jsonl:2"])
    assert "1 row also in train: v.jsonl:2" in describe_check(check)


def test_a_second_check_does_not_read_the_rows_again(train: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = check_data([train])
    monkeypatch.setattr("lmtune.data.checking.read_examples", lambda *_: pytest.fail("read again"))
    assert check_data([train]).train == first.train
    written(train, row("changed"))
    with pytest.raises(pytest.fail.Exception, match="read again"):
        check_data([train])


def test_faulty_rows_are_left_out_on_request_and_remembered(train: Path) -> None:
    with train.open("a") as file:
        file.write('nonsense\n{"prompt": 3, "completion": "c"}\n')
    for _ in range(2):
        check = check_data([train], (), "skip")
        assert (check.train.num_rows, check.train.faulty.count) == (6, 2)
    described = describe_check(check, skips=True)
    assert "2 faulty rows left out (data.faulty_rows: skip):" in described
    assert "1: prompt is a number (3); it must be a string: train.jsonl:8" in described
    for _ in range(2):
        with pytest.raises(DataError, match=r"2 faults in the data(.|\n)*train.jsonl:7: "):
            check_data([train], (), "error")
    with pytest.raises(DataError, match=r"v.jsonl:1: completion missing"):
        check_data([train], [written(Path("v.jsonl"), {"prompt": "x"})], "skip")


def test_what_a_folder_holds_besides_is_said_though_the_check_is_remembered(train: Path) -> None:
    Path("data").mkdir()
    train.rename("data/train.jsonl")
    assert check_data(["data"]).train.warnings == []
    Path("data/more.jsonl.bz2").write_bytes(b"")
    assert "data: not read: more.jsonl.bz2" in check_data(["data"]).train.warnings[0]


def test_labels_weights_and_contradictions_are_counted(tmp_path: Path) -> None:
    rows = [{"text": f"t {n // 2}", "label": "xy"[n % 2], "weight": n % 3} for n in range(6)]
    check = check_data([written(tmp_path / "train.jsonl", *rows)], rows="labelled")
    assert (check.train.num_rows, check.train.zero_weight.count, check.train.total_weight) == (6, 2, 6)
    assert check.train.labels.counts == {"y": 2, "x": 2}
    described = describe_check(check)
    assert "2 labels" in described
    assert "with an earlier row's prompt and another label: " in described
    assert check_data([tmp_path / "train.jsonl"], rows="labelled").train == check.train, "from the cache"
