"""The configuration: every mistake is found before anything is loaded, by its key, all of them in one message."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtune.config.json_schema import kinds
from lmtune.config.load import build_config, command_config, dump_config, load_config, to_tree
from lmtune.config.pretrain import PretrainConfig
from lmtune.config.schema import FinetuneConfig, LoraConfig, ModelConfig, PartialConfig, RunConfig
from lmtune.config.yaml import read_yaml, read_yaml_value
from lmtune.errors import ConfigError
from lmtune.io.text import without_absolute_paths

ROOT = Path(__file__).parents[1]
LEAST = "model: {name: tiny}\ndata: {train: rows.jsonl}\n"
TREE: dict[str, Any] = {"model": {"name": "tiny"}, "data": {"train": "x"}}
SECTIONS = ("model", "tuning", "objective", "data", "train", "evaluation", "parallel", "run")


def written(folder: Path, text: str, name: str = "trial.yaml") -> Path:
    """A config file of that text."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def message_of(folder: Path, text: str, *overrides: str) -> str:
    """The error that this config gives."""
    with pytest.raises(ConfigError) as caught:
        load_config(FinetuneConfig, written(folder, text), overrides)
    return str(caught.value)


def every_field() -> list[tuple[str, str]]:
    """(section, key) of every setting; of a section of several kinds, of the default one."""
    return [(name, field.name) for name, types in kinds().items() for field in dataclasses.fields(types[0])]


@pytest.mark.parametrize(("section", "key"), every_field())
def test_every_misspelt_key_names_the_right_one(tmp_path: Path, section: str, key: str) -> None:
    wrong = key[:-1] + "q" if len(key) > 4 else key + "q"
    text = message_of(tmp_path, LEAST, f"{section}.{wrong}=1")
    assert f"{section}.{wrong}: unknown key; did you mean {key}?" in text


def test_all_mistakes_stand_in_one_message(tmp_path: Path) -> None:
    text = message_of(
        tmp_path,
        "model: {quantization: nf5}\ndata: {train: rows.jsonl, max_lenght: 3}\ntrain: {epochs: 0, batch_size: 1.5}\n",
    )
    assert text.startswith(f"{tmp_path / 'trial.yaml'}: 5 settings are wrong\n")
    for part in (
        "model.name: missing; it has no default", "model.quantization: got 'nf5'; should be 'none', 'nf4' or 'int8'",
        "data.max_lenght: unknown key; did you mean max_length?", "train.epochs: got 0; should be greater than 0",
        "train.batch_size: got 1.5; should be a valid integer",
    ):  # fmt: skip
        assert part in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.xyzzy=1", "run.xyzzy: unknown key; known: dir, name, checkpoint_every_steps"),
        ("tuning.learning_rate=1", r"tuning.learning_rate: unknown key; did you mean train.learning_rate\?"),
        ("trian.epochs=1", r"trian: unknown key; did you mean train\?"),
        ("epochs=1", r"epochs: unknown key; did you mean train.epochs\?"),
        ("train.epochs='3'", r"train\.epochs: got '3'; should be a valid number"),
        ("train.batch_size=true", r"train\.batch_size: got True; should be a valid integer"),
        ("train.seed=-1", r"train\.seed: got -1; should be greater than or equal to 0"),
        ("train.learning_rate=.nan", r"train\.learning_rate: got nan; should be a finite number"),
        ("train.learning_rate=1e400", r"train\.learning_rate: got inf; should be a finite number"),
        ("train.micro_batch_tokens=fast", r"train\.micro_batch_tokens: got 'fast'; should be .* or 'auto'"),
        ("train=3", r"train: must be a section of `key: value` lines, got 3"),
        ("data.train=[]", r"data\.train: got \[\]; should be a list of at least one"),
        ("tuning.target_modules=[q_proj, 3]", r"tuning\.target_modules"),
        ("tuning.rank=1000000000", r"tuning\.rank: got 1000000000; should be less than"),
        ("tuning.kind=fll", "tuning.kind: got 'fll'; should be 'lora', 'full' or 'partial'"),
        ("tuning={kind: full, rank: 4}", "tuning.rank: unknown key of tuning.kind: full; it belongs to .*kind: lora"),
        ("tuning={kind: partial, part: [head]}", r"tuning.part: unknown key; did you mean parts\?"),
        ("tuning.kind=partial", "tuning.parts: missing; it has no default"),
        ("tuning=3", "tuning: must be a section of `key: value` lines, got 3"),
        ("model.revision=1234567", r"model\.revision: got 1234567; should be a valid string \(put it in quotes"),
        ("train.epochs", "'train.epochs': an override is written section.key=value"),
        ("train..epochs=3", "an override is written section.key=value"),
        ("model.name.first=3", "model.name.first: name is not a section"),
        ("train.epochs=[1", "train.epochs:1: not valid YAML"),
    ],
)
def test_a_wrong_setting_is_named_with_what_it_should_be(tmp_path: Path, override: str, message: str) -> None:
    assert re.search(message, message_of(tmp_path, LEAST, override))


