"""Blind votes of a person between two models' answers: which side is whose is shuffled, and told at the end alone.

    ballot = Ballot(questions, KeptLines(Path("votes.jsonl")), seed=0)
    ask_votes(ballot, read_key)                      # or: for question in ballot.left: ballot.vote(question, "1")
    ballot.result                                    # of all votes so far

Every vote is on the disk before the next question is shown, and the answers are kept beside the votes, so that the same
command continues at once where it was left.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from lmtune.errors import ConfigError, DataError
from lmtune.evaluation.answer_files import is_answer_file
from lmtune.evaluation.answer_metrics import exact
from lmtune.evaluation.intervals import Interval, share_sentence, win_interval
from lmtune.evaluation.kept import KeptLines
from lmtune.io.atomic import file_sha256, parse_object, write_json
from lmtune.io.console import err, escape
from lmtune.runs.store import find_run

Winner = Literal["first", "second", "tie"]
KEYS = ("1", "2", "0")


@dataclass(frozen=True)
class Question:
    """A prompt with both models' answers; `location` is `file:line`."""

    location: str
    prompt: str
    first: str
    second: str

    @property
    def is_same(self) -> bool:
        """Whether there is nothing to choose between."""
        return exact(self.first, self.second)


@dataclass(frozen=True)
class VoteResult:
    """How often the second model was preferred, was not, and neither was better; `same` of these are equal answers."""

    wins: int
    losses: int
    ties: int
    same: int

    @property
    def win_share(self) -> float | None:
        """Of all votes those for the second model, ties counting half; None without votes."""
        votes = self.wins + self.losses + self.ties
        return (self.wins + self.ties / 2) / votes if votes else None

    @property
    def interval(self) -> Interval | None:
        """Of `win_share`, 95 %."""
        return win_interval(self.wins, self.losses, self.ties) if self.win_share is not None else None

    def sentence(self, name: str) -> str:
        """Which model is preferred, in words."""
        return share_sentence(name, self.wins, self.losses, self.ties)

    def as_dict(self) -> dict[str, object]:
        """For `--json`."""
        return {**asdict(self), "win_share": self.win_share, "interval": self.interval}


class Ballot:
    """Questions, and the votes so far.

    Attributes:
        questions: in the order in which they are asked.
    """

    def __init__(self, questions: Sequence[Question], kept: KeptLines, seed: int) -> None:
        self.questions, self._kept, self._seed = list(questions), kept, seed
        self._votes = {str(line.get("key")): line for line in kept.lines}
        known = {_key(question) for question in questions}
        if strange := [line for line in kept.lines if line.get("key") not in known]:
            raise ConfigError(
                f"{kept.path}: holds {len(strange)} votes of other answers; give the same models and prompts, or "
                "another --output"
            )
        wrong = next((line for line in kept.lines if line.get("winner") not in ("first", "second", "tie")), None)
        if wrong is not None:
            raise DataError(f"{kept.path}: winner: {wrong.get('winner')!r}; expected first, second or tie")
        for question in self.questions:
            if question.is_same and _key(question) not in self._votes:
                self._add(question, "tie", key_pressed=None)

    def is_swapped(self, question: Question) -> bool:
        """Whether the second model's answer stands as 1."""
        return random.Random(f"{self._seed} {_key(question)}").random() < 0.5

    def sides(self, question: Question) -> tuple[str, str]:
        """The answers as they are shown, 1 and 2."""
        answers = (question.first, question.second)
        return answers[::-1] if self.is_swapped(question) else answers

    @property
    def left(self) -> list[Question]:
        """Questions without a vote."""
        return [question for question in self.questions if _key(question) not in self._votes]

    def vote(self, question: Question, key: str) -> None:
        """Note that answer 1, answer 2 or neither (0) is better."""
        side = {"1": 0, "2": 1}.get(key)
        if side is None:
            self._add(question, "tie", key)
        else:
            self._add(question, "second" if (side == 0) == self.is_swapped(question) else "first", key)

    def _add(self, question: Question, winner: Winner, key_pressed: str | None) -> None:
        shown = {"row": question.location, "prompt": question.prompt, "pressed": key_pressed, "winner": winner}
        self._kept.add({"key": _key(question), **shown})
        self._votes[_key(question)] = self._kept.lines[-1]

    @property
    def result(self) -> VoteResult:
        """Of the votes so far."""
        said = [str(line["winner"]) for line in self._votes.values()]
        same = sum(line.get("pressed") is None for line in self._votes.values())
        return VoteResult(said.count("second"), said.count("first"), said.count("tie"), same)


