"""Loading: the same call for every quantization, safetensors only, no code from a model's folder, errors that help."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmtune.config.schema import LoraConfig, ModelConfig
from lmtune.errors import ModelError
from lmtune.models import base as base_module
from lmtune.models.base import load_model, load_tokenizer, stored_dtype, weight_files
from lmtune.models.tuning.adapter_files import Metadata
from lmtune.models.tuning.lora import attach_adapter, save_adapter
from tests.tiny import adapted, save_tiny
from tests.tokenizers import CHATML

IDS = torch.arange(5, 29)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder."""
    return save_tiny(tmp_path_factory.mktemp("models") / "base", chat_template=CHATML)


def config_of(folder: Path | str, quantization: str = "none", **changes: str) -> ModelConfig:
    """Settings that name this folder."""
    return ModelConfig(name=str(folder), quantization=quantization, **changes)  # type: ignore[arg-type]


@torch.no_grad()
def logits(model) -> torch.Tensor:
    """`[24, V]`."""
    return model(input_ids=IDS).logits[0]


@pytest.mark.parametrize(("quantization", "tolerance"), [("none", 0.0), ("int8", 0.1), ("nf4", 0.5)])
def test_every_quantization_loads_frozen_and_computes_on_the_cpu(
    base: Path, quantization: str, tolerance: float
) -> None:
    model = load_model(config_of(base, quantization), "cpu")
    plain = logits(load_model(config_of(base), "cpu"))
    assert not [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert not model.training
    assert model.dtype == torch.float32
    found = logits(model)
    assert torch.isfinite(found).all()
    difference = float((found - plain).abs().max() / plain.abs().max())
    assert difference <= tolerance
    assert (difference == 0) is (quantization == "none")


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_quantized_model_gives_the_same_with_and_without_gradients(base: Path, quantization: str) -> None:
    """bitsandbytes repacks 4-bit layers on some CPUs at their first forward without gradients, and rounds more."""
    model = load_model(config_of(base, quantization), "cpu")
    with torch.enable_grad():
        before = model(input_ids=IDS).logits[0].detach()
    assert torch.equal(logits(model), before)
    with torch.enable_grad():
        assert torch.equal(model(input_ids=IDS).logits[0].detach(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_stored_dtype_is_that_of_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = save_tiny(tmp_path / "model", dtype=dtype)
    assert stored_dtype(config_of(folder)) == dtype
    assert load_model(config_of(folder), "cpu").dtype == torch.float32
    assert load_model(config_of(folder, dtype="bfloat16"), "cpu").dtype == torch.bfloat16


def test_a_sharded_model_names_all_its_files(tmp_path: Path) -> None:
    from tests.tiny import tiny_model

    tiny_model().save_pretrained(tmp_path, max_shard_size="100KB")
    files = weight_files(config_of(tmp_path))
    assert len(files) > 1
    assert files == sorted(tmp_path.glob("model-*.safetensors"))
    load_model(config_of(tmp_path), "cpu")


# --- what cannot be loaded


def error_of(config: ModelConfig) -> str:
    """The one message that both loaders give."""
    with pytest.raises(ModelError) as caught:
        load_model(config, "cpu")
    return str(caught.value)


def test_a_hub_id_that_cannot_be_reached_says_what_to_check() -> None:
    for load in (load_model, load_tokenizer):
        with pytest.raises(ModelError) as caught:
            load(config_of("nobody/no-such-model"))
        text = str(caught.value)
        assert "model.name: cannot load the " in text
        assert "of nobody/no-such-model" in text
        assert "check the spelling (user/name) and the network" in text


@pytest.fixture
def downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model user/name in the Hub's cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--user--name"
    folder = save_tiny(repository / "snapshots" / "4d7a")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("4d7a")
    return folder


def test_damaged_weights_in_the_hubs_cache(downloaded: Path) -> None:
    load_model(config_of("user/name"), "cpu")
    (downloaded / "model.safetensors").write_bytes(b"<html>Sign in to this network</html>")
    text = error_of(config_of("user/name"))
    assert text.startswith("model.name: user/name: model.safetensors: a web page; expected weights; download")


def test_codes_in_the_hubs_cache_are_no_weights(downloaded: Path) -> None:
    state = load_file(downloaded / "model.safetensors")
    save_file({name: weight.to(torch.int8) for name, weight in state.items()}, downloaded / "model.safetensors")
    assert "I8 weights, and config.json has no quantization_config" in error_of(config_of("user/name"))


@pytest.mark.parametrize("places", [{}, {"weight_map": 3}, {"weight_map": {"a": "../sub/x.safetensors"}}])
def test_an_index_that_names_no_files_beside_it(tmp_path: Path, places: dict[str, object]) -> None:
    folder = save_tiny(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(places))
    assert "no weight_map from weights to files beside it" in error_of(config_of(folder))


@pytest.mark.parametrize(("quantization", "tied"), [("none", True), ("int8", False), ("nf4", False)])
def test_weights_that_are_missing_are_never_made_up(tmp_path: Path, quantization: str, tied: bool) -> None:
    """transformers fills them with random numbers and a warning."""
    folder = save_tiny(tmp_path / "model", tie_word_embeddings=tied)
    load_model(config_of(folder, quantization), "cpu")
    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"], state["model.norm.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    text = error_of(config_of(folder, quantization))
    assert f"model.name: {folder}: weights are missing that config.json asks for" in text
    assert "model.layers.1.mlp.up_proj.weight" in text
    assert "model.norm.weight" in text


def test_weights_that_the_config_has_no_place_for_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Such as the last layers, where the config is that of a smaller model; other files have parts for other uses."""
    folder = save_tiny(tmp_path / "model")
    load_model(config_of(folder), "cpu")
    assert capsys.readouterr().err == ""
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**tree, "num_hidden_layers": 1}))
    load_model(config_of(folder), "cpu")
    said = " ".join(capsys.readouterr().err.split())
    assert f"model.name: {folder}: 9 weights are not used, such as model.layers.1." in said


@pytest.mark.parametrize(("stored", "asked"), [("nf4", "none"), ("int8", "nf4"), ("nf4", "nf4")])
def test_a_base_that_is_stored_quantized_stays_so_and_it_is_said(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stored: str, asked: str
) -> None:
    load_model(config_of(base, stored), "cpu").save_pretrained(tmp_path)
    capsys.readouterr()
    load_model(config_of(tmp_path, asked), "cpu")
    said = " ".join(capsys.readouterr().err.split())
    overruled = f"model.quantization: {asked} is overruled: {tmp_path} is stored in {stored}"
    assert (overruled in said) is (stored != asked)


def test_an_adapter_beside_a_model_on_the_hub_is_not_loaded_unnoticed(downloaded: Path, tmp_path: Path) -> None:
    """transformers would load the base that the adapter names, and put the adapter on it."""
    other = save_tiny(tmp_path / "other", seed=5)
    metadata = Metadata(base_model=str(other))
    save_adapter(adapted(load_model(config_of(other), "cpu")), downloaded, metadata)
    tree = json.loads((downloaded / "adapter_config.json").read_text())
    (downloaded / "adapter_config.json").write_text(json.dumps({**tree, "base_model_name_or_path": str(other)}))
    assert "adapter_config.json beside the model" in error_of(config_of("user/name"))


@pytest.mark.parametrize("model_type", ["llama", "of-its-own"])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_code_in_a_models_folder_never_runs(tmp_path: Path, model_type: str, quantization: str) -> None:
    """Whether transformers knows the architecture (then its own class is used) or not (then it is an error)."""
    folder = save_tiny(tmp_path / "model")
    marker = tmp_path / "it-ran"
    code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
    code += "from transformers import LlamaConfig as C, LlamaForCausalLM as M, PreTrainedTokenizerFast as T\n"
    (folder / "modeling.py").write_text(code)
    tree = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "modeling.C", "AutoModelForCausalLM": "modeling.M"}
    (folder / "config.json").write_text(json.dumps({**tree, "model_type": model_type, "auto_map": auto}))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer = {**tokenizer, "tokenizer_class": "T", "auto_map": {"AutoTokenizer": [None, "modeling.T"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    if model_type == "llama":
        load_model(config_of(folder, quantization), "cpu")
    else:
        text = error_of(config_of(folder, quantization))
        assert "this model needs code from its repository, which lmtune never runs" in text
        with pytest.raises(ModelError):
            load_tokenizer(config_of(folder))
    assert not marker.exists()


# --- bitsandbytes that is not there, or does not work


def without_bitsandbytes(patch: pytest.MonkeyPatch, folder: Path, fault: str | None) -> None:
    """As if bitsandbytes were not installed, or failed with `fault` when it is imported."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
        patch.delitem(sys.modules, name)
    if fault is None:
        patch.setitem(sys.modules, "bitsandbytes", None)
        return
    (folder / "bitsandbytes").mkdir()
    (folder / "bitsandbytes" / "__init__.py").write_text(fault)
    patch.syspath_prepend(str(folder))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (None, "is not installed; `pip install bitsandbytes`, or set model.quantization=none"),
        ("raise RuntimeError('no such\\nlibrary')", "cannot be imported (RuntimeError: no such library); `pip install"),
        ("import not_there_at_all", "cannot be imported (ModuleNotFoundError: No module named 'not_there_at_all'); "),
    ],
)
def test_bitsandbytes_that_cannot_be_imported(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str | None, said: str
) -> None:
    """A broken one breaks PEFT too, also over a base that is not quantized."""
    without_bitsandbytes(monkeypatch, tmp_path, fault)
    assert f"model.quantization: nf4: bitsandbytes {said}" in error_of(config_of(base, "nf4"))
    model = load_model(config_of(base), "cpu")
    if fault is not None:
        with pytest.raises(ModelError, match=r"bitsandbytes cannot be imported .*, or remove it"):
            attach_adapter(model, LoraConfig(), 0, "base")


def test_what_bitsandbytes_refuses_names_the_setting(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device that it has no code for."""

    def refuse(*args: object) -> None:
        raise RuntimeError("Attempted to use bitsandbytes native library functionality but it's not available.")

    monkeypatch.setattr(base_module, "_from_pretrained", refuse)
    assert "see `lmtune doctor`, or set model.quantization=none" in error_of(config_of(base, "nf4"))


# --- the quantized base is kept for the next start


@pytest.fixture
def kept_from_any_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Small models go through the cache too; returns the folder of its entries."""
    monkeypatch.setattr(base_module, "_CACHED_FROM_BYTES", 0)
    monkeypatch.setenv("LMTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "quantized"


def entries(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("??/*/manifest.json"))


def test_a_base_in_4_bit_is_quantized_once(
    tmp_path: Path, kept_from_any_size: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(save_tiny(tmp_path / "model", num_hidden_layers=3), "nf4")
    first = load_model(config, "cpu")
    assert len(entries(kept_from_any_size)) == 1
    asked = []
    monkeypatch.setattr(
        base_module, "_quantization", lambda *a, real=base_module._quantization: asked.append(a) or real(*a)
    )
    real = base_module._from_pretrained
    monkeypatch.setattr(base_module, "_from_pretrained", lambda path, *rest: asked.append(path) or real(path, *rest))
    second = load_model(config, "cpu")
    assert [path for path in asked if isinstance(path, str)] == [str(entries(kept_from_any_size)[0])]
    states = [model.state_dict() for model in (first, second)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    ids = torch.arange(3, 30)[None]
    assert torch.equal(first(ids).logits, second(ids).logits)
    assert second.config._name_or_path == first.config._name_or_path
    assert not any(parameter.requires_grad for parameter in second.parameters())


def test_changed_weights_or_config_are_quantized_anew(tmp_path: Path, kept_from_any_size: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    load_model(config_of(folder, "nf4"), "cpu")
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**tree, "rms_norm_eps": 0.1}))
    assert load_model(config_of(folder, "nf4"), "cpu").config.rms_norm_eps == 0.1
    save_tiny(folder, seed=3)
    load_model(config_of(folder, "nf4"), "cpu")
    assert len(entries(kept_from_any_size)) == 3
    save_tiny(folder, seed=4)
    load_model(config_of(folder, "nf4"), "cpu")
    assert len(entries(kept_from_any_size)) == 3  # the oldest went


def test_weights_written_again_are_quantized_anew_though_their_samples_are_equal(
    tmp_path: Path, kept_from_any_size: Path
) -> None:
    """The fingerprint reads samples of a file, so that it is quick; a change between them must not be missed here."""
    folder = save_tiny(tmp_path / "model", vocab_size=40_000)
    before = load_model(config_of(folder, "nf4"), "cpu").model.norm.weight
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"] *= 3
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(load_model(config_of(folder, "nf4"), "cpu").model.norm.weight, before * 3)


def test_a_cache_that_cannot_be_written_is_said_and_does_without(
    tmp_path: Path, kept_from_any_size: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept_from_any_size.parent.write_text("a file")
    assert load_model(config_of(save_tiny(tmp_path / "model"), "nf4"), "cpu").is_quantized
    assert "the quantized base is not kept for the next start: the cache" in " ".join(capsys.readouterr().err.split())
