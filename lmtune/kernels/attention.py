"""Attention by segment: packed sequences attend within themselves, at the cost of their own lengths only.

A micro-batch's sequences follow one another in a single row. The stock way to keep them apart is a mask of the whole
row squared; here each span of queries goes with its own keys alone: PyTorch's scaled dot product attention span by
span on a CPU, one kernel for spans of any length on a GPU (`torch.nn.attention.varlen`, or flash-attn). Scores with a
soft cap (https://arxiv.org/abs/2408.00118) or a sink (https://arxiv.org/abs/2309.17453), which those do not have, are
computed block by block. The function is registered under a name with transformers' public `AttentionInterface`, so no
model code is touched; the layout reaches it as an extra argument of the model's forward.

    with packed_attention(model):
        model(input_ids=…, position_ids=…, segments=SegmentLayout.of_segments(5, 7))
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lmtune.batching.packing import Boundaries, SegmentLayout, Span
from lmtune.batching.prefixes import MASKED_BLOCK

NAME = "lmtune_segments"
_VARLEN_TOLERANCE = 3e-2  # relative, in 16 bit; a wrong alignment moves outputs by about 1


def segment_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | LocalMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: SegmentLayout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    label_layer: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sequence.

    Args:
        module: the attention layer, unused but part of transformers' interface.
        query: `[1, heads, T, d]`.
        key, value: `[1, key_value_heads, T, d]`.
        attention_mask: what `segment_mask` has made.
        scaling: of the scores; None is `1 / sqrt(d)`.
        segments: which tokens belong together.
        sliding_window: how many tokens back a token sees, itself included; None is all.
        softcap: `c` of scores that are `c tanh(score / c)`.
        s_aux: `[heads]`, the score of a sink, which takes its share of the attention of every token and gives nothing.
        label_layer: set in the last layer, which takes keys and values first and few queries later; see
            `lmtune.kernels.label_only_layer`.

    Returns:
        `[1, T, heads, d]` and None for the weights, which are never formed.

    Raises:
        NotImplementedError: the model hands a mask of its own on, or no segments.
    """
    local = attention_mask if isinstance(attention_mask, LocalMask) else LocalMask()
    if local.is_custom or isinstance(attention_mask, torch.Tensor):
        raise NotImplementedError("the model makes an attention mask of its own")
    if not local.is_chunked:
        sliding_window = sliding_window or local.size
    if segments is None:
        raise NotImplementedError("the model does not hand extra arguments on to its attention")
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings of an fp32 model have widened queries and keys
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    segments.derived.window = segments.derived.window or sliding_window or local.size
    scores = Scores(scaling, dropout, sliding_window, softcap, s_aux, local.size if local.is_chunked else None)
    segments.derived.by_blocks |= not scores.is_plain
    if label_layer is not None:
        return label_layer.attend(query, key, value, segments, scores), None
    return attend(query, key, value, segments, segments.spans, scores), None


@dataclass(frozen=True)
class LocalMask:
    """What transformers would write into the mask of a layer.

    Attributes:
        size: of a window, or of chunks; None is no limit.
        is_chunked: whether a token sees the tokens of its own chunk alone (Llama 4), counted from a sequence's start.
        is_custom: whether the model has a rule of its own.
    """

    size: int | None = None
    is_chunked: bool = False
    is_custom: bool = False


def segment_mask(
    config: Any = None, local_size: int | None = None, use_vmap: bool = False, **settings: Any
) -> LocalMask | None:  # fmt: skip
    """What transformers calls for a layer's mask: the rule alone, in the place of a mask of the whole row.

    Args:
        config: of the model.
        local_size: of the layer's window or chunks, if it has any.
        use_vmap: whether the model adds a rule of its own.
        settings: what else a mask is made of; segments follow from the layout.
    """
    if use_vmap:
        return LocalMask(is_custom=True)
    if local_size is None:
        return None
    is_window = local_size == getattr(config, "sliding_window", None)
    return LocalMask(local_size, is_chunked=not is_window and hasattr(config, "attention_chunk_size"))


