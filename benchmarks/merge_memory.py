"""How much memory a merge takes beyond the base: a model of tiny width and a large vocabulary, long held-out rows.

    python -m benchmarks.merge_memory --rows 16 --tokens 2048 --vocabulary 150000 --output results.json

The model is made here and needs no network. The merge runs in a process of its own; counted is the most memory that it
held at once (resident, files mapped into memory included), less what it held when its libraries were loaded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch


def main() -> None:
    """Make a run, merge it in a new process, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=150_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--quantization", choices=("none", "nf4", "int8"), default="none")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--merge", type=Path, help=argparse.SUPPRESS)  # what the process of its own does
    options = parser.parse_args()
    if options.merge:
        print(json.dumps(merge_here(options.merge)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_run(folder, options)
        result = measured(folder, options)
    print(json.dumps(result, indent=2))
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def make_run(folder: Path, options: Any) -> None:
    """A base, and a run with a random adapter over it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from lmtune.config.load import build_config, dump_config
    from lmtune.config.schema import FinetuneConfig, LoraConfig
    from lmtune.data.rendering import Renderer
    from lmtune.demo import tiny_path
    from lmtune.inference.load import run_metadata
    from lmtune.models.base import base_fingerprint, load_tokenizer
    from lmtune.models.tuning.lora import attach_adapter, save_adapter
    from lmtune.runs.store import RunDirectory

    base, width = folder / "base", options.width
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=options.vocabulary, hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=options.layers, num_attention_heads=max(1, width // 64), num_key_value_heads=1, head_dim=64,
        max_position_embeddings=max(2048, options.tokens), tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(shape).to(getattr(torch, options.dtype))
    model.save_pretrained(base)
    for file in tiny_path().iterdir():
        if "token" in file.name or file.name == "chat_template.jinja":
            (base / file.name).write_bytes(file.read_bytes())
    tree = {
        "model": {"name": str(base), "quantization": options.quantization}, "data": {"train": "rows.jsonl"},
        "run": {"name": "trial"},
    }  # fmt: skip
    config = build_config(FinetuneConfig, tree, "benchmark")
    run = RunDirectory(folder / "run")
    run.adapter.mkdir(parents=True)
    run.config.write_text(dump_config(config), encoding="utf-8")
    adapted = attach_adapter(model.float(), LoraConfig(rank=4, alpha=8), 0, "./base")
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    tokenizer = load_tokenizer(config.model)
    save_adapter(adapted, run.adapter, run_metadata(config, Renderer(tokenizer), base_fingerprint(config.model)))
    tokenizer.save_pretrained(run.adapter)
    (run.adapter / "generation_config.json").write_text('{"eos_token_id": [2, 0], "pad_token_id": 1}', encoding="utf-8")
    rows = torch.randint(3, 2000, (options.rows, options.tokens)).tolist()
    run.verification.write_text(json.dumps({"sequences": rows}), encoding="utf-8")
    run.summary.write_text('{"status": "complete"}', encoding="utf-8")


def merge_here(folder: Path) -> dict[str, int]:
    """Merge in this process; the memory that it had before, and the most that it had."""
    import peft  # noqa: F401 - what a merge imports is no memory of the merge
    import psutil
    import transformers  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401

    from benchmarks.measure import peak_resident_gib
    from lmtune.export.merged import merge_run
    from lmtune.runs.store import RunDirectory

    before = psutil.Process().memory_info().rss
    merge_run(RunDirectory(folder / "run"), folder / "merged", "trained")
    return {"before": before, "most": int(peak_resident_gib() * 2**30)}


def measured(folder: Path, options: Any) -> dict[str, Any]:
    """What the merge took, beside what it has to hold."""
    arguments = ["-m", "benchmarks.merge_memory", "--merge", str(folder)]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(
            done.stderr or f"the merge ended with {done.returncode}, as one does that the system had no memory for"
        )
    memory = json.loads(done.stdout.splitlines()[-1])
    gib = 2.0**30
    return {
        "rows": options.rows, "tokens": options.tokens, "vocabulary": options.vocabulary, "width": options.width,
        "layers": options.layers, "dtype": options.dtype, "quantization": options.quantization,
        "base_gib": round(sum(f.stat().st_size for f in (folder / "base").glob("*.safetensors")) / gib, 3),
        "logits_of_one_row_gib": round(options.tokens * options.vocabulary * 4 / gib, 3),
        "peak_gib": round((memory["most"] - memory["before"]) / gib, 3),
    }  # fmt: skip


if __name__ == "__main__":
    main()
