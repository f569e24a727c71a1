"""The settings explained: one source for JSON Schema, list and commented YAML, and defaults that are defaults."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from lmtune.config.json_schema import REQUIRED, commented_yaml, every_kind, json_schema, settings
from lmtune.config.load import build_config, to_tree
from lmtune.config.pretrain import PretrainConfig
from lmtune.config.schema import FinetuneConfig, PartialConfig
from lmtune.config.yaml import read_yaml

CONFIGS = Path(__file__).parents[1] / "recipes" / "configs"
LEAST: dict[str, Any] = {"model.name": "tiny", "data.train": "rows.jsonl"}


def faults(tree: Any, schema: type[Any] = FinetuneConfig) -> list[str]:
    return [error.message for error in Draft202012Validator(json_schema(schema)).iter_errors(tree)]


@pytest.mark.parametrize("schema", [FinetuneConfig, PretrainConfig])
def test_the_schema_is_one(schema: type[Any]) -> None:
    tree = json_schema(schema)
    Draft202012Validator.check_schema(tree)
    assert tree["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert json.loads(json.dumps(tree)) == tree


@pytest.mark.parametrize(
    "tree",
    [
        {"model": {"name": "tiny"}}, {"model": {"name": "tiny"}, "data": {"train": "a"}, "trian": {}},
        {"model": {"name": "tiny", "dtype": "int4"}, "data": {"train": "a"}},
        {"model": {"name": "tiny"}, "data": {"train": "a"}, "train": {"epochs": -1}},
        {"model": {"name": "tiny"}, "data": {"train": "a"}, "tuning": {"kind": "full", "rank": 4}},
        {"model": {"name": "tiny"}, "data": {"train": "a"}, "tuning": {"parts": ["head"]}},
    ],
)  # fmt: skip
def test_what_lmtune_refuses_does_not_follow_it(tree: Any) -> None:
    assert faults(tree)


def test_every_setting_is_explained() -> None:
    silent = [setting.key for *_, known in every_kind() for setting in known if not setting.meaning]
    assert not silent, f"put a comment beside these fields: {silent}"


def test_a_section_of_another_kind_is_written_with_its_own_settings(tmp_path: Path) -> None:
    chosen = {**LEAST, "model.quantization": "none", "tuning.kind": "partial", "tuning.parts": ["head"]}
    path = tmp_path / "partial.yaml"
    path.write_text(commented_yaml(chosen, {}))
    config = build_config(FinetuneConfig, read_yaml(path), "partial")
    assert config.tuning == PartialConfig(parts=("head",))
    assert not faults(read_yaml(path))


def test_a_written_config_holds_every_default(tmp_path: Path) -> None:
    """Each key beside the default of its dataclass, as code has it."""
    path = tmp_path / "all.yaml"
    path.write_text(commented_yaml(LEAST, {}))
    tree = read_yaml(path)
    config = build_config(FinetuneConfig, tree, "all")
    plain = build_config(FinetuneConfig, {"model": {"name": "tiny"}, "data": {"train": "rows.jsonl"}}, "least")
    assert config == plain
    for section, values in to_tree(plain).items():
        assert tree[section] == values
    assert not faults(tree)


@pytest.mark.slow
def test_the_example_config_names_every_default_and_why_it_differs() -> None:
    """support.yaml: beside each value stands the default of the code; a value of its own has a reason behind it."""
    path = CONFIGS / "support.yaml"
    tree = read_yaml(path)
    values = {f"{section}.{name}": value for section, part in tree.items() for name, value in part.items()}
    said = " ".join(re.sub(r"\n +#", " ", path.read_text()).split())
    for setting in settings().values():
        plain = commented_yaml({**LEAST, setting.key: values[setting.key]}, {})
        line = next(
            line for line in re.sub(r"\n +#", " ", plain).splitlines() if f"  {setting.key.split('.')[1]}: " in line
        )
        default = " ".join(line.partition("# ")[2].split())
        assert default in said
        if setting.default is not REQUIRED and values[setting.key] != setting.default:
            assert f"{default}; " in said, f"{setting.key}: say why"


def test_values_and_reasons_stand_in_the_file(tmp_path: Path) -> None:
    values = {**LEAST, "data.train": ["a: b.jsonl", "c #d.jsonl"], "data.system": "Be\nbrief: always.", "train.seed": 7}
    text = commented_yaml(values, {"train.seed": "a lucky number"})
    path = tmp_path / "a.yaml"
    path.write_text(text)
    tree = read_yaml(path)
    assert tree["data"]["train"] == ["a: b.jsonl", "c #d.jsonl"]
    assert tree["data"]["system"] == "Be\nbrief: always."
    assert tree["train"]["seed"] == 7
    assert "default 0; a lucky number" in " ".join(text.replace("#", " ").split())
    assert all(len(line) <= 120 for line in text.splitlines())


@pytest.mark.parametrize(
    ("short", "name"),
    [("bf16", "bfloat16"), ("half", "float16"), ("fp32", "float32"), ("torch.bfloat16", "bfloat16")],
)
def test_short_names_of_dtypes_are_known(short: str, name: str) -> None:
    config = build_config(FinetuneConfig, {"model": {"name": "tiny", "dtype": short}, "data": {"train": "a"}}, "test")
    assert config.model.dtype == name


def test_the_verb_prints_schema_or_list(capsys: pytest.CaptureFixture[str]) -> None:
    from lmtune.recipes.schema import main

    for as_json in (False, True):
        main(as_json, False)
        assert json.loads(capsys.readouterr().out) == json_schema()
    main(False, True)
    listed = capsys.readouterr().out
    assert all(setting.key in listed for *_, known in every_kind() for setting in known)