def test_the_keys_of_another_schema_are_suggested_too(tmp_path: Path) -> None:
    path = written(tmp_path, "data: {pathh: texts}\noutput: {dir: x}\n")
    with pytest.raises(ConfigError, match=r"data\.pathh: unknown key; did you mean path\?"):
        load_config(PretrainConfig, path)


def test_overrides_replace_and_add(tmp_path: Path) -> None:
    overrides = ["train.epochs=0.5", "data.train=[a.jsonl, b.jsonl]", "tuning.rank=4", "data.system="]
    config = load_config(FinetuneConfig, written(tmp_path, LEAST + "train: {epochs: 9}\n", "客服.yaml"), overrides)
    assert (config.train.epochs, config.tuning.rank, config.run.name) == (0.5, 4, "客服")  # named like its file
    assert config.data.train == ("a.jsonl", "b.jsonl")
    assert config.data.system is None


@pytest.mark.parametrize("name", ["a", "A.b-c_9", "2026", "x" * 100, "客服助手", "Übung-3", "हिंदी", "٣", "U\u0308bung"])
def test_run_names_are_plain_folder_names(name: str) -> None:
    assert build_config(RunConfig, {"name": name}, "test").name == name.replace("U\u0308", "Ü")


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "/x", "-x", ".x", "a b", "x\n", "x" * 101, "．．", "a\u202eb", "客服\u3000", "😀"],
)
def test_other_run_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"name: got .*; should "):
        build_config(RunConfig, {"name": name}, "test")


def test_adapter_is_the_old_name_of_tuning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, LEAST + "adapter: {method: lora, rank: 4, adapter: runs/first}\n")
    for overrides in (["tuning.alpha=8"], ["adapter.alpha=8", "adapter.method=lora"]):
        config = load_config(FinetuneConfig, path, overrides)
        tuning = config.tuning
        assert (tuning.kind, tuning.rank, tuning.alpha, tuning.adapter) == ("lora", 4, 8, "runs/first")
        assert "adapter:\n" not in dump_config(config)
    command_config(path)
    assert " ".join(capsys.readouterr().err.split()).count("the section adapter is called tuning now") == 1
    both = message_of(tmp_path, LEAST + "tuning: {rank: 4}\nadapter: {alpha: 8}\n")
    assert "adapter: unknown key" in both


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"model": {"quantization": "nf4"}, "tuning": {"init_lora_weights": "pissa"}}, "pissa rewrites the base"),
        ({"tuning": {"init_lora_weights": "pissa", "use_dora": True}}, "tuning.use_dora: cannot be combined"),
        ({"tuning": {"init_lora_weights": "pissa", "adapter": "x"}}, "tuning.adapter: x gives the initial weights"),
        ({"model": {"quantization": "int8"}, "tuning": {"kind": "full"}}, "quantization: int8 holds frozen weights"),
        ({"model": {"quantization": "nf4"}, "tuning": {"kind": "partial", "parts": ["head"]}}, "set .*: none, or"),
        ({"evaluation": {"patience": 2}}, "evaluation.patience: needs evaluation.every_steps"),
        ({"evaluation": {"patience": 2, "every_steps": 1}, "data": {"train": "x", "validation_fraction": 0.0}},
         r"evaluation\.patience: 2 waits for .*data\.validation_fraction: 0\.0 holds no row out"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together(tree: dict[str, dict[str, Any]], message: str) -> None:
    tree = {**TREE, **tree, "model": {"name": "tiny", "quantization": "none", **tree.get("model", {})}}
    with pytest.raises(ConfigError, match=message):
        build_config(FinetuneConfig, tree, "test")


FULL = {
    "model": {"name": "tiny", "quantization": "none"},
    "data": {"train": ["a.jsonl", "b.jsonl"], "validation": "c.jsonl", "system": "Be brief: yes, no.\n\"1e-4\" #"},
    "tuning": {"target_modules": ["q_proj"], "alpha": 8, "use_dora": True},
    "train": {"max_steps": 7, "learning_rate": 1e-5, "max_grad_norm": None, "micro_batch_tokens": 64},
    "evaluation": {"every_steps": 5, "patience": 2},
    "run": {"name": "1e-4"},
}  # fmt: skip


PARTIAL = {"model": FULL["model"], "data": {"train": "x"}, "tuning": {"kind": "partial", "parts": ["head", "norms"]}}


@pytest.mark.parametrize("tree", [FULL, {**TREE, "run": {"name": "y"}}, {**PARTIAL, "run": {"name": "z"}}])
def test_a_dumped_config_reads_back_equal(tmp_path: Path, tree: dict[str, Any]) -> None:
    config = build_config(FinetuneConfig, tree, "test")
    assert load_config(FinetuneConfig, written(tmp_path, dump_config(config))) == config


@settings(deadline=None)
@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1), st.floats(1e-9, 10))
def test_any_text_and_number_survive_the_dump(system: str, rate: float) -> None:
    tree = {**TREE, "data": {"train": "x", "system": system}, "train": {"learning_rate": rate}}
    config = build_config(FinetuneConfig, tree, "test")
    assert build_config(FinetuneConfig, read_yaml_value(dump_config(config), "dump"), "test") == config


