"""vLLM behind the server: the same tokens as from lmtune's own engine, adapters that come later, and its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import openai
import pytest

from lmtune.config.schema import ModelConfig
from lmtune.data.types import Message
from lmtune.errors import ConfigError, LmtuneError, ModelError
from lmtune.inference.chat_model import ChatModel
from lmtune.inference.load import LoadedModel
from lmtune.inference.request import Request, Sampling
from lmtune.inference.shared import SharedModels
from lmtune.models.head import Head
from lmtune.models.members import BASE, Members
from lmtune.models.tuning.adapter_files import Metadata
from lmtune.serve.vllm import models as vllm_models
from lmtune.serve.vllm.engine import VllmEngine
from lmtune.serve.vllm.models import Settings, VllmModels
from tests.sample_run import base_model, write_base
from tests.serve.api_server import serving
from tests.serve.test_serve_command import KEY, client_of, server
from tests.serve.vllm_stand_in import application_of
from tests.test_shared_models import write_adapter

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two adapters, and a program `vllm`."""
    folder = tmp_path_factory.mktemp("models")
    write_base(folder / "base")
    write_adapter(folder / "a", folder / "base", 1)
    write_adapter(folder / "b", folder / "base", 2, "Be brief.", rank=8)
    write_adapter(folder / "dora", folder / "base", 3, use_dora=True)
    (folder / "bin").mkdir()
    program = folder / "bin" / "vllm"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m tests.serve.vllm_stand_in "$@"\n')
    program.chmod(0o755)
    return folder


@dataclass
class Pair:
    """The same models by vLLM and by lmtune."""

    engine: VllmEngine
    by_vllm: dict[str, ChatModel]
    by_lmtune: dict[str, LoadedModel]
    can_load: Callable[[str], bool]


@pytest.fixture(scope="module")
def pair(folder: Path) -> Iterator[Pair]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_models, "find_vllm", lambda: str(folder / "bin" / "vllm"))
        targets = [str(folder / name) for name in ("a", "b", "base")]
        shared = SharedModels()
        with VllmModels.start(targets, Settings()) as models:
            by_vllm = {Path(target).name: models.load(target) for target in targets}
            by_lmtune = {Path(target).name: shared.load(target) for target in targets}
            yield Pair(models.engine, by_vllm, by_lmtune, models.can_load)


def question(model: ChatModel, sampling: Sampling, num_logprobs: int | None = None) -> Request:
    ids = model.renderer.prompt_ids([Message("user", "hello there")])
    return Request(
        ids, replace(sampling, stop_token_ids=tuple(model.renderer.stop_token_ids)), model.members, num_logprobs
    )


@pytest.mark.parametrize("name", ["a", "b", "base"])
@pytest.mark.parametrize("sampling", [Sampling(max_new_tokens=9), Sampling(0.8, 0.9, 9, 7, (), ((5, 3.0),))])
def test_both_engines_give_the_same_tokens(pair: Pair, name: str, sampling: Sampling) -> None:
    theirs = pair.by_vllm[name].engine.submit(question(pair.by_vllm[name], sampling, 3))
    ours = pair.by_lmtune[name].engine.submit(question(pair.by_lmtune[name], sampling, 3))
    assert list(theirs) == list(ours)
    assert theirs.finish_reason == ours.finish_reason
    assert [one.token for one in theirs.logprobs] == [one.token for one in ours.logprobs]
    assert [[token for token, _ in one.top] for one in theirs.logprobs] == [
        [token for token, _ in one.top] for one in ours.logprobs
    ]
    assert [one.logprob for one in theirs.logprobs] == pytest.approx([one.logprob for one in ours.logprobs], abs=1e-5)


def test_a_stop_token_ends_an_answer_and_is_not_part_of_it(pair: Pair) -> None:
    model = pair.by_vllm["a"]
    free = list(model.engine.submit(question(model, Sampling(max_new_tokens=9))))
    asked = question(model, Sampling(max_new_tokens=9), 0)
    stopped = model.engine.submit(replace(asked, sampling=replace(asked.sampling, stop_token_ids=(free[4],))))
    first = free.index(free[4])
    assert list(stopped) == free[:first]
    assert stopped.finish_reason == "stop"
    assert len(stopped.logprobs) == first


def test_both_engines_score_alike_and_answer_many(pair: Pair) -> None:
    ids = list(range(3, 40))
    theirs = pair.engine.score(ids, pair.by_vllm["b"].members, 2)
    ours = pair.by_lmtune["b"].engine.score(ids, pair.by_lmtune["b"].members, 2)
    assert [one.logprob for one in theirs] == pytest.approx([one.logprob for one in ours], abs=1e-5)
    assert [one.top[0][0] for one in theirs] == [one.top[0][0] for one in ours]
    asked = [question(pair.by_vllm[name], Sampling(max_new_tokens=5)) for name in ("a", "base", "b")]
    counted = list[int]()
    assert pair.engine.generate(asked, counted.append) == [list(pair.engine.submit(one)) for one in asked]
    assert sum(counted) == 3


