"""A finished run made by hand in a second: a random adapter over a random base, with all files that a run writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from lmtune.config.load import build_config, dump_config
from lmtune.config.schema import FinetuneConfig
from lmtune.data.rendering import Renderer
from lmtune.inference.load import run_metadata
from lmtune.models.tuning.lora import save_adapter
from lmtune.runs.store import RunDirectory
from tests.tiny import adapted, tiny_model
from tests.tokenizers import CHATML, make_tokenizer

SUMMARY = {
    "format": 1, "name": "support", "status": "complete", "steps": 120, "tokens": 50_000, "tokens_per_second": 1234.5,
    "peak_memory_gib": 0.75, "train_seconds": 40.5,
    "base": {"loss": 3.5, "perplexity": 33.1, "token_accuracy": 0.25, "sequence_accuracy": 0.0, "exact_match": 0.025,
             "rows": 40, "exact_match_rows": 40},
    "tuned": {"loss": 0.02, "perplexity": 1.02, "token_accuracy": 0.995, "sequence_accuracy": 0.95,
              "exact_match": 0.925, "rows": 40, "exact_match_rows": 40},
}  # fmt: skip
DATA = {
    "template": "plain",
    "train": {
        "formats": {"private-customers.jsonl": "prompt"}, "files": ["private-customers.jsonl"],
        "sha256": ["0"], "rows": 483,
        "kept": 480, "tokens": 9000, "trained_tokens": 3000, "longest_row_tokens": 77,
        "dropped": {"too_long": {"count": 3, "first": ["private-customers.jsonl:7"]}},
        "truncated": {"count": 0, "first": []}, "duplicates": {"count": 0, "first": []}, "warnings": [],
    },
    "validation": {"held_out": 40},
}  # fmt: skip
METRICS = [
    {"step": step, "epoch": step / 40, "loss": 3.0 / step, "learning_rate": 2e-4, "grad_norm": 1.0, "tokens": 400,
     "trained_tokens": 100, "examples": 8, "seconds": 0.25}
    for step in range(1, 121)
]  # fmt: skip


def write_records(folder: Path, base: str = "lab/base") -> RunDirectory:
    """The run's text files, without an adapter."""
    tree = {
        "model": {"name": base, "quantization": "none"}, "data": {"train": "private-customers.jsonl"},
        "tuning": {"rank": 4, "alpha": 8}, "run": {"name": folder.name},
    }  # fmt: skip
    run = RunDirectory(folder)
    folder.mkdir(parents=True)
    run.config.write_text(dump_config(build_config(FinetuneConfig, tree, where="sample")))
    run.summary.write_text(json.dumps({**SUMMARY, "name": folder.name}))
    run.data.write_text(json.dumps(DATA))
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in METRICS))
    steps = [{"type": "step", "time": f"2026-01-31T12:00:00.{line['step']:03}+00:00", **line} for line in METRICS]
    run.events.write_text("".join(json.dumps(line) + "\n" for line in steps))
    run.results.write_text("step,elapsed_tokens,training_loss\n1,400,3\n120,48000,0.025\n")
    return run


def write_run(folder: Path, base: str = "lab/base") -> RunDirectory:
    """A run with an adapter over `write_base`'s model, and with files beside it that are nobody's business."""
    run = write_records(folder, base)
    tree = {"model": {"name": base, "quantization": "none"}, "data": {"train": "private-customers.jsonl"}}
    tokenizer = make_tokenizer(CHATML)
    model = adapted(base_model(), rank=4, alpha=8)
    run.adapter.mkdir()
    metadata = run_metadata(build_config(FinetuneConfig, tree, where="sample"), Renderer(tokenizer), "0" * 32)
    model.peft_config["default"].base_model_name_or_path = base
    save_adapter(model, run.adapter, replace(metadata, base_fingerprint=None))
    tokenizer.save_pretrained(run.adapter)
    model.get_base_model().generation_config.save_pretrained(run.adapter)
    (run.adapter / "README.md").write_text("An older card.")
    (run.adapter / "optimizer.safetensors").write_bytes(b"not for others")
    (run.adapter / "notes.txt").write_text("not for others either")
    return run


def base_model():
    """The base that `write_run` adapts."""
    return tiny_model("llama", vocab_size=len(make_tokenizer(CHATML)))


def write_base(folder: Path) -> None:
    """That base as a model folder."""
    base_model().save_pretrained(folder)
    make_tokenizer(CHATML).save_pretrained(folder)
