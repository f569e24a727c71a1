"""Rows that are answered: with an answer or without, in every form that a question has."""

import json
from pathlib import Path
from typing import Any

import pytest

from lmtune.data.inputs import read_inputs
from lmtune.data.reading import ReadReport
from lmtune.data.sources import find_files

ASKED, ANSWERED = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("row", "roles"),
    [
        ({"prompt": "q"}, "u"), ({"prompt": "q", "completion": "a"}, "ua"), ({"messages": [ASKED]}, "u"),
        ({"prompt": [ASKED], "completion": [ANSWERED]}, "ua"), ({"prompt": [ASKED]}, "u"),
        ({"conversations": [{"from": "human", "value": "q"}]}, "u"), ({"conversations": [ASKED, ANSWERED]}, "ua"),
    ],
)  # fmt: skip
def test_a_question_in_every_form(row: dict[str, Any], roles: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({**row, "label": "x"}) + "\n")
    report = ReadReport()
    ((example, read),) = read_inputs(find_files([tmp_path / "rows.jsonl"]), report)
    assert "".join(message.role[0] for message in example.messages) == roles
    assert read == {**row, "label": "x"}
    assert not report.faults
