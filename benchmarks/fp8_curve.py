"""The loss of training over an fp8 base beside that over the same base in bf16: how inexact is it?

    python -m benchmarks.fp8_curve --steps 60

The embedded model learns the example file twice from the same adapter, in the same order of rows. Runs on a CPU too,
where fp8 products are emulated: the numbers are those of the format, the speed is not.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import torch

from lmtune.batching.packing import pack_sequences
from lmtune.batching.plan import Plan
from lmtune.config.schema import AdapterConfig, DataConfig, ModelConfig, TrainConfig
from lmtune.data.store import TokenizedData, tokenize
from lmtune.forward.packed import PackedForward
from lmtune.inference.load import build_renderer
from lmtune.kernels.lora_linear import fuse
from lmtune.models.base import load_model, load_tokenizer
from lmtune.models.tuning.lora import attach_adapter, trainable
from lmtune.training.step import step_gradients

DATA = Path(__file__).parents[1] / "examples" / "support.jsonl"


def main() -> None:
    """Train both, and print their losses side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    model = ModelConfig(name="tiny", quantization="none", dtype="bfloat16")
    rows = tokenize([DATA], build_renderer(load_tokenizer(model), model, {}), DataConfig(train=str(DATA)))
    losses = {name: curve(model, rows, options.steps, fp8=name == "fp8") for name in ("bf16", "fp8")}
    for step in [0, *range(9, options.steps, 10)]:
        print(f"step {step + 1:4}  bf16 {losses['bf16'][step]:.4f}  fp8 {losses['fp8'][step]:.4f}")
    apart = max(abs(one - other) for one, other in zip(losses["bf16"], losses["fp8"], strict=True))
    print(f"at most {apart:.4f} apart")
    if options.output:
        options.output.write_text(json.dumps(losses, indent=2) + "\n", encoding="utf-8")


def curve(config: ModelConfig, rows: TokenizedData, steps: int, fp8: bool) -> list[float]:
    """The loss of each step."""
    model = attach_adapter(load_model(config), AdapterConfig(rank=16, alpha=32), 0, "tiny")
    fuse(model, fp8=fp8)
    forward, parameters = PackedForward(model), trainable(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=2e-3, weight_decay=0.0)
    plan = Plan(rows.sequences, TrainConfig(max_steps=steps, batch_size=32), 1, 4096)
    one, losses = SimpleNamespace(num_processes=1), []
    for step in range(1, steps + 1):
        todo = plan.step(step)
        num_rows = len(todo.rows)
        batches = [
            pack_sequences([rows[u.row].documents[u.document] for u in group], [u.example for u in group], num_rows)
            for group in todo.shares[0]
        ]
        losses.append(step_gradients(forward, parameters, batches, todo.num_trained, num_rows, one).loss)
        optimizer.step()
    return losses


if __name__ == "__main__":
    main()
