"""Columns of other names: mapped where the config says so or only one thing can be meant, said, and else a fault."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from lmtune.data.reading import ReadReport, read_examples
from lmtune.data.sources import find_files
from lmtune.data.types import Example
from lmtune.errors import ConfigError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(columns: Mapping[str, str] | None = None, *names: str) -> tuple[list[Example], ReadReport]:
    report = ReadReport()
    files = find_files(names or sorted(Path().iterdir()))
    return list(read_examples(files, report, None, columns)), report


@pytest.mark.parametrize(
    ("header", "columns", "contents", "said"),
    [
        ("prompt,completion", None, ["a", "b"], None),
        ("question,answer", None, ["a", "b"], "columns question → prompt, answer → completion"),
        ("Prompt,Response", None, ["a", "b"], "columns Prompt → prompt, Response → completion"),
        ("review,label", None, ["a"], "columns review → text"),
        ("Frage,Antwort", {"Frage": "prompt", "Antwort": "completion"}, ["a", "b"], "columns Frage → prompt, Antwort"),
        ("text,body", {"body": "text"}, ["b"], "columns body → text"),  # what `text` was before is not used
    ],
)
def test_columns_become_keys_and_this_is_said(
    header: str, columns: Mapping[str, str] | None, contents: list[str], said: str | None
) -> None:
    names = header.split(",")
    Path("a.csv").write_text(f"{header}\na,b\n")
    Path("b.jsonl").write_text(json.dumps(dict(zip(names, "ab", strict=True))) + "\n")
    if "label" in header:  # JSON rows of two keys are not guessed at
        Path("b.jsonl").write_text('{"text": "a", "label": "b"}\n')
    examples, report = read(columns)
    assert report.faults == []
    assert [example.contents for example in examples] == [contents, contents]
    assert (said or 'delimiter ","') in report.read_as["a.csv"]
    assert ("columns" in report.read_as["a.csv"]) == (said is not None)


@pytest.mark.parametrize(
    ("content", "columns", "words"),
    [
        ("Frage,Antwort\na,b\n", None, 'a.csv:1: the header names "Frage", "Antwort", which make no row'),
        ("Frage,Antwort\na,b\n", None, "data.columns.Frage=prompt data.columns.Antwort=completion"),
        ("Die Frage,b,c\na,b,c\n", None, "data.columns.COLUMN=prompt data.columns.COLUMN=completion"),
        ("\n\nWhere?,There\na,b\n", None, "a.csv:3: the header names"),
        ("Frage,completion\na,b\n", {"Fraeg": "prompt"}, 'a.csv:1: data.columns names "Fraeg" (is "Frage" meant?)'),
        ("prompt,completion\na,b\n", {"qu": "prompt"}, 'data.columns: no row has "qu"'),
        ("question,query,answer\na,b,c\n", None, "which make no row"),  # which of the two is not guessed
    ],
)
def test_columns_that_are_not_there_are_faults(content: str, columns: Mapping[str, str] | None, words: str) -> None:
    Path("a.csv").write_text(content)
    _, report = read(columns)
    assert report.num_faults == 1, report.faults
    assert words in report.faults[0]
    assert report.fatal


def test_a_row_without_a_named_key_is_one_faulty_row() -> None:
    Path("a.jsonl").write_text('{"q": "a", "completion": "b"}\n{"completion": "b"}\n{"q": "a", "completion": "c"}\n')
    examples, report = read({"q": "prompt"})
    assert [example.line for example in examples] == [1, 3]
    assert report.faulty.count == 1
    assert 'a.jsonl:2: data.columns names "q"' in report.faults[0]


def test_a_named_column_may_be_in_some_files_only() -> None:
    Path("a.csv").write_text("q,completion\na,b\n")
    Path("b.csv").write_text("prompt,completion\na,b\n")
    examples, report = read({"q": "prompt"})
    assert (len(examples), report.faults) == (2, [])


@pytest.mark.parametrize(
    ("columns", "words"),
    [({"a": "promt"}, 'promt is no key of a row (is "prompt" meant?)'), ({"a": "text", "b": "text"}, "two columns")],
)
def test_a_key_that_no_row_has_is_refused(columns: Mapping[str, str], words: str) -> None:
    Path("a.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError) as error:
        read(columns)
    assert words in str(error.value)
