"""What is measured per token is what autograd keeps, and checkpointed layers keep only their input."""

import pytest
import torch

from lmtune.forward.packed import PackedForward
from lmtune.kernels.lora_linear import fuse
from lmtune.models.tuning.base import trainable
from lmtune.training.memory import (
    _Watch,
    checkpoint_layers,
    decoder_layers,
    is_checkpointed_throughout,
    measure_activations,
)
from tests.tiny import KINDS, adapted, pack_rows, random_rows, tiny_model


def kept_bytes(forward: PackedForward, count: int) -> int:
    """What autograd keeps for `count` rows of forty tokens."""
    rows = [row for row in random_rows(60, longest=41).rows if len(row.sequences) == 1][:count]
    watch = _Watch(forward.model, decoder_layers(forward.base))
    forward.model.train()
    with watch, forward.context():
        forward(pack_rows(rows))
    return sum(watch.sizes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_weighs_what_autograd_keeps_of_it(kind: str) -> None:
    forward = PackedForward(
        adapted(tiny_model(kind, **({"n_layer": 4} if kind == "gpt2" else {"num_hidden_layers": 4})))
    )
    measured = measure_activations(forward, 0.3)
    assert measured.num_layers == 4
    tokens = sum(len(r.sequences[0].input_ids) for r in random_rows(60, longest=41).rows if len(r.sequences) == 1)
    kept = kept_bytes(forward, 60)
    assert kept <= measured.per_token(0) * tokens <= 3 * kept  # a layer at work is counted too, on longer rows
    forward.model.eval()
    measure_activations(forward, 0.3)
    assert not forward.model.training


@pytest.mark.parametrize(("targets", "kept"), [("all-linear", True), ("q_proj,v_proj", False)])
def test_experts_with_their_adapter_added_are_kept_once_however_many_tokens(targets: str, kept: bool) -> None:
    model = adapted(tiny_model("qwen3_moe", mlp_only_layers=[]), target_modules=targets)
    measured = measure_activations(PackedForward(model), 0.3)
    experts = 4 * 3 * 64 * 64 * 4  # bytes of a layer's
    assert (0.9 * experts < measured.fixed < 1.5 * experts) if kept else measured.fixed < 0.1 * experts


def test_the_fused_layer_keeps_less_than_pefts() -> None:
    plain, fused = adapted(tiny_model(), dropout=0.1), adapted(tiny_model(), dropout=0.1)
    fuse(fused)
    before, after = (measure_activations(PackedForward(model), 0.3) for model in (plain, fused))
    assert after.layer < 0.8 * before.layer


def test_the_first_layers_keep_only_their_input_and_the_gradient_is_the_same() -> None:
    forward = PackedForward(adapted(tiny_model(num_hidden_layers=4)))
    kept, gradients = [], []
    for count in (0, 2, 4):
        checkpoint_layers(forward.base, count)
        assert [bool(layer.gradient_checkpointing) for layer in decoder_layers(forward.base)] == [
            index < count for index in range(4)
        ]
        assert is_checkpointed_throughout(forward.base) is (count == 4)
        kept.append(kept_bytes(forward, 20))
        forward.model.zero_grad()
        with forward.context():
            forward(pack_rows(random_rows(20).rows)).logprobs.sum().neg().backward()
        gradients.append({name: p.grad.clone() for name, p in trainable(forward.model).items()})
    assert kept[0] > 1.5 * kept[1] > 2 * kept[2]
    for other in gradients[1:]:
        assert all(torch.equal(other[name], gradient) for name, gradient in gradients[0].items())
