"""What a sweep may choose: ranges and lists of values for keys of the config, as `--over` writes them.

    train.learning_rate=1e-5..1e-3:log     a range; `:log` for one of magnitudes, `:0.1` for a step
    tuning.rank=4,16,64                    values; lists and sections in brackets: tuning.parts=[head],[head,norms]

Whether a range is of whole numbers is found by asking the config whether it takes another. Every end and every value is
checked by the config before anything is loaded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from lmtune.config.load import build_config, with_overrides
from lmtune.config.schema import FinetuneConfig, settings_error
from lmtune.config.yaml import read_yaml_value
from lmtune.errors import ConfigError
from lmtune.io.text import shorten

_NUMBER = r"[+-]?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})((?::[^:]*)*)")
_FORM = "LOW..HIGH, LOW..HIGH:log, LOW..HIGH:STEP, or A,B,C"
# What a trial is, and what all trials are measured by, is the sweep's.
_NOT_SEARCHED = ("run", "parallel", "evaluation")
Texts = Mapping[str, str]  # the value of each key, as the command line writes it


@dataclass(frozen=True)
class Choice:
    """What one key may be.

    Attributes:
        key: `section.key`.
        text: as it was written.
        values: its values as YAML; none for a range.
        low, high, step: of a range; a step of None is any number in it.
        is_log: drawn by magnitude.
        is_whole: of whole numbers.
    """

    key: str
    text: str
    values: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    is_log: bool = False
    is_whole: bool = False

    @property
    def examples(self) -> tuple[str, ...]:
        """Each value, or the ends of the range."""
        return self.values or (self.written(self.low), self.written(self.high))

    def written(self, value: float | str) -> str:
        """A value as YAML writes it."""
        if isinstance(value, str):
            return value
        return str(round(value)) if self.is_whole else repr(float(value))

    @property
    def count(self) -> float:
        """How many values there are; infinity for a range of any numbers."""
        if self.values:
            return len(self.values)
        step = self.step or (1.0 if self.is_whole and not self.is_log else None)
        return math.inf if step is None else math.floor((self.high - self.low) / step + 1e-9) + 1


@dataclass(frozen=True)
class Space:
    """All keys of a sweep.

    Attributes:
        config: what the other settings are.
        choices: of each key.
    """

    config: FinetuneConfig
    choices: tuple[Choice, ...]

    def configured(self, values: Texts) -> FinetuneConfig:
        """The settings with these values; ConfigError if they do not fit together."""
        return _with(self.config, values)

    def combinations(self, most: int) -> list[dict[str, str]]:
        """Every combination of values, or none where there are more than `most`."""
        if math.prod(choice.count for choice in self.choices) > most or any(not one.values for one in self.choices):
            return []
        keys = [choice.key for choice in self.choices]
        return [dict(zip(keys, values, strict=True)) for values in product(*(one.values for one in self.choices))]


def read_space(config: FinetuneConfig, words: Sequence[str]) -> Space:
    """The space that the words of `--over` mean; a key with one value is no choice, and becomes a setting.

    Raises:
        ConfigError: with every fault, each by `section.key`.
    """
    choices, problems = list[Choice](), list[str]()
    for word in words:
        try:
            choices.append(_choice(word))
        except ValueError as fault:
            problems.append(str(fault))
    keys = [choice.key for choice in choices]
    problems += [f"{key}: given twice" for key in dict.fromkeys(keys) if keys.count(key) > 1]
    problems += [problem for choice in choices if (problem := _no_search(choice.key, config))]
    if problems:
        raise settings_error("--over", problems)
    config = _with(config, {one.key: one.values[0] for one in choices if len(one.values) == 1}, "--over")
    choices = [one for one in choices if len(one.values) != 1]
    if not choices:
        raise ConfigError(f"--over: nothing to choose; expected KEY={_FORM}")
    choices = [_with_kind(config, choice, choices) for choice in choices]
    _check_each(config, choices)
    return Space(config, tuple(choices))


def _choice(word: str) -> Choice:
    """One word; ValueError says what is wrong with it."""
    key, equals, text = (part.strip() for part in word.partition("="))
    if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
        raise ValueError(f"{shorten(word)}: expected KEY={_FORM}")
    if not text:
        raise ValueError(f"{key}: no values; expected {_FORM}")
    found = _RANGE.fullmatch(text)
    if found is None:
        if ".." in text and re.match(_NUMBER, text):
            raise ValueError(f"{key}: got {text}; expected {_FORM}")
        values = _split(text)
        if "" in values:
            raise ValueError(f"{key}: got {text}; a value is missing beside a comma")
        if double := [value for value in dict.fromkeys(values) if values.count(value) > 1]:
            raise ValueError(f"{key}: {double[0]} is given twice")
        return Choice(key, text, tuple(values))
    low, high = float(found[1]), float(found[2])
    marks = found[3].split(":")[1:]
    steps = [mark for mark in marks if mark != "log"]
    is_log = "log" in marks
    if not low < high:
        raise ValueError(f"{key}: got {text}; the first number must be below the second")
    if len(steps) > 1 or (steps and not (re.fullmatch(_NUMBER, steps[0]) and float(steps[0]) > 0)):
        raise ValueError(f"{key}: got {text}; behind a range stands :log or :STEP, a step above 0")
    if is_log and steps:
        raise ValueError(f"{key}: got {text}; a range has a step or :log, not both")
    if is_log and low <= 0:
        raise ValueError(f"{key}: got {text}; a range of magnitudes (:log) begins above 0")
    return Choice(key, text, (), low, high, float(steps[0]) if steps else None, is_log)


def _split(text: str) -> list[str]:
    """The parts between the commas that stand in no brackets and no quotes."""
    parts, depth, quote = [""], 0, ""
    for mark in text:
        if quote:
            quote = "" if mark == quote else quote
        elif mark in "\"'":
            quote = mark
        elif mark in "[{":
            depth += 1
        elif mark in "]}":
            depth -= 1
        elif mark == "," and not depth:
            parts.append("")
            continue
        parts[-1] += mark
    return [part.strip() for part in parts]


def _no_search(key: str, config: FinetuneConfig) -> str | None:
    """Why a key cannot be searched, or None."""
    section = key.partition(".")[0]
    if section in _NOT_SEARCHED:
        return f"{key}: cannot be searched: all trials are scored and kept alike"
    if (section == "data" or key == "train.seed") and config.data.validation is None:
        return (
            f"{key}: other values hold out other rows, and scores of other rows say nothing; name data.validation, a "
            "file of its own"
        )
    return f"{key}: cannot be searched" if key.startswith("data.validation") else None


def _with(config: FinetuneConfig, values: Texts, where: str = "a trial of the sweep") -> FinetuneConfig:
    if not values:
        return config
    read = {key: read_yaml_value(text, where=key) for key, text in values.items()}
    return build_config(FinetuneConfig, with_overrides(config, read), where)


def _with_kind(config: FinetuneConfig, choice: Choice, choices: Sequence[Choice]) -> Choice:
    """A range as one of whole numbers where the config takes no others."""
    if choice.values or not choice.low.is_integer() or not choice.high.is_integer():
        return choice
    between = choice.low + 0.5 if choice.step is None else choice.step
    if not between.is_integer():
        others = _first(choice, choices)
        try:
            _with(config, {**others, choice.key: repr(between)})
        except ConfigError:
            between = 1.0
    if between.is_integer():
        return Choice(choice.key, choice.text, (), choice.low, choice.high, choice.step, choice.is_log, True)
    return choice


def _first(choice: Choice, choices: Sequence[Choice]) -> dict[str, str]:
    """The first value of each other key; a kind decides which keys there are, so it comes along."""
    return {one.key: one.examples[0] for one in choices if one is not choice}


def _check_each(config: FinetuneConfig, choices: Sequence[Choice]) -> None:
    """ConfigError with every value that the config refuses, beside the first values of the other keys."""
    problems: dict[str, None] = {}
    for choice in choices:
        for value in choice.examples:
            try:
                _with(config, {**_first(choice, choices), choice.key: value})
            except ConfigError as error:
                problems |= dict.fromkeys(line.strip() for line in str(error).splitlines()[1:] or [str(error)])
    if problems:
        raise settings_error("--over", list(problems))


def shown(values: Texts) -> str:
    """`train.learning_rate=0.0002 tuning.rank=16`."""
    return " ".join(f"{key}={short(value)}" for key, value in values.items())


def short(value: str) -> str:
    """A number in four digits, anything else as it is."""
    try:
        return f"{float(value):.4g}"
    except ValueError:
        return value
