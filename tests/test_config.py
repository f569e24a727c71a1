"""The configuration: every mistake is found before anything is loaded, by its key, all of them in one message."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtune.config import schema as config_module
from lmtune.config.load import build_config, command_config, dump_config, load_config, to_tree
from lmtune.config.pretrain import PretrainConfig
from lmtune.config.schema import FinetuneConfig, ModelConfig, RunConfig
from lmtune.config.yaml import read_yaml, read_yaml_value
from lmtune.errors import ConfigError
from lmtune.io.text import without_absolute_paths

ROOT = Path(__file__).parents[1]
LEAST = "model: {name: tiny}\ndata: {train: rows.jsonl}\n"
SECTIONS = ("model", "tuning", "objective", "data", "train", "evaluation", "parallel", "run")


def written(folder: Path, text: str, name: str = "trial.yaml") -> Path:
    """A config file of that text."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def message_of(folder: Path, text: str, overrides: tuple[str, ...] = ()) -> str:
    """The error that this config gives."""
    with pytest.raises(ConfigError) as caught:
        load_config(FinetuneConfig, written(folder, text), overrides)
    return str(caught.value)


def every_field() -> list[tuple[str, str]]:
    """(section, key) of every setting."""
    sections = {field.name: getattr(config_module, str(field.type)) for field in dataclasses.fields(FinetuneConfig)}
    return [(name, field.name) for name, section in sections.items() for field in dataclasses.fields(section)]


@pytest.mark.parametrize(("section", "key"), every_field())
def test_every_misspelt_key_names_the_right_one(tmp_path: Path, section: str, key: str) -> None:
    wrong = key[:-1] + "q" if len(key) > 4 else key + "q"
    text = message_of(tmp_path, LEAST, (f"{section}.{wrong}=1",))
    assert f"{section}.{wrong}: unknown key; did you mean {key}?" in text


def test_a_key_like_no_other_lists_the_known_ones(tmp_path: Path) -> None:
    text = message_of(tmp_path, LEAST + "run: {xyzzy: 1}\n")
    assert "run.xyzzy: unknown key; known: dir, name, checkpoint_every_steps" in text


def test_a_key_of_another_section_is_pointed_to(tmp_path: Path) -> None:
    text = message_of(tmp_path, LEAST + "tuning: {learning_rate: 1.0e-3}\n")
    assert "tuning.learning_rate: unknown key; did you mean train.learning_rate?" in text


def test_a_misspelt_section_names_the_right_one(tmp_path: Path) -> None:
    assert "trian: unknown key; did you mean train?" in message_of(tmp_path, LEAST + "trian: {epochs: 1}\n")


def test_the_keys_of_another_schema_are_suggested_too(tmp_path: Path) -> None:
    path = written(tmp_path, "data: {pathh: texts}\noutput: {dir: x}\n")
    with pytest.raises(ConfigError, match=r"data\.pathh: unknown key; did you mean path\?"):
        load_config(PretrainConfig, path)


