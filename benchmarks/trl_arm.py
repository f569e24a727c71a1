"""TRL's SFTTrainer as an arm: the real trainer, held at each optimizer step until the comparison asks for the next.

`trainer.train()` runs in a thread; callbacks at the beginning of a step, before the optimizer and at the end of a step
hand control back and forth, so that what is timed is the trainer's own forward, backward, clipping and update.
"""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.arms import Arm, register_varlen
from benchmarks.workload import Workload

ROWS_AT_ONCE = 8  # TRL's default per_device_train_batch_size


class Trl(Arm):
    """SFTTrainer on the rows of the workload's steps, in their order.

    Args:
        at_once: rows of a forward pass.
        best: padding-free and without checkpointing, instead of its defaults; which is quicker, many rows at once or
            one, depends on the attention.
        varlen: on GPUs, with PyTorch's varlen attention registered instead of the masked one.
        liger: with Liger's kernels and loss, by TRL's own setting.
    """

    def __init__(
        self, work: Workload, folder: Path, device: str, dtype: Any, steps: int, at_once: int = ROWS_AT_ONCE,
        best: bool = False, varlen: bool = False, liger: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(work, folder, device, dtype)
        self.at_once = min(at_once, work.batch_size)
        if work.batch_size % self.at_once:
            raise ValueError(f"TRL cannot make steps of {work.batch_size} rows from batches of {self.at_once}")
        if varlen:
            register_varlen()
            self.model.get_base_model().set_attn_implementation("bench_varlen")
        self.gate = _Gate()
        self.losses: list[Any] = []
        self.trainer = self._trainer(folder, steps, best, liger)
        self.thread = threading.Thread(target=self._train, daemon=True)
        self.thread.start()
        self.gate.wait("step")

    def step(self, rows: list[Any]) -> float:
        """Let the trainer go on until just before its optimizer; its rows are those of the same step."""
        self.losses.clear()
        self.gate.go_on()
        self.gate.wait("gradients")
        return float(sum(self.losses))

    def update(self) -> None:
        """Let it step its optimizer."""
        self.gate.go_on()
        self.gate.wait("done")
        self.gate.go_on()
        self.gate.wait("step")

    def _train(self) -> None:
        try:
            self.trainer.train()
            self.gate.arrive("step", hold=False)  # all steps are done
        except BaseException as error:
            self.gate.fail(error)

    def _trainer(self, folder: Path, steps: int, best: bool, liger: bool) -> Any:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        rows = [row.sequences[0] for step in range(steps) for row in self.work.rows(step)]
        data = Dataset.from_list([
            {"input_ids": d.input_ids.tolist(),
             "labels": [int(i) if t else -100 for i, t in zip(d.input_ids, d.loss_mask, strict=True)]}
            for d in rows
        ])  # fmt: skip
        chosen: dict[str, Any] = {"max_length": self.work.max_length}
        if best:
            chosen = {"padding_free": True, "gradient_checkpointing": False, "max_length": None}
        on_cpu, base = self.device.type == "cpu", self.model.get_base_model()
        config = SFTConfig(
            output_dir=str(folder / "trl"), use_cpu=on_cpu, bf16=base.dtype == torch.bfloat16, learning_rate=1e-4,
            lr_scheduler_type="constant", max_grad_norm=1e9, max_steps=steps, report_to="none", save_strategy="no",
            per_device_train_batch_size=self.at_once,
            gradient_accumulation_steps=self.work.batch_size // self.at_once,
            train_sampling_strategy="sequential", disable_tqdm=True, logging_strategy="no",
            dataset_kwargs={"skip_prepare_dataset": True}, seed=self.work.seed, use_liger_kernel=liger, **chosen,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=self.model, args=config, train_dataset=data, processing_class=self.work.tokenizer(),
            callbacks=[_Hold(self.gate)],
        )  # fmt: skip
        return self.counted(trainer)

    def counted(self, trainer: Any) -> Any:
        """`trainer`, whose positions and losses are noted."""
        plain = trainer.compute_loss

        def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.computed += inputs["input_ids"].numel()
            result = plain(model, inputs, *args, **kwargs)
            loss = result[0] if isinstance(result, tuple) else result
            self.losses.append(loss.detach())
            return result

        trainer.compute_loss = compute_loss
        return trainer


class _Gate:
    """Two threads of which one runs at a time."""

    def __init__(self) -> None:
        self.arrived: queue.Queue[Any] = queue.Queue()
        self.released: queue.Queue[None] = queue.Queue()

    def arrive(self, where: str, hold: bool = True) -> None:
        """In the trainer's thread: say where it is, and wait to be let on."""
        self.arrived.put(where)
        if hold:
            self.released.get()

    def fail(self, error: BaseException) -> None:
        """In the trainer's thread: it ended."""
        self.arrived.put(error)

    def wait(self, where: str) -> None:
        """Until the trainer's thread is there."""
        got = self.arrived.get()
        if isinstance(got, BaseException):
            raise got
        assert got == where, (got, where)

    def go_on(self) -> None:
        """Let the trainer's thread on."""
        self.released.put(None)


class _Hold(TrainerCallback):
    def __init__(self, gate: _Gate) -> None:
        self.gate = gate

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.gate.arrive("step")

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.gate.arrive("gradients")

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.gate.arrive("done")
