"""What is shared is the model that was trained: pushed to a Hub of our own and pulled, it gives the same logits.

One short run over the embedded model is pushed in every form by one process, and pulled into another folder by it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lmtune.errors import ConfigError, ModelError
from lmtune.export.base import Request
from lmtune.export.engines import EXPORTERS
from lmtune.export.merged import merge_run
from lmtune.export.space import prepare_space
from lmtune.export.uploads import Upload, prepare_gguf, prepare_push, write_upload
from lmtune.inference.load import load_for_inference
from lmtune.recipes.push import main as push_recipe
from lmtune.runs.store import RunDirectory
from tests.hub_server import TOKEN, HubServer
from tests.sample_run import base_model, write_base, write_run
from tests.tiny import adapted
from tests.ui.client import GOOD, Client
from tests.workplace import QUESTIONS, environment, finetune, inside, write_rows

pytestmark = pytest.mark.slow  # a run, and processes that load a model

IDS = torch.arange(3, 40)[None]
SHARE = """
import json, os, sys, torch
from pathlib import Path
from lmtune.errors import LmtuneError
from lmtune.export.hub import pull, push
from lmtune.export.space import prepare_space
from lmtune.export.uploads import prepare_gguf, prepare_push
from lmtune.inference.load import load_for_inference
from lmtune.runs.store import RunDirectory
run, refused = RunDirectory("runs/trial"), {}
print(push(prepare_push(run, "me/trial")))
print(push(prepare_push(run, "me/whole", merged=True)))
print(push(prepare_gguf(run, "me/gguf")))
print(push(prepare_space(run, "me/trial")))
wrong = [prepare_push(run, "me/trial", merged=True), prepare_push(run, "me/whole"), prepare_gguf(run, "me/trial")]
for upload in wrong:
    try:
        push(upload)
    except LmtuneError as error:
        refused[f"{upload.form} to {upload.repository}"] = [error.exit_code, str(error)]
Path("refused.json").write_text(json.dumps(refused))
os.chdir(sys.argv[1])
for repository in ("me/trial", "me/whole", "lab/peft", "lab/peft-local"):
    print(pull(repository))
