"""Values that come by no request, as a guard refuses those, but by the page of a program that serves it itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lmtune.errors import LmtuneError
from lmtune.serve.request import settings_of
from tests.ui.client import GOOD


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (2, "\ud83d", "system prompt: holds half a character"),
        (3, float("nan"), "temperature: nan"),
        (3, float("inf"), "temperature: inf"),
        (3, 10**400, "temperature: 1000"),
        (4, -(10**400), "top_p: -1000"),
        (4, float("nan"), "top_p: nan"),
        (5, float("nan"), "max_new_tokens: nan"),
        (6, "\ud83d", "seed: holds half a character"),
        (6, "1" * 5000, "seed: '1{60}'"),  # found by the long search
        (6, "99999999999", "seed: '99999999999'"),
    ],
)
def test_what_is_no_number_or_no_text_is_named(place: int, value: Any, said: str) -> None:
    values = [*GOOD]
    values[place] = value
    models: Any = [SimpleNamespace(has_adapter=True)]
    with pytest.raises(LmtuneError, match=said.replace(";", ".")):
        settings_of(values, models)
