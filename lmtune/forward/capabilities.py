"""Which optimized paths of the forward pass hold for a model, found by trying each on a few random tokens.

    capabilities = find_capabilities(forward)
    capabilities.packing           # None: used; else the reason why not

Each path is compared with the plain one of the very model before the first step. A path that does not give the plain
result is disabled with its reason, and the run does without it, with the same outcome. No path looks at a model's name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from typing import Protocol

import torch
from transformers import PretrainedConfig, PreTrainedModel

from lmtune.batching.packing import SegmentLayout
from lmtune.kernels import label_only_layer, recurrent_layer
from lmtune.kernels.attention import find_varlen, packed_attention
from lmtune.kernels.cross_entropy import LogitTransform, label_logprobs
from lmtune.kernels.lora_group import LoraGroup, group_layers, separate_layers
from lmtune.models.device import is_out_of_memory
from lmtune.models.head import classifier_head
from lmtune.models.structure import decoder_layers, is_streamed, trained_module

# Relative, in 16 bit: rounding moves the outputs of 32 random layers by 0.06, a segment that leaks by about 1.
_TOLERANCE = 0.2
_TOLERANCE_FP32 = 1e-4


class Paths(Protocol):
    """The paths of a forward pass, each to be called by itself."""

    model: torch.nn.Module
    base: PreTrainedModel
    dtype: torch.dtype
    transform: LogitTransform

    def hidden(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, keep: torch.Tensor,
        segments: SegmentLayout | None = None, read_positions: torch.Tensor | None = None,
    ) -> torch.Tensor: ...  # fmt: skip

    def logits(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, keep: torch.Tensor,
        segments: SegmentLayout | None = None,
    ) -> torch.Tensor: ...  # fmt: skip


@dataclass(frozen=True)
class Capabilities:
    """Why each optimized path is disabled for a model, or None where it is used.

    Attributes:
        packing: several sequences share one forward pass.
        fused_head: log-probabilities come from hidden states and the head's weight, chunk by chunk.
        label_only_layer: the last layer runs only at the positions that are read.
        shared_prefixes: a beginning that sequences have in common is computed once.
    """

    packing: str | None = None
    fused_head: str | None = None
    label_only_layer: str | None = None
    shared_prefixes: str | None = None

    @classmethod
    def none(cls) -> Capabilities:
        """The plain path alone."""
        return cls(*["not tried"] * 4)

    def intersect(self, other: Capabilities) -> Capabilities:
        """What both have: the plan depends on it, and all ranks make the same one."""
        return Capabilities(*(mine or theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    @property
    def disabled(self) -> list[str]:
        """The reasons, each once."""
        return list(dict.fromkeys(reason for reason in astuple(self) if reason))


def find_capabilities(forward: Paths) -> Capabilities:
    """Compare each optimized path of `forward` with the plain one."""
    with torch.no_grad(), _evaluating(forward.model):
        packing = _find_packing(forward)
        head = trained_module(forward.base.get_output_embeddings())
        if classifier_head(forward.base) is not None:
            fused_head: str | None = None  # a classifier has no vocabulary to predict
        elif type(head) is not torch.nn.Linear or head.bias is not None:
            fused_head = "fused cross-entropy disabled: lm_head is not nn.Linear without bias"
        else:
            fused_head = _probe(forward, "fused cross-entropy disabled", _compare_head)
        label_only = fused_head or packing or _probe(forward, "label-only last layer disabled", _compare_label_only)
        prefixes = packing or _probe(forward, "shared prefixes disabled", _compare_prefix)
    return Capabilities(packing, fused_head, label_only, prefixes)


def join_lora_layers(forward: Paths) -> tuple[list[LoraGroup], str | None]:
    """Let LoRA layers of one input compute as one, on devices that gain by it and where it gives the plain result.

    Returns:
        The groups, and why there are none although they would gain.
    """
    if forward.dtype.itemsize != 2 or is_streamed(forward.base):  # a group's matrix would stay in memory
        return [], None
    ids, positions = _random_ids(forward, 7)
    keep = torch.arange(7, device=ids.device)
    with torch.no_grad(), _evaluating(forward.model):
        alone: list[torch.Tensor] = []
        groups = group_layers(forward.model, lambda: alone.append(forward.logits(ids, positions, keep)))
        if not groups:
            return [], None
        reason = _probe(
            forward,
            "joined LoRA layers disabled",
            lambda _: _difference(forward.logits(ids, positions, keep), alone[0]),
        )
    if reason is not None:
        separate_layers(forward.model)
        return [], reason
    return groups, None


def _find_packing(forward: Paths) -> str | None:
    """Why sequences cannot share a forward pass, or None; layers with a state are prepared as far as it takes."""
    consequence = "sequence packing disabled"
    if not recurrent_layer.install(forward.base):
        return _probe(forward, consequence, _compare_packing)
    recurrent_layer.use_kernels(forward.base, True)
    if _probe(forward, consequence, _compare_packing) is None:
        return None
    recurrent_layer.use_kernels(forward.base, False)
    return _probe(forward, consequence, _compare_packing)


def recurrence_note(base: PreTrainedModel) -> str | None:
    """What to install on a GPU where layers with a state run sequence by sequence, or None."""
    if base.device.type != "cuda" or not recurrent_layer.runs_by_sequence(base):
        return None
    return (
        f"one kernel for all sequences of linear attention disabled: `pip install {recurrent_layer.KERNELS}` "
        "gives kernels that take packed sequences"
    )


def attention_note(forward: Paths) -> str | None:
    """Why the segments of a micro-batch attend one after another on a GPU, or None."""
    base = forward.base
    embedding, config = base.get_input_embeddings().weight, base.config.get_text_config()
    if embedding.device.type != "cuda":
        return None
    ids, positions = _random_ids(forward, 2)
    segments = SegmentLayout.of_segments(2)
    with torch.no_grad(), _evaluating(forward.model), packed_attention(base):
        forward.hidden(ids, positions, positions[0], segments)
    if segments.derived.by_blocks:
        return "one attention kernel for all segments disabled: it has no soft caps and no attention sinks"
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = heads // (getattr(config, "num_key_value_heads", None) or heads)
    _, why = find_varlen(embedding.device, forward.dtype, head_dim, groups)
    return None if why is None else f"one attention kernel for all segments disabled: {why}"


def _probe(forward: Paths, consequence: str, compare: Callable[[Paths], float]) -> str | None:
    """None if `compare` finds no difference, else the consequence and its reason."""
    tolerance = _TOLERANCE_FP32 if forward.dtype == torch.float32 else _TOLERANCE
    try:
        difference = compare(forward)
    except Exception as error:  # whatever a model's code raises for what it was not written for
        if is_out_of_memory(error):
            raise
        return f"{consequence}: {' '.join(str(error).split()) or type(error).__name__}"
    return f"{consequence}: outputs differ by {difference:.2g}" if difference > tolerance else None


def _compare_packing(forward: Paths) -> float:
    """Two sequences packed together against the second alone."""
    config = forward.base.config.get_text_config()
    if problem := longest_row_matters(config):
        raise ValueError(problem)
    ids, positions = _random_ids(forward, 5, 7)
    second = torch.arange(7, device=ids.device)
    alone = forward.logits(ids[:, 5:], positions[:, 5:], second)
    segments = SegmentLayout.of_segments(5, 7)
    with packed_attention(forward.base):
        packed = forward.logits(ids, positions, second + 5, segments)
    if problem := window_in_mask_only(config, segments.derived.window):
        raise ValueError(problem)
    return _difference(packed, alone)


def _compare_prefix(forward: Paths) -> float:
    """Two sequences behind a common prefix against each alone."""
    ids, positions = _random_ids(forward, 4, 3, 5)
    positions[:, 4:] += 4
    segments = SegmentLayout((4, 3, 5), (None, 0, 0))
    with packed_attention(forward.base):
        shared = forward.logits(ids, positions, torch.arange(4, 12, device=ids.device), segments)
        each = []
        for own in (slice(4, 7), slice(7, 12)):
            alone = torch.cat([ids[:, :4], ids[:, own]], 1)
            place = torch.arange(alone.shape[1], device=ids.device)
            each.append(forward.logits(alone, place[None], place[4:], SegmentLayout.of_segments(len(place))))
    return _difference(shared, torch.cat(each))


def _compare_label_only(forward: Paths) -> float:
    """The last layer at a few positions against all of it."""
    ids, positions = _random_ids(forward, 5, 7)
    read = torch.tensor([2, 3, 6, 11], device=ids.device)
    segments, index = SegmentLayout((5, 7), (None, None), (2, 3, 6, 11)), torch.arange(4, device=ids.device)
    layers = decoder_layers(forward.base)
    if layers is None:
        raise ValueError("the model has no single list of layers")
    label_only_layer.install(layers[-1])
    with packed_attention(forward.base):
        wanted = forward.hidden(ids, positions, read, segments)
        label_only_layer.find_query_linear(
            layers[-1], lambda: forward.hidden(ids, positions, index, segments, read_positions=read)
        )
        return _difference(forward.hidden(ids, positions, index, segments, read_positions=read), wanted)


def _compare_head(forward: Paths) -> float:
    """The head's weight on the last hidden state against the model's own logits."""
    ids, positions = _random_ids(forward, 6)
    keep, head = torch.arange(6, device=ids.device), forward.base.get_output_embeddings().weight
    wanted = forward.logits(ids, positions, keep)
    hidden = forward.hidden(ids, positions, keep)
    label_logprobs(hidden, head, ids[0], forward.transform)  # whether it can be computed
    return _difference(forward.transform.apply(hidden.to(head.dtype) @ head.t()), wanted)


def _random_ids(forward: Paths, *lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids `[1, T]` of sequences of these lengths, and their position ids."""
    embedding = forward.base.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)  # on the CPU, whatever PyTorch's default device is
    ids = torch.randint(0, embedding.shape[0], (1, sum(lengths)), generator=generator, device="cpu")
    positions = torch.cat([torch.arange(length, device="cpu") for length in lengths])[None]
    return ids.to(embedding.device), positions.to(embedding.device)


