"""`/v1/fine_tuning/jobs` through the `openai` client, over runs of the embedded model."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pandas
import pytest
from openai.types.fine_tuning import FineTuningJob

from lmtune.config.load import load_config
from lmtune.config.schema import FinetuneConfig
from lmtune.runs.history import list_runs
from lmtune.runs.store import RunDirectory
from lmtune.serve.fine_tuning.process import JobProcess
from tests.serve.fine_tuning_server import PAIRS, ROWS, Served, ended, lines, serving, until


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("jobs") / "runs") as server:
        yield server


@pytest.fixture(scope="module")
def trained(served: Served) -> FineTuningJob:
    """A job with validation rows that has ended well."""
    client = served.client
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=served.upload(ROWS), validation_file=served.upload(ROWS[:4]), suffix="my model",
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}},
        metadata={"team": "a"}, seed=7,
    )  # fmt: skip
    assert job.status == "validating_files"
    assert job.fine_tuned_model is None
    job = ended(client, job.id)
    assert job.status == "succeeded", job.error
    return job


def test_a_job_says_what_was_trained(served: Served, trained: FineTuningJob) -> None:
    job = trained
    assert job.fine_tuned_model == f"ft:tiny:lmtune:my-model:{job.id[6:14]}"
    assert served.client.fine_tuning.jobs.retrieve(job.id) == job
    assert (job.model, job.seed, job.metadata, job.status, job.error) == ("tiny", 7, {"team": "a"}, "succeeded", None)
    assert job.method is not None
    assert job.method.supervised is not None
    assert job.method.supervised.hyperparameters is not None
    assert job.method.supervised.hyperparameters.model_dump() == job.hyperparameters.model_dump()
    assert job.hyperparameters.model_dump() == {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 1}
    assert job.finished_at is not None
    assert job.finished_at >= job.created_at
    assert job.trained_tokens is not None
    assert job.trained_tokens > 0


def test_its_model_is_handed_over_and_its_run_is_an_ordinary_one(served: Served, trained: FineTuningJob) -> None:
    (made,) = [one for one in served.tuning.models() if one.name == trained.fine_tuned_model]
    assert (made.name, made.run) in served.made
    assert made.base == "tiny"
    run = RunDirectory(made.run)
    config = load_config(FinetuneConfig, run.config)
    assert (config.train.seed, config.train.epochs, config.tuning.rank) == (7, 2, 4)  # type: ignore[union-attr]
    assert run.adapter.is_dir()
    names = {item.name for item in list_runs(served.folder)}
    assert run.name in names
    assert ".serve" not in " ".join(names)


def test_events_tell_the_story_newest_first_and_in_pages(served: Served, trained: FineTuningJob) -> None:
    jobs = served.client.fine_tuning.jobs
    events = list(jobs.list_events(trained.id, limit=3))  # it asks for all pages
    assert len({event.id for event in events}) == len(events)
    said = [event.message for event in reversed(events)]
    assert said[0] == f"Created fine-tuning job: {trained.id}"
    assert said[1].startswith("Validating training file: file-")
    assert said[2].startswith("Validating validation file: file-")
    assert said[3:5] == ["Files validated, moving job to queued state", "Fine-tuning job started"]
    created = f"New fine-tuned model created: {trained.fine_tuned_model}"
    assert said[-2:] == [created, "The job has successfully completed"]
    steps = [event for event in reversed(events) if event.type == "metrics"]
    figures: list[Any] = [event.data for event in steps]
    assert [one["step"] for one in figures] == list(range(1, 9))
    assert {one["total_steps"] for one in figures} == {8}
    assert steps[0].message.startswith("Step 1/8: training loss=")
    assert all(0 <= one["train_mean_token_accuracy"] <= 1 for one in figures)
    assert figures[-1]["valid_loss"] > 0
    assert "validation loss=" in steps[-1].message
    last = jobs.list_events(trained.id, limit=2)
    assert [event.message for event in last.data] == said[-1:-3:-1]
    assert last.has_more


def test_events_are_streamed_oldest_first_until_the_end(served: Served, trained: FineTuningJob) -> None:
    jobs = served.client.fine_tuning.jobs
    raw = jobs.with_raw_response.list_events(trained.id, extra_query={"stream": "true"})
    told = [line.removeprefix("data: ") for line in raw.text.splitlines() if line]
    assert told[-1] == "[DONE]"
    listed = [event.id for event in jobs.list_events(trained.id, limit=100)]
    assert [json.loads(line)["id"] for line in told[:-1]] == listed[::-1]


def test_results_are_a_table_for_pandas(served: Served, trained: FineTuningJob) -> None:
    client = served.client
    (file,) = trained.result_files
    assert client.files.retrieve(file).purpose == "fine-tune-results"
    table = pandas.read_csv(io.BytesIO(client.files.content(file).read()))
    assert list(table) == ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
    assert list(table["step"]) == list(range(1, 9))
    assert table["train_loss"].iloc[-1] < table["train_loss"].iloc[0]
    assert table["valid_loss"].notna().sum() >= 2
    assert file in [one.id for one in client.files.list(purpose="fine-tune-results")]


def test_checkpoints_are_listed_with_their_figures(served: Served, trained: FineTuningJob) -> None:
    jobs = served.client.fine_tuning.jobs
    found = list(jobs.checkpoints.list(trained.id, limit=1))
    assert [one.step_number for one in found] == sorted((one.step_number for one in found), reverse=True)
    assert found[0].step_number == 8
    assert found[0].fine_tuned_model_checkpoint == f"{trained.fine_tuned_model}:ckpt-step-8"
    assert found[0].metrics.train_loss is not None
    assert found[0].metrics.valid_loss is not None


@pytest.mark.slow
def test_preferences_go_on_from_the_new_model_and_a_tracker_is_told(served: Served, trained: FineTuningJob) -> None:
    client = served.client
    model = str(trained.fine_tuned_model)
    job = client.fine_tuning.jobs.create(
        model=model, training_file=served.upload(PAIRS), integrations=[{"type": "tensorboard"}],  # type: ignore[list-item]
        method={
            "type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": 1, "learning_rate_multiplier": 0.5}}
        },
    )  # fmt: skip
    job = ended(client, job.id)
    assert job.status == "succeeded", job.error
    assert job.fine_tuned_model == f"ft:tiny:lmtune::{job.id[6:14]}"
    assert job.method is not None
    assert job.method.dpo is not None
    assert job.method.dpo.hyperparameters is not None
    assert job.method.dpo.hyperparameters.beta == 0.2
    run = RunDirectory(served.folder / job.id)
    config = load_config(FinetuneConfig, run.config)
    assert (config.objective.kind, config.train.learning_rate) == ("dpo", 0.5e-3)
    (earlier,) = [one.run.name for one in served.tuning.models() if one.name == model]
    assert run.read_summary().started_from == earlier
    assert any((run.path / "tensorboard").rglob("*tfevents*"))


@pytest.mark.slow
def test_a_job_is_cancelled_resumed_and_paused(served: Served) -> None:
    jobs = served.client.fine_tuning.jobs
    file = served.upload(ROWS)
    job = jobs.create(model="tiny", training_file=file, hyperparameters={"n_epochs": 60}).id
    waiting = jobs.create(model="tiny", training_file=file, hyperparameters={"n_epochs": 1}).id
    with pytest.raises(openai.BadRequestError, match=f"{job}, {waiting} needs it"):
        served.client.files.delete(file)
    until(lambda: steps_of(served, job) > 1)
    assert jobs.retrieve(waiting).status == "queued"  # one job a device
    assert jobs.pause(waiting).status == "paused"
    cancelled = jobs.cancel(job)
    assert cancelled.status == "cancelled"
    assert cancelled.finished_at is not None
    with pytest.raises(openai.BadRequestError, match=f"{job} is cancelled; expected validating_files, queued"):
        jobs.cancel(job)
    resumed = jobs.resume(job)  # while its process still saves
    assert (resumed.status, resumed.finished_at) == ("queued", None)
    until(lambda: any("Resumed after step" in event.message for event in jobs.list_events(job, limit=100)))
    before = steps_of(served, job)
    until(lambda: steps_of(served, job) > before)
    assert jobs.retrieve(job).estimated_finish is not None
    paused = jobs.pause(job)
    assert (paused.status, paused.finished_at) == ("paused", None)
    until(lambda: not RunDirectory(served.folder / job).is_running())
    assert RunDirectory(served.folder / job).read_summary().status == "interrupted"
    assert {jobs.retrieve(one).status for one in (job, waiting)} == {"paused"}
    for one in (job, waiting):
        assert jobs.cancel(one).status == "cancelled"
    assert served.client.files.delete(file).deleted


@pytest.mark.slow
def test_the_page_about_moving_does_what_it_says(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "openai-fine-tuning.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    code = "".join(block for block in blocks if "chat.completions" not in block)
    (tmp_path / "rows.jsonl").write_bytes(lines(ROWS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LMTUNE_API_KEY", "none")
    names: dict[str, Any] = {}
    exec(code.replace("http://127.0.0.1:8000", served.address), names)
    assert names["job"].status == "succeeded"
    said = capsys.readouterr().out
    assert "The job has successfully completed" in said
    assert f"{names['job'].id} succeeded ft:tiny:lmtune:support:" in said
    assert "train_accuracy" in said


def steps_of(served: Served, job: str) -> int:
    """The last step that the events of a job tell."""
    found = served.client.fine_tuning.jobs.list_events(job, limit=100).data
    return max((event.data["step"] for event in found if event.type == "metrics"), default=0)  # type: ignore[index]


def test_a_job_whose_rows_are_of_another_kind_fails_with_its_lines(served: Served) -> None:
    client = served.client
    mixed = served.client.files.create(file=("pairs.jsonl", lines(PAIRS)), purpose="fine-tune").id
    job = ended(client, client.fine_tuning.jobs.create(model="tiny", training_file=mixed).id)
    assert job.status == "failed"
    assert job.error is not None
    assert (job.error.code, job.error.param) == ("invalid_training_file", "training_file")
    assert "line 1: " in job.error.message
    assert "set method.type: dpo, or write" in job.error.message
    assert job.finished_at is not None
    event = client.fine_tuning.jobs.list_events(job.id).data[0]
    assert (event.level, event.message) == ("error", job.error.message)


def test_a_run_that_fails_says_why(served: Served) -> None:
    client = served.client
    file = served.upload(ROWS)
    first = client.fine_tuning.jobs.create(model="tiny", training_file=served.upload(ROWS))
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file)
    until(lambda: client.fine_tuning.jobs.retrieve(job.id).status == "queued")
    (served.folder / ".serve" / "files" / f"{file}.jsonl").unlink()
    client.fine_tuning.jobs.cancel(first.id)
    job = ended(client, job.id)
    assert job.error is not None
    assert job.error.code == "training_failed"
    assert "no such file" in job.error.message


def test_a_process_that_is_killed_again_and_again_fails_its_job(served: Served) -> None:
    job = served.client.fine_tuning.jobs.create(model="tiny", training_file=served.upload(ROWS)).id
    lock = served.folder / ".serve" / "jobs" / f"{job}.lock"
    until(lambda: lock.exists() and lock.read_text())
    os.kill(int(lock.read_text().split()[0]), signal.SIGKILL)
    error = ended(served.client, job).error
    assert error is not None
    assert error.code == "process_killed"
    assert "killed before it finished another step; perhaps the memory was full" in error.message


def test_a_process_that_cannot_be_started_now_is_started_later(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    start, calls = JobProcess.start, []

    def start_later(process: JobProcess, *arguments: Any, **named: Any) -> None:
        calls.append(process)
        if len(calls) < 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        start(process, *arguments, **named)

    monkeypatch.setattr(JobProcess, "start", start_later)
    job = served.client.fine_tuning.jobs.create(
        model="tiny", training_file=served.upload(ROWS), hyperparameters={"n_epochs": 1}
    )
    until(lambda: len(calls) >= 3, 20)
    assert ended(served.client, job.id).status == "succeeded"


def test_a_process_that_can_never_be_started_lets_others_pass(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    start, jobs, names = JobProcess.start, served.client.fine_tuning.jobs, list[str]()

    def refuse_the_first(process: JobProcess, *arguments: Any, **named: Any) -> None:
        if process.run.path.name in names[:1]:
            raise OSError(errno.EPERM, "not permitted")
        start(process, *arguments, **named)

    monkeypatch.setattr(JobProcess, "start", refuse_the_first)
    monkeypatch.setattr("lmtune.serve.fine_tuning.queue._START_TRIES", 3)
    asked: Any = {"model": "tiny", "training_file": served.upload(ROWS), "hyperparameters": {"n_epochs": 1}}
    names += [jobs.create(**asked).id, jobs.create(**asked).id]
    error = ended(served.client, names[0]).error
    assert error is not None
    assert (error.code, error.message) == ("not_started", "The process could not be started: [Errno 1] not permitted")
    assert ended(served.client, names[1]).status == "succeeded"


def test_jobs_are_listed_by_page_and_metadata(tmp_path: Path) -> None:
    with serving(tmp_path / "runs") as server:
        jobs, file = server.client.fine_tuning.jobs, server.upload(ROWS)
        ids = []
        for team in (None, "a", "b"):
            given = {} if team is None else {"metadata": {"team": team}}
            ids.append(jobs.create(model="tiny", training_file=file, **given).id)  # type: ignore[arg-type]
            jobs.cancel(ids[-1])
        assert [job.id for job in jobs.list(limit=2)] == ids[::-1]  # it asks for all pages
        assert jobs.list(limit=2).has_more
        assert [job.id for job in jobs.list(metadata={"team": "a"})] == [ids[1]]
        assert [job.id for job in jobs.list(extra_query={"metadata": "null"})] == [ids[0]]
        with pytest.raises(openai.BadRequestError, match="after: ftjob-none: no such job"):
            jobs.list(after="ftjob-none")
        with pytest.raises(openai.NotFoundError, match="ftjob-none: no such job"):
            jobs.retrieve("ftjob-none")
