"""Full tuning: every parameter of the model learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch

from lmtune.models.tuning.adapter_files import METADATA, Metadata
from lmtune.models.tuning.base import ParameterGroup, Tensors, TunedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Full:
    """All parameters; matrices decay towards zero, norms and biases do not."""

    kind: ClassVar[str] = "full"

    def apply(self, base: PreTrainedModel, seed: int, base_name: str) -> TunedModel:
        """Let every floating-point parameter of `base` learn."""
        for parameter in base.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        return TunedModel(base)

    def parameter_groups(self, model: TunedModel, weight_decay: float) -> list[ParameterGroup]:
        """Matrices, and all others."""
        parameters = list(model.trainable().values())
        return [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]

    def initial_tensors(self, model: TunedModel) -> list[torch.Tensor]:
        """Nothing is computed."""
        return []

    def save(self, model: TunedModel, folder: Path, metadata: Metadata, tensors: Tensors | None = None) -> None:
        """Write a model folder as transformers does, and `lmtune.json` beside it."""
        own = model.trainable()
        instead = {own[name].data_ptr(): tensor for name, tensor in (tensors or {}).items()}  # a tied head goes along
        state = {name: instead.get(value.data_ptr(), value) for name, value in model.base.state_dict().items()}
        model.base.save_pretrained(folder, state_dict=state)
        (folder / METADATA).write_text(json.dumps(metadata.as_dict(), indent=2) + "\n", encoding="utf-8")

    def load(self, base: PreTrainedModel, folder: Path, fingerprint: str | None = None) -> TunedModel:
        """The model of the folder, in place of `base`."""
        loaded = type(base).from_pretrained(folder, dtype=base.dtype, use_safetensors=True)
        return TunedModel(loaded.to(base.device).requires_grad_(False).eval())
