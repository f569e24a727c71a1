"""Pushing and pulling, with the real huggingface_hub client against a Hub of our own on this machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from lmtune.errors import ConfigError, ModelError
from lmtune.export.uploads import prepare_push
from lmtune.models.hub import checked_repository
from lmtune.models.tuning.adapter_files import check_adapter
from lmtune.runs.store import RunDirectory
from tests.hub_server import TOKEN, HubServer
from tests.sample_run import write_base, write_run

pytestmark = pytest.mark.slow  # seconds together; left out of `make test-fast`

UPLOADED = {
    "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "generation_config.json",
    "lmtune.json", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return write_run(tmp_path / "runs" / "support")


@pytest.fixture(autouse=True)
def no_own_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The token of whoever runs the tests is out of reach."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def lmtune(hub: HubServer, folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **hub.environment, "LMTUNE_TRACEBACK": "0", "COLUMNS": "200", **environment}
    command = [sys.executable, "-m", "lmtune", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)


def python(hub: HubServer, folder: Path, code: str) -> str:
    env = {**os.environ, **hub.environment, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_push_then_pull_gives_the_same_bytes_and_tells_nothing_private(
    hub: HubServer, run: RunDirectory, tmp_path: Path
) -> None:
    pushed = lmtune(hub, tmp_path, "push", "support", "me/support")
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.startswith(f"{hub.url}/me/support/commit/")
    uploaded = hub.files("me/support")
    assert set(uploaded) == UPLOADED
    assert hub.repositories["me/support"].private
    for name in UPLOADED - {"README.md"}:
        assert uploaded[name] == (run.adapter / name).read_bytes(), name

    private = [TOKEN, str(tmp_path), str(Path.home()) + "/", "private-customers", "not for others"]
    sent = [*uploaded.values(), *(request.body for request in hub.requests)]
    assert not [(secret, blob) for blob in sent for secret in private if secret.encode() in blob]
    assert any(request.token == TOKEN for request in hub.requests)  # it does go where it belongs
    assert TOKEN not in pushed.stdout + pushed.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]

    pulled = lmtune(hub, tmp_path, "pull", "me/support")
    assert pulled.returncode == 0, pulled.stderr
    folder = tmp_path / "adapters" / "me--support"
    assert pulled.stdout.strip() == "adapters/me--support"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == uploaded
    assert [path.name for path in folder.parent.iterdir()] == ["me--support"]  # no half of a download is left


@pytest.mark.slow
def test_code_on_the_card_runs_and_the_adapter_matters(hub: HubServer, run: RunDirectory, tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    hub.add("lab/base", {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()})
    assert lmtune(hub, tmp_path, "push", "support", "me/support").returncode == 0
    card = hub.files("me/support")["README.md"].decode()
    with_peft, with_transformers = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    compare = f"""
