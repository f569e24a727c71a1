"""DPO: lmtune beside TRL's DPOTrainer on the same pairs, in one run.

    python -m benchmarks.preference --shape 30m --prompt 256 --answer 64
    python -m benchmarks.preference --shape 30m --prompt 128 --answer 128

TRL at its best settings here: reference log-probabilities precomputed, no checkpointing, pairs padded together or one
at a time. The reference of both is the model before the first step. Steps are held one at a time and interleaved. The
gradients of the first step are compared before any timing counts; `tests/objectives/test_trl.py` compares whole runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.arms import Lmtune
from benchmarks.compare import machine, write_base
from benchmarks.measure import ArmProcess, load_average
from benchmarks.trl_arm import Trl, _Hold
from benchmarks.workload import SHAPES, Workload

BETA = 0.1
ARMS = ("lmtune", "trl", "trl-by-pair")


@dataclasses.dataclass(frozen=True)
class Pairs(Workload):
    """Pairs of random answers to random prompts, whose lengths vary by a half."""

    prompt: int = 128
    answer: int = 128

    def rows(self, step: int) -> list[Any]:
        """The pairs of a step: two `sequences` each, the chosen one first."""
        generator = np.random.default_rng([self.seed, step])

        def ids(length: int) -> Any:
            return generator.integers(5, self.dimensions.vocabulary, int(length * generator.uniform(0.75, 1.25)))

        rows = []
        for index in range(self.batch_size):
            prompt, sequences = ids(self.prompt), []
            for answer in (ids(self.answer), ids(self.answer)):
                trained = np.arange(len(prompt) + len(answer)) >= len(prompt)
                sequences.append(SimpleNamespace(input_ids=np.concatenate([prompt, answer]), loss_mask=trained))
            rows.append(SimpleNamespace(where=f"step {step} pair {index}", sequences=sequences))
        return rows


class LmtuneDpo(Lmtune):
    """lmtune's own step over pairs; the reference of all rows is computed before the first."""

    rows = "pair"

    def __init__(self, work: Pairs, folder: Path, device: str, steps: int) -> None:
        super().__init__(work, folder, device, "float32")
        from lmtune.config.schema import DpoConfig
        from lmtune.data.sequences import SequenceTable
        from lmtune.data.types import TokenizedExample, TokenSequence
        from lmtune.evaluation.scoring import sequence_logprobs
        from lmtune.objectives.preference import Dpo

        rows = [row for step in range(steps) for row in work.rows(step)]
        self.place = {row.where: index for index, row in enumerate(rows)}
        pairs = [
            TokenizedExample(
                row.where, tuple(TokenSequence(s.input_ids.astype(np.int32), s.loss_mask) for s in row.sequences)
            )
            for row in rows
        ]
        flat = [sequence for pair in pairs for sequence in pair.sequences]
        tokens, targets = ([size(one) for one in flat] for size in (len, lambda one: one.num_targets))
        ends = np.arange(0, 2 * len(pairs) + 1, 2)
        table = SequenceTable(np.array(tokens, dtype=np.int32), np.array(targets, dtype=np.int32), ends)
        self.objective = Dpo(DpoConfig(beta=BETA))
        self.store: Any = self.objective.precompute(
            _Store(pairs, table), lambda store: sequence_logprobs(self.forward, self.objective.units, store)
        )

    def step(self, rows: list[Any]) -> float:
        """Packed micro-batches of whole pairs, whose prompt is there once."""
        from lmtune.batching.packing import pack_bins
        from lmtune.batching.plan import Totals, Unit
        from lmtune.batching.prefetch import pack_units
        from lmtune.parallel.single import Single
        from lmtune.training.step import step_gradients

        places = np.array([self.place[row.where] for row in rows])
        lengths = [
            sum(len(s.input_ids) for s in row.sequences) - int((~row.sequences[0].loss_mask).sum()) for row in rows
        ]
        units = [Unit(index, int(place), (0, 1)) for index, place in enumerate(places)]
        groups = pack_bins(lengths, self.budget)
        batches = [pack_units(self.store, [units[i] for i in group], len(rows), True) for group in groups]
        self.computed += sum(batch.input_ids.numel() for batch in batches)
        totals = Totals.of(self.store.sequences, places)
        return step_gradients(
            self.forward, self.objective, self.parameters, batches, totals, Single(self.device)
        ).loss  # fmt: skip


