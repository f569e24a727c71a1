"""How cost grows: with rows (the planner's time and memory), their length, the rank, processes, and requests.

python -m benchmarks.scaling rows           # 1,000 to 1,000,000 short rows, planned for a whole epoch
python -m benchmarks.scaling tokenize --rows 20000 1000000   # read, rendered, tokenized and stored, as training does
python -m benchmarks.scaling length rank    # tokens per second of a training step
python -m benchmarks.scaling processes      # `lmtune finetune --processes N`, whole runs
python -m benchmarks.scaling balance        # how evenly a step's work is dealt to 2 to 64 processes
python -m benchmarks.scaling requests       # tokens per second of the engine, for 1 to 64 requests at a time
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.compare import compare, fast_dtypes, machine, split_title
from benchmarks.measure import load_average
from benchmarks.workload import Workload

ROWS = (1_000, 10_000, 100_000, 1_000_000)
LENGTHS = (64, 256, 1024, 4096)
RANKS = (4, 16, 64, 256)
REQUESTS, ANSWER_TOKENS = (1, 4, 16, 64), 100
STEPS, ROW_TOKENS = 20, 24  # steps of a run for `processes`; mean tokens of the short rows


def main() -> None:
    """Measure what the command line names, print it as it comes, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ("rows", "tokenize", "length", "rank", "processes", "balance", "requests")
    parser.add_argument("what", nargs="+", choices=kinds)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", default="30m")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000], help="of tokenize")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    report: dict[str, Any] = {"machine": machine(options.device), "load_average_before": load_average()}
    for what in options.what:
        if what == "rows":
            report[what] = [planned(count) for count in ROWS]
        elif what == "tokenize":
            report[what] = [tokenized(count) for count in options.rows]
        elif what == "length":
            works = [(n, Workload(options.shape, fixed_length=n, batch_size=max(1, 4096 // n))) for n in LENGTHS]
            report[what] = [step_rate("length", n, work, options) for n, work in works]
        elif what == "rank":
            report[what] = [step_rate("rank", n, Workload(options.shape, rank=n), options) for n in RANKS]
        elif what == "requests":
            report[what] = answered()
        elif what == "balance":
            report[what] = [balance(count) for count in (2, 8, 64)]
        else:
            report[what] = [whole_run(count, options.shape) for count in options.processes]
    if options.output:
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def step_rate(name: str, value: int, work: Workload, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second and memory of lmtune's step, with the plain packed loop in the same run."""
    dtype = fast_dtypes(options.device, work)[-1]
    report = compare(work, options.device, ["lmtune", "plain-packed"], options.repeats, [dtype])
    arms = {split_title(arm["arm"])[0]: arm for arm in report["arms"]}
    ours, plain = arms["lmtune"], arms["plain-packed"]
    rate, ceiling = ours["tokens_per_second_median"], report["matmul_ceiling_gflops"][dtype]
    print(
        f"{name} {value:>6}: {rate:8.0f} tok/s, {ours['peak_memory_gib']:5.2f} GiB, MFU {ours['mfu']:.2f} of {ceiling} "
        f"GFLOP/s; plain packed {plain['tokens_per_second_median']:8.0f} tok/s, {plain['peak_memory_gib']:5.2f} GiB"
    )
    return {name: value, "matmul_ceiling_gflops": ceiling, "lmtune": ours, "plain-packed": plain}


# --- rows


def planned(count: int) -> dict[str, Any]:
    """Time and memory to plan one epoch of `count` short rows, read from a file as training does, in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.arrow"
        write_rows(path, count)
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_plan_epoch, args=(theirs, path))
        process.start()
        theirs.close()  # so that a child that fails ends the wait
        found: dict[str, Any] = {"rows": count, "file_mib": round(path.stat().st_size / 2**20, 1), **ours.recv()}
        process.join()
    print(
        f"{count:>9,} rows: {found['seconds']:7.2f} s to plan {found['steps']:,} steps, "
        f"{found['memory_gib']:.2f} GiB more resident memory, {found['anonymous_gib']:.2f} GiB of it not the file's"
    )
    return found


def write_rows(path: Path, count: int) -> None:
    """Tokenized rows of about `ROW_TOKENS` tokens, the last third trained."""
    from lmtune.data.store import TableWriter
    from lmtune.data.types import Example, TokenSequence

    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(np.log(ROW_TOKENS), 0.5, count), 6, 128).astype(int)
    with TableWriter(path) as table:
        for index, length in enumerate(lengths.tolist()):
            ids = generator.integers(5, 30_000, length).astype(np.int32)
            sequence = TokenSequence(ids, np.arange(length) >= length - length // 3)
            table.append([sequence], 0, Example("rows.jsonl", index + 1), (index, index))


def _plan_epoch(pipe: Any, path: Path) -> None:
    from lmtune.batching.plan import Planner
    from lmtune.batching.prefixes import shareable_prefix
    from lmtune.config.schema import TrainConfig
    from lmtune.data.report import PartReport
    from lmtune.data.sources import DataFile
    from lmtune.data.store import TokenizedData, TokenTable

    before = _resident()
    began = time.perf_counter()
    report, files = PartReport(files=["rows.jsonl"], sha256=[]), [DataFile(path, "rows.jsonl", "rows.jsonl")]
    data = TokenizedData(TokenTable(path), "key", "signature", report, files)

    def beginnings_of(row: int) -> list[Any]:
        return [shareable_prefix(document.input_ids, document.loss_mask) for document in data[row].sequences]

    plan = Planner(data.sequences, TrainConfig(epochs=1), 1, 4096, beginnings_of)
    micro_batches = sum(len(plan.step(step).micro_batches[0]) for step in range(1, plan.total_steps + 1))
    seconds, after = time.perf_counter() - began, _resident()
    pipe.send({
        "seconds": round(seconds, 2), "steps": plan.total_steps, "micro_batches": micro_batches,
        "memory_gib": round(after["VmRSS"] - before["VmRSS"], 3),
        "anonymous_gib": round(after["RssAnon"] - before["RssAnon"], 3),
    })  # fmt: skip


# --- tokenize


def tokenized(count: int) -> dict[str, Any]:
    """Processor time and memory to read, render, tokenize and store `count` rows with `tiny`, in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        examples = (Path(__file__).parents[1] / "examples" / "support.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in examples]
        with path.open("w", encoding="utf-8") as file:
            for number in range(count):
                row = rows[number % len(rows)]
                answer = " ".join([row["completion"]] * 3)
                file.write(json.dumps({"prompt": f"Case {number}: {row['prompt']}", "completion": answer}) + "\n")
        environment = {**os.environ, "LMTUNE_CACHE": folder, "HF_HUB_OFFLINE": "1"}
        code = f"from benchmarks.scaling import _tokenize; _tokenize({str(path)!r})"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, check=True, text=True
        )
        found = {"rows": count, "file_mib": round(path.stat().st_size / 2**20, 1), **json.loads(done.stdout)}
    print(
        f"{count:>9,} rows, {found['file_mib']} MiB: {found['processor_seconds']:.0f} s of processor time, "
        f"{1000 * found['processor_seconds'] / count:.2f} ms a row; {found['seconds']:.0f} s elapsed; peak memory "
        f"{found['peak_gib']:.2f} GiB, before {found['before_gib']:.2f} GiB, of a worker "
        f"{found['worker_gib']:.2f} GiB; {found['tokens']:,} tokens"
    )
    return found


def _tokenize(path: str) -> None:
    import resource

    from lmtune.config.schema import DataConfig, ModelConfig
    from lmtune.data.rendering import Renderer
    from lmtune.data.store import tokenize
    from lmtune.models.base import load_tokenizer

    renderer = Renderer(load_tokenizer(ModelConfig(name="tiny")), "auto", None, ())
    before, began, start = _resident()["VmRSS"], time.process_time(), time.perf_counter()
    data = tokenize([path], renderer, DataConfig(train=path))
    own, elapsed = time.process_time() - began, time.perf_counter() - start
    workers = resource.getrusage(resource.RUSAGE_CHILDREN)  # that render, where there are several processors
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({
        "processor_seconds": round(own + workers.ru_utime + workers.ru_stime, 1), "seconds": round(elapsed, 1),
        "before_gib": round(before, 3), "peak_gib": round(peak, 3), "worker_gib": round(workers.ru_maxrss / 2**20, 3),
        "tokens": int(data.num_tokens.sum()), "kept": len(data),
    }))  # fmt: skip


def _resident() -> dict[str, float]:
    """This process's memory in GiB: all that is resident, and the part that is no file's."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    pairs = (line.split() for line in lines if line.startswith(("VmRSS", "RssAnon")))
    return {name.rstrip(":"): int(size) / 2**20 for name, size, *_ in pairs}


# --- requests


def answered(counts: Sequence[int] = REQUESTS, tokens: int = ANSWER_TOKENS) -> list[dict[str, Any]]:
    """Tokens a second where so many requests, with prompts of 31 tokens, are made of `tiny` at the same moment."""
    from lmtune.inference.engine import TransformersEngine
    from lmtune.inference.load import load_for_inference
    from lmtune.inference.request import Request, Sampling

    model, sampling, found = load_for_inference("tiny").model, Sampling(max_new_tokens=tokens), []
    list(TransformersEngine(model).submit(Request([5], sampling)))  # what is slow once
    for count in counts:
        engine, began = TransformersEngine(model), time.perf_counter()
        asked = [engine.submit(Request([5 + place, *range(20, 50)], sampling)) for place in range(count)]
        given = sum(len(list(generation)) for generation in asked)
        seconds = time.perf_counter() - began
        found.append({"requests": count, "tokens_per_second": round(given / seconds, 1), "seconds": round(seconds, 3)})
        print(f"{count:>3} at a time: {given / seconds:,.0f} tokens/s; the last answer ends after {seconds:.2f} s")
    return found


# --- processes


def balance(processes: int) -> dict[str, Any]:
    """The busiest process's work as a multiple of the mean, dealt by cost and in the rows' order; means of steps.

    The work is that of `lmtune.training.estimate`, for a model like Qwen3-0.6B with rank 16; rows have lengths with a
    long tail, and trained shares from nothing to all; 16 rows a process.
    """
    from lmtune.batching.plan import assign_to_ranks
    from lmtune.training.estimate import token_cost
    from lmtune.training.memory import ModelShape

    cost = token_cost(ModelShape(28, 1024, 2048, 3072, 151_936, 440_000_000, 155_000_000, 10_000_000))
    generator, worst = np.random.default_rng(0), dict[str, list[float]](dealt=[], in_order=[])
    for _ in range(STEPS):
        lengths = np.clip(generator.lognormal(4.8, 0.8, 16 * processes), 16, 2048).astype(int)
        trained = np.maximum(1, lengths * generator.random(len(lengths))).astype(int)
        work = lengths * (1 + cost.before * lengths / 2) + trained * cost.target
        ways = {
            "dealt": assign_to_ranks(lengths.tolist(), trained.tolist(), processes, cost=cost),
            "in_order": np.arange(len(lengths)).reshape(processes, -1),
        }
        for way, shares in ways.items():
            loads = [work[share].sum() for share in shares]
            worst[way].append(max(loads) / (sum(loads) / processes))
    found = {way: round(float(np.mean(values)), 3) for way, values in worst.items()}
    print(f"{processes:>3} processes: the busiest has {found['dealt']} of the mean, {found['in_order']} in order")
    return {"processes": processes, **found}


def whole_run(count: int, shape: str) -> dict[str, Any]:
    """`lmtune finetune --processes count` from start to end: its own tokens per second, and the seconds of all."""
    work = Workload(shape)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work.write_base(folder / "base")
        work.tokenizer().save_pretrained(folder / "base")
        generator = np.random.default_rng(0)
        words = [f"word{index}" for index in range(500)]
        with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
            for _ in range(STEPS * 16):
                length = int(np.clip(generator.lognormal(3.4, 0.8), 4, 200))
                text = " ".join(generator.choice(words, length))
                file.write(json.dumps({"prompt": text[: len(text) * 2 // 3], "completion": text[len(text) * 2 // 3 :]}))
                file.write("\n")
        settings = [
            "model.name=base", "model.quantization=none", "data.train=rows.jsonl", "data.validation_fraction=0",
            "train.batch_size=16", f"train.max_steps={STEPS}", "data.template=plain", "run.name=trial",
        ]  # fmt: skip
        (folder / "run.yaml").write_text("run: {dir: runs}\n")
        threads = max(1, (os.cpu_count() or 1) // count)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "LMTUNE_CACHE": str(folder / "cache")}
        command = [sys.executable, "-m", "lmtune", "finetune", "run.yaml", *settings, "--processes", str(count)]
        began = time.perf_counter()
        subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
        seconds = time.perf_counter() - began
        summary = json.loads((folder / "runs" / "trial" / "summary.json").read_text())
    rate = summary["tokens_per_second"]
    print(f"{count} processes of {threads} threads: {rate:8.0f} tok/s in training, {seconds:.0f} s in all")
    return {"processes": count, "threads_each": threads, "tokens_per_second": rate, "seconds": round(seconds, 1)}


if __name__ == "__main__":
    main()
