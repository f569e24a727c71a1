"""What each technique gives: lmtune's step with all of them, and with one left out at a time, in one run.

python -m benchmarks.ablation
python -m benchmarks.ablation --groups prefix --repeats 7 --output ablation.json

Without attention by document the last layer runs everywhere too; without checkpointing by need each layer is computed
twice. What balances processes is in benchmarks.scaling, what a start saves in benchmarks.first_step.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.compare import compare, fast_dtypes, print_table
from benchmarks.workload import SHAPES, Workload

# name: (changes of the workload, arms beside lmtune)
GROUPS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "plain": (
        {},
        ("without-packing", "without-attention-by-document", "without-label-cross-entropy", "without-last-layer",
         "without-fused-LoRA", "without-checkpointing-by-need", "without-fused-optimizer"),
    ),
    "nf4": ({"quantization": "nf4"}, ("without-kept-dense-weights", "without-fused-LoRA")),
    "prefix": ({"shared_prefix": 256, "own_tokens": 64, "batch_size": 50}, ("without-shared-prefix",)),
    "budget": ({}, ("micro-batch-512", "micro-batch-1024", "micro-batch-2048", "micro-batch-8192")),
}  # fmt: skip


def main() -> None:
    """Measure the groups asked for, one table each, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="30m")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    reports = {}
    for name in options.groups:
        changes, others = GROUPS[name]
        work = replace(Workload(options.shape, batch_size=options.batch_size), **changes)
        arms = ["lmtune", *(f"lmtune-{other}" for other in others)]
        reports[name] = compare(work, options.device, arms, options.repeats, fast_dtypes(options.device, work)[-1:])
        print(f"\n{name}: {changes or 'the workload of benchmarks.compare'}")
        print_table(reports[name])
    if options.output:
        options.output.write_text(json.dumps(reports, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
