"""Configs by path, by name, or none at all; what stands in a config's place by mistake is named for what it is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lmtune.config.files import find_config, run_name, shipped_configs
from lmtune.config.load import command_config
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
def test_every_shipped_config_is_found_by_name_unless_a_local_file_has_it(empty_folder: Path, path: Path) -> None:
    assert find_config(path.stem).read_bytes() == find_config(path.name).read_bytes() == path.read_bytes()
    (empty_folder / path.name).write_text("")
    assert find_config(path.stem) == Path(path.name)


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
    assert all(name in message_of("xyzzy") for name in shipped_configs())


def test_a_whole_section_may_be_the_first_word(empty_folder: Path) -> None:
    (empty_folder / "my.jsonl").write_text(ROW)
    config = command_config("tuning={kind: full}", ("model.quantization=none",), "tiny", ("my.jsonl",))
    assert config.tuning.kind == "full"
    assert "tunning" in message_of("tunning={kind: full}", "data.train=my.jsonl", model="tiny")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("my.json", ROW), ("my.json", "[\n" + ROW + "]"), ("rows", ROW * 2), ("my.jsonl", ""), ("my.jsonl.gz", "x"),
        ("my.json", '[{"text": "a"}]'), ("my.json", '{"messages": []}'),
    ],
)  # fmt: skip
def test_data_in_a_configs_place_is_told_where_it_belongs(empty_folder: Path, name: str, content: str) -> None:
    (empty_folder / name).write_text(content)
    text = message_of(name, verb="plan")
    assert "this is data; expected a config (YAML)" in text
    assert f"`lmtune plan --model MODEL --data {name}`" in text


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
    (empty_folder / "a.json").write_text('{"model": {"name": "tiny"}, "data": {"train": "a.jsonl"}}')
    assert command_config("a.json").model.name == "tiny"


def test_model_and_data_are_enough() -> None:
    config = command_config(None, ["train.epochs=2"], "tiny", ["data/my shop.v2.jsonl"])
    assert (config.model.name, config.data.train, config.train.epochs) == ("tiny", "data/my shop.v2.jsonl", 2)
    assert config.run.name == "my-shop.v2"
    assert command_config("model.name=tiny", ["data.train=a.jsonl"]).run.name == "a"
    assert command_config("train.epochs=2", [], "tiny", ["a.jsonl", "b.jsonl"]).data.train == ("a.jsonl", "b.jsonl")
    assert command_config(None, ["run.name=mine"], "tiny", ["a.jsonl"]).run.name == "mine"
    config = command_config("qwen3_0.6b", [], "tiny", ["1e5"])
    assert (config.model.name, config.data.train, config.run.name) == ("tiny", "1e5", "qwen3_0.6b")


@pytest.mark.parametrize(
    ("model", "overrides", "missing"),
    [(None, (), "--model MODEL and --data FILE"), ("tiny", (), "--data FILE"),
     (None, ("data.train=a.jsonl",), "--model MODEL"), ("tiny", ("data=a.jsonl",), "--data FILE")],
)  # fmt: skip
def test_what_is_missing_without_a_config_is_named(model: str | None, overrides: tuple[str, ...], missing: str) -> None:
    text = message_of(None, *overrides, model=model)
    assert text.startswith(f"{missing}: missing;")
    assert "lmtune finetune CONFIG" in text


@pytest.mark.parametrize(
    ("data", "name"),
    [("my.jsonl", "my"), ("../a/b.c.jsonl", "b.c"), ("rows/", "rows"), ("a b.json", "a-b"), ("x.jsonl.gz", "x"),
     ("-.jsonl", "run")],
)  # fmt: skip
def test_a_run_is_named_after_its_data(data: str, name: str) -> None:
    assert run_name(data) == name


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
