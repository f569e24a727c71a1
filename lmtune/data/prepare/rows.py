"""A row on its way through `prepare`: one form for every format, so that a step need not know how a row was written.

    messages            turns with role and content; of a pair and a judged answer what stands before the answer
    text                of plain and labelled texts
    chosen, rejected    the two answers of a pair
    completion          the answer that is judged
    label, weight, augmented_from    as in a row

`written_form` is the inverse: prompt and completion where every row is one question and one answer, else messages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from lmtune.data.types import Example, Message, RowKind

Fields = dict[str, Any]
# The role of a text that is not a turn.
_ROLE_OF = {"text": "text", "chosen": "assistant", "rejected": "assistant", "completion": "assistant"}


@dataclass(frozen=True, slots=True)
class Row:
    """One row.

    Attributes:
        place: `file:line`.
        fields: the content, in the form that this module describes.
        group: what the row was cut from, as a conversation; rows of one group stay on one side of a split.
    """

    place: str
    fields: Fields
    group: str = ""

    def texts(self) -> Iterator[tuple[str, str]]:
        """(role, text) of each text, in order; the role of plain and labelled text is `text`."""
        for turn in self.fields.get("messages", ()):
            yield turn["role"], turn["content"]
        for key, role in _ROLE_OF.items():
            if key in self.fields:
                yield role, self.fields[key]

    def with_texts(self, change: Callable[[str, str], str]) -> Row:
        """The row with `change(role, text)` in place of each text; itself if nothing changes."""
        fields = dict(self.fields)
        for key in fields.keys() & _ROLE_OF.keys():
            fields[key] = change(_ROLE_OF[key], fields[key])
        if "messages" in fields:
            fields["messages"] = [
                {**turn, "content": change(turn["role"], turn["content"])} for turn in fields["messages"]
            ]
        return self if fields == self.fields else replace(self, fields=fields)

    def joined(self, *roles: str) -> str:
        """All texts of these roles, or all, one a line."""
        return "\n".join(text for role, text in self.texts() if not roles or role in roles)

    @property
    def question(self) -> str:
        """What is asked: the turns before the last answer, or the text that is labelled."""
        turns = self.fields.get("messages", [])
        is_answered = turns and turns[-1]["role"] == "assistant" and "label" not in self.fields
        asked = [f"{turn['role']}\0{turn['content']}" for turn in (turns[:-1] if is_answered else turns)]
        return "\0".join([*asked, *([self.fields["text"]] if "text" in self.fields else [])])

    @property
    def answer(self) -> Any:
        """What the question is answered with, or labelled."""
        if "label" in self.fields and "completion" not in self.fields:
            return self.fields["label"]
        if "chosen" in self.fields:
            return self.fields["chosen"]
        turns = self.fields.get("messages", [])
        return self.fields.get("completion", turns[-1]["content"] if turns else None)


def row_of(example: Example, place: str, group: str = "") -> Row:
    """What was read, as a row to prepare."""
    fields: Fields = {}
    if example.text is not None:
        fields["text"] = example.text
    elif example.kind in ("pair", "judged"):
        fields["messages"] = [_turn(message) for message in example.messages[:-1]]
        last = example.messages[-1].content
        if example.kind == "pair":
            fields |= {"chosen": last, "rejected": example.rejected[-1].content}
        else:
            fields["completion"] = last
    else:
        fields["messages"] = [_turn(message) for message in example.messages]
    if example.label is not None:
        fields["label"] = list(example.label) if isinstance(example.label, tuple) else example.label
    if example.weight != 1:
        fields["weight"] = example.weight
    return Row(place, fields, group)


def _turn(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.role == "assistant" and not message.trained:
        turn["weight"] = 0
    return turn


def is_single(fields: Fields, kind: RowKind) -> bool:
    """Whether a row can be written with a `prompt` that is text: one question, and nothing else beside the answer."""
    turns = fields.get("messages", [])
    roles = ["user", "assistant"] if kind == "answer" else ["user"]
    return [turn["role"] for turn in turns] == roles and all(turn.keys() == {"role", "content"} for turn in turns)


def written_form(fields: Fields, kind: RowKind, single: bool) -> Fields:
    """A row as it stands in the file; `single`: every row of the file `is_single`."""
    written = dict(fields)
    turns = written.pop("messages", None)
    if turns is None:
        return written
    if single:
        first = {"prompt": turns[0]["content"]}
        return {**first, **({"completion": turns[1]["content"]} if kind == "answer" else {}), **written}
    if kind in ("pair", "judged"):  # an earlier answer is context there, and needs no mark
        turns = [{key: value for key, value in turn.items() if key != "weight"} for turn in turns]
        return {"prompt": turns, **written}
    return {"messages": turns, **written}
