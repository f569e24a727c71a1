"""Partial tuning: some of the model's own weights learn, named by what they are or by a regular expression.

    Partial(PartialConfig(parts=("head", "last_4_layers")), base)

The result is a plain model folder, as of full tuning.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch

from lmtune.config.schema import Dtype, ModelConfig, PartialConfig
from lmtune.errors import ConfigError
from lmtune.io.sandbox import match_too_slowly
from lmtune.io.text import shorten
from lmtune.models.head import classifier_head
from lmtune.models.structure import decoder_layers, embeddings, heads, norms
from lmtune.models.tuning.base import TunedModel
from lmtune.models.tuning.full import Full, learning

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LAST = re.compile(r"last_([1-9]\d*)_layers?")
_PARTS: dict[str, Callable[[PreTrainedModel], Sequence[torch.nn.Module]]] = {
    "head": heads, "embeddings": embeddings, "norms": norms,
}  # fmt: skip


class Partial(Full):
    """Named parts of the model's weights; decay, saving and loading are those of full tuning."""

    kind: ClassVar[str] = "partial"
    load_dtype: ClassVar[Dtype | None] = None

    def __init__(self, config: PartialConfig, base: ModelConfig | None = None) -> None:
        """
        Args:
            config: the parts.
            base: the stored model; None where nothing is saved.
        """
        super().__init__(base)
        self.config = config

    def changed(self, base: PreTrainedModel) -> Iterable[torch.nn.Parameter]:
        """The parts."""
        return find_parameters(base, self.config.parts).values()

    def apply(self, base: PreTrainedModel, seed: int, base_name: str) -> TunedModel:
        """Let the parts of `base` learn, in fp32.

        Raises:
            ConfigError: a part is unknown, or names nothing in this model.
        """
        return learning(base, find_parameters(base, self.config.parts))


def find_parameters(model: PreTrainedModel, parts: str | Sequence[str]) -> dict[str, torch.nn.Parameter]:
    """The parameters that `parts` name, in the model's order; the model may be on the meta device.

    A head that is tied to the embeddings is one parameter with them. The head of a classifier always learns.

    Args:
        model: without an adapter.
        parts: names of parts, or a regular expression on full names of parameters.

    Raises:
        ConfigError: a part is unknown, or names nothing in this model.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    head = classifier_head(model)
    chosen: set[int] = set() if head is None else {id(parameter) for parameter in head.parameters()}
    for part in (parts,) if isinstance(parts, str) else parts:
        found = _named(model, part) if re.fullmatch(r"\w+", part) else _matching(part, own)
        if not found:
            raise ConfigError(f"tuning.parts: nothing in this model is named {shorten(part)}; {_known(model)}")
        chosen |= {id(parameter) for parameter in found}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in chosen}


def _named(model: PreTrainedModel, part: str) -> list[torch.nn.Parameter]:
    """The parameters of a part, none where the model has no such part."""
    if last := _LAST.fullmatch(part):
        layers, count = decoder_layers(model), int(last[1])
        if layers is None or count > len(layers):
            number = "no list of layers" if layers is None else f"{len(layers)} layers"
            raise ConfigError(f"tuning.parts: {part}: this model has {number}")
        modules: Sequence[torch.nn.Module] = list(layers)[-count:]
    elif part in _PARTS:
        modules = _PARTS[part](model)
    else:
        raise ConfigError(f"tuning.parts: {part} is unknown; {_known(model)}")
    return [parameter for module in modules for parameter in module.parameters()]


def _matching(pattern: str, own: dict[str, torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    try:
        matches = re.compile(pattern).fullmatch
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"tuning.parts: {shorten(pattern)} is not a regular expression: {error}") from None
    if match_too_slowly([pattern], list(own)):
        raise ConfigError(
            f"tuning.parts: {shorten(pattern)}: this regular expression is too slow (possible catastrophic "
            "backtracking); write it more simply"
        )
    return [parameter for name, parameter in own.items() if matches(name)]


def _known(model: PreTrainedModel) -> str:
    """What may be named."""
    layers = decoder_layers(model)
    names = [*_PARTS, *([f"last_N_layers (N up to {len(layers)})"] if layers is not None else [])]
    example = next(name for name, _ in model.named_parameters())
    return f"its parts are {', '.join(names)}; or write a regular expression on full names such as {example}"
