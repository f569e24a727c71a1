"""The adapter of a run, also of one that was stopped, has failed or still trains: then that of a checkpoint.

    with usable_adapter(run) as adapter:     # run.adapter, or a temporary folder like it
        …

Nothing is written in the run's folder and no lock is taken: a checkpoint is there whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from lmtune.config.schema import FinetuneConfig, load_config
from lmtune.errors import LmtuneError, ModelError
from lmtune.io.console import err, escape
from lmtune.models.adapter_checks import CONFIG, WEIGHTS
from lmtune.models.base import load_model, load_tokenizer, resolve_name
from lmtune.models.fingerprint import base_fingerprint
from lmtune.models.locate import run_config, shareable_name
from lmtune.models.published import write_adapter_texts
from lmtune.models.tuning.lora import Tensors, attach_adapter, save_adapter
from lmtune.models.weight_types import empty_model
from lmtune.runs.checkpoints import ADAPTER, STATE, checkpoint_folders, problem_of, step_of
from lmtune.runs.store import RunDirectory

_TRIES = 5  # the run deletes checkpoints as it writes newer ones


@dataclass(frozen=True)
class Saved:
    """A checkpoint's adapter.

    Attributes:
        step: after which it was saved.
        is_best: whether it was chosen by the validation rows, and is not the newest.
        state: what else the checkpoint holds.
        adapter: trainable parameters by name.
    """

    step: int
    is_best: bool
    state: dict[str, Any]
    adapter: Tensors

    def __str__(self) -> str:
        total = self.state.get("total_steps")
        of = f" of {total}" if total else ""
        return f"step {self.step}{of}" + (", the best so far by its validation loss" if self.is_best else "")


@contextlib.contextmanager
def usable_adapter(run: RunDirectory, base: str | None = None) -> Iterator[Path]:
    """An adapter folder with what the run has learned so far, for as long as the block lasts.

    Raises:
        ModelError: the run has neither an adapter nor a checkpoint that is whole.
    """
    status = None
    with contextlib.suppress(LmtuneError):  # a summary that is damaged says nothing about the adapter
        status = run.read_summary().get("status", "running")
    has_adapter = (run.adapter / CONFIG).is_file() and (run.adapter / WEIGHTS).is_file()
    saved = None if has_adapter and status in ("complete", None) else newest_saved(run)
    if saved is None:
        if not (run.adapter / CONFIG).exists():  # what is there and no file is named by who reads it
            raise ModelError(
                f"{run.path}: this run has no adapter yet; finish it with the same `lmtune finetune` command"
            )
        yield run.adapter
        return
    err.print(f"{escape(str(run.path))} is not finished: uses {saved}")
    with tempfile.TemporaryDirectory(prefix="lmtune-") as folder:
        write_adapter(run, saved, Path(folder), base)
        yield Path(folder)


def newest_saved(run: RunDirectory) -> Saved | None:
    """The adapter of the run's newest checkpoint that is whole, or of its best one where the run keeps that."""
    for _ in range(_TRIES):
        with contextlib.suppress(OSError):
            folders = [path for path in reversed(checkpoint_folders(run.checkpoints)) if problem_of(path) is None]
            if not folders:
                return None
            state = json.loads((folders[0] / STATE).read_text(encoding="utf-8"))
            keep_best = load_config(FinetuneConfig, run.config).evaluation.keep_best
            best = state.get("counters", {}).get("best_step") if keep_best else None
            chosen = next((path for path in folders if step_of(path) == best), folders[0])
            return Saved(step_of(chosen), chosen != folders[0], state, load_file(chosen / ADAPTER))
    return None


def write_adapter(run: RunDirectory, saved: Saved, folder: Path, base: str | None = None) -> None:
    """Fill an empty folder as the run would fill `adapter/` with these weights; `base` is where its base is now."""
    from lmtune.inference.load import build_renderer, run_notes

    config = run_config(run, base)
    tokenizer = load_tokenizer(config.model)
    wanted = {"template": config.data.template, "system": config.data.system}
    renderer = build_renderer(tokenizer, config.model, wanted, run.rendered_at())
    notes = run_notes(config, renderer, base_fingerprint(config.model), run.adapter)
    if config.adapter.init_lora_weights == "pissa":  # which begins with a part of the base's weights
        model = load_model(config.model)
    else:
        model = empty_model(resolve_name(config.model.name), config.model.revision)
    adapted = attach_adapter(model, config.adapter, config.train.seed, shareable_name(config.model.name))
    save_adapter(adapted, folder, notes, saved.adapter)
    write_adapter_texts(config.model, renderer, folder)
