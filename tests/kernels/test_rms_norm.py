"""The fused RMSNorm equals the model's own in value and gradients; in bf16 it rounds once."""

import pytest
import torch

from lmtune.kernels import rms_norm
from lmtune.kernels.rms_norm import fuse_norms
from tests.tiny import tiny_model


def norms() -> dict[str, torch.nn.Module]:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    torch.manual_seed(0)
    made = {"llama": LlamaRMSNorm(48, eps=1e-5), "gemma": Gemma3RMSNorm(48), "torch": torch.nn.RMSNorm(48, eps=1e-6)}
    for norm in made.values():
        torch.nn.init.normal_(norm.weight)
    return made


@pytest.mark.parametrize("kind", ["llama", "gemma", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_models_own(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rms_norm, "_CHUNK_ELEMENTS", 48 * 7)  # several chunks, the last a part
    norm = norms()[kind]
    x, g = torch.randn(3, 11, 48).to(dtype).requires_grad_(), torch.randn(3, 11, 48).to(dtype)
    exact = norm(x.float())
    wanted = torch.autograd.grad(exact, (x, norm.weight), g.float())
    assert fuse_norms(torch.nn.ModuleList([norm])) == ["0"]
    found = norm(x)
    assert torch.equal(found, exact.to(dtype)) if dtype == torch.bfloat16 else found.allclose(exact, atol=1e-5)
    atol = 1e-5 if dtype == torch.float32 else 3e-2
    for mine, theirs in zip(torch.autograd.grad(found, (x, norm.weight), g), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=atol, rtol=1e-2)


def test_large_weights_that_round_otherwise_are_known_too() -> None:
    class DividingRMSNorm(torch.nn.RMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight

    norm = DividingRMSNorm(48, eps=1e-6)
    torch.nn.init.normal_(norm.weight, std=400)
    assert fuse_norms(torch.nn.ModuleList([norm])) == ["0"]


def test_what_is_no_rms_norm_keeps_its_own_forward() -> None:
    class OffsetRMSNorm(torch.nn.RMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 0.1

    class GatedRMSNorm(torch.nn.RMSNorm):
        def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
            return super().forward(x) if gate is None else super().forward(x) * torch.nn.functional.silu(gate)

    model = torch.nn.ModuleList([OffsetRMSNorm(8, eps=1e-6), GatedRMSNorm(8, eps=1e-6), torch.nn.LayerNorm(8)])
    assert fuse_norms(model) == []


def test_every_norm_of_a_model_is_fused_once() -> None:
    model = tiny_model("qwen3")
    ids = torch.arange(3, 23)[None]
    before = model(input_ids=ids).logits
    names = fuse_norms(model)
    assert len(names) == 2 * 4 + 1  # of queries and keys too
    assert fuse_norms(model) == []
    torch.testing.assert_close(model(input_ids=ids).logits, before, atol=1e-5, rtol=1e-5)
