"""Five runs, bit for bit as before the house was rebuilt: the same commands with the code of `REFERENCE` and of today.

What the older code gives is kept in `.reference/` beside this repository's other caches, since it depends on the
machine. With two processes sums are taken in another order, so figures there are equal to 1e-6.
"""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.workplace import environment, make_workplace, tree_of, write_rows

pytestmark = pytest.mark.long  # ten runs, and the history of the repository
REFERENCE = "d4d29cf"
ROOT = Path(__file__).parents[1]
KEPT = ROOT / ".reference" / REFERENCE
TURNS = [
    {
        "messages": [
            {"role": "system", "content": "You count."},
            *(
                {"role": role, "content": f"{role} says {n * turn % 11}."}
                for turn in range(1, 4)
                for role in ("user", "assistant")
            ),
        ]
    }
    for n in range(12)
]
QUESTIONS = [{"prompt": f"What is number {n}?", "completion": f"It is {7 * n % 10}."} for n in range(20)]
TEXTS = [{"text": f"A text without any question, number {n}."} for n in range(4)]
CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "nf4": {"model__quantization": "nf4"},
    "int8": {"model__quantization": "int8"},
    "dropout": {"tuning__dropout": 0.3, "evaluation__every_steps": 3, "train__micro_batch_tokens": 96},
    "two": {"train__micro_batch_tokens": 96},
}


def run_with(code: Path, folder: Path, name: str) -> dict[str, Any]:
    """Run the case in `folder` with the package in `code`; what is to be equal."""
    make_workplace(folder)
    files = {"turns.jsonl": TURNS, "questions.jsonl": QUESTIONS, "texts.jsonl": TEXTS}
    for file, rows in files.items():
        write_rows(folder / file, rows)
    changes = {"data__train": list(files), "train__max_steps": 10, "train__batch_size": 6, **CASES[name]}
    (folder / "run.yaml").write_text(json.dumps(tree_of(**changes)))
    variables = environment(folder, PYTHONPATH=str(code))
    processes = ["--processes", "2"] if name == "two" else []
    command = [sys.executable, "-m", "lmtune", "finetune", "run.yaml", *processes]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run = folder / "runs" / "trial"
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    data, summary = json.loads((run / "data.json").read_text()), json.loads((run / "summary.json").read_text())
    return {
        "metrics": [{key: value for key, value in step.items() if key != "seconds"} for step in steps],
        "results": (run / "results.csv").read_text(),
        "tokens": [data["train"]["tokens"], data["train"]["trained_tokens"]],
        "hash": json.loads((run / "environment.json").read_text())["tokens_sha256"],
        "scores": [summary["base"], summary["tuned"]],
        "adapter": {key: value.tolist() for key, value in load_file(run / "adapter/adapter_model.safetensors").items()},
    }


def reference(folder: Path, name: str) -> dict[str, Any]:
    """What the case gives with the older code; run once on each machine."""
    kept = KEPT / f"{name}.json"
    if not kept.is_file():
        archive = subprocess.run(["git", "archive", REFERENCE, "lmtune", "recipes", "examples"], cwd=ROOT,
                                 capture_output=True, check=True).stdout  # fmt: skip
        code = folder / "code"
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(code, filter="data")
        os.rename(code / "recipes", code / "lmtune" / "recipes")
        os.rename(code / "examples", code / "lmtune" / "examples")
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(run_with(code, folder / "before", name)))
    tree: dict[str, Any] = json.loads(kept.read_text())
    return tree


def near(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two trees differ by more than 1e-6."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [found for key in one for found in near(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [found for n, pair in enumerate(zip(one, other, strict=True)) for found in near(*pair, f"{path}/{n}")]
    if isinstance(one, float) and isinstance(other, float) and math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-6):
        return []
    return [] if one == other else [f"{path}: {one} {other}"]


@pytest.mark.parametrize("name", list(CASES))
def test_a_run_is_as_before(tmp_path: Path, name: str) -> None:
    before = reference(tmp_path, name)
    after = json.loads(json.dumps(run_with(ROOT, tmp_path / "after", name)))
    if name == "two":
        before.pop("results"), after.pop("results")
        assert not near(before, after)
    else:
        for part in before:
            assert before[part] == after[part], part
