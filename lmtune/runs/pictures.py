"""Pictures of a run as SVG, which browsers, editors and HTML pages show as it is: the confusion matrix of a classifier.

    write_text(run.confusion, confusion_svg(summary["classes"]))

A row is a right class, a column the class that was predicted. A cell is as dark as its share of the row, so that a rare
class is as easy to read as a frequent one; the numbers count rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from xml.sax.saxutils import escape

_CELL, _FONT, _LETTER = 48, 13, 7.4  # pixels; a letter's mean width
_LONGEST = 22  # letters of a class
_MOST_NUMBERS = 24  # classes whose cells have room for numbers; more are drawn smaller
_SMALL_CELL = 14
_INK, _DARK = "#1b1b1f", (22, 78, 140)


def confusion_svg(classes: Mapping[str, object]) -> str | None:
    """The confusion matrix of `classes`, as `summary.json` and `lmtune evaluate --json` hold them.

    None where rows have several classes, of which there is no such matrix.
    """
    labels, confusion = classes["labels"], classes["confusion"]
    if not confusion:
        return None
    assert isinstance(labels, (list, tuple))
    assert isinstance(confusion, (list, tuple))
    names = [_shown(str(label)) for label in labels]
    count, has_numbers = len(names), len(names) <= _MOST_NUMBERS
    cell = _CELL if has_numbers else _SMALL_CELL
    font = _FONT if has_numbers else 11
    room = max(map(len, names)) * _LETTER * font / _FONT + 16
    left, top = room + 28, room * 0.72 + 44  # names of columns are turned by 45 degrees
    width, height = left + count * cell + room * 0.72 + 12, top + count * cell + 14
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="sans-serif" font-size="{font}" role="img" '
        'aria-label="confusion matrix">',
        f'<rect width="100%" height="100%" fill="#ffffff"/><g fill="{_INK}">',
        f'<text x="{left:.0f}" y="20" font-weight="bold">predicted class</text>',
        f'<text transform="translate(18 {top + count * cell / 2:.0f}) rotate(-90)" text-anchor="middle" '
        'font-weight="bold">right class</text>',
    ]
    for index, name in enumerate(names):
        place = (index + 0.5) * cell
        parts.append(f'<text x="{left - 8:.0f}" y="{top + place + 4:.0f}" text-anchor="end">{name}</text>')
        parts.append(f'<text transform="translate({left + place + 4:.0f} {top - 8:.0f}) rotate(-45)">{name}</text>')
    parts.append("</g>")
    for row, counts in enumerate(confusion):
        for column, number in enumerate(counts):
            share = number / max(1, sum(counts))
            x, y = left + column * cell, top + row * cell
            said = f"{names[row]} as {names[column]}: {number:,} of {sum(counts):,}"
            parts.append(
                f'<g><title>{said}</title><rect x="{x:.0f}" y="{y:.0f}" width="{cell}" height="{cell}" '
                f'fill="{_colour(share)}" stroke="#c9cdd3"/>'
            )
            if has_numbers:
                ink = "#ffffff" if share > 0.55 else _INK
                parts.append(
                    f'<text x="{x + cell / 2:.0f}" y="{y + cell / 2 + 5:.0f}" text-anchor="middle" '
                    f'fill="{ink}">{_number(number)}</text>'
                )
            parts.append("</g>")
    return "\n".join([*parts, "</svg>\n"])


def _colour(share: float) -> str:
    """White for 0, dark for 1."""
    return "#" + "".join(f"{round(255 + (dark - 255) * share):02x}" for dark in _DARK)


def _number(value: int) -> str:
    """In at most six letters."""
    return f"{value:,}" if value < 100_000 else f"{value / 1000:,.0f}k"


def _shown(name: str) -> str:
    """A class for XML: one line, cut, without what XML cannot hold."""
    plain = " ".join("".join(letter if letter.isprintable() else " " for letter in name).split())
    return escape(plain if len(plain) <= _LONGEST else plain[: _LONGEST - 1] + "…")
