"""Merge an adapter into its base: W + scaling · B A, tensor by tensor, and verify the result before it gets its name.

A base trained over in 4 or 8 bit is dequantized first: a merge into the codes would quantize the sum again, which moves
the logits by several percent. `into="original"` adds to the base as published instead, which differs from what was
trained by the quantization error. A tensor without a change is copied bit for bit; the others are computed in fp32 a
block at a time (`block_weights`) and written in their stored dtype, or in fp32 where asked. Then `verify` compares the
folder with the adapter over the same weights, which proves the merge, and with the model as it was trained; where
layers in int8 have no adapter that differs a little more, for bitsandbytes rounds activations to 8 bits there.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lmtune.config.schema import ModelConfig
from lmtune.errors import LmtuneError, ModelError
from lmtune.io.atomic import name_disk_errors, new_folder
from lmtune.io.console import progress
from lmtune.models.base import (
    DTYPES,
    base_fingerprint,
    checked_path,
    dtype_of,
    load_model,
    resolve_name,
    stored_dtype,
    stored_files,
    weight_files,
)
from lmtune.models.block_weights import BlockWeights, recompute_buffers
from lmtune.models.device import default_device, free_memory
from lmtune.models.head import head_weights
from lmtune.models.model_folder import (
    GENERATION,
    TOKENIZER_FILES,
    Layout,
    StoredWeights,
    Tensors,
    WeightWriter,
    classifier_keys,
    generation_config,
    merged_config,
    read_tree,
    write_tokenizer,
    write_tree,
)
from lmtune.models.structure import base_of, empty_model
from lmtune.models.tuning.adapter_files import Into, Metadata
from lmtune.models.tuning.lora import load_adapter
from lmtune.models.validate import CONFIG
from lmtune.models.verify import LogitsReader, MergeReport, require_bounds, verify

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The most that logits may differ, relative to the largest one: what rounding the weights to their dtype costs.
BOUNDS = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
INT8_ACTIVATIONS = 8e-2  # what rounding activations to 8 bits adds to the comparison with the trained model
_ROOM_ON_A_GPU = 3  # times the stored weights: the base, the merged model, and what computes with them


def merge(
    base: ModelConfig, adapter: Path, output: Path, into: Into, sequences: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int],
    describe: Callable[[Path, MergeReport], None] | None = None, accept_difference: bool = False, exact: bool = False,
) -> MergeReport:  # fmt: skip
    """Merge, write `output`, load it again, compare, and only then give it its name.

    Args:
        base: the model that was trained over, with its quantization.
        adapter: the adapter folder, with the tokenizer's files and a generation config.
        output: the folder to write; an earlier one is replaced.
        into: which base weights to add to.
        sequences: token ids of held-out rows, for the comparison.
        tokenizer: that of the adapter folder.
        stop_token_ids: the end of an answer first.
        describe: adds to the folder, before it gets its name, what else belongs there.
        accept_difference: keep a merge that differs by more than its bound, and say so in the report.
        exact: write what the adapter changes in fp32, whatever the base is stored in.

    Raises:
        LmtuneError: a weight is not finite, or the model differs by more than the bound; nothing is left behind.
        ConfigError: another process is writing `output` now.
    """
    with new_folder(output) as staging:
        source = _Source(base, adapter, into, sequences, exact)
        with name_disk_errors(output):
            with progress("merging"):
                is_untied = _write_weights(source, staging)
            _write_texts(source, adapter, staging, tokenizer, stop_token_ids, is_untied)
            bound = BOUNDS[source.dtype]
            to_trained = BOUNDS[source.trained_dtype] + (INT8_ACTIVATIONS if source.rounds_activations else 0)
            report = verify(
                staging, sequences, reference=source.reference, trained=source.trained, bound=bound,
                bound_to_trained=max(bound, to_trained),  # the trained model rounds activations to its dtype as well
                into=into, dtype=source.dtype, device=source.device,
            )  # fmt: skip
            report = require_bounds(replace(report, update_kept=source.weights.update_kept), accept_difference)
            if describe is not None:
                describe(staging, report)
    return report


class _Source:
    """What is merged: the base with the adapter on it, its files, and how it was trained.

    Attributes:
        device: that computes.
        weights: those that the adapter is merged into, with the adapter.
        stored, layout: the base's files, and the names in them.
        config: the content of the base's config.json.
        empty: the base on the meta device.
        trained_dtype: in which the model was trained.
        dtype: of the weights that are written, unless their own is another.
        is_widened: whether that is more than the base is stored in.
        trained: the model as it was trained; None where that is the same as `reference`.
        reference: the adapter over these weights in fp32.
        rounds_activations: whether an int8 layer does.
    """

    def __init__(
        self, base: ModelConfig, adapter: Path, into: Into, sequences: Sequence[Sequence[int]], exact: bool
    ) -> None:  # fmt: skip
        checked_path(base.name)
        self.device, self.trained_dtype = _merge_device(base), dtype_of(base, default_device())
        model = self._load(base, adapter)
        self.dtype = torch.float32 if exact else stored_dtype(base)
        self.is_widened = self.dtype != stored_dtype(base)
        self.config = read_tree(stored_files(base, [CONFIG])[CONFIG])
        self.stored = StoredWeights(weight_files(base))
        self.empty = empty_model(resolve_name(base.name), base.revision, Metadata.read(adapter).head)
        self.layout = Layout(self.empty, self.stored)
        self.rounds_activations = _rounds_activations(model)
        is_quantized = bool(getattr(base_of(model), "is_quantized", False))
        weights = self._by_block(model)
        self.trained: LogitsReader | None = None
        if is_quantized or self.trained_dtype != torch.float32:
            self.trained = LogitsReader(weights.base, partial(weights.in_dtype, self.trained_dtype))
        if into == "original" and base.quantization != "none" and is_quantized and self.trained is not None:
            self.trained.precompute(sequences)
            weights.free_layers()
            del model
            gc.collect()
            weights = self._by_block(self._load(replace(base, quantization="none"), adapter))
        self.weights = weights
        self.reference = LogitsReader(weights.base, partial(weights.in_dtype, torch.float32, dequantize=True))

    def _load(self, base: ModelConfig, adapter: Path) -> torch.nn.Module:
        """The base with the adapter: in the dtype of training if it is quantized, else in that of its files."""
        dtype = self.trained_dtype
        if base.quantization == "none":
            try:
                config = stored_files(base, [CONFIG]).get(CONFIG)
                if config is None or "quantization_config" not in read_tree(config):
                    dtype = stored_dtype(base)
            except (ModelError, ValueError):  # not downloaded yet, or damaged, which `load_model` reports
                pass
        name = next(name for name, kind in DTYPES.items() if kind == dtype)
        offload = base.offload if self.device.type == "cpu" else "none"  # a GPU was chosen because all fits
        read = ModelConfig(**{**asdict(base), "dtype": name, "offload": offload})
        model = load_model(read, self.device, Metadata.read(adapter).head)
        merged: torch.nn.Module = load_adapter(model, adapter, base_fingerprint(base))
        return merged

    def _by_block(self, model: torch.nn.Module) -> BlockWeights:
        """The model by blocks, with the values of the files where they were read in fewer bits."""
        weights = BlockWeights(model)
        recompute_buffers(weights.base)
        for name, _ in self.empty.named_parameters():
            source = self.layout.source(name)
            if source is None or not self.stored.entries[source].is_float or weights.is_quantized(name):
                continue
            if weights.is_trained_whole(name):
                continue
            weight, entry = weights.parameter(name), self.stored.entries[source]
            if weight.dtype not in (entry.dtype, torch.float32) and tuple(weight.shape) == entry.shape:
                weight.data = entry.read().to(weight.device)
        return weights


def _merge_device(base: ModelConfig) -> torch.device:
    """A GPU if base and merged model clearly fit into its free memory, else the CPU."""
    device = default_device()
    if device.type == "cuda":
        try:
            size = sum(file.stat().st_size for file in weight_files(base))
        except ModelError:  # not downloaded yet
            return torch.device("cpu")
        if _ROOM_ON_A_GPU * size < free_memory(device):
            return device
    return torch.device("cpu")


def _rounds_activations(model: Any) -> bool:
    """Whether a layer in int8 is bitsandbytes' own, without an adapter whose layer computes with the weights alone."""
    fused = {id(m.get_base_layer()) for m in model.modules() if hasattr(m, "lmtune_weight")}
    return any(type(m).__name__ == "Linear8bitLt" and id(m) not in fused for m in model.modules())


