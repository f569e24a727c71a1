"""Memory and speed of a run whose layers are streamed (`model.offload: layers`), beside one that holds the base whole.

    python -m benchmarks.streaming --output results.json         # a random model of 120 million weights, made here
    python -m benchmarks.streaming --model model.gguf --dtype float32

Each run is a process of its own. Counted is the most memory that it held at once, from loading the base to the last
step: of a GPU's allocator where there is one; else resident, files mapped into memory included, less what the process
held when its libraries were loaded. Beside it stands
what `lmtune plan` expects. Losses and adapters of all runs of one quantization must be equal bit for bit.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import peak_resident_gib

_GIB = 2.0**30


def main() -> None:
    """Run each arm in a process of its own, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a base; by default a random one")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quantization", nargs="+", default=["none", "nf4"])
    parser.add_argument(
        "--resident", type=int, nargs="+", default=[0, 2, 4], help="layers in memory; 0: all, unstreamed"
    )
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--micro-batch", type=int, default=256, help="tokens")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing in all layers")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--arm", help=argparse.SUPPRESS)  # what a process of its own does
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(measure(json.loads(options.arm))))
        return
    found = []
    with tempfile.TemporaryDirectory() as name:
        model = options.model or make_base(Path(name) / "base")
        for quantization in options.quantization:
            for resident in options.resident:
                arm = {
                    "model": str(model), "dtype": options.dtype, "quantization": quantization, "resident": resident,
                    "steps": options.steps, "micro_batch": options.micro_batch, "folder": name,
                    "checkpointing": options.checkpointing,
                }  # fmt: skip
                in_process([json.dumps({**arm, "steps": 1})])  # fills the cache
                found.append({"quantization": quantization, "resident": resident, **in_process([json.dumps(arm)])})
    print(
        "| base | layers in memory | peak, GiB | planned, GiB | off by | seconds a step | equal |\n"
        "|---|---|---|---|---|---|---|"
    )
    for one in found:
        whole = next(other for other in found if other["quantization"] == one["quantization"])
        print(
            f"| {one['quantization']} | {one['resident'] or 'all'} | {one['peak_gib']:.3f} | "
            f"{one['planned_gib']:.3f} | {one['planned_gib'] / one['peak_gib'] - 1:+.0%} | {one['step_seconds']:.2f} | "
            f"{'yes' if one['sha256'] == whole['sha256'] else 'NO'} |"
        )
    if options.output:
        options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def in_process(arguments: list[str]) -> dict[str, Any]:
    """What one arm measured."""
    command = [sys.executable, "-m", "benchmarks.streaming", "--arm", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def make_base(folder: Path, layers: int = 12, width: int = 768) -> Path:
    """A random Llama with the tokenizer of the embedded model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lmtune.demo import tiny_path

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=8192, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, head_dim=64, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(folder)
    for file in tiny_path().iterdir():
        if "token" in file.name or file.name == "chat_template.jinja":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def measure(arm: dict[str, Any], parallel: Any = None) -> dict[str, Any]:
    """Load, train and measure in this process, which is one of `parallel`."""
    import psutil
    import torch

    from lmtune.models.device import return_freed_memory
    from lmtune.training.run import estimated_memory

    trained({**arm, "model": "tiny", "steps": 1}, parallel)  # libraries and the first products are no memory of the run
    gc.collect()
    return_freed_memory()
    before = 0 if _on_gpu(parallel) else psutil.Process().memory_info().rss
    if _on_gpu(parallel):
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is counted from here
    parts, state, seen = trained(arm, parallel)
    digest = hashlib.sha256(json.dumps(seen.losses).encode())
    for parameter in parts.model.trainable().values():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    if "weights" in arm:
        torch.save([parameter.detach().cpu() for parameter in parts.model.trainable().values()], arm["weights"])
    planned = estimated_memory(parts, state.micro_batch_tokens)
    return {
        "load_gib": seen.loaded_gib - before / _GIB, "peak_gib": _peak_gib(parallel) - before / _GIB,
        "planned_gib": planned["memory_gib"], "base_gib": planned["base_weights_gib"],
        "step_seconds": statistics.median(seen.seconds), "loss": seen.losses[-1], "sha256": digest.hexdigest(),
    }  # fmt: skip


def trained(arm: dict[str, Any], parallel: Any = None) -> tuple[Any, Any, Any]:
    """A run's parts, its state at the end, and what was seen of its steps."""
    from lmtune.config.load import build_config
    from lmtune.config.schema import FinetuneConfig
    from lmtune.parallel.single import Single
    from lmtune.training.compose import compose
    from lmtune.training.loop import train

    objective = arm.get("objective", "sft")
    tree = {
        "model": {
            "name": arm["model"], "quantization": arm["quantization"], "dtype": arm["dtype"],
            "offload": "layers" if arm["resident"] else "none", "resident_layers": arm["resident"] or 2,
        },
        "data": {"train": str(rows_for(objective, Path(arm["folder"])))},
        "objective": {"kind": objective},
        "tuning": {"use_dora": arm.get("dora", False)},
        "train": {
            "max_steps": arm["steps"],
            "batch_size": 8, "micro_batch_tokens": arm["micro_batch"],
            "gradient_checkpointing": arm["checkpointing"],
        },
        "run": {"dir": arm["folder"], "name": "trial"},
    }  # fmt: skip
    parts, seen = compose(build_config(FinetuneConfig, tree, "benchmark"), parallel or Single()), _Seen(parallel)
    job, state = parts.job()
    train(job, [seen], state)
    return parts, state, seen


def _on_gpu(parallel: Any) -> bool:
    from lmtune.models.device import default_device

    return bool((default_device() if parallel is None else parallel.device).type == "cuda")


def _peak_gib(parallel: Any) -> float:
    import torch

    return torch.cuda.max_memory_allocated() / _GIB if _on_gpu(parallel) else peak_resident_gib()


def rows_for(objective: str, folder: Path) -> Path:
    """The example's rows, as they are or changed into those of another objective."""
    source = Path("examples/support.jsonl")
    if objective == "sft":
        return source
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    if objective == "dpo":
        others = [row["completion"] for row in rows]
        made = [
            {"prompt": row["prompt"], "chosen": row["completion"], "rejected": other}
            for row, other in zip(rows, others[1:] + others[:1], strict=True)
            if row["completion"] != other
        ]
    else:
        made = [{"text": row["prompt"], "label": "long" if len(row["completion"]) > 40 else "short"} for row in rows]
    path = folder / f"{objective}.{os.getpid()}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return path


class _Seen:
    """Losses and seconds of the steps, and the peak of memory before them."""

    def __init__(self, parallel: Any) -> None:
        self.loaded_gib = _peak_gib(parallel)
        self.losses, self.seconds = list[float](), list[float]()

    def after_step(self, event: Any) -> None:
        """Note one."""
        self.losses.append(event.result.loss)
        self.seconds.append(event.seconds)

    def on_failure(self, state: Any) -> None:
        """Nothing to do."""


if __name__ == "__main__":
    main()
