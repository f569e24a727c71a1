"""Charts as SVG that an HTML page colours by its own style sheet, light or dark: lines over steps, and bars.

    line_chart("Loss", [Series("each step", steps, losses, "raw"), Series("smoothed", steps, smooth, "smooth")])

A chart of any number of steps has a bounded size: of each stretch of steps the lowest and the highest value are drawn,
so that no spike is lost. The scales stand in `data-` attributes, from which the page's script reads values back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 230  # pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 12, 10, 34
_MOST_STRETCHES = 400  # of two points each
_TICKS = 5


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    Attributes:
        x, y: its points, in the order of x.
        style: the class by which the page colours it: raw, smooth, validation, or run0, run1, …
        has_dots: whether each point is marked; for few points.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: str
    has_dots: bool = False


@dataclass(frozen=True)
class Mark:
    """A line across a chart, down (`at` is an x) or along (`at` is a y); its name stands in the legend."""

    name: str
    at: float
    is_vertical: bool = True


@dataclass(frozen=True)
class Scale:
    """From values to pixels, and where to write numbers."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The place of a value in pixels."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, least: float = 0.0) -> list[float]:
        """Round values inside the scale, about five, at least `least` apart; whole ones if that is 1."""
        raw = max((self.high - self.low) / _TICKS, least)
        power = 10.0 ** math.floor(math.log10(raw))
        steps = [power * factor for factor in (1, 2, 2.5, 5, 10)]
        step = next(step for step in steps if raw <= step * 1.0001 and (least < 1 or step.is_integer()))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def scales_of(
    series: Sequence[Series], marks: Sequence[Mark] = (), size: tuple[float, float] = (WIDTH, HEIGHT),
    room: tuple[float, float, float, float] = (_LEFT, _RIGHT, _TOP, _BOTTOM),
) -> tuple[Scale, Scale]:  # fmt: skip
    """The scales of x and y that hold all points, in a picture of `size` with `room` left, right, above and below."""
    xs = [value for one in series for value in one.x]
    ys = [value for one in series for value in one.y] + [mark.at for mark in marks if not mark.is_vertical]
    low, high = (min(ys), max(ys)) if ys else (0.0, 1.0)
    margin = (high - low) * 0.06 or abs(high) * 0.06 or 1.0
    first, last = (min(xs), max(xs)) if xs else (0.0, 1.0)
    left, right, top, bottom = room
    return (
        Scale(first, last if last > first else first + 1, left, size[0] - right),
        Scale(0.0 if low == 0 else low - margin, high + margin, size[1] - bottom, top),
    )


