"""The labels of rows as numbers: which classes there are, and which of them, or what value, each row has.

    classes = find_classes(labels, location)          # Classes(("negative", "positive"), many=False)
    class_numbers(classes, labels, location)          # [N], or [N, K] of 0 and 1 where labels are lists

A label that cannot be used is a `DataError` that names the row by `file:line`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmtune.data.report import label_name
from lmtune.data.types import Label
from lmtune.errors import DataError
from lmtune.io.text import format_list, shorten

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Labels = Sequence[Label | None]
Location = Callable[[int], str]  # of a row, by its number
_SHOWN = 8


@dataclass(frozen=True)
class Classes:
    """What rows may be.

    Attributes:
        names: sorted, numbers by size.
        many: a row has any number of them, since labels are lists; else one.
    """

    names: tuple[str, ...]
    many: bool


def find_classes(labels: Labels, location: Location) -> Classes:
    """The classes that rows are labelled with.

    Raises:
        DataError: a label is a number with decimals, or all rows are of one class.
    """
    found: dict[str, Label] = {}
    for row, label in enumerate(labels):
        if isinstance(label, float) and not label.is_integer():
            raise DataError(
                f"{location(row)}: label {label:g} is no class but a number; set objective.kind: regression, or write "
                "the class as a text"
            )
        for one in _each(label):
            found.setdefault(label_name(one), one)
    names = sorted(found, key=lambda name: _order(found[name]))
    many = any(isinstance(label, tuple) for label in labels)
    if len(names) < 2 and not many:
        raise DataError(
            f"every row has the label {shorten(names[0])}; classification needs rows of two classes or more"
        )
    return Classes(tuple(names), many)


def class_numbers(classes: Classes, labels: Labels, location: Location) -> npt.NDArray[np.float32]:
    """The class of each row `[N]`, or which classes it has `[N, K]` where it may have several.

    Raises:
        DataError: with each row whose label is none of the classes.
    """
    import numpy as np

    number = {name: index for index, name in enumerate(classes.names)}
    unknown = [
        f"{location(row)}: {shorten(label_name(one))}"
        for row, label in enumerate(labels) for one in _each(label) if label_name(one) not in number
    ]  # fmt: skip
    if unknown:
        known = ", ".join(classes.names[:_SHOWN]) + (", …" if len(classes.names) > _SHOWN else "")
        raise DataError(f"labels that no training row has; known are {known}\n{format_list(unknown)}")
    if not classes.many:
        several = [location(row) for row, label in enumerate(labels) if isinstance(label, tuple)]
        if several:
            raise DataError(f"{several[0]}: label is a list; the training rows have one class each")
        return np.array([number[label_name(one)] for label in labels for one in _each(label)], dtype=np.float32)
    found = np.zeros((len(labels), len(number)), dtype=np.float32)
    for row, label in enumerate(labels):
        found[row, [number[label_name(one)] for one in _each(label)]] = 1
    return found


def label_values(labels: Labels, location: Location) -> npt.NDArray[np.float32]:
    """The number that each row is labelled with, `[N]`.

    Raises:
        DataError: with each row whose label is none.
    """
    import numpy as np

    wrong = [
        f"{location(row)}: label {shorten(label_name(label))}"
        for row, label in enumerate(labels)
        if label is not None and (isinstance(label, bool) or not isinstance(label, (int, float)))
    ]  # fmt: skip
    if wrong:
        raise DataError(
            f"labels that are no numbers; write numbers, or set objective.kind: classification\n{format_list(wrong)}"
        )
    return np.array(labels, dtype=np.float32)


def _each(label: Label | None) -> tuple[Label, ...]:
    """The classes of a row."""
    assert label is not None
    return label if isinstance(label, tuple) else (label,)


def _order(label: Label) -> tuple[bool, float, str]:
    is_number = not isinstance(label, (str, tuple))
    return not is_number, float(label) if is_number else 0.0, label_name(label)  # type: ignore[arg-type]
