"""Adapters: what lmtune saves is what plain PEFT loads, and what does not fit the base is an error, not a warning."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

from lmtune.config.schema import LoraConfig, ModelConfig
from lmtune.errors import ConfigError, ModelError
from lmtune.kernels.lora_linear import fuse
from lmtune.models.base import load_model
from lmtune.models.tuning.adapter_files import Metadata
from lmtune.models.tuning.base import TunedModel, trainable
from lmtune.models.tuning.lora import Lora, attach_adapter, load_adapter, save_adapter
from lmtune.models.tuning.targets import find_targets
from tests.tiny import VOCABULARY, save_tiny, tiny_model

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dropout": {"dropout": 0.5},
    "fractional alpha": {"alpha": 6.5},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa with rslora": {"init_lora_weights": "pissa", "use_rslora": True},
    "a list of targets": {"target_modules": ("q_proj", "down_proj")},
    "a regular expression": {"target_modules": r".*\.(q|v)_proj"},
}
IDS = torch.arange(3, 35).view(2, 16)


def settings(**changes: Any) -> LoraConfig:
    """A small adapter."""
    return LoraConfig(**{"rank": 4, "alpha": 8, **changes})


def attached(seed: int = 1, base: Any = None, **changes: Any) -> Any:
    """A tiny model with a new adapter, in evaluation mode."""
    return attach_adapter(base or tiny_model(), settings(**changes), seed, "lab/base").eval()


def learn(model: Any, steps: int = 2) -> Any:
    """A few steps of plain gradient descent on the adapter; back in evaluation mode."""
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.5)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(input_ids=IDS).logits
        torch.nn.functional.cross_entropy(logits.view(-1, VOCABULARY), IDS.flip(1).reshape(-1)).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """`[2, 16, V]` in evaluation mode."""
    return model(input_ids=IDS).logits


def saved(model: Any, folder: Path, fingerprint: str | None = None) -> Path:
    """The adapter's folder."""
    folder.mkdir()
    save_adapter(model, folder, Metadata(base_fingerprint=fingerprint))
    return folder


@pytest.mark.parametrize("kind", VARIANTS)
def test_a_new_adapter_changes_nothing_and_a_trained_one_is_loaded_key_by_key(tmp_path: Path, kind: str) -> None:
    """By plain PEFT, without a word of warning, and by us."""
    before = logits(tiny_model())
    model = attached(**VARIANTS[kind])
    torch.testing.assert_close(logits(model), before, atol=2e-5, rtol=1e-5)
    wanted = logits(learn(model))
    assert (wanted - before).abs().max() > 1e-2
    folder = saved(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        plain = PeftModel.from_pretrained(tiny_model(), folder).eval()
    stored = load_file(folder / "adapter_model.safetensors")
    read = get_peft_model_state_dict(plain, save_embedding_layers=False)
    assert read.keys() == stored.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in stored.items())
    again = load_adapter(tiny_model(), folder)
    assert not again.training
    assert not trainable(again)
    for loaded in (plain, again):  # PiSSA's adapter is written as a difference from the start, for the original base
        torch.testing.assert_close(logits(loaded), wanted, atol=2e-5 if "pissa" in kind else 1e-6, rtol=1e-5)


def test_equal_seeds_give_equal_adapters_whatever_was_drawn_before() -> None:
    first = trainable(attached(seed=5))
    torch.rand(17)
    state = torch.get_rng_state()
    second = trainable(attached(seed=5))
    other = trainable(attached(seed=6))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    base = tiny_model()  # seeds torch itself
    torch.set_rng_state(state)
    attached(5, base)
    assert torch.equal(torch.get_rng_state(), state), "attaching an adapter must not touch the caller's random numbers"


def test_the_adapter_is_fp32_over_a_16_bit_base() -> None:
    model = attached(base=tiny_model().to(torch.bfloat16))
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.float32}


