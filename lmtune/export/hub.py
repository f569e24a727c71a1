"""Sharing through the Hugging Face Hub: `push` what a run has trained, `pull` an adapter back.

    url = push(RunDirectory("runs/support"), "anna/support")
    folder = pull("anna/support")              # adapters/anna--support, which `lmtune chat` loads

Uploaded is what plain PEFT loads, by a list of file names and after a search for what is private. Downloaded is checked
before any library reads it. The token is huggingface_hub's own (`hf auth login` or HF_TOKEN), never an argument.
"""

from __future__ import annotations

import json
import mmap
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lmtune import __version__
from lmtune.config.load import load_config
from lmtune.config.schema import FinetuneConfig, LoraConfig
from lmtune.errors import ConfigError, LmtuneError, ModelError
from lmtune.io.atomic import new_folder
from lmtune.io.console import HUB_TOKEN, warn
from lmtune.io.text import format_list
from lmtune.models.hub import (
    ADAPTER_FILES,
    CARD,
    LOGIN,
    VOCABULARY,
    checked_repository,
    download_adapter,
    explained,
    hub_api,
    hub_token,
)
from lmtune.models.tuning.adapter_files import CONFIG, METADATA, WEIGHTS, Metadata, check_adapter
from lmtune.models.validate import CONFIG as MODEL_CONFIG
from lmtune.models.validate import check_weights, read_object
from lmtune.runs.cards import is_hub_id, result_card
from lmtune.runs.store import RunDirectory, require_possible


@dataclass(frozen=True)
class Upload:
    """What a push would send.

    Attributes:
        folder: of the adapter, or of the model whose own weights were trained.
        sizes: bytes of each file by its name.
        kept_here: names in the folder that are not sent.
        card: the text of README.md, written for this repository.
        texts: what else is sent in other words than the file's.
    """

    folder: Path
    sizes: dict[str, int]
    kept_here: list[str]
    card: str
    texts: dict[str, bytes]


def prepare_push(run: RunDirectory, repository: str) -> Upload:
    """Choose and check the files of what a run has trained, without any network.

    Raises:
        ConfigError: the repository's name is not `user/name`.
        ModelError: the run has no result, or one that nobody could use, or its files hold something private.
        CheckpointError: the run's records are damaged.
    """
    checked_repository(repository)
    config, summary = load_config(FinetuneConfig, run.config), run.read_summary()
    folder, is_adapter = run.result(config.tuning), isinstance(config.tuning, LoraConfig)
    present = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if missing := [name for name in ((WEIGHTS, CONFIG) if is_adapter else (MODEL_CONFIG,)) if name not in present]:
        raise ModelError(f"{folder}: no {' and no '.join(missing)}; finish the run with `lmtune finetune` first")
    names = [name for name in present if name in ADAPTER_FILES or (not is_adapter and _MODEL_FILES.fullmatch(name))]
    if links := [name for name in names if (folder / name).is_symlink()]:
        raise ModelError(f"{folder}: {', '.join(links)} is a link; put the file itself there")
    if "base" in run.read_json(run.local):  # a folder, wherever the command is called
        config = replace(config, model=replace(config.model, name=f"./{Path(config.model.name).name}"))
    stops = list(Metadata.read(folder).stop_tokens)
    card = result_card(config, summary, run.read_data_report(), repository, stops)
    _check_private(folder, names, card, hub_token())
    _check_usable(folder, is_adapter)
    base = config.model.name
    if is_adapter and base != "tiny" and not is_hub_id(base):
        warn(f"the base model {Path(base).name} is a folder of yours: others need that very model to use the adapter")
    if summary.status != "complete":
        warn(f"{run.path} is {summary.status}: the card tells only what was measured so far")
    texts = shared_texts(folder)
    sizes = {name: (folder / name).stat().st_size for name in names} | {CARD: len(card.encode())}
    sizes |= {name: len(text) for name, text in texts.items()}
    return Upload(folder, sizes, [name for name in present if name not in names], card, texts)


def push(
    run: RunDirectory, repository: str, private: bool = True, revision: str | None = None, message: str | None = None
) -> str:
    """Upload what a run has trained; returns the address of the commit.

    Args:
        run: a run with an adapter, or with a model whose own weights were trained.
        repository: `user/name`; made if it is not there.
        private: whether a new repository is private, and that an existing public one is not written to.
        revision: a branch, made if it is not there; None is the main one.
        message: of the commit.

    Raises:
        ConfigError, ModelError: as `prepare_push`, or the repository is public.
        LmtuneError: the Hub cannot be reached, or does not permit it.
    """
    upload = prepare_push(run, repository)
    if hub_token() is None:
        raise LmtuneError(f"cannot upload to {repository} without a Hub token: {LOGIN}; it needs the write permission")
    from huggingface_hub import CommitOperationAdd

    with explained(repository, "upload to"):
        api = hub_api()
        api.create_repo(repository, private=private, exist_ok=True)
        is_private = bool(api.repo_info(repository).private)
        if private and not is_private:
            raise ConfigError(
                f"{repository} exists and is public: everyone could read the weights; --public permits it"
            )
        if not private and is_private:
            warn(f"{repository} exists and stays private; its settings on the Hub can change that")
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        sources = {name: upload.folder / name for name in upload.sizes} | upload.texts | {CARD: upload.card.encode()}
        commit = api.create_commit(
            repository, [CommitOperationAdd(name, source) for name, source in sources.items()], revision=revision,
            commit_message=message or f"Upload {run.name} with lmtune {__version__}",
        )  # fmt: skip
    return str(commit.commit_url)


