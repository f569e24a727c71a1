"""What the runs of one process have in common, loaded once: tokenizer and rows, and the base's weights.

    shared = Shared()
    for config in configs:
        run_finetune(config, RunDirectory.of(config.run), shared=shared)

Each of these runs is, bit for bit, the one that a process of its own makes. Held is what the last run needed: a run of
another model or other data loads its own in place of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from lmtune.config.schema import ModelConfig
from lmtune.models.base import fit_head, load_model
from lmtune.models.copies import over_same_weights
from lmtune.models.head import Head, classifier_head
from lmtune.models.tuning.base import Tuning

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")


class Shared:
    """What is held for the next run."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[object, Any]] = {}

    def get(self, what: str, key: object, make: Callable[[], T]) -> T:
        """The `what` of this key, held since the last run or made now."""
        if what not in self._held or self._held[what][0] != key:
            self._held.pop(what, None)  # before the new one takes its memory
            self._held[what] = key, make()
        return cast(T, self._held[what][1])

    def base(
        self, model: ModelConfig, device: torch.device, head: Head | None, to_shard: bool, tuning: Tuning
    ) -> PreTrainedModel:  # fmt: skip
        """As `load_model`: a copy over the weights that are held, but for those that `tuning` changes and the head."""
        outputs = None if head is None else (head.kind, head.labels)
        key = model, device, outputs, to_shard
        loaded = self.get("base", key, lambda: load_model(model, device, head, to_shard))
        own = list(tuning.changed(loaded))
        layer = classifier_head(loaded)
        if layer is not None:
            own += layer.parameters()
        copied = over_same_weights(loaded, own)
        if head is not None:
            head.describe(copied.config)
        fit_head(model, copied, head)
        return copied
