"""The fused LoRA layer equals PEFT's: output and gradients, full precision and nf4, and PEFT still knows it."""

from pathlib import Path

import pytest
import torch

from lmtune.kernels.lora_linear import fuse
from lmtune.models.tuning.base import trainable
from tests.tiny import adapted, tiny_model

IDS = torch.arange(3, 23)[None]


def loss_and_gradients(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(5)  # the same dropout
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in trainable(model).items()}


def quantized_model(folder: Path, quantization: str):
    from lmtune.config.schema import ModelConfig
    from lmtune.models.base import load_model

    tiny_model().save_pretrained(folder)
    return load_model(ModelConfig(name=str(folder), quantization=quantization))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "nf4", "nf4-kept", "int8", "int8-kept"])
def test_equals_pefts_layer(kind: str, dropout: float, tmp_path: Path) -> None:
    quantization, _, kept = kind.partition("-")
    base = quantized_model(tmp_path, quantization) if quantization in ("nf4", "int8") else tiny_model(kind)
    model = adapted(base, dropout=dropout).train()
    loss, gradients = loss_and_gradients(model)
    assert fuse(model, keep_dense=bool(kept)) == []
    fused_loss, fused_gradients = loss_and_gradients(model)
    torch.testing.assert_close(fused_loss, loss, atol=1e-5, rtol=1e-5)
    assert fused_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(fused_gradients[name], gradient, atol=1e-6, rtol=1e-4)


def test_switching_the_adapter_off_and_merging_still_work() -> None:
    plain, fused = adapted(tiny_model()), adapted(tiny_model())
    fuse(fused)
    with torch.no_grad(), plain.disable_adapter(), fused.disable_adapter():
        assert torch.equal(plain(input_ids=IDS).logits, fused(input_ids=IDS).logits)
    merged = [model.merge_and_unload(safe_merge=True)(input_ids=IDS).logits for model in (plain, fused)]
    torch.testing.assert_close(*merged)


def test_another_adapter_answers_when_it_is_chosen() -> None:
    plain, fused = adapted(tiny_model()), adapted(tiny_model())
    fuse(fused)
    outputs = []
    for model in (plain, fused):
        torch.manual_seed(3)
        model.add_adapter("other", model.peft_config["default"])
        for name, parameter in model.named_parameters():
            if "lora_B.other" in name:
                torch.nn.init.normal_(parameter, 0, 0.1)
        model.set_adapter("other")
        outputs.append(model(input_ids=IDS).logits)
    torch.testing.assert_close(outputs[1], outputs[0])
    fused.set_adapter("default")
    assert (fused(input_ids=IDS).logits - outputs[1]).abs().max() > 0.01


@pytest.mark.parametrize("keep", [False, True])
def test_a_base_that_is_kept_dense_is_dequantized_once(
    keep: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitsandbytes import functional

    model, calls, real = adapted(quantized_model(tmp_path, "nf4")), list[int](), functional.dequantize_4bit
    fuse(model, keep)
    monkeypatch.setattr(functional, "dequantize_4bit", lambda *a, **k: calls.append(1) or real(*a, **k))
    for _ in range(3):
        loss_and_gradients(model)
    assert len(calls) <= 14 if keep else len(calls) > 3 * 14


def test_the_tensors_of_experts_keep_pefts_wrapper_and_a_shared_expert_is_fused(tmp_path: Path) -> None:
    from lmtune.config.schema import ModelConfig
    from lmtune.models.base import load_model

    tiny_model("qwen2_moe").save_pretrained(tmp_path)
    for quantization in ("none", "nf4"):
        model = adapted(load_model(ModelConfig(name=str(tmp_path), quantization=quantization), "cpu"))
        loss, gradients = loss_and_gradients(model)
        left = fuse(model)
        assert {type(model.get_submodule(name)).__name__ for name in left} == {"ParamWrapper"}
        assert all(name.removesuffix(".base_layer").endswith("mlp.experts") for name in left)
        assert type(model.get_base_model().model.layers[0].mlp.shared_expert.up_proj).__name__.startswith("Fused")
        fused_loss, fused_gradients = loss_and_gradients(model)
        torch.testing.assert_close(fused_loss, loss, atol=1e-5, rtol=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(fused_gradients[name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("settings", [{"use_dora": True}])
def test_layers_that_are_not_plain_are_left_alone(settings: dict) -> None:
    model = adapted(tiny_model(), **settings)
    before = {name: type(module) for name, module in model.named_modules()}
    assert len(fuse(model)) == 14
    assert {name: type(module) for name, module in model.named_modules()} == before
