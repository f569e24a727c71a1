"""A cache entry is whole or built again; nothing half is ever seen."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from lmtune.data.cache import cache_folder, cached, is_whole
from lmtune.errors import LmtuneError

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
        entry = cached(tmp_path, KEY, build)
        assert (entry / "rows").read_text() == "result"
    assert len(built) == 1


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest", "no manifest", "empty"])
def test_a_damaged_entry_is_built_again(tmp_path: Path, damage: str) -> None:
    build, built = builder()
    entry = cached(tmp_path, KEY, build)
    rows, manifest = entry / "rows", entry / "manifest.json"
    if damage == "flip":
        rows.write_text("resulx")
    elif damage == "cut":
        rows.write_text("res")
    elif damage == "remove":
        rows.unlink()
    elif damage == "manifest":
        manifest.write_text("[1")
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text("")
    assert not is_whole(entry)
    assert (cached(tmp_path, KEY, build) / "rows").read_text() == "result"
    assert len(built) == 2


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "rows").write_text("half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        cached(tmp_path, KEY, build)
    assert [path.name for path in (tmp_path / "ab").iterdir()] == [f"{KEY}.lock"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "ab" / f".{KEY[:8]}-left").mkdir(parents=True)
    cached(tmp_path, KEY, builder()[0])
    assert sorted(path.name for path in (tmp_path / "ab").iterdir()) == [KEY, f"{KEY}.lock"]


def _build_slowly(folder: Path) -> None:
    for index in range(200):
        (folder / f"rows{index}").write_text(str(os.getpid()))


def _want(folder: Path) -> None:
    entry = cached(folder, KEY, _build_slowly)
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
        cached(tmp_path / "file", KEY, builder()[0])


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LMTUNE_CACHE", "here")
    assert cache_folder() == Path("here")
    monkeypatch.delenv("LMTUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "lmtune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "lmtune"