def test_the_dump_holds_no_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl", "model"):
        (tmp_path / name).touch()
    tree = {
        "model": {"name": str(tmp_path / "model")}, "run": {"dir": str(tmp_path)},
        "data": {"train": [str(tmp_path / "a.jsonl"), "b.jsonl"], "validation": str(tmp_path / "b.jsonl"),
                 "system": "/"},
    }  # fmt: skip
    config = build_config(FinetuneConfig, tree, "test")
    assert str(tmp_path) not in dump_config(config)
    assert to_tree(config)["data"]["train"] == ["a.jsonl", "b.jsonl"]
    assert to_tree(config)["data"]["system"] == "/", "a text, not a path"


def test_the_sections_are_those_of_the_design_small_and_frozen() -> None:
    assert {field.name for field in dataclasses.fields(FinetuneConfig)} == set(SECTIONS)
    for types in kinds().values():
        assert all(len(dataclasses.fields(section)) <= 15 for section in types)
    config = build_config(FinetuneConfig, TREE, "test")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.epochs = 5  # type: ignore[misc]
    with pytest.raises(ConfigError, match="quantisation: unknown key; did you mean quantization"):
        build_config(ModelConfig, {"name": "x", "quantisation": "nf4"}, "test")


def test_every_setting_is_used_somewhere() -> None:
    """A field without a consumer is a promise that nobody keeps: `….key` is read outside of config/schema.py."""
    sources = [*(ROOT / "lmtune").rglob("*.py"), *(ROOT / "recipes").glob("*.py")]
    text = "\n".join(path.read_text() for path in sources if not path.match("config/schema.py"))
    unused = [f"{section}.{key}" for section, key in every_field() if not re.search(rf"\.{key}\b", text)]
    # `kind` tells the types of a section apart, by which the parts of a run are chosen
    assert [name for name in unused if not name.endswith(".kind")] == []


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_loads(path: Path) -> None:
    load_config(PretrainConfig if path.name.startswith("pretrain") else FinetuneConfig, path)


def test_the_support_config_spells_out_every_setting() -> None:
    tree = read_yaml(ROOT / "recipes" / "configs" / "support.yaml")
    assert [(section, key) for section, values in tree.items() for key in values] == sorted(
        every_field(), key=lambda item: SECTIONS.index(item[0])
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cannot write HERE/runs/trial: full", "cannot write runs/trial: full"),
        ("'HERE/a b/c' and HERE/d", "'a b/c' and d"),
        ("no UP/x/y", "no ../x/y"),
        ("1/2 of a/b, https://hub/a/b and ~/x/y", "1/2 of a/b, https://hub/a/b and ~/x/y"),
    ],
)
def test_absolute_paths_in_text_become_relative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    text = text.replace("HERE", str(tmp_path)).replace("UP", str(tmp_path.parent))
    assert without_absolute_paths(text) == expected


def test_another_kind_on_the_command_line_replaces_the_section(tmp_path: Path) -> None:
    path = written(tmp_path, LEAST + "tuning: {rank: 4, alpha: 8}\n")
    config = load_config(
        FinetuneConfig, path, ["tuning.parts=[head]", "tuning.kind=partial", "model.quantization=none"]
    )
    assert config.tuning == PartialConfig(parts=("head",))
    same = load_config(FinetuneConfig, path, ["tuning.kind=lora", "tuning.alpha=16"])
    assert same.tuning == LoraConfig(rank=4, alpha=16)
