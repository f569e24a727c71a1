"""A file that is no UTF-8 is told so once, with what it probably is and the command that converts it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmtune.data.reading import ReadReport, read_examples
from lmtune.data.sources import encoding_advice, find_files

CHINESE = [("今天天气怎么样？", "今天是晴天。"), ("这个商店什么时候开门？", "我们上午九点开门，下午六点关门。")]
FRENCH = [("Où est la gare ?", "La gare est là-bas, à côté de l'église."), ("Et le café ?", "Il est fermé.")]


def lines(rows: list[tuple[str, str]], encoding: str) -> bytes:
    text = "".join(json.dumps({"prompt": p, "completion": c}, ensure_ascii=False) + "\n" for p, c in rows)
    return text.encode(encoding)


def read(path: Path) -> tuple[int, ReadReport]:
    report = ReadReport()
    return len(list(read_examples(find_files([path]), report))), report


@pytest.mark.parametrize(
    ("rows", "encoding", "name"),
    [
        (CHINESE, "gb18030", "GB18030"), (CHINESE[:1], "gbk", "GB18030"), (CHINESE, "gb2312", "GB18030"),
        (FRENCH, "cp1252", "WINDOWS-1252"), (FRENCH[:1], "latin-1", "WINDOWS-1252"),
        ([("Where?", "It\u2019s \u201chere\u201d.")] * 2, "cp1252", "WINDOWS-1252"),
    ],
)  # fmt: skip
def test_another_encoding_is_one_fault_a_file_with_the_cure(
    tmp_path: Path, rows: list[tuple[str, str]], encoding: str, name: str
) -> None:
    path = tmp_path / "rows.jsonl"
    for content in (lines(rows, encoding) * 5, b"[" + lines(rows, encoding).strip().replace(b"\n", b",\n") + b"]"):
        path.write_bytes(content)
        _, report = read(path)
        assert report.num_faults == 1, report.faults
        assert report.faults[0].startswith(f"{path}:1: ")
        assert f"iconv -f {name} -t UTF-8" in report.faults[0]


def test_each_row_of_another_encoding_counts_as_faulty(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(lines([("p", "c")], "ascii") + lines(CHINESE, "gb18030"))
    num_rows, report = read(tmp_path / "rows.jsonl")
    assert (num_rows, report.num_faults, report.faulty.count) == (1, 1, 2)


def test_damaged_lines_of_utf_8_are_told_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(CHINESE, "utf-8") + lines(FRENCH, "latin-1"))
    _, report = read(path)
    assert [fault.removeprefix(f"{path}:")[0] for fault in report.faults] == ["3", "4"]
    assert "iconv" not in report.faults[0]


@pytest.mark.parametrize("encoding", ["cp1251", "shift_jis"])
def test_nothing_is_guessed_of_others(encoding: str) -> None:
    text = {"cp1251": "Где находится вокзал? Он там.", "shift_jis": "駅はどこですか。あちらです。"}[encoding]
    assert encoding_advice(text.encode(encoding)) == ""


def test_marks_of_utf_8_are_taken_where_files_were_put_together(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(lines(FRENCH, "utf-8-sig") * 2)
    num_rows, report = read(tmp_path / "rows.jsonl")
    assert (num_rows, report.faults) == (4, [])