def test_all_mistakes_stand_in_one_message(tmp_path: Path) -> None:
    text = message_of(
        tmp_path,
        "model: {quantization: nf5}\ndata: {train: rows.jsonl, max_lenght: 3}\ntrain: {epochs: 0, batch_size: 1.5}\n",
    )
    assert text.startswith(f"{tmp_path / 'trial.yaml'}: 5 settings are wrong\n")
    assert "model.name: missing; it has no default" in text
    assert "model.quantization: got 'nf5'; should be 'none', 'nf4' or 'int8'" in text
    assert "data.max_lenght: unknown key; did you mean max_length?" in text
    assert "train.epochs: got 0; should be greater than 0" in text
    assert "train.batch_size: got 1.5; should be a valid integer" in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs='3'", r"train\.epochs: got '3'; should be a valid number"),
        ("train.batch_size=true", r"train\.batch_size: got True; should be a valid integer"),
        ("train.seed=-1", r"train\.seed: got -1; should be greater than or equal to 0"),
        ("train.learning_rate=.nan", r"train\.learning_rate: got nan; should be a finite number"),
        ("train.learning_rate=.inf", r"train\.learning_rate: got inf; should be a finite number"),
        ("train.learning_rate=1e400", r"train\.learning_rate: got inf; should be a finite number"),
        ("train.micro_batch_tokens=fast", r"train\.micro_batch_tokens: got 'fast'; should be .* or 'auto'"),
        ("train=3", r"train: must be a section of `key: value` lines, got 3"),
        ("evaluation.keep_best=1", r"evaluation\.keep_best: got 1; should be a valid boolean"),
        ("data.train=[]", r"data\.train: got \[\]; should be .*at least 1 item"),
        ("data.train=null", r"data\.train: got None"),
        ("tuning.target_modules=[q_proj, 3]", r"tuning\.target_modules"),
        ("tuning.dropout=1", r"tuning\.dropout: got 1; should be less than 1"),
        ("data.max_length=7", r"data\.max_length: got 7; should be greater than or equal to 8"),
        ("model.revision=12e4567", r"model\.revision: got inf; should be a valid string \(put it in quotes"),
        ("model.revision=1234567", r"model\.revision: got 1234567; should be a valid string \(put it in quotes"),
    ],
)
def test_a_value_of_the_wrong_kind_says_what_it_should_be(tmp_path: Path, override: str, message: str) -> None:
    text = message_of(tmp_path, LEAST, (override,))
    assert re.search(message, text), text
    assert "1 setting is wrong" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LEAST + "model: {name: other}\n", "trial.yaml:3: not valid YAML: duplicate key 'model'"),
        ("model: &m {name: tiny}\ndata: *m\n", "aliases"),
        ("model: !!python/name:os.system\n", "not valid YAML"),
    ],
)
def test_yaml_tricks_are_refused(tmp_path: Path, text: str, message: str) -> None:
    assert message in message_of(tmp_path, text)


def test_numbers_and_dates_are_read_as_written(tmp_path: Path) -> None:
    text = LEAST + "train: {learning_rate: 1e-4, epochs: 2}\nrun: {name: 2026-11-02}\n"
    config = load_config(FinetuneConfig, written(tmp_path, text))
    assert config.train.learning_rate == 1e-4
    assert config.train.epochs == 2
    assert config.run.name == "2026-11-02"


def test_overrides_replace_and_add(tmp_path: Path) -> None:
    overrides = ["train.epochs=0.5", "data.train=[a.jsonl, b.jsonl]", "tuning.rank=4", "run.name=x", "data.system="]
    config = load_config(FinetuneConfig, written(tmp_path, LEAST + "train: {epochs: 9}\n"), overrides)
    assert (config.train.epochs, config.tuning.rank, config.run.name) == (0.5, 4, "x")
    assert config.data.train == ("a.jsonl", "b.jsonl")
    assert config.data.system is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs", "'train.epochs': an override is written section.key=value"),
        ("=3", "an override is written section.key=value"),
        ("train..epochs=3", "an override is written section.key=value"),
        ("model.name.first=3", "model.name.first: name is not a section"),
        ("train.epochs=[1", "train.epochs:1: not valid YAML"),
        ("epochs=1", "epochs: unknown key; did you mean train.epochs?"),
    ],
)
def test_a_bad_override_says_how_to_write_it(tmp_path: Path, override: str, message: str) -> None:
    assert message in message_of(tmp_path, LEAST, (override,))


def test_without_a_name_the_run_is_called_like_its_file(tmp_path: Path) -> None:
    assert load_config(FinetuneConfig, written(tmp_path, LEAST, "my-trial.yaml")).run.name == "my-trial"


@pytest.mark.parametrize(
    "name", ["a", "A.b-c_9", "2026", "x" * 100, "客服助手", "Übung-3", "тест_1", "हिंदी", "ทดสอบ", "٣", "가나다"]
)
def test_run_names_are_plain_folder_names(name: str) -> None:
    assert build_config(RunConfig, {"name": name}, "test").name == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "/x",
        "-x",
        ".x",
        "a b",
        "x\n",
        "x" * 101,
        "\u0301a",
        "客服/助手",
        "．．",
        "a\u202eb",
        "a\u200bb",
        "客服\u3000",
        "😀",
    ],
)
def test_other_run_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"name: got .*; should "):
        build_config(RunConfig, {"name": name}, "test")


