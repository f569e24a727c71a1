"""`/v1/fine_tuning/jobs` through the `openai` client, over runs of the embedded model."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import openai
import pandas
import pytest

from lmtune.config.load import load_config
from lmtune.config.schema import FinetuneConfig
from lmtune.runs.history import list_runs
from lmtune.runs.store import RunDirectory
from tests.serve.fine_tuning_server import PAIRS, ROWS, Served, ended, lines, serving, until


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("jobs") / "runs") as server:
        yield server


@pytest.fixture(scope="module")
def model(served: Served) -> str:
    """The model of a job with validation rows, which has ended well."""
    client = served.client
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=served.upload(ROWS), validation_file=served.upload(ROWS[:4]), suffix="my model",
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}},
        metadata={"team": "a"}, seed=7,
    )  # fmt: skip
    assert job.status == "validating_files"
    assert job.fine_tuned_model is None
    made = ended(client, job.id).fine_tuned_model
    assert made is not None, client.fine_tuning.jobs.retrieve(job.id)
    return made


def test_a_job_says_what_was_trained(served: Served, model: str) -> None:
    job = served.client.fine_tuning.jobs.list(limit=100).data[-1]
    assert model == f"ft:tiny:lmtune:my-model:{job.id[6:14]}"
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


def test_its_model_is_handed_over_and_its_run_is_an_ordinary_one(served: Served, model: str) -> None:
    (made,) = [one for one in served.tuning.models() if one.name == model]
    assert (model, made.run) in served.made
    assert made.base == "tiny"
    run = RunDirectory(made.run)
    config = load_config(FinetuneConfig, run.config)
    assert (config.train.seed, config.train.epochs, config.tuning.rank) == (7, 2, 4)  # type: ignore[union-attr]
    assert run.adapter.is_dir()
    names = {item.name for item in list_runs(served.folder)}
    assert run.name in names
    assert ".serve" not in " ".join(names)


def test_events_tell_the_story_newest_first_and_in_pages(served: Served, model: str) -> None:
    jobs = served.client.fine_tuning.jobs
    job = jobs.list(limit=100).data[-1].id
    events = list(jobs.list_events(job, limit=3))  # it asks for all pages
    assert len({event.id for event in events}) == len(events)
    said = [event.message for event in reversed(events)]
    assert said[0] == f"Created fine-tuning job: {job}"
    assert said[1].startswith("Validating training file: file-")
    assert said[2].startswith("Validating validation file: file-")
    assert said[3:5] == ["Files validated, moving job to queued state", "Fine-tuning job started"]
    assert said[-2:] == [f"New fine-tuned model created: {model}", "The job has successfully completed"]
    steps = [event for event in reversed(events) if event.type == "metrics"]
    figures: list[Any] = [event.data for event in steps]
    assert [one["step"] for one in figures] == list(range(1, 9))
    assert {one["total_steps"] for one in figures} == {8}
    assert steps[0].message.startswith("Step 1/8: training loss=")
    assert all(0 <= one["train_mean_token_accuracy"] <= 1 for one in figures)
    assert figures[-1]["valid_loss"] > 0
    assert "validation loss=" in steps[-1].message
    last = jobs.list_events(job, limit=2)
    assert [event.message for event in last.data] == said[-1:-3:-1]
    assert last.has_more


def test_events_are_streamed_oldest_first_until_the_end(served: Served, model: str) -> None:
    jobs = served.client.fine_tuning.jobs
    job = jobs.list(limit=100).data[-1].id
    raw = jobs.with_raw_response.list_events(job, extra_query={"stream": "true"})
    told = [line.removeprefix("data: ") for line in raw.text.splitlines() if line]
    assert told[-1] == "[DONE]"
    assert [json.loads(line)["id"] for line in told[:-1]] == [event.id for event in jobs.list_events(job, limit=100)][
        ::-1
    ]


def test_results_are_a_table_for_pandas(served: Served, model: str) -> None:
    client = served.client
    (file,) = client.fine_tuning.jobs.list(limit=100).data[-1].result_files
    assert client.files.retrieve(file).purpose == "fine-tune-results"
    table = pandas.read_csv(io.BytesIO(client.files.content(file).read()))
    assert list(table) == ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
    assert list(table["step"]) == list(range(1, 9))
    assert table["train_loss"].iloc[-1] < table["train_loss"].iloc[0]
    assert table["valid_loss"].notna().sum() >= 2
    assert file in [one.id for one in client.files.list(purpose="fine-tune-results")]


def test_checkpoints_are_listed_with_their_figures(served: Served, model: str) -> None:
    jobs = served.client.fine_tuning.jobs
    job = jobs.list(limit=100).data[-1].id
    found = list(jobs.checkpoints.list(job, limit=1))
    assert [one.step_number for one in found] == sorted((one.step_number for one in found), reverse=True)
    assert found[0].step_number == 8
    assert found[0].fine_tuned_model_checkpoint == f"{model}:ckpt-step-8"
    assert found[0].metrics.train_loss is not None
    assert found[0].metrics.valid_loss is not None


def test_preferences_go_on_from_the_new_model_and_a_tracker_is_told(served: Served, model: str) -> None:
    client = served.client
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


def test_jobs_are_listed_by_page_and_metadata(served: Served, model: str) -> None:
    jobs = served.client.fine_tuning.jobs
    every = [job.id for job in jobs.list(limit=2)]
    assert len(every) == len(set(every)) > 2
    assert [job.metadata for job in jobs.list(metadata={"team": "a"})] == [{"team": "a"}]
    assert not jobs.list(metadata={"team": "b"}).data
    assert len(list(jobs.list(extra_query={"metadata": "null"}))) == len(every) - 1
