"""A row on its way through `prepare`: one form for every format, so that a step need not know how a row was written.

    messages            turns as OpenAI's files write them; of a pair and a judged answer what stands before the answer
    text                of plain and labelled texts
    chosen, rejected    the two answers of a pair, texts, or turns that call tools
    completion          the answer that is judged, likewise
    tools               as in a row
    label, weight, augmented_from    as in a row

`written_form` is the inverse: prompt and completion where every row is one question and one answer, else messages.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from lmtune.data.formats import ORIGIN, detect_format, parse_row
from lmtune.data.types import Example, Message, RowKind, prompt_hash

Fields = dict[str, Any]
# The role of a text that is not a turn.
_ROLE_OF = {"text": "text", "chosen": "assistant", "rejected": "assistant", "completion": "assistant"}


@dataclass(frozen=True, slots=True)
class Row:
    """One row.

    Attributes:
        place: `file:line`.
        fields: the content, in the form that this module describes.
        group: what the row was cut from, as a conversation, or the hash of its prompt, which copies of it have too.
            Rows of one group stay on one side of a split.
    """

    place: str
    fields: Fields
    group: str = ""

    def texts(self) -> Iterator[tuple[str, str]]:
        """(role, text) of each text, in order; that of plain and labelled text is `text`, that of arguments `call`."""
        for turn in self.fields.get("messages", ()):
            yield from _turn_texts(turn)
        for key, role in _ROLE_OF.items():
            if isinstance(value := self.fields.get(key), dict):
                yield from _turn_texts(value)
            elif value is not None:
                yield role, value

    def with_texts(self, change: Callable[[str, str], str]) -> Row:
        """The row with `change(role, text)` in place of each text; itself if nothing changes."""
        fields = dict(self.fields)
        for key in fields.keys() & _ROLE_OF.keys():
            value = fields[key]
            fields[key] = _changed(value, change) if isinstance(value, dict) else change(_ROLE_OF[key], value)
        if "messages" in fields:
            fields["messages"] = [_changed(turn, change) for turn in fields["messages"]]
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
        return self.fields.get("completion", turns[-1] if turns else None)


def _turn_texts(turn: Fields) -> Iterator[tuple[str, str]]:
    calls = turn.get("tool_calls", ())
    if turn["content"] or not calls:
        yield turn["role"], turn["content"]
    for call in calls:
        yield "call", call["function"]["arguments"]


def _changed(turn: Fields, change: Callable[[str, str], str]) -> Fields:
    """A turn with other texts; of the arguments of a call, JSON, only the texts in them."""
    changed = {**turn, "content": change(turn["role"], turn["content"])}
    if "tool_calls" in turn:
        changed["tool_calls"] = [_changed_call(call, change) for call in turn["tool_calls"]]
    return changed


def _changed_call(call: Fields, change: Callable[[str, str], str]) -> Fields:
    def walk(value: Any) -> Any:
        if isinstance(value, str):
            return change("call", value)
        if isinstance(value, list):
            return [walk(item) for item in value]
        return {key: walk(item) for key, item in value.items()} if isinstance(value, dict) else value

    before = json.loads(call["function"]["arguments"])
    if (after := walk(before)) == before:
        return call
    return {**call, "function": {**call["function"], "arguments": json.dumps(after, ensure_ascii=False)}}


def row_of(example: Example, place: str, group: str = "") -> Row:
    """What was read, as a row to prepare."""
    fields: Fields = {}
    if example.text is not None:
        fields["text"] = example.text
    elif example.kind in ("pair", "judged"):
        fields["messages"] = [_turn(message) for message in example.messages[:-1]]
        last = _answer(example.messages[-1])
        fields |= {"chosen": last, "rejected": _answer(example.rejected[-1])} if example.kind == "pair" else {}
        fields |= {"completion": last} if example.kind == "judged" else {}
    else:
        fields["messages"] = [_turn(message) for message in example.messages]
    if example.tools:
        fields["tools"] = [json.loads(tool) for tool in example.tools]
    if example.label is not None:
        fields["label"] = list(example.label) if isinstance(example.label, tuple) else example.label
    if example.weight != 1:
        fields["weight"] = example.weight
    family = prompt_hash(example)
    if example.origin is not None:
        family = example.origin
        fields[ORIGIN] = f"{family:016x}"
    return Row(place, fields, group or f"{family:016x}")


def _answer(message: Message) -> str | Fields:
    return _turn(message) if message.tool_calls else message.content


def _turn(message: Message) -> Fields:
    """A message as OpenAI's files write it."""
    turn: Fields = {"role": message.role, "content": message.content}
    if message.role == "assistant" and not message.trained:
        turn["weight"] = 0
    if message.tool_calls:
        turn["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.role == "tool":
        turn |= {key: value for key in ("tool_call_id", "name") if (value := getattr(message, key)) is not None}
    return turn


def is_single(fields: Fields, kind: RowKind) -> bool:
    """Whether a row can be written with a `prompt` that is text: one question, and nothing else beside the answer."""
    turns = fields.get("messages", [])
    roles = ["user", "assistant"] if kind == "answer" else ["user"]
    plain = all(turn.keys() == {"role", "content"} for turn in turns) and "tools" not in fields
    return plain and [turn["role"] for turn in turns] == roles


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


def new_origins(rows: Iterable[Row], kind: RowKind, single: bool) -> dict[str, str]:
    """By group, what copies must name as their origin now: the texts of their rows have changed."""
    wanted = {row.fields[ORIGIN] for row in rows if ORIGIN in row.fields}
    found = {}
    for row in rows if wanted else ():
        if row.group in wanted and ORIGIN not in row.fields:
            written = written_form(row.fields, kind, single)
            parsed = parse_row(written, detect_format(written, kind))
            hashed = prompt_hash(Example("", 0, parsed.messages, parsed.text, parsed.rejected, parsed.label, kind=kind))
            found[row.group] = f"{hashed:016x}"
    return found
