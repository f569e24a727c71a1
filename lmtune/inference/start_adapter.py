"""A run that begins from an existing adapter: which one, and what its settings are.

    with starting_adapter(config) as start:       # None without `tuning.adapter`
        …                                         # start.settings, start.folder

Settings that the config leaves at their default are the adapter's; one that says something else is refused, for rank,
scaling and layers of trained weights cannot be changed.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lmtune.config.load import load_config
from lmtune.config.schema import FinetuneConfig, LoraConfig
from lmtune.errors import ConfigError, LmtuneError, ModelError
from lmtune.inference.load import LoadedModel, usable_adapter
from lmtune.io.atomic import content_sha256
from lmtune.io.console import progress
from lmtune.io.text import format_list
from lmtune.models.hub import cached_adapter
from lmtune.models.tuning.adapter_files import CONFIG, WEIGHTS, LoraSettings, check_adapter
from lmtune.models.tuning.lora import weights_of
from lmtune.runs.store import RunDirectory, find_run, run_hint

_DEFAULT = LoraConfig()
_HEADS_OF_PEFT = ("classifier", "score")  # which it names for every classifier
_NOT_TRAINED = (
    "trainable_token_indices", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern",
    "alpha_pattern",
)  # fmt: skip


@dataclass(frozen=True)
class StartingAdapter:
    """Where training begins."""

    folder: Path
    name: str  # of the run or folder, for people and for files that others get
    settings: LoraConfig  # of the adapter, with dropout as the run's config says
    sha256: str  # of its weights, in hex


@contextlib.contextmanager
def starting_adapter(config: FinetuneConfig) -> Iterator[StartingAdapter | None]:
    """The adapter that `tuning.adapter` names, as long as the block lasts; None where it names none.

    ConfigError if there is none, it is this very run, or the config contradicts it; ModelError if it is damaged.
    """
    tuning = config.tuning
    target = tuning.adapter if isinstance(tuning, LoraConfig) else None
    if target is None or not isinstance(tuning, LoraConfig):
        yield None
        return
    run = find_run(target, config.run.dir)
    if run is not None and config.run.name and run.path.resolve() == RunDirectory.of(config.run).path.resolve():
        raise ConfigError(
            f"tuning.adapter: {target} is this very run; to train on, raise train.epochs or train.max_steps; to begin "
            "from it, give the new run another run.name"
        )
    if run is not None and not isinstance(load_config(FinetuneConfig, run.config).tuning, LoraConfig):
        raise ConfigError(
            f"tuning.adapter: {target} has trained the model's own weights, so there is no adapter; to begin from it, "
            f"set model.name: {run.merged}"
        )
    with contextlib.ExitStack() as held:
        folder = held.enter_context(usable_adapter(run)) if run is not None else _folder(target)
        if not (folder / CONFIG).is_file():
            raise ConfigError(f"tuning.adapter: {target}: no such run or adapter folder; {run_hint(target)}")
        try:
            saved = check_adapter(folder)
        except ModelError as error:
            raise ModelError(f"tuning.adapter: {target}: {error}") from None
        sha256 = content_sha256(folder / WEIGHTS)
        name = run.name if run is not None else Path(target).resolve().name if Path(target).is_dir() else target
        yield StartingAdapter(folder, name, _settings(tuning, saved, target), sha256)


@contextlib.contextmanager
def as_it_began(loaded: LoadedModel) -> Iterator[str | None]:
    """Inside the block the model as it was before the first step of its run: the base, or the adapter it began from.

    Yields why it is the base nevertheless, where it should be that adapter; None where nothing is amiss.
    """
    config = None if loaded.run is None else load_config(FinetuneConfig, loaded.run.config)
    if config is None or not isinstance(config.tuning, LoraConfig) or config.tuning.adapter is None:
        with loaded.use_base():
            yield None
        return
    with contextlib.ExitStack() as held:
        problem: str | None = None
        try:
            if loaded.members.is_ensemble:
                raise ModelError("the members of an ensemble take its place each by itself")
            asked = replace(config, run=replace(config.run, name=None))
            start = held.enter_context(starting_adapter(asked))
            assert start is not None
            assert loaded.run is not None
            begun = loaded.run.read_json(loaded.run.environment).get("starting_adapter_sha256")
            if begun not in (None, start.sha256):
                raise ModelError(f"{start.name} has other weights now")
            held.enter_context(weights_of(loaded.model, start.folder))
        except LmtuneError as error:
            problem = str(error).partition("\n")[0]
            held.enter_context(loaded.use_base())
        yield problem


def _folder(target: str) -> Path:
    """The adapter folder that is no run's: one on this machine, or from the Hub where `target` can only be there."""
    path = Path(target)
    is_hub_name = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", target) is not None
    if path.exists() or not is_hub_name or path.parent.is_dir():
        return path
    try:
        with progress(f"downloading the adapter {target}"):
            return cached_adapter(target)
    except LmtuneError as error:
        raise type(error)(f"tuning.adapter: {error}") from error


def with_starting_adapter(config: FinetuneConfig) -> FinetuneConfig:
    """`config` with the settings of the adapter that it begins from."""
    with starting_adapter(config) as start:
        return config if start is None else replace(config, tuning=start.settings)


def _settings(asked: LoraConfig, saved: LoraSettings, target: str) -> LoraConfig:
    """The settings of a saved adapter, with `dropout` and the like as asked; ConfigError names what contradicts it."""
    theirs: dict[str, Any] = {
        "rank": saved["r"], "alpha": float(saved["lora_alpha"]), "use_rslora": bool(saved.get("use_rslora")),
        "use_dora": bool(saved.get("use_dora")), "target_modules": _targets(saved),
        "modules_to_save": _whole(saved), "new_tokens": (),
    }  # fmt: skip
    fix = "merge it, and set model.name to the merged folder"
    problems = [f"{CONFIG}: {key} is set; {fix}" for key in _NOT_TRAINED if saved.get(key)]
    for key, value in theirs.items():
        wanted = getattr(asked, key)
        wanted = tuple(sorted(wanted)) if isinstance(wanted, tuple) else wanted
        if wanted not in (getattr(_DEFAULT, key), value):
            problems.append(f"tuning.{key}: {_shown(wanted)}; expected {_shown(value)}, as {target} has it")
    if problems:
        raise ConfigError(f"tuning.adapter: {target} cannot be trained in this way\n{format_list(problems)}")
    return replace(asked, **theirs)


def _whole(saved: LoraSettings) -> tuple[str, ...]:
    """The modules that were trained whole, less the head of a classifier, which always is."""
    names = _names(saved.get("modules_to_save"))
    return tuple(name for name in names if saved.get("task_type") != "SEQ_CLS" or name not in _HEADS_OF_PEFT)


def _names(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _targets(saved: LoraSettings) -> str | tuple[str, ...]:
    """What an adapter is on: its modules, and the layers and tensors that it names by their weights."""
    modules, parameters = saved.get("target_modules") or [], saved.get("target_parameters") or []
    if isinstance(modules, str) and not parameters:
        return modules
    names = [modules] if isinstance(modules, str) else modules
    return tuple(sorted({*names, *(name.removesuffix(".weight") for name in parameters)}))


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(value)}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
