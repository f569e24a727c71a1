"""How an arm is measured: in a process of its own, one at a time, in turn with the others.

Each process keeps its arm ready and waits; the parent lets one after another do two steps (A B C A B C …), so that a
machine whose speed drifts drifts for all. The first of the two is not timed: while an arm waits, a machine may take its
memory away, which costs the one with the most memory the most. Time is wall time of forward, backward and update; CPU
seconds of the process stand beside it as a check that no other program had the cores.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MakeArm = Callable[..., Any]


@dataclass
class Measured:
    """What was seen of one arm; seconds are of a whole optimizer step."""

    name: str
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    trained_tokens: list[int] = field(default_factory=list)
    computed_tokens: list[int] = field(default_factory=list)
    peak_memory_gib: float = 0.0
    first_step_seconds: float = 0.0
    loss: float = float("nan")
    gradients: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    def rates(self) -> list[float]:
        """Real tokens per second of each repeat."""
        return [n / s for n, s in zip(self.tokens, self.seconds, strict=True)]

    def summary(self) -> dict[str, Any]:
        """For the JSON and the table."""
        rates = self.rates()
        return {
            "arm": self.name,
            "error": self.error,
            "tokens_per_second_median": round(statistics.median(rates), 1) if rates else None,
            "tokens_per_second_min": round(min(rates), 1) if rates else None,
            "tokens_per_second_max": round(max(rates), 1) if rates else None,
            "trained_tokens_per_second_median": round(
                statistics.median(t / s for t, s in zip(self.trained_tokens, self.seconds, strict=True)), 1
            )
            if rates
            else None,
            "cpu_seconds_per_wall_second": round(sum(self.cpu_seconds) / sum(self.seconds), 2) if rates else None,
            "computed_per_real_token": round(sum(self.computed_tokens) / sum(self.tokens), 3) if rates else None,
            "peak_memory_gib": round(self.peak_memory_gib, 2),
            "first_step_seconds": round(self.first_step_seconds, 2),
            "repeats": len(rates),
        }


class ArmProcess:
    """One arm in its own process."""

    def __init__(self, name: str, make: MakeArm, rows_of: Callable[[int], list[Any]]) -> None:
        self.measured = Measured(name)
        context = multiprocessing.get_context("spawn")
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(there, make, rows_of), daemon=True)
        self.started = time.perf_counter()
        self.process.start()
        self._ask("ready", 0)

    def first_step(self) -> None:
        """Its loss and gradients, and the time from the start of the process to its end."""
        answer = self._ask("first", 0)
        if answer is not None:
            self.measured.loss, self.measured.gradients = answer
            self.measured.first_step_seconds = time.perf_counter() - self.started

    def repeat(self, number: int) -> None:
        """Two steps, the second of them timed; `number` counts from 1."""
        self._ask("warm", 2 * number - 1)
        answer = self._ask("step", 2 * number)
        if answer is not None:
            seconds, cpu_seconds, tokens, trained, computed, peak = answer
            self.measured.seconds.append(seconds)
            self.measured.cpu_seconds.append(cpu_seconds)
            self.measured.tokens.append(tokens)
            self.measured.trained_tokens.append(trained)
            self.measured.computed_tokens.append(computed)
            self.measured.peak_memory_gib = max(self.measured.peak_memory_gib, peak)

    def stop(self) -> None:
        """End the process."""
        if self.process.is_alive():
            self.pipe.send(("stop", 0))
            self.process.join(20)
        if self.process.is_alive():
            self.process.terminate()

    def _ask(self, what: str, step: int) -> Any:
        if self.measured.error is not None:
            return None
        try:
            self.pipe.send((what, step))
            kind, answer = self.pipe.recv()
        except (EOFError, BrokenPipeError):
            kind, answer = "error", "the process died (out of memory?)"
        if kind == "error":
            self.measured.error = answer
            return None
        return answer


class ArmHere(ArmProcess):
    """One arm in this process, beside the others: quicker to begin with, but their peak memory is not told apart."""

    def __init__(self, name: str, make: MakeArm, rows_of: Callable[[int], list[Any]]) -> None:
        self.measured, self.started = Measured(name), time.perf_counter()
        self.answers: _Answers | None = _Answers(make, rows_of)
        self._ask("ready", 0)

    def stop(self) -> None:
        """Let go of it."""
        self.answers = None

    def _ask(self, what: str, step: int) -> Any:
        if self.measured.error is not None or self.answers is None:
            return None
        kind, answer = self.answers(what, step)
        if kind == "error":
            self.measured.error = answer
            return None
        return answer


class _Answers:
    """An arm that does what it is asked for: be ready, the first step, a step that is timed."""

    def __init__(self, make: MakeArm, rows_of: Callable[[int], list[Any]]) -> None:
        self.make, self.rows_of, self.arm = make, rows_of, None

    def __call__(self, what: str, step: int) -> tuple[str, Any]:
        try:
            if what == "ready":
                self.arm = self.make()
                return "ok", None
            if what == "first":
                return "ok", self._first(self.rows_of(step))
            return "ok", _timed(self.arm, self.rows_of(step))
        except Exception:
            return "error", traceback.format_exc(limit=3)

    def _first(self, rows: list[Any]) -> tuple[float, dict[str, Any]]:
        arm: Any = self.arm
        loss = arm.step(rows)
        gradients = {n: p.grad.detach().float().cpu().clone().numpy() for n, p in arm.parameters.items()}
        arm.update()
        return loss, gradients


def _serve(pipe: Any, make: MakeArm, rows_of: Callable[[int], list[Any]]) -> None:
    """Answer the parent's questions until it says stop."""
    answers = _Answers(make, rows_of)
    while (asked := pipe.recv())[0] != "stop":
        pipe.send(answers(*asked))


def _timed(arm: Any, rows: list[Any]) -> tuple[float, float, int, int, int, float]:
    import torch

    tokens = sum(len(d.input_ids) for row in rows for d in row.sequences)
    trained = sum(int(d.loss_mask.sum()) for row in rows for d in row.sequences)
    on_gpu = arm.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    arm.computed = 0
    cpu, began = time.process_time(), time.perf_counter()
    arm.step(rows)
    arm.update()
    if on_gpu:
        torch.cuda.synchronize()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    if on_gpu:
        peak = torch.cuda.max_memory_allocated() / 2**30
    else:
        peak = peak_resident_gib()
    return seconds, cpu, tokens, trained, arm.computed, peak


def peak_resident_gib() -> float:
    """The most memory this process has had; unlike `ru_maxrss` it does not begin with that of the parent."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 2**20


def load_average() -> float:
    """Programs that wanted to run in the last minute."""
    return round(os.getloadavg()[0], 2)
