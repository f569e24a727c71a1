"""Several models over as few bases as possible: adapters of one base are on it together, and answer in one batch.

    models = SharedModels()
    support, sales = models.load("runs/support"), models.load("runs/sales")     # one base in memory, one engine
    base = models.load("tiny")                                                  # the same base, without an adapter

An adapter may come at any time, also while the others answer.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from lmtune.config.schema import ModelConfig, Quantization
from lmtune.errors import ModelError
from lmtune.inference.adapter_source import AdapterSource, find_adapter
from lmtune.inference.load import (
    LoadedModel,
    load_for_inference,
    loaded_model,
    saved_tokenizer,
)
from lmtune.io.console import err, escape
from lmtune.models.base import base_fingerprint, load_tokenizer, resolve_name
from lmtune.models.members import BASE, Members
from lmtune.models.tuning.adapter_files import Metadata, check_adapter, trained_rows
from lmtune.models.tuning.lora import ADAPTER, add_adapter, load_adapter
from lmtune.runs.ensembles import find_ensemble
from lmtune.runs.store import find_run

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_Key = tuple[str, str, str]  # the base's fingerprint, quantization and dtype


class SharedModels:
    """Loads models, each base once.

    Args:
        quantization: of all bases; by default what each adapter was trained over, and none for plain models.
        base: where the base of all adapters is, if not where they name it.
    """

    def __init__(self, quantization: Quantization | None = None, base: str | None = None) -> None:
        self._quantization, self._base = quantization, base
        self._first: dict[_Key, LoadedModel] = {}
        self._numbers = itertools.count(2)

    def load(self, target: str) -> LoadedModel:
        """What `target` names, as `load_for_inference`; over a base that is there already, if it fits."""
        adapter = find_adapter(target, self._quantization, self._base)
        if adapter is None:
            is_plain = find_ensemble(target) is None and find_run(target) is None
            return self._plain(target) if is_plain else load_for_inference(target, self._quantization, self._base)
        key = self._key(adapter.base)
        with adapter.folder(self._base) as folder:
            fault = _unshareable(folder)
            if fault is None and key in self._first:
                return self._beside(self._first[key], adapter, folder)
        if key in self._first and fault is not None:
            err.print(f"[dim]{escape(target)} has a base of its own, since {fault}[/]")
        loaded = load_for_inference(target, self._quantization, self._base)
        if fault is None:
            self._first[key] = loaded
        return loaded

    def can_load(self, target: str) -> bool:
        """Whether the base of a run is one that it has, or can have: any."""
        return True

    def load_checkpoint(self, target: str, step: int) -> LoadedModel:
        """A run's adapter as it was after a step, over a base that is there.

        Raises:
            ModelError: there is no such checkpoint, it is no adapter, or its base is not loaded.
        """
        adapter = find_adapter(target, self._quantization, self._base)
        if adapter is None or isinstance(adapter.place, Path):
            raise ModelError(f"{target}: not a run with an adapter, so its checkpoints are no models that share a base")
        first = self._first.get(self._key(adapter.base))
        if first is None:
            raise ModelError(f"{target}: its base {adapter.base.name} is not loaded")
        adapter = replace(adapter, step=step)
        with adapter.folder(self._base) as folder:
            return self._beside(first, adapter, folder)

    def _plain(self, target: str) -> LoadedModel:
        model = ModelConfig(name=target, quantization=self._quantization or "none")
        first = self._first.get(key) if (key := self._known_key(model)) is not None else None
        if first is None:
            first = load_for_inference(target, self._quantization)
            if first.head is not None:
                return first
            self._first.setdefault(key or self._key(model), first)
        else:
            metadata, name = Metadata.read(Path(resolve_name(model.name))), Path(target).name
            tokenizer = load_tokenizer(model)
            first = loaded_model(first.engine.model, tokenizer, model, name, metadata, False, first.engine)
        return replace(first, members=Members((BASE,)))

    def _beside(self, first: LoadedModel, adapter: AdapterSource, folder: Path) -> LoadedModel:
        """An adapter on a base that has others, or none so far."""
        metadata, fingerprint = Metadata.read(folder), base_fingerprint(adapter.base)
        has_tokenizer = (folder / "tokenizer_config.json").is_file()
        tokenizer = saved_tokenizer(folder) if has_tokenizer else load_tokenizer(adapter.base)
        with first.lock:
            model, name = first.engine.model, ADAPTER
            if hasattr(model, "peft_config"):
                name = f"member-{next(self._numbers):04d}"  # no part of which is the name of another
                add_adapter(cast("PeftModel", model), folder, name, fingerprint)
            else:
                model = cast("PreTrainedModel", load_adapter(model, folder, fingerprint))
            first.engine.use(model)
        loaded = loaded_model(model, tokenizer, adapter.base, adapter.name, metadata, True, first.engine)
        return replace(loaded, members=Members((name,)), run=adapter.run)

    @staticmethod
    def _key(model: ModelConfig) -> _Key:
        return base_fingerprint(model), model.quantization, model.dtype

    def _known_key(self, model: ModelConfig) -> _Key | None:
        """The key of a base if it can be told before it is loaded."""
        try:
            return self._key(model)
        except ModelError:
            return None


def _unshareable(folder: Path) -> str | None:
    """Why an adapter cannot be on a base together with others, if it cannot."""
    config = check_adapter(folder)
    if Metadata.read(folder).head is not None:
        return "it is a classifier"
    if config.get("modules_to_save") or trained_rows(config):
        return "it trains whole modules or tokens of its own beside the adapter"
    return None
