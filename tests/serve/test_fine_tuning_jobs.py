"""`/v1/fine_tuning/jobs` through the `openai` client, over runs of the embedded model."""

from __future__ import annotations

from pathlib import Path

from tests.serve.fine_tuning_server import ROWS, ended, serving


def test_a_job_trains_a_model(tmp_path: Path) -> None:
    with serving(tmp_path / "runs") as served:
        client = served.client
        file = served.upload(ROWS)
        job = client.fine_tuning.jobs.create(model="tiny", training_file=file, hyperparameters={"n_epochs": 1})
        job = ended(client, job.id)
        assert job.status == "succeeded"
