"""Models whose code has something of its own: gradients are a plain loop's, and what is left out is said."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from lmtune.batching.plan import Totals
from lmtune.forward.packed import PackedForward
from lmtune.kernels.lora_linear import fuse
from lmtune.models.tuning.base import trainable
from lmtune.objectives.sft import Sft
from lmtune.parallel.single import Single
from lmtune.training.step import step_gradients
from tests.tiny import VOCABULARY, adapted, pack_rows, random_rows
from tests.training.test_gradients import by_hand, lmtune_step

SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LONG = {"rope_theta": 10000.0, "original_max_position_embeddings": 16, "factor": 4.0}
LONGROPE = {
    **LONG, "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "partial_rotary_factor": 1.0,
}  # fmt: skip
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")


def model_of(name: str, config: dict[str, Any]) -> Any:
    """A random model of transformers' class `name`, frozen."""
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**config))
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.08) if parameter.dim() > 1 else None
    return model.requires_grad_(False).eval()


@pytest.mark.parametrize(
    ("name", "config", "why"),
    [
        ("Phi3ForCausalLM", {**SHAPE, "original_max_position_embeddings": 16, "rope_parameters": LONGROPE},
         "rotary embedding (longrope) depends on the longest row"),
        ("LlamaForCausalLM",
         {**SHAPE, "max_position_embeddings": 64, "rope_parameters": {**LONG, "rope_type": "dynamic"}},
         "rotary embedding (dynamic) depends on the longest row"),
        ("PhimoeForCausalLM", {**SHAPE, "num_key_value_heads": 4, "num_local_experts": 4, "sliding_window": 8},
         None),
        ("GPTNeoForCausalLM",
         {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY, "window_size": 8,
          "attention_types": [[["global", "local"], 1]]}, "hand extra arguments on"),
        ("GPTNeoXForCausalLM", SHAPE, None),
        ("OlmoForCausalLM", SHAPE, None),
    ],
)  # fmt: skip
def test_gradients_are_those_of_a_plain_loop(name: str, config: dict[str, Any], why: str | None) -> None:
    targets = {"GPTNeo": "all-linear", "Phi3Fo": ("qkv_proj", "o_proj")}.get(name[:6], LINEARS)
    model, rows = adapted(model_of(name, config), target_modules=targets).eval(), random_rows(6)
    loss, gradients, _ = by_hand(model, rows)
    fuse(model)
    forward = PackedForward(model)
    if why is None:
        assert forward.packs
    else:
        assert any(why in note for note in forward.disabled_optimizations), forward.disabled_optimizations
    sums = lmtune_step(model, rows, 10**6)
    assert sums.loss == pytest.approx(loss, abs=1e-5)
    for key, parameter in trainable(model).items():
        torch.testing.assert_close(parameter.grad, gradients[key], atol=1e-6, rtol=1e-3)


@pytest.fixture
def norms_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer norms as autocast has them on a GPU: they compute and return fp32."""
    real: Callable[..., torch.Tensor] = F.layer_norm

    def wide(x: torch.Tensor, *rest: Any, **settings: Any) -> torch.Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            return real(x, *rest, **settings)
        rest = tuple(part.float() if isinstance(part, torch.Tensor) else part for part in rest)
        return real(x.float(), *rest, **settings)

    monkeypatch.setattr(F, "layer_norm", wide)


def test_a_16_bit_head_behind_a_norm_that_autocast_keeps_in_fp32(norms_in_fp32: None) -> None:
    model = adapted(model_of("GPTNeoXForCausalLM", SHAPE).to(torch.bfloat16)).eval()
    for parameter in trainable(model).values():
        parameter.data = parameter.data.float()
    forward, rows = PackedForward(model), random_rows(6)
    assert forward.capabilities.fused_head is None
    sums = lmtune_step(model, rows, 10**6)
    assert sums.is_finite
    assert sums.grad_norm > 0


def test_gradients_in_fp16_do_not_vanish_in_a_large_step() -> None:
    """Of 40,000 tokens each counts 1/40,000: in fp16 that leaves few bits unless it is done afterwards."""
    rows, results = random_rows(6), []
    for dtype in (torch.float32, torch.float16):
        model = adapted(model_of("LlamaForCausalLM", SHAPE).to(dtype)).eval()
        for parameter in trainable(model).values():
            parameter.data = parameter.data.float()
        totals = Totals(6, 6, 0, 40_000, 6, 40_000)
        step_gradients(PackedForward(model), Sft(), trainable(model), [pack_rows(rows.rows)], totals, Single())
        results.append({name: parameter.grad.clone() for name, parameter in trainable(model).items()})
    for name, wanted in results[0].items():
        assert (results[1][name] - wanted).norm() < 0.02 * wanted.norm(), name