import torch
ids = torch.arange(3, 20)[None]
tuned = model(ids).logits
{with_transformers}
assert torch.equal(model(ids).logits, tuned), "PEFT and transformers disagree"
plain = AutoModelForCausalLM.from_pretrained("lab/base")(ids).logits
print((plain - tuned).abs().max().item())
"""
    output = python(hub, tmp_path, with_peft + compare)
    assert float(output.splitlines()[-1]) > 0.01


def test_dry_run_lists_and_sends_nothing(hub: HubServer, run: RunDirectory, tmp_path: Path) -> None:
    done = lmtune(hub, tmp_path, "push", "support", "me/support", "--dry-run", HF_TOKEN="")
    assert done.returncode == 0, done.stderr
    listed = {line.split()[-1]: line for line in done.stdout.splitlines()}
    assert set(listed) == UPLOADED | {"notes.txt", "optimizer.safetensors"}
    assert "stays here" in listed["notes.txt"]
    assert "bytes" in listed["adapter_model.safetensors"]
    assert hub.requests == []


def test_existing_public_repository_needs_public(hub: HubServer, run: RunDirectory, tmp_path: Path) -> None:
    hub.add("me/open", {})
    refused = lmtune(hub, tmp_path, "push", "support", "me/open")
    assert refused.returncode == 2
    assert "--public" in refused.stderr
    assert hub.files("me/open") == {}
    done = lmtune(hub, tmp_path, "push", "support", "me/open", "--public", "--revision", "v2", "--message", "Second")
    assert done.returncode == 0, done.stderr
    assert hub.files("me/open") == {}
    assert set(hub.files("me/open", "v2")) == UPLOADED
    assert any(b'"summary": "Second"' in request.body for request in hub.requests)


# --- what the Hub answers

CASES = """
import json, os, sys
from pathlib import Path
from lmtune.errors import LmtuneError
from lmtune.export.hub import pull, push
from lmtune.export.uploads import prepare_push
from lmtune.runs.store import RunDirectory
told = {}
for name, action, token, *arguments in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = token
    try:
        if action == "push":
            push(prepare_push(RunDirectory("runs/support"), *arguments))
        else:
            pull(*arguments, output=Path("out"))
    except LmtuneError as error:
        told[name] = [error.exit_code, str(error)]
print(json.dumps(told))
"""
WRONG = "hf_" + "w" * 30
ANSWERS = {
    "unknown": (["pull", TOKEN, "me/suport"], 2, r"no repository me/suport to be seen with your token"),
    "private": (["pull", "", "me/private"], 2, r"no repository me/private .* without a token.*hf auth login"),
    "revision": (["pull", TOKEN, "me/good", "v9"], 2, r"me/good has no revision v9; give a branch, tag or commit"),
    "gated": (["pull", TOKEN, "lab/gated"], 2, r"lab/gated is gated: accept its conditions"),
    "bad token": (["pull", WRONG, "me/good"], 1, r"does not accept your token.*hf auth login"),
    "pickled": (["pull", TOKEN, "me/pickled"], 2, r"pickled weights \(adapter_model.bin\).*safetensors"),
    "damaged": (["pull", TOKEN, "lab/damaged"], 2, r"lab/damaged: .*model.safetensors: empty; download it again"),
    "pickled model": (["pull", TOKEN, "lab/whole"], 2, r"pickled weights \(pytorch_model.bin\).*safetensors"),
    "gguf": (["pull", TOKEN, "lab/gguf"], 2, r"GGUF files.*`hf download lab/gguf a-q8_0.gguf .*lmtune chat models/a-q"),
    "empty": (["pull", TOKEN, "me/empty"], 2, r"no adapter_model.safetensors and no adapter_config.json"),
    "unsafe": (["pull", TOKEN, "me/unsafe"], 2, r"me/unsafe: .*auto_mapping: not a setting"),
    "no token": (["push", "", "me/support"], 1, r"without a Hub token: log in with `hf auth login`, or set HF_TOKEN"),
    "not mine": (["push", TOKEN, "lab/support"], 1, r"your token may not do that.*you must be lab or a member"),
    "push broken": (["push", TOKEN, "me/broken"], 1, r"cannot upload to me/broken: the Hub answered 500"),
}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What each case of ANSWERS says; all in one process, since importing the client is the slow part."""
    folder = tmp_path_factory.mktemp("answers")
    run = write_run(folder / "runs" / "support")
    good = {name: (run.adapter / name).read_bytes() for name in UPLOADED}
    unsafe = {**json.loads(good["adapter_config.json"]), "auto_mapping": {"parent_library": "os"}}
    with HubServer() as hub:
        hub.add("me/good", good)
        hub.add("me/private", good, private=True)
        hub.add("lab/gated", good, gated=True)
        pickled = {name: content for name, content in good.items() if name != "adapter_model.safetensors"}
        hub.add("me/pickled", {**pickled, "adapter_model.bin": b"\x80\x04."})
        hub.add("lab/damaged", {"config.json": b"{}", "model.safetensors": b""})
        hub.add("lab/whole", {"config.json": b"{}", "pytorch_model.bin": b"\x80\x04."})
        hub.add("lab/gguf", {"a-q8_0.gguf": b"GGUF", "README.md": b""})
        hub.add("me/empty", {"README.md": b""})
        hub.add("me/unsafe", {**good, "adapter_config.json": json.dumps(unsafe).encode()})
        hub.broken["me/broken"] = 500
        cases = json.dumps([[name, *case] for name, (case, _, _) in ANSWERS.items()])
        env = {**os.environ, **hub.environment, "HF_HOME": str(folder / "hf")}
        command = [sys.executable, "-c", CASES, cases]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not (folder / "out").exists()
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("name", ANSWERS)
def test_refusals_say_what_to_do(told: dict[str, list[Any]], name: str) -> None:
    _, exit_code, message = ANSWERS[name]
    assert name in told, "nothing was refused"
    assert told[name][0] == exit_code
    assert re.search(message, told[name][1], re.DOTALL), told[name][1]
    assert TOKEN not in told[name][1]
    assert WRONG not in told[name][1]


