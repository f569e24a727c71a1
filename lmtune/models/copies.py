"""A second model object over the weights of a loaded one: what several runs of one process do with one base.

    copy = over_same_weights(base, own=())      # its own modules and config; the tensors are those of `base`

A run changes its model's modules: an adapter is put around them, some get another class, some are checkpointed. All of
that happens to the copy, which is thrown away with it, so that the next run finds the base as it was loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def over_same_weights(base: PreTrainedModel, own: Iterable[torch.nn.Parameter] = ()) -> PreTrainedModel:
    """A copy of `base` that holds the same frozen weights.

    Args:
        base: without an adapter, and never run itself.
        own: parameters whose values the copy may change, so it has its own of these.
    """
    changing = {id(parameter) for parameter in own}
    memo: dict[int, Any] = {}
    for parameter in base.parameters():
        if id(parameter) not in changing:
            memo[id(parameter)] = _same(parameter)
            if (state := getattr(parameter, "quant_state", None)) is not None:  # of 4 bit, which the layer names too
                memo[id(state)] = state
    return copy.deepcopy(base, memo)


def _same(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """The parameter itself; a quantized one, whose layer moves its attributes to and fro, as a second object."""
    if type(parameter) is torch.nn.Parameter:
        return parameter
    again: torch.nn.Parameter = torch.Tensor._make_subclass(type(parameter), parameter.data, parameter.requires_grad)
    again.__dict__.update(parameter.__dict__)
    return again
