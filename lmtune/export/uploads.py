"""What a push sends: the files of a run in one of its forms, chosen by their names and searched for what is private.

    upload = prepare_push(run, "anna/support")                  # what the run has trained
    upload = prepare_push(run, "anna/support-whole", merged=True)
    upload = prepare_gguf(run, "anna/support-gguf")
    write_upload(upload, Path("try"))                           # or `lmtune.export.hub.push(upload)`

Nothing here needs a network.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from lmtune.config.load import load_config
from lmtune.config.schema import FinetuneConfig, LoraConfig
from lmtune.errors import ModelError
from lmtune.export.merged import check_merged
from lmtune.export.private import Files, check_private, check_usable
from lmtune.io.atomic import new_folder, require_absent
from lmtune.io.console import warn
from lmtune.io.text import one_line
from lmtune.models.hub import ADAPTER_FILES, CARD, MODEL_FILES, checked_repository, hub_token, is_among
from lmtune.models.tuning.adapter_files import CONFIG, METADATA, WEIGHTS, Metadata
from lmtune.models.validate import CONFIG as MODEL_CONFIG
from lmtune.models.validate import read_object
from lmtune.runs.cards import GgufFile, gguf_card, is_hub_id, merged_card, result_card
from lmtune.runs.store import RunDirectory

Form = Literal["adapter", "model", "gguf", "space"]


@dataclass(frozen=True)
class Upload:
    """What a push would send.

    Attributes:
        run: that it comes from.
        repository: `user/name` where it goes.
        form: what the repository becomes.
        files: by their names there: where one is, or its content.
        kept_here: names in the run's folder that are not sent.
        use: a command with which others use it.
    """

    run: RunDirectory
    repository: str
    form: Form
    files: Files
    kept_here: Sequence[str] = ()
    use: str = ""
    sizes: Mapping[str, int] = field(init=False)  # bytes

    def __post_init__(self) -> None:
        sizes = {name: len(one) if isinstance(one, bytes) else one.stat().st_size for name, one in self.files.items()}
        object.__setattr__(self, "sizes", sizes)

    @property
    def card(self) -> str:
        """The text of README.md, written for this repository."""
        card = self.files[CARD]
        return card.decode() if isinstance(card, bytes) else card.read_text(encoding="utf-8")


def write_upload(upload: Upload, folder: Path) -> None:
    """Write the files that a push would send into a new folder.

    Raises:
        ConfigError: the folder is there already, or cannot be made.
    """
    require_absent(folder)
    with new_folder(folder) as staging:
        for name, source in upload.files.items():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(source, bytes):
                (staging / name).write_bytes(source)
            else:
                shutil.copyfile(source, staging / name)


# --- an adapter, or a whole model


def prepare_push(run: RunDirectory, repository: str, merged: bool = False) -> Upload:
    """Choose and check the files of what a run has trained: an adapter, or the model where its own weights were.

    Args:
        run: of an adapter, or of a model.
        repository: `user/name`.
        merged: the model that `lmtune merge` has made of the adapter, in its place.

    Raises:
        ConfigError: the repository's name is not `user/name`.
        ModelError: the run has no result, or one that nobody could use, or its files hold something private.
        CheckpointError: the run's records are damaged.
    """
    checked_repository(repository)
    config, summary = shared_config(run), run.read_summary()
    is_adapter = isinstance(config.tuning, LoraConfig) and not merged
    folder = run.adapter if is_adapter else run.merged
    if merged and isinstance(config.tuning, LoraConfig):
        _check_merged(run)
    present = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if missing := [name for name in ((WEIGHTS, CONFIG) if is_adapter else (MODEL_CONFIG,)) if name not in present]:
        raise ModelError(f"{folder}: no {' and no '.join(missing)}; finish the run with `lmtune finetune` first")
    names = [name for name in present if is_among(name, ADAPTER_FILES if is_adapter else MODEL_FILES)]
    if links := [name for name in names if (folder / name).is_symlink()]:
        raise ModelError(f"{folder}: {', '.join(links)} is a link; put the file itself there")
    stops, data = list(Metadata.read(folder).stop_tokens), run.read_data_report()
    if merged and isinstance(config.tuning, LoraConfig):
        report = run.read_json(folder / "merge.json")
        card = merged_card(config, summary, report, repository, stops, data)
    else:
        card = result_card(config, summary, data, repository, stops)
    files: dict[str, Path | bytes] = {name: folder / name for name in names if name != CARD}
    files |= {**shared_texts(folder), CARD: card.encode()}
    check_private(str(folder), files, hub_token())
    check_usable(folder, is_adapter)
    base = config.model.name
    if is_adapter and base != "tiny" and not is_hub_id(base):
        warn(f"the base model {Path(base).name} is a folder of yours: others need that very model to use the adapter")
    if summary.status != "complete":
        warn(f"{run.path} is {summary.status}: the card tells only what was measured so far")
    kept = [name for name in present if name not in names]
    form: Form = "adapter" if is_adapter else "model"
    return Upload(run, repository, form, files, kept, f"lmtune pull {repository}")


def shared_config(run: RunDirectory) -> FinetuneConfig:
    """A run's settings for others to see: a base in a folder has the folder's name alone."""
    config = load_config(FinetuneConfig, run.config)
    if "base" in run.read_json(run.local):  # a folder, wherever the command is called
        config = replace(config, model=replace(config.model, name=f"./{Path(config.model.name).name}"))
    return config


def shared_texts(folder: Path) -> dict[str, bytes]:
    """What is sent in place of an adapter's files that name a base by the way to its folder: its last part alone."""
    texts = {}
    for name, key in ((CONFIG, "base_model_name_or_path"), (METADATA, "base_model")):
        tree = read_object(folder / name) if (folder / name).is_file() else {}
        base = tree.get(key)
        if isinstance(base, str) and base.startswith(".") and (short := f"./{Path(base).name}") != base:
            texts[name] = (json.dumps({**tree, key: short}, indent=2) + "\n").encode()
    return texts


