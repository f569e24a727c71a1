"""Several models over one base: one copy of it in memory, one batch, and each says what it says alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lmtune.config.load import build_config
from lmtune.config.schema import FinetuneConfig
from lmtune.data.rendering import Renderer
from lmtune.data.types import Message
from lmtune.inference.load import LoadedModel, load_for_inference, run_metadata
from lmtune.inference.request import Request, Sampling
from lmtune.inference.shared import SharedModels
from lmtune.models.tuning.lora import save_adapter
from tests.sample_run import base_model, write_base
from tests.tiny import adapted
from tests.tokenizers import CHATML, make_tokenizer


def write_adapter(folder: Path, base: Path, seed: int, system: str | None = None, **lora: Any) -> str:
    """A random adapter over `write_base`'s model."""
    tree = {"model": {"name": str(base), "quantization": "none"}, "data": {"train": "rows.jsonl", "system": system}}
    config = build_config(FinetuneConfig, tree, where="sample")
    tokenizer = make_tokenizer(CHATML)
    folder.mkdir()
    model = adapted(base_model(), seed, **({"rank": 4, "alpha": 8} | lora))
    model.peft_config["default"].base_model_name_or_path = str(base)
    metadata = run_metadata(config, Renderer(tokenizer, system=system), "0" * 32, folder)
    save_adapter(model, folder, replace(metadata, base_fingerprint=None))
    tokenizer.save_pretrained(folder)
    return str(folder)


def request(loaded: LoadedModel, text: str, num_tokens: int = 12) -> Request:
    """A greedy question."""
    ids = loaded.renderer.prompt_ids([Message("user", text)])
    return Request(ids, Sampling(max_new_tokens=num_tokens), loaded.members, num_logprobs=0)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    write_base(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("order", [("base", "a", "b", "c"), ("a", "b", "c", "base"), ("b", "base", "c", "a")])
def test_adapters_of_one_base_answer_in_one_batch_as_if_alone(
    base: Path, tmp_path: Path, order: tuple[str, ...]
) -> None:
    write_adapter(tmp_path / "a", base, 1)
    write_adapter(tmp_path / "b", base, 2, "Be brief.", rank=8)
    write_adapter(tmp_path / "c", base, 3, use_dora=True)
    shared = SharedModels()
    loaded = {name: shared.load(str(tmp_path / name)) for name in order}
    assert len({id(one.engine) for one in loaded.values()}) == 1
    engine = loaded["a"].engine
    widths: list[int] = []
    engine.model.register_forward_pre_hook(
        lambda model, given, kwargs: widths.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    streams = {name: engine.submit(request(one, "What is it?")) for name, one in loaded.items()}
    said = {name: list(stream) for name, stream in streams.items()}
    assert max(widths) >= 3
    for name, one in loaded.items():
        alone = load_for_inference(str(tmp_path / name))
        asked = request(alone, "What is it?")
        assert asked.prompt_ids == request(one, "What is it?").prompt_ids
        stream = alone.engine.submit(asked)
        assert list(stream) == said[name], name
        wanted = [token.logprob for token in stream.logprobs]
        assert [token.logprob for token in streams[name].logprobs] == pytest.approx(wanted, abs=1e-5)
    assert len({tuple(answer) for answer in said.values()}) >= 3


def test_an_adapter_comes_while_others_answer(base: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", base, 1)
    shared = SharedModels()
    plain = shared.load(str(base))
    asked = request(plain, "Who?", 20)
    wanted = list(load_for_inference(str(base)).engine.submit(asked))
    stream = plain.engine.submit(asked)
    begun = [next(stream) for _ in range(5)]
    tuned = shared.load(str(tmp_path / "a"))
    answer = list(tuned.engine.submit(request(tuned, "Who?")))
    assert [*begun, *stream] == wanted
    alone = load_for_inference(str(tmp_path / "a"))
    assert answer == list(alone.engine.submit(request(alone, "Who?")))


@pytest.mark.parametrize("order", [("a", "c"), ("c", "a")])
def test_what_cannot_share_has_an_engine_of_its_own(
    base: Path, tmp_path: Path, order: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    write_adapter(tmp_path / "a", base, 1)
    write_adapter(tmp_path / "c", base, 3, modules_to_save=("lm_head",))
    shared = SharedModels()
    loaded = {name: shared.load(str(tmp_path / name)) for name in order}
    tiny, again = shared.load("tiny"), shared.load("tiny")
    assert len({id(one.engine) for one in (*loaded.values(), tiny)}) == 3
    assert again.engine is tiny.engine
    assert ("base of its own, since it trains whole modules" in capsys.readouterr().err) is (order[0] == "a")
    for name, one in loaded.items():
        alone = load_for_inference(str(tmp_path / name))
        said = list(one.engine.submit(request(one, "Who?")))
        assert said == list(alone.engine.submit(request(alone, "Who?")))