def test_a_run_name_is_composed_however_it_was_typed(tmp_path: Path) -> None:
    assert build_config(RunConfig, {"name": "U\u0308bung"}, "test").name == "Übung"
    assert load_config(FinetuneConfig, written(tmp_path, LEAST, "客服.yaml")).run.name == "客服"


@pytest.mark.parametrize("overrides", [(), ("tuning.kind=lora", "tuning.alpha=8"), ("tuning.kind=lora",)])
def test_adapter_is_the_old_name_of_tuning(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    text = LEAST + "adapter: {method: lora, rank: 4, adapter: runs/first}\n"
    config = load_config(FinetuneConfig, written(tmp_path, text), overrides)
    assert (config.tuning.kind, config.tuning.rank, config.tuning.adapter) == ("lora", 4, "runs/first")
    assert config.tuning.alpha == (8 if "tuning.alpha=8" in overrides else 32)
    assert "adapter:\n" not in dump_config(config)
    assert load_config(FinetuneConfig, written(tmp_path, LEAST), ["tuning.rank=4"]).tuning.rank == 4
    both = written(tmp_path, LEAST + "tuning: {rank: 2}\n")
    assert load_config(FinetuneConfig, both, ["tuning.rank=4"]).tuning.rank == 4
    assert build_config(FinetuneConfig, {**read_yaml_value(LEAST, "x"), "tuning": {"rank": 3}}, "x").tuning.rank == 3


def test_the_old_name_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command_config(written(tmp_path, LEAST + "adapter: {rank: 2}\n"))
    assert " ".join(capsys.readouterr().err.split()).count("the section adapter is called tuning now") == 1
    command_config(written(tmp_path, LEAST + "tuning: {rank: 2}\n"))
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tuning: {rank: 4}\nadapter: {alpha: 8}\n", "tuning and adapter: two names of one section"),
        ("tuning: {kind: lora, method: lora}\n", "tuning.method and tuning.kind: two names of one setting"),
        ("tuning: {kind: full}\n", "tuning.kind: got 'full'"),
        (
            "tuning: {adapter: x, init_lora_weights: pissa}\n",
            "tuning.adapter: x gives the initial weights, and so does",
        ),
    ],
)
def test_two_names_of_one_thing_and_other_types(tmp_path: Path, text: str, message: str) -> None:
    assert message in message_of(tmp_path, LEAST.replace("}", ", quantization: none}", 1) + text)


def test_a_config_cannot_be_changed() -> None:
    config = build_config(FinetuneConfig, {"model": {"name": "tiny"}, "data": {"train": "x"}}, "test")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.epochs = 5  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train = config.train  # type: ignore[misc]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"model": {"quantization": "nf4"}, "tuning": {"init_lora_weights": "pissa"}}, "pissa rewrites the base"),
        (
            {"model": {"quantization": "none"}, "tuning": {"init_lora_weights": "pissa", "use_dora": True}},
            "tuning.use_dora: cannot be combined",
        ),
        ({"evaluation": {"patience": 2}}, "evaluation.patience: needs evaluation.every_steps"),
        (
            {"evaluation": {"patience": 2, "every_steps": 1}, "data": {"train": "x", "validation_fraction": 0.0}},
            r"evaluation\.patience: 2 waits for .*data\.validation_fraction: 0\.0 holds no row out",
        ),
    ],
)
def test_settings_that_do_not_go_together(tree: dict[str, dict[str, Any]], message: str) -> None:
    tree = {"data": {"train": "x"}, **tree, "model": {"name": "tiny", **tree.get("model", {})}}
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


def test_a_system_prompt_that_looks_like_a_path_stays_as_it_is() -> None:
    tree = {"model": {"name": "tiny"}, "data": {"train": "/", "system": "/"}, "tuning": {"target_modules": ["/"]}}
    plain = to_tree(build_config(FinetuneConfig, tree, "test"))
    assert (plain["data"]["system"], plain["tuning"]["target_modules"]) == ("/", ["/"])
    assert plain["data"]["train"] != "/"


