"""Words for messages: plural forms, shortened values, lists of problems, paths; and which numbers can be shown."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

_ABSOLUTE = r"(?<![\w.:~/-])/[^\s/'\"`,;:()]+/[^\s'\"`,;:()]+"


def pluralize(count: int, name: str = "row") -> str:
    """`1 row`, `2,000 rows`."""
    return f"{count:,} {name}" + ("" if count == 1 else "s")


def format_list(items: Sequence[str], limit: int = 20) -> str:
    """The first `limit` items, one indented line each, and how many more there are."""
    shown = "\n".join(f"  {item}" for item in items[:limit])
    rest = len(items) - limit
    return shown + (f"\n  … and {rest} more" if rest > 0 else "")


def shorten(value: object, limit: int = 60) -> str:
    """`repr(value)`, cut to `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "…"


def one_line(error: BaseException, limit: int = 300) -> str:
    """The text of an exception in one line of at most `limit` characters; the name of its type where it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def is_finite_number(value: object, integer: bool = False) -> bool:
    """Whether `value`, read from JSON, is a number that fits a float; with `integer`, one without a fraction.

    JSON from Python may hold NaN, infinity and integers beyond any float. True and False are not numbers.
    """
    is_number = isinstance(value, int if integer else (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max  # type: ignore[arg-type] # false for NaN


def without_absolute_paths(text: str) -> str:
    """`text` with each absolute path made relative to this folder: files of a run hold no absolute path."""
    here = os.getcwd().rstrip(os.sep) + os.sep
    return re.sub(_ABSOLUTE, lambda found: os.path.relpath(found[0]), text.replace(here, ""))


def size_text(gib: float) -> str:
    """`57 GiB`, `1.25 GiB`, `3.4 MiB`: with the digits that matter."""
    if gib >= 10:
        return f"{gib:.0f} GiB"
    return f"{gib:.2f} GiB" if gib >= 0.1 else f"{gib * 1024:.3g} MiB"
