"""A plain model folder in which some of a base's weights are others: what full and partial tuning save.

    write_changed(base, model, {"model.norm.weight": tensor}, folder, stop_token_ids=(2,))

As in a merge, the files keep the names and the order that the base published, tied weights stay tied, and a tensor
without a change is copied bit for bit. A changed one is stored in the wider of two types, the stored one and that of
computation: nothing that the training computed with is rounded away.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lmtune.config.schema import ModelConfig
from lmtune.io.atomic import name_disk_errors
from lmtune.models.base import DTYPES, stored_files, weight_files
from lmtune.models.head import head_weights
from lmtune.models.model_folder import (
    Layout,
    StoredWeights,
    Tensors,
    WeightWriter,
    classifier_keys,
    merged_config,
    read_tree,
    write_tree,
)
from lmtune.models.validate import CONFIG

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def write_changed(
    base: ModelConfig, model: PreTrainedModel, changed: Mapping[str, torch.Tensor], folder: Path,
    stop_token_ids: Sequence[int],
) -> None:  # fmt: skip
    """Write weights and config of `base` with `changed` weights into an existing folder, tensor by tensor.

    Args:
        base: the stored model; its `dtype` is that of computation.
        model: it in memory, for stored tensors that hold a changed weight and others together.
        changed: weights by their names in the model, each once; they are asked for one after another.
        folder: where to.
        stop_token_ids: the end of an answer first.

    Raises:
        OSError: names the file that could not be written.
    """
    with torch.device("meta"):
        empty = type(model)(model.config)
    stored = StoredWeights(weight_files(base))
    layout = Layout(empty, stored)
    sources = _with_tied(empty, layout, changed)
    groups = list(dict.fromkeys(layout.group(name) for name in sources))
    computed, own_head = DTYPES[base.dtype], head_weights(empty)

    def weight_of(name: str) -> torch.Tensor:
        weight = changed[sources[name]] if name in sources else model.get_parameter(name).detach()
        return weight.float()

    coming: Tensors = {}
    for group in groups:
        # what is stored of a group of weights is made of them by copies and views
        for name, piece in layout.written({name: empty.get_parameter(name).detach() for name in group}).items():
            entry = stored.entries.get(name)
            dtype = computed if entry is None or entry.dtype is None else torch.promote_types(entry.dtype, computed)
            dtype = torch.float32 if name in own_head else dtype  # it computes in fp32 in whatever dtype the body does
            coming[name] = piece.to(dtype)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for group in groups:
            for name, piece in layout.written({name: weight_of(name) for name in group}).items():
                yield name, piece.to(coming[name].dtype)

    gone = layout.replaced(name for group in groups for name in group)
    if own_head:
        gone |= layout.unused()  # the head of the language model
    with name_disk_errors(folder):
        WeightWriter(stored, coming, gone).write(folder, tensors())
        widest = computed
        for key, tensor in coming.items():
            widest = widest if key in own_head else torch.promote_types(widest, tensor.dtype)
        name = str(widest).removeprefix("torch.")
        tree = merged_config(read_tree(stored_files(base, [CONFIG])[CONFIG]), name, stop_token_ids, untied=False)
        write_tree(folder / CONFIG, {**tree, "dtype": name, "torch_dtype": name, **classifier_keys(model)})


def _with_tied(empty: PreTrainedModel, layout: Layout, changed: Iterable[str]) -> dict[str, str]:
    """The weights to write, and of each the one in `changed` that it is: itself, or one that it is tied to."""
    own = {name: id(parameter) for name, parameter in empty.named_parameters(remove_duplicate=False)}
    names = set(changed)
    values = {own[name]: name for name in names}
    return {
        name: values[same] for name, same in own.items()
        if name in names or (same in values and layout.source(name) is not None)
    }  # fmt: skip
