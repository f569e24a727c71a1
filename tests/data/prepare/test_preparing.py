"""`lmtune prepare` as a user runs it: files in, files out, questions, plans, and mistakes that write nothing."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lmtune.data.checking import check_data
from lmtune.errors import ConfigError, DataError, LmtuneError
from lmtune.recipes.prepare import main
from tests.workplace import environment, write_rows

ROWS = [{"prompt": f"Where is item {n * n}?", "completion": f"Item {n * n} is on shelf {n}."} for n in range(20)]


class Keyboard(io.StringIO):
    """Lines that a user types."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with rows that need cleaning, and nobody at the keyboard."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    dirty = {"prompt": " Is it cafÃ© time? ", "completion": "Write to me@shop.example.org."}
    write_rows(tmp_path / "raw.jsonl", [*ROWS, ROWS[3], dirty])
    return tmp_path


def written(name: str = "my.jsonl") -> list[dict[str, Any]]:
    """The rows of a file."""
    return [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]


def turns(*texts: str) -> list[dict[str, str]]:
    """Role, content, role, content, …"""
    return [{"role": role, "content": text} for role, text in zip(texts[::2], texts[1::2], strict=True)]


CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "lamp", "arguments": '{"who": "me@x.org", "n": 13800138000}'},
}
TOOLS: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": "Turn it on."},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "done", "tool_call_id": "c1", "name": "lamp"},
        {"role": "assistant", "content": "It is on."},
    ],
    "tools": [{"type": "function", "function": {"name": "lamp", "parameters": {"type": "object", "properties": {}}}}],
}


CLEAN = {"prompt": "Is it café time?", "completion": "Write to [EMAIL]."}


def test_recommended_steps_are_applied_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    main(["raw.jsonl"], Path("my.jsonl"), yes=True)
    assert written() == [*ROWS, CLEAN]
    printed = capsys.readouterr().out
    assert "1 row is equal to an earlier row: drop (step duplicates)" in printed
    assert "raw.jsonl:21" in printed
    assert "22 rows read; 21 rows written: my.jsonl. Next:" in printed
    assert "lmtune check my.jsonl\n" in printed
    plan = json.loads(Path("my.prepare.json").read_text())
    counts = {step["name"]: step["rows"] for step in plan["steps"] if step["rows"]}
    assert counts == {"encoding": 1, "spaces": 1, "personal": 1, "duplicates": 1}
    assert plan["rows"] == {"read": 22, "written": 21, "held_out": 0, "copies_left_out": 0}
    assert "me@shop" not in Path("my.prepare.json").read_text()
    assert check_data(["my.jsonl"]).train.num_rows == 21
    assert sorted(path.name for path in Path().iterdir()) == ["my.jsonl", "my.prepare.json", "raw.jsonl"]


def test_answers_decide(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", Keyboard("\nmaybe\nn\n\ny\n"))  # encoding; spaces twice; personal; duplicates
    main(["raw.jsonl"], Path("my.jsonl"))
    assert written() == [*ROWS, {**CLEAN, "prompt": " Is it café time? "}]
    asked = capsys.readouterr().err
    assert "[recommended] 1 row holds text in a wrong encoding: repair? [Y/n]" in asked
    assert "maybe: expected y or n" in asked
    assert '" Is it cafÃ© time? " → " Is it café time? "' in asked


def test_what_is_left_out_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(Path("raw.jsonl"), [{**ROWS[0], "context": "In the hall.", "id": 7}])
    main(["raw.jsonl"], Path("my.jsonl"), yes=True)
    printed = capsys.readouterr().out
    assert "warning: context is neither in the question nor trained" in printed
    assert 'keys that are left out: "id"' in printed


def test_a_call_stays_a_call() -> None:
    """What its arguments hold is masked, and an answer without text is not empty."""
    write_rows(Path("raw.jsonl"), [TOOLS])
    main(["raw.jsonl"], Path("my.jsonl"), yes=True)
    masked = {"who": "[EMAIL]", "n": 13800138000}
    (row,) = written()
    assert json.loads(row["messages"][1]["tool_calls"][0]["function"]["arguments"]) == masked
    assert row["messages"][2:] == TOOLS["messages"][2:]
    assert row["tools"] == TOOLS["tools"]


def test_a_plan_is_replayed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["raw.jsonl"], Path("my.jsonl"), steps="personal,duplicates", validation="0.2", seed=4)
    main(None, Path("again.jsonl"), replay=Path("my.prepare.json"))
    for name in (".jsonl", ".validation.jsonl"):
        assert Path(f"again{name}").read_text() == Path(f"my{name}").read_text()
    assert len(written()) + len(written("my.validation.jsonl")) == 21
    assert {**CLEAN, "prompt": " Is it cafÃ© time? "} in written() + written("my.validation.jsonl")
    write_rows(Path("raw.jsonl"), ROWS)
    main(None, Path("other.jsonl"), replay=Path("my.prepare.json"))
    assert "raw.jsonl: its content is not that of the plan" in capsys.readouterr().err


