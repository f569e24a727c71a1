"""Messages that people wrote to each other, as conversations, and conversations as rows.

    Ann: Do you ship abroad?   Ben: Yes,   Ben: to 12 countries.   Ann: Thanks!
    qa               {"prompt": "Do you ship abroad?", "completion": "Yes,\nto 12 countries."}, …
    conversations    {"messages": [user, assistant, …]}

Messages of one person that follow each other are one turn. A message without text (a picture, a deleted one) is a turn
that no row holds: what stands before and behind it is not joined. Without `assistant`, who answers is the assistant:
roles change with each turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lmtune.data.prepare.settings import Settings


@dataclass(frozen=True, slots=True)
class Message:
    """What somebody said.

    Attributes:
        place: where it stands, as `chat.txt:17`.
        text: "" where it is not known what was said.
        time: in seconds, from any start; None where the file has none.
        conversation: what tells conversations apart, as a channel.
    """

    place: str
    author: str
    text: str
    time: float | None = None
    conversation: str = ""


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row before it is parsed: `fields` is a JSON value, or the `RowFault` in its place."""

    place: str
    fields: Any
    group: str = ""


@dataclass
class Counts:
    """What became of messages, for the notes of a source."""

    messages: int = 0
    unanswered: int = 0
    authors: set[str] = field(default_factory=set)

    def describe(self) -> list[str]:
        """A line, if a message is in no row."""
        if not self.unanswered:
            return []
        return [f"{self.unanswered:,} of {self.messages:,} messages are in no row: nobody answers them"]


def conversations(messages: Iterable[Message], settings: Settings) -> Iterator[list[Message]]:
    """The messages cut where the conversation changes, or after a silence."""
    current: list[Message] = []
    for message in messages:
        if current and _begins_anew(current[-1], message, settings.gap_minutes * 60):
            yield current
            current = []
        current.append(message)
    if current:
        yield current


def _begins_anew(before: Message, message: Message, gap_seconds: float) -> bool:
    if before.conversation != message.conversation:
        return True
    return before.time is not None and message.time is not None and message.time - before.time > gap_seconds


def rows_of(said: Sequence[Message], settings: Settings, group: str, counts: Counts) -> Iterator[RawRow]:
    """The rows of one conversation."""
    counts.messages += sum(bool(message.text) for message in said)
    counts.authors |= {message.author for message in said if message.author}
    for turns in _without_gaps(_turns(said, settings.assistant)):
        yield from _rows_of_turns(turns, settings, group, counts)


_Turn = tuple[Message, str, int]


def _without_gaps(turns: Sequence[_Turn]) -> Iterator[list[_Turn]]:
    """The turns between those without text."""
    current: list[_Turn] = []
    for turn in turns:
        if turn[0].text:
            current.append(turn)
        else:
            yield current
            current = []
    yield current


def _rows_of_turns(turns: Sequence[_Turn], settings: Settings, group: str, counts: Counts) -> Iterator[RawRow]:
    used: set[int] = set()
    if settings.pair == "qa":
        for index in range(1, len(turns)):
            (question, _, _), (answer, role, _) = turns[index - 1], turns[index]
            if role == "assistant" or settings.assistant is None:
                used |= {index - 1, index}
                yield RawRow(answer.place, {"prompt": question.text, "completion": answer.text}, group)
    else:
        first = next((index for index, (_, role, _) in enumerate(turns) if role == "user"), len(turns))
        last = max((index for index, (_, role, _) in enumerate(turns) if role == "assistant"), default=-1)
        if first < last:
            used = set(range(first, last + 1))
            messages = [{"role": role, "content": turn.text} for turn, role, _ in turns[first : last + 1]]
            yield RawRow(turns[first][0].place, {"messages": messages}, group)
    counts.unanswered += sum(many for index, (_, _, many) in enumerate(turns) if index not in used)


def _turns(said: Sequence[Message], assistant: str | None) -> list[_Turn]:
    """(the turn, its role, of how many messages with text it is made)."""
    turns: list[_Turn] = []
    for message in said:
        who = message.author if assistant is None else str(message.author == assistant)
        before = turns[-1] if turns else None
        if before is not None and before[1] == who:
            texts = [text for text in (before[0].text, message.text) if text]
            first = before[0] if before[0].text else message
            turns[-1] = replace(first, text="\n".join(texts)), who, before[2] + bool(message.text)
        else:
            turns.append((message, who, int(bool(message.text))))
    roles = ("user", "assistant")
    return [
        (turn, roles[index % 2] if assistant is None else roles[who == "True"], many)
        for index, (turn, who, many) in enumerate(turns)
    ]
