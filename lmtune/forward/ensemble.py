"""The forward pass of several adapters over one base: what all of them together say of the targets.

    forward = EnsembleForward(model, Members(("a", "b"), method="mean"))
    with forward.context():
        outputs = forward(micro_batch)      # logprobs of the mean of the members' probabilities

A pack holds as many tokens as the processor likes at once, so the members take turns on it; their hidden states are
kept, and the probabilities of some targets at a time. Votes have no probabilities: of them `is_top1` is by votes, and
`logprobs` of the mean.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from lmtune.batching.packing import MicroBatch
from lmtune.forward.capabilities import find_capabilities
from lmtune.forward.packed import Outputs, PackedForward
from lmtune.kernels.attention import packed_attention
from lmtune.kernels.cross_entropy import chunk_rows
from lmtune.models.head import Head
from lmtune.models.members import AS_IS, Members


class EnsembleForward(PackedForward):
    """Runs micro-batches through every member; without gradients."""

    def __init__(self, model: PeftModel, members: Members, head: Head | None = None) -> None:
        """
        Args:
            model: a base with the adapters of all members.
            members: who answers, by the names of their adapters.
            head: of classifiers; None of language models.
        """
        self._together, self._kind, self._peft = members, None if head is None else head.kind, model
        super().__init__(model)
        for name in members.adapters:
            with self._speaking(name):
                self.capabilities = self.capabilities.intersect(find_capabilities(self))

    @property
    def members(self) -> Members:  # type: ignore[override]
        """All; while the adapters are switched off, the base alone."""
        layers = (module for module in self._peft.modules() if isinstance(module, LoraLayer))
        return AS_IS if next(layers).disable_adapters else self._together

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """As of `PackedForward`; inside, adapters change."""
        with packed_attention(self.base) if self.packs else contextlib.nullcontext():
            yield

    @torch.no_grad()
    def __call__(self, batch: MicroBatch) -> Outputs:
        """See `PackedForward`."""
        members = self.members
        if not members.is_ensemble:
            with self._speaking(*members.adapters):
                return super().__call__(batch)
        read = []  # of each member [N, D] and the weight of its head, [N, V] and nothing, or scores [S, K]
        for name in members.adapters:
            with self._speaking(name):
                states, weight = self.read(batch), None
                if self._kind is not None:
                    states = self.scores(states)
                elif self.capabilities.fused_head is None:
                    weight = self.base.get_output_embeddings().weight
                read.append((states, weight))
        if self._kind is not None:
            return Outputs.of_scores(members.outputs(self._kind, torch.stack([states for states, _ in read])))
        targets, vocabulary = batch.target_ids, self.base.config.get_text_config().vocab_size
        rows = max(1, chunk_rows(self.device.type, vocabulary) // len(read))
        parts = torch.split(torch.arange(len(targets)), rows)
        outputs = [self._combined(members, read, targets, part.to(self.device)) for part in parts if len(part)]
        logprobs, is_top1 = zip(*outputs, strict=True) if outputs else ([targets.new_zeros(0).float()],) * 2
        return Outputs(torch.cat(logprobs), torch.cat(is_top1).bool())

    def _combined(
        self, members: Members, read: list[tuple[torch.Tensor, torch.Tensor | None]], targets: torch.Tensor,
        part: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """`logprobs[n]` and `is_top1[n]` of the targets at `part[n]`."""
        logits = [
            states[part] if weight is None else self.transform.apply(states[part].to(weight.dtype) @ weight.t())
            for states, weight in read
        ]
        shares, wanted = torch.stack([one.float().softmax(-1) for one in logits]), targets[part]  # [M, n, V]
        mean = replace(members, method="mean").combine(shares)
        best = (mean if members.method == "mean" else members.combine(shares)).argmax(-1)
        return mean.gather(1, wanted[:, None])[:, 0].log().float(), best == wanted

    @contextlib.contextmanager
    def _speaking(self, name: str | None = None) -> Iterator[None]:
        """Inside the block the adapter `name` is the active one; None leaves it."""
        before = self._peft.active_adapter
        self._peft.set_adapter(name or before, inference_mode=True)
        try:
            yield
        finally:
            self._peft.set_adapter(before, inference_mode=True)
