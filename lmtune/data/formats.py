"""The formats of a row, told apart by their keys, and turned into messages.

    an answer: what is trained
    prompt/completion   {"prompt": "…", "completion": "…"}                           each a text or turns
    messages            {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    alpaca              {"instruction": "…", "input": "…", "output": "…"}            input may be missing
    sharegpt            {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}
    text                {"text": "…"}

    a pair: a better and a worse answer to one prompt, each a text, a turn, or a conversation that repeats the prompt
    chosen/rejected     {"prompt": "…", "chosen": "…", "rejected": "…"}
    OpenAI preferences  {"input": {"messages": […]}, "preferred_output": […], "non_preferred_output": […]}

    a judged answer: good or not
    prompt/completion/label   {"prompt": "…", "completion": "…", "label": true}
    judged messages           {"messages": […], "label": true}

    a labelled whole: label is a text, a number or a list of texts
    text/label          {"text": "…", "label": "…"}
    prompt/label        {"prompt": "…", "label": "…"}
    labelled messages   {"messages": […], "label": "…"}

Each may carry a `weight` and `augmented_from`, all but text a `system` prompt, those with a prompt a `history` of
earlier turns. A row is taken as it is or refused with a reason; nothing is repaired. The names are those of the field:
OpenAI's files, TRL's data sets, Stanford Alpaca, ShareGPT dumps. A further format is one more entry of `_FORMATS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from lmtune.data import contents
from lmtune.data.contents import QUESTION_KEYS, SYSTEM_KEYS, Row
from lmtune.data.replies import split_reply
from lmtune.data.tools import TOOL_KEYS
from lmtune.data.turns import REASONING_KEYS, UNSUPPORTED, ParsedRow
from lmtune.data.types import RowKind
from lmtune.data.values import (
    RowFault,
    is_filled,
    key_problems,
    kind_of,
    listed_keys,
    nearest,
    plain,
    plain_table,
    quoted,
)
from lmtune.io.text import is_finite_number

Format = Literal[
    "prompt/completion", "messages", "alpaca", "sharegpt", "text", "chosen/rejected", "OpenAI preferences",
    "prompt/completion/label", "judged messages", "text/label", "prompt/label", "labelled messages",
]  # fmt: skip


@dataclass(frozen=True)
class _Shape:
    """How a format is known and read.

    Attributes:
        rows: the kind of its rows.
        required, optional: its keys.
        parse: a row's content.
        fits: whether a row that has the keys is of this format, where nothing else says it.
    """

    rows: RowKind
    required: tuple[str, ...]
    optional: tuple[str, ...]
    parse: Callable[[Row], ParsedRow]
    fits: Callable[[Row], bool] = lambda row: True

    @cached_property
    def known(self) -> frozenset[str]:
        """All its keys."""
        return frozenset((*self.required, *self.optional, "weight", ORIGIN))

    @cached_property
    def keys(self) -> frozenset[str]:
        """Those that it requires."""
        return frozenset(self.required)

    def missing(self, row: Row) -> list[str]:
        """The required keys that `row` lacks; tables have null where a row of another format has no value."""
        return [key for key in self.required if key not in row or (self.rows != "answer" and row[key] is None)]


ORIGIN = "augmented_from"  # in a copy that `lmtune augment` made
_EXPECTED = (
    "a row has the keys prompt and completion, or messages, or instruction and output (alpaca), "
    "or conversations (sharegpt), or text; a pair has prompt, chosen and rejected; a labelled row text and label"
)
# By kind: what such a row is, an objective that takes it, and keys of it.
_KINDS: dict[RowKind, tuple[str, str, str]] = {
    "answer": ("an answer to train on", "sft", "prompt and completion alone"),
    "pair": ("a preference pair", "dpo", "prompt, chosen and rejected"),
    "judged": ("a judged answer", "kto", "prompt, completion and label (true or false)"),
    "labelled": ("a labelled text", "classification", "text and label"),
}
_ANSWER_KEYS = ("completion", "answer", "response", "output", "reply", "target", "assistant", "gpt", "bot")
# Keys that say what would be lost, and what to do. A key that the row's format knows is not looked up.
_REFUSED = UNSUPPORTED | plain_table(
    (
        ("chosen", "rejected", "preferred_output", "non_preferred_output", "chosen_response", "rejected_response"),
        "half of a preference pair; write prompt, chosen and rejected (or prompt and completion, to train on the "
        "better answer alone)",
    ),
    (
        REASONING_KEYS,
        "this reasoning would be lost; write it into the answer as <think>…</think> with data.template: thinking",
    ),
    (SYSTEM_KEYS, "this format has no system prompt; write the row as prompt and completion"),
    (("system_instruction", "developer"), "if this is the system prompt, name it system; else remove the key"),
    (
        ("history", "chat_history", "conversation_history"),
        "earlier turns would be lost; write them as turns of messages, or as [question, answer] pairs under history "
        "beside prompt or instruction",
    ),
    (("train_on_input", "train_on_inputs"), "only answers are trained, never questions; remove the key"),
)
_LABELS = {plain(key) for key in ("label", "kto_label", "kto_tag")}
_ANSWERS = {plain(key) for key in (*_ANSWER_KEYS, "answers", "responses", "outputs", "summary")}
_CONTEXT = {
    plain(key) for key in ("context", "passage", "document", "input", "query", "rationale", "explanation", "label")
}


def detect_format(row: Row, rows: RowKind | None = None) -> Format:
    """The format whose required keys the row has, among those of the kind `rows` if the row's use is known.

    Raises:
        RowFault: the keys fit none; says which key is missing or probably meant, or which objective takes such rows.
    """
    keys = row.keys()
    complete = [(name, shape) for name, shape in _FORMATS.items() if keys >= shape.keys and not shape.missing(row)]
    for name, shape in complete:
        if shape.rows == rows != "answer":
            return name
    for name, shape in complete:
        if shape.fits(row):
            if rows in (None, shape.rows):
                return name
            raise _other_kind(row, name, rows)
    if problems := key_problems(row, (), _REFUSED):
        raise RowFault("; ".join(problems))
    shapes = sorted(_FORMATS.values(), key=lambda shape: (shape.rows != (rows or "answer"), len(shape.missing(row))))
    for shape in shapes:
        if found_keys := [key for key in shape.required if key not in (missing := shape.missing(row))]:
            hint = nearest(missing[0], row) or _renaming(row)
            raise RowFault(f"{' and '.join(missing)} missing beside {' and '.join(found_keys)}{hint}")
    what = f"unknown keys {listed_keys(row)}{_renaming(row)}" if row else "the row is empty"
    raise RowFault(f"{what}; {_EXPECTED}")


def _other_kind(row: Row, format: Format, rows: RowKind) -> RowFault:
    """Why a row of `format` is not one of the kind `rows`, and what to do."""
    found = _FORMATS[format].rows
    (what, objective, _), (wanted, _, keys) = _KINDS[found], _KINDS[rows]
    lacking = [shape.missing(row) for shape in _FORMATS.values() if shape.rows == rows != "answer"]
    near = next((hint for missing in lacking if len(missing) == 1 and (hint := nearest(missing[0], row))), "")
    reason = f"the row is {what} ({format}), not {wanted}; set objective.kind: {objective}, or write {keys}{near}"
    return RowFault(reason, once=f"kind {found}")


def known_keys() -> frozenset[str]:
    """Every key that a row of some format has."""
    return frozenset().union(*(shape.known for shape in _FORMATS.values()))


def is_complete(names: Collection[str]) -> bool:
    """Whether keys of these names make a row of some format."""
    return any(shape.keys.issubset(names) for shape in _FORMATS.values())


def question_and_answer(names: Collection[str], is_table: bool) -> dict[str, str]:
    """What names that make no row can only mean: a question and an answer, or a table's one text beside its label."""
    questions, answers = ([name for name in names if plain(name) in known] for known in (QUESTION_KEYS, _ANSWER_KEYS))
    labels = [name for name in names if plain(name) == "label"]
    if len(questions) == len(answers) == 1:
        found = {questions[0]: "prompt", answers[0]: "completion"}
    elif is_table and len(names) == 2 and labels:
        found = {name: "label" if name in labels else "text" for name in names}
    else:
        return {}
    return {name: key for name, key in found.items() if name != key}


