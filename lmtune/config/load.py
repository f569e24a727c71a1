"""A config from a YAML file, command-line overrides or plain values, checked whole; and back to YAML.

    config = load_config(FinetuneConfig, "recipes/configs/quickstart.yaml", ["train.epochs=1"])

All errors of a file are reported at once, by `section.key`, with the nearest known key for a misspelt one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lmtune.config.files import find_config, is_override, run_name, shipped_configs, shipped_example
from lmtune.config.schema import FinetuneConfig, T, _count_of, _describe_all
from lmtune.config.yaml import read_yaml, read_yaml_value, write_yaml
from lmtune.errors import ConfigError
from lmtune.io.console import warn
from lmtune.io.text import format_list

Overrides = Mapping[str, object] | Sequence[str]  # values by `section.key`, or `section.key=value` with YAML's values


def load_config(schema: type[T], path: str | Path, overrides: Overrides = ()) -> T:
    """Read `path`, apply `key=value` overrides, and return the checked config.

    Args:
        schema: a `section` class, for example `FinetuneConfig`.
        path: a YAML file, or the name of one that ships with lmtune.
        overrides: `section.key=value`, the value written as in YAML, or values by key.

    Raises:
        ConfigError: with every problem found, each by `section.key`.
    """
    path = find_config(path)
    return _checked(schema, _read(path), overrides, where=str(path), name=path.stem)


def command_config(
    target: str | Path | None, overrides: Sequence[str] = (), model: str | None = None,
    data: Sequence[str | Path] = (), verb: str = "finetune",
) -> FinetuneConfig:  # fmt: skip
    """The settings that a command line means.

    Args:
        target: a config, by path or by name; None where `model` and `data` say enough. An override may stand here too,
            since it is the first word of a command line without a config.
        overrides: `section.key=value`.
        model: stands for `model.name`.
        data: stand for `data.train`.
        verb: the command, for messages.

    Raises:
        ConfigError: with every problem found; or nothing says which model and which data.
    """
    if isinstance(target, str) and is_override(target):
        overrides, target = [target, *overrides], None
    sections = [*(field.name for field in fields(FinetuneConfig)), "adapter"]
    path = None if target is None else find_config(target, sections, verb)
    tree: dict[str, Any] = {} if path is None else _read(path)
    if path is not None and "adapter" in read_yaml(path):
        warn(f"{path}: the section adapter is called tuning now, and adapter.method tuning.kind; both names are read")
    if model:
        _set(tree, "model.name", model)
    if data:
        _set(tree, "data.train", str(data[0]) if len(data) == 1 else [str(path) for path in data])
    _apply(tree, overrides)
    if path is None:
        _require_model_and_data(tree, verb)
    train = _get(tree, "data", "train")
    name = path.stem if path is not None else run_name(str(train[0] if isinstance(train, list) and train else train))
    return _checked(FinetuneConfig, tree, (), str(path or f"lmtune {verb}"), name)


def _require_model_and_data(tree: Mapping[str, Any], verb: str) -> None:
    """Raise ConfigError where a command without a config does not say which model or which data."""
    keys = {"--model MODEL": ("model", "name"), "--data FILE": ("data", "train")}
    missing = [flag for flag, key in keys.items() if not _get(tree, *key)]
    if missing:
        raise ConfigError(
            f"{' and '.join(missing)}: missing; write `lmtune {verb} --model MODEL --data FILE`, or "
            f"`lmtune {verb} CONFIG`; `lmtune init` writes a config that fits this machine"
        )


def _get(tree: Any, *keys: str) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def _read(path: Path) -> dict[str, Any]:
    """The tree in a config file; examples that a shipped one names are found where lmtune is installed."""
    tree = with_tuning_section(read_yaml(path), str(path))
    if path in shipped_configs().values() and isinstance(data := tree.get("data"), dict):
        for key in ("train", "validation"):
            if isinstance(data.get(key), str):
                data[key] = shipped_example(data[key])
    return tree


def _checked(schema: type[T], tree: dict[str, Any], overrides: Overrides, where: str, name: str) -> T:
    """The config of `tree` with `overrides`; a run without a name gets `name`."""
    _apply(tree, overrides)
    if schema is FinetuneConfig:
        run = tree.setdefault("run", {})
        if isinstance(run, dict) and run.get("name") is None:
            run["name"] = name
    return build_config(schema, tree, where=where)


def with_overrides(config: FinetuneConfig | str | os.PathLike[str] | None, overrides: Overrides) -> dict[str, Any]:
    """The plain tree of a config, a YAML file or nothing, with `overrides` by `section.key` put in.

    Args:
        config: settings, a YAML file, or None for an empty tree.
        overrides: values by key, or `section.key=value` as on the command line.

    Raises:
        ConfigError: the file cannot be read, or an override has no such form.
    """
    tree: dict[str, Any] = {}
    if isinstance(config, (str, os.PathLike)):
        tree = _read(find_config(os.fspath(config)))
    elif config is not None:
        tree = to_tree(config)
    _apply(tree, overrides)
    return tree


def with_tuning_section(tree: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`tree` with `adapter: {method: …}`, the old name of `tuning: {kind: …}`, under the new one.

    Raises:
        ConfigError: both names are there.
    """
    if "tuning" in tree and "adapter" in tree:
        raise ConfigError(f"{where}: tuning and adapter: two names of one section; put its settings under tuning")
    tree = {"tuning" if key == "adapter" else key: value for key, value in tree.items()}
    section = tree.get("tuning")
    if isinstance(section, Mapping) and "method" in section:
        if "kind" in section:
            raise ConfigError(f"{where}: tuning.method and tuning.kind: two names of one setting; keep kind")
        tree["tuning"] = {"kind" if key == "method" else key: value for key, value in section.items()}
    return tree