def pull(repository: str, revision: str | None = None, output: Path | None = None) -> Path:
    """Download an adapter, check it, and put it where `lmtune chat` can load it.

    Args:
        repository: `user/name`.
        revision: a branch, tag or commit; None is the main branch.
        output: the folder to make; None is `adapters/user--name`.

    Returns:
        The folder, which plain PEFT loads too.

    Raises:
        ConfigError: the name is not `user/name`, or the folder is there already.
        ModelError: there is no such repository or revision, or it holds no adapter that can be used safely.
        LmtuneError: the Hub cannot be reached.
    """
    checked_repository(repository)
    folder = output or Path("adapters") / repository.replace("/", "--")
    require_possible(folder, "--output")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there already; delete it, or give another folder with --output")
    try:
        with new_folder(folder) as staging:
            download_adapter(repository, revision, staging)
            shutil.rmtree(staging / ".cache", ignore_errors=True)  # huggingface_hub's notes about the download
            try:
                base = check_adapter(staging).get("base_model_name_or_path")
            except ModelError as error:
                raise ModelError(f"{repository}: {error}") from None
            if not base or _ABSOLUTE.fullmatch(base):
                warn(f"its base model is {base or 'not named'}: a folder of its author; you need that very model")
    except OSError as error:
        raise LmtuneError(f"{folder}: cannot be written ({error.strerror or error})") from error
    return folder


_MODEL_FILES = re.compile(r"config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
_TOKEN = re.compile(HUB_TOKEN.encode())
_ABSOLUTE = re.compile(r"(/[^/\s]+){2,}/?|~/.+|[A-Za-z]:[\\/].+|\\\\.+")


def shared_texts(folder: Path) -> dict[str, bytes]:
    """What is sent in place of an adapter's files that name a base by the way to its folder: its last part alone."""
    texts = {}
    for name, key in ((CONFIG, "base_model_name_or_path"), (METADATA, "base_model")):
        tree = read_object(folder / name) if (folder / name).is_file() else {}
        base = tree.get(key)
        if isinstance(base, str) and base.startswith(".") and (short := f"./{Path(base).name}") != base:
            texts[name] = (json.dumps({**tree, key: short}, indent=2) + "\n").encode()
    return texts


def _check_private(folder: Path, names: list[str], card: str, token: str | None) -> None:
    """Raise ModelError, naming each file and what is in it but never the secret, where something private would be sent.

    Args:
        folder: the adapter folder.
        names: its files that are to be uploaded.
        card: the text that is uploaded as README.md instead of the file.
        token: the Hub token in use, which must be in none of them.
    """
    secrets = [token.encode()] if token else []
    problems = [f"{CARD}: {fault}" for fault in _leaks(CARD, card.encode(), secrets)]
    for path in (folder / name for name in names if name != CARD):
        if path.stat().st_size:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                problems += [f"{path.name}: {fault}" for fault in _leaks(path.name, content, secrets)]
        if path.suffix == ".json" and path.name not in VOCABULARY:
            found = [key for key, text in _strings(read_object(path)) if _ABSOLUTE.fullmatch(text)]
            problems += [f"{path.name}: {key} is a path of this machine; write a Hub id there" for key in found]
    if problems:
        raise ModelError(f"{folder}: not uploaded, these files would tell what is private\n{format_list(problems)}")


def _check_usable(folder: Path, is_adapter: bool) -> None:
    """Raise ModelError where nobody could use an adapter or a model, as far as that can be said without its base."""
    try:
        if is_adapter:
            check_adapter(folder)
        else:
            check_weights(str(folder), folder)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from None
    files = [folder / WEIGHTS] if is_adapter else sorted(folder.glob("*.safetensors"))
    whole = read_object(folder / CONFIG).get("modules_to_save") if is_adapter else None
    parts = tuple(whole) if isinstance(whole, list) else ()
    if problems := [problem for file in files for problem in _tensor_faults(file, is_adapter, parts)]:
        raise ModelError(f"{folder}: not uploaded, nobody could use it; train it again\n{format_list(problems, 8)}")


def _tensor_faults(path: Path, is_adapter: bool, whole: Sequence[str] = ()) -> Iterator[str]:
    """Which tensors hold NaN or infinity, and of an adapter have names that PEFT does not give."""
    import torch
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            is_known = ".lora_" in name or ".trainable_tokens_" in name or any(f".{part}." in name for part in whole)
            if is_adapter and not (name.startswith("base_model.model.") and is_known):
                yield f"{path.name}: {name}: no name that PEFT gives a tensor of this adapter"
            elif not torch.isfinite(file.get_tensor(name)).all():
                yield f"{path.name}: {name}: holds NaN or infinity"


def _leaks(name: str, content: Any, secrets: list[bytes]) -> Iterator[str]:
    """What in `content`, bytes or a memory map, must not leave this machine."""
    if any(content.find(secret) >= 0 for secret in secrets):
        yield "holds your Hub token"
    elif not name.endswith(".safetensors") and _TOKEN.search(content):
        yield "holds what looks like a Hub token"
    if name not in VOCABULARY:  # a vocabulary holds pieces of any text, and no paths
        places = {"home folder": Path.home(), "current folder": Path.cwd(), "temporary folder": tempfile.gettempdir()}
        for what, place in places.items():
            if len(str(place)) > 3 and content.find(f"{place}/".encode()) >= 0:
                yield f"holds the path of your {what}"


def _strings(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string in a JSON tree with its dotted key."""
    if isinstance(tree, str):
        yield key, tree
    elif isinstance(tree, dict):
        for name, value in tree.items():
            yield from _strings(value, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list):
        for value in tree:
            yield from _strings(value, key)