# --- writing


def _write_weights(source: _Source, folder: Path) -> bool:
    """Write the weights; returns whether the head, which was tied to the embedding, has become a weight of its own."""
    weights, layout, entries = source.weights, source.layout, source.stored.entries
    changed_names = weights.weight_names()
    names = _stored_once(source, changed_names)
    groups, own_head = {name: layout.group(name) for name in names}, head_weights(source.empty)
    coming: Tensors = {}
    for group in dict.fromkeys(groups.values()):
        pieces = layout.written({name: _as_stored(source, name, weights.meta(name)) for name in group})
        for name, piece in pieces.items():
            entry = entries.get(name)
            is_as_before = entry is not None and entry.is_float and not source.is_widened
            dtype = entry.dtype if entry is not None and is_as_before else source.dtype
            coming[name] = piece.to(torch.float32 if name in own_head else dtype)  # in which it computes
    gone = layout.replaced(other for group in groups.values() for other in group)
    if own_head:
        gone |= layout.unused()  # the head of the language model
    copies = _untied(source, changed_names)
    for name, entry in copies.items():
        coming[name] = torch.empty(entry.shape, dtype=entry.dtype, device="meta")

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, entry in copies.items():
            yield name, entry.read()
        for changed in weights.merged(source.dtype):
            for group in dict.fromkeys(groups[name] for name in changed if name in groups):
                merged = {name: _as_stored(source, name, weights.parameter(name).data.float()) for name in group}
                for name, piece in layout.written(merged).items():
                    yield name, _require_finite(name, piece.to(coming[name].dtype))

    WeightWriter(source.stored, coming, gone).write(folder, tensors())
    return any(0 < len(tied & set(changed_names)) < len(tied) for tied in _ties(source.empty))


