"""What a person sees while a run trains: a live bar with loss, tokens/s and time left, or plain lines in a log file.

Rates are over the last steps, so that they follow the machine; tokens are real ones, never padding.
"""

from __future__ import annotations

import time
from collections import deque
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lmtune.io.console import err, plain_bars

_LOG_EVERY_SECONDS = 10.0


class StepProgress:
    """A context manager; `advance` after each step. Silent where `enabled` is false (all processes but the first)."""

    def __init__(self, total_steps: int, first_step: int, enabled: bool = True) -> None:
        self.enabled, self.total_steps = enabled, total_steps
        self._recent: deque[tuple[int, float]] = deque(maxlen=20)
        self._last_line = time.monotonic()
        narrow = err.width < 72
        bar = [] if narrow else [BarColumn()]
        self._bar = Progress(
            TextColumn("training"), *bar, MofNCompleteColumn(), TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(compact=True), console=err, transient=False,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=total_steps, completed=first_step - 1, text="")
        self._live = enabled and err.is_terminal and not err.quiet
        self._plain: Any = None
        if enabled and plain_bars():
            from tqdm import tqdm

            self._plain = tqdm(total=total_steps, initial=first_step - 1, desc="training", unit="step")

    def __enter__(self) -> StepProgress:
        if self._live:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._bar.stop()
        if self._plain is not None:
            self._plain.close()

    def advance(self, step: int, loss: float, num_tokens: int, seconds: float) -> None:
        """Step number `step`, from 1, is done."""
        if not self.enabled:
            return
        self._recent.append((num_tokens, seconds))
        rate = sum(n for n, _ in self._recent) / max(1e-9, sum(s for _, s in self._recent))
        text = f"loss {loss:.3f} · {rate:,.0f} tok/s"
        if self._plain is not None:
            self._plain.set_postfix_str(text, refresh=False)
            self._plain.update(step - self._plain.n)
        elif self._live:
            self._bar.update(self._task, completed=step, text=text)
        elif step == self.total_steps or time.monotonic() - self._last_line >= _LOG_EVERY_SECONDS:
            self._last_line = time.monotonic()
            left = (self.total_steps - step) * sum(s for _, s in self._recent) / len(self._recent)
            err.print(f"step {step}/{self.total_steps} · {text} · {left:,.0f} s left")

    def say(self, message: str) -> None:
        """A line above the bar."""
        if self.enabled:
            (self._bar.console if self._live else err).print(message)
