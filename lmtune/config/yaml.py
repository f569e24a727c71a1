"""YAML read strictly: plain data only, every key once, numbers as a person writes them.

PyYAML's safe loader keeps the last of two equal keys, reads `1e-4` as a string, `2024-01-01` as a date, `010` as 8 and
`1:30` as 90, and expands aliases without limit (a small file can then fill the memory). Here `1e-4` is a number, the
other three stay text, and a repeated key, an alias and a tag (`!!name`) are errors with their line.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from lmtune.errors import ConfigError

_MAX_BYTES = 1_000_000  # a config is a page of text; a larger file is a mistake
_INT = r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"
_FLOAT = (
    r"[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|\.[0-9][0-9_]*([eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$"
)
_PLAIN = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:bool")


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader without aliases and tags, with plain numbers only and repeated keys as an error."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own class attribute
        first: [(tag, pattern) for tag, pattern in resolvers if tag in _PLAIN]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise _fault(event.start_mark, "aliases (*name) are not supported; write it out, or put a text into quotes")
        if event.tag is not None:  # PyYAML fails on a value that does not fit its tag with any exception there is
            raise _fault(event.start_mark, f"tags ({event.tag}) are not supported; write the value without it")
        return super().compose_node(parent, index)

    def construct_scalar(self, node: Any) -> Any:
        """Text; an escaped pair such as \\ud83d\\ude00 is the one character that JSON, which is YAML, means by it."""
        text = super().construct_scalar(node)
        try:
            return text.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            raise _fault(node.start_mark, "unpaired surrogate such as \\ud83d; rewrite the text") from None

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _fault(key_node.start_mark, "a key must be a plain word")
            if key_node.value in seen:
                raise _fault(key_node.start_mark, f"duplicate key {key_node.value!r}; remove one")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


class _StrictDumper(yaml.SafeDumper):
    """SafeDumper that quotes what `_StrictLoader` would not read as the same text."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Unicode's own line breaks are escaped: PyYAML writes them as they are, and reads them as blanks."""
        style = '"' if any(mark in data for mark in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_StrictDumper.add_representer(str, _StrictDumper.represent_str)
for _class in (_StrictLoader, _StrictDumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(_INT), list("-+0123456789"))
    _class.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+0123456789."))


def _fault(mark: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: the file is missing, too large, not UTF-8, not YAML, or holds no mapping.
    """
    path = Path(path)
    if not os.path.isfile(path):  # unlike pathlib's, also false for names that are too long
        raise ConfigError(f"{path}: no such config file")
    if path.stat().st_size > _MAX_BYTES:
        raise ConfigError(f"{path}: {path.stat().st_size:,} bytes is too large for a config; is this a data file?")
    try:
        tree = _parse(path.read_text(encoding="utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 (byte {error.start}); save the file as UTF-8") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: got {type(tree).__name__}; expected sections like `model: {{name: tiny}}`")
    return tree


def read_yaml_value(text: str, where: str) -> Any:
    """The value of a command line override, written as in YAML; a pattern of file names (`*.jsonl`) stays text."""
    try:
        return _parse(text, where)
    except ConfigError:
        if "*" in text or "?" in text:
            return text
        raise


def write_yaml(tree: dict[str, Any]) -> str:
    """`tree` as YAML that `read_yaml` reads back equal."""
    return yaml.dump(tree, Dumper=_StrictDumper, sort_keys=False, allow_unicode=True)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{where}{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from None
