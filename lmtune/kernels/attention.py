"""Attention by document: packed rows attend within themselves, at the cost of their own lengths only.

A step's rows lie one after another in a single sequence. The stock way to keep them apart is a mask of the whole
sequence squared; here each run of tokens goes through PyTorch's scaled dot product attention alone, or behind the
prefix that it shares with others. The function is registered under a name with transformers' public
`AttentionInterface`, so no model code is touched; the layout reaches it as an extra argument of the model's forward.

    with packed_attention(model):
        model(input_ids=…, position_ids=…, layout=Layout.of_documents(5, 7))
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from lmtune.data.packing import Layout

NAME = "lmtune_by_document"


def attention_by_document(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    label_layer: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document.

    Args:
        module: the attention layer, unused but part of transformers' interface.
        query: `[1, heads, T, d]`.
        key, value: `[1, key_value_heads, T, d]`.
        attention_mask: None; transformers builds no mask for an attention it does not know.
        scaling: of the scores; None is `1 / sqrt(d)`.
        layout: which tokens belong together.
        sliding_window: how many tokens back a token sees, itself included; None is all.
        label_layer: set in the last layer, which takes keys and values first and few queries later; see
            `lmtune.kernels.last_layer`.

    Returns:
        `[1, T, heads, d]` and None for the weights, which are never formed.

    Raises:
        NotImplementedError: the model wants soft-capped scores or attention sinks, which this kernel does not have.
    """
    if softcap is not None or s_aux is not None or attention_mask is not None:
        raise NotImplementedError("soft-capped scores, attention sinks and masks need the model's own attention")
    assert layout is not None
    if label_layer is not None:
        return label_layer.attend(query, key, value, layout, scaling, dropout, sliding_window), None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    queries, keys, values = (torch.split(tensor, list(layout.lengths), 2) for tensor in (query, key, value))
    outputs = []
    for index, prefix in enumerate(layout.prefixes):
        q, k, v, mask = queries[index], keys[index], values[index], None
        if prefix is not None:
            k, v = torch.cat([keys[prefix], k], 2), torch.cat([values[prefix], v], 2)
        if prefix is not None or (sliding_window is not None and q.shape[2] > sliding_window):
            places = torch.arange(k.shape[2], device=q.device)
            mask = visible(places[k.shape[2] - q.shape[2] :], places, sliding_window)
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
            )
        )
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


def visible(queries: torch.Tensor, keys: torch.Tensor, window: int | None) -> torch.Tensor:
    """`[q, k]`, true where the query at place `queries[q]` of a document sees the key at `keys[k]`.

    A token sees itself and what is before it, with a window no more than the `window - 1` tokens before it.
    """
    distance = queries[:, None] - keys[None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


@contextlib.contextmanager
def packed_attention(model: Any) -> Iterator[None]:
    """Use attention by document inside the block; on leaving, the model's own attention is back (for generation)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = base.config._attn_implementation
    register()
    base.set_attn_implementation(NAME)
    try:
        yield
    finally:
        base.set_attn_implementation(before)


def register() -> None:
    """Make the function known to transformers under `NAME`; calling it again changes nothing."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention_by_document)
