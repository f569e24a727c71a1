"""Data sets on a Hub of our own: the rows as they are written, the split and commit that are asked for, offline too."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.hub_server import HubServer

pytestmark = pytest.mark.slow  # the library is imported in processes of their own

CODE = """
import json, sys
from lmtune.data.readers import content_hash, read_rows
from lmtune.data.sources import find_files
from lmtune.config.schema import DataSource
from lmtune.errors import DataError
for path, split in json.loads(sys.argv[1]):
    try:
        (file,) = find_files([DataSource(path=path, split=split)])
        said = []
        rows = [(file.place(number), row) for number, _, row in read_rows(file, said)]
        print(json.dumps({"rows": rows, "said": said, "hash": content_hash(file)}))
    except DataError as error:
        print(json.dumps({"error": str(error)}))
"""


def read(environment: dict[str, str], *sources: tuple[str, str | None]) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(sources)], env={**os.environ, **environment}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def jsonl(*rows: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def test_rows_of_a_data_set_are_those_of_its_files(tmp_path: Path) -> None:
    dates = [{"prompt": f"when {n}", "completion": f"2026-03-0{n}"} for n in range(1, 4)]
    table = io.BytesIO()
    pq.write_table(pa.table({"text": ["a"], "label": [1], "id": ["007"]}), table)
    card = b"---\nconfigs:\n- config_name: a\n  data_files: a.csv\n- config_name: b\n  data_files: b.parquet\n---\n"
    with HubServer() as hub:
        repository = hub.add("me/dates", {"train.jsonl": jsonl(*dates[:2]), "test.jsonl": jsonl(dates[2])})
        first = repository.branches["main"]
        repository.commit("main", {"train.jsonl": jsonl(*dates)})
        hub.add("me/two", {"README.md": card, "a.csv": b"prompt,completion\nq,007\n", "b.parquet": table.getvalue()})
        home = {**hub.environment, "HF_HOME": str(tmp_path / "home"), "LMTUNE_CACHE": str(tmp_path / "cache")}
        newest, pinned, test, csv, parquet, *wrong = read(
            home, ("hub:me/dates", None), (f"hub:me/dates@{first}", None), (f"hub:me/dates@{first}", "test"),
            ("hub:me/two:a", None), ("hub:me/two:b", None),
            ("hub:me/dates", "tset"), ("hub:me/two", None), ("hub:me/none", None), ("hub:me/dates@v9", None),
        )  # fmt: skip
        offline = read({**home, "HF_HUB_OFFLINE": "1"}, ("hub:me/dates", None), ("hub:me/two:b", None))
    assert newest["rows"] == [[f"hub:me/dates/train:row {n}", row] for n, row in enumerate(dates, 1)]
    assert (len(pinned["rows"]), pinned["said"]) == (2, [f"commit {first[:12]}"])
    assert test["rows"] == [["hub:me/dates/test:row 1", dates[2]]]
    assert csv["rows"] == [["hub:me/two:a/train:row 1", {"prompt": "q", "completion": "007"}]]
    assert parquet["rows"] == [["hub:me/two:b/train:row 1", {"text": "a", "label": 1, "id": "007"}]]
    assert len({one["hash"] for one in (newest, pinned, test, csv, parquet)}) == 5
    assert [one["rows"] for one in offline] == [newest["rows"], parquet["rows"]]
    assert [one["hash"] for one in offline] == [newest["hash"], parquet["hash"]]
    expected = ("no split tset; it has train", "configurations (a, b); name one", "doesn't exist", "Revision 'v9'")
    for one, words in zip(wrong, expected, strict=True):
        assert words in one["error"]
