"""Spans of queries see their own keys and no others, span by span as in one kernel for all."""

import itertools
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from lmtune.batching.packing import SegmentLayout, Span
from lmtune.kernels import attention
from lmtune.kernels.attention import (
    LocalMask,
    Scores,
    attend_span_by_span,
    attend_varlen,
    find_varlen,
    segment_attention,
    segment_mask,
    torch_varlen,
)

LAYOUTS = {
    "plain": SegmentLayout((5, 1, 9), (None, None, None), (0, 1, 2, 5, 8, 9, 10, 14)),
    "shared": SegmentLayout((6, 3, 4, 5), (None, 0, 0, None), (5, 6, 9, 10, 12, 13, 14, 17)),
}


def masked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, edges_q: torch.Tensor, edges_k: torch.Tensor, longest_q: int,
    longest_k: int, scale: float | None, window: tuple[int, int], softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """What a varlen kernel promises, written out: queries are aligned with the last of their span's keys."""
    k, v = (tensor.repeat_interleave(q.shape[1] // tensor.shape[1], 1) for tensor in (k, v))
    sizes = list(zip(itertools.pairwise(edges_q.tolist()), itertools.pairwise(edges_k.tolist()), strict=True))
    assert (longest_q, longest_k) == tuple(max(end - start for start, end in some) for some in zip(*sizes, strict=True))
    outputs = []
    for (first_q, last_q), (first_k, last_k) in sizes:
        scores = torch.einsum("qhd,khd->hqk", q[first_q:last_q], k[first_k:last_k]) * (scale or q.shape[2] ** -0.5)
        scores = scores if softcap is None else softcap * (scores / softcap).tanh()
        num_q, num_k = scores.shape[1:]
        place = torch.arange(num_q, device=q.device)[:, None] + num_k - num_q
        back = place - torch.arange(num_k, device=q.device)[None]
        seen = (back >= 0) & ((window[0] < 0) | (back <= window[0]))
        weights = scores.masked_fill(~seen, -torch.inf).exp()
        weights = weights / (weights.sum(-1, keepdim=True) + (0 if sinks is None else sinks.exp()[:, None, None]))
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v[first_k:last_k]))
    return torch.cat(outputs)