@pytest.mark.parametrize("tree", [FULL, {"model": {"name": "tiny"}, "data": {"train": "x"}, "run": {"name": "y"}}])
def test_a_dumped_config_reads_back_equal(tmp_path: Path, tree: dict[str, Any]) -> None:
    config = build_config(FinetuneConfig, tree, "test")
    assert load_config(FinetuneConfig, written(tmp_path, dump_config(config))) == config


@settings(deadline=None)
@given(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=30),
    st.floats(1e-9, 10),
    st.integers(0, 2**32 - 1),
)
def test_any_text_and_number_survive_the_dump(system: str, rate: float, seed: int) -> None:
    tree = {
        "model": {"name": "tiny"}, "data": {"train": "x", "system": system},
        "train": {"learning_rate": rate, "seed": seed},
    }  # fmt: skip
    config = build_config(FinetuneConfig, tree, "test")
    assert build_config(FinetuneConfig, read_yaml_value(dump_config(config), "dump"), "test") == config


def test_the_dump_holds_no_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "model").mkdir()
    tree = {
        "model": {"name": str(tmp_path / "model")}, "run": {"dir": str(tmp_path)},
        "data": {"train": [str(tmp_path / "a.jsonl"), "b.jsonl"], "validation": str(tmp_path / "b.jsonl")},
    }  # fmt: skip
    text = dump_config(build_config(FinetuneConfig, tree, "test"))
    assert str(tmp_path) not in text
    assert to_tree(build_config(FinetuneConfig, tree, "test"))["data"]["train"] == ["a.jsonl", "b.jsonl"]


def test_the_sections_are_those_of_the_design_and_small() -> None:
    assert {field.name for field in dataclasses.fields(FinetuneConfig)} == set(SECTIONS)
    for section in SECTIONS:
        count = sum(name == section for name, _ in every_field())
        assert count <= 15, f"{section} has {count} fields"


@pytest.mark.parametrize(("section", "key"), every_field())
def test_every_setting_is_used_somewhere(section: str, key: str) -> None:
    """A field without a consumer is a promise that nobody keeps: `….key` is read outside of config/schema.py."""
    if key == "kind":
        return  # it tells the types of a section apart, by which the parts of a run are chosen
    used = re.compile(rf"\.{key}\b")
    sources = [*(ROOT / "lmtune").rglob("*.py"), *(ROOT / "recipes").glob("*.py")]
    assert any(used.search(path.read_text()) for path in sources if path.name != "config/schema.py"), f"{section}.{key}"


def shipped_configs() -> list[Path]:
    """The YAML files in recipes/configs."""
    return sorted((ROOT / "recipes" / "configs").glob("*.yaml"))


def test_configs_are_shipped() -> None:
    assert len(shipped_configs()) >= 3


@pytest.mark.parametrize("path", shipped_configs(), ids=lambda path: path.name)
def test_every_shipped_config_loads(path: Path) -> None:
    schema = PretrainConfig if path.name.startswith("pretrain") else FinetuneConfig
    load_config(schema, path)


def test_the_support_config_spells_out_every_setting() -> None:
    tree = read_yaml(ROOT / "recipes" / "configs" / "support.yaml")
    assert [(section, key) for section, values in tree.items() for key in values] == sorted(
        every_field(), key=lambda item: SECTIONS.index(item[0])
    )


def test_a_section_stands_alone() -> None:
    assert build_config(ModelConfig, {"name": "x"}, "test") == ModelConfig(name="x")
    with pytest.raises(ConfigError, match="quantisation: unknown key; did you mean quantization"):
        build_config(ModelConfig, {"name": "x", "quantisation": "nf4"}, "test")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cannot write HERE/runs/trial: full", "cannot write runs/trial: full"),
        ("'HERE/a b/c' and HERE/d", "'a b/c' and d"),
        ("no UP/x/y", "no ../x/y"),
        ("1/2 of a/b, https://hub/a/b and ~/x/y", "1/2 of a/b, https://hub/a/b and ~/x/y"),
        ("not / but /usr", "not / but /usr"),
    ],
)
def test_absolute_paths_in_text_become_relative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    text = text.replace("HERE", str(tmp_path)).replace("UP", str(tmp_path.parent))
    assert without_absolute_paths(text) == expected