def test_unreachable_and_offline(hub: HubServer, tmp_path: Path) -> None:
    done = lmtune(hub, tmp_path, "pull", "me/support", HF_ENDPOINT="http://127.0.0.1:9")
    assert (done.returncode, "the Hub does not answer" in done.stderr) == (1, True), done.stderr
    done = lmtune(hub, tmp_path, "pull", "me/support", HF_HUB_OFFLINE="1")
    assert (done.returncode, "HF_HUB_OFFLINE is set" in done.stderr) == (1, True), done.stderr
    assert not (tmp_path / "adapters").exists()


def test_pull_leaves_an_existing_folder_alone_and_pickles_out(
    hub: HubServer, run: RunDirectory, tmp_path: Path
) -> None:
    _set(run.adapter / "adapter_config.json", base_model_name_or_path="/data/models/base")
    files = {name: (run.adapter / name).read_bytes() for name in UPLOADED}
    hub.add("me/both", {**files, "adapter_model.bin": b"\x80\x04.", "training_args.bin": b"\x80", "run.py": b"boom"})
    pulled = lmtune(hub, tmp_path, "pull", "me/both")
    assert pulled.returncode == 0
    assert "its base model is /data/models/base: a folder of its author" in " ".join(pulled.stderr.split())
    folder = tmp_path / "adapters" / "me--both"
    assert {path.name for path in folder.iterdir()} == UPLOADED
    again = lmtune(hub, tmp_path, "pull", "me/both")
    assert again.returncode == 2
    assert "is there already" in again.stderr
    assert {path.name for path in folder.iterdir()} == UPLOADED


# --- what may not leave this machine


