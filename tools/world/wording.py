"""Plain English from templates: `[a|b|c]` is one of several wordings, `{slot}` a word or number from a list.

    expand("[When|What time] do you open?")  ->  ("When do you open?", "What time do you open?")
    fill("We open at {morning}.", rng)       ->  "We open at 8:15 am."

Everything drawn comes from the `random.Random` passed in, so the same seed gives the same text.
"""

from __future__ import annotations

import itertools
import re
from random import Random

from tools.world.words import SLOTS

_CHOICE = re.compile(r"\[([^\]]*)\]")
_SLOT = re.compile(r"\{([a-z_]+)\d?\}")


def expand(template: str) -> tuple[str, ...]:
    """Every wording of `template`, in order of the alternatives."""
    parts = _CHOICE.split(template)
    options = [part.split("|") if index % 2 else [part] for index, part in enumerate(parts)]
    return tuple("".join(choice) for choice in itertools.product(*options))


def fill(template: str, rng: Random) -> str:
    """`template` with each slot replaced by a random entry of its list.

    A digit tells slots of one kind apart (`{country} and {country2}`): they get different entries.
    """
    taken: set[str] = set()

    def draw(match: re.Match[str]) -> str:
        choices = SLOTS[match[1]]
        value = rng.choice(choices)
        while value in taken and len(choices) > len(taken):
            value = rng.choice(choices)
        taken.add(value)
        return value

    return _SLOT.sub(draw, template)


def normalized(text: str) -> str:
    """`text` in lower case with nothing but words and numbers: two questions with equal ones have the same wording."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower().replace("'", "")))


def sentence(text: str) -> str:
    """`text` with its first letter in upper case."""
    return text[:1].upper() + text[1:]
