"""Files in, examples or faults with the right line out; what a file cannot be is in tests/bad_input/test_data.py."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lmtune.data import readers
from lmtune.data.readers import read_rows
from lmtune.data.reading import ReadReport, read_examples
from lmtune.data.report import LabelCounts
from lmtune.data.sources import find_files, unread_entries
from lmtune.data.types import Example
from lmtune.data.values import RowFault
from lmtune.errors import DataError

GOOD = b'{"prompt": "p", "completion": "c"}'
BAD = (b'{"prompt": 1, "completion": "c"}', b'{"prompt": 22, "completion": "c"}', b'{"prompt": "p", "compl')
UTF8 = '{"prompt": "é", "completion": "c"}'.encode()
LATIN = '{"prompt": "é", "completion": "c"}'.encode("latin-1")


def read(*paths: Path) -> tuple[list[Example], ReadReport]:
    report = ReadReport()
    return list(read_examples(find_files(paths), report)), report


def written(folder: Path, *lines: bytes, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_bytes(b"\n".join(lines))
    return path


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (GOOD, [1]),
        (b"\xef\xbb\xbf" + GOOD + b"\n\xef\xbb\xbf" + GOOD, [1, 2]),  # files that were put together
        (b"\n \n  " + GOOD + b"\n\n\t\r\n" + GOOD + b" \n\n", [3, 6]),
        (b"[" + GOOD + b"]", [1]),
        (b"\xef\xbb\xbf\n[\n" + GOOD + b",\r\n\n" + GOOD + b",\n]\n", [3, 5]),
        (b'[{"prompt": "p",\n "completion": "c"}, ' + GOOD + b"]", [1, 2]),
        ('{"prompt": "é\u2028\u0085 \U0001f600", "completion": "\\ud83d\\ude00"}\n'.encode() + GOOD, [1, 2]),
    ],
)
def test_good_files(tmp_path: Path, content: bytes, lines: list[int]) -> None:
    examples, report = read(written(tmp_path, content))
    assert report.faults == []
    assert [example.location for example in examples] == [f"rows.jsonl:{line}" for line in lines]


def test_every_fault_is_collected_and_good_rows_go_on(tmp_path: Path) -> None:
    examples, report = read(written(tmp_path, *[GOOD if number % 2 else BAD[0] for number in range(60)]))
    assert (len(examples), report.num_faults) == (30, 30)
    with pytest.raises(DataError, match=r"30 faults(.|\n)*rows.jsonl:1: (.|\n)*… and 10 more"):
        report.raise_for_faults()


@pytest.mark.parametrize(
    ("lines", "kept", "num_faults", "faulty"),
    [
        ([GOOD, *BAD], [1], 3, [(2, "rows.jsonl:2"), (1, "rows.jsonl:4")]),
        ([GOOD, *[b'{"text": "t"}'] * 3], [1], 1, [(3, "rows.jsonl:2")]),  # another format is told once
        ([UTF8, LATIN, LATIN], [1], 1, [(2, "rows.jsonl:2")]),  # another encoding too
        ([b"[" + GOOD, b", " + BAD[0], b", " + GOOD + b"]"], [1, 3], 1, [(1, "rows.jsonl:2 (item 2)")]),
    ],
)
def test_faulty_rows_are_counted_by_reason(
    tmp_path: Path, lines: list[bytes], kept: list[int], num_faults: int, faulty: list[tuple[int, str]]
) -> None:
    examples, report = read(written(tmp_path, *lines))
    report.raise_for_faults("skip", len(examples))
    assert [example.line for example in examples] == kept
    assert report.num_faults == num_faults
    assert [(reason.count, reason.first[0]) for reason in report.faulty.reasons] == faulty


@pytest.mark.parametrize("content", [b"[" + GOOD + b",\n" + GOOD + b"\n{", b"PK\x03\x04rest", b""])
def test_a_fault_of_more_than_one_row_cannot_be_skipped(tmp_path: Path, content: bytes) -> None:
    examples, report = read(written(tmp_path, GOOD, name="good.jsonl"), written(tmp_path, content))
    with pytest.raises(DataError, match=r"1 fault in the data; fix it(.|\n)*leaves out single rows only"):
        report.raise_for_faults("skip", len(examples))


def test_the_way_out_is_named_where_there_is_one(tmp_path: Path) -> None:
    _, report = read(written(tmp_path, BAD[0]))
    with pytest.raises(DataError, match="or leave faulty rows out"):
        report.raise_for_faults("error")
    with pytest.raises(DataError, match="must leave one"):
        report.raise_for_faults("skip", 0)
    with pytest.raises(DataError, match=r"start again\n"):
        report.raise_for_faults(None)


def test_files_may_differ_in_format(tmp_path: Path) -> None:
    examples, report = read(
        written(tmp_path, GOOD, name="a.jsonl"), written(tmp_path, b'{"text": "t"}', name="b.jsonl")
    )
    assert len(examples) == 2
    assert list(report.formats.values()) == ["prompt/completion", "text"]


def test_labels_that_are_lists_in_some_rows_only_are_a_fault_at_the_rarer_form(tmp_path: Path) -> None:
    rows = [b'{"text": "a", "label": "x"}', b'{"text": "b", "label": ["x", "y"]}', b'{"text": "c", "label": "y"}']
    path = written(tmp_path, *rows)
    (fault,) = read(path)[1].fatal
    assert fault == f"{path}:2: label is a list, but one label in 2 rows; write every label as a list, or none"
    path = written(tmp_path, rows[1], rows[0], rows[1])
    assert f"{path}:2: label is one label, but a list in 2 rows" in read(path)[1].fatal[0]
    alike = read(written(tmp_path, rows[1], b'{"text": "d", "label": []}'))
    assert not alike[1].num_faults
    counts = LabelCounts()
    for example in alike[0]:
        counts.add(example.label or ())
    assert counts.describe() == ["  2 labels: x 1, y 1; 1 row with none of them"]


def test_whole_numbers_with_and_without_decimals_are_one_class(tmp_path: Path) -> None:
    rows, _ = read(written(tmp_path, b'{"text": "a", "label": 1}', b'{"text": "b", "label": 1.0}'))
    assert [repr(row.label) for row in rows] == ["1", "1"]


def test_a_call_of_a_tool_that_is_not_listed_is_warned_of_and_counted(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "lamp", "parameters": {"type": "object", "properties": {}}}}
    call = {"id": "1", "type": "function", "function": {"name": "lamb", "arguments": "{}"}}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]
    row = {"tools": [tool], "messages": turns}
    good = json.dumps(row).replace("lamb", "lamp").encode()
    rows, report = read(written(tmp_path, good, json.dumps(row).encode()))
    assert any("a call of a tool that is not in tools" in line and "line 2" in line for line in report.warnings)
    assert ["unlisted_tools" in one.outcomes for one in rows] == [False, True]


def test_rows_under_a_key_are_told_so(tmp_path: Path) -> None:
    _, report = read(written(tmp_path, b'{"data": [{"prompt": "a", "completion": "b"}]}', name="rows.json"))
    assert 'the rows are in the list under "data": write that list alone' in report.faults[0]
    _, report = read(written(tmp_path, b'{"chat": [{"role": "user", "content": "b"}]}', name="rows.json"))
    assert 'rename "chat" to messages' in report.faults[0]


def test_a_row_that_is_too_long_is_skipped_without_being_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr(readers, "_PIECE_BYTES", 100)
    examples, report = read(written(tmp_path, GOOD, b'{"prompt": "' + b"x" * 5000 + b'", "completion": "c"}', GOOD))
    assert [example.line for example in examples] == [1, 3]
    assert "rows.jsonl:2: the row is longer" in report.faults[0]


class TestPaths:
    def test_a_folder_stands_for_its_files_in_order(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        Path("data/more").mkdir(parents=True)
        read = ["a.json", "b.jsonl", "c.jsonl.gz", "table.csv"]
        for name in ("._a.json", "d.jsonl.1", "e.xls", "~$f.xlsx", "more/d.jsonl", "README.md", *reversed(read)):
            written(Path("data"), GOOD, name=name)
        assert [file.path.name for file in find_files(["data"])] == read
        (warning,) = unread_entries(["data", "data/a.json"])
        assert "data: not read: d.jsonl.1, e.xls, more/, ~$f.xlsx;" in warning

    def test_every_path_that_cannot_be_read_is_named(self, tmp_path: Path) -> None:
        path = written(tmp_path, GOOD, name="train.jsonl")
        (tmp_path / "none").mkdir()
        (tmp_path / "link.jsonl").symlink_to(path)
        with pytest.raises(DataError) as error:
            find_files([tmp_path / name for name in ("trian.jsonl", "none", "train.jsonl", "link.jsonl", "/dev/zero")])
        for words in ("did you mean", "none: the folder holds no", "link.jsonl: given twice", "not a regular file"):
            assert words in str(error.value), str(error.value)

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("none/**/*.json", "patterns are not read"),
            ("https://example.org/rows.jsonl", "download the rows first"),
            ("hf://datasets/someone/questions", "is written hub:someone/questions"),
            ("someone/questions", "write hub:someone/questions"),
            ("none/rows.jsonl", "only local files and folders are read"),
            ("a\0b", "no such file"),
            ("x" * 300, "no such file"),
        ],
    )
    def test_what_is_elsewhere_is_told_what_to_do(self, name: str, words: str) -> None:
        with pytest.raises(DataError, match="no such file or folder; ") as error:
            find_files([name])
        assert words in str(error.value)

    def test_the_home_folder_may_be_a_tilde(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        path = written(tmp_path, GOOD)
        assert find_files(["~/rows.jsonl"])[0].path == path

    def test_portable_names_are_text_without_the_folders_of_the_machine(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for folder in ("a", "b"):
            (tmp_path / folder).mkdir()
            written(tmp_path / folder, GOOD)
        odd = written(tmp_path / "a", GOOD, name=os.fsdecode(b"\xff.jsonl"))
        monkeypatch.chdir(tmp_path / "a")
        files = find_files([tmp_path / "a" / "rows.jsonl", tmp_path / "b" / "rows.jsonl", "../b/../a/" + odd.name])
        assert [file.portable_name for file in files] == ["rows.jsonl", "rows.jsonl (2)", "../b/../a/\ufffd.jsonl"]


@pytest.mark.parametrize(
    "content",
    [
        '{"prompt": "p", "completion": "a", "completion": "b"}\n',
        '[{"prompt": "p", "completion": "c"},\n{"prompt": "p", "prompt": "q"}]',
    ],
)
def test_a_key_that_stands_twice_is_a_fault(tmp_path: Path, content: str) -> None:
    """One of the two values would be lost without a word."""
    (tmp_path / "rows.json").write_text(content)
    faults = [row for _, _, row in read_rows(find_files([tmp_path / "rows.json"])[0]) if isinstance(row, RowFault)]
    assert "stands twice in one object; keep one" in str(faults[0])
    assert len(faults) == 1