@dataclass(frozen=True)
class Scores:
    """How scores are made of queries and keys, and attention of scores.

    Attributes:
        scaling: of the products; None is `1 / sqrt(d)`.
        dropout: share of the attention that is set to 0.
        window: how many tokens back a token sees, itself included; None is all.
        softcap: scores are `softcap * tanh(score / softcap)`; None is no cap.
        sinks: `[heads]`, one more score in the denominator of the softmax; None is none.
        chunk: a token sees the tokens of its chunk of so many alone; None is all.
    """

    scaling: float | None = None
    dropout: float = 0.0
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    chunk: int | None = None

    @property
    def is_plain(self) -> bool:
        """Whether they are those of scaled dot product attention."""
        return self.softcap is None and self.sinks is None and self.chunk is None


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: SegmentLayout, spans: Sequence[Span],
    scores: Scores,
) -> torch.Tensor:  # fmt: skip
    """Causal attention of each span's queries to its keys, by the quickest way that works here.

    Args:
        query: `[1, heads, Q, d]`, the spans' queries one after another.
        key, value: `[1, key_value_heads, T, d]`, in the order of `segments`.
        segments: where the keys lie.
        spans: `segments.spans`, or `segments.read_spans`.
        scores: how they are made.

    Returns:
        `[1, Q, heads, d]`.
    """
    if scores.is_plain and not scores.dropout and query.device.type != "cpu":
        varlen, _ = find_varlen(query.device, query.dtype, query.shape[-1], query.shape[1] // key.shape[1])
        if varlen is not None:
            return attend_varlen(varlen, query, key, value, segments, spans, scores)
    return attend_span_by_span(query, key, value, segments, spans, scores)


def attend_span_by_span(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: SegmentLayout, spans: Sequence[Span],
    scores: Scores,
) -> torch.Tensor:  # fmt: skip
    """`attend` with one scaled dot product attention for each span, or block by block where that cannot do it."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and scores.is_plain:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    span_queries = torch.split(query, [span.queries for span in spans], 2)
    keys, values = (torch.split(tensor, list(segments.lengths), 2) for tensor in (key, value))
    outputs = []
    for q, span in zip(span_queries, spans, strict=True):
        k, v = keys[span.segment], values[span.segment]
        if span.keys < k.shape[2]:
            k, v = k[:, :, : span.keys], v[:, :, : span.keys]
        if span.prefix is not None:
            k, v = torch.cat([keys[span.prefix], k], 2), torch.cat([values[span.prefix], v], 2)
        for queries_of, keys_of in _blocks(q.shape[2], k.shape[2], scores.window, masked=not scores.is_plain):
            some_q, some_k, some_v = q[:, :, queries_of], k[:, :, keys_of], v[:, :, keys_of]
            if not scores.is_plain:
                # computed again in the backward pass: autograd would keep the scores of all blocks
                outputs.append(
                    checkpoint(
                        _attend_block, some_q, some_k, some_v, scores, keys_of.start, use_reentrant=False,
                        preserve_rng_state=scores.dropout > 0,
                    )
                )  # fmt: skip
                continue
            causal = queries_of == keys_of and (scores.window is None or queries_of.stop <= scores.window)
            mask = None if causal else _mask(segments, some_q, some_k.shape[2], scores.window)
            outputs.append(
                F.scaled_dot_product_attention(
                    some_q, some_k, some_v, attn_mask=mask, dropout_p=scores.dropout, is_causal=causal,
                    scale=scores.scaling,
                )
            )  # fmt: skip
    return torch.cat(outputs, 2).transpose(1, 2).contiguous()


def _attend_block(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores, first_key: int
) -> torch.Tensor:  # fmt: skip
    """Attention of a block, in plain operations; its last query is at its last key.

    Args:
        q: `[1, heads, q, d]`.
        k, v: `[1, key_value_heads, k, d]`.
        scores: how they are made; they are fp32, whatever the inputs are.
        first_key: its place in the sequence.

    Returns:
        `[1, heads, q, d]`.
    """
    kv_heads, (num_q, head_dim), num_k = k.shape[1], q.shape[2:], k.shape[2]
    scaling = head_dim**-0.5 if scores.scaling is None else scores.scaling
    with torch.autocast(q.device.type, enabled=False):
        grouped = q[0].float().reshape(kv_heads, -1, head_dim)  # [kv_heads, groups * q, d]
        score = (grouped @ k[0].float().transpose(1, 2)).view(-1, num_q, num_k) * scaling  # [heads, q, k]
        if scores.softcap is not None:
            score = scores.softcap * torch.tanh(score / scores.softcap)
        places = torch.arange(first_key, first_key + num_k, device=q.device)
        seen = visible(places[num_k - num_q :], places, scores.window)
        if scores.chunk is not None:
            seen &= places[num_k - num_q :, None] // scores.chunk == places[None] // scores.chunk
        score = score.masked_fill(~seen, -torch.inf)
        if scores.sinks is not None:
            sinks = scores.sinks.float().view(-1, 1, 1).expand(-1, num_q, 1)
            share = torch.cat([score, sinks], 2).softmax(2)[..., :-1]
        else:
            share = score.softmax(2)
        share = F.dropout(share, scores.dropout).to(v.dtype).view(kv_heads, -1, num_k)
        return (share @ v[0]).view(1, -1, num_q, v.shape[3])


def _blocks(num_q: int, num_k: int, window: int | None, masked: bool = False) -> Iterator[tuple[slice, slice]]:
    """The queries of a span in parts, each with the keys that they may see.

    Queries that need no mask stay together. The others are cut into blocks, so that little is computed that a mask
    hides, and neither the work of a window nor its masks grow with the square of a sequence.

    Args:
        num_q, num_k: the span's; its last query is at the place of its last key.
        window: how many tokens back a query sees, itself included; None is all.
        masked: whether all are masked, so that no block is large.
    """
    before = num_k - num_q
    start = 0 if before or masked else min(num_q, window or num_q)
    if start:
        yield slice(0, start), slice(0, start)
    while start < num_q:
        end = min(start + MASKED_BLOCK, num_q)
        first = 0 if window is None else max(0, before + start - window + 1)
        yield slice(start, end), slice(first, before + end)
        start = end


def _mask(segments: SegmentLayout, query: torch.Tensor, num_k: int, window: int | None) -> torch.Tensor:
    """`[q, num_k]`, to be added to the scores of `query[1, heads, q, d]`, the last of which is at the last key.

    Made once for all layers and for all blocks of the same size: autograd keeps one of each.
    """
    key = ("mask", query.shape[2], num_k, window, query.dtype, query.device)
    masks = segments.derived.masks
    if key not in masks:
        places = torch.arange(num_k, device=query.device)
        seen = visible(places[num_k - query.shape[2] :], places, window)
        masks[key] = torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill_(~seen, -torch.inf)
    return masks[key]


def visible(queries: torch.Tensor, keys: torch.Tensor, window: int | None) -> torch.Tensor:
    """`[q, k]`, true where the query at place `queries[q]` of a sequence sees the key at `keys[k]`.

    A token sees itself and what is before it, with a window no more than the `window - 1` tokens before it.
    """
    distance = queries[:, None] - keys[None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


# --- one kernel for all spans


def attend_varlen(
    varlen: Callable[..., torch.Tensor], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    segments: SegmentLayout, spans: Sequence[Span], scores: Scores,
) -> torch.Tensor:  # fmt: skip
    """`attend` with one call of `varlen`, which aligns a span's queries with the last of its keys."""
    places, edges, longest = _boundaries(segments, spans, query.device)
    q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))  # [tokens, heads, d]; all views
    if places is not None:
        k, v = k.index_select(0, places), v.index_select(0, places)
    attended = varlen(
        q.contiguous(), k.contiguous(), v.contiguous(), *edges, *longest, scores.scaling,
        (-1 if scores.window is None else scores.window - 1, 0),
    )  # fmt: skip
    return attended[None]


