"""Memory and speed of a rank of `parallel.kind: fsdp`, beside one that holds the whole base.

    python -m benchmarks.sharding --output results.json         # a random model of 120 million weights, made here
    python -m benchmarks.sharding --processes 2 4 --quantization none --layers 24

Each arm is so many CPU processes (gloo) that train together. Counted is what `benchmarks.streaming` counts, of the rank
with the most of it: at the end of loading, when each has its part, and until the last step. Losses and adapters of all
arms of one quantization and number of processes must be equal bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.streaming import make_base, measure


def main() -> None:
    """Run each arm in processes of its own, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quantization", nargs="+", default=["none", "nf4", "int8"])
    parser.add_argument("--dtype", nargs="+", default=["float32"])
    parser.add_argument("--kind", nargs="+", default=["replicated", "fsdp"])
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
        for processes in options.processes:
            for dtype in options.dtype:
                for quantization in options.quantization:
                    for kind in options.kind:
                        arm = {
                            "model": str(model), "dtype": dtype, "quantization": quantization, "kind": kind,
                            "steps": options.steps, "micro_batch": options.micro_batch, "folder": name, "resident": 0,
                            "checkpointing": True, "dora": options.dora,
                        }  # fmt: skip
                        together({**arm, "steps": 1}, processes)  # fills the cache
                        ranks = together(arm, processes)
                        most = max(ranks, key=lambda rank: float(rank["peak_gib"]))
                        found.append({"dtype": dtype, "quantization": quantization, "kind": kind,
                                      "processes": processes, **most})  # fmt: skip
    _print(found)
    if options.output:
        options.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _print(found: list[dict[str, Any]]) -> None:
    print(
        "| base | processes | kind | peak of loading, GiB | peak, GiB | planned, GiB | off by | of which base | "
        "seconds a step | equal |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    for one in found:
        alike = ("dtype", "quantization", "processes")
        first = next(other for other in found if all(other[key] == one[key] for key in alike))
        print(
            f"| {one['dtype']} {one['quantization']} | {one['processes']} | {one['kind']} | {one['load_gib']:.3f} | "
            f"{one['peak_gib']:.3f} | {one['planned_gib']:.3f} | {one['planned_gib'] / one['peak_gib'] - 1:+.0%} | "
            f"{one['base_gib']:.3f} | {one['step_seconds']:.2f} | "
            f"{'yes' if one['sha256'] == first['sha256'] else 'NO'} |"
        )


def together(arm: dict[str, Any], processes: int) -> list[dict[str, Any]]:
    """What each rank of an arm measured."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    count = str(processes)
    variables = {**os.environ, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}  # fmt: skip
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
    print(json.dumps(measure(arm, parallel)))
    parallel.close()


if __name__ == "__main__":
    main()
