"""Layers with a state keep packed sequences apart: by their kernels where these take the bounds, else one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.models.qwen3_5 import modeling_qwen3_5

from lmtune.batching.packing import SegmentLayout
from lmtune.forward.capabilities import recurrence_note
from lmtune.forward.packed import PackedForward
from lmtune.kernels.recurrent_layer import recurrent_layers, runs_by_sequence
from tests.architectures import architecture
from tests.tiny import tiny_model


def bounded(kernel: Callable[..., Any], dim: int, calls: list[tuple[int, ...]]) -> Callable[..., Any]:
    """A kernel that takes the bounds of sequences as the real ones do, along `dim` of its inputs."""

    def run(*inputs: Any, cu_seqlens: Any = None, seq_idx: Any = None, **settings: Any) -> Any:
        total = inputs[0].shape[dim]
        if seq_idx is not None and cu_seqlens is None:
            lengths = torch.bincount(seq_idx[0]).tolist()
        else:
            lengths = [total] if cu_seqlens is None else cu_seqlens.diff().tolist()
        calls.append(tuple(lengths))
        parts = []
        for start, length in zip(torch.tensor([0, *lengths]).cumsum(0).tolist(), lengths, strict=False):

            def cut(value: Any, start: int = start, length: int = length) -> Any:
                is_long = isinstance(value, torch.Tensor) and value.dim() > dim and value.shape[dim] == total > 1
                return value.narrow(dim, start, length) if is_long and value.shape[0] == 1 else value

            parts.append(kernel(*map(cut, inputs), **{key: cut(value) for key, value in settings.items()}))
        if isinstance(parts[0], tuple):
            return torch.cat([part[0] for part in parts], dim), None
        return torch.cat(parts, dim)

    return run


def test_kernels_that_take_bounds_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = architecture("qwen3_5_text"), []
    for name, dim in (("causal_conv1d_fn", 2), ("torch_chunk_gated_delta_rule", 1)):
        monkeypatch.setattr(modeling_qwen3_5, name, bounded(getattr(modeling_qwen3_5, name), dim, calls))
    forward = PackedForward(model)
    assert forward.packs
    assert not runs_by_sequence(model)
    ids, segments = torch.arange(3, 15)[None], SegmentLayout.of_segments(7, 5)
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    calls.clear()
    with forward.context(), torch.no_grad():
        packed = forward.hidden(ids, positions, torch.arange(12), segments)
        assert calls == [(7, 5), (7, 5)]
        alone = forward.hidden(ids[:, 7:], positions[:, 7:], torch.arange(5), SegmentLayout.of_segments(5))
    torch.testing.assert_close(packed[7:], alone, atol=1e-5, rtol=1e-5)


def test_without_such_kernels_each_sequence_runs_alone_and_nothing_else_changes() -> None:
    model, ids = architecture("qwen3_next"), torch.arange(3, 40)[None]
    before = model(input_ids=ids).logits
    forward = PackedForward(model)
    assert forward.packs
    assert runs_by_sequence(model)
    assert recurrence_note(forward.base) is None  # there are no kernels for a CPU
    torch.testing.assert_close(model(input_ids=ids).logits, before, atol=1e-5, rtol=1e-5)
    ours = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(ours, architecture("qwen3_next").generate(ids, max_new_tokens=8, do_sample=False))


def test_what_carries_no_state_is_none_of_them() -> None:
    assert not list(recurrent_layers(tiny_model()))
