"""What a run knows of itself: where it is, how it ended, and what must be equal for it to be continued."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from lmtune.config.load import to_tree
from lmtune.config.schema import FinetuneConfig
from lmtune.models.tuning.base import Tensors

# Settings that change speed, memory or reporting; the result they change only as far as dropout is drawn anew.
_FREE = {
    "model.offload", "model.resident_layers", "train.micro_batch_tokens", "train.gradient_checkpointing",
    "evaluation.score_base",
    "evaluation.exact_match_rows", "evaluation.max_new_tokens", "data.train", "data.validation", "tuning.adapter",
}  # fmt: skip
_DATA, _TOKENS = "the data files' content", "the rows' tokens"
_BASE, _START = "the base model's weights", "the starting adapter's weights"
_SELECTION = "the selected rows"


@dataclass
class TrainState:
    """What changes from step to step besides the tensors; part of each checkpoint."""

    step: int = 0
    elapsed_tokens: int = 0
    elapsed_examples: int = 0
    seconds: float = 0.0
    micro_batch_tokens: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    evaluations_without_gain: int = 0

    @classmethod
    def from_dict(cls, values: Mapping[str, int | float | None]) -> TrainState:
        """The state in a checkpoint; what another version has added is left out."""
        known = {part.name for part in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})  # type: ignore[arg-type]


@dataclass(frozen=True)
class TrainResult:
    """How training ended."""

    state: TrainState  # as of the last step
    weights: Tensors | None  # the best step's, where validation chose an earlier one; None is the model's own
    stopped_early: bool  # by patience


@dataclass(frozen=True)
class RunSignature:
    """What must be equal for a checkpoint to be continued: settings that decide the result, and hashes.

    Data counts by its tokens, not by its path or by what made them; base and starting adapter by their weights.
    """

    settings: Mapping[str, object]  # by `section.key`, as JSON values
    data: str  # of all that the tokens depend on
    base: str  # of the base's weights
    tokens: str | None = None  # of the tokens
    start: str | None = None  # of the weights of the adapter that training begins from
    selection: str | None = None  # of which of the rows are used; None is as the settings say

    @classmethod
    def of(
        cls, config: FinetuneConfig, data: str, base: str, tokens: str | None = None, start: str | None = None,
        selection: str | None = None,
    ) -> RunSignature:  # fmt: skip
        """The signature of a run with these settings."""
        flat = {
            f"{section}.{key}": value
            for section, values in to_tree(config).items()
            if section not in ("run", "parallel")
            for key, value in values.items()
            if f"{section}.{key}" not in _FREE
        }
        return cls(flat, data, base, tokens, start, selection)

    def to_dict(self) -> dict[str, object]:
        """For `state.json`: flat, each part under its name for people."""
        parts = {
            _DATA: self.data, _TOKENS: self.tokens, _BASE: self.base, _START: self.start, _SELECTION: self.selection
        }  # fmt: skip
        return {**self.settings, **{key: value for key, value in parts.items() if value is not None}}

    def differences(self, other: RunSignature) -> list[str]:
        """What another process of the same job has otherwise, by its name, with both values where they are short."""
        mine, others = self.to_dict(), other.to_dict()
        unlike = [key for key in mine.keys() | others.keys() if mine.get(key) != others.get(key)]
        if self.tokens is not None and _TOKENS not in unlike:  # whatever made them
            unlike = [key for key in unlike if key != _DATA]
        return [f"{key}: {others.get(key)!r}, not {mine.get(key)!r}" if "." in key else key for key in sorted(unlike)]

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> RunSignature:
        """The signature in a checkpoint."""
        settings = {_today(key): value for key, value in values.items() if "." in key}
        text = {key: str(value) for key, value in values.items() if "." not in key}
        return cls(settings, text[_DATA], text[_BASE], text.get(_TOKENS), text.get(_START), text.get(_SELECTION))


def _today(key: str) -> str:
    """The name of a setting in this version: `tuning` was `adapter`, its `kind` was `method`."""
    section, _, name = key.partition(".")
    return f"tuning.{'kind' if name == 'method' else name}" if section == "adapter" else key
