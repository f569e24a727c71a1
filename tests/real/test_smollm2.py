"""A real chat model of 135 million weights in a GGUF file: answers, preferences and classes, by the commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.real.folders import REAL

pytestmark = pytest.mark.real

ROWS = [
    {"prompt": f"Which shelf holds the {thing}?", "completion": f"The {thing} is on shelf {n}."}
    for n, thing in enumerate(("red lamp", "garden hose", "paint", "ladder", "old clock", "tea pot"), start=1)
]


def lmtune(folder: Path, *arguments: str, text: str | None = None) -> str:
    """The command's stdout; its stderr is checked to name no traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "lmtune", *arguments], cwd=folder, input=text, capture_output=True, text=True,
        check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    (folder / "stderr").write_text(done.stderr)
    return done.stdout


def test_finetune_chat_and_merge(tmp_path: Path) -> None:
    (tmp_path / "smollm2.gguf").symlink_to(REAL / "smollm2_gguf/model.gguf")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "run.yaml").write_text(
        "model: {name: smollm2.gguf, quantization: none}\n"
        "data: {train: rows.jsonl, validation: rows.jsonl, max_length: 256}\n"
        "adapter: {rank: 8, alpha: 16}\n"
        "train: {max_steps: 12, batch_size: 6, learning_rate: 2.0e-3}\n"
        "evaluation: {exact_match_rows: 6, max_new_tokens: 24}\nrun: {name: run}\n"
    )
    shown = lmtune(tmp_path, "preview", "--config", "run.yaml", "--rows", "1")
    assert "[<|im_end|>]" in shown
    lmtune(tmp_path, "finetune", "run.yaml")
    assert "You are a helpful AI assistant named SmolLM" in " ".join((tmp_path / "stderr").read_text().split())
    summary = json.loads((tmp_path / "runs/run/summary.json").read_text())
    assert summary["tuned"]["loss"] < summary["base"]["loss"] / 3
    questions = "".join(row["prompt"] + "\n" for row in ROWS)
    answers = lmtune(tmp_path, "chat", "runs/run", "--max-new-tokens", "24", text=questions).splitlines()
    assert len(answers) == len(ROWS)
    assert sum(answer == row["completion"] for answer, row in zip(answers, ROWS, strict=True)) >= 4, answers
    lmtune(tmp_path, "merge", "runs/run")
    merged = lmtune(tmp_path, "chat", "runs/run/merged", "--max-new-tokens", "24", text=questions).splitlines()
    assert sum(a == b for a, b in zip(answers, merged, strict=True)) >= 5, (answers, merged)


def workplace(folder: Path, rows: list[dict[str, str]], objective: str) -> None:
    """The model, `rows`, and a config that trains `objective` on them and scores it on the same."""
    (folder / "smollm2.gguf").symlink_to(REAL / "smollm2_gguf/model.gguf")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.yaml").write_text(
        "model: {name: smollm2.gguf, quantization: none}\n"
        f"objective: {{kind: {objective}}}\n"
        "data: {train: rows.jsonl, validation: rows.jsonl, max_length: 256}\n"
        "tuning: {kind: lora, rank: 8, alpha: 16}\n"
        "train: {max_steps: 8, batch_size: 6, learning_rate: 5.0e-4}\nrun: {name: run}\n"
    )


def test_preferences(tmp_path: Path) -> None:
    pairs = [{"prompt": row["prompt"], "chosen": "I do not know.", "rejected": row["completion"]} for row in ROWS]
    workplace(tmp_path, pairs, "dpo")
    lmtune(tmp_path, "finetune", "run.yaml")
    scored = json.loads(lmtune(tmp_path, "evaluate", "runs/run", "rows.jsonl", "--json"))
    assert scored["base"]["reward_margin"] == 0
    assert scored["tuned"]["reward_accuracy"] == 1
    assert scored["tuned"]["loss"] < scored["base"]["loss"] / 2
    assert "reference: computed 6 pairs" in (tmp_path / "stderr").read_text()


def test_classes(tmp_path: Path) -> None:
    texts = {
        "good": ("A warm and funny film.", "I loved every minute.", "Superb acting, a joy."),
        "bad": ("Dull, long and empty.", "I left before the end.", "A waste of a fine cast."),
    }
    rows = [{"text": text, "label": label} for label, group in texts.items() for text in group]
    workplace(tmp_path, rows, "classification")
    lmtune(tmp_path, "finetune", "run.yaml", "train.max_steps=12")
    lmtune(tmp_path, "merge", "runs/run", "--dtype", "float32")  # bf16 loses a part of so short a run's update
    lmtune(tmp_path, "predict", "runs/run", "rows.jsonl", "-o", "out.jsonl")
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in found] == [row["label"] for row in rows]
    from transformers import pipeline

    classify = pipeline("text-classification", str(tmp_path / "runs/run/merged"), device="cpu")
    for row in found:
        (best,) = classify([row["text"]])
        assert best["label"] == row["prediction"]
        assert best["score"] == pytest.approx(row["probability"], abs=1e-3)
