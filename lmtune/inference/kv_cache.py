"""The KV caches of several sequences as one batch: rows join, leave, and are copied out.

Rows are aligned at their ends, as in a batch that is padded on the left, so that every row writes its next token into
the same column, and transformers' own masks hold for full and sliding attention. A row of `n` tokens has its keys in
the last `n` columns. Layers with states in place of keys (linear attention) have no columns.
"""

from __future__ import annotations

import copy
from typing import Any, TypeGuard

import torch
from transformers import Cache
from transformers.cache_utils import (
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

_ROOM = 64  # columns ahead of need


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """A layer of full attention with room ahead: a token is written beside the others instead of copying them."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        self.__dict__.update(layer.__dict__)
        self.forget_room()

    def forget_room(self) -> None:
        """Write into what `keys` and `values` are part of no more: they are other tensors now, or shared."""
        self._rooms: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append `[R, H, T, D]`; returns all keys and values, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        end = length + key_states.shape[-2]
        if self._rooms is None or self._rooms[0].shape[-2] < end:
            self._rooms = _larger(self.keys, key_states, length), _larger(self.values, value_states, length)
        for room, new in zip(self._rooms, (key_states, value_states), strict=True):
            room[..., length:end, :] = new
        self.keys, self.values = (room[..., :end, :] for room in self._rooms)
        return self.keys, self.values


def _larger(held: torch.Tensor, new: torch.Tensor, length: int) -> torch.Tensor:
    """A tensor that begins with `held` and has room for `new` and more."""
    room = new.new_empty(*new.shape[:-2], length + new.shape[-2] + _ROOM, new.shape[-1])
    if length:
        room[..., :length, :] = held
    return room


_SLIDING = (DynamicSlidingWindowLayer, LinearAttentionAndSlidingWindowAttentionLayer)
_WITH_KEYS = (DynamicLayer, GrowingLayer, LinearAttentionAndFullAttentionLayer, *_SLIDING)
_WITH_STATES = (
    LinearAttentionLayer, LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer,
)  # fmt: skip
_KNOWN = {DummyLayer, *_WITH_KEYS, *_WITH_STATES}


def is_joinable(cache: object) -> TypeGuard[Cache]:
    """Whether all of a cache is of kinds whose rows can be put together."""
    return isinstance(cache, Cache) and all(type(layer) in _KNOWN for layer in cache.layers)


def with_room(cache: Cache) -> Cache:
    """The cache itself, its plain layers replaced by `GrowingLayer`."""
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = GrowingLayer(layer)
    return cache


def join(cache: Cache, length: int, other: Cache, other_length: int) -> None:
    """Put the rows of `other` below those of `cache`; both have as many columns as their length, in tokens, says."""
    columns = max(length, other_length)
    for layer, second in zip(cache.layers, other.layers, strict=True):
        if _has_keys(layer):
            width = _width(layer, columns)
            keys, values = ((layer.keys, second.keys), (layer.values, second.values))
            _put(layer, *(torch.cat([_padded(one, width) for one in pair]) for pair in (keys, values)))
            if isinstance(layer, _SLIDING):
                layer.cumulative_length = columns
        for states, others in zip(_states(layer), _states(second), strict=True):
            for index, state in states.items():
                if state is not None and (below := others[index]) is not None:
                    states[index] = torch.cat([state, below])


def select(cache: Cache, length: int, rows: list[int], columns: int) -> None:
    """Keep some rows, and of `length` columns the last `columns`."""
    for layer in cache.layers:
        if _has_keys(layer):
            if isinstance(layer, _SLIDING):
                layer.cumulative_length -= length - columns
            width = _width(layer, columns)
            chosen = torch.tensor(rows, device=layer.keys.device)
            parts = (part[..., part.shape[-2] - width :, :] for part in (layer.keys, layer.values))
            _put(layer, *(part.index_select(0, chosen) for part in parts))
        for states in _states(layer):
            for index, state in states.items():
                if state is not None:
                    states[index] = state.index_select(0, torch.tensor(rows, device=state.device))


def copy_of(cache: Cache) -> Cache:
    """A cache of its own with the same content; tensors are shared, and are replaced when it is written to."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in copied.layers:
        if isinstance(layer, GrowingLayer):
            layer.forget_room()
        for name in ("conv_states", "recurrent_states"):
            if isinstance(layer, _WITH_STATES):  # they are written in place
                states = getattr(layer, name)
                setattr(layer, name, {key: None if one is None else one.clone() for key, one in states.items()})
        for name, value in vars(layer).items():
            if isinstance(value, dict) and name not in ("conv_states", "recurrent_states"):
                setattr(layer, name, dict(value))
    return copied


def can_crop(cache: Cache, length: int) -> bool:
    """Whether tokens can be taken off the end: not where states or a window that has moved on have forgotten others."""
    return all(
        not isinstance(layer, _WITH_STATES) and not (isinstance(layer, _SLIDING) and length >= layer.sliding_window)
        for layer in cache.layers
    )


def crop(cache: Cache, length: int, keep: int) -> None:
    """Keep the first `keep` of `length` columns."""
    for layer in cache.layers:
        if _has_keys(layer):
            _put(layer, layer.keys[..., :keep, :], layer.values[..., :keep, :])
            if isinstance(layer, _SLIDING):
                layer.cumulative_length = keep


def num_bytes(cache: Cache) -> int:
    """What the tensors of a cache hold."""
    tensors = [tensor for layer in cache.layers if _has_keys(layer) for tensor in (layer.keys, layer.values)]
    tensors += [state for layer in cache.layers for states in _states(layer) for state in states.values()
                if state is not None]  # fmt: skip
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _has_keys(layer: Any) -> TypeGuard[DynamicLayer]:
    return isinstance(layer, _WITH_KEYS) and layer.is_initialized and layer.keys is not None


def _put(layer: DynamicLayer, keys: torch.Tensor, values: torch.Tensor) -> None:
    layer.keys, layer.values = keys, values
    if isinstance(layer, GrowingLayer):
        layer.forget_room()


def _states(layer: Any) -> list[dict[int, torch.Tensor | None]]:
    return [layer.conv_states, layer.recurrent_states] if isinstance(layer, _WITH_STATES) else []


def _width(layer: DynamicLayer, columns: int) -> int:
    """How many of so many columns a layer holds."""
    return min(columns, layer.sliding_window - 1) if isinstance(layer, _SLIDING) else columns


def _padded(states: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nn.functional.pad(states, (0, 0, width - states.shape[-2], 0))
