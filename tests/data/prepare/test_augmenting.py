"""`lmtune augment`: what is changed, what stays, and that copies of a held-out row are nowhere."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmtune.config.schema import DataConfig
from lmtune.data.prepare.augmenting import Changer, Changes, augment
from lmtune.data.store import load_data
from lmtune.errors import ConfigError, DataError, LmtuneError
from lmtune.recipes.augment import main
from tests.tokenizers import CHATML, make_tokenizer
from tests.workplace import write_rows


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(name: str) -> list[dict[str, Any]]:
    """The rows of a file."""
    return [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]


TEXT = "  the lamp (number 5) came broken [EMAIL] yesterday"


def test_words_are_deleted_swapped_and_replaced() -> None:
    seen = {Changer(Changes(delete=0.3))(TEXT, random.Random(n)) for n in range(200)}
    words = TEXT.split()
    for text in seen:
        found = text.split()
        assert text.startswith("  ")
        assert {"5)", "[EMAIL]"} <= set(found)
        assert [word for word in words if word in found] == found  # in their order
    assert len(seen) > 20
    lengths = [len(Changer(Changes(delete=0.3))(TEXT, random.Random(n)).split()) for n in range(2000)]
    assert np.mean(lengths) == pytest.approx(2 + 6 * 0.7, abs=0.1)
    for n in range(50):
        swapped = Changer(Changes(swap=1))(TEXT, random.Random(n))
        assert sorted(swapped.split()) == sorted(words)
        assert sum(a != b for a, b in zip(swapped.split(), words, strict=True)) == 2
    replaced = {Changer(Changes(replacements={"lamp": ("light",), "broken": ("in pieces",)}))(
        "The LAMP, the Lamp: lampshade broken", random.Random(n)) for n in range(200)}  # fmt: skip
    assert "The Light, the Light: lampshade in pieces" in replaced
    assert all("lampshade" in text for text in replaced)


def test_a_script_without_spaces_is_changed_by_characters() -> None:
    text = "今天送餐很快iPhone好"
    for n in range(50):
        swapped = Changer(Changes(swap=1))(text, random.Random(n))
        assert sorted(swapped) == sorted(text)
        assert "iPhone" in swapped
        kept = Changer(Changes(delete=0.4))(text, random.Random(n))
        places = [text.index(mark) for mark in kept if mark not in "iPhone"]
        assert places == sorted(places)
    changer = Changer(Changes(replacements={"很快": ("神速",), "快": ("慢",)}))
    seen = {changer(text, random.Random(n)) for n in range(20)}
    assert seen == {text, text.replace("很快", "神速")}  # the longest word first


ROWS: list[dict[str, Any]] = [
    {"prompt": "where is the blue lamp", "completion": "where is the blue lamp"},
    {"instruction": "where is the", "input": "blue lamp of mine", "output": "on the shelf"},
    {"messages": [{"role": "system", "content": "be very kind now"}, {"role": "user", "content": "where is the lamp"},
                  {"role": "assistant", "content": "on the top shelf"}]},
    {"conversations": [{"from": "human", "value": "where is the lamp"}, {"from": "gpt", "value": "on the top shelf"}]},
    {"text": "the lamp came broken", "label": "complaint"},
    {"prompt": "where is the lamp", "chosen": "on the top shelf", "rejected": "I do not know"},
    {"input": {"messages": [{"role": "user", "content": "where is the lamp"}]},
     "preferred_output": [{"role": "assistant", "content": "on the top shelf"}],
     "non_preferred_output": [{"role": "assistant", "content": "I do not know"}]},
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "+".join(row))
def test_answers_stay_in_every_format(row: dict[str, Any]) -> None:
    write_rows(Path("my.jsonl"), [row])
    main("my.jsonl", Path("more.jsonl"), swap=1, copies=3)
    first, *copies = read("more.jsonl")
    assert first == row
    assert len(copies) == 3
    text = json.dumps(row)
    for copy in copies:
        assert len(copy.pop("augmented_from")) == 16
        assert copy != row
        for part in ("be very kind now", "on the top shelf", "on the shelf", "I do not know", "complaint"):
            assert (part in json.dumps(copy)) == (part in text)
        assert copy.get("completion") == row.get("completion")


def test_it_can_be_repeated_and_copies_are_not_copied(capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(Path("my.jsonl"), [{"prompt": f"where is lamp {n} now", "completion": "here"} for n in range(5)])
    main("my.jsonl", Path("a.jsonl"), swap=1, copies=2, seed=3)
    main("my.jsonl", Path("b.jsonl"), swap=1, copies=2, seed=3)
    main("my.jsonl", Path("c.jsonl"), swap=1, copies=2, seed=4)
    assert Path("a.jsonl").read_text() == Path("b.jsonl").read_text() != Path("c.jsonl").read_text()
    assert "5 rows and 10 copies" in capsys.readouterr().out
    main("a.jsonl", Path("d.jsonl"), swap=1, copies=1)
    assert len(read("d.jsonl")) == 20


@pytest.mark.parametrize("labelled", [False, True])
def test_copies_of_a_held_out_row_are_nowhere(labelled: bool) -> None:
    def row(n: int) -> dict[str, Any]:
        text = f"where is the blue lamp of shelf {n} now"
        return {"text": text, "label": n % 2} if labelled else {"prompt": text, "completion": f"here {n}"}

    write_rows(Path("my.jsonl"), [row(n) for n in range(20)])
    main("my.jsonl", Path("more.jsonl"), delete=0.2, swap=1, copies=2)
    from lmtune.data.rendering import Renderer

    config = DataConfig(train="more.jsonl", validation_fraction=0.2)
    data = load_data(config, Renderer(make_tokenizer(CHATML)), seed=1, rows="labelled" if labelled else "answer")
    assert data.validation is not None
    assert not data.validation.copies.any()
    assert (len(data.train), len(data.validation)) == (48, 4)
    assert data.train.copies.sum() == 32
    assert not set(data.train.prompt.tolist()) & set(data.validation.prompt.tolist())
    assert data.report.validation.copies == 8  # type: ignore[union-attr]


@pytest.mark.parametrize("answers", [1, 10])
def test_where_all_rows_have_one_question_no_copy_tells_a_held_out_answer(answers: int) -> None:
    asked = "write a short line about the blue lamp"
    write_rows(Path("my.jsonl"), [{"prompt": asked, "completion": f"line {n}"} for n in range(answers)])
    main("my.jsonl", Path("more.jsonl"), delete=0.2, swap=1, copies=2)
    from lmtune.data.rendering import Renderer

    config = DataConfig(train="more.jsonl", validation_fraction=0.3)
    data = load_data(config, Renderer(make_tokenizer(CHATML)), seed=1)
    if answers == 1:
        assert (len(data.train), data.validation) == (3, None)
        return
    assert data.validation is not None
    assert (len(data.train), len(data.validation)) == (7, 3)
    assert data.report.validation.copies == 20  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({}, ConfigError, "say what to change"),
        ({"swap": 1, "data": "my.validation.jsonl"}, ConfigError, "held out"),
        ({"swap": 1, "data": "text.jsonl"}, DataError, "text.jsonl:1: a plain text is trained"),
        ({"swap": 1, "data": "none.jsonl"}, DataError, "none.jsonl"),
        ({"swap": 1, "data": "bad.jsonl"}, DataError, "bad.jsonl:1: completion missing"),
        ({"swap": 1, "data": "short.jsonl"}, DataError, "no row could be changed"),
        ({"table": "none.tsv"}, ConfigError, "none.tsv: cannot be read"),
        ({"table": "bad.tsv"}, ConfigError, "bad.tsv:2: expected a word, a tab"),
        ({"swap": 1, "output": Path("my.jsonl")}, ConfigError, "my.jsonl is there already"),
    ],
)
def test_mistakes_are_named_and_write_nothing(options: dict[str, Any], error: type[LmtuneError], said: str) -> None:
    write_rows(Path("my.jsonl"), ROWS[:1])
    write_rows(Path("text.jsonl"), [{"text": "a b c"}])
    write_rows(Path("bad.jsonl"), [{"prompt": "a b c"}])
    write_rows(Path("short.jsonl"), [{"prompt": "a", "completion": "b"}])
    Path("bad.tsv").write_text("lamp\tlight\nbroken\n")
    before = sorted(path.name for path in Path().iterdir())
    with pytest.raises(error) as caught:
        main(**{"data": "my.jsonl", "output": Path("out.jsonl"), **options})
    assert said in str(caught.value)
    assert sorted(path.name for path in Path().iterdir()) == before


def test_a_table_is_read_as_training_reads_it() -> None:
    """Also where its columns have other names."""
    Path("in.csv").write_text("label,review\n1,the lamp came broken today\n", encoding="utf-8")
    made = augment("in.csv", Path("out.jsonl"), Changes(swap=1))
    assert read("out.jsonl")[0] == {"label": 1, "text": "the lamp came broken today"}
    assert "columns review → text" in made.said
    Path("in.csv").write_text("stars,review\n1,the lamp came broken today\n", encoding="utf-8")
    augment("in.csv", Path("named.jsonl"), Changes(swap=1), {"stars": "label", "review": "text"})
    assert read("named.jsonl") == read("out.jsonl")
    with pytest.raises(ConfigError, match="--columns: no row has"):
        augment("in.csv", Path("x.jsonl"), Changes(swap=1), {"stars": "label", "review": "text", "starz": "weight"})
