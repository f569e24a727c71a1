"""LoRA layers of one input as one product: what each gives by itself, with sums that are rounded once."""

from pathlib import Path

import pytest
import torch

from lmtune.forward.packed import PackedForward
from lmtune.kernels import lora_group, lora_linear
from lmtune.kernels.gated_mlp import grouped_mlp
from lmtune.kernels.lora_group import adapters_held, group_layers, separate_layers
from lmtune.kernels.lora_linear import drop_dense, fuse
from lmtune.models.tuning.base import trainable
from tests.kernels.test_lora_linear import (
    loss_and_gradients,
    model_of_one_layer,
    quantized_model,
    token_ids,
    update_kept,
)
from tests.tiny import adapted, losses_of, pack_rows, random_rows, tiny_model


@pytest.fixture(autouse=True)
def rounds_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are rounded before they are added to anything, as on a GPU."""
    for module in (lora_linear, lora_group):
        monkeypatch.setattr(module, "addmm_rounds_once", lambda device, dtype: dtype.itemsize > 2)


def in_16_bit(model):
    model.to(torch.bfloat16)
    for parameter in trainable(model).values():
        parameter.data = parameter.data.float()
    return model


def grouped(kind: str = "llama", **settings):
    model = in_16_bit(adapted(tiny_model(kind), **settings))
    assert fuse(model) == []
    return model, group_layers(model, lambda: model(input_ids=token_ids()))


def names_of(groups) -> list[list[str]]:
    return [[layer.lmtune_name for layer in group.layers] for group in groups]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral"])
def test_layers_of_one_input_are_found_and_give_what_they_give_alone(kind: str) -> None:
    model, groups = grouped(kind)
    for name, module in model.named_modules():
        module.lmtune_name = name.rpartition(".")[2]
    assert names_of(groups) == 2 * [
        ["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"],
    ]  # fmt: skip
    loss, gradients = loss_and_gradients(model)
    separate_layers(model)
    plain_loss, plain = loss_and_gradients(model)
    torch.testing.assert_close(loss, plain_loss, atol=1e-2, rtol=1e-2)
    for name, gradient in plain.items():
        assert (gradients[name] - gradient).norm() < 0.03 * gradient.norm(), name


@pytest.mark.parametrize("bias", [False, True])
def test_an_update_survives_in_a_group_too(bias: bool) -> None:
    model, layer = model_of_one_layer("none", bias)
    fuse(model)
    (group,) = group_layers(model, lambda: layer(torch.randn(3, 192).bfloat16()))
    assert update_kept(model, layer) == pytest.approx((1, 1), abs=0.02)
    assert layer.get_base_layer().weight.data_ptr() == group.matrix.data_ptr()  # there is no second copy


def test_changed_adapters_and_switched_ones_are_seen() -> None:
    model, _ = grouped()
    before = model(input_ids=token_ids()).logits
    for name, parameter in trainable(model).items():
        if "lora_B" in name:
            parameter.data = torch.zeros_like(parameter)
    after = model(input_ids=token_ids()).logits
    with model.disable_adapter():
        base = model(input_ids=token_ids()).logits
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, base, atol=2e-2, rtol=2e-2)


def test_while_adapters_are_held_their_values_are_read_once() -> None:
    model, groups = grouped()
    first = next(parameter for name, parameter in trainable(model).items() if "lora_B" in name)
    run = lambda: model(input_ids=token_ids()).logits  # noqa: E731
    with adapters_held(groups):
        before = run()
        kept, first.data = first.data, torch.ones_like(first)
        assert torch.equal(run(), before)
    assert not torch.equal(run(), before)
    with adapters_held(groups):
        assert not torch.equal(run(), before)
        first.data = kept
    assert torch.equal(run(), before)


def test_a_gated_mlp_in_groups_is_one_operation() -> None:
    model, _ = grouped()
    mlp = next(module for name, module in model.named_modules() if name.endswith("mlp"))
    torch.manual_seed(0)
    x, g = torch.randn(1, 9, 64).bfloat16(), torch.randn(1, 9, 64).bfloat16()
    parameters = [p for p in mlp.parameters() if p.requires_grad]
    results = []
    for run in (lambda x: grouped_mlp(mlp.gate_proj, mlp.up_proj, mlp.down_proj, x), mlp):
        inner = x.clone().requires_grad_()
        y = run(inner)
        results.append([y, *torch.autograd.grad(y, [inner, *parameters], g)])
    for mine, plain in zip(*results, strict=True):
        assert mine.shape == plain.shape
        assert (mine - plain).float().norm() < 0.02 * plain.float().norm()
    with model.disable_adapter():
        assert grouped_mlp(mlp.gate_proj, mlp.up_proj, mlp.down_proj, x) is None
    separate_layers(model)
    assert grouped_mlp(mlp.gate_proj, mlp.up_proj, mlp.down_proj, x) is None


def test_an_adapter_of_another_rank_and_weights_replaced_for_a_while_compute_alone() -> None:
    model, groups = grouped()
    layer = groups[0].layers[0]
    x = torch.randn(1, 5, 64).bfloat16()
    kept = layer.get_base_layer().weight.data
    layer.get_base_layer().weight.data = torch.zeros_like(kept)
    assert groups[0](layer, x) is None
    layer.get_base_layer().weight.data = kept
    assert groups[0](layer, x) is not None
    model.add_adapter("wider", type(model.peft_config["default"])(r=12, target_modules=["q_proj"]))
    model.set_adapter("wider")
    assert groups[0](layer, x) is None


def test_dropout_and_dora_are_not_joined() -> None:
    assert grouped(dropout=0.1)[1] == []
    assert grouped(use_dora=True)[1] == []


def test_quantized_weights_join_while_they_are_held_dense(tmp_path: Path) -> None:
    model = in_16_bit(adapted(quantized_model(tmp_path, "nf4")))
    assert fuse(model, keep_dense=False) == []
    run = lambda: model(input_ids=token_ids())  # noqa: E731
    assert group_layers(model, run) == []
    for module in model.modules():
        if hasattr(module, "lmtune_weight"):
            module.lmtune_weight.keep = True
    loss, _ = loss_and_gradients(model)
    assert len(group_layers(model, run)) == 8
    again, _ = loss_and_gradients(model)
    torch.testing.assert_close(again, loss, atol=1e-2, rtol=1e-2)
    assert drop_dense(model)
    assert all(getattr(module, "lmtune_group", None) is None for module in model.modules())
    alone, _ = loss_and_gradients(model)
    torch.testing.assert_close(alone, loss, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("share", [False, True])
def test_a_packed_forward_pass_joins_layers_and_keeps_its_paths(share: bool) -> None:
    model = in_16_bit(adapted(tiny_model()))
    fuse(model)
    forward, batch = PackedForward(model), pack_rows(random_rows(7).rows, share)
    assert [note for note in forward.disabled_optimizations if "kernel" not in note] == []
    groups = {id(module.lmtune_group) for module in model.modules() if hasattr(module, "lmtune_group")}
    assert len(groups) == 8
    joined = losses_of(forward, batch)
    separate_layers(model)
    torch.testing.assert_close(losses_of(forward, batch), joined, atol=5e-2, rtol=2e-2)