def build_config(schema: type[T], tree: Mapping[str, Any], where: str) -> T:
    """The checked config of a plain nested mapping; `where` begins the error message."""
    if schema is FinetuneConfig:
        tree = with_tuning_section(tree, where)
    try:
        # Through JSON, where strict means what it should: a list is a tuple, a mapping a section, "3" no number.
        config = TypeAdapter(schema).validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        problems = _describe_all(schema, error)
        raise ConfigError(f"{where}: {_count_of(problems)}\n{format_list(problems)}") from None
    check = getattr(config, "problems", None)
    if check is not None and (problems := check()):
        raise ConfigError(f"{where}: {_count_of(problems)}\n{format_list(problems)}")
    return config


def dump_config(config: Any) -> str:
    """`config` as YAML that `load_config` reads back to an equal config; absolute paths become relative ones."""
    return write_yaml(to_tree(config))


def to_tree(config: Any) -> dict[str, Any]:
    """`config` as plain nested dicts and lists, holding no absolute path."""
    tree: dict[str, Any] = _plain(asdict(config))
    return tree


def data_paths(value: str | tuple[str, ...]) -> tuple[str, ...]:
    """One path or several, as a tuple."""
    return (value,) if isinstance(value, str) else value


_PATHS = ("name", "train", "validation", "dir", "path", "adapter")  # keys whose values may be paths


def _plain(value: Any, is_path: bool = False) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item, key in _PATHS) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, is_path) for item in value]
    if is_path and isinstance(value, str) and os.path.isabs(value) and os.path.exists(value):
        return os.path.relpath(value)
    return value


def _apply(tree: dict[str, Any], overrides: Overrides) -> None:
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            _set(tree, key, value)
    else:
        for override in overrides:
            _apply_override(tree, override)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.strip().split(".")):
        raise ConfigError(f"{override!r}: an override is written section.key=value, for example train.epochs=1")
    section, *rest = key.strip().split(".")
    if section == "adapter":
        section, rest = "tuning", ["kind" if part == "method" else part for part in rest]
    _set(tree, ".".join([section, *rest]), read_yaml_value(text, where=key))


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    """Put `value` at `section.key`."""
    *parts, last = key.split(".")
    node: Any = tree
    for part in parts:
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise ConfigError(f"{key}: {part} is not a section, so it has no keys to set")
    node[last] = value
