"""What is private stays where it was: a marked token, marked rows and this folder's path, looked for in every file that
training, merging and sharing write, and in everything that is sent."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmtune.config.yaml import write_yaml
from tests import processes
from tests.hub_server import TOKEN, HubServer
from tests.workplace import HELDOUT, QUESTIONS, environment, make_workplace, tree_of, write_rows

pytestmark = pytest.mark.slow

STORED_TOKEN = "hf_" + "StoredCanaryForTests9876543210zyxw"  # as `hf auth login` leaves it; HF_TOKEN goes before it
TRAINED, HELD_OUT = "canary-row-4711", "canary-row-0815"


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, hub: HubServer) -> Path:
    """A folder in which a run was trained, merged and pushed, with absolute paths in its config."""
    folder = make_workplace(tmp_path_factory.mktemp("private") / "customer-Meier")
    write_rows(folder / "train.jsonl", [*QUESTIONS, {"prompt": f"Who is {TRAINED}?", "completion": TRAINED}])
    write_rows(folder / "validation.jsonl", [*HELDOUT, {"prompt": f"Who is {HELD_OUT}?", "completion": HELD_OUT}])
    settings = tree_of(
        model__name=str(folder / "base"), data__train=str(folder / "train.jsonl"),
        data__validation=str(folder / "validation.jsonl"), evaluation__exact_match_rows=10,
        evaluation__every_steps=4, run__dir=str(folder / "runs"),
    )  # fmt: skip
    (folder / "run.yaml").write_text(write_yaml(settings))
    (folder / "hf").mkdir()
    (folder / "hf" / "token").write_text(STORED_TOKEN)
    secrets = {"HF_TOKEN": TOKEN, "HF_HOME": str(folder / "hf"), "HF_TOKEN_PATH": str(folder / "hf" / "token")}
    for arguments in (("finetune", "run.yaml"), ("merge", "trial")):
        code = processes.lmtune(folder, *arguments, trouble=processes.with_environment(**secrets))
        assert code == 0, processes.said(folder)
        (folder / "output").rename(folder / f"{arguments[0]}.said")
    done = subprocess.run(
        [sys.executable, "-m", "lmtune", "push", "trial", "me/support"], cwd=folder, capture_output=True, text=True,
        env={**environment(folder), **secrets, **hub.environment}, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder / "push.said").write_text(done.stdout + done.stderr)
    return folder


def written(folder: Path) -> dict[str, bytes]:
    """Every file that the commands have made; not what was there before them, nor the terminal's text."""
    own = {"base", "hf", "train.jsonl", "validation.jsonl", "run.yaml"}
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {
        name: path.read_bytes()
        for path in paths
        if (name := str(path.relative_to(folder))).split("/")[0] not in own and not name.endswith(".said")
    }


def sent(hub: HubServer) -> dict[str, bytes]:
    """The bodies of all requests, the files as they arrived, and the addresses asked for."""
    bodies = {f"{number} {request.path}": request.body for number, request in enumerate(hub.requests)}
    return bodies | hub.files("me/support") | {"addresses": "\n".join(r.path for r in hub.requests).encode()}


def holding(files: dict[str, bytes], secret: str) -> list[str]:
    return [name for name, content in files.items() if secret.encode() in content]


def test_the_commands_wrote_what_a_canary_could_sit_in(place: Path, hub: HubServer) -> None:
    names = set(written(place))
    parts = [
        "config.yaml", "environment.json", "data.json", "metrics.jsonl", "summary.json", "predictions.jsonl",
        "adapter/adapter_config.json", "adapter/README.md", "merged/config.json", "merged/README.md",
    ]  # fmt: skip
    for part in parts:
        assert f"runs/trial/{part}" in names
    assert any("checkpoints/step-" in name and name.endswith("state.json") for name in names)
    assert any(name.startswith("cache/") for name in names)
    assert "README.md" in sent(hub)


@pytest.mark.parametrize("token", [TOKEN, STORED_TOKEN])
def test_no_token_is_written_sent_or_said(place: Path, hub: HubServer, token: str) -> None:
    assert holding(written(place), token) == []
    assert holding(sent(hub), token) == []
    assert not [path for path in place.glob("*.said") if token in path.read_text()]
    assert {request.token for request in hub.requests} - {None} == {TOKEN}  # in the header that is meant for it


def test_no_absolute_path_is_written_or_sent(place: Path, hub: HubServer) -> None:
    for private in (str(place), place.name, f"{Path.home()}{os.sep}", os.path.realpath(sys.prefix)):
        assert holding(written(place), private) == []
        assert holding(sent(hub), private) == []


def no_room() -> None:
    """The checkpoint cannot be written, and says where."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(Path("runs/failed/checkpoints").resolve()))


def test_no_absolute_path_is_written_when_a_run_fails(place: Path) -> None:
    trouble = processes.at_call("lmtune.training.checkpoint", "save_file", no_room)
    arguments = ("run.yaml", "run.name=failed", "evaluation.exact_match_rows=0")
    assert processes.lmtune(place, "finetune", *arguments, trouble=trouble) == 1
    (place / "output").rename(place / "failed.said")
    reason = json.loads((place / "runs/failed/summary.json").read_text())["reason"]
    assert reason.startswith("cannot write the checkpoint runs/failed/checkpoints/step-00000")
    assert holding(written(place / "runs/failed"), str(place)) == []
    assert holding(written(place / "runs/failed"), place.name) == []


def test_rows_stay_in_the_files_that_are_there_to_hold_them(place: Path, hub: HubServer) -> None:
    assert holding(written(place), TRAINED) == []
    assert holding(written(place), HELD_OUT) == ["runs/trial/predictions.jsonl", "runs/trial/report.html"]
    for row in (TRAINED, HELD_OUT, "train.jsonl"):
        assert holding(sent(hub), row) == []
    for row in (TRAINED, HELD_OUT):
        assert not [path for path in place.glob("*.said") if row in path.read_text()]
