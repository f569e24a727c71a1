"""Merging: the adapter's product added into the base's weights, tensor by tensor, and proof that nothing else changed.

For a base trained over in 4 or 8 bit the quantised weights are first turned back into numbers: merging into them as
they are would quantise the sum again, which moves the logits by several percent. So by default the merged model is
the one that was trained. `into="original"` adds the adapter to the base as published instead, which differs from what
was trained by the quantisation error; how much is measured and said.

The base's files are gone through in their own layout: a tensor without a change is copied bit for bit, the others are
computed in fp32 a block at a time and written in the dtype that they were stored in. The written folder is loaded
again by plain transformers, its weights left on the disk, and its logits are compared twice, row by row: with the
adapter over the same weights, which proves the merge, and with the model as it was trained. So a merge holds the base
as it is stored, one block in fp32, and the logits of one row. Where layers in int8 have no adapter the second
comparison differs a little more, because bitsandbytes rounds activations to 8 bits there, which no merged model does.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from lmtune.config.schema import ModelConfig
from lmtune.errors import LmtuneError, ModelError
from lmtune.io.atomic import name_disk_errors, new_folder
from lmtune.io.console import progress, warn
from lmtune.models.base import (
    DTYPES,
    base_fingerprint,
    check_files,
    compute_dtype,
    load_model,
    resolve_name,
    stored_dtype,
    stored_files,
    weight_files,
)
from lmtune.models.block_weights import BlockWeights, keep_fp32_buffers
from lmtune.models.comparing import Comparison, Reader, compare
from lmtune.models.device import default_device, free_memory
from lmtune.models.libraries import quiet_libraries
from lmtune.models.published import (
    CONFIG,
    GENERATION,
    TOKENIZER_FILES,
    generation_config,
    merged_config,
    read_tree,
    write_tokenizer,
    write_tree,
)
from lmtune.models.stored import Layout, StoredWeights, Tensors, WeightWriter
from lmtune.models.structure import empty_model
from lmtune.models.tuning.lora import load_adapter

Into = Literal["trained", "original"]

# The most that logits may differ, relative to the largest one: what rounding the weights to their dtype costs.
BOUNDS = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
INT8_ACTIVATIONS = 8e-2  # what rounding activations to 8 bits adds to the comparison with the trained model
_ROOM_ON_A_GPU = 3  # times the stored weights: the base, the merged model, and what computes with them
_OFFLOADED = ".offloaded"


@dataclass(frozen=True)
class MergeReport:
    """How close a merged model is to the adapter model it was made from, on held-out rows.

    Attributes:
        into: `trained` (dequantised) or `original` base weights.
        dtype: of the written weights.
        rows, tokens: how much was compared.
        logits_difference: largest difference of a logit to the adapter over the same weights, relative to the largest.
        bound: what it may be at most.
        difference_to_trained: the same to the adapter over the base as it was trained, quantised or not.
        bound_to_trained: what that may be; None for `original`, which is meant to differ.
        same_first_choice: share of tokens for which the trained model's first choice is the same.
        tokens_routed_otherwise: of a mixture of experts: tokens at or after one that rounding sent to other experts
            than in the adapter model; the differences above are of all other tokens.
        difference_routed_otherwise: the largest difference of those tokens; None where there are none.
        accepted: whether the merge was kept on request, though a difference is larger than its bound.
    """

    into: Into
    dtype: str
    rows: int
    tokens: int
    logits_difference: float
    bound: float
    difference_to_trained: float
    bound_to_trained: float | None
    same_first_choice: float
    tokens_routed_otherwise: int = 0
    difference_routed_otherwise: float | None = None
    accepted: bool = False

    def as_dict(self) -> dict[str, Any]:
        """For `merge.json` and the summary."""
        return asdict(self)


def merge(
    base: ModelConfig, adapter: Path, output: Path, into: Into, sequences: Sequence[Sequence[int]], tokenizer: Any,
    stop_token_ids: Sequence[int], describe: Callable[[Path, MergeReport], None] | None = None,
    accept_difference: bool = False,
) -> MergeReport:  # fmt: skip
    """Merge, write `output`, load it again, compare, and only then give it its name.

    Args:
        base: the model that was trained over, with its quantization.
        adapter: the adapter folder, with the tokenizer's files and a generation config.
        output: the folder to write; an earlier one is replaced.
        into: which base weights to add to.
        sequences: token ids of held-out rows, for the comparison.
        tokenizer: that of the adapter folder.
        stop_token_ids: what the tuned model stops at, the end of an answer first.
        describe: adds what else belongs into the folder, such as its card, before it gets its name.
        accept_difference: keep a merge that differs by more than its bound, and say so in the report.

    Raises:
        LmtuneError: the merged weights are not finite, or the model differs by more than the bound; nothing is left
            behind.
        ConfigError: another process is writing `output` now.
        OSError: the disk is full or must not be written; nothing is left behind.
    """
    with new_folder(output) as staging:
        source = _Source(base, adapter, into, sequences)
        with name_disk_errors(output):
            with progress("merging"):
                untied = _write(source, staging)
            _write_texts(source, adapter, staging, tokenizer, stop_token_ids, untied)
            report = _verify(source, staging, into, sequences)
            report = _require_bounds(report, accept_difference)
            if describe is not None:
                describe(staging, report)
    return report


class _Source:
    """What is merged: the base with the adapter on it, its files, and how it was trained.

    Attributes:
        held: the weights that the adapter is merged into, with the adapter.
        stored, layout: the base's files, and the names in them.
        config: the content of the base's config.json.
        empty: the base without memory.
        trained_dtype: in which the model was trained.
        dtype: of the stored weights.
        trained: answers as it was trained; None where that is the same as over these weights in fp32.
        reference: answers with the adapter over these weights in fp32.
        rounds: whether int8 layers round activations.
    """

    def __init__(self, base: ModelConfig, adapter: Path, into: Into, sequences: Sequence[Sequence[int]]) -> None:
        check_files(base)
        self.device, self.trained_dtype = _merge_device(base), compute_dtype(default_device(), base.dtype)
        path = resolve_name(base.name)
        loaded = self._load(base, adapter)
        files = weight_files(base)
        self.dtype = stored_dtype(base)
        self.config = read_tree(stored_files(base, [CONFIG])[CONFIG])
        self.generation = stored_files(base, [GENERATION]).get(GENERATION)
        is_quantised = bool(getattr(loaded.get_base_model(), "is_quantized", False))
        self.rounds = _rounds_activations(loaded)
        self.stored, self.empty = StoredWeights(files), empty_model(path, base.revision)
        self.layout = Layout(self.empty, self.stored)
        held = self._hold(loaded)
        self.trained = None
        if is_quantised or self.trained_dtype != torch.float32:
            self.trained = Reader(held.base, partial(held.in_dtype, self.trained_dtype))
        if into == "original" and is_quantised and base.quantization != "none":
            assert self.trained is not None
            self.trained.keep(sequences)
            held.free_layers()
            del loaded
            gc.collect()
            held = self._hold(self._load(replace(base, quantization="none"), adapter))
        self.held = held
        self.reference = Reader(held.base, partial(held.in_dtype, torch.float32, dense=True))

    def _load(self, base: ModelConfig, adapter: Path) -> Any:
        """The base with the adapter, as trained over if that is quantised, else in the dtype that it is stored in."""
        dtype = self.trained_dtype
        if base.quantization == "none":
            try:
                config = stored_files(base, [CONFIG]).get(CONFIG)
                if config is None or "quantization_config" not in read_tree(config):
                    dtype = stored_dtype(base)
            except (ModelError, ValueError):  # not downloaded yet, or not to be read, which loading says better
                pass
        tree = {**asdict(base), "dtype": next(name for name, kind in DTYPES.items() if kind == dtype)}
        model = load_model(ModelConfig(**tree), self.device)
        return load_adapter(model, adapter, base_fingerprint(base))

    def _hold(self, model: Any) -> BlockWeights:
        """The model by blocks, with the numbers of the files where it was read in fewer bits."""
        held = BlockWeights(model)
        keep_fp32_buffers(held.base)
        for name, _ in self.empty.named_parameters():
            source = self.layout.source(name)
            if source is None or not self.stored.entries[source].is_float or held.is_quantised(name):
                continue
            weight, entry = held.parameter(name), self.stored.entries[source]
            if weight.dtype not in (entry.dtype, torch.float32) and tuple(weight.shape) == entry.shape:
                weight.data = entry.read().to(weight.device)
        return held


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


def _write(source: _Source, folder: Path) -> bool:
    """Write the weights; returns whether the head, which was the embedding, has become a weight of its own."""
    held, layout, entries = source.held, source.layout, source.stored.entries
    names = held.weight_names()
    groups = {name: layout.group(name) for name in names}
    coming: Tensors = {}
    for group in dict.fromkeys(groups.values()):
        pieces = layout.written({name: _published(source, name, held.empty(name)) for name in group})
        for name, piece in pieces.items():
            entry = entries.get(name)
            dtype = entry.dtype if entry is not None and entry.is_float else source.dtype
            coming[name] = piece.to(dtype)
    gone = layout.replaced(other for group in groups.values() for other in group)
    copies = _untied(source, names)
    for name, entry in copies.items():
        coming[name] = torch.empty(entry.shape, dtype=entry.dtype, device="meta")

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for name, entry in copies.items():
            yield name, entry.read()
        for changed in held.merged():
            for group in dict.fromkeys(groups[name] for name in changed):
                tensors = {name: _published(source, name, held.weight(name).float()) for name in group}
                for name, piece in layout.written(tensors).items():
                    yield name, _finite(name, piece.to(coming[name].dtype))

    WeightWriter(source.stored, coming, gone).write(folder, weights())
    ties = _ties(source.empty)
    return any(0 < len(tied & set(names)) < len(tied) for tied in ties)


def _ties(empty: Any) -> list[set[str]]:
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


def _published(source: _Source, name: str, weight: torch.Tensor) -> torch.Tensor:
    """A weight as files of this architecture hold it: bitsandbytes turns GPT-2's transposed layers round."""
    from transformers.pytorch_utils import Conv1D

    owner = name.rpartition(".")[0]
    if weight.dim() == 2 and source.held.is_quantised(name) and isinstance(source.empty.get_submodule(owner), Conv1D):
        return weight.T
    return weight


