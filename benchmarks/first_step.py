"""How long a user waits for the first optimizer step: `lmtune finetune` and a TRL script, from a cold start.

    python -m benchmarks.first_step --repeats 5
    python -m benchmarks.first_step --shape 100m --quantization nf4    # lmtune's first start and its later ones

Both read the same file of rows and the same base, in turns, each in a new process with empty caches of its own. The
time is from the start of the process until the first step is done.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import load_average
from benchmarks.workload import SHAPES, TARGETS, Workload

ROWS = 2_000


def main() -> None:
    """Measure both, and print medians and minima."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shape", choices=SHAPES, default="30m")
    parser.add_argument("--quantization", choices=("none", "nf4", "int8"), default="none")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--trl", action="store_true", help=argparse.SUPPRESS)  # what the TRL process runs
    options = parser.parse_args()
    if options.trl:
        trl_script()
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work = Workload(options.shape)
        work.write_base(folder / "base")
        work.tokenizer().save_pretrained(folder / "base")
        with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
            for index in range(ROWS):
                row = {"prompt": f"What is {index} plus {index}?", "completion": f"It is {2 * index}."}
                file.write(json.dumps(row) + "\n")
        arms: dict[str, Callable[[int], float]] = {
            "lmtune": lambda repeat: lmtune_seconds(folder, f"trial{repeat}", f"cache{repeat}", options.quantization)
        }
        if options.quantization == "none":
            arms["trl"] = lambda repeat: trl_seconds(folder, repeat)
        else:  # rows and base as the first start left them
            arms["again"] = lambda repeat: lmtune_seconds(
                folder, f"again{repeat}", f"cache{repeat}", options.quantization
            )
        seconds: dict[str, list[float]] = {arm: [] for arm in arms}
        load = load_average()
        for repeat in range(options.repeats):
            for arm, measure in arms.items():
                seconds[arm].append(measure(repeat))
    for arm, values in seconds.items():
        print(f"{arm:8} {statistics.median(values):6.1f} s to the first step (min {min(values):.1f}), load {load}")
    if options.output:
        options.output.write_text(json.dumps({"load_average_before": load, "seconds": seconds}, indent=2) + "\n")


def lmtune_seconds(folder: Path, run: str, cache: str, quantization: str) -> float:
    """`lmtune finetune` with its own checks; without held-out rows, which TRL does not have either."""
    settings = [
        "model.name=base", f"model.quantization={quantization}", "data.train=rows.jsonl", "data.validation_fraction=0",
        "data.template=plain", "train.batch_size=16", "train.max_steps=2", f"run.name={run}",
    ]  # fmt: skip
    (folder / "run.yaml").write_text("run: {dir: runs}\n")
    environment = {**os.environ, "LMTUNE_CACHE": str(folder / cache)}
    command = [sys.executable, "-m", "lmtune", "finetune", "run.yaml", *settings]
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.DEVNULL)
    metrics = folder / "runs" / run / "metrics.jsonl"
    while not (metrics.is_file() and metrics.stat().st_size):
        if process.poll() is not None:
            raise RuntimeError(f"lmtune ended with {process.returncode} before its first step")
        time.sleep(0.02)
    seconds = time.perf_counter() - began
    process.wait()
    return seconds


def trl_seconds(folder: Path, repeat: int) -> float:
    """A script as TRL's documentation has it, on the same file."""
    environment = {
        **os.environ, "HF_DATASETS_CACHE": str(folder / f"datasets{repeat}"),
        "PYTHONPATH": str(Path(__file__).parents[1]), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.first_step", "--trl"]
    began = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("first step"):
            seconds = time.perf_counter() - began
            process.communicate()
            return seconds
    raise RuntimeError("the TRL script ended before its first step")


def trl_script() -> None:
    """Fine-tune ./base on ./rows.jsonl with SFTTrainer; says when the first step is done."""
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Say(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            print("first step", flush=True)

    config = SFTConfig(
        output_dir="trl", use_cpu=True, bf16=False, max_steps=1, report_to="none", save_strategy="no",
        per_device_train_batch_size=8, gradient_accumulation_steps=2, gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained("base"), args=config, callbacks=[Say()],
        train_dataset=load_dataset("json", data_files="rows.jsonl", split="train"),
        processing_class=AutoTokenizer.from_pretrained("base"),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=list(TARGETS)),
    )  # fmt: skip
    trainer.train()


if __name__ == "__main__":
    main()
