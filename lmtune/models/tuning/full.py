"""Full tuning: every weight of the model learns, and the result is a plain model folder."""

from __future__ import annotations

import json
from collections import ChainMap
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch

from lmtune.config.schema import Dtype, ModelConfig
from lmtune.errors import ConfigError
from lmtune.io.atomic import name_disk_errors
from lmtune.models.base import DTYPES, load_model
from lmtune.models.changed_weights import write_changed
from lmtune.models.tuning.adapter_files import METADATA, Metadata
from lmtune.models.tuning.base import ParameterGroup, Tensors, TunedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Full:
    """All weights; matrices decay towards zero, norms and biases do not."""

    kind: ClassVar[str] = "full"
    load_dtype: ClassVar[Dtype | None] = "float32"

    def __init__(self, base: ModelConfig | None = None) -> None:
        """`base` is the stored model, of which `save` takes over what has not changed; None where nothing is saved."""
        self.base = base

    def changed(self, base: PreTrainedModel) -> Iterable[torch.nn.Parameter]:
        """All."""
        return list(base.parameters())

    def apply(self, base: PreTrainedModel, seed: int, base_name: str) -> TunedModel:
        """Let every floating-point parameter of `base` learn, in fp32.

        Raises:
            ConfigError: the model is stored in few bits, which cannot learn.
        """
        return learning(base, {name: p for name, p in base.named_parameters() if p.is_floating_point()})

    def parameter_groups(self, model: TunedModel, weight_decay: float) -> list[ParameterGroup]:
        """Matrices, and all others."""
        parameters = list(model.trainable().values())
        matrices, others = [p for p in parameters if p.dim() >= 2], [p for p in parameters if p.dim() < 2]
        groups: list[ParameterGroup] = [
            {"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0},
        ]  # fmt: skip
        return [group for group in groups if group["params"]]

    def initial_tensors(self, model: TunedModel) -> list[torch.Tensor]:
        """Nothing is computed."""
        return []

    def save(self, model: TunedModel, folder: Path, metadata: Metadata, tensors: Tensors | None = None) -> None:
        """Write weights and config of a plain model, and `lmtune.json` beside them.

        Stored tensors that were not trained are copied bit for bit.
        """
        assert self.base is not None
        own = {name: parameter.detach() for name, parameter in model.trainable().items()}
        changed = ChainMap(cast(Any, tensors or {}), own)  # which reads none before it is asked for
        write_changed(self.base, model.base, changed, folder, metadata.stop_token_ids)
        with name_disk_errors(folder / METADATA):
            (folder / METADATA).write_text(json.dumps(metadata.as_dict(), indent=2) + "\n", encoding="utf-8")

    def load(self, base: PreTrainedModel, folder: Path, fingerprint: str | None = None) -> TunedModel:
        """The model of the folder, in place of `base`, in evaluation mode."""
        name = next(name for name, dtype in DTYPES.items() if dtype == base.dtype)
        stored = ModelConfig(name=str(folder), quantization="none", dtype=cast(Dtype, name))
        return TunedModel(load_model(stored, base.device))


def learning(base: PreTrainedModel, parameters: dict[str, torch.nn.Parameter]) -> TunedModel:
    """`base` in which these `parameters` learn."""
    if getattr(base, "is_quantized", False) or not parameters:
        raise ConfigError(
            "model.name: the weights of this model are stored in few bits, which cannot learn; take the model as it "
            "was published in 16 or 32 bit, or set tuning.kind: lora"
        )
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return TunedModel(base)
