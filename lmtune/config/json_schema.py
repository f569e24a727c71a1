"""What each setting means: as a JSON Schema for editors, and as a commented YAML file for people.

    json_schema(FinetuneConfig)            # draft 2020-12
    settings()["train.epochs"].meaning     # "passes over the rows"

A setting is explained once, by the comment beside it in `lmtune.config.schema`; default and bounds are those of its
type.
"""

from __future__ import annotations

import ast
import copy
import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, get_type_hints

from pydantic import TypeAdapter

from lmtune.config.schema import FinetuneConfig, kind_of, section_types
from lmtune.config.yaml import read_yaml_value, write_yaml
from lmtune.errors import ConfigError

DRAFT = "https://json-schema.org/draft/2020-12/schema"
_ORDER = ("model", "tuning", "objective", "data", "train", "evaluation", "parallel", "run")  # of the sections in a file
REQUIRED = MISSING  # the default of a setting that has none
_TREES: dict[type[Any], dict[str, Any]] = {}


@dataclass(frozen=True)
class Setting:
    """One key of a config."""

    key: str  # section.key
    default: Any  # `REQUIRED` if the file must give a value
    meaning: str
    choices: tuple[str, ...] = ()  # the words it may be, if these are all it may be


def kinds(schema: type[Any] = FinetuneConfig) -> dict[str, tuple[type[Any], ...]]:
    """The types that each section of `schema` may be, the default one first."""
    hints = get_type_hints(schema)
    found = {}
    for field in fields(schema):
        types = section_types(hints[field.name])
        found[field.name] = tuple(sorted(types, key=lambda one: one is not type(field.default)))
    return found


def chosen_types(schema: type[Any], values: Mapping[str, Any]) -> dict[str, type[Any]]:
    """The type of each section: of the kind that `values` has for `section.kind`, or the default one."""
    found = {}
    for section, types in kinds(schema).items():
        named = [one for one in types if len(types) > 1 and kind_of(one) == values.get(f"{section}.kind")]
        found[section] = named[0] if named else types[0]
    return found


def settings(schema: type[Any] = FinetuneConfig, values: Mapping[str, Any] | None = None) -> dict[str, Setting]:
    """Every setting of `schema`, by `section.key`, in the order of its definition.

    Of a section that may be of several kinds: those of the kind that `values` chooses by `section.kind`, or the
    default.
    """
    found = {}
    tree, types = _tree(schema), kinds(schema)
    for section, kind in chosen_types(schema, values or {}).items():
        known = tree["$defs"][kind.__name__]["properties"]
        for field in fields(kind):
            described = known[field.name]
            default = field.default_factory() if field.default_factory is not MISSING else field.default
            default = list(default) if isinstance(default, tuple) else default  # as a file has it
            choices = tuple(described.get("enum", ()))
            if len(types[section]) > 1 and field.name == "kind":
                choices = tuple(map(kind_of, types[section]))
            key = f"{section}.{field.name}"
            found[key] = Setting(key, default, described.get("description", ""), choices)
    return found


def every_kind(schema: type[Any] = FinetuneConfig) -> Iterator[tuple[str, type[Any], list[Setting]]]:
    """Section, type and settings of each kind of each section."""
    for section, types in kinds(schema).items():
        for one in types:
            known = settings(schema, {f"{section}.kind": kind_of(one)} if len(types) > 1 else {})
            yield section, one, [setting for key, setting in known.items() if key.startswith(f"{section}.")]


def json_schema(schema: type[Any] = FinetuneConfig) -> dict[str, Any]:
    """The JSON Schema of a config, its descriptions taken from the docstrings and comments of the types."""
    return copy.deepcopy(_tree(schema))


def _tree(schema: type[Any]) -> dict[str, Any]:
    """`json_schema`, made once: it reads the source of every section."""
    if schema not in _TREES:
        _TREES[schema] = _new_tree(schema)
    return _TREES[schema]


def _new_tree(schema: type[Any]) -> dict[str, Any]:
    tree: dict[str, Any] = TypeAdapter(schema).json_schema()
    tree = {"$schema": DRAFT, "title": "lmtune config", **{k: v for k, v in tree.items() if k != "title"}}
    for types in kinds(schema).values():
        for kind in types:
            part = tree["$defs"][kind.__name__]
            part["description"] = " ".join((inspect.getdoc(kind) or "").split())
            for name, meaning in _comments(kind).items():
                part["properties"][name]["description"] = meaning
            if kind is not types[0]:  # a section without `kind` is of the default kind
                part["required"] = ["kind", *part.get("required", ())]
    tree["description"] = " ".join((inspect.getdoc(schema) or "").split())
    return tree


def commented_yaml(values: Mapping[str, Any], reasons: Mapping[str, str]) -> str:
    """A config in YAML that holds every setting, each with its meaning, its default and the reason for its value.

    `values` and `reasons` are by `section.key`; a setting without a value has its default.
    """
    lines, section = list[str](), ""
    types = chosen_types(FinetuneConfig, values)
    known = sorted(
        settings(FinetuneConfig, values).values(), key=lambda setting: _ORDER.index(setting.key.partition(".")[0])
    )
    for setting in known:
        part, _, name = setting.key.partition(".")
        if part != section:
            section = part
            lines += ["", f"{part}:  # {(inspect.getdoc(types[part]) or '').splitlines()[0].rstrip('.')}"]
        line = f"  {name}: {_inline(values.get(setting.key, setting.default))}"
        said = [" | ".join(setting.choices), setting.meaning, reasons.get(setting.key, "")]
        default = "" if setting.default is REQUIRED else f"default {_inline(setting.default)}"
        lines += _beside(line, "; ".join(text for text in (*said[:2], default, said[2]) if text))
    return "\n".join(lines).lstrip("\n") + "\n"


def _beside(line: str, comment: str, column: int = 40, width: int = 120) -> list[str]:
    """`line` with its comment, which goes on below it where it is long."""
    pieces = textwrap.wrap(comment, width - max(column, len(line) + 2) - 2, break_on_hyphens=False)
    if not pieces:
        return [line]
    start = max(column, len(line) + 2)
    return [f"{line:<{start}}# {pieces[0]}", *(f"{'':<{start}}# {piece}" for piece in pieces[1:])]


def _inline(value: Any) -> str:
    """A value as YAML in one line."""
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_inline, value)) + "]"
    text = write_yaml({"x": value}).rstrip("\n").removeprefix("x: ")
    try:
        plain = "\n" not in text and read_yaml_value(f"[{text}]", where="x") == [value]
    except ConfigError:
        plain = False
    return text if plain else json.dumps(value, ensure_ascii=False)


def _comments(kind: type[Any]) -> dict[str, str]:
    """The comment beside, or the lines of comment above, each field in the source of `kind`."""
    source = textwrap.dedent(inspect.getsource(kind))
    lines, body = source.splitlines(), ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            end = node.end_lineno or node.lineno
            text = lines[end - 1].encode()[node.end_col_offset or 0 :].decode().strip()
            if not text.startswith("#"):
                above = list[str]()
                while (line := lines[node.lineno - 2 - len(above)].strip()).startswith("#"):
                    above.append(line.removeprefix("#").strip())
                text = " ".join(reversed(above))
            found[node.target.id] = text.removeprefix("#").strip().rstrip(".")
    return found
