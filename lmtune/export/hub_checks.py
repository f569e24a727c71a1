"""What may leave this machine in an adapter's repository, and what is taken from one.

Outgoing: files of known names only, and in them no token, no path of this machine. Incoming: the same names only. Both
ways, what `lmtune.models.adapter_checks` demands of every adapter. Every problem is listed, not the first one only.
"""

from __future__ import annotations

import json
import mmap
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmtune.errors import ConfigError, ModelError, listed
from lmtune.io.console import HUB_TOKEN
from lmtune.models.adapter_checks import CONFIG, NOTES, WEIGHTS, check_adapter, read_object

CARD = "README.md"
_VOCABULARY = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt")
ADAPTER_FILES = (
    WEIGHTS, CONFIG, NOTES, CARD, *_VOCABULARY, "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")

_REPOSITORY = re.compile(r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9_])?/[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?", re.ASCII)
_TOKEN = re.compile(HUB_TOKEN.encode())
_ABSOLUTE = re.compile(r"(/[^/\s]+){2,}/?|~/.+|[A-Za-z]:[\\/].+|\\\\.+")


def checked_repository(name: str) -> str:
    """`name` if it is spelled as the Hub spells repositories.

    Raises:
        ConfigError: it is not `user/name`.
    """
    plain = re.sub(r"^(https?://)?(huggingface\.co|hf\.co)/", "", name).strip("/")
    if _REPOSITORY.fullmatch(name) and len(name) <= 96 and not re.search(r"--|\.\.|\.git$", name):
        return name
    hint = f"did you mean {plain}?" if plain != name and _REPOSITORY.fullmatch(plain) else "for example anna/support"
    raise ConfigError(
        f"{name!r} is no repository name: it is spelled user/name, of letters, digits, single - and ., and _; {hint}"
    )


def outgoing_files(folder: Path) -> tuple[list[str], list[str]]:
    """The names in an adapter folder that are uploaded, and those that stay here.

    Raises:
        ModelError: the adapter is incomplete, or a file is a link.
    """
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if missing := [name for name in (WEIGHTS, CONFIG) if name not in names]:
        raise ModelError(f"{folder}: no {' and no '.join(missing)}; finish the run with `lmtune finetune` first")
    chosen = [name for name in names if name in ADAPTER_FILES]
    if links := [name for name in chosen if (folder / name).is_symlink() or not (folder / name).is_file()]:
        raise ModelError(f"{folder}: {', '.join(links)} is no plain file; put the file itself there")
    return chosen, [name for name in names if name not in chosen]


def stated_stops(folder: Path) -> list[str]:
    """The tokens that an adapter's model stops at, as its `lmtune.json` names them; empty where it does not."""
    stops = read_object(folder / NOTES).get("stop_tokens") if (folder / NOTES).is_file() else None
    return [stop for stop in stops if isinstance(stop, str)] if isinstance(stops, list) else []


def shared_texts(folder: Path) -> dict[str, bytes]:
    """What is sent in place of an adapter's files that name a base by the way to its folder: its last part alone."""
    texts = {}
    for name, key in ((CONFIG, "base_model_name_or_path"), (NOTES, "base_model")):
        tree = read_object(folder / name) if (folder / name).is_file() else {}
        base = tree.get(key)
        if isinstance(base, str) and base.startswith(".") and (short := f"./{Path(base).name}") != base:
            texts[name] = (json.dumps({**tree, key: short}, indent=2) + "\n").encode()
    return texts


def check_outgoing(folder: Path, names: list[str], card: str, token: str | None) -> None:
    """Make sure that nothing private is in the files.

    Args:
        folder: the adapter folder.
        names: its files that are to be uploaded.
        card: the text that is uploaded as README.md instead of the file.
        token: the Hub token in use, which must be in none of them.

    Raises:
        ModelError: naming each file and what is in it, but never the secret.
    """
    secrets = [token.encode()] if token else []
    base = read_object(folder / CONFIG).get("base_model_name_or_path")
    problems = []
    if isinstance(base, str) and _ABSOLUTE.fullmatch(base):
        problems.append(
            f"{CONFIG}: base_model_name_or_path is a folder of this machine, which nobody else has; write the base's "
            "Hub id there"
        )
    for name in names:
        if name == CARD:
            problems += [f"{name}: {fault}" for fault in _leaks(name, card.encode(), secrets)]
        elif (path := folder / name).stat().st_size:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                problems += [f"{name}: {fault}" for fault in _leaks(name, content, secrets)]
        if name.endswith(".json") and name not in _VOCABULARY:
            found = [key for key, text in _strings(read_object(folder / name)) if _ABSOLUTE.fullmatch(text)]
            problems += [f"{name}: {key} is a path of this machine" for key in found if "base_model_name" not in key]
    if problems:
        raise ModelError(f"{folder}: not uploaded, these files would tell what is private\n{listed(problems)}")


def check_usable(folder: Path) -> None:
    """Make sure that others can use an adapter, as far as that can be said without its base; every tensor is read.

    Raises:
        ModelError: with everything that is wrong with it.
    """
    try:
        check_adapter(folder)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from None
    if problems := list(_tensor_faults(folder / WEIGHTS)):
        raise ModelError(
            f"{folder}: not uploaded, nobody could use this adapter; train it again\n{listed(problems, 8)}"
        )


def check_incoming(folder: Path) -> list[str]:
    """Check a downloaded adapter before any library reads it; returns what is worth a warning.

    Raises:
        ModelError: with everything that is wrong with it.
    """
    config = check_adapter(folder)
    base = config.get("base_model_name_or_path")
    if not base or _ABSOLUTE.fullmatch(base):
        return [f"its base model is {base or 'not named'}: a folder of its author's machine; you need that very model"]
    return []


def _tensor_faults(path: Path) -> Iterator[str]:
    """Which tensors have names that PEFT does not give, or hold what is no finite number."""
    import torch
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            if not name.startswith("base_model.model.") or ".lora_" not in name:
                yield f"{WEIGHTS}: {name}: no name that PEFT gives a LoRA tensor"
            elif not torch.isfinite(file.get_tensor(name)).all():
                yield f"{WEIGHTS}: {name}: holds NaN or infinity"


def _leaks(name: str, content: Any, secrets: list[bytes]) -> Iterator[str]:
    """What in `content`, bytes or a memory map, must not leave this machine."""
    if any(content.find(secret) >= 0 for secret in secrets):
        yield "holds your Hub token"
    elif not name.endswith(".safetensors") and _TOKEN.search(content):
        yield "holds what looks like a Hub token"
    if name not in _VOCABULARY:  # a vocabulary holds pieces of any text, and no paths
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
