"""Answers in files, as `lmtune predict` writes them, or whatever else answers the same rows: a model without a model.

rows = read_answers("predictions.jsonl")        # each with `prediction`, and its question and reference
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lmtune.data.calls import call_text
from lmtune.data.inputs import read_inputs
from lmtune.data.reading import ReadReport
from lmtune.data.report import label_name
from lmtune.data.sources import find_files, is_read
from lmtune.data.types import Example, Message
from lmtune.errors import ConfigError, DataError
from lmtune.evaluation.results import RowResult
from lmtune.io.text import is_finite_number, pluralize, shorten

KEY = "prediction"


def is_answer_file(target: str) -> bool:
    """Whether `target` is a file of rows, and so no model."""
    return Path(target).is_file() and is_read(Path(target).name)


def read_answers(path: str, columns: Mapping[str, str] | None = None) -> list[RowResult]:
    """The rows of a file with the `prediction` of each.

    Raises:
        DataError: a row is faulty, or has no prediction; names `file:line`.
    """
    report, rows = ReadReport(), list[RowResult]()
    read = list(read_inputs(find_files([path]), report, columns))
    report.raise_for_faults(None)
    for example, row in read:
        if row.get(KEY) is None:
            raise DataError(f"{example.location}: no {KEY}; expected rows as `lmtune predict` writes them")
        rows.append(_result(example, row))
    if not rows:
        raise DataError(f"{path}: holds no row")
    return rows


def read_prompts(path: Path, columns: Mapping[str, str] | None = None) -> list[Example]:
    """The prompts of a file of rows; answers in it are left out.

    Raises:
        DataError: a row is faulty, or there is none.
    """
    report = ReadReport()
    found = [example for example, _ in read_inputs(find_files([path]), report, columns)]
    report.raise_for_faults(None)
    if not found:
        raise DataError(f"{path}: holds no row")
    return found


def _result(example: Example, row: Mapping[str, Any]) -> RowResult:
    question, last = prompt_of_row(example), example.messages[-1:]
    reference = text_of(last[0]) if last and last[0].role == "assistant" else ""
    said, label = row[KEY], row.get("label")
    if label is None:
        return RowResult(example.location, question, reference, said if isinstance(said, str) else str(said))
    if is_finite_number(label) and is_finite_number(said):
        return RowResult(example.location, question, str(label), str(said), {"squared_error": ((label - said) ** 2, 1)})
    names = [label_name(tuple(one) if isinstance(one, list) else one) for one in (label, said)]
    right = (float(names[0] == names[1]), 1.0)
    return RowResult(example.location, question, names[0], names[1], {"accuracy": right})


def answers_of_file(path: str, prompts: Sequence[str], columns: Mapping[str, str] | None = None) -> list[str]:
    """The prediction for each of `prompts`, from a file that holds others too.

    Raises:
        DataError: a row is faulty.
        ConfigError: a prompt is not in the file.
    """
    rows = read_answers(path, columns)
    said = {key: row.answer or "" for key, row in zip(_keys([row.question for row in rows]), rows, strict=True)}
    keys = _keys(prompts)
    if missing := [prompt for (prompt, number) in keys if (prompt, number) not in said]:
        raise ConfigError(
            f"{path}: has no answer to {pluralize(len(missing), 'prompt')}, such as {shorten(missing[0])}"
        )
    return [said[key] for key in keys]


def text_of(turn: Message) -> str:
    """A turn with its calls, as a reply is shown."""
    calls = call_text([(call.name, json.loads(call.arguments)) for call in turn.tool_calls]) if turn.tool_calls else ""
    return "\n".join(filter(None, (turn.content, calls)))


def prompt_of_row(example: Example) -> str:
    """What a row asks, as text: a question alone, or the turns of a conversation, each behind its role."""
    if example.text is not None:
        return example.text
    turns = example.messages[:-1] if example.messages[-1].role == "assistant" else example.messages
    return turns[0].content if len(turns) == 1 else "\n".join(f"{turn.role}: {text_of(turn)}" for turn in turns)


def aligned(first: Sequence[RowResult], second: Sequence[RowResult]) -> list[RowResult]:
    """The rows of `second` at the locations of the rows of `first` with the same question; the others are left out.

    Raises:
        ConfigError: no question is in both.
    """
    ours, theirs = (_keys([row.question for row in rows]) for rows in (first, second))
    places = {key: row.location for key, row in zip(ours, first, strict=True)}
    found = [replace(row, location=places[key]) for key, row in zip(theirs, second, strict=True) if key in places]
    if not found:
        raise ConfigError("the two files have no question in common; let both models answer the same rows")
    return found


def _keys(questions: Sequence[str]) -> list[tuple[str, int]]:
    """Each question, and how often it stood before."""
    seen = Counter[str]()
    keys = []
    for question in map(str.strip, questions):
        keys.append((question, seen[question]))
        seen[question] += 1
    return keys