def thinned(x: Sequence[float], y: Sequence[float], stretches: int = _MOST_STRETCHES) -> list[tuple[float, float]]:
    """At most two points a stretch, and the last one: the lowest and the highest of each."""
    if len(x) <= 2 * stretches:
        return list(zip(x, y, strict=True))
    kept = [0]
    for number in range(stretches):
        part = range(number * len(x) // stretches, (number + 1) * len(x) // stretches)
        kept += sorted({min(part, key=y.__getitem__), max(part, key=y.__getitem__)})
    return [(x[index], y[index]) for index in dict.fromkeys([*kept, len(x) - 1])]


def smoothed(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """At each place the mean of the values around, by `weights`; those farther off count less. It does not lag.

    It falls off by 1/e in a hundredth of all, at most 100.
    """
    keep = math.exp(-1 / max(1.0, min(len(values) / 100, 100.0)))

    def decaying(numbers: Sequence[float]) -> list[float]:
        """At each place the sum of what comes before it, fading."""
        total, sums = 0.0, []
        for number in numbers:
            sums.append(total)
            total = keep * (total + number)
        return sums

    products = [value * weight for value, weight in zip(values, weights, strict=True)]
    totals, counts = (
        [a + b + own for a, b, own in zip(decaying(one), decaying(one[::-1])[::-1], one, strict=True)]
        for one in (products, list(weights))
    )
    return [total / count if count else value for total, count, value in zip(totals, counts, values, strict=True)]


def line_chart(title: str, series: Sequence[Series], marks: Sequence[Mark] = ()) -> str:
    """A figure with a legend; every text in it may hold anything."""
    x, y = scales_of(series, marks)
    parts = [
        f'<figure class="chart"><figcaption>{escape(title)}{_legend(series, marks)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" data-x="{_numbers(x)}" '
        f'data-y="{_numbers(y)}">',
        *_axes(x, y),
    ]
    for one in series:
        points = thinned(one.x, one.y)
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
        parts.append(f'<polyline class="line {one.style}" data-name="{escape(one.name)}" points="{path}"/>')
        if one.has_dots or len(points) == 1:
            parts += [f'<circle class="dot {one.style}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="3"/>' for a, b in points]
    parts += [_mark(mark, x, y) for mark in marks]
    parts.append('<line class="cursor" y1="10" y2="196" hidden/></svg><output></output></figure>')
    return "".join(parts)


def bar_chart(
    title: str, edges: Sequence[float], groups: Sequence[tuple[str, Sequence[float], str]], mark: Mark | None
) -> str:
    """A histogram: of each group its name, its counts between the edges, and its class; `mark` is the limit."""
    most = max((count for _, counts, _ in groups for count in counts), default=1) or 1
    x = Scale(0.0, max(edges[-1], 0.0 if mark is None else mark.at) * 1.02, _LEFT, WIDTH - _RIGHT)
    y = Scale(0.0, most * 1.06, HEIGHT - _BOTTOM, _TOP)
    marks = [] if mark is None else [mark]
    legend = _legend([Series(name, [], [], style) for name, _, style in groups], marks)
    parts = [
        f'<figure class="chart"><figcaption>{escape(title)}{legend}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        *_axes(x, y, "tokens", least=1.0),
    ]
    for place, (name, counts, style) in enumerate(groups):
        for low, high, count in zip(edges, edges[1:], counts, strict=False):
            if count:
                wide = (x(high) - x(low)) / len(groups)
                said = f"{name}: {count:,.0f} of {low:,.0f} to {high:,.0f} tokens"
                parts.append(
                    f'<rect class="bar {style}" x="{x(low) + place * wide:.1f}" y="{y(count):.1f}" '
                    f'width="{max(1.0, wide - 1):.1f}" height="{max(1.0, y(0) - y(count)):.1f}">'
                    f"<title>{escape(said)}</title></rect>"
                )
    parts += [_mark(one, x, y) for one in marks]
    return "".join([*parts, "</svg></figure>"])


def stacked_bars(title: str, bars: Sequence[tuple[str, Sequence[tuple[str, float]]]], unit: str) -> str:
    """A bar a line, of parts that add up: `[("estimated", [("base weights", 1.5), …]), ("measured", …)]`."""
    most = max((sum(size for _, size in parts) for _, parts in bars), default=0.0) or 1.0
    lines = [f'<figure class="chart bars"><figcaption>{escape(title)}</figcaption>']
    for name, parts in bars:
        total = sum(size for _, size in parts)
        cells = "".join(
            f'<span class="part part{number}" style="width:{100 * size / most:.2f}%" '
            f'title="{escape(part)}: {short(size)} {unit}"></span>'
            for number, (part, size) in enumerate(parts)
        )
        keys = "".join(
            f'<span class="key part{number}">{escape(part)} {short(round(size, 3))}</span> '
            for number, (part, size) in enumerate(parts) if parts[1:] and size >= most / 1000
        )  # fmt: skip
        lines.append(
            f'<div class="barline"><b>{escape(name)}</b> {short(round(total, 3))} {unit}'
            f'<div class="stack">{cells}</div>{keys}</div>'
        )
    return "".join([*lines, "</figure>"])


def short(value: float) -> str:
    """A number in few letters."""
    if value and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e").replace(".0e", "e")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _axes(x: Scale, y: Scale, unit: str = "step", least: float = 0.0) -> list[str]:
    parts = []
    for value in y.ticks(least):
        place = y(value)
        parts.append(f'<line class="grid" x1="{x.start}" x2="{x.end}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{x.start - 6}" y="{place + 3.5:.1f}" text-anchor="end">{short(value)}</text>'
        )
    for value in x.ticks(1.0):
        anchor = "end" if x(value) > x.end - 16 else "middle"
        parts.append(
            f'<text class="tick" x="{x(value):.1f}" y="{y.start + 16}" text-anchor="{anchor}">{short(value)}</text>'
        )
    parts.append(f'<text class="tick" x="{x.end}" y="{y.start + 30}" text-anchor="end">{unit}</text>')
    parts.append(f'<line class="axis" x1="{x.start}" x2="{x.end}" y1="{y.start}" y2="{y.start}"/>')
    return parts


def _mark(mark: Mark, x: Scale, y: Scale) -> str:
    if mark.is_vertical:
        line = f'x1="{x(mark.at):.1f}" x2="{x(mark.at):.1f}" y1="{y.end}" y2="{y.start}"'
    else:
        line = f'x1="{x.start}" x2="{x.end}" y1="{y(mark.at):.1f}" y2="{y(mark.at):.1f}"'
    return f'<line class="mark" {line}/>'


def _legend(series: Sequence[Series], marks: Sequence[Mark]) -> str:
    """The names of the lines, where there are several; in the plot they could lie on a curve."""
    names = [(one.style, one.name) for one in series] if len(series) > 1 else []
    names += [("mark", one.name) for one in marks]
    return "".join(f'<span class="key {style}">{escape(name)}</span>' for style, name in names)


def _numbers(scale: Scale) -> str:
    return " ".join(f"{value:.6g}" for value in (scale.low, scale.high, scale.start, scale.end))
