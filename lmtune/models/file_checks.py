"""A file of a model or an adapter, looked at before a library reads it: what it is, if it is not what its name says.

A web page saved in place of a download, or the pointer that Git leaves where LFS is not installed, are the usual
reasons why weights cannot be read, and a library only says that their header is odd. Of safetensors the header alone
is read here, no weight.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lmtune.errors import ModelError

_MAX_JSON_BYTES = 10_000_000
_DOWNLOAD = "download the file itself"
_POINTER = ("a Git LFS pointer", f"{_DOWNLOAD}: `git lfs pull` in its folder, or `hf download`")
_PAGE = ("a web page", f"{_DOWNLOAD}, for example with `hf download`")
_PICKLE = ("pickled weights, which can run code when read", "lmtune reads safetensors only")
_POINTERS_AND_PAGES = (  # how files begin that are found in place of others, in small letters
    (b"version https://git-lfs", _POINTER), (b"<!doctype", _PAGE), (b"<html", _PAGE), (b"<?xml", _PAGE),
)  # fmt: skip
_READ = (".json", ".safetensors", ".jinja", ".model", "merges.txt", "vocab.txt")  # names of what libraries read
_PICKLES = ((b"pk", _PICKLE), (b"\x80", _PICKLE))


def unreachable(name: str) -> str | None:
    """Why the system can look for no file of this name: begins with the name, shortened. None if it can."""
    try:
        Path(name).exists()
    except OSError as error:
        return f"{name if len(name) <= 60 else name[:56] + '…'}: {error.strerror}"
    return None


def odd_files(folder: Path) -> list[str]:
    """What in a model's or an adapter's folder has a file's name and is none, and what to do about it.

    A library that opens a pipe waits for ever, and one that reads a device may never come to its end.
    """
    if not folder.is_dir():
        return []
    return [
        f"{path.name} is {'a folder' if path.is_dir() else 'a pipe or a device'}, not a file; put the file itself there"
        for path in sorted(folder.iterdir())
        if path.name.endswith(_READ) and path.exists() and not path.is_file()
    ]


def generation_fault(path: Path) -> str | None:
    """What is wrong with a generation_config.json and what to do about it, or None."""
    from transformers import GenerationConfig

    try:
        GenerationConfig.from_dict(read_object(path))
    except ModelError as error:
        return str(error)
    except Exception as error:  # what its parts raise for values that they do not know is of any kind
        return f"{path.name}: cannot be used ({type(error).__name__}: {error}); correct it, or take it away"
    return None


def weights_fault(path: Path) -> str | None:
    """What keeps `path` from being read as safetensors and what to do about it, or None."""
    from safetensors import SafetensorError, safe_open

    if fault := _absence(path):
        return fault
    try:
        with safe_open(path, framework="numpy"):
            return None
    except (SafetensorError, OSError) as error:
        again = f"{path.name}: damaged or cut off ({error}); copy or download it again"
        return _in_place_of("weights", path, *_PICKLES) or again


def shapes_of(path: Path) -> dict[str, list[int]]:
    """The shape of each tensor in a safetensors file, by name; no weight is read."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a dict


def types_of(path: Path) -> dict[str, str]:
    """The type of each tensor in a safetensors file as its header spells it, by name; no weight is read."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return {name: str(file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118 - not a dict


def text_fault(path: Path, kind: str = "JSON") -> str | None:
    """What `path` is in place of text of some kind and what to do about it, or None."""
    return _absence(path) or _in_place_of(kind, path)


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of moderate size.

    Raises:
        ModelError: it is no such file; begins with the file's name.
    """
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ModelError(f"{path.name}: {path.stat().st_size:,} bytes; a config has at most {_MAX_JSON_BYTES:,}")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(text_fault(path) or f"{path.name}: not valid JSON ({error})") from None
    if not isinstance(tree, dict):
        raise ModelError(f"{path.name}: holds {type(tree).__name__}, not an object")
    return tree


def _absence(path: Path) -> str | None:
    if path.is_symlink() and not path.exists():
        return f"{path.name} is a link to a file that is not there; copy the file itself"
    if path.is_file() and not path.stat().st_size:
        return f"{path.name} is empty; copy or download it again"
    return None


def _in_place_of(what: str, path: Path, *more: tuple[bytes, tuple[str, str]]) -> str | None:
    """That `path` is something else than `what`, if its beginning tells."""
    with path.open("rb") as file:
        head = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for start, (found, advice) in (*_POINTERS_AND_PAGES, *more):
        if head.startswith(start):
            return f"{path.name} is {found}, not {what}; {advice}"
    return None
