"""The forward pass of a packed micro-batch: each trained token's loss, and whether the model would have said it.

    forward = PackedForward(model)            # asks the model once which of the fast ways give its own result
    with forward.ready():                     # until the backward pass is over: checkpointing runs layers again in it
        scores = forward(micro_batch)         # scores.total carries the gradient

The fast ways, each tried on a few random tokens against the plain one before it is used:

- documents share one forward pass (`kernels.attention`), and a prefix that they share is computed once;
- the output head runs only where a token is trained, in chunks that are never held (`kernels.cross_entropy`);
- so do the queries, output projection and MLP of the last layer (`kernels.last_layer`).

A model for which one of them does not give the plain result goes without it, with the same outcome; `notes` says why.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from lmtune.batching.packing import MicroBatch, SegmentLayout
from lmtune.kernels import label_only_layer
from lmtune.kernels.attention import find_varlen, packed_attention
from lmtune.kernels.cross_entropy import LogitTransform, label_cross_entropy
from lmtune.models.device import is_out_of_memory
from lmtune.models.structure import base_of, decoder_layers

_TOLERANCE = 5e-2  # relative, in 16 bit; a document that leaks or a wrong position moves outputs by about 1
_TOLERANCE_FP32 = 1e-4


@dataclass(frozen=True)
class TokenScores:
    """What the model makes of the N trained tokens of a micro-batch.

    Attributes:
        total: the sum of the losses, a scalar; carries the gradient.
        losses: `[N]` fp32, cross-entropy of each trained token in nats.
        correct: `[N]` bool, whether the trained token is the model's first choice.
    """

    total: torch.Tensor
    losses: torch.Tensor
    correct: torch.Tensor


class PackedForward:
    """Runs micro-batches through one model.

    Attributes:
        model: with or without an adapter.
        base: the transformers model in it.
        reason: why documents are not packed, or None.
        head_reason: why the model's own logits are used, or None.
        layer_reason: why the last layer runs on all positions, or None.
        prefix_reason: why shared prefixes are computed for each document, or None.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.base = base_of(model)
        self._keeps = "logits_to_keep" in inspect.signature(self.base.forward).parameters
        self._transform = LogitTransform.of(self.base.config.get_text_config())
        untried = "not tried"
        self.reason: str | None = untried
        self.head_reason: str | None = untried
        self.layer_reason: str | None = untried
        self.prefix_reason: str | None = untried
        self._try_fast_ways()

    @property
    def packs(self) -> bool:
        """Whether several documents share one forward pass."""
        return self.reason is None

    @property
    def shares_prefixes(self) -> bool:
        """Whether micro-batches may lay down a common beginning once."""
        return self.packs and self.prefix_reason is None

    @property
    def notes(self) -> list[str]:
        """What runs slower for this model than it could, and why."""
        return list(dict.fromkeys(reason for reason in (*self.reasons, self._attention_reason()) if reason))

    @property
    def reasons(self) -> tuple[str | None, str | None, str | None, str | None]:
        """Why each fast way is not taken, or None: packing, head, last layer, prefixes."""
        return self.reason, self.head_reason, self.layer_reason, self.prefix_reason

    def disable(self, reasons: Sequence[str | None]) -> None:
        """Leave out, of the ways that `reasons` names, those that are left: another process does without them."""
        ours = (own or other for own, other in zip(self.reasons, reasons, strict=True))
        self.reason, self.head_reason, self.layer_reason, self.prefix_reason = ours

    def _attention_reason(self) -> str | None:
        """Why documents attend one after another on a GPU, or None."""
        embedding, config = self.base.get_input_embeddings().weight, self.base.config.get_text_config()
        if embedding.device.type != "cuda" or not self.packs:
            return None
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        groups = heads // (getattr(config, "num_key_value_heads", None) or heads)
        _, why = find_varlen(embedding.device, self.base.dtype, head_dim, groups)
        return None if why is None else f"documents attend one after another: {why}"

    def ready(self) -> contextlib.AbstractContextManager[None]:
        """Hold the model in the attention that forward and backward passes need; outside it is free to generate."""
        return packed_attention(self.base) if self.packs else contextlib.nullcontext()

    def __call__(self, batch: MicroBatch) -> TokenScores:
        """Score the trained tokens of `batch`, whose tensors are on the model's device; only inside `ready()`.

        Args:
            batch: the micro-batch; with shared prefixes only if `shares_prefixes`.
        """
        if self.packs:
            labels = (batch.read_positions, batch.read_index)
            outputs = self._outputs(batch.input_ids, batch.position_ids, batch.predicting, batch.layout, labels)
        else:
            outputs = self._one_by_one(batch)
        if self.head_reason is None:
            head = self.base.get_output_embeddings().weight
            return TokenScores(*label_cross_entropy(outputs, head, batch.targets, self._transform))
        logits = outputs.float()
        losses = F.cross_entropy(logits, batch.targets, reduction="none")
        return TokenScores(losses.sum(), losses.detach(), logits.detach().argmax(-1) == batch.targets)

    def _outputs(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, keep: torch.Tensor, layout: SegmentLayout | None,
        labels: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """At the positions `keep[N]` of one sequence `[1, T]`: hidden states `[N, D]`, or logits `[N, V]`.

        With `labels`, the different positions `[P]` and where each of `keep` is among them, the last layer may run on
        these positions only.
        """
        arguments: dict[str, Any] = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
        if layout is not None:
            arguments["layout"] = layout
        with self._autocast(input_ids.device):
            if self.head_reason is None:
                return self._hidden(arguments, keep, labels)
            if self._keeps:
                arguments["logits_to_keep"] = keep
            logits: torch.Tensor = self.base(**arguments).logits[0]
        return logits if self._keeps else logits[keep]

    def _hidden(
        self, arguments: dict[str, Any], keep: torch.Tensor, labels: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        """The last hidden states `[N, D]` at `keep[N]`, in any order and with repetitions."""
        if self.layer_reason is None and labels is not None:
            arguments["read_positions"], keep = labels
        hidden: torch.Tensor = self.base.base_model(**arguments).last_hidden_state[0]
        return hidden[keep]

    def _one_by_one(self, batch: MicroBatch) -> torch.Tensor:
        """What `_outputs` gives for the whole batch, with each document in a forward pass of its own."""
        parts, places = [], []
        for start, length in zip(batch.layout.starts, batch.layout.lengths, strict=True):
            inside = ((batch.predicting >= start) & (batch.predicting < start + length)).nonzero()[:, 0]
            window = slice(start, start + length)
            if len(inside):
                keep = batch.predicting[inside] - start
                parts.append(self._outputs(batch.input_ids[:, window], batch.position_ids[:, window], keep, None))
                places.append(inside)
        return torch.cat(parts)[torch.cat(places).argsort()]

    def _autocast(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """On a 16-bit base the fp32 adapter computes in 16 bit too; its weights and gradients stay fp32."""
        dtype = self.base.dtype
        if dtype in (torch.bfloat16, torch.float16):
            return torch.autocast(device.type, dtype)
        return contextlib.nullcontext()

    @torch.no_grad()
    def _try_fast_ways(self) -> None:
        """Decide which fast ways to take, each compared with the plain one on a few random tokens."""
        with _evaluating(self.model):
            self.reason = self._tried("rows run one at a time", self._compare_packed)
            self.head_reason = self._why_no_direct_head()
            if self.head_reason is not None or not self.packs:
                self.layer_reason = self.head_reason or self.reason
            else:
                self.layer_reason = self._tried("the last layer runs everywhere", self._compare_last_layer)
            if self.packs:
                self.prefix_reason = self._tried("shared prefixes are computed again", self._compare_prefix)
            else:
                self.prefix_reason = self.reason

    def _tried(self, consequence: str, compare: Any) -> str | None:
        """None if `compare` finds no difference, else the consequence and its reason."""
        try:
            difference = compare()
        except Exception as error:  # whatever a model's code makes of what it was not written for
            if is_out_of_memory(error):
                raise
            return f"{consequence}: {' '.join(str(error).split()) or type(error).__name__}"
        return f"{consequence}: outputs would differ by {difference:.2g}" if difference > self._tolerance else None

    @property
    def _tolerance(self) -> float:
        return _TOLERANCE_FP32 if self.base.dtype == torch.float32 else _TOLERANCE

    def _compare_packed(self) -> float:
        """Two documents packed together against the second alone."""
        if problem := longest_row_matters(self.base.config.get_text_config()):
            raise ValueError(problem)
        ids, positions = self._probe(5, 7)
        second = torch.arange(7, device=ids.device)
        alone = self._outputs(ids[:, 5:], positions[:, 5:], second, None)
        layout = SegmentLayout.of_segments(5, 7)
        with packed_attention(self.base):
            packed = self._outputs(ids, positions, second + 5, layout)
        if problem := window_in_mask_only(self.base.config.get_text_config(), layout.derived.get("window")):
            raise ValueError(problem)
        return _difference(packed, alone)

    def _compare_prefix(self) -> float:
        """Two documents behind a common prefix against each alone."""
        ids, positions = self._probe(4, 3, 5)
        positions[:, 4:] += 4
        layout = SegmentLayout((4, 3, 5), (None, 0, 0))
        with packed_attention(self.base):
            shared = self._outputs(ids, positions, torch.arange(4, 12, device=ids.device), layout)
            each = []
            for own in (slice(4, 7), slice(7, 12)):
                alone = torch.cat([ids[:, :4], ids[:, own]], 1)
                place = torch.arange(alone.shape[1], device=ids.device)
                each.append(self._outputs(alone, place[None], place[4:], SegmentLayout.of_segments(len(place))))
        return _difference(shared, torch.cat(each))

    def _compare_last_layer(self) -> float:
        """The last layer on a few positions against all of it."""
        ids, positions = self._probe(5, 7)
        keep, layout = (
            torch.tensor([2, 3, 6, 11], device=ids.device),
            SegmentLayout((5, 7), (None, None), (2, 3, 6, 11)),
        )
        labels = keep, torch.arange(4, device=ids.device)
        layers = decoder_layers(self.base)
        if layers is None:
            raise ValueError("the last layer is not found: the model has no single list of layers")
        label_only_layer.install(layers[-1])
        self.layer_reason = "not tried"
        with packed_attention(self.base):
            wanted = self._outputs(ids, positions, keep, layout)
            self.layer_reason = None
            label_only_layer.find_query_linear(layers[-1], lambda: self._outputs(ids, positions, keep, layout, labels))
            return _difference(self._outputs(ids, positions, keep, layout, labels), wanted)

    def _why_no_direct_head(self) -> str | None:
        """None if the head's weight on the last hidden state gives the model's own logits, else why not."""
        head = self.base.get_output_embeddings()
        if type(head) is not torch.nn.Linear or head.bias is not None:
            return "the model computes its logits itself: its head is no plain linear layer"
        return self._tried("the model computes its logits itself", self._compare_head)

    def _compare_head(self) -> float:
        """The head's weight on the last hidden state against the model's logits."""
        ids, positions = self._probe(6)
        keep, head = torch.arange(6, device=ids.device), self.base.get_output_embeddings().weight
        wanted = self._outputs(ids, positions, keep, None)
        self.head_reason = None
        hidden = self._outputs(ids, positions, keep, None)
        self.head_reason = "not tried"
        label_cross_entropy(hidden, head, ids[0], self._transform)  # whether it can be computed
        return _difference(self._transform.apply(hidden.to(head.dtype) @ head.t()), wanted)

    def _probe(self, *lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Random ids `[1, T]` of documents of these lengths, and their position ids."""
        device = self.base.get_input_embeddings().weight.device
        vocabulary = self.base.get_input_embeddings().weight.shape[0]
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, vocabulary, (1, sum(lengths)), generator=generator)
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        return ids.to(device), positions.to(device)


def longest_row_matters(config: Any) -> str | None:
    """Why a row's numbers would depend on which longer row lies beside it, or None."""
    for name in ("rope_parameters", "rope_scaling"):
        rope = getattr(config, name, None) or {}
        kinds = {part.get("rope_type", part.get("type")) for part in (rope, *rope.values()) if isinstance(part, dict)}
        if found := kinds & {"longrope", "dynamic"}:
            return f"its rotary embedding ({found.pop()}) depends on the longest row of a forward pass"
    return None


def window_in_mask_only(config: Any, window: int | None) -> str | None:
    """Why documents longer than the model's window would see too much, or None.

    Args:
        config: of the text model.
        window: what its attention was told; transformers makes no mask for an attention of ours.
    """
    kinds = getattr(config, "layer_types", None)
    if getattr(config, "attention_chunk_size", None) and (kinds is None or "chunked_attention" in kinds):
        return "its attention by chunks is known to its mask alone"
    asked = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if asked and window is None and (kinds is None or any("sliding" in kind for kind in kinds)):
        return "its sliding window is known to its mask alone"
    return None


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """The model without dropout inside the block."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference relative to the largest value."""
    return float((one.float() - other.float()).abs().max() / other.float().abs().max().clamp_min(1e-6))


def count_wrong_tokens(correct: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """Of each of the E examples, how many trained tokens of this batch are not right, `[E]` fp32, from `correct[N]`."""
    wrong = torch.zeros(batch.num_examples, device=correct.device)
    return wrong.index_add_(0, batch.examples, (~correct).float())
