"""Adapters over mixtures of experts: every linear layer and all experts, as `all-linear` promises; never the router."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from lmtune.config.schema import LoraConfig
from lmtune.errors import ConfigError
from lmtune.models.parameters import count_parameters
from lmtune.models.tuning.adapter_files import Metadata
from lmtune.models.tuning.base import trainable
from lmtune.models.tuning.lora import attach_adapter, load_adapter, save_adapter
from lmtune.models.tuning.targets import adapter_parameters, find_targets
from tests.architectures import architecture
from tests.tiny import EXPERT_KINDS, KINDS, VOCABULARY, adapted, tiny_model

IDS = torch.arange(3, 35).view(2, 16)


def settings(**changes: Any) -> LoraConfig:
    """A small adapter."""
    return LoraConfig(**{"rank": 4, "alpha": 8, **changes})


def adapted_names(model: Any) -> set[str]:
    """What has an adapter, without the model's prefix; the tensors of experts as `experts`."""
    names = (name.partition(".lora_")[0].removeprefix("base_model.model.model.layers.") for name in trainable(model))
    return {name.replace(".base_layer", "") for name in names}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """`[2, 16, V]`."""
    return model.eval()(input_ids=IDS).logits


@pytest.fixture(autouse=True)
def no_warning() -> Any:
    """What PEFT warns of is never so: each name is one that is there."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.simplefilter("error", UserWarning)
        yield


ATTENTION = {f"self_attn.{letter}_proj" for letter in "qkvo"}
ALL = {
    "qwen3_moe": {
        *(f"0.{name}" for name in ATTENTION), *(f"1.{name}" for name in ATTENTION), "0.mlp.gate_proj", "0.mlp.up_proj",
        "0.mlp.down_proj", "1.mlp.experts",
    },
    "qwen2_moe": {
        *(f"0.{name}" for name in ATTENTION), "0.mlp.experts", "0.mlp.shared_expert.gate_proj",
        "0.mlp.shared_expert.up_proj", "0.mlp.shared_expert.down_proj", "0.mlp.shared_expert_gate",
    },
    "gpt_oss": {*(f"0.{name}" for name in ATTENTION), "0.mlp.experts"},
}  # fmt: skip


@pytest.mark.parametrize("kind", EXPERT_KINDS)
def test_all_linear_is_every_linear_layer_and_all_experts_but_not_the_router(kind: str) -> None:
    model = adapted(tiny_model(kind))
    assert adapted_names(model) == ALL[kind]
    experts = [name for name in trainable(model) if ".experts." in name]
    assert len(experts) == 4, "two tensors, with A and B each"


@pytest.mark.parametrize("name", ["bamba", "falcon_h1", "jamba"])
def test_of_mamba_layers_only_the_input_is_adapted(name: str) -> None:
    """Their kernels read the weights of the other layers themselves, so that an adapter there would do nothing."""
    model = architecture(name)
    counted = count_parameters(model, LoraConfig(rank=4), "none", torch.float32)
    attached = attach_adapter(model, settings(target_modules="all-linear"), 1, "x")
    assert {part.rpartition(".")[2] for part in adapted_names(attached) if ".mamba." in part} == {"in_proj"}
    assert "out_proj" in counted.not_adapted
    assert counted.trained == sum(parameter.numel() for parameter in trainable(attached).values())
    attached(input_ids=IDS).logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in trainable(attached).values())


@pytest.mark.parametrize("kind", [*EXPERT_KINDS, *KINDS])
@pytest.mark.parametrize("targets", ["all-linear", r".*(o_proj|down_proj|c_proj)"])
def test_what_is_counted_beforehand_is_what_is_attached(kind: str, targets: str) -> None:
    with torch.device("meta"):
        empty = tiny_model(kind)
    counted = adapter_parameters(empty, find_targets(empty, targets), 4)
    attached = trainable(attach_adapter(tiny_model(kind), settings(target_modules=targets), 1, "x"))
    assert counted == sum(parameter.numel() for parameter in attached.values())


def test_a_kind_that_may_have_experts_and_has_none() -> None:
    """PEFT tells such a model by its kind, and would leave its layers out for experts that are not there."""
    model = tiny_model("qwen3_moe", mlp_only_layers=[0, 1])
    counted = adapter_parameters(model, find_targets(model, "all-linear"), 4)
    assert counted == sum(p.numel() for p in trainable(attach_adapter(model, settings(), 1, "x")).values())


def test_what_text_does_not_pass_is_left_out_and_said() -> None:
    """Of a model that sees too, as Gemma 3 is published."""
    text = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 16,
        "num_key_value_heads": 2, "vocab_size": VOCABULARY,
    }  # fmt: skip
    sight = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=sight, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config).requires_grad_(False)
    counted = count_parameters(model, settings(), "none", torch.float32)
    adapter = attach_adapter(model, settings(), 1, "x")
    assert counted.trained == sum(parameter.numel() for parameter in trainable(adapter).values())
    assert len(counted.targets.modules) == 7
    assert not [name for name in trainable(adapter) if "vision" in name]
    assert "vision_tower" in counted.describe().partition("not adapted: ")[2]


@pytest.mark.parametrize("kind", EXPERT_KINDS)
@pytest.mark.parametrize("targets", ["all-linear", ("experts.down_proj",)])
def test_plain_peft_loads_the_saved_adapter_and_so_do_we(tmp_path: Path, kind: str, targets: Any) -> None:
    model = adapted(tiny_model(kind), target_modules=targets)
    save_adapter(model, tmp_path, Metadata())
    wanted, base = logits(model), logits(tiny_model(kind))
    assert (wanted - base).abs().max() > 1e-2
    again = load_adapter(tiny_model(kind), tmp_path)
    assert torch.equal(logits(again), wanted)
    with again.disable_adapter():
        assert torch.equal(logits(again), base)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(tiny_model(kind), tmp_path)), wanted)


@pytest.mark.parametrize(
    ("kind", "targets", "names"),
    [
        ("qwen3_moe", ("gate_proj", "up_proj"), {"0.mlp.gate_proj", "0.mlp.up_proj", "1.mlp.experts"}),
        ("qwen3_moe", ("gate_up_proj",), {"1.mlp.experts"}),
        ("qwen3_moe", ("up_proj",), {"0.mlp.up_proj"}),  # in the experts it is a part
        ("qwen3_moe", r".*\.(gate|up)_proj", {"0.mlp.gate_proj", "0.mlp.up_proj", "1.mlp.experts"}),
        ("qwen3_moe", r".*self_attn\.q_proj", {"0.self_attn.q_proj", "1.self_attn.q_proj"}),
        ("qwen2_moe", r".*shared_expert\.(gate|up|down)_proj", {
            "0.mlp.shared_expert.gate_proj", "0.mlp.shared_expert.up_proj", "0.mlp.shared_expert.down_proj",
        }),
        ("gpt_oss", ("down_proj",), {"0.mlp.experts"}),
    ],
)  # fmt: skip
def test_experts_are_named_as_tensors_or_as_the_layers_of_their_files(kind: str, targets: Any, names: set[str]) -> None:
    assert adapted_names(adapted(tiny_model(kind), target_modules=targets)) == names


@pytest.mark.parametrize(
    ("kind", "targets", "message"),
    [
        ("qwen2_moe", ("experts.up_proj",),
         "nothing in this model is named experts.up_proj (inside the experts it is a part of gate_up_proj, which can "
         "be named as a whole); its linear layers are down_proj, "),
        ("qwen3_moe", r".*experts\.(gate|up)_proj",
         r"nothing in this model is named .*experts\.(gate|up)_proj (inside the experts it is a part of gate_up_proj"),
        ("gpt_oss", ("q_proj", "gate_proj"),
         "nothing in this model is named gate_proj; its linear layers are k_proj, lm_head, o_proj, q_proj, v_proj; the "
         "tensors of its experts are down_proj, gate_up_proj (or all-linear)"),
        ("qwen3_moe", ("gate",), "nothing in this model is named gate; its linear layers are "),
    ],
)  # fmt: skip
def test_a_name_that_is_not_there_says_what_is(kind: str, targets: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_targets(tiny_model(kind), targets)
    assert str(caught.value).startswith(f"tuning.target_modules: {message}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dropout": 0.1}, "tuning.dropout: 0.1; expected 0 where the experts"),
        ({"init_lora_weights": "pissa"}, "tuning.init_lora_weights: pissa; expected default where the experts"),
    ],
)
def test_variants_that_experts_cannot_have(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        attach_adapter(tiny_model("qwen3_moe"), settings(**changes), 1, "x")
    assert message in str(caught.value)
    attention = settings(**changes, target_modules=("q_proj", "v_proj"))
    attach_adapter(tiny_model("qwen3_moe"), attention, 1, "x")