def kind_of_format(format: Format) -> RowKind:
    """What rows of this format can be used for."""
    return _FORMATS[format].rows


def _renaming(row: Row) -> str:
    """Which keys would make a row if they were renamed, or nothing."""
    lists = [key for key, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    if rows := [key for key in lists if is_complete(row[key][0]) or question_and_answer(row[key][0], is_table=False)]:
        return f"; the rows are in the list under {quoted(rows[0])}: write that list alone, or one of its rows a line"
    if lists:
        return f"; rename {quoted(lists[0])} to messages"
    questions, answers = ([key for key in row if plain(key) in names] for names in (QUESTION_KEYS, _ANSWER_KEYS))
    if len(questions) != 1 or len(answers) != 1:
        return ""
    wanted = zip((questions[0], answers[0]), ("prompt", "completion"), strict=True)
    return "; rename " + " and ".join(f"{quoted(old)} to {new}" for old, new in wanted if old != new)


def parse_row(row: Row, format: Format) -> ParsedRow:
    """The row's messages or text.

    Raises:
        RowFault: a value is missing, of the wrong type, empty where it is trained, roles are out of order, or the row
            says more than would be trained.
    """
    shape = _FORMATS[format]
    further = sorted(row.keys() - shape.known)
    if problems := further and _further_problems(row, shape, further):
        raise RowFault("; ".join(problems))
    parsed = shape.parse(row)
    if (weight := row.get("weight")) is not None:
        parsed.weight = _weight(weight)
    if (origin := row.get(ORIGIN)) is not None:
        parsed.origin = _origin(origin)
    for key in further:
        if is_filled(row[key]) and (plain(key) in _CONTEXT or _is_other_answer(row, key, shape.known)):
            parsed.warnings.append(f"{key} is neither in the question nor trained; write it into one of them if needed")
        elif row[key] is False or is_filled(row[key]):
            parsed.ignored_keys.add(key)
    turns = (*parsed.messages, *parsed.rejected[-1:])
    answers = [turn for turn in turns if turn.role == "assistant"]
    holds = {
        "tools": bool(parsed.tools), "tool_calls": any(turn.tool_calls for turn in answers),
        "reasoning": any(split_reply(turn.content)[0] is not None for turn in answers),
    }  # fmt: skip
    parsed.outcomes |= {name for name, found in holds.items() if found}
    for message in turns:
        if message.tool_calls:
            continue
        if not message.content.strip() and message.role == "assistant" and message.trained:
            parsed.warnings.append("an answer holds only white space")
        elif not message.content.strip() and message.role == "user":
            parsed.warnings.append("a question is empty")
    return parsed


def _weight(value: Any) -> float:
    """How much a row counts."""
    if not is_finite_number(value) or value < 0:
        raise RowFault(f"weight is {kind_of(value)}; it must be a number, 0 or more: how much the row counts")
    return float(value)


def _origin(value: Any) -> int:
    """The hash of the row that a copy was made of."""
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{16}", value):
        raise RowFault(f"{ORIGIN} is {kind_of(value)}; `lmtune augment` writes this key into its copies; remove it")
    return int(value, 16)


def _further_problems(row: Row, shape: _Shape, further: list[str]) -> list[str]:
    problems, known = key_problems(row, shape.known, _REFUSED), shape.known
    for key in further:
        if shape.rows == "answer" and plain(key) in _LABELS and row[key] in (0, 1):
            problems.append(
                f"{key} is {kind_of(row[key])}; if it judges the answer, write prompt, completion and label and set "
                "objective.kind: kto, else remove the key"
            )
        elif ("text" in known or shape.rows == "labelled") and _is_other_answer(row, key, known):
            what = (
                "would not be trained; name them prompt and completion"
                if shape.rows == "answer"
                else ("would not be read; write it into text, or both as messages")
            )
            problems.append(f"{key} beside {shape.required[0]} {what}, or remove {key}")
    return problems


def _is_other_answer(row: Row, key: str, known: frozenset[str]) -> bool:
    """Whether `key` holds an answer that stands in none of the row's known values."""
    value = row[key]
    if plain(key) not in _ANSWERS or not isinstance(value, str) or not is_filled(value):
        return False
    return all(value.strip() not in str(row[name]) for name in known if name in row)


_ASKED = (*SYSTEM_KEYS, "history")  # beside a prompt
_TALKED = (*SYSTEM_KEYS, *TOOL_KEYS)  # beside turns
# The first that fits is taken: Alpaca's own files carry a "text" column too, chat dumps often a "prompt".
_FORMATS: dict[Format, _Shape] = {
    "chosen/rejected": _Shape(
        "pair",
        ("chosen", "rejected"),
        ("prompt", "messages", "conversations", "instruction", "input", *_ASKED, *TOOL_KEYS),
        contents.pair,
    ),
    "OpenAI preferences": _Shape(
        "pair", ("input", "preferred_output", "non_preferred_output"), (), contents.openai_pair
    ),
    "prompt/completion/label": _Shape(
        "judged", ("prompt", "completion", "label"), _ASKED, contents.judged, contents.is_judged
    ),
    "judged messages": _Shape("judged", ("messages", "label"), _TALKED, contents.judged_messages, contents.is_judged),
    "text/label": _Shape("labelled", ("text", "label"), (), contents.labelled_text),
    "messages": _Shape("answer", ("messages",), _TALKED, contents.messages, contents.is_conversation),
    "sharegpt": _Shape("answer", ("conversations",), _TALKED, contents.sharegpt),
    "prompt/completion": _Shape("answer", ("prompt", "completion"), (*_ASKED, *TOOL_KEYS), contents.prompt_completion),
    "alpaca": _Shape("answer", ("instruction", "output"), ("input", *_ASKED), contents.alpaca),
    "text": _Shape("answer", ("text",), (), contents.text),
    "prompt/label": _Shape("labelled", ("prompt", "label"), _ASKED, contents.labelled_prompt),
    "labelled messages": _Shape("labelled", ("messages", "label"), _TALKED, contents.labelled_messages),
}
