"""Rows to be scored or answered are read with the columns that the run was trained with, or with those named."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

import lmtune
from lmtune.config.load import dump_config, load_config
from lmtune.config.schema import FinetuneConfig
from lmtune.errors import DataError
from lmtune.recipes import compare, evaluate, predict
from lmtune.runs.columns import columns_for, run_of
from tests.sample_run import write_base, write_records, write_run

COLUMNS = {"Frage": "prompt", "Antwort": "completion"}


def with_columns(folder: Path, columns: Mapping[str, str] | None = None) -> str:
    """The run in `folder`, as if it were trained with `data.columns`."""
    config = load_config(FinetuneConfig, folder / "config.yaml")
    columns = dict(COLUMNS if columns is None else columns)
    (folder / "config.yaml").write_text(dump_config(replace(config, data=replace(config.data, columns=columns))))
    return str(folder)


@pytest.mark.parametrize(
    ("header", "named", "expected"),
    [
        ("Frage,Antwort", {}, COLUMNS),
        ("prompt,completion", {}, None),
        ("Frage", {}, {"Frage": "prompt"}),
        ("q,a", {"q": "prompt", "a": "completion"}, {"q": "prompt", "a": "completion"}),
    ],
)
def test_the_columns_of_training_that_a_file_has(
    tmp_path: Path, header: str, named: Mapping[str, str], expected: Mapping[str, str] | None
) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text(f"{header}\n{','.join('x' for _ in header.split(','))}\n")
    write_records(tmp_path / "support")
    (tmp_path / "support/adapter").mkdir()
    target = with_columns(tmp_path / "support")
    for name in (target, f"{target}/adapter"):
        assert columns_for(run_of(name), [rows], named) == expected
    assert columns_for(run_of("tiny"), [rows], named) == (named or None)


@pytest.mark.slow
def test_every_verb_that_reads_rows_for_a_run_takes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_base(base := tmp_path / "base")
    write_run(tmp_path / "support", str(base))
    run, rows = with_columns(tmp_path / "support"), tmp_path / "held.csv"
    rows.write_text("Frage;Antwort\n" + "".join(f"Say {n};{n}\n" for n in range(3)))
    asked = {"exact_match_rows": 1, "max_new_tokens": 4, "max_length": 256}
    evaluate.main(run, [rows], as_json=True, **asked)
    assert json.loads(capsys.readouterr().out)["tuned"]["rows"] == 3
    compare.main(str(base), run, [rows], ["exact"], rows=1, max_new_tokens=4, max_length=256, as_json=True)
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 3
    predict.main(run, [rows], tmp_path / "out.jsonl", 256, 4)
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 3
    with pytest.raises(DataError, match="make no row"):
        evaluate.main(str(base), [rows], as_json=True, **asked)
    evaluate.main(str(base), [rows], as_json=True, columns=["Frage=prompt", "Antwort=completion"], **asked)
    assert json.loads(capsys.readouterr().out)["tuned"]["rows"] == 3
    assert lmtune.evaluate(run, rows, exact_match_rows=0).tuned.rows == 3
    assert len(lmtune.predict(str(base), [{"F": "a"}], columns={"F": "prompt"}, max_new_tokens=2)) == 1