def _append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def _set(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _setting(name: str, **values: Any) -> Callable[[Path], None]:
    return lambda adapter: _set(adapter / name, **values)


LEAKS = {
    "token": (
        lambda a: _append(a / "chat_template.jinja", f"{{# {TOKEN} #}}"), r"chat_template.jinja: holds your Hub token",
    ),
    "token in weights": (
        lambda a: save_file({"x": torch.zeros(1)}, a / "adapter_model.safetensors", metadata={"by": TOKEN}),
        r"adapter_model.safetensors: holds your Hub token",
    ),
    "other token": (
        _setting("lmtune.json", system="hf_" + "a1B2" * 8), r"lmtune.json: holds what looks like a Hub token",
    ),
    "home": (lambda a: _append(a / "chat_template.jinja", f"{Path.home()}/me"), r"path of your home folder"),
    "path": (
        _setting("tokenizer_config.json", name_or_path="/somewhere/models/base"),
        r"tokenizer_config.json: name_or_path is a path of this machine",
    ),
    "base": (
        _setting("adapter_config.json", base_model_name_or_path="/somewhere/models/base"),
        r"base_model_name_or_path is a path of this machine.*Hub id",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEAKS)
def test_private_things_are_not_uploaded(run: RunDirectory, name: str) -> None:
    spoil, message = LEAKS[name]
    prepare_push(run, "me/support")  # nothing is wrong yet
    spoil(run.adapter)
    with pytest.raises(ModelError, match=re.compile(message, re.DOTALL)) as caught:
        prepare_push(run, "me/support")
    assert TOKEN not in str(caught.value)


def test_links_and_missing_files_are_not_uploaded(run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (run.adapter / "chat_template.jinja").unlink()
    (run.adapter / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match=r"chat_template.jinja is a link"):
        prepare_push(run, "me/support")
    (run.adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no adapter_model.safetensors; finish the run"):
        prepare_push(run, "me/support")


def test_a_base_in_a_folder_and_an_unfinished_run_are_warned_of(
    run: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.config.write_text(run.config.read_text().replace("lab/base", "../models/base"))
    _set(run.summary, status="interrupted")
    upload = prepare_push(run, "me/support")
    told = " ".join(capsys.readouterr().err.split())
    assert "the base model base is a folder of yours" in told
    assert "is interrupted" in told
    assert "../models" not in upload.card
    assert "base_model" not in yaml.safe_load(upload.card.split("---")[1])


def test_repository_names() -> None:
    assert checked_repository("Me-2/a.b_c") == "Me-2/a.b_c"
    for name in ("support", "a/b/c", "../x", "me/x.git", "", "/a", "https://huggingface.co/me/support/"):
        with pytest.raises(ConfigError, match="user/name"):
            checked_repository(name)


# --- what is not taken from the Hub


FAULTS = {
    "config": (_setting("adapter_config.json", peft_type="PREFIX_TUNING"), r"peft_type: 'PREFIX_TUNING'; expect"),
    "metadata": (_setting("lmtune.json", quantization="fp1"), r"quantization: got 'fp1'; should be 'none', 'nf4'"),
    "tokenizer code": (_setting("tokenizer_config.json", auto_map={"AutoTokenizer": "x.Y"}), r"auto_map names code"),
    "pickle": (lambda a: (a / "adapter_model.safetensors").write_bytes(b"\x80\x04." * 99), r"pickled"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_faulty_adapters_are_refused(run: RunDirectory, name: str) -> None:
    check_adapter(run.adapter)
    spoil, message = FAULTS[name]
    spoil(run.adapter)
    with pytest.raises(ModelError, match=message):
        check_adapter(run.adapter)


def test_a_run_begins_from_an_adapter_of_the_hub_and_finds_it_again_offline(hub: HubServer, tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "support")
    write_base(tmp_path / "base")
    files = {name: (run.adapter / name).read_bytes() for name in UPLOADED}
    hub.add("me/adapter", {**files, "adapter_model.bin": b"\x80\x04."})
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    settings = ["data.train=rows.jsonl", "model.name=base", "model.quantization=none", "data.validation_fraction=0.0"]
    settings += ["train.max_steps=1", "run.name=second"]
    done = lmtune(hub, tmp_path, "finetune", *settings, "tuning.adapter=me/adapter")
    assert done.returncode == 0, done.stderr
    assert "from the adapter me/adapter, with its rank, alpha and layers" in done.stderr
    assert json.loads((tmp_path / "runs/second/summary.json").read_text())["started_from"] == "me/adapter"
    assert not list((tmp_path / "hf").rglob("*.bin"))
    for repository, said in (
        ("me/none", "tuning.adapter: there is no repository me/none"),
        ("runs/none", "tuning.adapter: runs/none: no such run or adapter folder"),
    ):
        done = lmtune(hub, tmp_path, "finetune", *settings, f"tuning.adapter={repository}", "run.name=third")
        assert done.returncode == 2, done.stderr
        assert said in " ".join(done.stderr.split())
    offline = lmtune(hub, tmp_path, "plan", *settings, "tuning.adapter=me/adapter", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert "LoRA r=4" in offline.stdout
