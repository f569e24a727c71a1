"""fp8 products are those of rounded numbers, close to the exact ones, and nothing else of a LoRA layer is rounded."""

import pytest
import torch

from lmtune.kernels.fp8_linear import Fp8Weight, fits_fp8, quantise_rows, why_not_fp8
from lmtune.kernels.lora_linear import fuse
from lmtune.models.tuning.lora import trainable
from tests.kernels.test_lora_linear import loss_and_gradients
from tests.tiny import adapted, tiny_model


def test_rows_are_scaled_to_the_range_and_rounded_by_at_most_a_sixteenth() -> None:
    matrix = torch.randn(5, 64) * torch.tensor([1e-6, 1.0, 1e6, 3.0, 0.0])[:, None]
    numbers, scale = quantise_rows(matrix)
    assert numbers.dtype == torch.float8_e4m3fn
    assert numbers.float().abs().amax(1).tolist() == [448, 448, 448, 448, 0]
    back = numbers.float() * scale
    normal = numbers.float().abs() >= 2**-6  # below that e4m3 has steps of equal size
    assert ((back - matrix).abs() <= matrix.abs() / 16)[normal].all()


def test_both_products_are_those_of_the_rounded_numbers() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 32)
    weight = Fp8Weight(layer)

    def rounded(matrix: torch.Tensor) -> torch.Tensor:
        numbers, scale = quantise_rows(matrix)
        return numbers.float() * scale

    x, g = torch.randn(7, 64), torch.randn(7, 32)
    y = rounded(x) @ rounded(layer.weight).t() + layer.bias
    dx = rounded(g) @ rounded(layer.weight.t().contiguous()).t()
    torch.testing.assert_close(weight.times(x, layer.bias), y, atol=2e-2, rtol=1e-2)  # the product comes in bf16
    torch.testing.assert_close(weight.times_transposed(g), dx, atol=2e-2, rtol=1e-2)


def test_loss_and_gradients_stay_close_to_the_exact_ones() -> None:
    model = adapted(tiny_model())
    loss, gradients = loss_and_gradients(model)
    assert fuse(model, fp8=True) == []
    near_loss, near = loss_and_gradients(model)
    assert near_loss == pytest.approx(loss.item(), rel=0.02)
    assert not torch.equal(near_loss, loss)
    one, other = (torch.cat([g[name].flatten() for name in trainable(model)]) for g in (gradients, near))
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.99


def test_layers_of_other_shapes_are_left_in_full_precision() -> None:
    assert fits_fp8(torch.nn.Linear(64, 32))
    assert not fits_fp8(torch.nn.Linear(64, 40))
    assert not fits_fp8(torch.nn.Linear(40, 64))


def test_a_cpu_is_no_place_for_it() -> None:
    assert why_not_fp8(torch.device("cpu")) == "a CPU has no fp8 matrix product of its own"
