"""An adapter folder, looked at before PEFT or transformers read a line of it: what a plain LoRA adapter may hold.

`adapter_config.json` decides which classes PEFT builds and how large they are, so it is checked against a schema of
our own; whatever could name code to run, or multiply layers, is refused. Of the weights only the header is read here:
names, shapes and types. `lmtune pull`, chat, merge and resuming all come through `check_adapter`, so an adapter is
judged alike wherever it comes from. Every problem is listed, not the first one only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from lmtune.config.schema import Quantization
from lmtune.data.rendering import Template
from lmtune.errors import ModelError, listed
from lmtune.models.file_checks import generation_fault, odd_files, read_object, weights_fault
from lmtune.models.lora_config import config_faults

__all__ = ["CONFIG", "NOTES", "WEIGHTS", "check_adapter", "read_object"]

WEIGHTS, CONFIG, NOTES = "adapter_model.safetensors", "adapter_config.json", "lmtune.json"

_GENERATION = "generation_config.json"
_FINGERPRINT = re.compile("[0-9a-f]{32}")
_NOTES_ALLOWED = {
    "quantization": get_args(Quantization),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "template": get_args(Template),
}


def check_adapter(folder: Path) -> dict[str, Any]:
    """The content of `adapter_config.json`, after everything in the folder was checked.

    Raises:
        ModelError: with everything that is wrong with it, without the folder's name.
    """
    if odd := odd_files(folder):
        raise ModelError("; ".join(odd))
    if not (folder / WEIGHTS).is_file():
        pickled = any((folder / f"adapter_model{suffix}").is_file() for suffix in (".bin", ".pt", ".pth"))
        hint = "it holds a pickled adapter, which can run code when read" if pickled else "it is no adapter folder"
        raise ModelError(f"no {WEIGHTS}; {hint}")
    if not (folder / CONFIG).is_file():
        raise ModelError(f"no {CONFIG}; it is no adapter folder")
    config = read_object(folder / CONFIG)
    problems = [f"{CONFIG}: {fault}" for fault in config_faults(config)]
    if (folder / NOTES).is_file():
        problems += [f"{NOTES}: {fault}" for fault in _notes_faults(read_object(folder / NOTES))]
    problems += _text_faults(folder)
    if unreadable := weights_fault(folder / WEIGHTS):
        problems.append(unreadable)
    else:
        problems += [f"{WEIGHTS}: {fault}" for fault in _weight_faults(folder / WEIGHTS, config)]
    if problems:
        raise ModelError(f"this is no adapter that lmtune can use\n{listed(problems)}")
    return config


def check_texts(folder: Path) -> None:
    """Look at what transformers reads beside an adapter's weights, before it does.

    Raises:
        ModelError: with everything that is wrong with it.
    """
    if faults := odd_files(folder) or list(_text_faults(folder)):
        raise ModelError(f"{folder}: {'; '.join(faults)}")


def _text_faults(folder: Path) -> Iterator[str]:
    for name in ("tokenizer_config.json", _GENERATION):
        path = folder / name
        if not path.is_file():
            continue
        try:
            tree = read_object(path)
        except ModelError as error:
            yield str(error)
            continue
        if "auto_map" in tree:
            yield f"{name}: auto_map names code of the repository, which lmtune never runs"
        elif name == _GENERATION and (fault := generation_fault(path)):
            yield fault


def _notes_faults(notes: Mapping[str, Any]) -> Iterator[str]:
    for key, allowed in _NOTES_ALLOWED.items():
        if key in notes and notes[key] not in allowed:
            yield f"{key} is {notes[key]!r}; should be {' or '.join(allowed)}"
    for key in ("base_model", "revision", "base_fingerprint", "system"):
        if not isinstance(notes.get(key), (str, type(None))):
            yield f"{key} should be text"
    trained_on = notes.get("base_fingerprint")
    if isinstance(trained_on, str) and not _FINGERPRINT.fullmatch(trained_on):
        yield f"base_fingerprint is {trained_on[:60]!r}; should be 32 hex digits, or null"


def _weight_faults(path: Path, config: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the tensors, as far as their header tells: names, shapes, types; no weight is read."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        shapes = {name: list(part.get_shape()) for name, part in slices.items()}
        types = {name: str(part.get_dtype()) for name, part in slices.items()}
    if not any("lora_A" in name for name in shapes):
        yield "holds no LoRA tensor"
    yield from (f"{n}: type {t}; should be a float" for n, t in types.items() if t not in ("F32", "F16", "BF16"))
    for name, shape in shapes.items():
        pair = shapes.get(name.replace("lora_A", "lora_B"))
        if "lora_A" not in name:
            continue
        if pair is None or len(shape) < 2 or len(pair) < 2 or shape[0] != pair[1]:
            yield f"{name}: no lora_B that fits its shape {shape}"
        elif not config.get("rank_pattern") and not _is_of_rank(shape[0], config):
            yield f"{name}: rank {shape[0]}, but {CONFIG} says {config.get('r')}"


def _is_of_rank(rows: int, config: Mapping[str, Any]) -> bool:
    """Whether an A of `rows` is of the config's rank; one over a tensor of experts has the rows of all of them."""
    rank = config.get("r")
    if not isinstance(rank, int) or rank < 1:  # which is said already
        return rows == rank
    return rows == rank or (bool(config.get("target_parameters")) and rows % rank == 0)
