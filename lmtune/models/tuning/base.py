"""What is trained: the seam between a model and the parameters that a run trains.

tuning = Lora(config)
model = tuning.apply(base, seed=0)
optimizer over tuning.parameter_groups(model, weight_decay)
tuning.save(model, folder, metadata)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NotRequired, Protocol, TypedDict

import torch

from lmtune.config.schema import Dtype
from lmtune.models.structure import base_of
from lmtune.models.tuning.adapter_files import Metadata

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Tensors = Mapping[str, torch.Tensor]


class ParameterGroup(TypedDict):
    """A group of an optimizer, as `torch.optim` takes it."""

    params: list[torch.nn.Parameter]
    weight_decay: NotRequired[float]
    lr_scale: NotRequired[float]  # times the learning rate of the step


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The trained parameters by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@dataclass(frozen=True)
class TunedModel:
    """A model of which a part is trained.

    Attributes:
        module: what runs: a `PeftModel`, or the transformers model itself.
    """

    module: torch.nn.Module

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model in it."""
        return base_of(self.module)

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The trained parameters by name, in the model's order."""
        return trainable(self.module)

    @property
    def has_adapter(self) -> bool:
        """Whether the base is still there, under an adapter."""
        return hasattr(self.module, "disable_adapter")

    def without_adapter(self) -> contextlib.AbstractContextManager[None]:
        """The base alone inside the block; only where `has_adapter`.

        What a run begins from, which is the reference of preferences, is the model itself before the first step: with
        whatever tuning, and also in a run that is resumed, until its checkpoint is restored.
        """
        assert self.has_adapter, "the base's own weights were trained"
        disabled: contextlib.AbstractContextManager[None] = self.module.disable_adapter()  # type: ignore[operator]
        return disabled


class Tuning(Protocol):
    """Which parameters are trained, how they are grouped for the optimizer, and how they are saved and loaded."""

    kind: ClassVar[str]
    load_dtype: ClassVar[Dtype | None]  # in which the base is loaded; None is the dtype of computation

    def changed(self, base: PreTrainedModel) -> Iterable[torch.nn.Parameter]:
        """The weights of `base` itself that `apply` or training changes; a classifier's head aside."""

    def apply(self, base: PreTrainedModel, seed: int, base_name: str) -> TunedModel:
        """Make `base`, which is frozen, trainable in fp32; what is random depends on `seed` alone."""

    def parameter_groups(self, model: TunedModel, weight_decay: float) -> list[ParameterGroup]:
        """The trained parameters, grouped for the optimizer."""

    def initial_tensors(self, model: TunedModel) -> list[torch.Tensor]:
        """What `apply` computed, which ranks on different hardware may have rounded differently."""

    def save(self, model: TunedModel, folder: Path, metadata: Metadata, tensors: Tensors | None = None) -> None:
        """Write the trained weights, with `tensors` by name in place of the model's own, into an existing folder."""

    def load(self, base: PreTrainedModel, folder: Path, fingerprint: str | None = None) -> TunedModel:
        """Put what `save` wrote on `base`, in evaluation mode."""
