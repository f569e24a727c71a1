"""What a run knows of itself: where it is, how it ended, and what must be equal for it to be continued."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from lmtune.config.load import to_tree
from lmtune.config.schema import FinetuneConfig
from lmtune.models.tuning.base import Tensors

# Settings that change speed, memory or reporting; the result they change only as far as dropout is drawn anew.
_FREE = {
    "train.micro_batch_tokens", "train.gradient_checkpointing", "evaluation.score_base",
    "evaluation.exact_match_rows", "evaluation.max_new_tokens", "data.train", "data.validation", "tuning.adapter",
}  # fmt: skip
_DATA, _TOKENS = "the data files' content", "the rows' tokens"
_BASE, _START = "the base model's weights", "the starting adapter's weights"


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

    def to_dict(self) -> dict[str, int | float | None]:
        """For `state.json`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, int | float | None]) -> TrainState:
        """The state of a checkpoint; what another version has added is left out."""
        known = {part.name for part in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})  # type: ignore[arg-type]


@dataclass(frozen=True)
class TrainResult:
    """How training ended.

    Attributes:
        state: as of the last step.
        weights: what to keep: the best step's if validation decided that, else None, which is the model's own.
        stopped_early: whether patience ended the run.
    """

    state: TrainState
    weights: Tensors | None
    stopped_early: bool


@dataclass(frozen=True)
class RunSignature:
    """What must be equal for a checkpoint to be continued.

    Data counts by its tokens, not by its path or by what made them; by all that they depend on where one of two runs
    has no such hash, as runs of earlier versions. The base and the adapter to begin from count by their weights.

    Attributes:
        settings: of the config, by `section.key`, as JSON values.
        data: of all that the tokens depend on.
        base: of the base's weights.
        tokens: of the tokens.
        start: of the weights of the adapter that training begins from.
    """

    settings: Mapping[str, object]
    data: str
    base: str
    tokens: str | None = None
    start: str | None = None

    @classmethod
    def of(
        cls, config: FinetuneConfig, data: str, base: str, tokens: str | None = None, start: str | None = None
    ) -> RunSignature:
        """The signature of a run with these settings."""
        flat = {
            f"{section}.{key}": value
            for section, values in to_tree(config).items()
            if section not in ("run", "parallel")
            for key, value in values.items()
        }
        return cls(without_free_settings(flat), data, base, tokens, start)

    def to_dict(self) -> dict[str, object]:
        """For `state.json`: flat, each part under its name for people."""
        parts = {_DATA: self.data, _TOKENS: self.tokens, _BASE: self.base, _START: self.start}
        return {**self.settings, **{key: value for key, value in parts.items() if value is not None}}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> RunSignature:
        """The signature in a checkpoint."""
        settings = {_today(key): value for key, value in values.items() if "." in key}
        text = {key: str(value) for key, value in values.items() if "." not in key}
        return cls(
            without_free_settings(settings), text.get(_DATA, ""), text.get(_BASE, ""), text.get(_TOKENS),
            text.get(_START),
        )  # fmt: skip


def without_free_settings(settings: Mapping[str, object]) -> dict[str, object]:
    """Those that decide the result."""
    return {key: value for key, value in settings.items() if key not in _FREE}


def _today(key: str) -> str:
    """The name of a setting in this version: `tuning` was `adapter`."""
    section, _, name = key.partition(".")
    return f"tuning.{'kind' if name == 'method' else name}" if section == "adapter" else key
