"""What may leave this machine in an adapter's repository, and what is taken from one.

Outgoing: files of known names only, and in them no token, no path of this machine. Incoming: the same names only,
weights in safetensors, and an `adapter_config.json` that describes a plain LoRA adapter; whatever could name code to
run is refused before PEFT or transformers read a line of it. Every problem is listed, not the first one only.
"""

from __future__ import annotations

import json
import math
import mmap
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lmtune.errors import ConfigError, ModelError, listed

WEIGHTS, CONFIG, NOTES, CARD = "adapter_model.safetensors", "adapter_config.json", "lmtune.json", "README.md"
_VOCABULARY = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt")
ADAPTER_FILES = (
    WEIGHTS, CONFIG, NOTES, CARD, *_VOCABULARY, "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")

_REPOSITORY = re.compile(r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9_])?/[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?", re.ASCII)
_TOKEN = re.compile(rb"hf_[A-Za-z0-9]{20,}")
_ABSOLUTE = re.compile(r"(/[^/\s]+){2,}/?|~/.+|[A-Za-z]:[\\/].+|\\\\.+")
_MAX_JSON_BYTES = 10_000_000
_MAX_RANK = 4096
# Keys through which a config reaches beyond weights: classes to import by name, or layers to multiply.
_FORBIDDEN = ("auto_mapping", "auto_map", "custom_modules", "trust_remote_code", "megatron_config", "layer_replication")
_NOTES_ALLOWED = {
    "quantization": ("none", "nf4", "int8"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "template": ("auto", "chat", "plain", "thinking"),
}


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
    base = _read_object(folder / CONFIG).get("base_model_name_or_path")
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
            found = [key for key, text in _strings(_read_object(folder / name)) if _ABSOLUTE.fullmatch(text)]
            problems += [f"{name}: {key} is a path of this machine" for key in found if "base_model_name" not in key]
    if problems:
        raise ModelError(f"{folder}: not uploaded, these files would tell what is private\n{listed(problems)}")


def check_incoming(folder: Path) -> list[str]:
    """Check a downloaded adapter before any library reads it; returns what is worth a warning.

    Raises:
        ModelError: with everything that is wrong with it.
    """
    config = _read_object(folder / CONFIG)
    problems = [f"{CONFIG}: {fault}" for fault in _config_faults(config)]
    if (folder / NOTES).is_file():
        problems += [f"{NOTES}: {fault}" for fault in _notes_faults(_read_object(folder / NOTES))]
    for name in ("tokenizer_config.json", "generation_config.json"):
        if (folder / name).is_file() and "auto_map" in _read_object(folder / name):
            problems.append(f"{name}: auto_map names code of the repository, which lmtune never runs")
    problems += [f"{WEIGHTS}: {fault}" for fault in _weight_faults(folder / WEIGHTS, config)]
    if problems:
        raise ModelError(f"this is no adapter that lmtune can use\n{listed(problems)}")
    base = config.get("base_model_name_or_path")
    if not base or _ABSOLUTE.fullmatch(base):
        return [f"its base model is {base or 'not named'}: a folder of its author's machine; you need that very model"]
    return []


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


def _read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of moderate size."""
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ModelError(f"{path.name}: {path.stat().st_size:,} bytes; a config has at most {_MAX_JSON_BYTES:,}")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path.name}: not valid JSON ({error})") from None
    if not isinstance(tree, dict):
        raise ModelError(f"{path.name}: holds {type(tree).__name__}, not an object")
    return tree


def _config_faults(config: Mapping[str, Any]) -> Iterator[str]:
    """What keeps `config` from being a plain LoRA config."""
    kind = config.get("peft_type")
    if kind != "LORA":
        yield f"peft_type is {kind!r}; lmtune uses LORA adapters"
        return
    ranks = {"r": config.get("r"), **_patterns(config, "rank_pattern")}
    yield from (f"{k} is {v!r}; should be 1 to {_MAX_RANK}" for k, v in ranks.items() if not _is_rank(v))
    alphas = {"lora_alpha": config.get("lora_alpha"), **_patterns(config, "alpha_pattern")}
    yield from (f"{k} is {v!r}; should be a number above 0" for k, v in alphas.items() if not _is_positive(v))
    if not _is_names(config.get("target_modules")):
        yield "target_modules should be a name or a list of names"
    for key in ("modules_to_save", "target_parameters", "exclude_modules"):
        if config.get(key) is not None and not _is_names(config[key]):
            yield f"{key} should be a list of names"
    for key in ("base_model_name_or_path", "revision"):
        if not isinstance(config.get(key), (str, type(None))):
            yield f"{key} should be text"
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        yield f"task_type is {config['task_type']!r}; lmtune uses CAUSAL_LM"
    yield from (f"{key} is set, which a plain LoRA adapter does not need" for key in _FORBIDDEN if config.get(key))


def _notes_faults(notes: Mapping[str, Any]) -> Iterator[str]:
    for key, allowed in _NOTES_ALLOWED.items():
        if key in notes and notes[key] not in allowed:
            yield f"{key} is {notes[key]!r}; should be {' or '.join(allowed)}"
    for key in ("base_model", "revision", "base_fingerprint", "system"):
        if not isinstance(notes.get(key), (str, type(None))):
            yield f"{key} should be text"


def _weight_faults(path: Path, config: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the tensors, as far as their header tells: names, shapes, types; no weight is read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            shapes = {name: list(part.get_shape()) for name, part in slices.items()}
            types = {name: str(part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        yield f"damaged ({error}); download it again"
        return
    if not any("lora_A" in name for name in shapes):
        yield "holds no LoRA tensor"
    yield from (f"{n}: type {t}; should be a float" for n, t in types.items() if t not in ("F32", "F16", "BF16"))
    for name, shape in shapes.items():
        pair = shapes.get(name.replace("lora_A", "lora_B"))
        if "lora_A" not in name:
            continue
        if pair is None or len(shape) < 2 or len(pair) < 2 or shape[0] != pair[1]:
            yield f"{name}: no lora_B that fits its shape {shape}"
        elif not config.get("rank_pattern") and shape[0] != config.get("r"):
            yield f"{name}: rank {shape[0]}, but {CONFIG} says {config.get('r')}"


def _patterns(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The entries of `rank_pattern` or `alpha_pattern`, by a name for error messages."""
    patterns = config.get(key) or {}
    return {f"{key}.{name}": value for name, value in patterns.items()} if isinstance(patterns, dict) else {key: None}


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MAX_RANK


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _is_names(value: Any) -> bool:
    names = [value] if isinstance(value, str) else value
    return isinstance(names, list) and bool(names) and all(isinstance(n, str) and 0 < len(n) <= 500 for n in names)
