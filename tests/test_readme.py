"""Every command in the README and some pages runs, in the order in which a reader meets them; shipped YAML files train.

The commands are taken from the pages themselves. Only what this machine cannot have is exchanged: the embedded model
stands in for the one on the Hub, a Hub on this machine for the real one, CPU processes for GPUs; steps are few.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import processes
from tests.hub_server import TOKEN, HubServer

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/several-gpus.md", "docs/sharing.md", "docs/runs.md", "docs/chat.md")
SMALL = (
    "model.name=tiny", "train.max_steps=3", "train.batch_size=4", "evaluation.exact_match_rows=2",
    "evaluation.max_new_tokens=8",
)  # fmt: skip
ROWS = "".join(f'{{"prompt": "What is {i} and {i}?", "completion": "It is {2 * i}."}}\n' for i in range(24))


def shell_commands() -> list[str]:
    """The commands in the pages' `sh` blocks, in order, each once."""
    pages = [(ROOT / page).read_text(encoding="utf-8") for page in PAGES]
    blocks = [block for page in pages for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL)]
    return list(dict.fromkeys(line for block in blocks for line in block.splitlines() if line.strip()))


def named_commands() -> list[str]:
    """The verbs of the README's table of commands."""
    rows = re.findall(r"^\| (`lmtune .*?) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    return [verb for row in rows for verb in re.findall(r"`lmtune (\w+)", row)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's folder outside the clone: a file of rows and one of questions, and nothing else."""
    path = tmp_path_factory.mktemp("reader")
    (path / "questions.txt").write_text("What is 2 and 2?\nWhat is 3 and 3?\n", encoding="utf-8")
    (path / "my.jsonl").write_text(ROWS, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Hub on this machine, and a cache of its own."""
    with HubServer() as hub:
        yield {
            **os.environ, **hub.environment, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0",
            "LMTUNE_CACHE": str(tmp_path_factory.mktemp("cache")), "ACCELERATE_USE_CPU": "true",
            "PYTHONPATH": str(ROOT),
        }  # fmt: skip


def adjusted(command: str) -> list[str]:
    """The command's words as they can run here."""
    words = shlex.split(command.replace("user/name", "me/name").replace("user--name", "me--name").partition(" < ")[0])
    if words[0] == "lmtune":
        words[:1] = [sys.executable, "-m", "lmtune"]
    if words[0] == "accelerate":
        words[:2] = [
            sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1",
            "--mixed_precision", "no", "--dynamo_backend", "no",
        ]  # fmt: skip
        words = [str(ROOT / word) if word.startswith("recipes/") else word for word in words]
    if "finetune" in words or any(word.endswith("finetune.py") for word in words):
        plain = "--model" in words  # another config of the same run would be refused
        words += [*SMALL, *(["run.name=two"] if "2" in words else ["run.name=plain"] if plain else [])]
    return ["tiny" if word == "Qwen/Qwen3-0.6B" else word for word in words]


@pytest.mark.slow
def test_every_command_of_the_readme_runs(folder: Path, environment: dict[str, str]) -> None:
    ran = 0
    for command in shell_commands():
        words = adjusted(command)
        if words[0] == "make":
            assert (
                subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, check=False).returncode == 0
            )
        elif "pip" in command or "venv" in command or "quickstart" in command:
            continue  # what they do has tests of its own: test_packaging and test_quickstart
        elif "app" in words:
            _serves(words, folder, environment)
        else:
            piped = command.partition(" < ")[2].partition(" > ")[0]
            question = (folder / piped).read_text() if piped else "What is 2 and 2?\n" if "chat" in words else None
            done = _done(words, folder, environment, question)
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
            if piped:
                assert len(done.stdout.splitlines()) == 2, done.stdout
        ran += 1
    assert ran >= 14


@pytest.mark.slow
def test_the_python_of_the_readme_runs(folder: Path, environment: dict[str, str]) -> None:
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/python.md"))
    blocks = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "import lmtune" in block]
    assert blocks
    (folder / "heldout.jsonl").write_text(ROWS, encoding="utf-8")
    for block in blocks:
        code = block.replace("Qwen/Qwen3-0.6B", "tiny")
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False,
            timeout=250,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_the_table_names_every_verb() -> None:
    from lmtune.cli import VERBS

    assert sorted(named_commands()) == sorted(VERBS)


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_runs(path: Path, folder: Path, environment: dict[str, str]) -> None:
    text = path.read_text(encoding="utf-8")
    if "adapter" not in text and "tokenizer" in text:
        shutil.rmtree(folder / "made", ignore_errors=True)
        subprocess.run(
            [sys.executable, "-m", "tools.world", folder / "world", "--documents", "400"], cwd=ROOT, check=True
        )
        arguments = ["pretrain", str(path), "train.max_steps=2", "output.dir=made"]
    else:
        rows = [] if "examples/" in text else ["data.train=my.jsonl"]
        arguments = ["finetune", str(path), *SMALL, *rows, f"run.name=config-{path.stem.replace('.', '-')}"]
    done = processes.completed(folder, *arguments, variables=environment)
    assert done.returncode == 0, done.stdout + done.stderr


def _done(
    words: list[str], folder: Path, environment: dict[str, str], question: str | None
) -> subprocess.CompletedProcess[str]:
    """What a command did; one that begins with `lmtune` and asks no Hub starts without importing everything again."""
    if words[1:3] == ["-m", "lmtune"] and words[3] not in ("push", "pull") and "--processes" not in words:
        return processes.completed(folder, *words[3:], given=question or "", variables=environment)
    return subprocess.run(
        words, cwd=folder, env=environment, input=question, capture_output=True, text=True, check=False, timeout=250
    )


def _serves(words: list[str], folder: Path, environment: dict[str, str]) -> None:
    """Start the app, wait for its address, end it with SIGTERM; it must end with 0."""
    log = folder / "app.log"
    with log.open("w") as output:
        app = subprocess.Popen(words, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while "http://127.0.0.1" not in log.read_text() and time.monotonic() < deadline and app.poll() is None:
            time.sleep(0.2)
        assert "http://127.0.0.1" in log.read_text(), log.read_text()
        app.send_signal(signal.SIGTERM)
        assert app.wait(timeout=60) == 0, log.read_text()
    finally:
        app.kill()