def test_the_config_is_sorted_and_names_no_path_of_this_machine(tmp_path: Path) -> None:
    config = json.loads((saved(attached(), tmp_path / "one") / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (4, 8, "CAUSAL_LM")
    assert (config["base_model_name_or_path"], config["inference_mode"]) == ("lab/base", True)
    for path in (tmp_path / "one").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()
        assert str(Path.home()).encode() + b"/" not in path.read_bytes()


# --- target modules


@pytest.mark.parametrize(
    ("targets", "unknown"),
    [
        (("q_proj", "qq_proj", "vv_proj"), "qq_proj, vv_proj"),
        (("embed_tokens",), "embed_tokens"),
        ("q_proj, qq_proj", "qq_proj"),
        (r"q_pro.", "q_pro."),  # a regular expression has to match the whole name
    ],
)
def test_a_target_that_matches_nothing_lists_what_exists(targets: Any, unknown: str) -> None:
    with pytest.raises(ConfigError) as caught:
        attached(target_modules=targets)
    assert f"tuning.target_modules: nothing in this model is named {unknown}; " in str(caught.value)
    assert "down_proj, gate_proj, k_proj, " in str(caught.value)
    assert "v_proj" in str(caught.value)


def test_targets_name_layers_by_last_part_or_in_full() -> None:
    found = find_targets(tiny_model(), ("self_attn.q_proj",))
    assert found.modules == ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
    model = attached(target_modules=("model.layers.1.mlp.up_proj",))
    assert {name.split(".lora")[0] for name in trainable(model)} == {"base_model.model.model.layers.1.mlp.up_proj"}


@pytest.mark.parametrize("targets", ["model.layers.0.self_attn.q_proj", "q_proj , up_proj"])
def test_a_text_without_a_character_of_regular_expressions_is_a_list_of_names(targets: str) -> None:
    wanted = tuple(name.strip() for name in targets.split(","))
    assert settings(target_modules=targets).target_modules == wanted


def test_gpt2s_own_kind_of_linear_layer_can_be_named() -> None:
    model = attach_adapter(tiny_model("gpt2"), settings(target_modules=("c_attn",)), 1, "lab/gpt2")
    assert {name.split(".")[-4] for name in trainable(model)} == {"c_attn"}


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_new_dora_magnitudes_leave_the_base_as_it_is_in_16_bit(quantization: str, tmp_path: Path) -> None:
    config = ModelConfig(name=str(save_tiny(tmp_path / "base")), quantization=quantization, dtype="bfloat16")
    plain, dora = (attached(base=load_model(config, "cpu"), use_dora=use_dora) for use_dora in (False, True))
    for model in (plain, dora):
        fuse(model)
    for _ in range(2):  # PEFT moves int8 weights away in the first pass
        torch.testing.assert_close(logits(dora), logits(plain), atol=0.02, rtol=0.02)


def test_an_adapter_of_another_base_of_the_same_shape_is_refused_by_its_fingerprint(tmp_path: Path) -> None:
    folder = saved(attached(), tmp_path / "adapter", "a" * 32)
    with pytest.raises(ModelError, match="trained over another base model"):
        load_adapter(tiny_model(), folder, fingerprint="b" * 32)
    load_adapter(tiny_model(), folder, fingerprint="a" * 32)
    (folder / "lmtune.json").unlink()  # as of another tool
    load_adapter(tiny_model(), folder, fingerprint="b" * 32)


def test_plain_pefts_own_adapter_loads(tmp_path: Path) -> None:
    model = learn(attached())
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    again = load_adapter(tiny_model(), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), logits(model), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("init", "use_dora"), [("default", False), ("default", True), ("pissa", False)])
def test_a_process_with_the_first_ones_weights_computes_what_that_one_does(init: str, use_dora: bool) -> None:
    """Whatever its own hardware made of the adapter, and of the base where PiSSA took the adapter from it."""
    tuning = Lora(settings(init_lora_weights=init, use_dora=use_dora))
    first, other = (tuning.apply(tiny_model(), 0, "x").module for _ in range(2))
    with torch.no_grad():
        for module in other.modules():
            if hasattr(module, "lora_A"):  # another sign of each singular vector, and rounding
                module.lora_A["default"].weight.mul_(-1).add_(1e-3)
                module.lora_B["default"].weight.mul_(-1).add_(1e-3)
                module.get_base_layer().weight.add_(1e-3 * (init == "pissa"))
        assert not torch.equal(first(IDS).logits, other(IDS).logits)
        for given, own in zip(*(tuning.initial_tensors(TunedModel(model)) for model in (first, other)), strict=True):
            own.copy_(given)
        assert torch.equal(first(IDS).logits, other(IDS).logits)
    if init == "pissa":
        starts = zip(first.lmtune_initial_adapter.values(), other.lmtune_initial_adapter.values(), strict=True)
        assert all(torch.equal(one, two) for one, two in starts)
