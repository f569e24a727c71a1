"""Chunked log-probabilities equal PyTorch's on full logits: values, gradients with any weights, top-1."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from lmtune.kernels import cross_entropy
from lmtune.kernels.cross_entropy import LogitTransform, _chunks, chunk_rows, label_logprobs

PLAIN, CAPPED, SCALED = LogitTransform(), LogitTransform(softcap=5.0), LogitTransform(scale=0.25)


@pytest.mark.parametrize("transform", [PLAIN, CAPPED, SCALED, LogitTransform(2.0, 3.0)])
@pytest.mark.parametrize("chunk_rows", [1, 7, 64])
def test_weighted_losses_equal_plain_cross_entropy(transform: LogitTransform, chunk_rows: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(33, 24, requires_grad=True)
    head = torch.randn(101, 24, requires_grad=True)
    targets = torch.randint(0, 101, (33,))
    logits = transform.apply(hidden @ head.t())
    each = F.cross_entropy(logits, targets, reduction="none")
    weights = torch.rand(33)
    (each * weights).sum().backward()
    wanted = hidden.grad.clone(), head.grad.clone()
    hidden.grad = head.grad = None
    logprobs, correct = label_logprobs(hidden, head, targets, transform, chunk_rows)
    (-logprobs * weights).sum().backward()
    torch.testing.assert_close(-logprobs, each.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(hidden.grad, wanted[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(head.grad, wanted[1], atol=1e-5, rtol=1e-5)
    assert torch.equal(correct, logits.argmax(-1) == targets)


@pytest.mark.parametrize("transform", [PLAIN, CAPPED, SCALED])
def test_scoring_computes_no_gradient(transform: LogitTransform) -> None:
    """The product with the head is a good part of a small model's forward pass; its gradient is as much again."""
    hidden, head = torch.randn(33, 24, requires_grad=True), torch.randn(101, 24, requires_grad=True)
    targets = torch.randint(0, 101, (33,))
    wanted = label_logprobs(hidden, head, targets, transform, 16)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        scored = label_logprobs(hidden, head, targets, transform, 16)
    assert all(torch.equal(one, other) for one, other in zip(scored, wanted, strict=True))
    assert counter.get_total_flops() == 2 * 33 * 24 * 101


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("vocabulary", [101, 8192, 50257, 128256])
def test_the_gpu_kernel_gives_what_the_operations_give(device: str, vocabulary: int) -> None:
    torch.manual_seed(0)
    raw = (4 * torch.randn(33, vocabulary)).bfloat16()
    targets = raw.argmax(1) * (torch.arange(33) % 2) + torch.arange(33) * (torch.arange(33) % 2 == 0)
    assert cross_entropy._has_kernel(raw)
    mine = cross_entropy._chunk(raw.clone(), targets, PLAIN, True)
    wide = raw.float().requires_grad_()
    each = F.cross_entropy(wide, targets, reduction="none")
    each.sum().backward()
    torch.testing.assert_close(mine[0], -each.detach(), atol=1e-4, rtol=1e-5)
    assert torch.equal(mine[1], raw.float().argmax(1) == targets)
    torch.testing.assert_close(mine[2].float(), wide.grad, atol=1e-6, rtol=1e-2)


@given(st.integers(0, 5000), st.integers(1, 700))
def test_chunks_cover_all_rows_in_parts_of_about_one_size(count: int, most: int) -> None:
    parts = _chunks(count, most)
    assert [row for part in parts for row in range(count)[part]] == list(range(count))
    sizes = [part.stop - part.start for part in parts]
    assert len(sizes) == -(-count // most)
    assert max(sizes, default=0) <= most
    assert max(sizes, default=0) - min(sizes, default=0) <= 1


def test_logits_are_never_held_whole(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, real = list[tuple[int, ...]](), cross_entropy._chunk
    monkeypatch.setattr(cross_entropy, "_chunk", lambda raw, *rest: seen.append(tuple(raw.shape)) or real(raw, *rest))
    label_logprobs(torch.randn(6000, 2), torch.randn(50_000, 2), torch.zeros(6000, dtype=torch.long))
    assert sum(rows for rows, _ in seen) == 6000
    assert max(rows for rows, _ in seen) <= chunk_rows(device, 50_000) < 3000


def test_a_backward_pass_needs_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a frozen head, whatever the objective weighs the log-probabilities with."""
    hidden, head = torch.randn(600, 4, requires_grad=True), torch.randn(5000, 4)
    logprobs, _ = label_logprobs(hidden, head, torch.zeros(600, dtype=torch.long))
    monkeypatch.setattr(cross_entropy, "_chunk", lambda *_: pytest.fail("logits are made again"))
    kept = sum(tensor.numel() for tensor in logprobs.grad_fn.saved_tensors)
    (logprobs * torch.rand(600)).sum().backward()
    assert kept == hidden.numel()


def test_large_logits_stay_finite() -> None:
    hidden, head = torch.full((2, 4), 100.0, requires_grad=True), torch.randn(9, 4)
    logprobs, _ = label_logprobs(hidden, head, torch.tensor([1, 2]))
    logprobs.sum().backward()
    assert torch.isfinite(logprobs).all()
    assert torch.isfinite(hidden.grad).all()


def test_the_transform_is_read_from_the_models_config() -> None:
    from types import SimpleNamespace

    assert LogitTransform.of(SimpleNamespace()) == PLAIN
    assert LogitTransform.of(SimpleNamespace(final_logit_softcapping=30.0)) == LogitTransform(softcap=30.0)
    assert LogitTransform.of(SimpleNamespace(logit_scale=0.0625)) == LogitTransform(scale=0.0625)
    assert LogitTransform.of(SimpleNamespace(logits_scaling=8.0)) == LogitTransform(scale=0.125)
