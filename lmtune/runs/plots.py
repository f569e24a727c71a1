"""Plots as SVG, which browsers, editors and HTML pages show as it is: curves and points, bars, parallel coordinates.

    svg = curves_svg("Range test", Axis.of("learning rate", rates, is_log=True), Axis.of("loss", losses), [curve])

Every point and line carries its values as a title, which a browser shows under the pointer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

_WIDTH, _HEIGHT = 720, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 76, 24, 44, 56
_INK, _GREY, _BLUE, _RED = "#1b1b1f", "#c9cdd3", "#164e8c", "#b3261e"
_LONGEST = 34  # letters of a name
_TICKS = 6


@dataclass(frozen=True)
class Axis:
    """One axis, from `low` to `high`; of names, each at its number from 0."""

    title: str
    low: float
    high: float
    is_log: bool = False
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, title: str, values: Sequence[float], is_log: bool = False) -> Axis:
        """The axis that holds all of `values`, with some room; without finite values from 0 to 1."""
        known = [value for value in values if math.isfinite(value) and (value > 0 or not is_log)]
        if not known:
            return cls(title, 0.1 if is_log else 0.0, 1.0, is_log)
        low, high = min(known), max(known)
        if is_log:
            return cls(title, low / 1.1, high * 1.1, True)
        room = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
        return cls(title, low - room, high + room)

    @classmethod
    def of_names(cls, title: str, names: Sequence[str]) -> Axis:
        """One place for each name."""
        return cls(title, -0.5, len(names) - 0.5, names=tuple(names))

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high one."""
        low, high, at = (math.log(part) if self.is_log else part for part in (self.low, self.high, value))
        return (at - low) / (high - low)

    def ticks(self) -> list[tuple[float, str]]:
        """Places and texts of round values."""
        if self.names:
            return [(self.place(number), name) for number, name in enumerate(self.names)]
        values = _decades(self.low, self.high) if self.is_log else _round_values(self.low, self.high)
        return [(self.place(value), f"{value:g}") for value in values]


@dataclass(frozen=True)
class Curve:
    """Points `(x, y, what a browser shows of it)`, joined by a line or each for itself; one that is not finite is left
    out."""

    name: str
    points: Sequence[tuple[float, float, str]]
    is_line: bool = True
    is_strong: bool = False


def curves_svg(
    title: str, x: Axis, y: Axis, curves: Sequence[Curve], mark: tuple[float, str] | None = None
) -> str:  # fmt: skip
    """Curves and points over two axes; `mark` is a vertical line at an x, with what it means."""
    parts = [*_frame(title), *_axes(x, y)]
    for curve in curves:
        color = _BLUE if curve.is_strong else "#7d8590"
        known = [(*_at(x, y, a, b), said) for a, b, said in curve.points if math.isfinite(a) and math.isfinite(b)]
        if curve.is_line and known:
            places = " ".join(f"{left:.1f},{top:.1f}" for left, top, _ in known)
            width = 2 if curve.is_strong else 1
            parts.append(f'<polyline points="{places}" fill="none" stroke="{color}" stroke-width="{width}">'
                         f"<title>{escape(curve.name)}</title></polyline>")  # fmt: skip
        else:
            parts += [
                f'<circle cx="{left:.1f}" cy="{top:.1f}" r="4" fill="{color}"><title>{escape(said)}</title></circle>'
                for left, top, said in known
            ]
    for number, curve in enumerate(curves):
        color = _BLUE if curve.is_strong else "#7d8590"
        parts.append(f'<text x="{_WIDTH - _RIGHT - 4}" y="{_TOP + 16 + 17 * number}" text-anchor="end" '
                     f'fill="{color}">{escape(_cut(curve.name))}</text>')  # fmt: skip
    if mark is not None:
        left = _LEFT + x.place(mark[0]) * (_WIDTH - _LEFT - _RIGHT)
        anchor, shift = ("end", -6) if x.place(mark[0]) > 0.5 else ("start", 6)
        parts.append(f'<path d="M{left:.1f} {_TOP}V{_HEIGHT - _BOTTOM}" stroke="{_RED}" stroke-dasharray="5 4"/>'
                     f'<text x="{left + shift:.1f}" y="{_HEIGHT - _BOTTOM - 10}" text-anchor="{anchor}" '
                     f'fill="{_RED}">{escape(mark[1])}</text>')  # fmt: skip
    return _document(parts)


def bars_svg(title: str, names: Sequence[str], values: Sequence[float]) -> str:
    """A horizontal bar for each name, as long as its value, which is 0 or more."""
    row, left = 30, 268
    height = _TOP + row * len(names) + 20
    most = max([*values, 1e-12])
    parts = _frame(title, height)
    for number, (name, value) in enumerate(zip(names, values, strict=True)):
        top, length = _TOP + row * number, (_WIDTH - left - 90) * value / most
        parts.append(f'<text x="{left - 8}" y="{top + 19}" text-anchor="end">{escape(_cut(name))}</text>'
                     f'<rect x="{left}" y="{top + 4}" width="{length:.1f}" height="{row - 10}" fill="{_BLUE}"/>'
                     f'<text x="{left + length + 6:.1f}" y="{top + 19}">{value:.3g}</text>')  # fmt: skip
    return _document(parts, height)


