"""YAML is read strictly: what PyYAML would accept without a word is an error that names its line."""

from pathlib import Path

import pytest

from lmtune.config.yaml import read_yaml, read_yaml_value
from lmtune.errors import ConfigError


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a: 1e-4", 1e-4), ("a: 2E3", 2000.0), ("a: -1e+2", -100.0), ("a: 3.5e-2", 0.035), ("a: .5", 0.5),
        ("a: 1e", "1e"),
        ("a: 2024-01-01", "2024-01-01"), ("a: 0", 0), ("a: 0x10", 16), ("a: 010", "010"), ("a: 1:30", "1:30"),
        ("a: 1_000", 1000), ("a: null", None), ("a: [x, 1]", ["x", 1]),
        (r'{"a": "\ud83d\ude00"}', "\U0001f600"),  # as JSON writes it
        ('a: "\ufeffx"', "\ufeffx"), (b"\xef\xbb\xbfa: x\r\n", "x"),
    ],
)  # fmt: skip
def test_values_mean_what_a_person_means(tmp_path: Path, text: str | bytes, wanted: object) -> None:
    value = read_yaml(written(tmp_path, text))["a"]
    assert value == wanted
    assert type(value) is type(wanted)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", r"run\.yaml:3: not valid YAML: duplicate key 'a'"),
        ("m:\n  x: 1\n  x: 2\n", "run.yaml:3: not valid YAML: duplicate key 'x'"),
        ("a: &n [1]\nb: *n\n", "run.yaml:2: not valid YAML: aliases"),
        ("a: 1\nb: !!python/object/apply:os.system [ls]\n", r"run.yaml:2: .*tags \(tag:yaml.org,2002:python/object"),
        ("!!timestamp prn: 1", "tags"),  # PyYAML fails on a value that does not fit its tag with any exception there is
        ("? [1, 2]\n: x\n", "run.yaml:1: not valid YAML: a key must be a plain word"),
        ("a: [1\n", "run.yaml:2: not valid YAML"), ("a: 1\n b: 2\n", "run.yaml:2: not valid YAML"),
        ('a: "\\ud83d"', "unpaired surrogate"), ("a: \x07", "not valid YAML"), (b"[" * 100_000, "not valid YAML"),
        ("just words", "got str; expected sections like"), ("- 1\n- 2\n", "got list"), ("", "got NoneType"),
        (b"a: \xff\xfe", r"not UTF-8 \(byte 3\); save the file as UTF-8"),
        (b"a: " + b"x" * 1_000_001, "1,000,004 bytes is too large for a config"),
    ],
)  # fmt: skip
def test_a_bad_file_is_one_message_with_its_place(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_yaml(written(tmp_path, text))


def test_a_value_of_the_command_line_is_yaml() -> None:
    assert read_yaml_value("[q_proj, v_proj]", where="k") == ["q_proj", "v_proj"]
    for pattern in ("*.jsonl", "**/rows-?.jsonl", "[ab]*.jsonl"):  # no YAML, and told so where files are looked for
        assert read_yaml_value(pattern, where="k") == pattern
    with pytest.raises(ConfigError, match="k:1: not valid YAML"):
        read_yaml_value("[1", where="k")
