"""`lmtune init`: three questions or flags give a config that fits, runs, and replaces nothing."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from lmtune.config.load import load_config
from lmtune.config.schema import FinetuneConfig
from lmtune.data.rendering import Renderer
from lmtune.errors import ConfigError, DataError, LmtuneError
from lmtune.proposal import KnownModel, Machine, known_model, propose, propose_quantization
from lmtune.recipes.init import main
from tests.tiny import save_tiny
from tests.tokenizers import CHATML, make_tokenizer

GIB = 2**30


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with forty rows, and nobody at the keyboard."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(40)]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    return tmp_path


class Keyboard(io.StringIO):
    """Lines that a user types."""

    def isatty(self) -> bool:
        return True


def test_flags_write_a_config_and_say_what_to_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(model="tiny", data=["my.jsonl"])
    config = load_config(FinetuneConfig, "my.yaml")
    assert (config.model.name, config.data.train, config.run.name) == ("tiny", "my.jsonl", "my")
    assert config.data.max_length == 64
    assert config.data.validation_fraction == 0.2
    assert config.evaluation.max_new_tokens == 32
    text = (folder / "my.yaml").read_text()
    assert "# rows to train on" in text
    assert "default 2048; the longest row has" in text
    assert "yaml-language-server" not in text
    printed = capsys.readouterr().out
    for step in ("check --config my.yaml", "preview --config my.yaml", "plan my.yaml", "finetune my.yaml"):
        assert f"lmtune {step}\n" in printed


def test_nothing_is_replaced(folder: Path) -> None:
    (folder / "my.yaml").write_text("mine")
    (folder / "lmtune.schema.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"my\.yaml is there already.*--output"):
        main(model="tiny", data=["my.jsonl"])
    assert (folder / "my.yaml").read_text() == "mine"
    main(model="tiny", data=["my.jsonl"], output=Path("other.yaml"))
    assert load_config(FinetuneConfig, "other.yaml").data.train == "my.jsonl"
    head = "# yaml-language-server: $schema=lmtune.schema.json\n"  # editors find what lies beside the file
    assert (folder / "other.yaml").read_text().startswith(head)


@pytest.mark.parametrize(
    ("flags", "error", "said"),
    [
        ({}, ConfigError, "--model and --data: missing"),
        ({"model": "tiny", "data": ["none.jsonl"]}, DataError, "none.jsonl: no such file"),
        ({"model": "./none", "data": ["my.jsonl"]}, LmtuneError, "./none"),
        ({"model": "a b/c", "data": ["my.jsonl"]}, LmtuneError, "a b/c"),
        ({"model": ".", "data": ["my.jsonl"]}, LmtuneError, "model.name: ."),
        ({"model": "tiny", "data": ["bad.jsonl"]}, DataError, "bad.jsonl:2:"),
        ({"model": "tiny", "data": ["my.jsonl"], "output": Path("no/a.yaml")}, ConfigError, "no is not a folder"),
    ],
)  # fmt: skip
def test_mistakes_are_named_and_write_nothing(
    folder: Path, flags: dict[str, object], error: type[LmtuneError], said: str
) -> None:
    (folder / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(error) as caught:
        main(**flags)  # type: ignore[arg-type]
    assert said in str(caught.value)
    assert not list(folder.glob("*.yaml"))


def test_questions_are_asked_again_until_the_answers_are_right(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Keyboard("./none\ntiny\nnone.jsonl\n\nnf5\nnf4\n"))
    main()
    config = load_config(FinetuneConfig, "my.yaml")
    assert (config.model.name, config.model.quantization, config.data.train) == ("tiny", "nf4", "my.jsonl")
    asked = capsys.readouterr().err
    assert asked.count("Model:") == 2
    assert "none.jsonl: no such file" in asked
    assert "nf5: expected none, nf4, int8" in asked


def test_a_model_folder_is_measured(folder: Path) -> None:
    save_tiny(folder / "model", chat_template=CHATML, max_position_embeddings=16)
    known = known_model("model")
    assert known.positions == 16
    assert known.parameters is not None
    assert 50_000 < known.parameters < 1_000_000
    values, reasons = propose("model", ["my.jsonl"], None, 40, Machine("cpu", 8 * GIB), known)
    assert values["data.max_length"] == 16
    assert "rows are longer" in reasons["data.max_length"]
    assert values["train.learning_rate"] > 2e-4


def test_a_model_that_is_not_here_keeps_the_defaults(folder: Path) -> None:
    known = known_model("someone/some-model")
    assert known == KnownModel()
    values, reasons = propose("someone/some-model", ["my.jsonl"], None, 40, Machine("cuda", 24 * GIB), known)
    assert "data.max_length" not in values
    assert "not on this machine yet" in reasons["data.max_length"]
    assert values["model.quantization"] == "nf4"


@pytest.mark.parametrize(
    ("parameters", "machine", "wanted"),
    [(7_000_000_000, Machine("cuda", 24 * GIB), "nf4"), (7_000_000_000, Machine("cuda", 80 * GIB), "none"),
     (135_000_000, Machine("cpu", 8 * GIB), "none"), (3_000_000_000, Machine("cpu", 16 * GIB), "nf4")],
)  # fmt: skip
def test_quantization_follows_from_size_and_memory(parameters: int, machine: Machine, wanted: str) -> None:
    chosen, why = propose_quantization(parameters, machine)
    assert chosen == wanted
    assert "GiB" in why


@pytest.mark.parametrize(("rows", "batch", "fraction"), [(5, 4, 0.0), (40, 4, 0.2), (200, 16, 0.15), (10**6, 32, 0.05)])
def test_batch_and_held_out_rows_follow_from_the_number_of_rows(rows: int, batch: int, fraction: float) -> None:
    values, _ = propose("x", ["my.jsonl"], "none", rows, Machine("cpu", 8 * GIB), KnownModel())
    assert (values["train.batch_size"], values["data.validation_fraction"]) == (batch, fraction)


def test_long_texts_are_split_and_long_answers_are_not(folder: Path) -> None:
    known = KnownModel(positions=64, renderer=Renderer(make_tokenizer(CHATML)))
    for row, wanted in (({"text": "word " * 300}, "split"), ({"prompt": "word " * 300, "completion": "c"}, None)):
        (folder / "long.jsonl").write_text(json.dumps(row))
        values, reasons = propose("tiny", ["long.jsonl"], "none", 1, Machine("cpu", GIB), known)
        assert values.get("data.too_long") == wanted
        assert ("data.too_long" in reasons) == (wanted is not None)
