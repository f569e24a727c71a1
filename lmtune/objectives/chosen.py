"""The objective that a section of the config stands for, by the section's type, and the head that it needs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any

from lmtune.config.schema import (
    ClassificationConfig,
    DpoConfig,
    IpoConfig,
    KtoConfig,
    ObjectiveConfig,
    OrpoConfig,
    RegressionConfig,
    RewardConfig,
    SftConfig,
    SimpoConfig,
)
from lmtune.data.labels import class_numbers, find_classes, label_values
from lmtune.data.store import LoadedData, TokenizedData
from lmtune.models.head import Head, HeadKind, padding_token
from lmtune.objectives.base import Objective
from lmtune.objectives.classification import Classification, Regression
from lmtune.objectives.preference import Dpo, Ipo, Kto, Orpo, Simpo
from lmtune.objectives.reward import Reward
from lmtune.objectives.sft import Sft

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OBJECTIVES: dict[type, Callable[[Any, Any], Objective]] = {
    SftConfig: lambda section, head: Sft(),
    DpoConfig: lambda section, head: Dpo(section),
    IpoConfig: lambda section, head: Ipo(section),
    OrpoConfig: lambda section, head: Orpo(section),
    SimpoConfig: lambda section, head: Simpo(section),
    KtoConfig: lambda section, head: Kto(section),
    ClassificationConfig: Classification,
    RegressionConfig: lambda section, head: Regression(head),
    RewardConfig: lambda section, head: Reward(head),
}
_OF_HEAD: dict[HeadKind, ObjectiveConfig] = {
    "single_label": ClassificationConfig(), "multi_label": ClassificationConfig(), "value": RegressionConfig(),
    "reward": RewardConfig(),
}  # fmt: skip
_ROWS_LOOKED_AT = 1000  # for the tokens that rows end in; these are few


def objective_of(section: ObjectiveConfig, head: Head | None = None) -> Objective:
    """The objective with the section's settings; `head` is that of the model, if it is a classifier."""
    return _OBJECTIVES[type(section)](section, head)


def objective_for(head: Head) -> Objective:
    """The objective by which a classifier is scored of which nothing else is known."""
    return objective_of(_OF_HEAD[head.kind], head)


def find_head(
    section: ObjectiveConfig, data: LoadedData, tokenizer: PreTrainedTokenizerBase, seed: int, has_template: bool
) -> Head | None:
    """The head that a run trains, from the labels of its rows; None where it trains a language model.

    Args:
        section: of the config.
        data: its rows.
        tokenizer: in which a padding token is looked for.
        seed: of the head's first weights.
        has_template: whether prompts are rendered by a chat template.

    Raises:
        DataError: a label cannot be used; names `file:line`.
    """
    if type(section) not in _OUTPUTS:
        return None
    parts = [data.train, *([data.validation] if data.validation is not None else [])]
    kind, names = _OUTPUTS[type(section)](data)
    sequences = chain.from_iterable(
        part[row].sequences for part in parts for row in range(min(len(part), _ROWS_LOOKED_AT))
    )
    pad = padding_token(tokenizer, (int(sequence.input_ids[-1]) for sequence in sequences))
    chat = has_template and all(format != "text/label" for format in data.train.report.formats.values())
    return Head(kind, names, pad, chat, seed)


def unread_head(section: ObjectiveConfig) -> Head | None:
    """As `find_head`, before any row is read: with one output, since others weigh next to nothing."""
    return Head("value", ("value",)) if type(section) in _OUTPUTS else None


def _classes(data: LoadedData) -> tuple[HeadKind, tuple[str, ...]]:
    """Those of the training rows, and of rows that were held out from among them."""
    own, held_out = data.train, data.validation
    same_files = held_out is not None and held_out.report is own.report
    parts: list[TokenizedData] = [own, held_out] if held_out is not None and same_files else [own]
    places = [(part, row) for part in parts for row in range(len(part))]
    labels = [label for part in parts for label in part.labels]
    classes = find_classes(labels, lambda index: places[index][0].location(places[index][1]))
    if held_out is not None and not same_files:
        class_numbers(classes, held_out.labels, held_out.location)
    return ("multi_label" if classes.many else "single_label"), classes.names


def _value(data: LoadedData) -> tuple[HeadKind, tuple[str, ...]]:
    for part in (data.train, data.validation):
        if part is not None:
            label_values(part.labels, part.location)
    return "value", ("value",)


_OUTPUTS: dict[type, Callable[[LoadedData], tuple[HeadKind, tuple[str, ...]]]] = {
    ClassificationConfig: _classes, RegressionConfig: _value, RewardConfig: lambda data: ("reward", ("reward",)),
}  # fmt: skip
