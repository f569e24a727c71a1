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


Outcome = Callable[..., tuple[int, str]]


@pytest.fixture
def outcome(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Outcome:
    """Runs a recipe as `python recipes/VERB.py` does; gives exit code and what stood on stderr."""

    def of(recipe: Callable[..., None], *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["recipe.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            run(recipe)
        return int(ended.value.code or 0), capfd.readouterr().err

    return of


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        *((error("data.train: [bold]x[/] is wrong\n  fix it"), error.exit_code,
           "error: data.train: [bold]x[/] is wrong\n  fix it\n")
          for error in (LmtuneError, ConfigError, DataError, ModelError, CheckpointError)),
        (RuntimeError("shape [3, 4]"), 1, "error: RuntimeError: shape [3, 4]\n  (LMTUNE_TRACEBACK=1 shows where)\n"),
        # libraries written in Rust raise what is no Exception
        (type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})("index 4"), 1,
         "error: PanicException: index 4\n  (LMTUNE_TRACEBACK=1 shows where)\n"),
        (KeyboardInterrupt(), 130, ""), (SystemExit(143), 143, ""),
    ],
)  # fmt: skip
def test_an_error_is_one_message_and_its_exit_code(
    outcome: Outcome, error: BaseException, code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recipe() -> None:
        raise error

    monkeypatch.setenv("LMTUNE_EXIT_CODES", str(tmp_path / "codes"))  # where the launcher reads it
    assert outcome(recipe) == (code, said)
    assert (tmp_path / "codes").read_text() == f"{code}\n"
    monkeypatch.setenv("LMTUNE_TRACEBACK", "1")
    if isinstance(error, LmtuneError):
        _, text = outcome(recipe)
        assert "Traceback" in text
        assert text.endswith(said)


def test_the_exit_codes_are_those_that_are_documented() -> None:
    errors = (LmtuneError, ConfigError, DataError, ModelError, CheckpointError)
    assert [error.exit_code for error in errors] == [1, 2, 2, 2, 2]


def test_success_is_0_and_wrong_usage_2(outcome: Outcome) -> None:
    def recipe(count: int) -> None:
        assert count == 3

    assert outcome(recipe, "3") == (0, "")
    code, text = outcome(recipe, "three")
    assert (code, "'count'" in text) == (2, True)
    assert outcome(recipe)[0] == 2


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


def test_every_verb_is_a_recipe_in_the_help(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["lmtune", "--help"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert set(VERBS) == {path.stem for path in RECIPES}
    text = capfd.readouterr().out
    assert not [verb for verb in VERBS if f" {verb} " not in text]


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


@pytest.mark.parametrize(("typed", "meant"), [("train", "finetune"), ("prevew", "preview"), ("web", "app")])
def test_a_verb_of_another_tool_is_answered_by_ours(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], typed: str, meant: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["lmtune", typed, "my.jsonl"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert f"Did you mean '{meant}'" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["finetune", "none.yaml"], ["none.yaml: no such config file"]),
        (["finetune", "run.yaml"], ["rows.jsonl:2: ", "rows.jsonl:4: "]),
        (["merge", "none"], ["none: no such run"]),
        (["evaluate", "none", "none.jsonl"], ["none.jsonl"]),
    ],
)
def test_wrong_input_is_code_2_at_once_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], messages: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("model: {name: tiny}\ndata: {train: rows.jsonl}\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n\n{"prompt": 3, \n')
    done = lmtune(*arguments)
    assert done.returncode == 2
    assert not [message for message in messages if message not in done.stderr]
    assert "Traceback" not in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["rows.jsonl", "run.yaml"]
