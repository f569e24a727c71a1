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
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from lmtune.config.files import find_config, is_override, run_name, shipped_configs, shipped_example
from lmtune.config.schema import FinetuneConfig, T, describe_all, kind_of, section_types, settings_error
from lmtune.config.yaml import read_yaml, read_yaml_value, write_yaml
from lmtune.errors import ConfigError
from lmtune.io.console import warn

Overrides = Mapping[str, object] | Sequence[str]  # values by `section.key`, or `section.key=value` with YAML's values


def load_config(schema: type[T], path: str | Path, overrides: Overrides = ()) -> T:
    """The checked config in `path`, a YAML file or the name of one that ships with lmtune, with `overrides`.

    Raises ConfigError with every problem found, each by `section.key`.
    """
    path = find_config(path, "finetune" if schema is FinetuneConfig else "pretrain")
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
        model, data: stand for `model.name` and `data.train`.
        verb: the command, for messages.

    Raises ConfigError with every problem found, or if nothing says which model and which data.
    """
    if isinstance(target, str) and is_override(target):
        overrides, target = [target, *overrides], None
    path = None if target is None else find_config(target, verb)
    tree: dict[str, Any] = {} if path is None else _read(path)
    if path is not None and "adapter" in read_yaml(path):
        warn(f"{path}: the section adapter is called tuning now, and adapter.method tuning.kind; both names are read")
    if model:
        _apply(tree, {"model.name": model})
    if data:
        _apply(tree, {"data.train": str(data[0]) if len(data) == 1 else [str(path) for path in data]})
    _apply(tree, overrides)
    if path is not None:
        return _checked(FinetuneConfig, tree, (), str(path), path.stem)
    keys = {"--model MODEL": ("model", "name"), "--data FILE": ("data", "train")}
    sections = {key: value for key, value in tree.items() if isinstance(value, dict)}
    if missing := [flag for flag, (section, key) in keys.items() if not sections.get(section, {}).get(key)]:
        raise ConfigError(
            f"{' and '.join(missing)}: missing; write `lmtune {verb} --model MODEL --data FILE`, or "
            f"`lmtune {verb} CONFIG`; `lmtune init` writes a config that fits this machine"
        )
    name = run_name(first_path(tree["data"]["train"]))
    return _checked(FinetuneConfig, tree, (), f"lmtune {verb}", name)


def _read(path: Path) -> dict[str, Any]:
    """The tree in a config file; examples that a shipped one names are found where lmtune is installed."""
    tree = _with_tuning_section(read_yaml(path))
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
    """The plain tree of a config, a YAML file or nothing (None), with `overrides` put in.

    Raises ConfigError if the file cannot be read, or an override is not `section.key=value`.
    """
    tree: dict[str, Any] = {}
    if isinstance(config, (str, os.PathLike)):
        tree = _read(find_config(os.fspath(config)))
    elif config is not None:
        tree = to_tree(config)
    _apply(tree, overrides)
    return tree


def _with_tuning_section(tree: Mapping[str, Any]) -> dict[str, Any]:
    """`tree` with `adapter: {method: …}`, the old name of `tuning: {kind: …}`, under the new one."""
    if "tuning" not in tree:
        tree = {"tuning" if key == "adapter" else key: value for key, value in tree.items()}
    section = tree.get("tuning")
    if isinstance(section, Mapping) and "kind" not in section:
        section = {"kind" if key == "method" else key: value for key, value in section.items()}
        tree = {**tree, "tuning": section}
    return dict(tree)


def _with_kinds(schema: type[Any], tree: Mapping[str, Any]) -> dict[str, Any]:
    """`tree` with the default kind in each section that may be of several and names none."""
    hints, filled = get_type_hints(schema), dict(tree)
    for field in fields(schema):
        section = tree.get(field.name)
        if len(section_types(hints[field.name])) > 1 and isinstance(section, Mapping) and "kind" not in section:
            filled[field.name] = {"kind": kind_of(type(field.default)), **section}
    return filled


def build_config(schema: type[T], tree: Mapping[str, Any], where: str) -> T:
    """The checked config of a plain nested mapping; `where` begins the error message."""
    if schema is FinetuneConfig:
        tree = _with_kinds(schema, _with_tuning_section(tree))
    try:
        # Through JSON, where strict means what it should: a list is a tuple, a mapping a section, "3" no number.
        config = TypeAdapter(schema).validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        raise settings_error(where, describe_all(schema, error)) from None
    check = getattr(config, "problems", None)
    if check is not None and (problems := check()):
        raise settings_error(where, problems)
    return config


def dump_config(config: Any) -> str:
    """`config` as YAML that `load_config` reads back to an equal config; absolute paths become relative ones."""
    return write_yaml(to_tree(config))


def to_tree(config: Any) -> dict[str, Any]:
    """`config` as plain nested dicts and lists, holding no absolute path."""
    tree: dict[str, Any] = _plain(asdict(config))
    return tree


def first_path(train: object) -> str:
    """The first path of an unchecked `data.train`."""
    first = train[0] if isinstance(train, (list, tuple)) and train else train
    return str(first.get("path") if isinstance(first, Mapping) else first)


_DEFAULT_KINDS = {field.name: getattr(field.default, "kind", None) for field in fields(FinetuneConfig)}
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
    """Put each value at its `section.key` of `tree`; another kind of a section replaces what `tree` has of it."""
    items = overrides.items() if isinstance(overrides, Mapping) else [_parse_override(text) for text in overrides]
    for key, value in sorted(items, key=lambda item: _today(item[0])[-1] != "kind"):
        *parts, last = _today(key)
        section = tree.get(parts[0]) if last == "kind" and len(parts) == 1 else None
        if isinstance(section, dict) and section.get("kind", _DEFAULT_KINDS.get(parts[0])) != value:
            tree[parts[0]] = {}
        node = tree
        for part in parts:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
            if not isinstance(node, dict):
                raise ConfigError(f"{key}: {part} is not a section, so it has no keys to set")
        node[last] = value


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise ConfigError(f"{text!r}: an override is written section.key=value, for example train.epochs=1")
    return key, read_yaml_value(value, where=key)


def _today(key: str) -> list[str]:
    """The parts of a key, `adapter.method` as `tuning.kind`."""
    section, *rest = key.split(".")
    if section == "adapter":
        return ["tuning", *("kind" if part == "method" else part for part in rest)]
    return [section, *rest]
