"""Where the time of lmtune's training step goes: products, attention and the rest, from PyTorch's profiler.

python -m benchmarks.profile_step
python -m benchmarks.profile_step --device cuda --shape 1b --quantization nf4
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.compare import flop_per_token, machine, matmul_ceiling, write_base
from benchmarks.measure import load_average
from benchmarks.workload import SHAPES, Workload

WARM_UP, MEASURED, SHOWN = 2, 3, 12  # steps, steps, operations
# what an operation's or kernel's name says of it; the first that fits
PARTS = {"attention": ("attention", "flash", "fmha"), "products": ("mm", "gemm", "cutlass", "nvjet")}


def main() -> None:
    """Profile some steps, print the shares and the dearest operations, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="30m")
    parser.add_argument("--quantization", choices=("none", "nf4", "int8"), default="none")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    work = Workload(options.shape, options.quantization, batch_size=options.batch_size)
    report = {
        "machine": machine(options.device), "load_average_before": load_average(), **profile(work, options.device)
    }  # fmt: skip
    print(", ".join(f"{part} {share:.1%}" for part, share in report["shares"].items()))
    print(f"of all: {report['tokens_per_second']:.0f} tok/s, MFU {report['mfu']:.2f} while profiled")
    for name, share, calls in report["operations"]:
        print(f"{share:7.1%} {calls:6} x {name}")
    if options.output:
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def profile(work: Workload, device: str) -> dict[str, Any]:
    """Shares of the device's busy time in some steps, by part and by operation."""
    import torch
    from torch.profiler import ProfilerActivity

    from benchmarks.arms import Lmtune

    with tempfile.TemporaryDirectory() as name:
        write_base(work, Path(name))
        arm = Lmtune(work, Path(name), device)
    for step in range(WARM_UP):
        arm.step(work.rows(step))
        arm.update()
    steps = [work.rows(WARM_UP + step) for step in range(MEASURED)]
    dtype, on_gpu = str(arm.model.get_base_model().dtype).removeprefix("torch."), device == "cuda"
    ceiling = matmul_ceiling(device, dtype)
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        began = time.perf_counter()
        for rows in steps:
            arm.step(rows)
            arm.update()
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    busy = {
        event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count)
        for event in profiler.key_averages()
    }
    total = sum(time for time, _ in busy.values())
    shares = dict.fromkeys([*PARTS, "the rest"], 0.0)
    for key, (used, _) in busy.items():
        shares[part_of(key)] += used / total
    rate = sum(len(row.sequences[0].input_ids) for rows in steps for row in rows) / seconds
    dearest = sorted(busy.items(), key=lambda item: -item[1][0])[:SHOWN]
    return {
        "shares": {part: round(share, 4) for part, share in shares.items()},
        "tokens_per_second": round(rate, 1),
        "mfu": round(rate * flop_per_token(work, range(WARM_UP, WARM_UP + MEASURED)) / ceiling, 3),
        "operations": [(key, round(used / total, 4), count) for key, (used, count) in dearest],
    }


def part_of(operation: str) -> str:
    """Whether an operation is a matrix product, attention or neither."""
    return next((part for part, words in PARTS.items() if any(word in operation for word in words)), "the rest")


if __name__ == "__main__":
    main()
