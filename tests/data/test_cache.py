"""A cache entry is whole or built again; nothing half is ever seen."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from lmtune.errors import LmtuneError
from lmtune.io import atomic
from lmtune.io.atomic import cache_folder, content_sha256, file_sha256, get_or_build, hold, is_intact

KEY = "ab" * 32


def builder(text: str = "result"):
    built = []

    def build(folder: Path) -> None:
        built.append(1)
        (folder / "rows").write_text(text)

    return build, built


def test_built_once(tmp_path: Path) -> None:
    build, built = builder()
    for _ in range(3):
        entry = get_or_build(tmp_path, KEY, build)
        assert (entry / "rows").read_text() == "result"
    assert len(built) == 1


@pytest.mark.parametrize(
    ("name", "content"), [("rows", "resulx"), ("rows", None), ("manifest.json", "[1"), ("manifest.json", None)]
)
def test_a_damaged_entry_is_built_again(tmp_path: Path, name: str, content: str | None) -> None:
    build, built = builder()
    damaged = get_or_build(tmp_path, KEY, build) / name
    damaged.unlink() if content is None else damaged.write_text(content)
    (tmp_path / "ab" / f".staging-{KEY[:8]}-1").mkdir()  # as a process that was killed leaves it
    assert (get_or_build(tmp_path, KEY, build) / "rows").read_text() == "result"
    assert len(built) == 2
    assert sorted(path.name for path in (tmp_path / "ab").iterdir()) == [KEY, f"{KEY}.lock"]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "rows").write_text("half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        get_or_build(tmp_path, KEY, build)
    assert [path.name for path in (tmp_path / "ab").iterdir()] == [f"{KEY}.lock"]


def _build_slowly(folder: Path) -> None:
    for index in range(200):
        (folder / f"rows{index}").write_text(str(os.getpid()))


def _want(folder: Path) -> None:
    entry = get_or_build(folder, KEY, _build_slowly)
    assert len({(entry / f"rows{index}").read_text() for index in range(200)}) == 1


def test_processes_that_want_one_entry_do_not_mix(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_want, args=(tmp_path,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len([path for path in (tmp_path / "ab").iterdir() if path.is_dir()]) == 1


def test_a_cache_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LmtuneError, match="LMTUNE_CACHE"):
        get_or_build(tmp_path / "file", KEY, builder()[0])


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LMTUNE_CACHE", "here")
    assert cache_folder() == Path("here")
    monkeypatch.delenv("LMTUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "lmtune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "lmtune"


def settle(*paths: Path) -> None:
    """As if the files had been written an hour ago."""
    for path in paths:
        os.utime(path, (time.time() - 3600,) * 2)


def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which files are read from their first byte to their last."""
    found: list[str] = []
    monkeypatch.setattr(atomic, "content_sha256", lambda path: found.append(path.name) or content_sha256(path))
    return found


def test_an_entry_that_has_not_changed_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(folder: Path) -> None:
        (folder / "rows").write_text("result")
        settle(folder / "rows")

    entry = get_or_build(tmp_path, KEY, build)
    read = reads(monkeypatch)
    assert is_intact(entry)
    assert read == []
    (entry / "rows").write_text("resulx")
    assert not is_intact(entry)
    assert read == ["rows"]


def test_a_data_file_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_SETTLED_NS", 0)
    read, path = reads(monkeypatch), tmp_path / "rows.jsonl"
    path.write_text("one")
    first = file_sha256(path)
    assert first == file_sha256(path) == content_sha256(path)
    assert read == ["rows.jsonl"]
    path.write_text("two")
    settle(path)  # its time of change says nothing
    assert file_sha256(path) == content_sha256(path) != first
    assert not any(str(tmp_path) in file.read_text() for file in cache_folder().rglob("*.json"))


def test_a_data_file_that_was_just_written_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It could be written again within the same tick of the clock of the file system."""
    read, path = reads(monkeypatch), tmp_path / "rows.jsonl"
    path.write_text("one")
    assert file_sha256(path) == file_sha256(path)
    assert read == ["rows.jsonl"] * 2


def test_entries_used_last_and_those_in_use_are_kept(tmp_path: Path) -> None:
    keys = [f"{number:02d}" * 32 for number in range(6)]
    for number, key in enumerate(keys):
        entry = get_or_build(tmp_path, key, builder()[0], keep=3)
        os.utime(entry / "manifest.json", (number, number))
        if number == 0:
            hold(entry, held := type("Owner", (), {})())
    assert [key for key in keys if (tmp_path / key[:2] / key).is_dir()] == [keys[0], *keys[3:]]
    del held
    get_or_build(tmp_path, keys[5], builder()[0], keep=3)
    assert [key for key in keys if (tmp_path / key[:2] / key).is_dir()] == keys[3:]
