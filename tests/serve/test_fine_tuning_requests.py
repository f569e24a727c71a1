"""What clients may ask of fine-tuning: fuzzed requests never fail the server; what is wrong is named by its field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtune.config.load import load_config
from lmtune.config.schema import FinetuneConfig
from lmtune.errors import ConfigError
from lmtune.serve.fine_tuning.requests import JobRequest
from lmtune.serve.fine_tuning.service import FineTuning, application_of
from lmtune.serve.fine_tuning.settings import JobFiles, as_method, read_defaults, settings_of
from lmtune.serve.fine_tuning.store import Base, Store
from tests.serve.fine_tuning_server import BASE, PAIRS, ROWS, lines, service

JOBS = "/v1/fine_tuning/jobs"
fuzz = settings(max_examples=150, deadline=None, database=None)
TEXT = st.text(st.characters(codec=None), max_size=70) | st.sampled_from(
    ["tiny", "auto", "file-x", "ft:tiny:lmtune::x"]
)
NUMBER = st.integers() | st.floats() | st.integers(-2, 5)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8,
)  # fmt: skip


def fields(*names: str, **known: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects of which some fields are what they should be."""
    strategies = {**dict.fromkeys(names, JSON), **{name: known[name] | JSON for name in known}}
    return st.fixed_dictionaries({}, optional=strategies)