def test_copies_go_with_their_rows() -> None:
    from lmtune.data.reading import ReadReport, read_examples
    from lmtune.data.sources import find_files
    from lmtune.data.types import prompt_hash
    from lmtune.recipes.augment import main as augment

    write_rows(Path("raw.jsonl"), [{"text": f"the  blue lamp {n} came broken \r\n", "label": n % 2} for n in range(20)])
    augment("raw.jsonl", Path("more.jsonl"), swap=1, copies=2)
    main(["more.jsonl"], Path("my.jsonl"), steps="spaces", validation="0.2")
    examples = list(read_examples(find_files(["my.jsonl"]), ReadReport()))
    assert len(examples) == 48
    originals = {prompt_hash(one) for one in examples if one.origin is None}
    assert {one.origin for one in examples if one.origin is not None} == originals
    held_out = written("my.validation.jsonl")
    assert len(held_out) == 4
    assert not any("augmented_from" in row for row in held_out)
    assert json.loads(Path("my.prepare.json").read_text())["rows"]["copies_left_out"] == 8


def test_groups_stay_on_one_side() -> None:
    rows = [{"prompt": f"Where is item {n * n}?", "completion": f"Answer {m}."} for n in range(30) for m in range(3)]
    write_rows(Path("raw.jsonl"), rows)
    main(["raw.jsonl"], Path("my.jsonl"), no=True, validation="0.2")
    train, held_out = written(), written("my.validation.jsonl")
    assert len(held_out) == 18
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}


