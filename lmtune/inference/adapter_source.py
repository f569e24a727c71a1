"""What a target names, if it is an adapter: where it is, and over which base.

source = find_adapter("runs/support")
with source.folder() as folder: …       # in the form that PEFT writes
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from lmtune.config.load import load_config
from lmtune.config.schema import FinetuneConfig, LoraConfig, ModelConfig, Quantization
from lmtune.inference.load import saved_at, usable_adapter, write_adapter
from lmtune.models.locate import adapter_base, run_config
from lmtune.models.tuning.adapter_files import CONFIG, WEIGHTS
from lmtune.runs.ensembles import find_ensemble
from lmtune.runs.store import RunDirectory, find_run


@dataclass(frozen=True)
class AdapterSource:
    """An adapter that a target names.

    Attributes:
        place: its folder, or its run.
        base: what it was trained over.
        name: for people.
        step: of a run maybe a checkpoint's.
    """

    place: Path | RunDirectory
    base: ModelConfig
    name: str
    step: int | None = None

    @property
    def run(self) -> RunDirectory | None:
        """The run that it comes from, if that is known."""
        return self.place if isinstance(self.place, RunDirectory) else find_run(self.place.resolve().parent)

    @contextlib.contextmanager
    def folder(self, base: str | None = None) -> Iterator[Path]:
        """Its folder, for as long as the block lasts; `base` is where the base is, if not where the run names it."""
        if isinstance(self.place, Path):
            yield self.place
        elif self.step is not None:
            with tempfile.TemporaryDirectory(prefix="lmtune-") as folder:
                write_adapter(self.place, saved_at(self.place, self.step), Path(folder), base)
                yield Path(folder)
        else:
            with usable_adapter(self.place, base) as folder:
                yield folder


def find_adapter(
    target: str, quantization: Quantization | None = None, base: str | None = None
) -> AdapterSource | None:
    """The adapter that a target names; None for models and ensembles.

    Args:
        target: as of `load_for_inference`.
        quantization: of the base, if not that of training.
        base: where the base is, if not where the adapter names it.
    """
    if find_ensemble(target) is not None:
        return None
    if (run := find_run(target)) is not None:
        if not isinstance(load_config(FinetuneConfig, run.config).tuning, LoraConfig):
            return None
        model = run_config(run, base).model
        model = model if quantization is None else replace(model, quantization=quantization)
        return AdapterSource(run, model, f"{run.name} ({model.name})")
    folder = Path(target)
    if not (folder / WEIGHTS).is_file() and not (folder / CONFIG).is_file():
        return None
    return AdapterSource(folder, adapter_base(folder, quantization, base), folder.resolve().name)
