"""What must not leave this machine, and what nobody could use: the files of a push are searched before they are sent.

    check_private("runs/support/adapter", {"adapter_config.json": path, "README.md": b"…"}, hub_token())
    check_usable(Path("runs/support/adapter"), is_adapter=True)

An error names each file and what is in it, never the secret itself.
"""

from __future__ import annotations

import mmap
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lmtune.errors import ModelError
from lmtune.io.atomic import parse_object
from lmtune.io.console import HUB_TOKEN
from lmtune.io.text import format_list
from lmtune.models.hub import VOCABULARY
from lmtune.models.tuning.adapter_files import CONFIG, WEIGHTS, check_adapter
from lmtune.models.validate import check_weights, read_object

Files = Mapping[str, Path | bytes]  # by their names in the repository: where one is, or its content
_TOKEN = re.compile(HUB_TOKEN.encode())
_ABSOLUTE = re.compile(r"(/[^/\s]+){2,}/?|~/.+|[A-Za-z]:[\\/].+|\\\\.+")
_NUMBERS = (".safetensors", ".gguf")  # where any text may occur by chance


def is_absolute(text: str) -> bool:
    """Whether `text` is a path of some machine and nothing else."""
    return _ABSOLUTE.fullmatch(text) is not None


def check_private(where: str, files: Files, token: str | None) -> None:
    """Search files for what is private.

    Args:
        where: what they belong to, for the error.
        files: by their names in the repository.
        token: the Hub token in use, which must be in none of them.

    Raises:
        ModelError: with every file that holds a token, a path of this machine or the address of a folder of the user's.
    """
    secrets = [token.encode()] if token else []
    problems = list[str]()
    for name, source in files.items():
        if isinstance(source, bytes):
            problems += [f"{name}: {fault}" for fault in _leaks(name, source, secrets)]
        elif source.stat().st_size:
            with source.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                problems += [f"{name}: {fault}" for fault in _leaks(name, content, secrets)]
        if name.endswith(".json") and Path(name).name not in VOCABULARY:
            tree = parse_object(source) if isinstance(source, bytes) else read_object(source)
            found = [key for key, text in _strings(tree) if is_absolute(text)]
            problems += [f"{name}: {key} is a path of this machine; write a Hub id there" for key in found]
    if problems:
        raise ModelError(f"{where}: not uploaded, these files would tell what is private\n{format_list(problems)}")


def check_usable(folder: Path, is_adapter: bool) -> None:
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


def _leaks(name: str, content: bytes | mmap.mmap, secrets: list[bytes]) -> Iterator[str]:
    """What in `content` must not leave this machine."""
    if any(content.find(secret) >= 0 for secret in secrets):
        yield "holds your Hub token"
    elif not name.endswith(_NUMBERS) and _TOKEN.search(content):
        yield "holds what looks like a Hub token"
    if Path(name).name not in VOCABULARY:  # a vocabulary holds pieces of any text, and no paths
        places = {"home folder": Path.home(), "current folder": Path.cwd(), "temporary folder": tempfile.gettempdir()}
        for what, place in places.items():
            if len(str(place)) > 3 and content.find(f"{place}/".encode()) >= 0:
                yield f"holds the path of your {what}"


def _strings(tree: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string in a JSON tree with its dotted key."""
    if isinstance(tree, str):
        yield key, tree
    elif isinstance(tree, dict):
        for name, value in tree.items():
            yield from _strings(value, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list):
        for value in tree:
            yield from _strings(value, key)
