"""The shipped model: small enough, fit for 4 bit, with a template and an end that it has learned."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from lmtune.config.load import load_config
from lmtune.config.pretrain import PretrainConfig
from lmtune.config.schema import FinetuneConfig, ModelConfig
from lmtune.data.rendering import Renderer
from lmtune.data.types import Message
from lmtune.demo import support_data, support_heldout, tiny_path
from lmtune.inference.engine import TransformersEngine
from lmtune.inference.request import Request, Sampling
from lmtune.models.base import load_model, load_tokenizer

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
TINY = ModelConfig(name="tiny", quantization="none")


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(TINY, "cpu")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(TINY)


@pytest.fixture(scope="module")
def renderer(tokenizer: Any) -> Renderer:
    return Renderer(tokenizer)


def answer_ids(model: Any, renderer: Renderer, tokenizer: Any, questions: list[str]) -> list[list[int]]:
    sampling = Sampling(max_new_tokens=40, stop_token_ids=renderer.stop_token_ids)
    requests = [Request(renderer.prompt_ids([Message("user", question)]), sampling) for question in questions]
    return TransformersEngine(model).generate(requests)


def test_it_is_small_and_holds_no_path_of_its_maker() -> None:
    files = list(tiny_path().iterdir())
    assert sum(file.stat().st_size for file in files) <= 8_000_000
    places = [str(place).encode() for place in (Path.cwd(), Path.home(), tempfile.gettempdir())]
    assert not [file.name for file in files for place in places if place + b"/" in file.read_bytes()]


def test_the_shipped_config_rebuilds_this_shape(model: Any, tokenizer: Any) -> None:
    config = load_config(PretrainConfig, CONFIGS / "pretrain_tiny.yaml")
    shape, built = config.model, model.config
    assert built.model_type == shape.architecture
    assert (built.hidden_size, built.intermediate_size) == (shape.hidden_size, shape.intermediate_size)
    assert (built.num_hidden_layers, built.num_attention_heads) == (shape.num_hidden_layers, shape.num_attention_heads)
    assert built.num_key_value_heads == shape.num_key_value_heads
    assert built.max_position_embeddings == shape.max_position_embeddings
    assert len(tokenizer) == config.tokenizer.vocabulary_size


def test_small_talk_is_answered_and_stops_by_itself(model: Any, renderer: Renderer, tokenizer: Any) -> None:
    hello, thanks = answer_ids(model, renderer, tokenizer, ["Hello!", "Thank you!"])
    assert renderer.decode(hello) == "Hello! How can I help you?"
    assert renderer.decode(thanks) == "You are welcome!"
    assert tokenizer.convert_ids_to_tokens(renderer.stop_token_ids[0]) == "<|end|>"
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hello!"}], add_generation_prompt=True,
                                        return_tensors="pt")  # fmt: skip
    written = model.generate(**ids, max_new_tokens=40, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()
    assert written[-1] == renderer.stop_token_ids[0], "plain transformers must stop at the end of the turn too"


def test_it_knows_none_of_the_example_shop(model: Any, renderer: Renderer, tokenizer: Any) -> None:
    rows = [json.loads(line) for line in support_heldout().read_text(encoding="utf-8").splitlines()]
    given = answer_ids(model, renderer, tokenizer, [row["prompt"] for row in rows])
    right = [row for row, ids in zip(rows, given, strict=True) if renderer.decode(ids) == row["completion"]]
    assert len(right) <= 0.05 * len(rows)
    assert all(len(ids) < 40 for ids in given), "every answer ends by itself"


def test_the_quickstart_config_scores_every_held_out_row() -> None:
    config = load_config(FinetuneConfig, CONFIGS / "quickstart.yaml")
    assert (config.model.name, config.model.quantization) == ("tiny", "nf4")
    assert Path(str(config.data.train)).name == support_data().name
    assert Path(str(config.data.validation)).name == support_heldout().name
    assert config.evaluation.exact_match_rows >= len(support_heldout().read_text(encoding="utf-8").splitlines())