def test_an_answer_is_cancelled_and_what_vllm_refuses_is_said(pair: Pair) -> None:
    model = pair.by_vllm["base"]
    answer = model.engine.submit(question(model, Sampling(0.0, 1.0, 5000)))
    next(answer)
    answer.cancel()
    end = time.monotonic() + 10
    while pair.engine._tasks and time.monotonic() < end:
        time.sleep(0.02)
    assert not pair.engine._tasks
    assert answer.finish_reason == "stopped"
    with pytest.raises(LmtuneError, match=r"vLLM: The model `nobody` does not exist"):
        list(pair.engine.submit(Request([5], members=Members(("nobody",)))))
    with pytest.raises(LmtuneError, match="an ensemble needs lmtune's own engine"):
        pair.engine.submit(Request([5], members=Members(("a", "b"))))


def test_the_key_is_asked_for(folder: Path) -> None:
    with serving(application_of(str(folder / "base"), "base", "right")) as url:
        with pytest.raises(LmtuneError, match="Unauthorized"):
            VllmEngine(url, "wrong", "base", 64)
        engine = VllmEngine(url, "right", "base", 64)
        assert len(engine.generate([Request([5], Sampling(max_new_tokens=3), Members((BASE,)))])[0]) == 3
        engine.close()


def test_a_run_over_another_base_is_not_offered(pair: Pair, folder: Path) -> None:
    write_base(folder / "changed")
    changed = base_model()
    changed.get_input_embeddings().weight.data.zero_()
    changed.save_pretrained(folder / "changed")
    write_adapter(folder / "other", folder / "changed", 4)
    assert pair.can_load(str(folder / "a"))
    assert not pair.can_load(str(folder / "other"))


def test_what_vllm_cannot_serve_is_refused_before_it_starts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_models, "find_vllm", lambda: "vllm-that-is-not-there")
    with pytest.raises(ModelError, match="DoRA"):
        VllmModels.start([str(folder / "dora")], Settings())
    with pytest.raises(ConfigError, match="another base"):
        VllmModels.start([str(folder / "a"), "tiny"], Settings())
    read = Metadata.read
    with monkeypatch.context() as patch:
        patch.setattr(Metadata, "read", lambda folder: replace(read(folder), head=Head("single_label", ("yes", "no"))))
        with pytest.raises(ConfigError, match="a: a classifier, which gives no answers"):
            VllmModels.start([str(folder / "a")], Settings())
    monkeypatch.setattr(vllm_models, "find_vllm", lambda: None)
    with pytest.raises(ConfigError, match="expected the program vllm on the path"):
        VllmModels.start([str(folder / "a")], Settings())


def test_the_words_that_start_it(folder: Path) -> None:
    base = ModelConfig(name=str(folder / "base"), quantization="nf4")
    words = vllm_models._command("vllm", base, [], Settings(arguments="--gpu-memory-utilization 0.5", has_jobs=True))
    assert words[:3] == ["vllm", "serve", str(folder / "base")]
    assert words[words.index("--max-lora-rank") + 1] == "16"
    assert words[-2:] == ["--gpu-memory-utilization", "0.5"]
    assert "--quantization" not in words
    with pytest.raises(ConfigError, match=r"--vllm-args: .*: No closing quotation"):
        vllm_models._command("vllm", base, [], Settings(arguments="--name 'x"))


@pytest.mark.slow
def test_serve_answers_with_vllm_and_ends_with_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    targets = [f"{name}={folder / name}" for name in ("a", "base")]
    asked = [{"role": "user", "content": "hello there"}]
    with server(tmp_path, *targets, "--engine", "vllm", "--no-jobs") as (process, url, _):
        client = client_of(url)
        assert [model.id for model in client.models.list()] == ["a", "base"]
        said = {
            name: client.chat.completions.create(model=name, messages=asked, temperature=0, max_tokens=8)  # type: ignore[arg-type]
            for name in ("a", "base")
        }
        texts = {name: one.choices[0].message.content for name, one in said.items()}
        assert texts["a"] != texts["base"]
        stream = client.chat.completions.create(
            model="a", messages=asked, temperature=0, max_tokens=8, stream=True  # type: ignore[arg-type]
        )  # fmt: skip
        assert "".join(one.choices[0].delta.content or "" for one in stream) == texts["a"]
        shared = SharedModels()
        loaded = shared.load(str(folder / "a"))
        answer = loaded.engine.submit(question(loaded, Sampling(max_new_tokens=8)))
        assert loaded.renderer.marked_text(list(answer)) == texts["a"]
        with pytest.raises(openai.BadRequestError, match="this model reads at most"):
            client.chat.completions.create(model="a", messages=[{"role": "user", "content": "hello " * 9000}])
        (child,) = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(child), signal.SIGKILL)
        assert process.wait(30) == 1
    log = (tmp_path / "server.log").read_text()
    assert "error: vLLM has ended (exit code -9); its last words:\nserve serve" in log
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"{url}/health", headers={"authorization": f"Bearer {KEY}"})