model = load_for_inference("adapters/lab--peft").model
torch.save(model(torch.arange(3, 40)[None]).logits.detach(), "peft.pt")
"""


@dataclass(frozen=True)
class Shared:
    """A run that was pushed in every form, and where it was pulled to."""

    run: RunDirectory
    hub: HubServer
    elsewhere: Path
    said: list[str]
    peft_logits: torch.Tensor  # of the adapter that PEFT saved, by PEFT itself


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    place, elsewhere = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("elsewhere")
    write_rows(place / "train.jsonl", QUESTIONS)
    write_rows(place / "validation.jsonl", QUESTIONS[:4])
    run, _ = finetune(place, model__name="tiny", model__quantization="nf4", train__max_steps=3)
    with inside(place):
        here = RunDirectory("runs/trial")
        merge_run(here, here.merged)
        EXPORTERS["gguf"](Request(here, "q8_0"))
        EXPORTERS["gguf"](Request(here, "f16"))
        EXPORTERS["gguf"](Request(here, adapter=True))
    plain = adapted(base_model(), rank=4, alpha=8)
    with torch.no_grad():
        logits = plain(IDS).logits
    write_base(elsewhere / "base")
    with HubServer() as hub:
        hub.add("lab/base", _files(elsewhere / "base"))
        for name, base in (("peft", "lab/base"), ("peft-local", str(elsewhere / "of-its-author"))):
            plain.peft_config["default"].base_model_name_or_path = base
            plain.save_pretrained(elsewhere / name)
            hub.add(f"lab/{name}", _files(elsewhere / name))
        hub.add("me/whole", {"model-00001-of-00002.safetensors": b"stale", "README.md": b""}, private=True)
        env = {**environment(place), **hub.environment, "HF_TOKEN": TOKEN, "HF_HOME": str(place / "hf")}
        done = subprocess.run(
            [sys.executable, "-c", SHARE, str(elsewhere)], cwd=place, env=env, capture_output=True, text=True,
            timeout=240, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        yield Shared(run, hub, elsewhere, (done.stdout + done.stderr).splitlines(), logits)


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def logits_of(target: str, folder: Path, base: str | None = None) -> torch.Tensor:
    """`[1, T, V]` of a model as `chat` loads it in `folder`."""
    with inside(folder), torch.no_grad():
        return load_for_inference(target, base=base).model(IDS).logits


# --- the same model elsewhere


def test_a_pulled_adapter_gives_the_same_logits_bit_for_bit(shared: Shared) -> None:
    trained = logits_of("runs/trial", shared.run.path.parents[1])
    assert torch.equal(logits_of("adapters/me--trial", shared.elsewhere), trained)
    assert not torch.equal(logits_of("tiny", shared.elsewhere), trained)


def test_a_pulled_merged_model_gives_the_logits_that_were_promised(shared: Shared) -> None:
    place = shared.run.path.parents[1]
    pulled = logits_of("models/me--whole", shared.elsewhere)
    assert torch.equal(pulled, logits_of("runs/trial/merged", place))
    trained, bound = logits_of("runs/trial", place), json.loads((shared.run.merged / "merge.json").read_text())["bound"]
    assert (pulled - trained).abs().max() <= bound * trained.abs().max()


def test_an_adapter_that_peft_saved_is_pulled_and_finds_its_base(shared: Shared) -> None:
    torch.testing.assert_close(torch.load(shared.elsewhere / "peft.pt"), shared.peft_logits)


def test_a_base_that_was_a_folder_of_its_author_is_given(shared: Shared) -> None:
    said = " ".join(" ".join(shared.said).split())
    assert "lmtune chat adapters/lab--peft-local --base FOLDER_OR_ID" in said
    given = logits_of("adapters/lab--peft-local", shared.elsewhere, base="./base")
    torch.testing.assert_close(given, shared.peft_logits)
    with pytest.raises(ModelError, match="of-its-author"):
        logits_of("adapters/lab--peft-local", shared.elsewhere)


# --- what is in the repositories


def test_each_repository_holds_one_form(shared: Shared) -> None:
    refused = json.loads((shared.run.path.parents[1] / "refused.json").read_text())
    assert set(refused) == {"model to me/trial", "adapter to me/whole", "gguf to me/trial"}
    assert all(code == 2 and "give another name" in message for code, message in refused.values())
    assert "model-00001-of-00002.safetensors" not in shared.hub.files("me/whole")  # weights of an earlier push
    assert {"model.safetensors", "lmtune.json"} <= shared.hub.files("me/whole").keys()
    assert "merge.json" not in shared.hub.files("me/whole")
    addresses = [line for line in shared.said if line.startswith("http")]
    assert [line.partition("/commit/")[0].removeprefix(shared.hub.url) for line in addresses] == [
        "/me/trial", "/me/whole", "/me/gguf", "/spaces/me/trial",
    ]  # fmt: skip
    assert all(repository.private for name, repository in shared.hub.repositories.items() if "lab/" not in name)


def test_nothing_private_is_in_any_repository(shared: Shared) -> None:
    private = [TOKEN, str(shared.run.path.parents[1]), str(Path.home()) + "/", "What is number 7?", "train.jsonl"]
    for name in ("me/trial", "me/whole", "me/gguf", "spaces/me/trial"):
        files = {file: content for file, content in shared.hub.files(name).items() if not file.startswith("lmtune/")}
        assert not [(name, file, one) for file, content in files.items() for one in private if one.encode() in content]


def test_cards_name_the_data_by_its_hash_and_the_model_by_its_form(shared: Shared) -> None:
    from huggingface_hub import ModelCard

    digest = hashlib.sha256((shared.run.path.parents[1] / "train.jsonl").read_bytes()).hexdigest()
    for name, library in (("me/trial", "peft"), ("me/whole", "transformers"), ("me/gguf", "gguf")):
        text = shared.hub.files(name)["README.md"].decode()
        data = ModelCard(text).data
        assert data.library_name == library
        assert f"| train: file, SHA-256 | `{digest}` |" in text
        assert f"| train: rows | {len(QUESTIONS)} |" in text
        assert bool(data.eval_results) == (library != "gguf")
    whole = shared.hub.files("me/whole")["README.md"].decode()
    assert "lmtune pull me/whole\nlmtune chat models/me--whole" in whole
    assert "## Check of the merge" in whole


def test_gguf_files_have_beside_them_what_ollama_reads(shared: Shared) -> None:
    files = shared.hub.files("me/gguf")
    assert set(files) == {"README.md", "params", "template", "trial-f16.gguf", "trial-q8_0.gguf"}
    assert files["trial-q8_0.gguf"] == (shared.run.path / "trial-q8_0.gguf").read_bytes()
    assert "{{ range .Messages }}" in files["template"].decode()
    assert json.loads(files["params"])["stop"][0] == "<|end|>"
    card = files["README.md"].decode()
    assert "ollama run hf.co/me/gguf:F16" in card
    assert "llama-server -hf me/gguf:F16 --jinja" in card
    assert "| `trial-q8_0.gguf` | Q8_0 |" in card
    assert "quantized" in yaml.safe_load(card.split("---")[1])["tags"]


# --- the Space


def test_a_spaces_settings_and_requirements_are_those_of_this_machine(shared: Shared) -> None:
    files = shared.hub.files("spaces/me/trial")
    head = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert (head["sdk"], head["sdk_version"], head["app_file"]) == ("gradio", version("gradio"), "app.py")
    assert head["python_version"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    lines = files["requirements.txt"].decode().splitlines()
    assert f"transformers=={version('transformers')}" in lines
    assert f"gradio=={version('gradio')}" in lines
    assert f"torch=={version('torch').partition('+')[0]}+cpu" in lines
    assert lines[0] == "--extra-index-url https://download.pytorch.org/whl/cpu"
    assert {"models/trial/adapter_model.safetensors", "lmtune/demo/tiny/config.json", "lmtune/recipes/app.py"} <= set(
        files
    )
    assert not [name for name in files if "__pycache__" in name]


def test_a_space_runs_from_its_folder_alone(shared: Shared, tmp_path: Path) -> None:
    for name, content in shared.hub.files("spaces/me/trial").items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "WT")}
    env |= {"SPACE_ID": "me/trial", "SPACE_HOST": "me-trial.hf.space", "HF_TOKEN": "", "PYTHONUNBUFFERED": "1"}
    found = subprocess.run(
        [sys.executable, "-c", "import lmtune.recipes.app as one; print(one.__file__)"], cwd=tmp_path, env=env,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(found.stdout.strip()) == tmp_path / "lmtune" / "recipes" / "app.py"
    with subprocess.Popen([sys.executable, "app.py"], cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True) as app:
        try:
            assert app.stdout is not None
            address = app.stdout.readline()
            assert "http://0.0.0.0:" in address
            client = Client(f"http://127.0.0.1:{address.rpartition(':')[2].strip()}", "visitor")
            page = client.http.get("/config").text
            answered = str(client.run("send", ["What is number 7?", *GOOD])["output"])
        finally:
            app.terminate()
    assert "trial" in page  # whose answer it is
    assert "'role': 'assistant'" in answered


# --- refusals, and what is written here


def _stale(run: RunDirectory, made: Path) -> None:
    os.utime(made, (0, 0))


REFUSALS: dict[str, tuple[Callable[[RunDirectory], Upload], str]] = {
    "not merged": (lambda run: prepare_push(run, "me/x", merged=True), r"no merged model; .*`lmtune merge .*support`"),
    "no gguf": (lambda run: prepare_gguf(run, "me/x"), r"no GGUF file of the model; .*`lmtune export .* --to gguf`"),
    "no such type": (lambda run: prepare_gguf(run, "me/x", ["q6_k"]), r"--only: q6_k: no support-q6_k.gguf"),
    "no such file": (lambda run: prepare_gguf(run, "me/x", ["a.gguf"]), r"--only: a.gguf: no such file"),
    "base in a folder": (lambda run: prepare_space(run, "me/x"), r"folder of yours.*merge it first.*--merged"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_pushed_says_what_to_do(name: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "support", "./models/base")
    prepare, message = REFUSALS[name]
    with pytest.raises(ModelError, match=message):
        prepare(run)


def test_what_is_older_than_the_adapter_or_no_gguf_file_is_refused(shared: Shared, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "trial")
    shutil.copytree(shared.run.path, run.path)
    for path in (run.merged / "config.json", run.path / "trial-q8_0.gguf"):
        os.utime(path, (0, 0))
    with pytest.raises(ModelError, match=r"config.json: older than .* the run was trained further; .*`lmtune merge"):
        prepare_push(run, "me/x", merged=True)
    with pytest.raises(ModelError, match=r"trial-q8_0.gguf: older than"):
        prepare_gguf(run, "me/x")
    assert "trial-f16.gguf" in prepare_gguf(run, "me/x", ["f16"]).files
    (run.path / "trial-f16.gguf").write_bytes((run.path / "trial-f16.gguf").read_bytes()[:9000])
    with pytest.raises(ModelError, match=r"trial-f16.gguf: .*(cut off|not a GGUF file)"):
        prepare_gguf(run, "me/x", ["f16"])
    with pytest.raises(ModelError, match=r"trial-lora.gguf: its general.type is adapter"):
        prepare_gguf(run, "me/x", ["trial-lora.gguf"])


def test_a_dry_run_lists_and_an_output_writes_the_same_files(
    shared: Shared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = str(shared.run.path)
    for form in ({"merged": True}, {"gguf": True}, {"space": True}):
        capsys.readouterr()
        push_recipe(target, "me/x", **form, dry_run=True, output=None)
        listed = {line.split()[-1] for line in capsys.readouterr().out.splitlines() if "bytes" in line}
        folder = tmp_path / next(iter(form))
        push_recipe(target, "me/x", **form, output=folder)
        assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == listed
    with pytest.raises(ConfigError, match="is there already"):
        write_upload(prepare_push(shared.run, "me/x"), folder)


def test_forms_that_exclude_each_other_are_refused() -> None:
    calls: tuple[tuple[dict[str, Any], str], ...] = (
        ({"gguf": True, "space": True}, "--gguf"), ({"only": ["q8_0"]}, "--only: q8_0; expected together with --gguf"),
    )  # fmt: skip
    for options, message in calls:
        with pytest.raises(ConfigError, match=message):
            push_recipe("none", "me/x", **options)
