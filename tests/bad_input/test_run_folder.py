"""Runs whose files are not what a run writes: each command names the file and ends with 2, or shows what there is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmtune.runs.store import RunDirectory
from tests.bad_input.conftest import Command, Outcome
from tests.sample_run import write_base, write_run

pytestmark = pytest.mark.slow  # seconds together; left out of `make test-fast`

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Refused = Callable[..., Outcome]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and a finished run over it."""
    folder = tmp_path_factory.mktemp("made")
    write_base(folder / "base")
    write_run(folder / "runs" / "trial", "base")
    return folder


@pytest.fixture
def run(made: Path, place: Path) -> RunDirectory:
    """A copy of its own in the current folder."""
    shutil.copytree(made, place, dirs_exist_ok=True)
    return RunDirectory(Path("runs/trial"))


# --- adapters that nobody could use are not uploaded


def settings(name: str, **values: Any) -> Callable[[Path], Any]:
    """Changes keys of a JSON file."""
    return lambda folder: (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **values}))


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    """Changes the adapter's tensors."""

    def apply(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file(state, folder / WEIGHTS)

    return apply


def renamed(state: dict[str, torch.Tensor]) -> None:
    """Puts something before every name."""
    for key in list(state):
        state[f"x.{key}"] = state.pop(key)


UNUSABLE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "HTML": (lambda a: (a / WEIGHTS).write_bytes(b"<!doctype html>\n<p>Not found"), f"{WEIGHTS}: a web page"),
    "NaN": (tensors(lambda state: next(iter(state.values())).fill_(float("nan"))), "holds NaN or infinity"),
    "keys of another kind": (tensors(renamed), "no name that PEFT gives"),
    "no tensor": (tensors(lambda state: state.clear()), "no LoRA tensor"),
    "no alpha": (settings(CONFIG, lora_alpha=0), f"{CONFIG}: lora_alpha: 0; expected"),
    "code": (settings("tokenizer_config.json", auto_map={"AutoTokenizer": "x.Y"}), "auto_map names code"),
}  # fmt: skip


@pytest.mark.parametrize("what", UNUSABLE)
def test_an_adapter_that_nobody_could_use_is_not_uploaded(run: RunDirectory, refused: Refused, what: str) -> None:
    change, message = UNUSABLE[what]
    change(run.adapter)
    told = refused("push", "runs/trial", "me/trial", "--dry-run").err
    assert "error: runs/trial/adapter: " in told
    assert message in told


def test_the_run_as_it_was_is_uploaded_and_shown(run: RunDirectory, command: Command) -> None:
    for arguments in (("push", "trial", "me/trial", "--dry-run"), ("runs", "show", "trial"), ("runs", "list")):
        outcome = command(*arguments)
        assert outcome.code == 0, outcome.said


# --- what a run tells of itself; what is a damaged summary stands in `tests/test_runs.py`


TERMINAL = "\\u001b]0;owned\\u0007"


def test_a_damaged_summary_is_named_by_each_command(run: RunDirectory, refused: Refused, command: Command) -> None:
    run.summary.write_text(f'{{"status": "{TERMINAL}"}}')
    for arguments in (("runs", "show", "trial"), ("push", "trial", "me/trial", "--dry-run")):
        assert "error: runs/trial/summary.json: damaged: status: got " in refused(*arguments).err
    for action in (("list",), ("follow", "trial")):
        outcome = command("runs", *action)
        assert outcome.code == 0, outcome.said
        assert "damaged" in outcome.said
        assert "\x1b" not in outcome.said


def test_names_of_markup_are_shown_as_they_are(run: RunDirectory, command: Command) -> None:
    run.summary.write_text(f'{{"status": "complete", "reason": "[/y]{TERMINAL}", "[/x]{TERMINAL}": 3}}')
    run.config.write_text('model: {name: "[/m]", quantization: "[/q]"}\n')
    shown, table = command("runs", "show", "trial"), command("runs", "list")
    assert (shown.code, table.code) == (0, 0), shown.said + table.said
    assert "[/y]\\x1b]0;owned\\x07" in shown.out
    assert "[/x]\\x1b]0;owned\\x07: 3" in shown.out
    assert "[/q]" in table.out
    assert "\x1b" not in shown.said + table.said
