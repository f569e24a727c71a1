"""Configs by path, by name, or none at all; what stands in a config's place by mistake is named for what it is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lmtune.config.files import find_config, is_override, run_name, shipped_configs
from lmtune.config.load import command_config, load_config
from lmtune.config.schema import FinetuneConfig
from lmtune.errors import ConfigError
from lmtune.io.console import command, program
from tests import processes

ROOT = Path(__file__).parents[1]
ROW = json.dumps({"prompt": "When are you open?", "completion": "From nine to five."}) + "\n"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is not the clone."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def message_of(target: str | None, *overrides: str, verb: str = "finetune", model: str | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        command_config(target, overrides, model, (), verb)
    return str(caught.value)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "configs").glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("suffix", ["", ".yaml"])
def test_every_shipped_config_is_found_by_name(path: Path, suffix: str) -> None:
    assert find_config(path.stem + suffix).read_bytes() == path.read_bytes()


def test_a_shipped_config_is_named_like_its_file() -> None:
    config = command_config("qwen3_0.6b", ["data.train=my.jsonl"])
    assert (config.run.name, config.model.name, config.data.train) == ("qwen3_0.6b", "Qwen/Qwen3-0.6B", "my.jsonl")


@pytest.mark.parametrize("local", ["qwen3_0.6b", "qwen3_0.6b.yaml"])
def test_a_local_file_comes_first(empty_folder: Path, local: str) -> None:
    (empty_folder / local).write_text("model: {name: mine}\ndata: {train: a.jsonl}\n")
    assert load_config(FinetuneConfig, "qwen3_0.6b").model.name == "mine"


def test_a_local_name_needs_no_suffix(empty_folder: Path) -> None:
    (empty_folder / "shop.yaml").write_text("model: {name: mine}\ndata: {train: a.jsonl}\n")
    assert load_config(FinetuneConfig, "shop").run.name == "shop"


@pytest.mark.parametrize("name", ["support", "quickstart"])
def test_the_examples_of_a_shipped_config_are_found_outside_the_clone(empty_folder: Path, name: str) -> None:
    config = command_config(name)
    assert os.path.isfile(str(config.data.train))
    assert os.path.isfile(str(config.data.validation))
    (empty_folder / "examples").mkdir()
    (empty_folder / "examples" / "support.jsonl").write_text(ROW)
    assert command_config(name).data.train == "examples/support.jsonl"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("qwen3_06b", "qwen3_0.6b"), ("suport", "support"), ("recipes/configs/qwen3_0.6b.yaml", "qwen3_0.6b"),
     ("shopp.yaml", "shop.yaml"), ("qwen3-0.6b.yaml", "qwen3_0.6b")],
)  # fmt: skip
def test_a_misspelt_name_is_answered_by_the_nearest(empty_folder: Path, typed: str, meant: str) -> None:
    (empty_folder / "shop.yaml").write_text("")
    assert f"{typed}: no such config file; did you mean {meant}" in message_of(typed)


def test_a_name_like_no_other_lists_what_there_is() -> None:
    text = message_of("xyzzy")
    assert all(name in text for name in shipped_configs())
    assert "lmtune init" in text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("my.jsonl", ROW * 2), ("my.json", ROW), ("my.json", "[\n" + ROW + "]"), ("rows", ROW * 2), ("my.txt", ROW),
        ("my.csv", "prompt,completion\na,b\n"), ("my.jsonl", ""), ("my.jsonl.gz", "x"), ("my.json", '[{"text": "a"}]'),
    ],
)  # fmt: skip
@pytest.mark.parametrize("verb", ["finetune", "plan"])
def test_data_in_a_configs_place_is_told_where_it_belongs(
    empty_folder: Path, name: str, content: str, verb: str
) -> None:
    (empty_folder / name).write_text(content)
    text = message_of(name, verb=verb)
    assert "this is data" in text
    assert f"`lmtune {verb} --model MODEL --data {name}`" in text
    assert "YAML" in text


def test_a_folder_of_data_or_a_model_is_told_where_it_belongs(empty_folder: Path) -> None:
    (empty_folder / "rows").mkdir()
    (empty_folder / "rows" / "a.jsonl").write_text(ROW)
    assert "--data rows`" in message_of("rows")
    (empty_folder / "model").mkdir()
    (empty_folder / "model" / "config.json").write_text("{}")
    assert "--model model --data FILE`" in message_of("model")
    assert "--model tiny --data FILE`" in message_of("tiny")
    assert "--model Qwen/Qwen3-0.6B --data FILE`" in message_of("Qwen/Qwen3-0.6B")
    assert "none.jsonl: no such file" in message_of("none.jsonl")


def test_a_config_in_json_is_a_config(empty_folder: Path) -> None:
    (empty_folder / "a.json").write_text('{"model": {"name": "tiny"}, "data": {"train": "a.jsonl"}}')
    assert command_config("a.json").model.name == "tiny"


def test_model_and_data_are_enough() -> None:
    config = command_config(None, ["train.epochs=2"], "tiny", ["data/my shop.v2.jsonl"])
    assert (config.model.name, config.data.train, config.train.epochs) == ("tiny", "data/my shop.v2.jsonl", 2)
    assert config.run.name == "my-shop.v2"
    assert command_config("model.name=tiny", ["data.train=a.jsonl"]).run.name == "a"
    assert command_config("train.epochs=2", [], "tiny", ["a.jsonl", "b.jsonl"]).data.train == ("a.jsonl", "b.jsonl")
    assert command_config(None, ["run.name=mine"], "tiny", ["a.jsonl"]).run.name == "mine"


def test_model_and_data_replace_what_a_config_says() -> None:
    config = command_config("qwen3_0.6b", [], "tiny", ["1e5"])
    assert (config.model.name, config.data.train, config.train.batch_size) == ("tiny", "1e5", 16)


@pytest.mark.parametrize(
    ("model", "overrides", "missing"),
    [(None, (), "--model MODEL and --data FILE"), ("tiny", (), "--data FILE"),
     (None, ("data.train=a.jsonl",), "--model MODEL"), (None, ("train.epochs=1",), "--model MODEL and --data FILE")],
)  # fmt: skip
def test_what_is_missing_without_a_config_is_named(model: str | None, overrides: tuple[str, ...], missing: str) -> None:
    text = message_of(None, *overrides, model=model)
    assert text.startswith(f"{missing}: missing;")
    assert "lmtune finetune CONFIG" in text


def test_mistakes_without_a_config_are_told_by_key() -> None:
    with pytest.raises(ConfigError, match=r"train\.epoch: unknown key; did you mean epochs\?"):
        command_config(None, ["train.epoch=1"], "tiny", ["a.jsonl"])


@pytest.mark.parametrize(
    ("data", "name"),
    [("my.jsonl", "my"), ("../a/b.c.jsonl", "b.c"), ("rows/", "rows"), ("a b.json", "a-b"), ("x.jsonl.gz", "x"),
     ("-.jsonl", "run")],
)  # fmt: skip
def test_a_run_is_named_after_its_data(data: str, name: str) -> None:
    assert run_name(data) == name


def test_a_word_is_an_override_unless_it_is_a_file(empty_folder: Path) -> None:
    assert is_override("train.epochs=1")
    assert not is_override("my=rows.jsonl")
    assert not is_override("qwen3_0.6b")
    (empty_folder / "a.b=c").write_text("")
    assert not is_override("a.b=c")


def test_a_command_is_printed_as_it_can_be_called(monkeypatch: pytest.MonkeyPatch, empty_folder: Path) -> None:
    scripts = empty_folder / ".venv" / "bin"
    scripts.mkdir(parents=True)
    script = scripts / "lmtune"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert command("chat", "runs/my shop") == ".venv/bin/lmtune chat 'runs/my shop'"
    monkeypatch.setenv("PATH", f"{scripts}:/usr/bin")
    assert program() == "lmtune"
    (empty_folder / "elsewhere").mkdir()
    monkeypatch.chdir(empty_folder / "elsewhere")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert program() == str(script)


@pytest.mark.slow
def test_commands_take_configs_by_name_and_errors_name_the_command_as_called(empty_folder: Path) -> None:
    def ran(*arguments: str) -> subprocess.CompletedProcess[str]:
        return processes.completed(empty_folder, *arguments, variables={"PATH": "/usr/bin:/bin"})

    (empty_folder / "my.jsonl").write_text(ROW)
    shutil.copy(ROOT / "recipes" / "configs" / "support.yaml", "mine.yaml")
    assert ran("check", "--config", "support").returncode == 0
    assert ran("check", "--config", "qwen3_0.6b", "data.train=my.jsonl").returncode == 0
    given = ran("finetune", "my.jsonl")
    assert given.returncode == 2
    assert f"`{program()} finetune --model MODEL --data my.jsonl`" in given.stderr
    for verb in ("check", "preview"):
        told = ran(verb, "mine.yaml")
        assert told.returncode == 2
        assert f"{verb} --config mine.yaml" in told.stderr
    assert "no such config file; did you mean support" in ran("plan", "suport").stderr


@pytest.mark.slow
def test_preview_and_plan_start_without_a_config(empty_folder: Path) -> None:
    (empty_folder / "my.jsonl").write_text(ROW * 3)
    for verb in ("preview", "plan"):
        arguments = [verb, "--model", "tiny", "--data", "my.jsonl", "data.max_length=64"]
        done = processes.completed(empty_folder, *arguments)
        assert done.returncode == 0, done.stderr
        assert done.stdout


def test_the_api_names_a_run_like_the_command_does() -> None:
    from lmtune.api import _run_name

    assert _run_name("qwen3_0.6b", "my.jsonl", {}) == command_config("qwen3_0.6b").run.name
    assert _run_name(None, "my.jsonl", {}) == command_config(None, [], "tiny", ["my.jsonl"]).run.name


@pytest.mark.slow
def test_the_steps_after_the_quickstart_can_be_typed_as_printed(
    empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lmtune.recipes.quickstart import say_next_steps
    from lmtune.runs.store import RunDirectory

    say_next_steps(RunDirectory("my runs/quickstart"))
    printed = [line.strip() for line in capsys.readouterr().out.splitlines()]
    steps = [line for line in printed if line.startswith((f"{program()} ", "echo "))]
    assert f"{program()} chat 'my runs/quickstart'" in steps
    for step in steps:
        if " chat " in step or " app " in step:  # these need the run itself
            continue
        done = subprocess.run(["sh", "-c", step], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, (step, done.stderr)
    assert (empty_folder / "my.yaml").is_file()
