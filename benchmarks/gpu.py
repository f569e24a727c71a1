"""Speed and memory on one GPU, beside others, in at most nine minutes.

    make bench-gpu                                                   # the exactness tests on the GPU, then this
    python -m benchmarks.gpu --device cpu --cases 1m:none 1m:nf4     # the same on a CPU, to try it

Each case is a model of random weights in the shape of a real one, in bf16 on a GPU, made on the device, with steps of
rows that are trained whole. Arms run one after the other, each in a process of its own, so that a large model is there
once. The others use PyTorch's attention for sequences of any length too. What the time does not suffice for is named.
MFU counts 4 operations a token for each parameter, as others publish it: of the measured rate of a large product.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.compare import machine, matmul_ceiling
from benchmarks.measure import ArmProcess
from benchmarks.workload import Workload

CASES = ("0.6b:none", "8b:none", "8b:nf4", "0.6b:nf4")
ARMS = ("lmtune-auto", "lmtune", "trl-varlen", "plain-packed", "lmtune-unfused")
LIGER = ("trl-liger", "plain-liger")  # where Liger is installed
BUDGET = 4096  # tokens of a micro-batch
ROWS = 96  # of a step: about 17,000 tokens
TRL_ROWS = 24  # of a forward pass, about BUDGET tokens
PEAKS = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12}  # dense bf16 operations a second, by NVIDIA's data sheets


def main() -> None:
    """Measure the cases in turn, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="SHAPE:QUANTIZATION")
    parser.add_argument("--arms", nargs="+", default=None, choices=(*ARMS, *LIGER))
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--micro-batch-tokens", type=int, default=BUDGET, help="of lmtune, but for lmtune-auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    dtype = "bfloat16" if options.device == "cuda" else "float32"
    arms = options.arms or [*ARMS, *(LIGER if importlib.util.find_spec("liger_kernel") else ())]
    ends, results = time.monotonic() + 60 * options.minutes, []
    measured, gpu = matmul_ceiling(options.device, dtype), machine(options.device)["gpu"] or "CPU"
    ceiling = next((peak for name, peak in PEAKS.items() if name in gpu), measured)
    print(f"{gpu}, {dtype}: {measured / 1e12:.1f} TFLOP/s measured, MFU of {ceiling / 1e12:.1f}")
    for case in options.cases:
        shape, _, quantization = case.partition(":")
        work = Workload(shape, quantization or "none", label_fraction=1.0, batch_size=options.rows)
        for arm in arms:
            if time.monotonic() > ends:
                results.append({"case": case, "arm": arm, "error": "left out: no time"})
            else:
                found = measure(arm, work, options.device, dtype, options.repeats, ceiling, options.micro_batch_tokens)
                results.append({"case": case, **found})
            print(line_of(results[-1]), flush=True)
            if options.output:  # after each arm: a card that is lent may be gone before the last
                report = {
                    "machine": machine(options.device),
                    "dtype": dtype,
                    "rows": options.rows,
                    "micro_batch_tokens": options.micro_batch_tokens,
                    "tflops": measured / 1e12,
                    "mfu_of_tflops": ceiling / 1e12,
                    "results": results,
                }
                options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def measure(
    arm: str, work: Workload, device: str, dtype: str, repeats: int, ceiling: float, micro_batch_tokens: int = BUDGET
) -> dict[str, Any]:  # fmt: skip
    """One arm, alone on the device."""
    with tempfile.TemporaryDirectory() as folder:
        steps = 2 * repeats + 1
        make = functools.partial(make_gpu_arm, arm, work, Path(folder), device, dtype, steps, micro_batch_tokens)
        process = ArmProcess(arm, make, work.rows)
        process.first_step()
        for number in range(1, repeats + 1):
            process.repeat(number)
        process.stop()
    measured, shape = process.measured, work.dimensions
    if measured.error or not measured.seconds:
        return {"arm": arm, "error": (measured.error or "no step").strip().splitlines()[-1]}
    parameters = shape.layers * sum(a * b for a, b in shape.linear) + shape.vocabulary * shape.hidden
    rate = statistics.median(measured.rates())
    return {
        "arm": arm,
        "tokens_per_second": round(rate, 1),
        "mfu_4n": round(rate * 4 * parameters / ceiling, 3),
        "peak_memory_gib": round(measured.peak_memory_gib, 2),
        "loss": round(measured.loss, 4),
        "first_step_seconds": round(measured.first_step_seconds, 1),
    }


def make_gpu_arm(
    arm: str, work: Workload, folder: Path, device: str, dtype: str, steps: int, micro_batch_tokens: int = BUDGET
) -> Any:  # fmt: skip
    """An arm of `benchmarks.compare`, or one of ours with more: built in the process that runs it."""
    from benchmarks import arms

    if arm.startswith("lmtune"):
        budget = None if arm == "lmtune-auto" else micro_batch_tokens
        without = ("fused elementwise",) if arm == "lmtune-unfused" else ()
        return arms.Lmtune(work, folder, device, dtype, without, budget)
    if arm.startswith("trl-"):
        from benchmarks.trl_arm import Trl

        at_once = min(TRL_ROWS, work.batch_size)
        return Trl(
            work, folder, device, dtype, steps, at_once, best=True, varlen=device == "cuda", liger=arm == "trl-liger"
        )
    made = arms.PlainPacked(work, folder, device, dtype)
    if arm == "plain-liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(model=made.model.get_base_model())
    return made


def line_of(result: dict[str, Any]) -> str:
    """One line of the table."""
    begin = f"{result['case']:12}{result['arm']:20}"
    if "error" in result:
        return f"{begin}{result['error'][:90]}"
    return (
        f"{begin}{result['tokens_per_second']:10,.0f} tok/s{result['mfu_4n']:7.1%} MFU (4N)"
        f"{result['peak_memory_gib']:8.2f} GiB  loss {result['loss']:.4f}  first step {result['first_step_seconds']} s"
    )


if __name__ == "__main__":
    main()
