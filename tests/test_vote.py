"""Blind votes through a pipe and in a terminal: shuffled sides, each vote on disk at once, resumed, told at the end."""

import io
import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lmtune.errors import ConfigError
from lmtune.evaluation.kept import KeptLines
from lmtune.evaluation.vote import Ballot, KeptAnswers, Question
from lmtune.recipes import vote
from tests.sample_run import write_base, write_run
from tests.workplace import environment, write_rows

COUNT = 12


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Two files of answers: `good` of one model, `bad` of the other, and one answer that both give."""
    for name, said in (("a", "bad"), ("b", "good")):
        rows = [{"prompt": f"Question {n}?", "prediction": said if n else "same"} for n in range(COUNT)]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    return tmp_path


def command(*more: str) -> list[str]:
    return [sys.executable, "-m", "lmtune", "vote", "a.jsonl", "b.jsonl", *more]


def piped(place: Path, keys: str, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*more), input=keys, text=True, capture_output=True, cwd=place, env=environment(place), check=False
    )


def votes(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / "votes.jsonl").read_text().splitlines()]


def good_keys(questions: list[Question], ballot: Ballot) -> str:
    """What a voter presses who sees which answer is good."""
    return "".join("1" if ballot.sides(question)[0] == "good" else "2" for question in questions)


def ballot_of(folder: Path, seed: int = 0) -> Ballot:
    questions = [
        Question(f"a.jsonl:{n + 1}", f"Question {n}?", *(("bad", "good") if n else ("same", "same")))
        for n in range(COUNT)
    ]
    return Ballot(questions, KeptLines(folder / "none.jsonl"), seed)


def test_a_pipe_votes_and_the_same_command_continues(place: Path, tmp_path: Path) -> None:
    ballot = ballot_of(tmp_path)
    keys = good_keys(ballot.left, ballot)
    assert set(keys) == {"1", "2"}, "the sides are shuffled"
    first = piped(place, "\n".join(keys[:5]) + "\nq")
    assert first.returncode == 0, first.stderr
    assert "6 left; the same command continues (votes.jsonl)" in first.stderr
    assert not first.stdout, "who is who is told at the end"
    assert "b.jsonl" not in first.stderr
    assert len(votes(place)) == 5 + 1, "equal answers are a tie without a question"
    second = piped(place, f"x{keys[5]}0{keys[7:]}", "--json")
    assert second.returncode == 0, second.stderr
    assert "7 of 11" in second.stderr
    tree = json.loads(second.stdout)
    assert (tree["wins"], tree["losses"], tree["ties"], tree["same"]) == (10, 0, 2, 1)
    assert tree["win_share"] == pytest.approx(11 / 12)
    assert {line["winner"] for line in votes(place)} == {"second", "tie"}
    third = piped(place, "")
    assert "b.jsonl is better: it wins" in third.stdout
    assert "a.jsonl (first): 0 votes; b.jsonl (second): 10; neither: 2" in third.stdout


def test_another_seed_shuffles_otherwise_and_the_same_seed_alike(tmp_path: Path) -> None:
    one, again, other = (ballot_of(tmp_path, seed) for seed in (0, 0, 1))
    assert good_keys(one.left, one) == good_keys(again.left, again) != good_keys(other.left, other)


def test_a_terminal_takes_single_keys(place: Path, tmp_path: Path) -> None:
    ballot = ballot_of(tmp_path)
    keys = good_keys(ballot.left, ballot)
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        command(), stdin=terminal, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=place, env=environment(place)
    )
    os.close(terminal)
    try:
        for number, key in enumerate([*keys[:3], "q"]):
            wait_for(lambda number=number: (place / "votes.jsonl").exists() and len(votes(place)) == number + 1)
            os.write(controller, key.encode())  # without Enter
        assert process.wait(20) == 0
        assert process.stdout is not None
        assert b"left; the same command continues" in process.stdout.read()
    finally:
        process.kill()
        os.close(controller)
    assert len(votes(place)) == 3 + 1


def wait_for(is_there: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not is_there():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_votes_of_other_answers_are_refused(place: Path) -> None:
    assert piped(place, "1q").returncode == 0
    write_rows(place / "b.jsonl", [{"prompt": f"Question {n}?", "prediction": "new"} for n in range(COUNT)])
    refused = piped(place, "1q")
    assert refused.returncode == 2
    assert "holds answers with another second model" in refused.stderr
    (place / "votes.answers.json").unlink()
    refused = piped(place, "1q")
    assert "votes of other answers; give the same models and prompts" in refused.stderr
    assert piped(place, "q", "-o", "others.jsonl").returncode == 0


def test_what_is_missing_is_said(place: Path) -> None:
    write_rows(place / "b.jsonl", [{"prompt": "Another?", "prediction": "new"}])
    assert "b.jsonl: has no answer to 12 prompts, such as 'Question 0?'" in piped(place, "").stderr
    with pytest.raises(ConfigError, match="--prompts: missing"):
        vote.main("tiny", "tiny")


def test_a_vote_that_was_cut_off_is_asked_again(place: Path) -> None:
    assert piped(place, "12q").returncode == 0
    text = (place / "votes.jsonl").read_text()
    (place / "votes.jsonl").write_text(text[:-9])
    assert "2 of 11" in piped(place, "q").stderr
    assert len(votes(place)) == 2


def test_answers_are_made_once(tmp_path: Path) -> None:
    asked, made = {"first model": "a"}, list[int]()

    def make() -> list[str]:
        made.append(1)
        return ["yes"]

    for _ in range(2):
        assert KeptAnswers(tmp_path / "kept.json", asked).get("first", make) == ["yes"]
    assert made == [1]


@pytest.mark.slow
def test_models_answer_before_the_first_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_base(tmp_path / "base")
    run = write_run(tmp_path / "support", str(tmp_path / "base"))
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"Say {n}"} for n in range(3)])
    for keys in ("q", "000"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(keys))
        vote.main(
            str(tmp_path / "base"), str(run.path), tmp_path / "prompts.jsonl", output=tmp_path / "votes.jsonl",
            max_new_tokens=6,
        )  # fmt: skip
    told = capsys.readouterr()
    assert "neither: 3" in told.out
    kept = json.loads((tmp_path / "votes.answers.json").read_text())
    assert [len(answers) for answers in kept["answers"].values()] == [3, 3]
