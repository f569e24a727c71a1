"""lmtune against TRL and plain loops of transformers and PEFT on the same work, in one run.

    python -m benchmarks.compare --device cpu --shape 30m --label-fraction 0.3
    python -m benchmarks.compare --data questions.jsonl --arms lmtune trl-padding-free
    python -m benchmarks.compare --shape 30m --shared-prefix 256 --arms lmtune lmtune-without-shared-prefix
    python -m benchmarks.compare --model FOLDER --data questions.jsonl --dtypes float32 bfloat16

Every arm runs in each of `--dtypes`: by default fp32 alone, or bf16 too where the machine multiplies it faster, so that
each is seen at its best. Before any timing counts, each arm's first step in fp32 must give the plain loop's loss (to
1e-5) and adapter gradients (to 1e-4 of the largest), from the same weights and rows. An arm that does not is reported
and its times are left out. What 16 bit changes in training is measured by `benchmarks.curves`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import multiprocessing
import platform
import tempfile
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import ArmHere, ArmProcess, load_average
from benchmarks.workload import SHAPES, Workload

REFERENCE = "plain-packed"
OTHERS = ["trl-defaults", "trl-padding-free", "trl-by-row", "plain-packed", "plain-padded", "plain-by-row"]
VARLEN = "trl-padding-free-varlen"  # GPUs only
ARMS = [
    "lmtune",
    "lmtune-without-TECHNIQUE",
    "lmtune-micro-batch-TOKENS",
    "lmtune-over-QUANTIZATION",
    *OTHERS,
    f"{VARLEN} (GPU)",
]
OVER = "lmtune-over-"  # another quantization of the base: other numbers, and so outside the gate
EXACT = {True: "yes", False: "NO", None: "other base"}
LOSS_BOUND, GRADIENT_BOUND = 1e-5, 1e-4


def make_arm(title: str, work: Workload, folder: Path, device: str, steps: int, exact: bool = False) -> Any:
    """The arm of that title, built in the process that runs it.

    Args:
        title: one of `ARMS`, with `:DTYPE` where it is not fp32.
        work, folder, device: what it works on.
        steps: how many it will be asked for.
        exact: compute in fp32, and a plain loop's cross-entropy in fp64, for the gate: PyTorch's own in fp32 is 1e-5
            off on a CPU where 49,152 logits are peaked, as a trained model's are.
    """
    arm = _make_arm(title, work, folder, device, steps, exact)
    if exact:
        import torch

        arm.loss_dtype = torch.float64
    return arm


def _make_arm(title: str, work: Workload, folder: Path, device: str, steps: int, exact: bool) -> Any:
    from benchmarks import arms

    name, dtype = split_title(title)
    place = (folder, device, "float32" if exact else dtype)
    if name.startswith("trl-"):
        from benchmarks.trl_arm import ROWS_AT_ONCE, Trl

        at_once = 1 if name == "trl-by-row" else ROWS_AT_ONCE
        return Trl(work, *place, steps, at_once, name != "trl-defaults", varlen=name == VARLEN and not exact)
    if name == "lmtune":
        return arms.Lmtune(work, *place)
    if name.startswith(OVER):
        return arms.Lmtune(dataclasses.replace(work, quantization=name.removeprefix(OVER)), *place)
    if name.startswith("lmtune-micro-batch-"):
        return arms.Lmtune(work, *place, micro_batch_tokens=int(name.removeprefix("lmtune-micro-batch-")))
    if name.startswith("lmtune-without-"):
        return arms.Lmtune(work, *place, (name.removeprefix("lmtune-without-").replace("-", " "),))
    if name == "plain-packed":
        return arms.PlainPacked(work, *place)
    return arms.PlainPadded(work, *place, rows_at_once={"plain-padded": 4, "plain-by-row": 1}[name])


def split_title(title: str) -> tuple[str, str]:
    """The arm and its dtype."""
    name, _, dtype = title.partition(":")
    return name, dtype or "float32"


def main() -> None:
    """Run the comparison the command line asks for, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="30m")
    parser.add_argument("--quantization", choices=("none", "nf4", "int8"), default="none")
    parser.add_argument("--label-fraction", type=float, default=0.3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shared-prefix", type=int, default=0)
    parser.add_argument("--data", help="rows of this file instead of random ones")
    parser.add_argument("--model", help="a model folder, or tiny, instead of random weights; with --data")
    parser.add_argument(
        "--dtypes", nargs="+", choices=("float32", "bfloat16"), help="by default all that are fast here"
    )
    parser.add_argument("--arms", nargs="+", metavar="ARM", help=", ".join(ARMS) + "; with :DTYPE in that alone")
    parser.add_argument(
        "--together", action="store_true", help="all arms in one process: quicker to begin, but no peak memory of each"
    )
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    work = Workload(
        options.shape, options.quantization, options.label_fraction, options.batch_size,
        shared_prefix=options.shared_prefix, data=options.data, model=options.model,
    )  # fmt: skip
    usual = ["lmtune", *OTHERS, *([VARLEN] if options.device == "cuda" else [])]
    report = compare(work, options.device, options.arms or usual, options.repeats, options.dtypes, options.together)
    print_table(report)
    if options.output:
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def compare(
    work: Workload, device: str, arms: list[str], repeats: int, dtypes: list[str] | None = None, together: bool = False
) -> dict[str, Any]:  # fmt: skip
    """Measure `arms` in turn, in each of `dtypes`; the reference is added for the gate if it is not among them."""
    dtypes = dtypes or fast_dtypes(device, work)
    titled = [arm if ":" in arm else f"{arm}:{dtype}" for dtype in dtypes for arm in arms]
    titles = list(dict.fromkeys(title.removesuffix(":float32") for title in titled))
    names = list(dict.fromkeys([REFERENCE, *titles]))
    dtypes = list(dict.fromkeys(split_title(title)[1] for title in titles))
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base" if work.model is None else Path(work.model)
        write_base(work, base)
        load_before, processes = load_average(), []
        for name in names:
            make = functools.partial(make_arm, name, work, base, device, 2 * repeats + 1)
            processes.append(_started(name, make, work, ArmHere if together else ArmProcess))
        reference = processes[0].measured
        if reference.error:
            raise RuntimeError(f"the reference {REFERENCE} failed:\n{reference.error}")
        judged = {process.measured.name: gate(process.measured, reference) for process in processes}
        # the reference may be there for the gate alone, and what is not exact is not timed
        timed = [p for p in processes if p.measured.name in titles and judged[p.measured.name]["exact"] is not False]
        ceilings = {dtype: matmul_ceiling(device, dtype) for dtype in dtypes}
        for number in range(1, repeats + 1):
            for process in timed:
                process.repeat(number)
        ceilings = {dtype: max(rate, matmul_ceiling(device, dtype)) for dtype, rate in ceilings.items()}
        for process in processes:
            process.stop()
    results, steps = [], range(2, 2 * repeats + 1, 2)
    for process in processes:
        summary = {**process.measured.summary(), **judged[process.measured.name]}
        rate, ceiling = summary["tokens_per_second_median"], ceilings.get(split_title(process.measured.name)[1])
        summary["mfu"] = round(rate * flop_per_token(work, steps) / ceiling, 3) if rate and ceiling else None
        results.append(summary)
    return {
        "work": {field.name: getattr(work, field.name) for field in dataclasses.fields(work)},
        "label_fraction": round(work.trained_share, 3),
        "device": device,
        "machine": machine(device),
        "load_average_before": load_before,
        "load_average_after": load_average(),
        "matmul_ceiling_gflops": {dtype: round(rate / 1e9, 1) for dtype, rate in ceilings.items()},
        "arms": results,
    }


def _started(name: str, make: Any, work: Workload, kind: type[ArmProcess]) -> ArmProcess:
    """An arm after its first step, with loss and gradients of that step in fp32."""
    judge = None
    # in a process whose memory is then nobody's
    if make.args[3] != "cpu" or split_title(name)[1] != "float32" or name.startswith("plain-"):
        judge = kind(name, functools.partial(make, exact=True), work.rows)
        judge.first_step()
        judge.stop()
    process = kind(name, make, work.rows)
    process.first_step()
    if judge is not None:
        process.measured.loss, process.measured.gradients = judge.measured.loss, judge.measured.gradients
        process.measured.error = process.measured.error or judge.measured.error
    return process


def gate(arm: Any, reference: Any) -> dict[str, Any]:
    """How far an arm's first loss and gradients are from the reference's, and whether that is close enough."""
    if arm.error or arm.gradients.keys() != reference.gradients.keys():
        return {"exact": False, "loss_difference": None, "gradient_difference": None}
    loss = abs(arm.loss - reference.loss)
    differences = [
        np.abs(arm.gradients[name] - wanted).max() / max(float(np.abs(wanted).max()), 1e-12)
        for name, wanted in reference.gradients.items()
    ]
    worst = float(np.max(differences))  # a NaN among them is the result
    exact = bool(loss <= LOSS_BOUND and worst <= GRADIENT_BOUND)
    return {
        "exact": None if arm.name.startswith(OVER) else exact,
        "loss_difference": float(f"{loss:.2e}"),
        "gradient_difference": float(f"{worst:.2e}"),
    }


def flop_per_token(work: Workload, steps: Iterable[int]) -> float:
    """Operations of a LoRA step per token: 4 N + 4 f H + 6 P + 7 s a L, as in lmtune.training.estimate."""
    shape = work.dimensions
    linear = shape.layers * sum(a * b for a, b in shape.linear)
    adapter = shape.layers * work.rank * sum(a + b for a, b in shape.linear)
    documents = [row.sequences[0] for step in steps for row in work.rows(step)]
    lengths, trained = [len(d.input_ids) for d in documents], sum(int(d.loss_mask.sum()) for d in documents)
    seen, share = sum(n * n for n in lengths) / sum(lengths), trained / sum(lengths)
    head, attention = shape.vocabulary * shape.hidden, shape.heads * shape.head_dim * shape.layers
    return 4 * linear + 4 * share * head + 6 * adapter + 7 * seen * attention


def write_base(work: Workload, folder: Path) -> None:
    """`work.write_base` in a process of its own, whose memory is then nobody's."""
    process = multiprocessing.get_context("spawn").Process(target=work.write_base, args=(folder,))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError("the base model could not be written")


def fast_dtypes(device: str, work: Workload) -> list[str]:
    """fp32, and bf16 where the machine multiplies it faster."""
    import torch

    from lmtune.models.device import BF16_GAIN, bf16_speedup

    return ["float32"] + ["bfloat16"] * (
        bf16_speedup(torch.device(device), work.dimensions.hidden, work.dimensions.intermediate) >= BF16_GAIN
    )


def matmul_ceiling(device: str, dtype: str = "float32") -> float:
    """The best rate of a large matrix product on this device, in operations per second."""
    import torch

    kind = getattr(torch, dtype)
    size = 8192 if device == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def machine(device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch

    libraries = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "trl")
    versions = {}
    for name in libraries:
        try:
            versions[name] = version(name)
        except Exception:
            versions[name] = None
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {"python": platform.python_version(), "threads": torch.get_num_threads(), "gpu": gpu, "versions": versions}


def print_table(report: dict[str, Any]) -> None:
    """The arms, fastest first."""
    ours = max((a for a in report["arms"] if split_title(a["arm"])[0] == "lmtune"), key=_rate, default=None)
    print(f"matmul ceilings {report['matmul_ceiling_gflops']} GFLOP/s, load {report['load_average_before']}")
    print(
        f"{'arm':38}{'tok/s':>8}{'min':>8}{'max':>8}{'computed':>9}{'memory':>9}{'first':>8}{'MFU':>6}"
        f"{'ours/it':>9}  exact"
    )
    shown = [arm for arm in report["arms"] if arm["repeats"] or arm["exact"] is False]
    for arm in sorted(shown, key=_rate, reverse=True):
        rate = arm["tokens_per_second_median"]
        if rate is None:
            why = (
                f"not exact: loss {arm['loss_difference']}, gradients {arm['gradient_difference']} from the plain loop"
            )
            print(f"{arm['arm']:38} {arm['error'].strip().splitlines()[-1][:80] if arm['error'] else why}")
            continue
        ratio = f"{ours['tokens_per_second_median'] / rate:.2f}" if ours and ours["tokens_per_second_median"] else "-"
        print(
            f"{arm['arm']:38}{rate:8.0f}{arm['tokens_per_second_min']:8.0f}{arm['tokens_per_second_max']:8.0f}"
            f"{arm['computed_per_real_token']:9.2f}{arm['peak_memory_gib']:7.2f} G"
            f"{arm['first_step_seconds']:6.1f} s{arm['mfu']:6.2f}{ratio:>9}  {EXACT[arm['exact']]}"
        )


def _rate(arm: dict[str, Any]) -> float:
    return arm["tokens_per_second_median"] or 0.0


if __name__ == "__main__":
    main()
