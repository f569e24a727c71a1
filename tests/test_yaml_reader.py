"""YAML is read strictly: what PyYAML would accept without a word is an error that names its line."""

from pathlib import Path

import pytest
import yaml

from lmtune.config.yaml import read_yaml, read_yaml_value
from lmtune.errors import ConfigError


def written(folder: Path, text: str | bytes) -> Path:
    """A file of that content."""
    path = folder / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a: 1e-4", 1e-4),
        ("a: 2E3", 2000.0),
        ("a: -1e+2", -100.0),
        ("a: 3.5e-2", 0.035),
        ("a: 2024-01-01", "2024-01-01"),
        ("a: 2024-01-01 10:00:00", "2024-01-01 10:00:00"),
        ("a: 1e", "1e"),
        ("a: e5", "e5"),
        ("a: 0", 0),
        ("a: 0.5", 0.5),
        ("a: 0x10", 16),
        ("a: 010", "010"),
        ("a: 1:30", "1:30"),
        ("a: 1_000", 1000),
        ("a: .5", 0.5),
        ("a: null", None),
        ("a: [x, 1]", ["x", 1]),
        (r'{"a": "\ud83d\ude00"}', "\U0001f600"),  # as JSON writes it
        ('a: "\ufeffx"', "\ufeffx"),
    ],
)
def test_values_mean_what_a_person_means(tmp_path: Path, text: str, wanted: object) -> None:
    value = read_yaml(written(tmp_path, text))["a"]
    assert value == wanted
    assert type(value) is type(wanted)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", r"run\.yaml:3: not valid YAML: duplicate key 'a'"),
        ("m:\n  x: 1\n  x: 2\n", "run.yaml:3: not valid YAML: duplicate key 'x'"),
        ("a: &n [1]\nb: *n\n", "run.yaml:2: not valid YAML: aliases"),
        (
            "a: 1\nb: !!python/object/apply:os.system [ls]\n",
            r"run.yaml:2: .*tags \(tag:yaml.org,2002:python/object/app",
        ),
        ("? [1, 2]\n: x\n", "run.yaml:1: not valid YAML: a key must be a plain word"),
        ("a: [1\n", "run.yaml:2: not valid YAML"),
        ("a: 1\n b: 2\n", "run.yaml:2: not valid YAML"),
        ("a: \x07", "not valid YAML"),
        ("just words", "got str; expected sections like"),
        ("- 1\n- 2\n", "got list"),
        ("", "got NoneType"),
        (b"a: \xff\xfe", r"not UTF-8 \(byte 3\); save the file as UTF-8"),
        (b"a: " + b"x" * 1_000_001, "1,000,004 bytes is too large for a config"),
        (b"[" * 100_000, "not valid YAML"),
    ],
)
def test_a_bad_file_is_one_message_with_its_place(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_yaml(written(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: no such config file"):
        read_yaml(tmp_path / "none.yaml")


def test_a_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path: Path) -> None:
    assert read_yaml(written(tmp_path, b"\xef\xbb\xbfa: 1\r\nb: x\r\n")) == {"a": 1, "b": "x"}


def test_the_strict_rules_leave_pyyaml_itself_alone() -> None:
    assert str(type(yaml.safe_load("2024-01-01"))) == "<class 'datetime.date'>"
    assert yaml.safe_load("1e-4") == "1e-4"


def test_a_value_of_the_command_line_is_yaml() -> None:
    assert read_yaml_value("[q_proj, v_proj]", where="k") == ["q_proj", "v_proj"]
    assert read_yaml_value("1e-3", where="k") == 1e-3
    for pattern in ("*.jsonl", "**/rows-?.jsonl", "[ab]*.jsonl"):  # no YAML, and told so where files are looked for
        assert read_yaml_value(pattern, where="k") == pattern
    assert read_yaml_value("a/b.jsonl", where="k") == "a/b.jsonl"
    with pytest.raises(ConfigError, match="k:1: not valid YAML"):
        read_yaml_value("[1", where="k")