def _key(question: Question) -> str:
    """Equal for the same answers to the same prompt in the same place."""
    parts = (question.location, question.prompt, question.first, question.second)
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def questions_of(
    prompts: Sequence[tuple[str, str]], first: Sequence[str], second: Sequence[str]
) -> list[Question]:  # fmt: skip
    """Locations and prompts with both models' answers."""
    return [
        Question(location, prompt, one, other)
        for (location, prompt), one, other in zip(prompts, first, second, strict=True)
    ]


def prompts_file(given: Path | None, targets: Sequence[str]) -> Path:
    """The file of the prompts: the one that is given, or the first file of answers.

    Raises:
        ConfigError: neither is there.
    """
    files = [Path(target) for target in targets if is_answer_file(target)]
    if given is None and not files:
        raise ConfigError("--prompts: missing; give a file of rows with prompts that both models answer")
    return files[0] if given is None else given


def identity(target: str) -> str:
    """What tells a model or file from others of its name: the content of a file or adapter, as far as there is one."""
    run = find_run(target)
    folder = Path(target) if run is None else run.adapter
    for path in (Path(target), folder / "adapter_model.safetensors"):
        if path.is_file():
            return file_sha256(path)
    return target


class KeptAnswers:
    """Both models' answers in a file beside the votes, so that the next start needs no model."""

    def __init__(self, path: Path, asked: Mapping[str, str]) -> None:
        """
        Args:
            path: of the file; it is made with the first model's answers.
            asked: what the answers depend on: models, prompts and the length of answers.

        Raises:
            ConfigError: the file's answers are of something else.
            DataError: the file is damaged.
        """
        self.path, self._asked, self._answers = path, dict(asked), dict[str, list[str]]()
        if not path.is_file():
            return
        try:
            tree = parse_object(path.read_bytes())
            before, answers = dict(tree["asked"]), dict(tree["answers"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: damaged: {error}; delete it") from None
        if before != self._asked:
            other = ", ".join(name for name in asked if before.get(name) != asked[name])
            raise ConfigError(f"{path}: holds answers with another {other}; give the same, or another --output")
        self._answers = {side: [str(answer) for answer in given] for side, given in answers.items()}

    def get(self, side: str, make: Callable[[], list[str]]) -> list[str]:
        """The answers of `first` or `second`; `make` is called where they are not there yet."""
        if side not in self._answers:
            self._answers[side] = make()
            write_json(self.path, {"asked": self._asked, "answers": self._answers})
        return self._answers[side]


def ask_votes(ballot: Ballot, read: Callable[[str], str]) -> bool:
    """Show what is left, and note the votes, until all are there; false where the voter leaves."""
    asked = [question for question in ballot.questions if not question.is_same]
    for question in ballot.left:
        number = asked.index(question) + 1
        err.print(f"\n[bold]{number} of {len(asked)}[/]  {escape(question.prompt.strip())}")
        for side, answer in zip("12", ballot.sides(question), strict=True):
            err.print(f"\n[bold]{side}:[/] {escape(answer.strip() or '(nothing)')}")
        err.print("\nWhich is better? 1, 2, 0 = neither; q leaves: ", end="")
        key = read("120q")
        err.print(escape(key))
        if key not in KEYS:
            return False
        ballot.vote(question, key)
    return True
