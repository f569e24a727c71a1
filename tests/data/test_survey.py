"""What is said of all rows together: right for any of them, and in few bytes a row."""

from __future__ import annotations

import random
import tracemalloc

import pytest

from lmtune.data import report as survey_module
from lmtune.data.report import FaultyRows, Survey
from lmtune.data.types import Example, Message


def example(line: int, prompt: str, completion: str) -> Example:
    """A row."""
    return Example("a", line, (Message("user", prompt), Message("assistant", completion)))


def survey_of(rows: list[tuple[str, str]]) -> Survey:
    """Rows numbered from 1."""
    survey = Survey()
    for line, row in enumerate(rows, start=1):
        survey.add(example(line, *row))
    return survey


@pytest.mark.parametrize("piece", [1, 3, 8192])
@pytest.mark.parametrize("seed", range(8))
def test_it_says_what_comparing_every_row_with_every_other_says(
    monkeypatch: pytest.MonkeyPatch, seed: int, piece: int
) -> None:
    monkeypatch.setattr(survey_module, "_PIECE_ROWS", piece)
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
    survey = survey_of(rows)
    for tally, expected in (
        (survey.duplicates(), duplicates), (survey.same_prompt(), same_prompt),
        (survey.shared_with(survey_of(others)), shared),
    ):  # fmt: skip
        assert (tally.count, tally.first) == (len(expected), expected[:5])


@pytest.mark.parametrize("kind", ["different", "twice"])
def test_a_row_takes_fewer_than_sixty_bytes(kind: str) -> None:
    """Whatever is asked, for rows of 40 bytes; 0.8 MB more are for the rows looked at together."""
    count = 20_000
    different = {"different": count, "twice": count // 2}[kind]
    tracemalloc.start()
    try:
        survey = Survey()
        for number in range(count):
            survey.add(example(number, str(number % different), "c"))
        survey.duplicates(), survey.same_prompt(), survey.characters(), survey.shared_with(survey)
        assert tracemalloc.get_traced_memory()[1] < 60 * count + 800_000
    finally:
        tracemalloc.stop()


def test_reasons_beyond_twenty_are_one() -> None:
    faulty = FaultyRows()
    for number in range(52):
        faulty.add(f"reason {chr(97 + number % 26)}, value {number}", f"f:{number}")
    reasons = faulty.as_dict()["reasons"]
    assert [reason["count"] for reason in reasons] == [2] * 20 + [12]
    assert (reasons[0]["reason"], reasons[0]["first"]) == ("reason a, value 0", ["f:0", "f:26"])
    assert reasons[-1]["reason"] == "other reasons"
