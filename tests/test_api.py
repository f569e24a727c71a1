"""lmtune from Python: rows in memory, one call, errors as `LmtuneError`, nothing printed but a bar."""

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest

import lmtune
from lmtune.data.in_memory import paths_or_rows, rows_file
from tests.chat_models import chat_model

pytestmark = pytest.mark.slow  # seconds together; left out of `make test-fast`

ROOT = Path(__file__).parents[1]
ROWS = [{"prompt": f"Which shelf holds item {i}?", "completion": f"Item {i} is on shelf {i % 7}."} for i in range(12)]
SETTINGS = {
    "model.quantization": "none", "train.max_steps": 2, "train.batch_size": 4, "data.max_length": 128,
    "evaluation.exact_match_rows": 1, "evaluation.max_new_tokens": 4,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LMTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_what_is_exported_is_there_and_importing_is_light() -> None:
    assert sorted(lmtune.__all__) == sorted(name for name in lmtune.__all__ if hasattr(lmtune, name))
    assert set(lmtune.__all__) <= set(dir(lmtune))
    code = "import sys, lmtune; print([name for name in ('torch', 'pydantic', 'rich') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'finetunee'"):
        lmtune.finetunee  # noqa: B018


def test_a_run_from_rows_in_memory(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = lmtune.finetune(model="tiny", data=ROWS, overrides=SETTINGS, progress=False)
    assert capfd.readouterr() == ("", "")
    assert run.status == "complete"
    assert [record.step for record in run.metrics] == [1, 2]
    assert run.scores.base is not None
    assert run.scores.tuned is not None
    assert run.scores.tuned.rows == 1
    assert len(run.predictions) == 1
    assert (run.adapter / "adapter_model.safetensors").is_file()
    assert run.config.model.name == "tiny"
    # equal rows are the same run, however they are held
    again = lmtune.finetune(model="tiny", data=pd.DataFrame(ROWS), overrides=[f"{k}={v}" for k, v in SETTINGS.items()])
    assert again == run
    model = run.load()
    answer = model.chat(ROWS[0]["prompt"], max_new_tokens=4)
    assert answer == lmtune.chat(model, ROWS[0]["prompt"], max_new_tokens=4)
    assert isinstance(model.chat("And item 2?", history=[{"role": "user", "content": "Hello"}, {
        "role": "assistant", "content": "Good day."}], base=True, max_new_tokens=2), str)  # fmt: skip
    evaluation = lmtune.evaluate(model, datasets.Dataset.from_list(ROWS[:3]), exact_match_rows=2, max_new_tokens=4)
    assert evaluation.tuned.rows == 3
    assert evaluation.base is not None
    assert len(evaluation.answers) == 2
    capfd.readouterr()
    merged = run.merge()
    assert merged == run.path / "merged"
    assert run.merge(folder / "plain", into="original") == folder / "plain"
    assert lmtune.chat(merged, ROWS[0]["prompt"], max_new_tokens=4) == answer
    assert capfd.readouterr() == ("", "")
    with pytest.raises(lmtune.ConfigError, match="was not made by lmtune merge"):
        run.merge(run.adapter)


def test_progress_is_one_plain_bar(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lmtune.finetune(model="tiny", data=ROWS, overrides={**SETTINGS, "evaluation.exact_match_rows": 0})
    out, err = capfd.readouterr()
    assert out == ""
    assert {line.partition(":")[0] for line in err.replace("\r", "\n").splitlines() if line.strip()} == {"training"}
    assert "2/2" in err


def test_a_config_file_with_other_data(folder: Path) -> None:
    (folder / "mine.yaml").write_text("model: {name: tiny, quantization: none}\ndata: {train: nowhere.jsonl}\n")
    with pytest.raises(lmtune.DataError, match=r"nowhere\.jsonl: no such file"):
        lmtune.finetune("mine.yaml")
    run = lmtune.finetune("mine.yaml", data=ROWS, overrides={**SETTINGS, "evaluation.exact_match_rows": 0})
    assert run.path.name == "mine"
    loaded = lmtune.load_config("mine.yaml", {"train.epochs": 1})
    assert loaded.train.epochs == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([*ROWS, {"prompt": "lonely"}], r"data:13: completion missing"), ([], r"data: no rows"),
        ({"train": ROWS}, r"data: a mapping with the keys train.*data\['train'\]"),
        ([1], r"data\[0\]: int; expected a dict"), (7, r"data: int; expected a path"),
        ([{"prompt": "a", "completion": b"x"}], r"data\[0\]\.completion: a value of type bytes"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_rows_is_said_by_row(folder: Path, data: Any, message: str) -> None:
    with pytest.raises(lmtune.DataError, match=message):
        lmtune.finetune(model="tiny", data=data, overrides=SETTINGS)
    assert not [path for path in (folder / "runs").glob("*") if path.name != ".rows"]


def test_other_wrong_arguments_are_said(folder: Path) -> None:
    with pytest.raises(lmtune.ConfigError, match=r"train\.epochs: got -1"):
        lmtune.finetune(model="tiny", data=ROWS, overrides={"train.epochs": -1})
    with pytest.raises(lmtune.ConfigError, match="data missing"):
        lmtune.finetune(model="tiny")
    with pytest.raises(lmtune.ConfigError, match=r"history\[0\]: expected a dict of role"):
        lmtune.Model(chat_model()).chat("q", history=[{"from": "human", "value": "x"}])


def test_a_table_gives_rows_without_what_it_lacks(tmp_path: Path) -> None:
    table = pd.DataFrame([
        {"prompt": "a", "completion": "b", "input": None, "asked": pd.Timestamp("2026-01-02")},
        {"text": "c", "scores": np.arange(2)},
    ])  # fmt: skip
    rows = paths_or_rows(table)
    assert not isinstance(rows, tuple)
    lines = rows_file(rows, tmp_path).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"prompt": "a", "completion": "b", "asked": "2026-01-02 00:00:00"}, {"text": "c", "scores": [0, 1]},
    ]  # fmt: skip
    assert paths_or_rows([Path("a.jsonl"), "b.jsonl"]) == ("a.jsonl", "b.jsonl")


def test_warnings_are_pythons(folder: Path) -> None:
    long = [*ROWS, {"prompt": "word " * 1500, "completion": "b"}]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lmtune.evaluate("tiny", long, exact_match_rows=0, max_length=8192)
    assert any("was made for at most" in str(warning.message) for warning in caught)


@pytest.mark.slow
def test_the_notebook_runs(folder: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(ROOT / "examples" / "finetune.ipynb", as_version=4)
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = [output for output in outputs if output.output_type == "stream"]
    on_stderr = "".join(output.text for output in printed if output.name == "stderr").replace("\r", "\n")
    assert {line.partition(":")[0] for line in on_stderr.splitlines() if line.strip()} == {"training"}
    assert "data:41: completion missing" in "".join(output.text for output in printed if output.name == "stdout")


@pytest.mark.parametrize("kind", [None, "numpy", "pandas", "arrow"])
def test_a_dataset_gives_its_rows_in_any_format(kind: str | None) -> None:
    dataset = datasets.Dataset.from_list([{**row, "score": 0.1} for row in ROWS])
    columns = list(ROWS[0])
    assert paths_or_rows(dataset.with_format(kind, columns=columns)) == ROWS
    assert paths_or_rows(dataset.select_columns(columns).to_iterable_dataset().with_format(kind)) == ROWS


def test_a_run_may_begin_from_a_run(folder: Path) -> None:
    first = lmtune.finetune(model="tiny", data=ROWS, overrides=SETTINGS, progress=False, name="first")
    more = {**SETTINGS, "tuning.adapter": first}
    second = lmtune.finetune(model="tiny", data=ROWS, overrides=more, progress=False, name="second")
    assert second.status == "complete"
