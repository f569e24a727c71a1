"""Which config a command means: a YAML file, one that ships with lmtune by its name, or none but a model and data.

    find_config("qwen3_0.6b")          # ./qwen3_0.6b.yaml if there is one, else the one in recipes/configs

Data or a model in a config's place is named for what it is, with the command that was probably meant.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import unicodedata
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from lmtune.errors import ConfigError

_YAML = (".yaml", ".yml")
_ROWS = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".xlsx", ".xls", ".txt")
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")
_SNIFFED_BYTES = 1 << 20
_MAX_NAME = 100
_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)*\s*=")


def shipped_configs() -> dict[str, Path]:
    """The configs that ship with lmtune, by name."""
    folder = Path(str(files("lmtune.recipes"))) / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def shipped_example(data: str) -> str:
    """Where `examples/NAME`, as shipped configs write it, is: here if there is such a file, else inside lmtune."""
    packaged = Path(str(files("lmtune.examples"))) / Path(data).name
    here = not data.startswith("examples/") or os.path.exists(data)
    return str(packaged) if not here and packaged.is_file() else data


def find_config(target: str | os.PathLike[str], verb: str = "finetune") -> Path:
    """The YAML file that `target` names, with or without `.yaml`; a local file comes before one that ships with lmtune.

    Raises ConfigError if there is none, or it is data or a model: the message says what `lmtune VERB` takes.
    """
    name = os.fspath(target)
    for local in (name, f"{name}.yaml"):
        if os.path.isfile(local):  # unlike pathlib's, also false for names that are too long
            if _looks_like_data(Path(local)):
                raise ConfigError(_is_data(name, verb))
            return Path(local)
    known = shipped_configs().get(name.removesuffix(".yaml"))
    if known is None:
        raise ConfigError(_absence(name, verb))
    return known


def plain_name(name: str) -> str:
    """`name`, composed (NFC), if it can be the name of a run's folder; ValueError says what a name looks like.

    Letters and digits may be of any script; a name cannot lead to another folder, hide, or command a terminal.
    """
    name = unicodedata.normalize("NFC", name)
    begins_well = name != "" and unicodedata.category(name[0])[0] in "LN"
    if not (begins_well and all(map(_fits_a_name, name)) and len(name) <= _MAX_NAME):
        raise ValueError(
            "one folder name: letters and digits of any script, `.`, `_`, `-`, beginning with a letter or digit, at "
            f"most {_MAX_NAME}"
        )
    return name


def is_override(word: str) -> bool:
    """Whether a word of the command line is `section.key=value`, or `section={…}`, and names no file."""
    return _OVERRIDE.match(word) is not None and not os.path.exists(word)


def split_data(words: Sequence[str | Path], verb: str) -> tuple[list[str], list[str]]:
    """(data, overrides) among the words of a command line whose config is an option.

    Raises ConfigError if a config stands where data is expected.
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
    marks = [mark if _fits_a_name(mark) else " " for mark in unicodedata.normalize("NFC", stem.removesuffix(".json"))]
    return "-".join("".join(marks).split()).strip("-._")[:60] or "run"


def _fits_a_name(mark: str) -> bool:
    """Whether a run's name may hold this: a letter, a digit, a sign that is part of one, or `._-`."""
    return mark in "._-" or unicodedata.category(mark)[0] in "LNM"


def _named_like_data(name: str) -> bool:
    name = name.lower()
    for suffix in _PACKED:
        name = name.removesuffix(suffix)
    return name.endswith(_ROWS)


def _looks_like_data(path: Path) -> bool:
    """Whether a file holds rows, by its name or its first line; of a config in JSON every value is a section."""
    if _named_like_data(path.name):
        return True
    with path.open("rb") as file:
        head = file.read(_SNIFFED_BYTES).decode("utf-8-sig", "replace").lstrip()
    if path.suffix.lower() in _YAML or not head.startswith(("{", "[")):
        return False
    try:
        first = json.loads(head.splitlines()[0])
    except (ValueError, RecursionError):
        return head.startswith("[")  # an array over several lines; no config is a list
    return not (isinstance(first, dict) and all(isinstance(value, dict) for value in first.values()))


def _is_data(name: str, verb: str) -> str:
    return (
        f"{name}: this is data; expected a config (YAML) in this place; write "
        f"`lmtune {verb} --model MODEL --data {name}`, or `lmtune {verb} CONFIG data.train={name}`"
    )


def _absence(name: str, verb: str) -> str:
    """What to say where there is no config of that name: what it probably is, or the nearest configs."""
    as_model = f"`lmtune {verb} --model {name} --data FILE`"
    if os.path.isdir(name):
        inside = os.listdir(name)
        if "config.json" in inside or "adapter_config.json" in inside:
            return f"{name}: this is a model; write {as_model}"
        if any(_named_like_data(one) or one.lower().endswith(".json") for one in inside):
            return _is_data(name, verb)
    if _named_like_data(name):
        return f"{name}: no such file; give data as `lmtune {verb} --model MODEL --data FILE`"
    text = f"{name}: no such config file"
    if name == "tiny" or (re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.lower().endswith(_YAML)):
        text += f"; if it is a model, write {as_model}"
    path, shipped = Path(name), shipped_configs()
    local = {one.stem: str(one) for one in sorted(path.parent.glob("*.y*ml"))} if os.path.isdir(path.parent) else {}
    stem = path.name.removesuffix(".yaml").removesuffix(".yml")
    names = {**{name: name for name in shipped}, **local}
    if near := difflib.get_close_matches(stem, names, n=2):
        return f"{text}; did you mean {' or '.join(names[one] for one in near)}?"
    return f"{text}; lmtune has {', '.join(shipped)}; `lmtune init` writes one of your own"
