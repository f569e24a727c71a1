"""The forward pass of a packed micro-batch: the log-probability of each target, and whether it is top-1.

    forward = PackedForward(model)            # tries once which optimized paths give the model's own result
    with forward.context():                   # until the backward pass is over: checkpointing runs layers again in it
        outputs = forward(micro_batch)        # outputs.logprobs carries the gradient

Three paths make it fast, each used only where `lmtune.forward.capabilities` finds that it holds:

- sequences share one forward pass (`kernels.attention`), and a prefix that they share is computed once;
- the output head runs only where a target is, in chunks that are never held (`kernels.cross_entropy`);
- so do the queries, output projection and MLP of the last layer (`kernels.label_only_layer`).
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from lmtune.batching.packing import MicroBatch, Reads, SegmentLayout
from lmtune.forward.capabilities import (
    Capabilities,
    attention_note,
    find_capabilities,
    join_lora_layers,
    recurrence_note,
)
from lmtune.kernels.attention import packed_attention
from lmtune.kernels.cross_entropy import LogitTransform, label_logprobs
from lmtune.kernels.elementwise import fuse_elementwise
from lmtune.kernels.lora_group import adapters_held
from lmtune.kernels.rms_norm import fuse_norms
from lmtune.models.head import classifier_head
from lmtune.models.members import AS_IS, Members
from lmtune.models.structure import base_of


@dataclass(frozen=True)
class Outputs:
    """What the model says of the N targets of a micro-batch.

    Attributes:
        logprobs: `[N]` fp32, in nats, each differentiable by itself.
        is_top1: `[N]` bool, whether the target is the model's most likely token.
        scores: `[S, K]` fp32, of a classifier instead: what its head says of the last token of each sequence.
    """

    logprobs: torch.Tensor
    is_top1: torch.Tensor
    scores: torch.Tensor | None = None

    @classmethod
    def of_scores(cls, scores: torch.Tensor) -> Outputs:
        """Those of a classifier."""
        nothing = scores.new_zeros(0)
        return cls(nothing, nothing.bool(), scores)


class PackedForward:
    """Runs micro-batches through one model.

    Attributes:
        model: with or without an adapter.
        base: the transformers model in it.
        dtype: in which products are computed.
        transform: what the model does to its logits after the head.
        capabilities: which optimized paths are used.
        members: who answers; the model as it is.
    """

    members: Members = AS_IS

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype | None = None, joins_layers: bool = True) -> None:
        """
        Args:
            model: with or without an adapter.
            dtype: in which products are computed, those with fp32 weights too; by default the base's. Weights and
                gradients that are fp32 stay fp32.
            joins_layers: whether LoRA layers of one input may share one matrix, which holds their base weights.
        """
        self.model = model
        self.base: PreTrainedModel = base_of(model)
        fuse_norms(self.base)
        fuse_elementwise(self.base)
        self.transform = LogitTransform.of(self.base.config.get_text_config())
        self._logits_to_keep = "logits_to_keep" in inspect.signature(self.base.forward).parameters
        self.dtype = dtype or self.base.dtype
        self._autocast_dtype = self.dtype if self._is_mixed() else None
        self.capabilities = Capabilities.none()
        groups, self._separate_lora = join_lora_layers(self) if joins_layers else ([], None)
        self._groups = weakref.WeakSet(groups)  # layers may leave theirs, and the memory with it
        self.capabilities = find_capabilities(self)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = next(self.base.parameters()).device
        return device

    @property
    def head(self) -> torch.nn.Module | None:
        """The head of a classifier; None for a language model."""
        return classifier_head(self.base)

    @property
    def reads(self) -> Reads:
        """Where micro-batches must say that outputs are read."""
        return "targets" if self.head is None else "last_token"

    @property
    def packs(self) -> bool:
        """Whether several sequences share one forward pass."""
        return self.capabilities.packing is None

    @property
    def shares_prefixes(self) -> bool:
        """Whether micro-batches may hold a common beginning once."""
        return self.packs and self.capabilities.shared_prefixes is None

    @property
    def disabled_optimizations(self) -> list[str]:
        """What is slower for this model than it could be, and why; the result is the same."""
        notes = (attention_note(self), recurrence_note(self.base)) if self.packs else ()
        return [*self.capabilities.disabled, *filter(None, (*notes, self._separate_lora))]

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """Hold the model in the attention that forward and backward passes need; outside it is free to generate.

        Inside, no adapter changes.
        """
        with packed_attention(self.base) if self.packs else contextlib.nullcontext(), adapters_held(self._groups):
            yield

    def __call__(self, batch: MicroBatch) -> Outputs:
        """Score the targets of `batch`, or of a classifier its sequences; only inside `context()`.

        The tensors are on the model's device.

        Args:
            batch: the micro-batch, made for `reads`; with shared prefixes only if `shares_prefixes`.
        """
        outputs = self.read(batch)
        if self.head is not None:
            return Outputs.of_scores(self.scores(outputs))
        if self.capabilities.fused_head is None:
            weight = self.base.get_output_embeddings().weight
            return Outputs(*label_logprobs(outputs, weight, batch.target_ids, self.transform))
        logits = outputs.float()
        losses = F.cross_entropy(logits, batch.target_ids, reduction="none")
        return Outputs(-losses, logits.detach().argmax(-1) == batch.target_ids)

    def read(self, batch: MicroBatch) -> torch.Tensor:
        """The hidden states `[N, D]` that predict the targets, or, without the fused head, their logits `[N, V]`."""
        fused = self.capabilities.fused_head is None
        if not self.packs:
            return self._one_by_one(batch, fused)
        if not fused:
            return self.logits(batch.input_ids, batch.position_ids, batch.predicting, batch.segments)
        if self.capabilities.label_only_layer is None:
            return self.hidden(
                batch.input_ids, batch.position_ids, batch.read_index, batch.segments, batch.read_positions
            )
        return self.hidden(batch.input_ids, batch.position_ids, batch.predicting, batch.segments)

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """What a classifier's head says `[S, K]` of the hidden states `[S, D]` of last tokens."""
        head = self.head
        assert head is not None
        with torch.autocast(self.device.type, enabled=False):  # a few numbers a row: in fp32, as it is trained
            scores: torch.Tensor = head(hidden.float()).float()
            return scores

    def hidden(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, keep: torch.Tensor,
        segments: SegmentLayout | None = None, read_positions: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """The last hidden states `[N, D]` of one pack `[1, T]` at `keep[N]`, in any order and with repetitions.

        With `read_positions[P]` the last layer runs at these alone, and `keep` counts among them.
        """
        extra = {} if read_positions is None else {"read_positions": read_positions}
        with self.autocast():
            output = self.base.base_model(
                input_ids=input_ids, position_ids=position_ids, use_cache=False, **_layout(segments), **extra
            )
        states: torch.Tensor = output.last_hidden_state[0]
        return states[keep]

    def logits(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, keep: torch.Tensor,
        segments: SegmentLayout | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """The model's own logits `[N, V]` of one pack `[1, T]` at `keep[N]`.

        Of a classifier, which has logits at one position alone, what its head reads: the hidden states `[N, D]`.
        """
        if self.head is not None:
            return self.hidden(input_ids, position_ids, keep, segments)
        extra = {"logits_to_keep": keep} if self._logits_to_keep else {}
        with self.autocast():
            output = self.base(
                input_ids=input_ids, position_ids=position_ids, use_cache=False, **_layout(segments), **extra
            )
        logits: torch.Tensor = output.logits[0]
        return logits if self._logits_to_keep else logits[keep]

    def _one_by_one(self, batch: MicroBatch, fused: bool) -> torch.Tensor:
        """`hidden` or `logits` of the whole batch, with each segment in a forward pass of its own."""
        run = self.hidden if fused else self.logits
        parts, places = [], []
        for start, length in zip(batch.segments.starts, batch.segments.lengths, strict=True):
            inside = ((batch.predicting >= start) & (batch.predicting < start + length)).nonzero()[:, 0]
            window = slice(start, start + length)
            if len(inside):
                keep = batch.predicting[inside] - start
                parts.append(run(batch.input_ids[:, window], batch.position_ids[:, window], keep))
                places.append(inside)
        return torch.cat(parts)[torch.cat(places).argsort()]

    def _is_mixed(self) -> bool:
        """Whether there are fp32 weights, other than adapters that are fused, that compute in 16 bit."""
        fused = [module for module in self.model.modules() if hasattr(module, "lmtune_weight")]
        known = {id(parameter) for module in fused for parameter in module.parameters()}
        others = (parameter for parameter in self.model.parameters() if id(parameter) not in known)
        return self.dtype.itemsize == 2 and any(parameter.dtype == torch.float32 for parameter in others)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Compute in `dtype` inside the block, with fp32 weights too; also where the model generates."""
        dtype = self._autocast_dtype
        return contextlib.nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)


def _layout(segments: SegmentLayout | None) -> dict[str, SegmentLayout]:
    return {} if segments is None else {"segments": segments}
