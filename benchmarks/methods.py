"""PEFT's methods beside each other: the same rows, steps and rates, scored on held-out rows over several seeds.

    python -m benchmarks.methods --train examples/support.jsonl --held-out examples/support_heldout.jsonl

Each runs in lmtune's own loop over the same order of rows. Of every method the rate with the least held-out loss, in
the mean over seeds, is shown: methods differ in the rate that suits them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.compare import machine

RANK = 16
# Settings of `tuning`, or of PEFT where lmtune does not offer the method.
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "LoRA+": {"lora_plus_ratio": 16.0},
    "MiSS": {"peft": ("MissConfig", {"r": 2 * RANK})},
    "OFT": {"peft": ("OFTConfig", {"r": 0, "oft_block_size": 32})},
}


def tuning_of(peft: tuple[str, dict[str, Any]]) -> Any:
    """A `Tuning` that puts another method of PEFT on the layers of `all-linear`."""
    import peft as library
    import torch

    from lmtune.models.tuning.base import TunedModel, trainable
    from lmtune.models.tuning.lora import Lora
    from lmtune.models.tuning.targets import find_targets

    class Other(Lora):
        def apply(self, base: Any, seed: int, base_name: str) -> TunedModel:
            name, settings = peft
            found = find_targets(base, "all-linear")
            config = getattr(library, name)(target_modules=list(found.modules), task_type="CAUSAL_LM", **settings)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = library.get_peft_model(base, config)
            for parameter in trainable(model).values():
                parameter.data = parameter.data.float()
            return TunedModel(model)

    return lambda section, base, start: Other(section, base, start)


def measure(method: str, options: argparse.Namespace, rate: float, seed: int) -> dict[str, Any]:
    """One run: its scores on the held-out rows, its parameters and seconds."""
    from lmtune.config.load import build_config
    from lmtune.config.schema import FinetuneConfig, LoraConfig
    from lmtune.models.device import default_device
    from lmtune.parallel.single import Single
    from lmtune.training import compose as parts_of
    from lmtune.training.loop import train
    from lmtune.training.state import TrainResult

    settings = dict(METHODS[method])
    peft = settings.pop("peft", None)
    config = build_config(
        FinetuneConfig,
        {
            "model": {"name": options.model, "quantization": "none", "dtype": "float32"},
            "tuning": {"kind": "lora", "rank": RANK, "alpha": 2 * RANK, **settings},
            "data": {"train": options.train, "validation": options.held_out, "max_length": 512},
            "train": {
                "max_steps": options.steps, "batch_size": options.batch_size, "learning_rate": rate, "seed": seed,
            },
            "evaluation": {"exact_match_rows": options.exact_match_rows, "max_new_tokens": 40, "score_base": False},
            "run": {"name": "methods"},
        },
        where="benchmarks.methods",
    )  # fmt: skip
    usual = parts_of.TUNINGS[LoraConfig]
    if peft is not None:
        parts_of.TUNINGS[LoraConfig] = tuning_of(peft)
    try:
        parts = parts_of.compose(config, Single(default_device()))
    finally:
        parts_of.TUNINGS[LoraConfig] = usual
    job, state = parts.job()
    began = time.perf_counter()
    train(job, [], state)
    seconds = time.perf_counter() - began
    scored = parts.score_tuned(TrainResult(state, None, False))
    assert scored is not None
    return {
        "method": method, "rate": rate, "seed": seed, "loss": scored[0].loss, "exact_match": scored[0].exact_match,
        "parameters": sum(parameter.numel() for parameter in parts.model.trainable().values()),
        "seconds": round(seconds, 1),
    }  # fmt: skip


def main() -> None:
    """Measure all, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--train", required=True)
    parser.add_argument("--held-out", required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 4e-3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--exact-match-rows", type=int, default=84)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    runs = []
    for method in options.methods:
        for rate in options.rates:
            runs += [measure(method, options, rate, seed) for seed in range(options.seeds)]
        if options.output:  # what is known so far
            report = {"machine": machine("cpu"), "steps": options.steps, "batch_size": options.batch_size, "runs": runs}
            options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(line(method, [run for run in runs if run["method"] == method]), flush=True)


def line(method: str, runs: list[dict[str, Any]]) -> str:
    """A method at its best rate: means over seeds, and how far these are apart."""
    by_rate = {run["rate"]: [one for one in runs if one["rate"] == run["rate"]] for run in runs}
    rate, best = min(by_rate.items(), key=lambda item: statistics.mean(one["loss"] for one in item[1]))
    losses = [one["loss"] for one in best]
    found = (
        f"{method:8}{best[0]['parameters']:9,} parameters  rate {rate:.0e}  "
        f"loss {statistics.mean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})  "
        f"{statistics.median(one['seconds'] for one in best):5.1f} s"
    )
    matches = [one["exact_match"] for one in best if one["exact_match"] is not None]
    shown = ", ".join(f"{share:.1%}" for share in matches)
    return f"{found}  exact match {statistics.mean(matches):.1%} ({shown})" if matches else found


if __name__ == "__main__":
    main()