class _Store:
    """The pairs of all steps, an `ExampleStore`."""

    signature = "benchmark"

    def __init__(self, pairs: list[Any], sequences: Any) -> None:
        self.pairs, self.sequences = pairs, sequences

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Any:
        return self.pairs[index]

    def location(self, index: int) -> str:
        return str(self.pairs[index].location)


class TrlDpo(Trl):
    """DPOTrainer on the pairs of the workload's steps, in their order."""

    def _trainer(self, folder: Path, steps: int, best: bool, liger: bool) -> Any:
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        class Prepared(DPOTrainer):
            def _prepare_dataset(self, dataset: Any, *rest: Any) -> Any:
                return dataset

        rows = [row.sequences for step in range(steps) for row in self.work.rows(step)]
        data = Dataset.from_list([
            {"prompt_ids": chosen.input_ids[~chosen.loss_mask].tolist(),
             "chosen_ids": chosen.input_ids[chosen.loss_mask].tolist(),
             "rejected_ids": rejected.input_ids[rejected.loss_mask].tolist()}
            for chosen, rejected in rows
        ])  # fmt: skip
        config = DPOConfig(
            output_dir=str(folder / "trl"), use_cpu=self.device.type == "cpu", bf16=False, learning_rate=1e-4,
            lr_scheduler_type="constant", max_grad_norm=1e9, max_steps=steps, report_to="none", save_strategy="no",
            per_device_train_batch_size=self.at_once, gradient_accumulation_steps=self.work.batch_size // self.at_once,
            train_sampling_strategy="sequential", disable_tqdm=True, logging_strategy="no", seed=self.work.seed,
            precompute_ref_log_probs=True, gradient_checkpointing=False, max_length=None, beta=BETA,
            use_liger_kernel=liger,
        )  # fmt: skip
        trainer = Prepared(
            model=self.model, args=config, train_dataset=data, processing_class=self.work.tokenizer(),
            callbacks=[_Hold(self.gate)],
        )  # fmt: skip
        return self.counted(trainer)


def make_arm(name: str, work: Pairs, folder: Path, device: str, steps: int) -> Any:
    """The arm of that name, built in the process that runs it."""
    if name == "lmtune":
        return LmtuneDpo(work, folder, device, steps)
    return TrlDpo(work, folder, device, "float32", steps, at_once=1 if name == "trl-by-pair" else work.batch_size)


def main() -> None:
    """Measure the arms in turn, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="30m")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--answer", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    work = Pairs(options.shape, batch_size=options.batch_size, prompt=options.prompt, answer=options.answer)
    steps = 2 * options.repeats + 1
    with tempfile.TemporaryDirectory() as name:
        write_base(work, Path(name))
        before, processes = load_average(), []
        for arm in options.arms:
            make = functools.partial(make_arm, arm, work, Path(name), options.device, steps)
            processes.append(ArmProcess(arm, make, work.rows))
            processes[-1].first_step()
        for number in range(1, options.repeats + 1):
            for process in processes:
                process.repeat(number)
        for process in processes:
            process.stop()
    results = [one.measured.summary() | {"first_loss": one.measured.loss} for one in processes]
    if gradients := processes[0].measured.gradients:
        for result, process in zip(results, processes, strict=True):
            if process.measured.gradients:  # there are none of an arm that failed
                result["gradient_difference"] = _apart(process.measured.gradients, gradients)
    ours = results[0]["tokens_per_second_median"]
    print(f"{options.prompt} and {options.answer} tokens, load {before}")
    for result in results:
        rate = result["tokens_per_second_median"]
        if rate is None:
            print(f"{result['arm']:14}{(result['error'] or '').strip().splitlines()[-1][:100]}")
            continue
        print(
            f"{result['arm']:14}{rate:8.0f} tok/s{result['peak_memory_gib']:7.2f} GiB  "
            f"gradients apart {result['gradient_difference']:.1e}  computed {result['computed_per_real_token']:.2f}  "
            f"ours/it {ours / rate:.2f}"
        )
    if options.output:
        report = {
            "work": {field.name: getattr(work, field.name) for field in dataclasses.fields(work)},
            "machine": machine(options.device), "load_average_before": before, "arms": results,
        }  # fmt: skip
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of gradients, of the largest gradient of their tensor: the median of all tensors."""
    return float(statistics.median(np.abs(one[n] - g).max() / max(np.abs(g).max(), 1e-12) for n, g in other.items()))


if __name__ == "__main__":
    main()