def tensors(layout: SegmentLayout, queries: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = ((1, 4, queries, 16), (1, 2, sum(layout.lengths), 16), (1, 2, sum(layout.lengths), 16))
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("block", [2, 256])
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_one_kernel_gives_what_span_by_span_gives(
    name: str, labels: bool, window: int | None, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "MASKED_BLOCK", block)
    layout = LAYOUTS[name]
    spans = layout.read_spans if labels else layout.spans
    q, k, v = tensors(layout, sum(span.queries for span in spans))
    scores = Scores(0.3, window=window)
    one = attend_varlen(masked, q, k, v, layout, spans, scores)
    other = attend_span_by_span(q, k, v, layout, spans, scores)
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    weight = torch.randn(one.shape)
    gradients = [torch.autograd.grad((out * weight).sum(), (q, k, v), retain_graph=True) for out in (one, other)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("block", [2, 256])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_soft_caps_and_sinks_are_those_of_the_formula(
    name: str, labels: bool, window: int | None, has_sinks: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "MASKED_BLOCK", block)
    layout = LAYOUTS[name]
    spans = layout.read_spans if labels else layout.spans
    inputs = [*tensors(layout, sum(span.queries for span in spans)), torch.randn(4).requires_grad_()]
    q, k, v, sinks = inputs
    special = {"sinks": sinks} if has_sinks else {"softcap": 1.5}
    kernel = partial(masked, **special)
    one = attend_varlen(kernel, q, k, v, layout, spans, Scores(0.3, window=window))
    other = attend_span_by_span(q, k, v, layout, spans, Scores(0.3, window=window, **special))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    weight, wanted = torch.randn(one.shape), inputs[: 3 + has_sinks]
    gradients = [torch.autograd.grad((out * weight).sum(), wanted) for out in (one, other)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("special", [{}, {"softcap": 2.0}], ids=["plain", "soft cap"])
def test_what_a_window_keeps_grows_with_the_sequence_and_not_with_its_square(special: dict[str, float]) -> None:
    """Of a sequence of 2,048 tokens that look 64 back: its queries, keys, values and outputs, and a few small masks."""

    def kept_beside(tokens: int) -> int:
        layout, storages = SegmentLayout.of_segments(tokens), dict[int, int]()
        q, k, v = tensors(layout, tokens)

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = attend_span_by_span(q, k, v, layout, layout.spans, Scores(window=64, **special))
        del out
        return sum(storages.values())

    assert kept_beside(4096) < 2.1 * kept_beside(2048)


@pytest.mark.parametrize("name", LAYOUTS)
def test_read_positions_get_what_they_get_among_all(name: str) -> None:
    layout = LAYOUTS[name]
    q, k, v = tensors(layout, sum(layout.lengths))
    everywhere = attend_span_by_span(q, k, v, layout, layout.spans, Scores())
    places = list(layout.read_positions)
    few = attend_span_by_span(q[:, :, places], k, v, layout, layout.read_spans, Scores())
    torch.testing.assert_close(few, everywhere[:, places])


def test_a_rule_of_the_models_own_for_its_mask_is_refused() -> None:
    """Such as images that see themselves whole; the model then runs row by row."""
    layout = SegmentLayout.of_segments(3, 2)
    q, k, v = tensors(layout, 5)
    assert segment_mask(local_size=None) is None
    with pytest.raises(NotImplementedError, match="mask of its own"):
        segment_attention(torch.nn.Identity(), q, k, v, segment_mask(use_vmap=True), segments=layout)
    chunks = segment_mask(SimpleNamespace(attention_chunk_size=8, sliding_window=None), 8)
    assert chunks == LocalMask(8, is_chunked=True)
    assert segment_mask(SimpleNamespace(sliding_window=8), 8) == LocalMask(8)


def test_label_spans_are_the_unbroken_rows_of_labels_in_a_run() -> None:
    assert LAYOUTS["plain"].read_spans == (
        Span(3, None, 0, 3), Span(1, None, 1, 1), Span(3, None, 2, 5), Span(1, None, 2, 9),
    )  # fmt: skip
    assert LAYOUTS["shared"].read_spans == (
        Span(1, None, 0, 6), Span(1, 0, 1, 1), Span(2, 0, 2, 2), Span(1, 0, 2, 4), Span(2, None, 3, 2),
        Span(1, None, 3, 5),
    )  # fmt: skip


CPU = torch.device("cpu")


def broken(*arguments: object) -> torch.Tensor:
    raise RuntimeError("no kernel image")


@torch.no_grad()
def test_the_first_kernel_that_gives_the_plain_result_is_taken() -> None:
    """Asked where gradients are switched off, as at the start of a run."""
    assert find_varlen(CPU, torch.float32, 16, 2, (masked,)) == (masked, None)
    assert find_varlen(CPU, torch.float32, 16, 2, (broken, masked)) == (masked, None)


def test_a_kernel_that_fails_or_differs_is_not_taken_and_why_is_said() -> None:
    def shifted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *sizes: object) -> torch.Tensor:
        return masked(q, k, v.roll(1, 0), *sizes)

    def detached(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *sizes: object) -> torch.Tensor:
        return masked(q, k, v.detach() + 0 * v, *sizes)

    assert find_varlen(CPU, torch.float32, 16, 2, (broken,)) == (None, "no kernel image")
    for wrong in (shifted, detached):
        kernel, why = find_varlen(CPU, torch.float32, 16, 2, (wrong,))
        assert kernel is None
        assert "its result differs by" in str(why)
    assert "16 bit only" in str(find_varlen(CPU, torch.float32, 16, 1)[1])


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_gpus_kernel_gives_what_span_by_span_gives(name: str, labels: bool, window: int | None) -> None:
    layout = LAYOUTS[name]
    spans = layout.read_spans if labels else layout.spans
    q, k, v = tensors(layout, sum(span.queries for span in spans), torch.bfloat16)
    one = attend_varlen(torch_varlen, q, k, v, layout, spans, Scores(window=window))
    other = attend_span_by_span(q.float(), k.float(), v.float(), layout, spans, Scores(window=window))
    torch.testing.assert_close(one.float(), other, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_the_gpus_kernel_is_taken() -> None:
    assert find_varlen(torch.device("cuda", 0), torch.bfloat16, 64, 2)[1] is None
