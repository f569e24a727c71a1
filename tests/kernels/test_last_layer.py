"""The last layer on trained positions only: the same loss and gradients, and the query projection found by trying."""

import pytest
import torch

from lmtune.forward.capabilities import Capabilities
from lmtune.forward.packed import PackedForward
from lmtune.kernels.lora_linear import fuse
from lmtune.models.tuning.base import trainable
from tests.tiny import adapted, pack_rows, random_rows, tiny_model


def gradients(forward: PackedForward, share: bool = False) -> tuple[float, dict[str, torch.Tensor]]:
    forward.model.zero_grad()
    with forward.context():
        total = forward(pack_rows(random_rows(7).rows, share)).logprobs.sum() * -0.01
        total.backward()
    return total.item(), {name: p.grad.clone() for name, p in trainable(forward.model).items()}


def assert_equals_the_whole_layer(forward: PackedForward) -> None:
    """Every optimized path is used, and without that of the last layer loss and gradients are the same."""
    assert forward.capabilities.disabled == []
    loss, fast = gradients(forward)
    forward.capabilities = Capabilities(label_only_layer="switched off")
    plain_loss, plain = gradients(forward)
    assert loss == pytest.approx(plain_loss, abs=1e-6)
    for name, gradient in plain.items():
        torch.testing.assert_close(fast[name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("fused", [False, True])
def test_equals_the_whole_layer(kind: str, fused: bool) -> None:
    model = adapted(tiny_model(kind, **({"sliding_window": 6} if kind == "mistral" else {})))
    if fused:
        fuse(model)
    forward = PackedForward(model)
    assert_equals_the_whole_layer(forward)


def test_the_last_mlp_sees_the_trained_positions_alone() -> None:
    forward, seen = PackedForward(adapted(tiny_model())), list[int]()
    forward.base.model.layers[-1].mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    batch = pack_rows(random_rows(7).rows)
    with forward.context():
        forward(batch)
    assert seen == [len(batch.read_positions)]
    assert seen[0] < batch.num_tokens / 2


def test_gradient_checkpointing_of_the_last_layer() -> None:
    model = adapted(tiny_model())
    forward = PackedForward(model)
    loss, plain = gradients(forward)
    forward.base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    again, recomputed = gradients(forward)
    assert again == loss
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient)


def test_the_query_projection_is_found_and_left_out_of_the_first_run() -> None:
    model = adapted(tiny_model())
    PackedForward(model)
    layer = model.get_base_model().model.layers[-1]
    assert layer.lmtune_query_linear is layer.self_attn.q_proj


def test_the_layer_holds_no_module_twice() -> None:
    model = adapted(tiny_model())
    names = set(model.state_dict())
    PackedForward(model)
    assert set(model.state_dict()) == names


def test_layers_with_one_projection_for_queries_keys_and_values() -> None:
    """Nothing can be left out of their first run, and the result is the same."""
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    forward = PackedForward(adapted(Phi3ForCausalLM(Phi3Config(**shape, **tokens)).requires_grad_(False).eval()))
    assert_equals_the_whole_layer(forward)


def test_a_layer_that_does_not_reproduce_the_plain_result_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from lmtune.kernels import label_only_layer

    real = label_only_layer._Selected.attend
    monkeypatch.setattr(label_only_layer._Selected, "attend", lambda self, *args: real(self, *args) * 1.01)
    forward = PackedForward(adapted(tiny_model()))
    assert "outputs differ" in str(forward.capabilities.label_only_layer)
    assert forward.capabilities.disabled == [forward.capabilities.label_only_layer]


def test_generation_and_other_attention_are_untouched() -> None:
    model = adapted(tiny_model())
    ids = torch.arange(3, 20)[None]
    before = model(input_ids=ids).logits
    PackedForward(model)
    torch.testing.assert_close(model(input_ids=ids).logits, before)
