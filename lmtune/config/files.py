"""Which config a command means: a YAML file, one that ships with lmtune by its name, or none but a model and data.

    find_config("qwen3_0.6b")          # ./qwen3_0.6b.yaml if there is one, else the one in recipes/configs

What is given in a config's place by mistake (data, a model, a misspelt name) is named for what it is, with the command
that was probably meant.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import unicodedata
from collections.abc import Collection, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from lmtune.errors import ConfigError

_YAML = (".yaml", ".yml")
_ROWS = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".xlsx", ".xls", ".txt")
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")
_SNIFFED_BYTES = 1 << 20
_MAX_NAME = 100
_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)+\s*=")


def shipped_configs() -> dict[str, Path]:
    """The configs that ship with lmtune, by name."""
    folder = Path(str(files("lmtune.recipes"))) / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def shipped_example(data: str) -> str:
    """Where `examples/NAME`, as shipped configs write it, is: here if there is such a file, else inside lmtune."""
    packaged = Path(str(files("lmtune.examples"))) / Path(data).name
    here = not data.startswith("examples/") or os.path.exists(data)
    return str(packaged) if not here and packaged.is_file() else data


def find_config(target: str | os.PathLike[str], sections: Collection[str] = (), verb: str = "finetune") -> Path:
    """The YAML file that `target` names; a local file comes before one that ships with lmtune.

    Args:
        target: a path, or a name with or without `.yaml`.
        sections: the keys that a config has at its top; what begins with other keys may be data.
        verb: the command, for what a message advises.

    Raises:
        ConfigError: there is no such file, or it is data or a model; says what to write instead.
    """
    path, name = Path(target), os.fspath(target)
    shipped = shipped_configs()
    for local in (path, Path(f"{name}.yaml")):
        if os.path.isfile(local):  # unlike pathlib's, also false for names that are too long
            if sections and looks_like_data(local, sections):
                raise ConfigError(_is_data(name, verb))
            return local
    if (known := shipped.get(name.removesuffix(".yaml"))) is not None:
        return known
    if (problem := _other_thing(path, name, verb)) and sections:
        raise ConfigError(problem)
    raise ConfigError(f"{name}: no such config file{_suggestion(path, shipped)}")


def plain_name(name: str) -> str:
    """`name`, composed (NFC), if it can be the name of a run's folder.

    Letters and digits may be of any script; a name cannot lead to another folder, hide, or command a terminal.

    Raises:
        ValueError: it cannot; says what a name looks like.
    """
    name = unicodedata.normalize("NFC", name)
    begins_well = name != "" and unicodedata.category(name[0])[0] in "LN"
    if not (begins_well and all(map(_fits_a_name, name)) and len(name) <= _MAX_NAME):
        raise ValueError(
            "one folder name: letters and digits of any script, `.`, `_`, `-`, beginning with a letter or digit, at "
            f"most {_MAX_NAME}"
        )
    return name


def looks_like_data(path: Path, sections: Collection[str]) -> bool:
    """Whether a file holds rows and no settings, by its name or its first line."""
    if _named_like_data(path.name):
        return True
    with path.open("rb") as file:
        head = file.read(_SNIFFED_BYTES).decode("utf-8-sig", "replace").lstrip()
    if path.suffix.lower() in _YAML or not head.startswith(("{", "[")):
        return False
    try:
        first: Any = json.loads(head.splitlines()[0])
    except (ValueError, RecursionError):
        return head.startswith("[")  # an array over several lines; no config is a list
    return not (isinstance(first, dict) and set(first) & set(sections))


def is_override(word: str) -> bool:
    """Whether a word of the command line is `section.key=value` and names no file."""
    return _OVERRIDE.match(word) is not None and not os.path.exists(word)


def split_data(words: Sequence[str | Path], verb: str) -> tuple[list[str], list[str]]:
    """(data, overrides) among the words of a command line whose config is an option.

    Raises:
        ConfigError: a config stands where data is expected.
    """
    texts = [str(word) for word in words]
    data = [text for text in texts if not is_override(text)]
    for word in data:
        if word.lower().endswith(_YAML):
            raise ConfigError(
                f"{word}: this is a config; expected data in this place; write `lmtune {verb} --config {word}`"
            )
    return data, [text for text in texts if text not in data]


def run_name(data: str) -> str:
    """A run's name made of that of its data: `../my rows.jsonl` gives `my-rows`."""
    stem = os.path.basename(os.path.normpath(data))
    while (shorter := os.path.splitext(stem)[0]) != stem and _named_like_data(stem):
        stem = shorter
    stem = stem.removesuffix(".json")
    marks = [mark if _fits_a_name(mark) else " " for mark in unicodedata.normalize("NFC", stem)]
    return "-".join("".join(marks).split()).strip("-._")[:60] or "run"


def _fits_a_name(mark: str) -> bool:
    """Whether a run's name may hold this: a letter, a digit, a sign that is part of one, or `._-`."""
    return mark in "._-" or unicodedata.category(mark)[0] in "LNM"


def _named_like_data(name: str) -> bool:
    name = name.lower()
    for suffix in _PACKED:
        name = name.removesuffix(suffix)
    return name.endswith(_ROWS)


def _is_data(name: str, verb: str) -> str:
    return (
        f"{name}: this is data; expected a config (YAML) in this place; write "
        f"`lmtune {verb} --model MODEL --data {name}`, or `lmtune {verb} CONFIG data.train={name}`"
    )


def _other_thing(path: Path, name: str, verb: str) -> str | None:
    """What a name that is not a file probably means, or None."""
    if os.path.isdir(path):
        inside = os.listdir(path)
        if "config.json" in inside or "adapter_config.json" in inside:
            return f"{name}: this is a model; write `lmtune {verb} --model {name} --data FILE`"
        if any(_named_like_data(one) or one.lower().endswith(".json") for one in inside):
            return _is_data(name, verb)
        return f"{name}: no such config file; it is a folder"
    if _named_like_data(name):
        return (
            f"{name}: no such file; and in this place a config (YAML) is expected: data is given as "
            f"`lmtune {verb} --model MODEL --data FILE`"
        )
    if name == "tiny" or (re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.lower().endswith(_YAML)):
        return (
            f"{name}: no such config file; if it is a model, write `lmtune {verb} --model {name} --data FILE`"
            + _suggestion(path, shipped_configs()).replace("; ", "\n  ", 1)
        )
    return None


def _suggestion(path: Path, shipped: dict[str, Path]) -> str:
    """The nearest configs, here and shipped, and which are shipped."""
    stem = path.name.removesuffix(".yaml").removesuffix(".yml")
    folder = path.parent
    local = {p.stem: str(p) for p in sorted(folder.glob("*.y*ml"))} if os.path.isdir(folder) else {}
    near = difflib.get_close_matches(stem, [*local, *shipped], n=2, cutoff=0.6)
    names = [local.get(one, one) for one in dict.fromkeys(near)]
    known = "lmtune has " + ", ".join(shipped) if shipped else ""
    return f"; did you mean {' or '.join(names)}?" if names else f"; {known}; `lmtune init` writes one of your own"