@pytest.mark.parametrize(
    ("given", "out"),
    [
        ([{"instruction": "a", "input": "b", "output": "c"}], [{"prompt": "a\n\nb", "completion": "c"}]),
        (
            [{"prompt": "a", "completion": "b"},
             {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "c"}], "system": "s"}],
            [{"messages": turns("user", "a", "assistant", "b")},
             {"messages": turns("system", "s", "user", "a", "assistant", "c")}],
        ),
        (
            [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0},
                           {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}], "weight": 2}],
            [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0},
                           {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}], "weight": 2.0}],
        ),
        ([{"text": "a", "label": "b"}], [{"text": "a", "label": "b"}]),
        ([TOOLS], [TOOLS]),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], [{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        ([{"prompt": "a", "completion": "b", "label": True}], [{"prompt": "a", "completion": "b", "label": True}]),
        ([{"prompt": "a", "label": ["x", "y"]}], [{"prompt": "a", "label": ["x", "y"]}]),
        ([{"text": "a\0b"}], [{"text": "ab"}]),
    ],
)  # fmt: skip
def test_every_format_becomes_one_that_is_read_alike(given: list[dict[str, Any]], out: list[dict[str, Any]]) -> None:
    from lmtune.data.reading import ReadReport, read_examples
    from lmtune.data.sources import find_files
    from lmtune.data.types import content_hash

    write_rows(Path("raw.jsonl"), given)
    main(["raw.jsonl"], Path("my.jsonl"), no=True)
    assert written() == out
    if given[0].get("text") != "a\0b" and len({*map(str, map(sorted, given))}) == 1:
        hashes = [[content_hash(one) for one in read_examples(find_files([name]), ReadReport())]
                  for name in ("raw.jsonl", "my.jsonl")]  # fmt: skip
        assert hashes[0] == hashes[1]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({}, ConfigError, "questions need a terminal; give --yes"),
        ({"yes": True, "no": True}, ConfigError, "--yes and --no"),
        ({"steps": "near,persona"}, ConfigError, "persona: not a step; is personal meant?"),
        ({"yes": True, "validation": "1.5"}, ConfigError, "--validation: 1.5"),
        ({"yes": True, "validation": "none.jsonl"}, DataError, "none.jsonl"),
        ({"yes": True, "blocked": "none.txt"}, ConfigError, "none.txt"),
        ({"replay": Path("raw.jsonl")}, ConfigError, "is not a plan"),
        ({"yes": True, "inputs": ["none.jsonl"]}, DataError, "none.jsonl: no such file"),
        ({"yes": True, "inputs": ["bad.jsonl"]}, DataError, "no row is left"),
        ({"no": True, "inputs": ["bad.jsonl"]}, DataError, "bad.jsonl:1: unknown keys"),
        ({"yes": True, "validation": "bad.jsonl"}, DataError, "bad.jsonl:1: unknown keys"),
        ({"yes": True, "language": "en,english"}, ConfigError, "--language: english: not known"),
        ({"yes": True, "output": Path("my.csv")}, ConfigError, "ends in .jsonl"),
        ({"yes": True, "output": Path("raw.jsonl")}, ConfigError, "raw.jsonl is there already"),
        ({"yes": True, "output": Path("no/my.jsonl")}, ConfigError, "no is not a folder"),
        ({"yes": True, "output": Path("other.jsonl")}, ConfigError, "other.prepare.json is there already"),
    ],
)  # fmt: skip
def test_mistakes_are_named_and_write_nothing(options: dict[str, Any], error: type[LmtuneError], said: str) -> None:
    write_rows(Path("bad.jsonl"), [{"what": "is this"}])
    Path("other.prepare.json").write_text("{}")
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    with pytest.raises(error) as caught:
        main(**{"inputs": ["raw.jsonl"], "output": Path("my.jsonl"), **options})
    assert said in str(caught.value)
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before


def test_interrupted_it_leaves_nothing(folder: Path) -> None:
    write_rows(folder / "raw.jsonl", [{"text": f"row {n} " + "word " * 40} for n in range(30_000)])
    process = subprocess.Popen(
        [sys.executable, "-m", "lmtune", "prepare", "raw.jsonl", "-o", "my.jsonl", "--yes"],
        cwd=folder, env=environment(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (folder / ".staging-my.jsonl").is_dir() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert sorted(path.name for path in folder.iterdir()) == ["raw.jsonl"]


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from lmtune.data.prepare import libraries

    libraries.library.cache_clear()
    monkeypatch.setattr(libraries.importlib.util, "find_spec", lambda name: None if name == "jieba" else object())
    with pytest.raises(ConfigError, match=r"jieba: not installed.*pip install jieba"):
        libraries.library("ftfy")


@pytest.mark.parametrize(
    ("sample", "said"), [(10, "terms of questions in 10 of the rows:"), (100, "terms of questions:")]
)
def test_terms_say_whether_they_are_of_all_rows(
    sample: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lmtune.data.prepare.report._SAMPLE", sample)
    write_rows(Path("rows.jsonl"), ROWS)
    main(["rows.jsonl"], Path("out.jsonl"), no=True)
    assert said in " ".join(capsys.readouterr().out.split())