def _finite(name: str, weight: torch.Tensor) -> torch.Tensor:
    """The weight, if it holds numbers only."""
    if weight.numel() and not all(bool(torch.isfinite(end)) for end in weight.aminmax()):
        raise LmtuneError(
            f"{name}: the merged weight is not finite in {str(weight.dtype).removeprefix('torch.')}: the adapter's "
            "values are too large; nothing was kept; train it again, with a smaller train.learning_rate"
        )
    return weight


def _write_texts(
    source: _Source, adapter: Path, folder: Path, tokenizer: Any, stop_token_ids: Sequence[int], untied: bool
) -> None:
    """Write the configs and the tokenizer's files."""
    dtype = str(source.dtype).removeprefix("torch.")
    write_tree(folder / CONFIG, merged_config(source.config, dtype, stop_token_ids, untied))
    tuned = read_tree(adapter / GENERATION)
    write_tree(folder / GENERATION, generation_config(tuned, stop_token_ids, tokenizer.pad_token_id))
    files = {name: adapter / name for name in TOKENIZER_FILES if (adapter / name).is_file()}
    write_tokenizer(tokenizer, files, folder, tokenizer.chat_template, stop_token_ids[0])


# --- verification


def _plain(folder: Path, offloaded: Path, device: torch.device, loaded: bool) -> Reader:
    """The folder as any user of transformers loads it, computing in fp32 so that only the weights are compared.

    Its weights stay on the disk until the layer that they belong to runs, unless they are `loaded`.
    """
    from transformers import AutoModelForCausalLM

    quiet_libraries()
    if loaded:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map={"": device}).eval()
        held = BlockWeights(model)
        keep_fp32_buffers(model)
        return Reader(model, partial(held.in_dtype, torch.float32))
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", device_map={"": "disk"}, offload_folder=str(offloaded)
    ).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.float()  # without memory: what is read from the disk becomes this dtype
    keep_fp32_buffers(model)
    return Reader(model, torch.no_grad)


