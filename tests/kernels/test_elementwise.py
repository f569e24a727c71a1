"""The fused kernels between the products give what transformers' own code gives, and its gradients."""

import pytest
import torch
import torch.nn.functional as F

from lmtune.kernels import elementwise
from lmtune.kernels.elementwise import fuse_elementwise
from tests.tiny import tiny_model

WIDTHS = [(4, 2, 32), (9, 3, 64), (16, 8, 80), (32, 8, 128)]  # heads of queries, of keys, their size


def twice(function, other, *tensors: torch.Tensor):
    """Results and gradients of both, the second in fp32."""
    results = []
    for kind, dtype in ((function, torch.bfloat16), (other, torch.float32)):
        inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
        out = kind(*inputs)
        g = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
        results.append([out, *torch.autograd.grad(out, inputs, g.to(dtype))])
    return results


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize(("heads", "key_heads", "size"), WIDTHS)
def test_the_rotary_embedding(device: str, heads: int, key_heads: int, size: int) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    plain = getattr(apply_rotary_pos_emb, "lmtune_original", apply_rotary_pos_emb)
    torch.manual_seed(0)
    x = torch.randn(1, 7, heads, size).transpose(1, 2).bfloat16()
    cos, sin = (torch.randn(1, 7, size).bfloat16() for _ in range(2))
    mine, theirs = twice(
        lambda x: elementwise._Rotary.apply(x, cos, sin),
        lambda x: plain(x, x[:, :key_heads], cos.float(), sin.float())[0],
        x,
    )
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one.float(), other, atol=1e-2, rtol=1e-2)
    assert mine[0].stride() == x.stride()


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("width", [64, 1000, 14336])
def test_the_gated_activation(device: str, width: int) -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(1, 5, width).bfloat16() for _ in range(2))
    mine, theirs = twice(elementwise._Swiglu.apply, lambda gate, up: F.silu(gate) * up, gate, up)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one.float(), other, atol=1e-2, rtol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_a_model_takes_them_where_they_give_its_results(device: str) -> None:
    ids = torch.arange(3, 23)[None]
    for kind in ("llama", "qwen3", "gpt2"):
        model = tiny_model(kind).bfloat16()
        wanted = model(input_ids=ids).logits
        fuse_elementwise(model)
        found = model(input_ids=ids).logits
        assert float((found - wanted).abs().max()) < 3e-2 * float(wanted.abs().max())
        fused = [type(module).__name__ for module in model.modules() if type(module).__name__.startswith("Fused")]
        assert len(fused) == (0 if kind == "gpt2" else 2)


def test_elsewhere_nothing_changes() -> None:
    model = tiny_model()
    fuse_elementwise(model)
    assert not any(type(module).__name__.startswith("Fused") for module in model.modules())


def test_a_function_that_gives_something_else_or_fails_is_kept() -> None:
    def swapped(q, k, cos, sin):
        return k, q

    def broken(q, k, cos, sin):
        raise ValueError

    x = torch.ones(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), torch.ones(1, 3, 4), torch.ones(1, 3, 4)
    assert elementwise._agree(swapped, swapped, *x)
    assert not elementwise._agree(swapped, lambda q, k, cos, sin: (q, k), *x)
    assert not elementwise._agree(swapped, broken, *x)