def longest_row_matters(config: PretrainedConfig) -> str | None:
    """Why a sequence's outputs depend on which longer one lies beside it, or None."""
    for name in ("rope_parameters", "rope_scaling"):
        rope = getattr(config, name, None) or {}
        kinds = {part.get("rope_type", part.get("type")) for part in (rope, *rope.values()) if isinstance(part, dict)}
        if found := kinds & {"longrope", "dynamic"}:
            return f"its rotary embedding ({found.pop()}) depends on the longest row of a forward pass"
    return None


def window_in_mask_only(config: PretrainedConfig, window: int | None) -> str | None:
    """Why sequences longer than the model's window would see too much, or None.

    Args:
        config: of the text model.
        window: what its attention was told, by its layers or in place of a mask.
    """
    kinds = getattr(config, "layer_types", None)
    has_chunks = getattr(config, "attention_chunk_size", None) and (kinds is None or "chunked_attention" in kinds)
    if has_chunks and window is None:
        return "its attention by chunks is known to its mask alone"
    asked = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if asked and window is None and (kinds is None or any("sliding" in kind for kind in kinds)):
        return "its sliding window is known to its mask alone"
    return None


@contextlib.contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model without dropout inside the block."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """How far the rows `[N, D]` are from the same ones of `other` at most, relative to their norms."""
    difference, wanted = (one.float() - other.float()).norm(dim=-1), other.float().norm(dim=-1)
    return float((difference / wanted.clamp_min(1e-6)).max())