def _verify(source: _Source, folder: Path, into: Into, sequences: Sequence[Sequence[int]]) -> MergeReport:
    offloaded = folder / _OFFLOADED
    bound = BOUNDS[source.dtype]
    to_trained = BOUNDS[source.trained_dtype] + (INT8_ACTIVATIONS if source.rounds else 0)
    to_trained = max(bound, to_trained)  # the trained model rounds activations to its dtype as well
    try:
        others = [(source.reference, bound), *([(source.trained, to_trained)] if source.trained is not None else [])]
        with progress("comparing the merged model", total=len(sequences)) as shown:
            loaded = source.device.type == "cuda"
            try:
                results = compare(sequences, _plain(folder, offloaded, source.device, loaded), others, shown.advance)
            except RuntimeError as error:
                if loaded or "meta" not in str(error):
                    raise
                # It looks at a weight outside of the layer that the weight belongs to, so all must be in the memory.
                shown.at(0)
                results = compare(sequences, _plain(folder, offloaded, source.device, True), others, shown.advance)
    finally:
        shutil.rmtree(offloaded, ignore_errors=True)
    reference, trained = results[0], results[-1]
    return MergeReport(
        into=into,
        dtype=str(source.dtype).removeprefix("torch."),
        rows=len(sequences),
        tokens=reference.tokens,
        logits_difference=reference.difference,
        bound=bound,
        difference_to_trained=trained.difference,
        bound_to_trained=None if into == "original" else to_trained,
        same_first_choice=trained.same_top1,
        tokens_routed_otherwise=max(reference.routed_otherwise, trained.routed_otherwise),
        difference_routed_otherwise=_larger(reference, trained),
    )


def _larger(*comparisons: Comparison) -> float | None:
    return max((d for c in comparisons if (d := c.routed_difference) is not None), default=None)


def _require_bounds(report: MergeReport, accept_difference: bool = False) -> MergeReport:
    """The report, if the merged model is the one that was trained, or its difference is accepted.

    Raises:
        LmtuneError: it differs by more than the bound.
    """
    for difference, bound, other in (
        (report.logits_difference, report.bound, "the adapter over the same weights"),
        (report.difference_to_trained, report.bound_to_trained, "the model as it was trained"),
    ):
        if bound is not None and not difference <= bound:  # a NaN is no small difference
            text = (
                f"the merged model's logits differ from those of {other} by {difference:.2g} of the largest, more than "
                f"the {bound:.2g} that rounding explains"
            )
            if not accept_difference or difference != difference:
                raise LmtuneError(f"{text}; nothing was kept; --accept-difference keeps such a model, with the number")
            warn(f"{text}; it is kept, as --accept-difference asks")
            report = replace(report, accepted=True)
    return report
