"""The curves of a run: what was measured at each step and at each evaluation, as charts and as `loss.png`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lmtune.io.atomic import name_disk_errors
from lmtune.runs.charts import Mark, Series, line_chart, scales_of, short, smoothed, thinned
from lmtune.runs.events import Evaluated, Event, StepDone, read_events
from lmtune.runs.log import StepRecord, step_records
from lmtune.runs.store import RunDirectory

_PICTURE = (1200, 640)  # pixels
_ROOM = (96, 30, 66, 70)  # left, right, above, below
_INK, _SOFT = "#1b1b1f", "#565d68"
_COLOURS = {"raw": "#c4cad3", "smooth": "#1f6feb", "validation": "#c2410c"}
_OF_RUNS = ("#1f6feb", "#c2410c", "#157f3c", "#8250df", "#9a6700", "#bf3989")
_SHOWN_METRICS = 8  # of an objective


@dataclass(frozen=True)
class Curves:
    """What was measured.

    Attributes:
        steps: in their order.
        evaluations: of the validation rows, in the order of their steps.
        best_step: the step whose weights were kept; None where the last one's were.
    """

    steps: Sequence[StepRecord]
    evaluations: Sequence[Evaluated]
    best_step: int | None

    @classmethod
    def of(cls, run: RunDirectory, events: Sequence[Event] | None = None) -> Curves:
        """Read the run; a step done again after a resume counts once."""
        events = read_events(run) if events is None else events
        steps = {event.step: event for event in events if isinstance(event, StepDone)}
        scored = {event.step: event for event in events if isinstance(event, Evaluated) and event.of == "validation"}
        best = run.read_summary().tree.get("best_step")
        found: Sequence[StepRecord] = [steps[number] for number in sorted(steps)] or step_records(run)
        return cls(found, [scored[number] for number in sorted(scored)], best if isinstance(best, int) else None)

    def loss(self) -> list[Series]:
        """The training loss of each step, smoothed, and the validation loss."""
        x, y = [step.step for step in self.steps], [step.loss for step in self.steps]
        return [
            Series("each step", x, y, "raw"),
            Series("smoothed", x, smoothed(y, [step.trained_tokens or 1 for step in self.steps]), "smooth"),
            *self.scored("loss", "validation"),
        ]

    def scored(self, name: str, title: str, style: str = "validation") -> list[Series]:
        """A score of the validation rows; nothing where it was not measured."""
        points = [(event.step, value) for event in self.evaluations if (value := event.scores.get(name)) is not None]
        return [Series(title, [x for x, _ in points], [y for _, y in points], style, has_dots=True)] if points else []

    def marks(self) -> list[Mark]:
        """The best step."""
        return [] if self.best_step is None else [Mark(f"best step {self.best_step}", self.best_step)]


def charts_of(curves: Curves, max_grad_norm: float | None) -> list[str]:
    """Loss, learning rate, gradient norm, speed, and the metrics of the objective and of the validation rows."""
    if not curves.steps:
        return []
    x = [step.step for step in curves.steps]
    rates = [step.learning_rate for step in curves.steps]
    norms = [step.grad_norm for step in curves.steps]
    speeds = [step.tokens / max(step.seconds, 1e-9) for step in curves.steps]
    clipped = [Mark(f"clipped at {max_grad_norm:g}", max_grad_norm, False)] if max_grad_norm is not None else []
    if clipped and not any(norm > max_grad_norm / 4 for norm in norms if max_grad_norm):
        clipped = []  # far above what was measured, it would only press the curve flat
    charts = [
        line_chart("Loss", curves.loss(), curves.marks()),
        line_chart("Learning rate", [Series("learning rate", x, rates, "smooth")]),
        line_chart("Gradient norm", _with_mean("each step", x, norms), clipped),
        line_chart("Speed, tokens a second", _with_mean("each step", x, speeds)),
    ]  # fmt: skip
    named = dict.fromkeys(name for step in curves.steps for name in step.metrics)
    measured = dict.fromkeys(
        name for event in curves.evaluations for name, value in event.scores.items() if value is not None
    )
    for name in list(dict.fromkeys([*named, *measured]))[:_SHOWN_METRICS]:
        if name in ("loss", "perplexity", "rows", "exact_match_rows"):
            continue
        points = [(step.step, step.metrics[name]) for step in curves.steps if name in step.metrics]
        lines = _with_mean("training", [a for a, _ in points], [b for _, b in points]) if points else []
        lines += curves.scored(name, "validation")
        charts.append(line_chart(name.replace("_", " ").capitalize(), lines, curves.marks()))
    return charts


def _with_mean(name: str, x: Sequence[float], y: Sequence[float]) -> list[Series]:
    return [Series(name, x, y, "raw"), Series("smoothed", x, smoothed(y, [1.0] * len(y)), "smooth")]


def loss_png(curves: Sequence[Curves], names: Sequence[str], path: Path) -> None:
    """Draw the loss of a run, or the smoothed losses of several, into `path`: for a slide or a pull request."""
    from PIL import Image, ImageDraw, ImageFont

    lines = _lines(curves, names)
    x, y = scales_of([one for one, _ in lines], (), _PICTURE, _ROOM)
    picture = Image.new("RGB", _PICTURE, "#ffffff")
    draw = ImageDraw.Draw(picture)
    small, large = ImageFont.load_default(18), ImageFont.load_default(24)
    draw.text((x.start, 14), "Loss" if len(names) > 1 else f"Loss of {names[0]}", fill=_INK, font=large)
    for value in y.ticks():
        draw.line([(x.start, y(value)), (x.end, y(value))], fill="#e5e8ec")
        draw.text((x.start - 10, y(value)), short(value), fill=_SOFT, font=small, anchor="rm")
    for value in x.ticks(1.0):
        draw.text((x(value), y.start + 12), short(value), fill=_SOFT, font=small, anchor="mt")
    draw.text((x.end, y.start + 40), "step", fill=_SOFT, font=small, anchor="rt")
    for mark in curves[0].marks() if len(curves) == 1 else ():
        draw.line([(x(mark.at), y.end), (x(mark.at), y.start)], fill=_SOFT)
        draw.text((x(mark.at) - 8, y.end + 4), mark.name, fill=_SOFT, font=small, anchor="ra")
    left = x.start
    for one, colour in lines:
        points = [(x(a), y(b)) for a, b in thinned(one.x, one.y)]
        if len(points) > 1:
            draw.line(points, fill=colour, width=2 if one.style == "raw" else 3, joint="curve")
        for a, b in points if one.has_dots or len(points) == 1 else ():
            draw.ellipse([a - 4, b - 4, a + 4, b + 4], fill=colour)
        draw.line([(left, 54), (left + 26, 54)], fill=colour, width=4)
        draw.text((left + 34, 54), one.name, fill=_INK, font=small, anchor="lm")
        left += 60 + draw.textlength(one.name, font=small)
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with name_disk_errors(path):
            picture.save(staged, format="PNG", optimize=True)
            os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def _lines(curves: Sequence[Curves], names: Sequence[str]) -> list[tuple[Series, str]]:
    """The lines of the picture with their colours."""
    if len(curves) == 1:
        return [(one, _COLOURS[one.style]) for one in curves[0].loss()] if curves[0].steps else []
    return [
        (replace(own.loss()[1], name=name), _OF_RUNS[number % len(_OF_RUNS)])
        for number, (own, name) in enumerate(zip(curves, names, strict=True)) if own.steps
    ]  # fmt: skip