def _stored_once(source: _Source, names: Sequence[str]) -> list[str]:
    """The changed weights without those that are tied to another one and have no stored tensor of their own."""
    kept = [tied & set(names) for tied in _ties(source.empty)]
    left = {name for tied in kept if len(tied) > 1 for name in tied if source.layout.source(name) is None}
    return [name for name in names if name not in left or all(name not in tied or tied <= left for tied in kept)]


def _ties(empty: PreTrainedModel) -> list[set[str]]:
    """The sets of names under which one weight of a model stands."""
    names: dict[int, set[str]] = {}
    for name, parameter in empty.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return [tied for tied in names.values() if len(tied) > 1]


def _untied(source: _Source, changed: Sequence[str]) -> dict[str, Any]:
    """What must be stored on its own now: the other name of a stored weight that was tied and is changed."""
    found = {}
    for tied in _ties(source.empty):
        for name in tied & set(changed):
            if (stored := source.layout.source(name)) is None:
                continue
            for other in tied - set(changed):
                if source.layout.source(other) is None:
                    found[other] = source.stored.entries[stored]
    return found


def _as_stored(source: _Source, name: str, weight: torch.Tensor) -> torch.Tensor:
    """A weight in the orientation of the files: bitsandbytes transposes GPT-2's layers."""
    from transformers.pytorch_utils import Conv1D

    owner = name.rpartition(".")[0]
    if weight.dim() == 2 and source.weights.is_quantized(name):
        return weight.T if isinstance(source.empty.get_submodule(owner), Conv1D) else weight
    return weight


def _require_finite(name: str, weight: torch.Tensor) -> torch.Tensor:
    if weight.numel() and not all(bool(torch.isfinite(end)) for end in weight.aminmax()):
        raise LmtuneError(
            f"{name}: the merged weight is not finite in {str(weight.dtype).removeprefix('torch.')}: the adapter's "
            "values are too large; nothing was kept; train it again, with a smaller train.learning_rate"
        )
    return weight


def _write_texts(
    source: _Source, adapter: Path, folder: Path, tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int],
    is_untied: bool,
) -> None:  # fmt: skip
    """Write the configs and the tokenizer's files."""
    dtype = str(source.dtype).removeprefix("torch.")
    tree = merged_config(source.config, dtype, stop_token_ids, is_untied, source.is_widened)
    before, rows = (model.get_input_embeddings().weight.shape[0] for model in (source.empty, source.weights.base))
    for part in (tree, *(value for value in tree.values() if isinstance(value, dict))):
        if part.get("vocab_size") == before:  # new tokens have added rows
            part["vocab_size"] = rows
    of_classifier = classifier_keys(source.empty)
    write_tree(folder / CONFIG, {**tree, **of_classifier})
    if not of_classifier:
        tuned = read_tree(adapter / GENERATION)
        write_tree(folder / GENERATION, generation_config(tuned, stop_token_ids, tokenizer.pad_token_id))
    files = {name: adapter / name for name in TOKENIZER_FILES if (adapter / name).is_file()}
    write_tokenizer(tokenizer, files, folder, tokenizer.chat_template, stop_token_ids[0])
