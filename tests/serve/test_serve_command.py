"""`lmtune serve` as a user runs it, with nothing but OpenAI's client: upload, job, events, results, chat, kill -9."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from lmtune.inference.load import load_for_inference

KEY = "sk-of-the-user"
ROWS = [{"messages": [{"role": "user", "content": f"What is in box {n}?"},
                      {"role": "assistant", "content": f"A red ball number {n}."}]} for n in range(12)]  # fmt: skip
SETTINGS = {"tuning": {"rank": 4}, "train": {"batch_size": 4}, "run": {"checkpoint_every_steps": 4}}


@contextlib.contextmanager
def server(folder: Path, *arguments: str, key: str | None = KEY) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """(process, URL, what it has said) of the command while the block runs."""
    environment = {name: value for name, value in os.environ.items() if name != "LMTUNE_API_KEY"}
    environment |= {} if key is None else {"LMTUNE_API_KEY": key}
    log = folder / "server.log"
    with log.open("w") as written:
        process = subprocess.Popen(
            [sys.executable, "-m", "lmtune", "serve", *arguments, "--port", "18200", "--no-page"], cwd=folder,
            stdout=written, stderr=subprocess.STDOUT, env=environment, text=True,
        )  # fmt: skip
        try:
            end = time.monotonic() + 90
            while not (found := re.search(r"lmtune serve: (\S+)/v1", log.read_text())):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < end, log.read_text()
                time.sleep(0.1)
            yield process, found[1], log.read_text()
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(90)


def client_of(url: str, key: str = KEY) -> openai.OpenAI:
    """OpenAI's client."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key)


def wait_for(client: openai.OpenAI, job: str, until: Any, seconds: float = 120) -> Any:
    """The job once `until` holds."""
    end = time.monotonic() + seconds
    while not until(found := client.fine_tuning.jobs.retrieve(job)):
        assert found.status != "failed", found.error
        assert time.monotonic() < end, found
        time.sleep(0.1)
    return found


def say(client: openai.OpenAI, model: str) -> str | None:
    """What a model says."""
    asked: Any = [{"role": "user", "content": "What is in box 3?"}]
    return client.chat.completions.create(model=model, messages=asked, temperature=0, seed=0).choices[0].message.content


@pytest.mark.slow
def test_a_walk_with_openais_client_alone(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "jobs.yaml").write_text(json.dumps(SETTINGS))
    arguments = ("tiny", "--job-defaults", "jobs.yaml")
    asked: dict[str, Any] = {"model": "tiny", "suffix": "boxes", "seed": 3, "hyperparameters": {"n_epochs": 20}}
    with server(tmp_path, *arguments) as (process, url, _):
        client = client_of(url)
        file = client.files.create(file=(tmp_path / "rows.jsonl").open("rb"), purpose="fine-tune")
        job = wait_for(
            client, client.fine_tuning.jobs.create(training_file=file.id, **asked).id, lambda one: one.finished_at
        )
        assert job.status == "succeeded"
        messages = [event.message for event in client.fine_tuning.jobs.list_events(job.id)]
        assert messages[0] == "The job has successfully completed"
        assert messages[-1].startswith("Created fine-tuning job")
        assert client.files.content(job.result_files[0]).text.startswith("step,train_loss,")
        undisturbed = say(client, job.fine_tuned_model)
        assert undisturbed != say(client, "tiny")
        last, *earlier = [one.fine_tuned_model_checkpoint for one in client.fine_tuning.jobs.checkpoints.list(job.id)]
        assert say(client, last) == undisturbed
        assert earlier
        assert all(say(client, name) for name in earlier)
        with pytest.raises(openai.NotFoundError):
            say(client, f"{job.fine_tuned_model}:ckpt-step-9999")
        second = client.fine_tuning.jobs.create(training_file=file.id, **asked).id
        wait_for(client, second, lambda one: list(client.fine_tuning.jobs.checkpoints.list(one.id)))
        client.fine_tuning.jobs.pause(second)
        wait_for(client, second, lambda one: one.status == "paused")
        client.fine_tuning.jobs.resume(second)
        wait_for(client, second, lambda one: one.status == "running")
        process.kill()
        process.wait()
    with server(tmp_path, *arguments) as (_, url, _):
        client = client_of(url)
        again = wait_for(client, second, lambda one: one.status == "succeeded")
        assert {job.fine_tuned_model, again.fine_tuned_model} <= {model.id for model in client.models.list()}
        assert say(client, again.fine_tuned_model) == say(client, job.fine_tuned_model) == undisturbed
        assert say(client, last) == undisturbed
        assert client.models.delete(job.fine_tuned_model).deleted
        for gone in (job.fine_tuned_model, last):
            with pytest.raises(openai.NotFoundError):
                say(client, gone)
        with pytest.raises(openai.NotFoundError):
            client.models.delete(job.fine_tuned_model)
        with pytest.raises(openai.BadRequestError, match="cannot be fine-tuned here"):
            client.fine_tuning.jobs.create(model=job.fine_tuned_model, training_file=job.training_file)
    one, two = (tmp_path / "runs" / name / "adapter" / "adapter_model.safetensors" for name in (job.id, second))
    assert one.read_bytes() == two.read_bytes()
    loaded = load_for_inference(str(tmp_path / "runs" / job.id))
    assert loaded.has_adapter


def test_a_key_is_made_where_none_is_set_and_others_are_kept_out(tmp_path: Path) -> None:
    with server(tmp_path, "house=tiny", "--no-jobs", key=None) as (_, url, said):
        found = re.search(r"API key: (\S+)", said)
        assert found is not None
        assert [model.id for model in client_of(url, found[1]).models.list()] == ["house"]
        with pytest.raises(openai.AuthenticationError):
            client_of(url, "sk-guessed").models.list()
        assert httpx.post(f"{url}/v1/files", headers={"authorization": f"Bearer {found[1]}"}).status_code == 404
        assert httpx.get(f"{url}/health", headers={"host": "evil.example"}).status_code == 400
        assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("tiny", "--host", "0.0.0.0"), "LMTUNE_API_KEY: not set; at 0.0.0.0 other machines could use the server"),
        (("tiny", "tiny"), "tiny: two models have this name"),
        (("nothing-here",), "nothing-here: no such run"),
    ],
)
def test_what_cannot_be_served(tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "LMTUNE_API_KEY"}
    command = [sys.executable, "-m", "lmtune", "serve", *arguments, "--no-jobs"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120, env=environment)
    assert done.returncode == 2
    assert says in " ".join(done.stderr.split())
