"""The command line: every verb is a recipe, every outcome has its exit code, an error is one message."""

import ast
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lmtune.cli import VERBS, main
from lmtune.errors import CheckpointError, ConfigError, DataError, LmtuneError, ModelError
from lmtune.io.text import format_list
from lmtune.run import run

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.py") if path.stem != "__init__")


def lmtune(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "lmtune", *arguments], capture_output=True, text=True, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip


@pytest.fixture
def outcome(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs a recipe as `python recipes/VERB.py` does; gives exit code and what stood on stderr."""

    def of(recipe: Callable[..., None], *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["recipe.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            run(recipe)
        return int(ended.value.code or 0), capfd.readouterr().err

    return of


@pytest.mark.parametrize(
    ("error", "code"),
    [(LmtuneError, 1), (ConfigError, 2), (DataError, 2), (ModelError, 2), (CheckpointError, 2)],
)
def test_an_error_is_one_message_and_its_exit_code(outcome, error: type[LmtuneError], code: int) -> None:
    def recipe() -> None:
        raise error("data.train: [bold]x[/] is wrong\n  mend it")

    assert outcome(recipe) == (code, "error: data.train: [bold]x[/] is wrong\n  mend it\n")


def test_an_unforeseen_error_is_code_1_without_a_traceback(outcome) -> None:
    def recipe() -> None:
        raise RuntimeError("shape [3, 4]")

    assert outcome(recipe) == (1, "error: RuntimeError: shape [3, 4]\n  (LMTUNE_TRACEBACK=1 shows where)\n")


def test_a_panic_in_a_library_is_an_unforeseen_error_too(outcome) -> None:
    """Libraries written in Rust raise what is no Exception."""
    panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})

    def recipe() -> None:
        raise panic("index 4 is out of range")

    code, text = outcome(recipe)
    assert code == 1
    assert text.startswith("error: PanicException: index 4 is out of range\n")


def test_the_traceback_is_shown_on_demand(outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMTUNE_TRACEBACK", "1")

    def recipe() -> None:
        raise ConfigError("wrong")

    code, text = outcome(recipe)
    assert code == 2
    assert "Traceback" in text
    assert text.endswith("error: wrong\n")


def test_ctrl_c_is_130(outcome) -> None:
    def recipe() -> None:
        raise KeyboardInterrupt

    assert outcome(recipe)[0] == 130


def test_success_is_0_and_wrong_usage_2(outcome) -> None:
    def recipe(count: int) -> None:
        assert count == 3

    assert outcome(recipe, "3") == (0, "")
    code, text = outcome(recipe, "three")
    assert code == 2
    assert "'count'" in text
    assert outcome(recipe)[0] == 2


def test_a_recipe_chooses_its_own_exit_code(outcome) -> None:
    def recipe() -> None:
        sys.exit(143)

    assert outcome(recipe)[0] == 143


def test_the_exit_code_is_noted_for_the_launcher(outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMTUNE_EXIT_CODES", str(tmp_path / "codes"))

    def recipe() -> None:
        raise DataError("wrong")

    outcome(recipe)
    outcome(lambda: None)
    assert (tmp_path / "codes").read_text() == "2\n0\n"


def test_a_reader_that_goes_away_ends_the_command_quietly() -> None:
    code = "from lmtune.run import run\ndef recipe():\n for _ in range(100_000): print('a line of output')\nrun(recipe)"
    command = f'{sys.executable} -c "$CODE" | head -n 1; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=False, env={**os.environ, "CODE": code}
    )
    assert done.stdout == "a line of output\n1\n"
    assert done.stderr == ""


def test_the_first_problems_are_listed_and_the_rest_counted() -> None:
    assert format_list(["a", "b"], 20) == "  a\n  b"
    assert format_list([str(n) for n in range(25)], 2) == "  0\n  1\n  … and 23 more"


def test_every_recipe_is_a_verb_in_the_help(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["lmtune", "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    text = capfd.readouterr().out
    assert not ended.value.code
    assert {path.stem for path in RECIPES} <= set(VERBS)
    for path in RECIPES:
        assert f" {path.stem} " in text, path.stem


def test_every_verb_is_a_recipe() -> None:
    assert set(VERBS) == {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_short_and_tells_what_it_does(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    assert len(source.splitlines()) <= 100
    assert source.endswith('if __name__ == "__main__":\n    run(main)\n')
    assert f"Example: lmtune {path.stem}" in (ast.get_docstring(functions["main"]) or "")


def test_a_recipe_run_as_a_script_is_the_verb() -> None:
    script = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "check.py"), "none.jsonl"], capture_output=True, text=True, check=False
    )
    verb = lmtune("check", "none.jsonl")
    assert (script.returncode, script.stderr) == (verb.returncode, verb.stderr)
    assert verb.returncode == 2
    assert "none.jsonl" in verb.stderr
    assert verb.stdout == ""


def test_the_version_and_no_arguments() -> None:
    from lmtune import __version__

    assert lmtune("--version").stdout == f"lmtune {__version__}\n"
    nothing = lmtune()
    assert nothing.returncode == 2
    assert "quickstart" in nothing.stdout + nothing.stderr
    assert lmtune("finetunes").returncode == 2


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("train", "finetune"), ("eval", "evaluate"), ("finetunes", "finetune"), ("prevew", "preview"), ("serve", "app")],
)
def test_a_verb_of_another_tool_is_answered_by_ours(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], typed: str, meant: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["lmtune", typed, "my.jsonl"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert f"Did you mean '{meant}'" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetune", "none.yaml"], "none.yaml: no such config file"),
        (["finetune", "run.yaml", "train.epoch=1"], "train.epoch: unknown key; did you mean epochs?"),
        (["plan", "run.yaml", "data.train=none.jsonl"], "none.jsonl"),
        (["merge", "none"], "none: no such run"),
        (["evaluate", "none", "none.jsonl"], "none.jsonl"),
    ],
)
def test_wrong_input_is_code_2_at_once_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("model: {name: tiny}\ndata: {train: rows.jsonl}\n")
    done = lmtune(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == ["run.yaml"]


def test_a_data_fault_names_every_line_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("model: {name: tiny}\ndata: {train: rows.jsonl}\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n\n{"prompt": 3, \n')
    done = lmtune("finetune", "run.yaml")
    assert done.returncode == 2
    assert "rows.jsonl:2: " in done.stderr
    assert "rows.jsonl:4: " in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["rows.jsonl", "run.yaml"]
