"""Who decides about the steps of `prepare`: the person at the terminal, the flags, or an earlier plan."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lmtune.data.prepare.found import Found, counted_rows
from lmtune.data.prepare.plan import Replay
from lmtune.data.prepare.preparing import UNUSABLE
from lmtune.data.prepare.settings import Settings
from lmtune.data.prepare.steps import STEPS
from lmtune.errors import ConfigError
from lmtune.io.console import err, escape, out
from lmtune.io.questions import confirm

NAMES = (UNUSABLE, *(step.name for step in STEPS))


@dataclass(frozen=True)
class Decided:
    """What is decided before a row is read.

    Attributes:
        steps: those that are applied; None: those that are recommended.
        asks: the person at the terminal decides about each.
    """

    steps: frozenset[str] | None = None
    asks: bool = False

    @classmethod
    def of(cls, yes: bool, no: bool, steps: str | None, earlier: Replay | None) -> Decided:
        """What the flags say.

        Raises:
            ConfigError: they contradict each other, name a step that there is not, or nobody can be asked.
        """
        flags = {"--yes": yes, "--no": no, "--steps": steps is not None, "--replay": earlier is not None}
        given = [flag for flag, is_given in flags.items() if is_given]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)}: each says which steps are applied; give one")
        if earlier is not None:
            return cls(earlier.steps)
        if steps is not None:
            return cls(frozenset(_known(name.strip()) for name in steps.split(",") if name.strip()))
        if not given and not sys.stdin.isatty():
            raise ConfigError(
                "which steps to apply: questions need a terminal; give --yes (every recommended step), --no (none), "
                f"--steps LIST, or --replay PLAN; the steps are {', '.join(NAMES)}"
            )
        return cls(frozenset() if no else None, not given)

    def beforehand(self, name: str, recommended: bool) -> bool | None:
        """Whether a step is applied, unless the person is to be asked."""
        if self.asks:
            return None
        return recommended if self.steps is None else name in self.steps

    def asked(self, name: str, question: str, found: Found, recommended: bool) -> bool:
        """The answer of the person; without one, what is recommended."""
        if not self.asks:
            if recommended:
                self.done(question.rstrip("?"), found)
            return recommended
        for example in found.examples:
            err.print(f"  {escape(example)}")
        mark = "recommended" if recommended else "optional"
        return confirm(f"[{mark}] {counted_rows(found.count, question)}", recommended)

    def done(self, what: str, found: Found) -> None:
        """Say what a step has done."""
        counts = ", ".join(f"{name} {count:,}" for name, count in found.kinds.most_common(8))
        kinds = f" ({counts})" if counts else ""
        out.print(escape(counted_rows(found.count, what) + kinds))
        for example in found.examples:
            out.print(f"  [dim]{escape(example)}[/]")

    def said(self, lines: Sequence[str]) -> None:
        """Say what was read."""
        for line in lines:
            out.print(escape(line))


def _known(name: str) -> str:
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"; is {near[0]} meant?" if near else ""
        raise ConfigError(f"--steps: {name}: not a step{hint}; the steps are {', '.join(NAMES)}")
    return name


def chosen_settings(given: Mapping[str, Any], earlier: Replay | None) -> Settings:
    """The settings that options say, in place of those of an earlier plan, or of the defaults.

    Raises:
        ConfigError: one of them cannot be used.
    """
    values = {name: value for name, value in given.items() if value is not None}
    if "language" in values:
        values["language"] = tuple(code.strip().lower() for code in values["language"].split(",") if code.strip())
    if "columns" in values:
        values["columns"] = tuple(values["columns"])
    if "validation" in values:
        values["validation"] = _validation(values["validation"])
    return replace(earlier.settings if earlier else Settings(), **values)


def _validation(text: str) -> float | str:
    try:
        share = float(text)
    except ValueError:
        return text
    if not 0 < share < 1:
        raise ConfigError(f"--validation: {text}; expected a share between 0 and 1, or a file of rows")
    return share
