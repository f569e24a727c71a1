"""What a browser sends, which may be anything: read here into settings and text, or refused by name.

Gradio's own checks of a component's value end in a traceback on the terminal, so the page takes values as they come.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from lmtune.errors import LmtuneError
from lmtune.inference.engine import Sampling
from lmtune.inference.load import LoadedModel
from lmtune.serve.studio.conversation import MODES, Mode, Settings

MAX_CHARACTERS = 100_000


def settings_of(values: Sequence[Any], models: Sequence[LoadedModel]) -> Settings:
    """The panel's values: model, mode, system prompt, temperature, top p, most tokens, seed.

    Raises:
        LmtuneError: naming a value that is out of bounds.
    """
    model, mode, system, temperature, top_p, max_new_tokens, seed = values
    index = index_of(model, len(models))
    wanted = mode_of(mode)
    chosen: Mode = wanted if models[index].has_adapter else "tuned"
    number: Any = seed  # the page sends text, programs also numbers
    if not isinstance(seed, int):
        text = text_of(seed, "seed").strip()
        is_number = text.isdecimal() and len(text) <= 10  # Python refuses to read numbers of over 4,300 digits
        number = random.randrange(2**32) if not text else int(text) if is_number else text[:60]
    options = Sampling(temperature, top_p, _integral(max_new_tokens), number)
    return Settings(index, chosen, text_of(system, "system prompt"), options)


def index_of(value: Any, num_models: int) -> int:
    """Which model is meant.

    Raises:
        LmtuneError: there is none of that number.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < num_models:
        raise LmtuneError(f"model: got {value!r}; should be a whole number from 0 to {num_models - 1}")
    return value


def mode_of(value: Any) -> Mode:
    """Who is to answer.

    Raises:
        LmtuneError: that is nobody.
    """
    for mode in MODES:
        if value == mode:
            return mode
    raise LmtuneError(f"answers from: got {repr(value)[:60]}; should be one of {', '.join(MODES)}")


def place_of(value: Any) -> int:
    """Which message was changed: its number, or a list that begins with it.

    Raises:
        LmtuneError: it is something else.
    """
    number = value[0] if isinstance(value, list) and value else value
    if isinstance(number, bool) or not isinstance(number, int):
        raise LmtuneError(f"message: got {repr(value)[:60]}; should be the number of the one that was changed")
    return number


def text_of(value: Any, name: str) -> str:
    """A text that can be encoded; nothing is an empty one.

    Raises:
        LmtuneError: it is something else, too long, or holds half a character.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise LmtuneError(f"{name}: got {repr(value)[:60]}; should be text")
    if len(value) > MAX_CHARACTERS:
        raise LmtuneError(f"{name}: got {len(value):,} characters; should be at most {MAX_CHARACTERS:,}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise LmtuneError(f"{name}: holds half a character (a lone surrogate); type it again") from None
    return value


def _integral(value: Any) -> Any:
    """Sliders send 256.0 for 256; anything else is for `Sampling` to refuse."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