def _check_merged(run: RunDirectory) -> None:
    """Raise ModelError unless the run's adapter was merged after its last training."""
    made = run.merged / MODEL_CONFIG
    if not made.is_file():
        raise ModelError(f"{run.merged}: no merged model; make it first: `lmtune merge {run.path}`")
    check_merged(run)
    _check_newer(run, made, f"lmtune merge {run.path}")


def _check_newer(run: RunDirectory, made: Path, command: str) -> None:
    """Raise ModelError if a file is older than the weights that it was made of."""
    weights = run.adapter / WEIGHTS
    weights = weights if weights.is_file() else run.merged / MODEL_CONFIG
    if weights.is_file() and made.stat().st_mtime < weights.stat().st_mtime:
        raise ModelError(f"{made}: older than {weights}: the run was trained further; make it again: `{command}`")


# --- GGUF files


def prepare_gguf(run: RunDirectory, repository: str, only: Sequence[str] = ()) -> Upload:
    """Choose and check GGUF files of a run's model, as `lmtune export --to gguf` writes them.

    Beside them go the template, the stop tokens and the system prompt as Ollama reads them on the Hub
    (https://huggingface.co/docs/hub/ollama).

    Args:
        run: of a language model.
        repository: `user/name`.
        only: files, or types of those in the run's folder; none: all of the model there.

    Raises:
        ConfigError: the repository's name is not `user/name`.
        ModelError: there is no such file, or it is older than the run's weights, or holds something private.
    """
    checked_repository(repository)
    config, summary = shared_config(run), run.read_summary()
    export = f"lmtune export {run.path} --to gguf"
    there = sorted(path for path in run.path.glob(f"{run.name}-*.gguf") if path.name != f"{run.name}-lora.gguf")
    chosen = [_chosen_file(run, one, there, export) for one in only] or there
    if not chosen:
        raise ModelError(f"{run.path}: no GGUF file of the model; write one first: `{export}`")
    described = []
    for path in dict.fromkeys(chosen):
        if path.is_symlink():
            raise ModelError(f"{path}: a link; give the file itself")
        _check_newer(run, path, export)
        described.append(_described(path))
    folder = run.result(config.tuning)
    metadata, (texts, why_not) = Metadata.read(folder), _ollama_texts(folder)
    card = gguf_card(
        config, summary, run.read_data_report(), repository, described, list(metadata.stop_tokens), why_not
    )
    files: dict[str, Path | bytes] = {path.name: path for path in chosen}
    files |= {**texts, CARD: card.encode()}
    check_private(str(run.path), files, hub_token())
    if summary.status != "complete":
        warn(f"{run.path} is {summary.status}: the card tells only what was measured so far")
    kept = [path.name for path in sorted(run.path.glob("*.gguf")) if path not in chosen]
    use = f"llama-server -hf {repository} --jinja" if why_not else f"ollama run hf.co/{repository}"
    return Upload(run, repository, "gguf", files, kept, use)


def _chosen_file(run: RunDirectory, wanted: str, there: Sequence[Path], export: str) -> Path:
    """The file that a path or a type means."""
    if wanted.lower().endswith(".gguf"):
        places = (Path(wanted), run.path / wanted)
        if found := [path for path in places if path.is_file()]:
            return found[0]
        raise ModelError(f"--only: {wanted}: no such file, here or in {run.path}; expected a GGUF file of this run")
    if found := [path for path in there if path.name.lower() == f"{run.name}-{wanted}.gguf".lower()]:
        return found[0]
    names = ", ".join(path.name for path in there) or "none"
    raise ModelError(f"--only: {wanted}: no {run.name}-{wanted}.gguf; there: {names}; `{export} --type {wanted}`")


def _described(path: Path) -> GgufFile:
    """What the header of a file says of it.

    Raises:
        ModelError: it is no whole GGUF file of a model.
    """
    from lmtune.export.gguf import kind_of_file_type
    from lmtune.models.gguf import gguf_metadata

    try:
        metadata = gguf_metadata(str(path), path)
    except ModelError as error:
        raise ModelError(str(error).removeprefix("model.name: ")) from None
    number, template = metadata.get("general.file_type"), metadata.get("tokenizer.chat_template")
    return GgufFile(path.name, kind_of_file_type(number) or "", path.stat().st_size, bool(template))


def _ollama_texts(folder: Path) -> tuple[dict[str, bytes], str]:
    """The files that Ollama reads beside a GGUF file on the Hub; else why its templates cannot say the model's."""
    from lmtune.export.ollama import turn_texts
    from lmtune.inference.load import saved_tokenizer, stop_tokens

    tokenizer, system = saved_tokenizer(folder), Metadata.read(folder).system
    try:
        template = turn_texts(tokenizer).go_template()
    except ModelError as error:
        return {}, re.sub(r"[;:] .*", "", one_line(error))
    stops = [str(token) for token in tokenizer.convert_ids_to_tokens(list(stop_tokens(folder)))]
    texts = {"template": template.encode(), "params": (json.dumps({"stop": stops}, ensure_ascii=False) + "\n").encode()}
    return texts | ({"system": system.encode()} if system else {}), ""
