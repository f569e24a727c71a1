"""A model ready to answer, from a run, an adapter, a merged or plain folder: as it was trained, in every respect."""

import shutil
from pathlib import Path

import pytest
import torch

from lmtune.config.load import build_config, dump_config
from lmtune.config.schema import FinetuneConfig
from lmtune.data.types import Message
from lmtune.errors import ModelError
from lmtune.inference.load import (
    adapter_base,
    build_renderer,
    generation_stop_tokens,
    load_for_inference,
    run_metadata,
    shareable_name,
)
from lmtune.models.base import base_fingerprint, load_model, load_tokenizer
from lmtune.models.tuning.lora import save_adapter
from lmtune.runs.store import RunDirectory
from tests.tiny import adapted, save_tiny
from tests.tokenizers import CHATML

IDS = torch.arange(5, 29)[None]
QUESTION = [Message("user", "What is the capital of France?")]


def config_of(base: str, quantization: str = "none", **data: str) -> FinetuneConfig:
    """A run's settings."""
    tree = {
        "model": {"name": base, "quantization": quantization}, "data": {"train": "rows.jsonl", **data},
        "run": {"name": "trial"},
    }  # fmt: skip
    return build_config(FinetuneConfig, tree, "test")


@torch.no_grad()
def logits(model) -> torch.Tensor:
    """`[24, V]`."""
    return model(input_ids=IDS).logits[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model `base` and a run `runs/trial` of it, trained in nf4 with a system prompt."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        save_tiny(folder / "base", chat_template=CHATML)
        config = config_of("base", "nf4", system="Be brief.")
        run = RunDirectory("runs/trial")
        run.adapter.mkdir(parents=True)
        run.config.write_text(dump_config(config))
        model, tokenizer = adapted(load_model(config.model, "cpu")), load_tokenizer(config.model)
        renderer = build_renderer(tokenizer, config.model, system="Be brief.")
        save_adapter(model, run.adapter, run_metadata(config, renderer, base_fingerprint(config.model)))
        tokenizer.save_pretrained(run.adapter)
        torch.save(logits(model.eval()), folder / "wanted")
    return folder


@pytest.fixture
def there(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, as the current folder."""
    monkeypatch.chdir(place)
    return place


@pytest.mark.parametrize("target", ["trial", "runs/trial", "runs/trial/adapter"])
def test_a_run_its_name_and_its_adapter_folder_give_the_trained_model(there: Path, target: str) -> None:
    loaded = load_for_inference(target)
    assert loaded.has_adapter
    assert torch.equal(logits(loaded.model), torch.load(there / "wanted"))
    assert loaded.system == "Be brief."
    assert type(loaded.model.get_base_model().model.layers[0].mlp.up_proj.base_layer).__name__ == "Linear4bit"
    assert not loaded.model.training
    assert loaded.renderer.stop_token_ids == (4, 1)  # <|im_end|>, </s>
    assert loaded.tokenizer.decode(loaded.renderer.prompt_ids(QUESTION)).startswith("<|im_start|>system\nBe brief.")


def test_the_base_is_there_without_the_adapter_and_the_adapter_is_back_afterwards(there: Path) -> None:
    loaded, plain = load_for_inference("trial"), load_for_inference("base", quantization="nf4")
    assert not plain.has_adapter
    with loaded.use_base():
        assert torch.equal(logits(loaded.model), logits(plain.model))
    assert torch.equal(logits(loaded.model), torch.load(there / "wanted"))
    with plain.use_base():
        assert torch.equal(logits(plain.model), logits(plain.model))


def test_an_adapter_of_another_tool_is_loaded_over_the_base_that_it_names(there: Path, tmp_path: Path) -> None:
    folder = tmp_path / "foreign"
    shutil.copytree(there / "runs/trial/adapter", folder)
    (folder / "lmtune.json").unlink()
    text = (folder / "adapter_config.json").read_text().replace('"tiny-random"', '"base"')
    (folder / "adapter_config.json").write_text(text)
    assert adapter_base(folder).name == "base"
    assert adapter_base(folder, "int8").quantization == "int8"
    assert load_for_inference(str(folder)).has_adapter


# --- what cannot be loaded


def test_a_model_of_the_hub_is_not_a_misspelt_run(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="check the spelling"):
        load_for_inference("lab/trail")
    with pytest.raises(ModelError, match="quantity: no such run, folder or model; there "):
        load_for_inference("quantity")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: "there")  # in the local cache
    with pytest.raises(ModelError, match="trail: no such run, folder or model; did you mean trial"):
        load_for_inference("trail")


# --- small parts


def test_the_stop_tokens_of_the_generation_config_count(there: Path, tmp_path: Path) -> None:
    from transformers import GenerationConfig

    folder = save_tiny(tmp_path / "model", chat_template=CHATML)
    model = config_of(str(folder)).model
    GenerationConfig(eos_token_id=[7, 9]).save_pretrained(folder)
    assert generation_stop_tokens(model) == (7, 9)
    assert build_renderer(load_tokenizer(model), model).stop_token_ids == (4, 1, 7, 9)
    GenerationConfig(eos_token_id=7).save_pretrained(folder)
    assert generation_stop_tokens(model) == (7,)
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text("{}")
    assert generation_stop_tokens(model) == ()


def test_the_name_in_shared_files_leads_nowhere_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "models").mkdir(parents=True)
    (tmp_path / "here" / "tiny").mkdir()
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert shareable_name("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert shareable_name("tiny") == "tiny"
    assert shareable_name(str(tmp_path / "here" / "models")) == "./models"
    assert shareable_name(str(tmp_path / "other")) == shareable_name("../other") == "../other"


@pytest.mark.parametrize(
    ("target", "hint"),
    [
        ("runs/trail", "did you mean runs/trial"), ("rums/trial", "did you mean runs/trial"), ("runs/else", "trial"),
    ],
)  # fmt: skip
def test_a_mistyped_run_is_not_looked_for_on_the_hub(
    place: Path, monkeypatch: pytest.MonkeyPatch, target: str, hint: str
) -> None:
    monkeypatch.chdir(place)
    with pytest.raises(ModelError, match=hint):
        load_for_inference(target)
