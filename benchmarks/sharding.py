"""Memory, speed and result of each layout of a run: replicas, `parallel.kind: fsdp`, and `model.offload: layers`.

    python -m benchmarks.sharding --output results.json         # a random model of 120 million weights, made here
    python -m benchmarks.sharding --processes 2 4 --quantization none --layers 24
    python -m benchmarks.sharding --layers 4 --width 256 --processes 1 2 4 --objective sft dpo classification

Each arm is so many processes that train together: on as many GPUs where they are there, else on CPUs (gloo). Counted is
what `benchmarks.streaming` counts, of the rank with the most of it: at the end of loading, when each has its part, and
until the last step. Beside it stands by how much the trained weights differ from those of the first arm of the same
quantization and objective.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.streaming import make_base, measure


def main() -> None:
    """Run each arm in processes of its own, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantization", nargs="+", default=["none", "nf4", "int8"])
    parser.add_argument("--dtype", nargs="+", default=["float32"])
    parser.add_argument("--kind", nargs="+", default=["replicated", "fsdp", "streamed"])
    parser.add_argument("--objective", nargs="+", default=["sft"])
    parser.add_argument("--processes", type=int, nargs="+", default=[2])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--micro-batch", type=int, default=256, help="tokens")
    parser.add_argument("--dora", action="store_true", help="DoRA, which reads the weights when it begins")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--arm", help=argparse.SUPPRESS)  # what a rank does
    options = parser.parse_args()
    if options.arm:
        _as_rank(json.loads(options.arm))
        return
    found = []
    with tempfile.TemporaryDirectory() as name:
        model = make_base(Path(name) / "base", options.layers, options.width)
        arms = itertools.product(
            options.dtype, options.objective, options.quantization, options.processes, options.kind
        )  # fmt: skip
        for dtype, objective, quantization, processes, kind in arms:
            if (kind, processes) == ("fsdp", 1):
                continue  # one process holds all
            arm = {
                "model": str(model), "dtype": dtype, "quantization": quantization, "kind": kind,
                "objective": objective, "steps": options.steps, "micro_batch": options.micro_batch, "folder": name,
                "resident": 2 if kind == "streamed" else 0, "checkpointing": True, "dora": options.dora,
            }  # fmt: skip
            if not any(one["quantization"] == quantization for one in found):
                together({**arm, "steps": 1}, processes)  # fills the cache
            ranks = together({**arm, "weights": f"{name}/weights.pt"}, processes)
            most = max(ranks, key=lambda rank: float(rank["peak_gib"]))
            about = {"dtype": dtype, "objective": objective, "quantization": quantization}
            weights = torch.load(f"{name}/weights.pt")
            first = next((one for one in found if all(one[key] == about[key] for key in about)), None)
            reference = weights if first is None else first["weights"]
            apart = max(float((one - other).abs().max()) for one, other in zip(weights, reference, strict=True))
            found.append({**about, "kind": kind, "processes": processes, "apart": apart, **most, "weights": weights})
            print(_line(found[-1]), file=sys.stderr, flush=True)
    print(
        "| base | objective | processes | layout | peak of loading, GiB | peak, GiB | planned, GiB | off by | "
        "of which base | seconds a step | trained weights differ by |\n" + "|---" * 11 + "|"
    )
    for one in found:
        del one["weights"]
        print(_line(one))
    if options.output:
        options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _line(one: dict[str, Any]) -> str:
    return (
        f"| {one['dtype']} {one['quantization']} | {one['objective']} | {one['processes']} | {one['kind']} | "
        f"{one['load_gib']:.3f} | {one['peak_gib']:.3f} | {one['planned_gib']:.3f} | "
        f"{one['planned_gib'] / one['peak_gib'] - 1:+.0%} | {one['base_gib']:.3f} | {one['step_seconds']:.2f} | "
        f"{'0, bit for bit' if one['apart'] == 0 else format(one['apart'], '.1e')} |"
    )


def together(arm: dict[str, Any], processes: int) -> list[dict[str, Any]]:
    """What each rank of an arm measured."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    count = str(processes)
    variables = {**os.environ, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": str(port)}  # fmt: skip
    if torch.cuda.device_count() < processes:
        variables["ACCELERATE_USE_CPU"] = "true"
    command = [sys.executable, "-m", "benchmarks.sharding", "--arm", json.dumps(arm)]
    ranks = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]  # fmt: skip
    answers = [rank.communicate() for rank in ranks]
    if any(rank.returncode for rank in ranks):
        sys.exit("".join(said for _, said in answers))
    return [json.loads(told.splitlines()[-1]) for told, _ in answers]


def _as_rank(arm: dict[str, Any]) -> None:
    from lmtune.config.schema import FsdpConfig, ReplicatedConfig
    from lmtune.parallel.launch import connect

    parallel = connect(FsdpConfig() if arm["kind"] == "fsdp" else ReplicatedConfig(), 600)
    if not parallel.is_main:
        arm.pop("weights", None)
    print(json.dumps(measure(arm, parallel)))
    parallel.close()


if __name__ == "__main__":
    main()
