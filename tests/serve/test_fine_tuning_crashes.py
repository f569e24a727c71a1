"""The server, or all of it, is killed in the middle of a job: the job ends with the adapter of an undisturbed one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from tests.processes import free_port
from tests.serve.fine_tuning_server import ROWS, ended, lines, until

ROOT = Path(__file__).parents[2]


@dataclass
class Server:
    """A server that is a process."""

    process: subprocess.Popen[bytes]
    client: OpenAI

    def kill(self) -> None:
        """End it as `kill -9` does."""
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def server_of(runs: Path) -> Iterator[Server]:
    """A server of a folder, until the block ends or it is killed."""
    port = free_port()
    command = [sys.executable, "-m", "tests.serve.fine_tuning_server", str(runs), str(port)]
    process = subprocess.Popen(command, cwd=ROOT)
    address = f"http://127.0.0.1:{port}/v1"

    def answers() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{address}/files").status_code == 200
        return False

    try:
        until(answers)
        yield Server(process, OpenAI(base_url=address, api_key="none"))
    finally:
        process.terminate()
        process.wait(90)


def worker_of(runs: Path, job: str) -> int:
    """The process that trains a job."""
    return int((runs / ".serve" / "jobs" / f"{job}.lock").read_text().partition("\n")[0])


def messages(client: OpenAI, job: str) -> list[str]:
    return [event.message for event in client.fine_tuning.jobs.list_events(job, limit=100)][::-1]


def begun(client: OpenAI, job: str) -> bool:
    """Whether some steps are done, and saved."""
    return any(message.startswith("Checkpoint created at step 4") for message in messages(client, job))


def adapter(runs: Path, job: str) -> bytes:
    return (runs / job / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_job_outlives_its_server_and_its_machine_bit_for_bit(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    with server_of(runs) as first:
        file = first.client.files.create(file=("rows.jsonl", lines(ROWS)), purpose="fine-tune").id
        create = first.client.fine_tuning.jobs.create
        ids = [create(model="tiny", training_file=file, hyperparameters={"n_epochs": 10}).id for _ in range(2)]
        until(lambda: begun(first.client, ids[0]))
        worker = worker_of(runs, ids[0])
        first.kill()
    with server_of(runs) as second:  # the job's process has gone on
        assert ended(second.client, ids[0]).status == "succeeded"
        assert worker_of(runs, ids[0]) == worker
        assert messages(second.client, ids[0]).count("Fine-tuning job started") == 1
        until(lambda: begun(second.client, ids[1]))
        second.kill()
        os.kill(worker_of(runs, ids[1]), signal.SIGKILL)
    with server_of(runs) as third:
        job = ended(third.client, ids[1])
        said = messages(third.client, ids[1])
        assert job.status == "succeeded", said
        assert "The server has started again: the job resumes from its checkpoint" in said
        assert any(message.startswith("Resumed after step ") for message in said)
        steps = sorted(message.partition(":")[0] for message in said if message.startswith("Step "))
        assert steps == sorted(f"Step {n}/40" for n in range(1, 41))
        files = [third.client.fine_tuning.jobs.retrieve(one).result_files[0] for one in ids]
        results = [third.client.files.content(one).text for one in files]
    assert results[0] == results[1]
    assert adapter(runs, ids[0]) == adapter(runs, ids[1])
