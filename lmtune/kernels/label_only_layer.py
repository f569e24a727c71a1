"""The last layer only where a token is trained.

After the last attention nothing looks across positions any more, so the last layer's output is needed only where it
predicts a trained token: its queries, output projection and MLP run on those positions, its keys and values on all.

How, without knowing the model's code: the layer's own forward runs twice. The first time on all positions, until its
attention has keys and values; there a private exception ends it. The second time on the few positions, where attention
finds the keys and values of the first. Which linear layer makes only queries is found by trying: with its output set
to zero, queries change and keys and values do not; it is left out of the first run.

    install(layer)          # the layer object stays the model's own; only its class becomes a subclass

The caller compares the result with the plain one before relying on it.
"""

from __future__ import annotations

from typing import Any

import torch

from lmtune.batching.packing import SegmentLayout
from lmtune.kernels.attention import Scores, attend


class _KeysAndValues(Exception):
    """Carries keys and values out of the first run."""

    def __init__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        super().__init__()
        self.query, self.key, self.value = query, key, value


class _Collect:
    """What attention calls in the first run."""

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> torch.Tensor:
        """Hand over what was projected; never returns."""
        raise _KeysAndValues(query, key, value)


class _Selected:
    """What attention calls in the second run: few queries `[1, heads, P, d]` against the keys of the first run."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor) -> None:
        self.key, self.value = key, value

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: SegmentLayout, scores: Scores
    ) -> torch.Tensor:
        """`[1, P, heads, d]` for the read positions of `segments`."""
        return attend(query, self.key, self.value, segments, segments.read_spans, scores)


def install(layer: Any) -> None:
    """Prepare a model's last decoder layer.

    The layer then takes `read_positions` (`[P]`, those of the segments, ascending) as an extra argument of the model's
    forward, and with it returns `[1, P, D]`; without it, nothing is different.
    """
    if not type(layer).__name__.startswith("LabelOnly"):
        layer.__class__ = _label_only_class(type(layer))
    _set_query_linear(layer, None)


def find_query_linear(layer: Any, run: Any) -> None:
    """Find the linear layer that makes queries and nothing else, by running the first run with each set to zero.

    Args:
        layer: prepared by `install`.
        run: a function that runs the model on a probe with `read_positions`.
    """
    layer.lmtune_probe = {}
    try:
        run()
        if "projected" not in layer.lmtune_probe:
            raise ValueError("the model does not hand extra arguments on to its layers")
        whole = layer.lmtune_probe.pop("projected")
        for name, module in list(layer.named_modules()):
            if not hasattr(module, "in_features") or ".lora_" in name or name.endswith("base_layer"):
                continue
            _set_query_linear(layer, module)
            run()
            query, key, value = layer.lmtune_probe.pop("projected")
            if not torch.equal(query, whole[0]) and torch.equal(key, whole[1]) and torch.equal(value, whole[2]):
                return
        _set_query_linear(layer, None)
    finally:
        layer.lmtune_probe = None


def _set_query_linear(layer: Any, linear: Any) -> None:
    """Note the linear layer that makes queries, without making it a module of the layer a second time."""
    object.__setattr__(layer, "lmtune_query_linear", linear)


def _label_only_class(kind: type[Any]) -> type[Any]:
    """A subclass of the model's layer class that can run for some positions only."""

    def forward(
        self: Any, hidden_states: torch.Tensor, *args: Any, read_positions: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        if read_positions is None:
            return kind.forward(self, hidden_states, *args, **kwargs)
        with _zero_output(self.lmtune_query_linear):
            try:
                kind.forward(self, hidden_states, *args, **kwargs, label_layer=_Collect())
                raise AssertionError("the last layer did not call its attention")
            except _KeysAndValues as projected:
                found = projected.with_traceback(None)  # its frames hold tensors, and this one holds it
        if getattr(self, "lmtune_probe", None) is not None:
            self.lmtune_probe["projected"] = (found.query, found.key, found.value)
        few = _Selected(found.key, found.value)
        total = hidden_states.shape[1]
        args, kwargs = (at_positions(part, read_positions, total) for part in (args, kwargs))
        return kind.forward(self, hidden_states[:, read_positions], *args, **kwargs, label_layer=few)

    return type(f"LabelOnly{kind.__name__}", (kind,), {"forward": forward})


class _zero_output:
    """Make a linear layer return zeros inside the block, without computing anything."""

    def __init__(self, linear: Any) -> None:
        self.linear = linear

    def __enter__(self) -> None:
        if self.linear is not None:
            width = self.linear.out_features
            self.linear.forward = lambda x, *args, **kwargs: x.new_zeros(1).expand(*x.shape[:-1], width)

    def __exit__(self, *exception: Any) -> None:
        if self.linear is not None:
            del self.linear.forward


def at_positions(value: Any, positions: torch.Tensor, total: int) -> Any:
    """`value` with every tensor `[1, total, …]` in it cut down to `positions`."""
    if isinstance(value, torch.Tensor) and value.dim() >= 2 and value.shape[:2] == (1, total):
        return value[:, positions]
    if isinstance(value, (tuple, list)):
        return type(value)(at_positions(item, positions, total) for item in value)
    if isinstance(value, dict):
        return {key: at_positions(item, positions, total) for key, item in value.items()}
    return value
