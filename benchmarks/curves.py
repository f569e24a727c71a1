"""What 16-bit training learns beside fp32: the loss of every step, of lmtune and of PEFT's own layers.

    python -m benchmarks.curves --model FOLDER --data rows.jsonl --steps 50 --learning-rate 2e-4 --seeds 0 1 2

Arms begin from the same adapter, take the same rows and step the same AdamW. `peft-bf16` is what a plain loop of
transformers and PEFT computes: an fp32 adapter beside a bf16 base, under autocast. What counts is the mean loss of all
steps after the first, which the adapter has not changed yet.

On a CPU that does not multiply bf16 itself, products are computed in fp32 from the rounded operands and rounded once,
as a processor that does so computes them: the result is the same, and it takes a fraction of the time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.arms import Lmtune, PlainPacked, PlainPadded
from benchmarks.compare import machine
from benchmarks.workload import Workload
from lmtune.models.device import bf16_speedup

ARMS = {"fp32": (Lmtune, "float32"), "lmtune-bf16": (Lmtune, "bfloat16"), "peft-bf16": (PlainPadded, "bfloat16")}


def main() -> None:
    """Run the arms and print their curves, or write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a model folder, or tiny")
    parser.add_argument("--data", required=True, help="rows in any of lmtune's formats")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, nargs="+", default=[2e-5, 2e-4, 1e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    results = []
    for rate in options.learning_rate:
        for seed in options.seeds:
            work = Workload("1m", batch_size=options.batch_size, data=options.data, seed=seed, model=options.model)
            exact = None
            for arm in options.arms:
                losses = curve(arm, work, options.device, options.steps, rate)
                mean = sum(losses[1:]) / (len(losses) - 1)
                exact = mean if arm == "fp32" else exact
                behind = None if exact is None else round(mean - exact, 4)
                print(
                    f"{rate:g} seed {seed} {arm:12} mean {mean:.4f} last {losses[-1]:.4f} behind fp32 {behind}",
                    flush=True,
                )
                results.append({
                    "learning_rate": rate, "seed": seed, "arm": arm, "mean_after_first": round(mean, 5),
                    "behind_fp32": behind, "losses": [round(loss, 5) for loss in losses],
                })  # fmt: skip
    if options.output:
        model = Path(options.model).name
        report = {"model": model, "steps": options.steps, "machine": machine(options.device), "curves": results}
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def curve(arm: str, work: Workload, device: str, steps: int, learning_rate: float) -> list[float]:
    """The loss of each step before its update."""
    kind, dtype = ARMS[arm]
    settings: dict[str, Any] = {}
    if kind is PlainPadded:  # one row at a time on a CPU, all in one on a GPU, as each is quickest
        kind, settings = (PlainPacked, {}) if device == "cuda" else (PlainPadded, {"rows_at_once": 1})
    made: Any = kind(work, Path("tiny" if work.model is None else work.model), device, dtype, **settings)
    begin(made, work.seed)
    for group in made.optimizer.param_groups:
        group["lr"] = learning_rate
    with products_rounded_once(device) if dtype != "float32" else contextlib.nullcontext():
        losses = []
        for step in range(steps):
            losses.append(made.step(work.rows(step)))
            made.update()
    return losses


def begin(arm: Any, seed: int) -> None:
    """The adapter as PEFT begins it: A random, B zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in arm.parameters.items():
        if "lora_A" in name:
            bound = parameter.shape[1] ** -0.5
            values = torch.rand(parameter.shape, generator=generator).mul_(2).sub_(1).mul_(bound)
            parameter.data = values.to(parameter.device)
        else:
            parameter.data.zero_()


def products_rounded_once(device: str) -> contextlib.AbstractContextManager[Any]:
    """A context for CPUs without bf16 products, in which these take the time of fp32's; elsewhere nothing."""
    is_fast = bf16_speedup(torch.device(device), 1024, 4096) >= 1
    return contextlib.nullcontext() if is_fast else _InFp32()


class _InFp32(TorchDispatchMode):
    """Products of bf16 operands in fp32, rounded to bf16 at their end."""

    _NAMES = ("mm", "addmm", "bmm", "baddbmm")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name.removeprefix("aten::")
        if name.removesuffix("_") not in self._NAMES or args[-1].dtype != torch.bfloat16:
            return func(*args, **kwargs)
        out = args[0] if name.endswith("_") else kwargs.pop("out", None)
        product = getattr(torch.ops.aten, name.removesuffix("_"))
        result = product(*(tensor.float() for tensor in args), **kwargs).bfloat16()
        return result if out is None else out.copy_(result)


if __name__ == "__main__":
    main()