def _boundaries(segments: SegmentLayout, spans: Sequence[Span], device: torch.device) -> Boundaries:
    known = segments.derived.boundaries
    key = (spans is segments.spans, device)
    if key not in known:
        known[key] = _make_boundaries(segments, spans, device)
    return known[key]


def _make_boundaries(segments: SegmentLayout, spans: Sequence[Span], device: torch.device) -> Boundaries:
    num_q = [span.queries for span in spans]
    num_k = [span.keys + (0 if span.prefix is None else segments.lengths[span.prefix]) for span in spans]
    places = None
    if spans is not segments.spans or not segments.is_plain:
        runs = [np.arange(start, start + n) for start, n in zip(segments.starts, segments.lengths, strict=True)]
        parts = [p for s in spans for p in ([] if s.prefix is None else [runs[s.prefix]]) + [runs[s.segment][: s.keys]]]
        places = _on(device, torch.from_numpy(np.concatenate(parts)))
    edges = [_on(device, torch.from_numpy(np.cumsum([0, *n], dtype=np.int32))) for n in (num_q, num_k)]
    return places, (edges[0], edges[1]), (max(num_q), max(num_k))


def _on(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` on `device`, copied without waiting for it."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


Varlen = Callable[..., torch.Tensor]  # (q, k, v, edges_q, edges_k, longest_q, longest_k, scale, window)


def torch_varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *sizes: Any) -> torch.Tensor:
    """PyTorch's variable-length attention."""
    from torch.nn.attention.varlen import varlen_attn

    *bounds, scale, window = sizes
    settings: Any = {"scale": scale, "window_size": window}
    if q.shape[1] != k.shape[1] and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        settings["enable_gqa"] = True  # torch 2.11 has no such switch, and takes fewer keys than queries without
    out = varlen_attn(q, k, v, *bounds, **settings)
    assert isinstance(out, torch.Tensor)
    return out


def repeated_varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *sizes: Any) -> torch.Tensor:
    """PyTorch's, for versions that want a key for each query."""
    groups = q.shape[1] // k.shape[1]
    return torch_varlen(q, *(tensor.repeat_interleave(groups, 1) for tensor in (k, v)), *sizes)


def flash_varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *sizes: Any) -> torch.Tensor:
    """flash-attn's, where that package is installed."""
    from flash_attn import flash_attn_varlen_func

    *bounds, scale, window = sizes
    out: torch.Tensor = flash_attn_varlen_func(q, k, v, *bounds, softmax_scale=scale, causal=True, window_size=window)
    return out


@functools.lru_cache(maxsize=8)
def find_varlen(
    device: torch.device, dtype: torch.dtype, head_dim: int, groups: int, kernels: tuple[Varlen, ...] = ()
) -> tuple[Varlen | None, str | None]:
    """The first kernel that gives the plain way's result and gradients on `device`, or None and why none does.

    Args:
        device, dtype, head_dim, groups: of the queries; `groups` of them share a key.
        kernels: to choose from; by default PyTorch's and flash-attn's.
    """
    if dtype not in (torch.bfloat16, torch.float16) and not kernels:
        return None, f"the kernels for spans compute in 16 bit only, not in {dtype}"
    problems = []
    for kernel in kernels or (torch_varlen, repeated_varlen, flash_varlen):
        try:
            difference = _varlen_difference(kernel, device, dtype, head_dim, groups)
        except (ImportError, RuntimeError, TypeError, ValueError) as error:
            problems.append(" ".join(str(error).split()) or type(error).__name__)
            continue
        if difference < _VARLEN_TOLERANCE:
            return kernel, None
        problems.append(f"its result differs by {difference:.2g}")
    return None, "; ".join(problems)


def _varlen_difference(kernel: Varlen, device: torch.device, dtype: torch.dtype, head_dim: int, groups: int) -> float:
    """The largest difference of outputs and gradients to the plain way, with and without a window."""
    segments = SegmentLayout((4, 3, 5), (None, 0, 0), (3, 5, 9, 10))
    found = 0.0
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for spans, window in ((segments.spans, None), (segments.read_spans, None), (segments.spans, 3)):
            generator = torch.Generator().manual_seed(0)
            queries = sum(span.queries for span in spans)
            shapes = ((1, 2 * groups, queries, head_dim), (1, 2, 12, head_dim), (1, 2, 12, head_dim))
            drawn = (torch.randn(shape, generator=generator, device="cpu") for shape in shapes)
            q, k, v = (tensor.to(device, dtype).requires_grad_() for tensor in drawn)
            results = []
            for out in (
                attend_varlen(kernel, q, k, v, segments, spans, Scores(window=window)),
                attend_span_by_span(q, k, v, segments, spans, Scores(window=window)),
            ):
                results.append([out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
            for mine, plain in zip(*results, strict=True):
                scale = plain.detach().abs().max().clamp_min(1.0)
                found = max(found, float((mine - plain).detach().abs().max() / scale))
    return found


@contextlib.contextmanager
def packed_attention(model: Any) -> Iterator[None]:
    """Use attention by segment inside the block; on leaving, the model's own attention is back (for generation)."""
    before = model.config._attn_implementation
    register()
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def register() -> None:
    """Make the functions known to transformers under `NAME`; calling it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionMaskInterface.register(NAME, segment_mask)
    AttentionInterface.register(NAME, segment_attention)
