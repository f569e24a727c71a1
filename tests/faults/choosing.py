"""Which of many like cases run each time."""

from collections.abc import Iterable
from typing import Any

import pytest


def few(kinds: Iterable[Any], *now: Any) -> list[Any]:
    """All kinds as parameters: those of `now` in every test run, the others, which differ little, in the long one."""
    return [kind if kind in now else pytest.param(kind, marks=pytest.mark.long) for kind in kinds]