HYPERPARAMETERS = fields(n_epochs=NUMBER, batch_size=NUMBER, learning_rate_multiplier=NUMBER, beta=NUMBER)
BODY = fields(
    "training_file", "validation_file", "suffix", "other", model=st.just("tiny"), seed=NUMBER,
    hyperparameters=HYPERPARAMETERS, metadata=st.dictionaries(TEXT, TEXT, max_size=20),
    method=fields(
        type=st.sampled_from(["supervised", "dpo", "reinforcement"]), dpo=fields(hyperparameters=HYPERPARAMETERS),
        supervised=fields(hyperparameters=HYPERPARAMETERS), reinforcement=JSON,
    ),
    integrations=st.lists(
        fields(type=st.sampled_from(["wandb", "tensorboard"]), wandb=fields("project", "tags", "name")), max_size=3
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    """A client of a server whose queue does not work."""
    folder = tmp_path_factory.mktemp("requests") / "runs"
    return TestClient(application_of(service(folder, lambda name, run: None)), raise_server_exceptions=False)


@pytest.fixture(scope="module")
def file(client: TestClient) -> str:
    """The id of an uploaded file."""
    answer = client.post("/v1/files", files={"file": ("a.jsonl", lines(ROWS))}, data={"purpose": "fine-tune"})
    return str(answer.json()["id"])


def check(answer: Any) -> None:
    """An answer is one of the API: an object, or an error in its form."""
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert error["message"]
        assert set(error) == {"message", "type", "param", "code"}


@fuzz
@given(body=BODY | JSON, uses_file=st.booleans())
def test_no_body_of_a_job_fails_the_server(client: TestClient, file: str, body: Any, uses_file: bool) -> None:
    if uses_file and isinstance(body, dict):
        body = {**body, "model": "tiny", "training_file": file}
    answer = client.post(JOBS, content=json.dumps(body).encode(), headers={"content-type": "application/json"})
    check(answer)
    if answer.status_code == 200:
        made = answer.json()["id"]
        for suffix in ("", "/events", "/checkpoints"):
            assert client.get(f"{JOBS}/{made}{suffix}").status_code == 200
        assert client.post(f"{JOBS}/{made}/cancel").json()["status"] == "cancelled"


@fuzz
@given(body=st.binary(max_size=200), kind=st.sampled_from(["application/json", "text/plain", ""]))
def test_no_bytes_fail_the_server(client: TestClient, body: bytes, kind: str) -> None:
    check(client.post(JOBS, content=body, headers={"content-type": kind}))


@fuzz
@given(
    content=st.binary(max_size=300) | JSON.map(lambda value: json.dumps(value).encode()) | st.just(lines(PAIRS)),
    name=TEXT.map(lambda text: text.encode("utf-8", "replace").decode()),
    purpose=TEXT.map(lambda text: text.encode("utf-8", "replace").decode()) | st.sampled_from(["fine-tune", "batch"]),
)  # fmt: skip
def test_no_upload_fails_the_server(client: TestClient, content: bytes, name: str, purpose: str) -> None:
    check(client.post("/v1/files", files={"file": (name, content)}, data={"purpose": purpose}))


@fuzz
@given(
    body=st.binary(max_size=80).map(
        lambda middle: b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n' + middle + b"\r\n--x--\r\n"
    ) | st.binary(max_size=200),
    kind=st.sampled_from(["; boundary=x", "", "; boundary=x; charset=utf-7", "; boundary=\x01", "; charset=none"]),
)  # fmt: skip
def test_no_form_fails_the_server(client: TestClient, body: bytes, kind: str) -> None:
    check(client.post("/v1/files", content=body, headers={"content-type": f"multipart/form-data{kind}"}))


@fuzz
@given(
    method=st.sampled_from(["GET", "POST", "DELETE"]), path=st.sampled_from(["/v1/files", JOBS]),
    name=st.binary(max_size=8).map(lambda raw: "".join(f"%{byte:02x}" for byte in raw)) | st.just("x"),
    rest=st.sampled_from(["", "/content", "/events", "/checkpoints", "/cancel", "/pause", "/resume"]),
    query=st.dictionaries(
        st.sampled_from(["after", "limit", "order", "stream", "metadata", "metadata[a]", "purpose"]),
        TEXT.map(lambda text: text.encode("utf-8", "replace").decode()) | NUMBER.map(str), max_size=3,
    ),
)  # fmt: skip
def test_no_path_fails_the_server(
    client: TestClient, method: str, path: str, name: str, rest: str, query: dict[str, str]
) -> None:
    check(client.request(method, f"{path}/{name}{rest}", params=query))
    check(client.get(path, params=query))


@pytest.mark.parametrize(
    ("changes", "param", "said"),
    [
        ({"model": "gpt-4o"}, "model", "model: gpt-4o cannot be fine-tuned here; expected tiny, or a model of an"),
        ({"model": "ft:tiny:lmtune::none"}, "model", "cannot be fine-tuned here"),
        ({"training_file": "file-none"}, "training_file", "training_file: file-none: no such file; upload it first"),
        ({"validation_file": "file-none"}, "validation_file", "no such file"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", "expected at least 1"),
        ({"hyperparameters": {"beta": 0.1}}, "hyperparameters.beta", "beta: belongs to the method dpo; remove it"),
        ({"method": {"type": "reinforcement"}}, "method.type", "no objective over sampled answers and graders"),
        ({"method": {"type": "dpo", "supervised": {}}}, "method", "supervised does not belong to type dpo"),
        ({"suffix": "x" * 65}, "suffix", "at most 64 characters"),
        ({"seed": -1}, "seed", "expected at least 0"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata", "at most 16 of them"),
        ({"learning_rate": 1}, "learning_rate", "learning_rate: unknown field; remove it"),
        ({"integrations": [{"type": "comet"}]}, "integrations.0", "expected 'wandb', 'tensorboard'"),
        ({"integrations": [{"type": "wandb"}]}, "integrations.0.wandb", "integrations.0.wandb: missing"),
        ({"integrations": [{"type": "wandb", "wandb": {}}]}, "integrations.0.wandb.project", "project: missing"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(client: TestClient, file: str, changes: dict[str, Any], param: str, said: str) -> None:
    answer = client.post(JOBS, json={"model": "tiny", "training_file": file, **changes})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert said in answer.json()["error"]["message"]


def test_defaults_that_are_not_there_name_the_option(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--job-defaults: .*nope\.yaml: no such file"):
        FineTuning(tmp_path / "store", tmp_path, dict, tmp_path / "nope.yaml")


@pytest.mark.parametrize(("fault", "said"), [
    ("a pair; set objective.kind: dpo, or write messages", "a pair; set method.type: dpo, or write messages"),
    ("an answer; set objective.kind: sft, or write x", "an answer; set method.type: supervised, or write x"),
    ("labelled; set objective.kind: classification, or write x", "labelled; write x"),
])  # fmt: skip
def test_faults_of_rows_name_what_a_client_can_set(fault: str, said: str) -> None:
    assert as_method(fault) == said


def test_a_tracker_that_is_not_installed_is_refused(
    client: TestClient, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    given = [{"type": "wandb", "wandb": {"project": "mine"}}]
    answer = client.post(JOBS, json={"model": "tiny", "training_file": file, "integrations": given})
    assert answer.json()["error"]["param"] == "integrations"
    assert "integrations: wandb not installed; run `pip install wandb`" in answer.json()["error"]["message"]


def settings_for(tmp_path: Path, body: dict[str, Any], defaults: dict[str, Any] | None = None, **base: Any) -> Any:
    """The config of a job's run as `lmtune finetune` reads it, and the hyperparameters that the API shows."""
    store = Store(tmp_path / "store")
    train, other = tmp_path / "train.jsonl", tmp_path / "other.jsonl"
    train.write_bytes(lines(ROWS))
    other.write_bytes(lines(ROWS[:4]))
    request = JobRequest.model_validate({"model": "tiny", "training_file": "file-1", "seed": 3, **body})
    job = store.add_job(request, Base("tiny", BASE, **base))
    files = JobFiles(train, other if request.validation_file else None)
    made = settings_of(job, files, len(ROWS), tmp_path / "runs", defaults or {})
    path = tmp_path / "job.yaml"
    path.write_text(made.yaml)
    config = load_config(FinetuneConfig, path)
    assert config.run.name == job.id
    assert config == made.config
    return config, made.hyperparameters


def test_auto_is_what_lmtune_proposes(tmp_path: Path) -> None:
    config, shown = settings_for(tmp_path, {"hyperparameters": {"n_epochs": "auto"}})
    assert (config.train.batch_size, config.train.epochs, config.train.learning_rate) == (4, 10, 4e-3)
    assert shown == {"n_epochs": 10, "batch_size": 4, "learning_rate_multiplier": 1}
    assert config.train.seed == 3
    assert config.model == BASE
    assert (config.data.validation, config.data.validation_fraction) == (None, 0)


def test_what_is_asked_comes_before_the_servers_defaults(tmp_path: Path) -> None:
    defaults = {
        "train": {"epochs": 2, "max_steps": 7, "learning_rate": 1e-3}, "tuning": {"rank": 8, "dropout": 0.1},
        "objective": {"kind": "dpo", "label_smoothing": 0.1}, "run": {"trackers": ["tensorboard"]},
    }  # fmt: skip
    asked = {"n_epochs": 3, "batch_size": 2, "learning_rate_multiplier": 2, "beta": 0.3}
    body = {
        "method": {"type": "dpo", "dpo": {"hyperparameters": asked}}, "validation_file": "file-2",
        "integrations": [{"type": "wandb", "wandb": {"project": "mine"}}],
    }  # fmt: skip
    config, shown = settings_for(tmp_path, body, defaults)
    assert (config.train.epochs, config.train.max_steps, config.train.batch_size) == (3, None, 2)
    assert config.train.learning_rate == 2e-3
    assert (config.objective.beta, config.objective.label_smoothing) == (0.3, 0.1)
    assert config.tuning.rank == 8
    assert config.run.trackers == ("wandb", "tensorboard")
    assert config.evaluation.every_steps == 2  # ten times in 24 steps
    assert shown == asked
    config, _ = settings_for(tmp_path, {}, defaults)
    assert (config.objective.kind, config.train.max_steps) == ("sft", 7)


def test_a_job_that_goes_on_takes_the_shape_of_its_adapter(tmp_path: Path) -> None:
    config, _ = settings_for(tmp_path, {}, {"tuning": {"rank": 8, "dropout": 0.1}}, start="ftjob-earlier")
    assert config.tuning.adapter == str(tmp_path / "runs" / "ftjob-earlier")
    assert (config.tuning.rank, config.tuning.dropout) == (16, 0.1)  # 16 stands for the adapter's own


def test_a_multiplier_of_a_rate_that_is_found_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="learning_rate_multiplier: 2; this server finds the learning rate itself"):
        settings_for(
            tmp_path, {"hyperparameters": {"learning_rate_multiplier": 2}}, {"train": {"learning_rate": "find"}}
        )


@pytest.mark.parametrize(
    ("text", "said"),
    [("run: {name: mine}", "run.name: each job says it; remove it"), ("model: {name: tiny}", "model.name: the server"),
     ("train: {epoch: 1}", "did you mean epochs"), ("- 1", "expected sections")],
)  # fmt: skip
def test_wrong_defaults_are_refused_at_the_start(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "defaults.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_defaults(tmp_path / "defaults.yaml")