def parallel_svg(title: str, axes: Sequence[Axis], lines: Sequence[tuple[Sequence[float], float, str]]) -> str:
    """Parallel coordinates: a vertical axis for each setting, a line for each trial.

    Args:
        title: above it.
        axes: from left to right.
        lines: for each trial its values on the axes, how good it is from 0 to 1, and what a browser shows.
    """
    width, left, right = max(_WIDTH, 150 * len(axes) + 80), 64, 84
    top, bottom = _TOP + 34, _HEIGHT - 26
    parts = _frame(title, _HEIGHT, width)
    places = [left + (width - left - right) * number / max(1, len(axes) - 1) for number in range(len(axes))]
    for values, good, said in sorted(lines, key=lambda line: line[1]):
        at = [
            (x, bottom - axis.place(value) * (bottom - top))
            for x, axis, value in zip(places, axes, values, strict=True)
        ]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{_shade(good)}" stroke-width="{1 + good:.1f}">'
                     f"<title>{escape(said)}</title></polyline>")  # fmt: skip
    for x, axis in zip(places, axes, strict=True):
        parts.append(f'<path d="M{x:.1f} {top}V{bottom}" stroke="{_INK}"/>'
                     f'<text x="{x:.1f}" y="{top - 14}" text-anchor="middle" font-weight="bold">'
                     f"{escape(_cut(axis.title, 22))}</text>")  # fmt: skip
        parts += [
            f'<text x="{x + 6:.1f}" y="{bottom - place * (bottom - top) + 4:.1f}" font-size="11" stroke="#ffffff" '
            f'stroke-width="3" paint-order="stroke">{escape(_cut(text, 16))}</text>'
            for place, text in axis.ticks()
        ]
    return _document(parts, _HEIGHT, width)


def _frame(title: str, height: int = _HEIGHT, width: int = _WIDTH) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="13" fill="{_INK}" role="img" aria-label={quoteattr(title)}>',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="16" y="26" font-size="15" font-weight="bold">{escape(title)}</text>',
    ]


def _axes(x: Axis, y: Axis) -> list[str]:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = []
    for place, text in x.ticks():
        left = _LEFT + place * (right - _LEFT)
        parts.append(f'<path d="M{left:.1f} {_TOP}V{bottom}" stroke="{_GREY}" stroke-width="0.6"/>'
                     f'<text x="{left:.1f}" y="{bottom + 18}" text-anchor="middle">{escape(text)}</text>')  # fmt: skip
    for place, text in y.ticks():
        top = bottom - place * (bottom - _TOP)
        parts.append(f'<path d="M{_LEFT} {top:.1f}H{right}" stroke="{_GREY}" stroke-width="0.6"/>'
                     f'<text x="{_LEFT - 8}" y="{top + 4:.1f}" text-anchor="end">{escape(text)}</text>')  # fmt: skip
    middle = (_TOP + bottom) / 2
    return [
        *parts,
        f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" fill="none" stroke="{_INK}"/>',
        f'<text x="{(_LEFT + right) / 2:.0f}" y="{_HEIGHT - 14}" text-anchor="middle">{escape(x.title)}</text>',
        f'<text transform="translate(18 {middle:.0f}) rotate(-90)" text-anchor="middle">{escape(y.title)}</text>',
    ]


def _at(x: Axis, y: Axis, a: float, b: float) -> tuple[float, float]:
    """Pixels of a point; one above the plot is drawn at its edge."""
    across, up = (min(1.0, max(0.0, axis.place(value))) for axis, value in ((x, a), (y, b)))
    return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _BOTTOM - _TOP)


def _document(parts: Sequence[str], height: int = _HEIGHT, width: int = _WIDTH) -> str:
    return "\n".join([*parts, "</svg>\n"])


def _round_values(low: float, high: float) -> list[float]:
    """About six values of one, two or five times a power of ten."""
    rough = (high - low) / _TICKS
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [round(number * step, 12) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten, or, over less than two of them, one, two and five times."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if high / low > 100 else (1, 2, 5)
    found = [factor * 10.0**power for power in powers for factor in factors]
    return [value for value in found if low <= value <= high]


def _shade(good: float) -> str:
    """Light grey for 0, dark blue for 1."""
    light, dark = (205, 209, 214), (22, 78, 140)
    return "#" + "".join(f"{round(a + (b - a) * good):02x}" for a, b in zip(light, dark, strict=True))


def _cut(name: str, longest: int = _LONGEST) -> str:
    plain = "".join(letter if letter.isprintable() else " " for letter in name)
    return plain if len(plain) <= longest else plain[: longest - 1] + "…"
