"""`--json` of the reading verbs: one document on stdout, nothing else there, with the keys that are documented."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lmtune.doctor import Finding
from lmtune.errors import DataError
from lmtune.recipes import check, doctor, plan, preview, runs
from lmtune.recipes.runs import Action
from tests.sample_run import write_records

ROW = json.dumps({"prompt": "When are you open?", "completion": "From nine to five."}) + "\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three rows."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.jsonl").write_text(ROW * 3)
    return tmp_path


def document(capsys: pytest.CaptureFixture[str]) -> Any:
    """All of stdout, as JSON."""
    return json.loads(capsys.readouterr().out)


def test_check(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check.main(["my.jsonl"], as_json=True)
    tree = document(capsys)
    assert (tree["num_faults"], tree["faults"], tree["validation"]) == (0, [], None)
    assert tree["train"]["num_rows"] == 3
    assert tree["train"]["duplicates"]["count"] == 2
    (folder / "bad.jsonl").write_text(ROW + '{"prompt": "a"}\n')
    with pytest.raises(DataError, match="1 fault"):
        check.main(["bad.jsonl"], as_json=True)
    tree = document(capsys)
    assert tree["num_faults"] == 1
    assert tree["faults"][0].startswith("bad.jsonl:2:")


def test_preview(capsys: pytest.CaptureFixture[str]) -> None:
    preview.main(["my.jsonl"], model="tiny", rows=2, as_json=True)
    tree = document(capsys)
    assert (tree["model"], len(tree["rows"])) == ("tiny", 2)
    row = tree["rows"][0]
    assert (row["where"], row["dropped"]) == ("my.jsonl:1", None)
    (found,) = row["documents"]
    assert "From nine to five." in found["text"]
    assert len(found["input_ids"]) == len(found["tokens"]) == len(found["trained"])
    assert any(found["trained"])


@pytest.mark.slow
def test_plan(capsys: pytest.CaptureFixture[str]) -> None:
    plan.main(model="tiny", data=["my.jsonl"], as_json=True)
    tree = document(capsys)
    assert (tree["steps"] > 0, tree["rows"]) == (True, 3)
    assert set(tree) >= {"tokens", "memory", "free_gib", "seconds", "advice"}


def test_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs.main(Action.list, as_json=True)
    assert document(capsys) == []
    write_records(folder / "runs" / "support")
    runs.main(Action.list, as_json=True)
    (item,) = document(capsys)
    shown = (item["name"], item["status"], item["steps"], item["tuned_exact_match"])
    assert shown == ("support", "complete", 120, 0.925)
    runs.main(Action.show, ["support"], as_json=True)
    tree = document(capsys)
    assert tree["summary"]["tuned"]["exact_match"] == 0.925
    assert tree["settings"]["model"]["name"] == "lab/base"
    assert tree["data"]["train"]["rows"] == 483
    runs.main(Action.results, ["support"], as_json=True)
    rows = document(capsys)
    assert all(isinstance(row["step"], int) for row in rows)
    runs.main(Action.follow, ["support"], as_json=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[-1]["step"] == 120


def test_doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    findings = [Finding("disk", "warn", "9 GiB free", "make room")]
    monkeypatch.setattr(doctor, "examine", lambda folder: iter(findings))
    doctor.main(as_json=True)
    found = {"name": "disk", "level": "warn", "text": "9 GiB free", "fix": "make room"}
    assert document(capsys) == {"works": True, "findings": [found]}
