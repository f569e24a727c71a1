"""Counts and duplicates of all rows: right for any rows, in few bytes a row; the report survives its JSON."""

from __future__ import annotations

import json
import random
import tracemalloc

import pytest

from lmtune.data.report import DataReport, DuplicateIndex, FaultyRows, HeldOut, PartReport, RowCounter
from lmtune.data.types import Example, Message


def example(line: int, prompt: str, completion: str) -> Example:
    """A row."""
    return Example("a", line, (Message("user", prompt), Message("assistant", completion)))


def index_of(rows: list[tuple[str, str]]) -> DuplicateIndex:
    """Rows numbered from 1."""
    index = DuplicateIndex()
    for line, row in enumerate(rows, start=1):
        index.add(example(line, *row))
    return index


@pytest.mark.parametrize("seed", range(4, 8))
def test_duplicates_are_those_that_comparing_all_rows_finds(seed: int) -> None:
    chance = random.Random(seed)
    rows, others = (
        [(chance.choice("pqrst"[:seed] + "u"), chance.choice("xyz")) for _ in range(seed * 4)] for _ in "12"
    )
    duplicates, same_prompt = [], []
    for number, row in enumerate(rows):
        prompts = [prompt for prompt, _ in rows[:number]]
        if row in rows[:number]:
            duplicates.append(f"a:{number + 1} (= a:{rows.index(row) + 1})")
        elif row[0] in prompts:
            same_prompt.append(f"a:{number + 1} (as a:{prompts.index(row[0]) + 1})")
    shared = [f"a:{number + 1}" for number, row in enumerate(rows) if row in others]
    index = index_of(rows)
    found = index.duplicates(), index.same_prompt(), index.shared_with(index_of(others))
    assert found == tuple(RowCounter(len(expected), expected[:5]) for expected in (duplicates, same_prompt, shared))


def test_a_row_takes_fewer_than_sixty_bytes() -> None:
    """Whatever is asked, for rows of 40 bytes; 0.8 MB more are Python's own."""
    count = 20_000
    tracemalloc.start()
    try:
        index = DuplicateIndex()
        for number in range(count):
            index.add(example(number, str(number), "c"))
        index.duplicates(), index.same_prompt(), index.characters(), index.shared_with(index)
        assert tracemalloc.get_traced_memory()[1] < 60 * count + 800_000
    finally:
        tracemalloc.stop()


def test_reasons_beyond_twenty_are_one() -> None:
    faulty = FaultyRows()
    for number in range(52):
        faulty.add(f"reason {chr(97 + number % 26)}, value {number}", f"f:{number}")
    assert [reason.count for reason in faulty.reasons] == [2] * 20 + [12]
    assert (faulty.reasons[0].reason, faulty.reasons[0].first) == ("reason a, value 0", ["f:0", "f:26"])
    assert faulty.reasons[-1].reason == "other reasons"


def test_a_report_is_the_same_after_json() -> None:
    faulty = FaultyRows()
    faulty.add("completion is empty", "a:7")
    train = PartReport(files=["a"], sha256=["0"], faulty=faulty, dropped={"too_long": RowCounter(1, ["a:3"])})
    held_out = PartReport(files=["b"], sha256=["1"], also_in_train=RowCounter(1, ["b:2"]))
    for validation in (None, HeldOut(3), held_out):
        report = DataReport("plain text", train, validation)
        tree = json.loads(json.dumps(report.to_dict()))
        assert tree["validation"] is None if validation is None else tree["validation"]
        assert "rendered_at" not in tree
        assert "also_in_train" not in tree["train"]
        assert DataReport.from_dict(tree) == report


def test_a_report_of_an_earlier_version_is_read_and_a_damaged_one_is_an_error() -> None:
    tree = {"template": "plain", "train": {"files": ["a"], "sha256": ["0"], "rows": 3}, "validation": None, "new": 1}
    assert DataReport.from_dict(tree).train.rows == 3
    for damage in ({"train": {"files": 3}}, {"train": None}, {"validation": []}, {"template": 3}):
        with pytest.raises(ValueError, match="validation error"):
            DataReport.from_dict({**tree, **damage})
