"""What counts as a number in what others wrote: JSON has NaN, and whole numbers beyond any float."""

from __future__ import annotations

import os
import re
import sys


def is_finite_number(value: object, whole: bool = False) -> bool:
    """Whether `value` is a number that can be computed with and shown, and with `whole` one without a fraction.

    A truth is none, though Python takes it for one.
    """
    is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max  # type: ignore[arg-type] # NaN is not


def without_absolute_paths(text: str) -> str:
    """`text` with each absolute path in it made relative to this folder, as it may be written to a run's files."""
    here = os.getcwd().rstrip(os.sep) + os.sep
    return re.sub(_ABSOLUTE, lambda found: os.path.relpath(found[0]), text.replace(here, ""))


_ABSOLUTE = r"(?<![\w.:~/-])/[^\s/'\"`,;:()]+/[^\s'\"`,;:()]+"
