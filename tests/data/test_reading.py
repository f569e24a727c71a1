"""Files in, examples or faults with the right line out; never anything else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lmtune.data import reading
from lmtune.data.reading import ReadReport, read_examples
from lmtune.data.sources import find_files, unread_entries
from lmtune.data.types import Example
from lmtune.errors import DataError

GOOD = b'{"prompt": "p", "completion": "c"}'


def read(*paths: Path) -> tuple[list[Example], ReadReport]:
    report = ReadReport()
    return list(read_examples(find_files(paths), report)), report


def written(folder: Path, content: bytes, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (GOOD, [1]),
        (GOOD + b"\n", [1]),
        (b"\xef\xbb\xbf" + GOOD + b"\n", [1]),
        (b"\n \n" + GOOD + b"\n\n\t\r\n" + GOOD + b"\n\n", [3, 6]),
        (b"  " + GOOD + b"  \n", [1]),
        (b"[" + GOOD + b"]", [1]),
        (b"[" + GOOD + b",\n]", [1]),
        (b"\xef\xbb\xbf\n[\n" + GOOD + b",\r\n\n" + GOOD + b"\n]\n", [3, 5]),
        (b'[{"prompt": "p",\n "completion": "c"}, ' + GOOD + b"]", [1, 2]),
        ('{"prompt": "é\u2028\u0085 \U0001f600", "completion": "\\ud83d\\ude00"}\n'.encode() + GOOD, [1, 2]),
    ],
)
def test_good_files(tmp_path: Path, content: bytes, lines: list[int]) -> None:
    examples, report = read(written(tmp_path, content))
    assert report.faults == []
    assert [example.line for example in examples] == lines
    assert all(example.location == f"{tmp_path.name and 'rows.jsonl'}:{example.line}" for example in examples)


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        (b'{"prompt": "p", \n' + GOOD, 1, ["too early"]),
        (b'{\n  "prompt": "p",\n  "completion": "c"\n}\n', 1, ["one line"]),
        (GOOD + GOOD, 1, ["column 35", "more text"]),
        (b'"just a string"', 1, ["must be an object"]),
        (GOOD + b"\n3\n", 2, ["must be an object"]),
        (b"[" + GOOD + b"]\n" + GOOD, 2, ["after the list's end"]),
        (b"[" + GOOD + b',\n{"prompt": "p",\n x}]', 3, ["column 2"]),
        (b"[" + GOOD + b',\n"\xff"]', 2, ["0xff", "UTF-8"]),
    ],
)  # fmt: skip
def test_bad_files(tmp_path: Path, content: bytes, line: int, words: list[str]) -> None:
    """More of them, through the command, are in tests/bad_input/test_data.py."""
    path = written(tmp_path, content)
    _, report = read(path)
    assert report.num_faults == 1, report.faults
    assert report.faults[0].startswith(f"{path}:{line}: "), report.faults[0][:200]
    for word in words:
        assert word in report.faults[0], report.faults[0][:200]


def test_every_fault_is_collected_and_good_rows_go_on(tmp_path: Path) -> None:
    lines = [GOOD if number % 2 else b'{"prompt": 1, "completion": "c"}' for number in range(60)]
    examples, report = read(written(tmp_path, b"\n".join(lines)))
    assert len(examples) == 30
    assert report.num_faults == 30
    with pytest.raises(DataError, match=r"30 faults(.|\n)*rows.jsonl:1: (.|\n)*… and 10 more"):
        report.raise_for_faults()


class TestFaultyRows:
    BAD = (b'{"prompt": 1, "completion": "c"}', b'{"prompt": 22, "completion": "c"}', b'{"prompt": "p", "compl')

    def test_rows_are_counted_by_reason(self, tmp_path: Path) -> None:
        examples, report = read(written(tmp_path, b"\n".join([GOOD, *self.BAD])))
        assert len(examples) == 1
        report.raise_for_faults("skip", len(examples))
        assert (report.faulty.count, [reason.count for reason in report.faulty.reasons]) == (3, [2, 1])
        assert report.faulty.reasons[0].reason == "prompt is a number (1); it must be a string"
        assert report.faulty.reasons[0].first == ["rows.jsonl:2", "rows.jsonl:3"]

    def test_lines_that_are_not_rows_are_told_once_and_counted_each(self, tmp_path: Path) -> None:
        lines = [b"# a heading", b"prompt,completion", b"3", b'"text"', b"more,text", GOOD, b"p,c", GOOD]
        examples, report = read(written(tmp_path, b"\n".join(lines)))
        assert [example.line for example in examples] == [6, 8]
        assert (report.num_faults, report.faulty.count) == (1, 6)

    def test_an_item_of_a_list_is_named_by_its_number(self, tmp_path: Path) -> None:
        _, report = read(written(tmp_path, b"[" + GOOD + b", " + self.BAD[0] + b", " + GOOD + b"]"))
        assert report.faulty.reasons[0].first == ["rows.jsonl:1 (item 2)"]

    def test_a_row_of_another_format_is_told_once_and_counted_each_time(self, tmp_path: Path) -> None:
        _, report = read(written(tmp_path, b"\n".join([GOOD, *[b'{"text": "t"}'] * 3])))
        assert (report.num_faults, report.faulty.count) == (1, 3)

    @pytest.mark.parametrize(
        "content",
        [
            b"[" + GOOD + b",\n" + GOOD + b"\n" + GOOD + b"]",  # how many rows follow is not known
            b"PK\x03\x04rest",
            b"",
        ],
    )
    def test_a_fault_of_more_than_one_row_is_an_error_all_the_same(self, tmp_path: Path, content: bytes) -> None:
        good = written(tmp_path, GOOD, "good.jsonl")
        examples, report = read(good, written(tmp_path, content))
        assert examples
        with pytest.raises(DataError, match=r"1 fault in the data; fix it(.|\n)*leaves out single rows only"):
            report.raise_for_faults("skip", len(examples))

    def test_nothing_left_is_an_error(self, tmp_path: Path) -> None:
        examples, report = read(written(tmp_path, b"\n".join(self.BAD)))
        with pytest.raises(DataError, match=r"3 faults(.|\n)*no row would be left"):
            report.raise_for_faults("skip", len(examples))

    def test_the_setting_is_named_where_there_is_one(self, tmp_path: Path) -> None:
        _, report = read(written(tmp_path, b"\n".join([GOOD, self.BAD[0]])))
        with pytest.raises(
            DataError, match=r"1 fault in the data; fix it and start again, or leave .*faulty_rows: skip"
        ):
            report.raise_for_faults("error")
        with pytest.raises(DataError) as error:
            report.raise_for_faults(None)
        assert "faulty_rows" not in str(error.value)


def test_a_table_is_named_for_what_it_is(tmp_path: Path) -> None:
    _, report = read(written(tmp_path, b"prompt,completion\np,c\n", "rows.csv"))
    assert "rows.csv:1: the file is a table (CSV); export it as JSONL" in report.faults[0]


def test_a_list_goes_on_after_a_bad_item(tmp_path: Path) -> None:
    bad = b'{"prompt": "p", "completion": NaN, "score": NaN}'
    examples, report = read(
        written(tmp_path, b"[\n" + b",\n".join([GOOD, bad, b'{"text": 1, "text": 2}', GOOD]) + b"\n]")
    )
    assert [example.line for example in examples] == [2, 5]
    assert [fault.split(":")[1] for fault in report.faults] == ["3", "4"]


def test_files_may_differ_in_format(tmp_path: Path) -> None:
    first = written(tmp_path, GOOD, "a.jsonl")
    second = written(tmp_path, b'{"text": "t"}', "b.jsonl")
    examples, report = read(first, second)
    assert len(examples) == 2
    assert list(report.formats.values()) == ["prompt/completion", "text"]


def test_unused_keys_and_blank_answers_warn_once_a_file(tmp_path: Path) -> None:
    row = b'{"prompt": "p", "completion": "  ", "id": 1, "source": "x"}\n'
    examples, report = read(written(tmp_path, row * 5))
    assert len(examples) == 5
    assert len(report.warnings) == 2
    assert '"id", "source"' in report.warnings[0]
    assert "5 rows: line 1, 2, 3, 4, 5" in report.warnings[1]


def test_columns_in_a_list_count_from_the_line_s_beginning(tmp_path: Path) -> None:
    content = b"[" + b", ".join([GOOD] * 10) + b', {"prompt": x}]'
    _, report = read(written(tmp_path, content))
    assert f":1: item 11: column {content.index(b'x}') + 1}: " in report.faults[0]


def test_a_row_that_is_too_long_is_skipped_without_being_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_ROW_BYTES", 1000)
    monkeypatch.setattr(reading, "_PIECE_BYTES", 100)
    long = b'{"prompt": "' + b"x" * 5000 + b'", "completion": "c"}'
    examples, report = read(written(tmp_path, GOOD + b"\n" + long + b"\n" + GOOD))
    assert [example.line for example in examples] == [1, 3]
    assert "rows.jsonl:2: the row is longer" in report.faults[0]


class TestPaths:
    def test_a_folder_stands_for_its_files_in_order(self, tmp_path: Path) -> None:
        for name in ("b.jsonl", "a.json", "c.txt", "._a.json"):
            written(tmp_path, GOOD, name)
        assert [file.path.name for file in find_files([tmp_path])] == ["a.json", "b.jsonl"]

    def test_every_path_that_cannot_be_read_is_named(self, tmp_path: Path) -> None:
        written(tmp_path, GOOD, "train.jsonl")
        (tmp_path / "none").mkdir()
        names = ["trian.jsonl", "none", "train.jsonl", "train.jsonl"]
        with pytest.raises(DataError) as error:
            find_files([tmp_path / name for name in names] + ["/dev/zero", "a\0b"])
        for words in (
            "no such file; did you mean", "holds no *.jsonl", "given twice", "not a regular file", "cannot be opened",
        ):  # fmt: skip
            assert words in str(error.value), str(error.value)

    def test_what_a_folder_holds_besides_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        folder = Path("data")
        (folder / "more").mkdir(parents=True)
        for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.1", "table.csv", "more/d.jsonl", "README.md", ".hidden.csv"):
            written(folder, GOOD, name)
        (warning,) = unread_entries([folder, folder / "a.jsonl"])
        assert "data: 4 entries are not read: b.jsonl.gz, c.jsonl.1, more/, table.csv;" in warning
        (folder / "a.jsonl").unlink()
        with pytest.raises(DataError, match=r"holds no \*\.jsonl or \*\.json file; it holds b\.jsonl\.gz, c\.jsonl\.1"):
            find_files([folder])

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("*.jsonl", ["no patterns", "it matches train.jsonl"]),
            ("none/**/*.json", ["no patterns"]),
            ("part-{1,2}.jsonl", ["no patterns"]),
            ("https://example.org/rows.jsonl", ["download the rows first"]),
            ("hf://datasets/someone/questions", ["download the rows first"]),
            ("s3://bucket/rows.jsonl", ["download the rows first"]),
            ("someone/questions", ["a data set of the Hub", "hf download --repo-type dataset someone/questions"]),
            ("questions", ["a data set of the Hub"]),
            ("none/rows.jsonl", ["only local files and folders are read"]),
        ],
    )
    def test_what_is_elsewhere_is_told_what_to_do(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: list[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        written(tmp_path, GOOD, "train.jsonl")
        with pytest.raises(DataError) as error:
            find_files([name])
        for word in (f"{name}: no such file or folder; only local files and folders are read", *words):
            assert word in str(error.value), str(error.value)

    def test_the_home_folder_may_be_a_tilde(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        path = written(tmp_path, GOOD)
        assert find_files(["~/rows.jsonl"])[0].path == path

    def test_a_link_to_a_file_given_already_is_given_twice(self, tmp_path: Path) -> None:
        path = written(tmp_path, GOOD)
        (tmp_path / "link.jsonl").symlink_to(path)
        with pytest.raises(DataError, match=r"link.jsonl: given twice"):
            find_files([path, tmp_path / "link.jsonl"])

    def test_portable_names_hold_no_folder_of_the_machine(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for folder in ("a", "b"):
            (tmp_path / folder).mkdir()
            written(tmp_path / folder, GOOD)
        monkeypatch.chdir(tmp_path / "a")
        files = find_files([tmp_path / "a" / "rows.jsonl", tmp_path / "b" / "rows.jsonl"])
        assert [file.portable_name for file in files] == ["rows.jsonl", "rows.jsonl (2)"]
        assert find_files(["../b/rows.jsonl"])[0].portable_name == "../b/rows.jsonl"

    def test_a_name_that_is_not_valid_text_can_be_written_down(self, tmp_path: Path) -> None:
        path = written(tmp_path, GOOD, os.fsdecode(b"\xff.jsonl"))
        (file,) = find_files([path])
        assert (file.path, file.portable_name) == (path, "\ufffd.jsonl")

    def test_a_file_without_permission(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = written(tmp_path, GOOD)
        monkeypatch.setattr(os, "access", lambda *_: False)  # permissions do not bind the root user
        with pytest.raises(DataError, match="permissions"):
            find_files([path])

    def test_a_folder_without_permission(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(path: Path) -> list[str]:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(os, "listdir", refuse)
        with pytest.raises(DataError, match=r"the folder may not be listed; check its permissions\n.*x.jsonl: no such"):
            find_files([tmp_path, tmp_path / "x.jsonl"])
