"""Where is the base of a run or an adapter, and what do files that others get call it?

    config = run_config(RunDirectory("runs/support"))       # with the base where it is, from every working directory
    base = adapter_base(Path("adapter"), base="/models/qwen3")   # what `--base` does

A base in a folder or a GGUF file is named by a relative path: from the run's folder in `local.json`, which is never
uploaded; from the adapter's folder in `lmtune.json`; from the working directory in `adapter_config.json`, as PEFT reads
it. So runs and bases can be moved together, and no file holds an absolute path.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lmtune.config.load import load_config
from lmtune.config.schema import FinetuneConfig, ModelConfig, Quantization
from lmtune.errors import ModelError
from lmtune.models.gguf import is_gguf
from lmtune.models.tuning.adapter_files import Metadata, check_adapter
from lmtune.runs.store import RunDirectory


def is_local(name: str) -> bool:
    """Whether `model.name` is a folder or a GGUF file here; `tiny` is the packaged one, whatever has that name."""
    return name != "tiny" and _is_base(Path(name))


def shareable_name(name: str, start: Path | None = None) -> str:
    """A base's name for files that others get: a Hub id as it is, a folder or file by its path from `start`.

    Where that path leads over the root it is the last part alone.

    Args:
        name: as `model.name` gives it.
        start: a folder that need not exist; by default the working directory.
    """
    if not is_local(name):
        return name
    begin, base = Path(start or "").resolve(), _place(name)
    if len(Path(os.path.commonpath([begin, base])).parts) < 2:
        return "./" + base.name
    return _relative(base, begin)


def local_paths(run: RunDirectory, name: str) -> dict[str, str]:
    """What `local.json` of a run holds: the path from its folder to the base's; empty for a Hub id or `tiny`."""
    return {"base": os.path.relpath(_place(name), run.path.resolve())} if is_local(name) else {}


def run_config(run: RunDirectory, base: str | None = None) -> FinetuneConfig:
    """A run's settings, with the base where it is.

    Args:
        run: a run.
        base: the folder, GGUF file or Hub id to take instead.

    Raises:
        ConfigError: the settings are damaged.
        ModelError: the base's folder is not there.
    """
    config = load_config(FinetuneConfig, run.config)
    if base is not None:
        return replace(config, model=replaced(config.model, base))
    name, told = config.model.name, run.read_json(run.local).get("base")
    if isinstance(told, str) and not _is_at(name, told, run.path):
        found = _find(told, [run.path], str(run.path))
        return replace(config, model=replace(config.model, name=found))
    return config


def adapter_base(folder: Path, quantization: Quantization | None = None, base: str | None = None) -> ModelConfig:
    """The base of an adapter folder, wherever it comes from.

    Args:
        folder: an adapter folder.
        quantization: of the base; by default what the adapter was trained over.
        base: the folder or Hub id to take instead of what it names.

    Raises:
        ModelError: the adapter names no base, or a folder that is not there.
    """
    try:
        config = check_adapter(folder)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from None
    metadata = Metadata.read(folder)
    name = base or metadata.base_model or config.get("base_model_name_or_path")
    if not name or not name.strip():
        raise ModelError(f"{folder}: adapter_config.json: no base model (base_model_name_or_path)")
    if base is None:
        name = _adapter_name(folder, name)
    revision = metadata.revision if base is None else None
    return ModelConfig(
        name=name, revision=revision, quantization=quantization or metadata.quantization, dtype=metadata.dtype
    )


def replaced(model: ModelConfig, base: str) -> ModelConfig:
    """The base at another place; its revision was that of the first one."""
    if base.startswith((".", "/", "~")) and not _is_base(Path(base).expanduser()):
        raise ModelError(f"--base: {base}: no such folder or GGUF file; give the base's, or its Hub id")
    return replace(model, name=base, revision=None)


def _adapter_name(folder: Path, name: str) -> str:
    run = RunDirectory(folder.resolve().parent)
    if run.exists() and run.adapter == folder.resolve():
        told = run.read_json(run.local).get("base")
        if isinstance(told, str) and _is_base(run.path / told):
            return _relative(run.path / told)
    if not name.startswith("."):  # a Hub id, or what another tool wrote
        return name
    # from the folder itself, as lmtune writes it; from the working directory, as PEFT reads its own
    return _find(name, [folder, Path()], str(folder))


def _find(name: str, starts: Sequence[Path], who: str) -> str:
    """The folder or file `name`, relative to one of `starts`."""
    places = [Path(os.path.normpath(start.resolve() / name)) for start in starts]
    for place in places:
        if _is_base(place):
            return _relative(place)
    tried, kind = " or ".join(map(str, dict.fromkeys(places))), "file" if is_gguf(name) else "folder"
    raise ModelError(
        f"{who}: its adapter was trained over the base model in the {kind} {name}, and there is no {kind} {tried}; put "
        f"the base there, or give its {kind} or Hub id: --base {kind.upper()}_OR_ID"
    )


def _relative(place: Path, start: Path | None = None) -> str:
    """A base by its path from `start`, or the working directory; never like a Hub id, as `base` alone would be."""
    relative = os.path.relpath(place, start)
    return relative if relative.startswith(os.pardir) else f"./{relative}"


def _is_at(name: str, told: str, run: Path) -> bool:
    """Whether `name`, from the working directory, is what `told` names from the run's folder."""
    place = run.resolve() / told
    return _is_base(place) and is_local(name) and Path(name).samefile(place)


def _place(name: str) -> Path:
    """Where a base is; a file keeps its name where it is a link, as in the Hub's cache: what it links to has none."""
    path = Path(name)
    return path.parent.resolve() / path.name if is_gguf(name) else path.resolve()


def _is_base(place: Path) -> bool:
    return place.is_dir() or (is_gguf(place) and place.is_file())
