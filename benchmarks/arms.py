"""The arms of a comparison: each makes the same optimizer step from the same rows in its own way.

An arm has `step(rows)`, which leaves its gradients in place and returns the loss, and `update()`; `computed` counts the
positions it ran, padding included, shared prefixes once. Losses are means over
the step's trained tokens in all arms, so losses and gradients can be compared before any timing counts.
"""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.workload import Workload, adapted, quantized


class Arm:
    """What the arms share: the model, its adapter, AdamW."""

    attention = "sdpa"
    loss_dtype = torch.float32  # that plain loops compute the cross-entropy in

    def __init__(self, work: Workload, folder: Path, device: str, dtype: Any = "auto") -> None:
        from lmtune.config.schema import ModelConfig
        from lmtune.models.base import load_model

        self.work, self.device, self.computed = work, torch.device(device), 0
        if work.model is not None or (folder / "config.json").is_file():
            base = load_model(ModelConfig(name=str(folder), quantization=work.quantization, dtype=dtype), self.device)
        else:
            base = work.random_base(self.device, getattr(torch, dtype)).requires_grad_(False)
            if work.quantization != "none":
                base = quantized(base, work.quantization, base.dtype)
        self.model = adapted(base, work.rank, work.seed)
        self.model.train()
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=1e-4, weight_decay=0.0, fused=True)

    def step(self, rows: list[Any]) -> float:
        """One optimizer step's forward and backward passes."""
        raise NotImplementedError

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """What a loop over a 16-bit base computes in; the adapter is fp32."""
        base = self.model.get_base_model().dtype
        return torch.autocast(self.device.type, base) if base.itemsize == 2 else contextlib.nullcontext()

    def _backward(self, logits: torch.Tensor, labels: torch.Tensor, trained: int) -> float:
        """The backward pass of the loss per trained token, and that loss."""
        flat = logits.to(self.loss_dtype).flatten(0, 1)
        loss = F.cross_entropy(flat, labels.flatten(), ignore_index=-100, reduction="sum") / trained
        loss.backward()
        return float(loss.detach())

    def update(self) -> None:
        """Clip and step the optimizer."""
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Lmtune(Arm):
    """lmtune's own step; `without` names techniques to leave out, for the ablation."""

    rows: Any = "answer"

    def __init__(
        self, work: Workload, folder: Path, device: str, dtype: Any = "auto", without: tuple[str, ...] = (),
        micro_batch_tokens: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(work, folder, device, dtype)
        from lmtune.forward import packed
        from lmtune.forward.capabilities import Capabilities
        from lmtune.kernels.lora_linear import fuse
        from lmtune.models.structure import decoder_layers
        from lmtune.training.memory import checkpoint_layers

        if "fused LoRA" not in without:
            fuse(self.model, keep_dense="kept dense weights" not in without)
        if "fused elementwise" in without:
            packed.fuse_elementwise = packed.fuse_norms = lambda model: []
        self.forward = packed.PackedForward(self.model)
        disabled = {
            name: "left out"
            for technique, name in (
                ("packing", "packing"), ("label cross-entropy", "fused_head"), ("last layer", "label_only_layer"),
                ("shared prefix", "shared_prefixes"),
            )
            if technique in without
        }  # fmt: skip
        if "attention by document" in without:  # transformers' own, with a mask of the whole micro-batch
            self.forward.context = contextlib.nullcontext  # type: ignore[method-assign]
            disabled |= {"label_only_layer": "left out", "shared_prefixes": "left out"}
        if "fused_head" in disabled:
            disabled["label_only_layer"] = "left out"
        self.forward.capabilities = self.forward.capabilities.intersect(Capabilities(**disabled))
        if "checkpointing by need" in without:
            checkpoint_layers(self.forward.base, len(decoder_layers(self.forward.base)))
        self.budget = micro_batch_tokens or self._fitting()
        if "fused optimizer" in without:
            self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=1e-4, weight_decay=0.0)

    def _fitting(self) -> int:
        """The tokens of a micro-batch that training would take here."""
        from lmtune.models.device import free_memory
        from lmtune.training.memory import fitting_micro_batch, measure_activations, most_tokens

        activations = measure_activations(self.forward, self.work.label_fraction)
        if self.device.type != "cuda" or activations is None:
            return most_tokens(self.device.type, self.rows)
        return fitting_micro_batch(activations, self.work.max_length, free_memory(self.device), "cuda", None)[0]

    def step(self, rows: list[Any]) -> float:
        """Packed micro-batches, with prefixes shared; by default of the size that training has."""
        from lmtune.batching.packing import pack, pack_bins
        from lmtune.batching.plan import Totals
        from lmtune.batching.prefixes import find_prefixes, shareable_prefix
        from lmtune.objectives.sft import Sft
        from lmtune.parallel.single import Single
        from lmtune.training.step import step_gradients

        documents = [row.sequences[0] for row in rows]
        shares = self.forward.shares_prefixes
        lengths = [len(d.input_ids) for d in documents]
        shareable = [shareable_prefix(d.input_ids, d.loss_mask) for d in documents]
        groups = pack_bins(lengths, self.budget, find_prefixes(shareable, lengths) if shares else [])
        batches = [pack([documents[i] for i in group], group, len(rows), shares) for group in groups]
        self.computed += sum(batch.input_ids.numel() for batch in batches)
        targets = sum(int(d.loss_mask.sum()) for d in documents)
        totals = Totals(len(rows), len(rows), sum(lengths), targets, len(rows), targets)
        return step_gradients(self.forward, Sft(), self.parameters, batches, totals, Single(self.device)).loss


class PlainPadded(Arm):
    """transformers and PEFT as tutorials show them: rows padded to the longest, or one at a time; full logits."""

    def __init__(self, work: Workload, folder: Path, device: str, dtype: Any = "auto", rows_at_once: int = 4) -> None:
        super().__init__(work, folder, device, dtype)
        self.rows_at_once = rows_at_once

    def step(self, rows: list[Any]) -> float:
        """Batches of `rows_at_once` rows, with a mask only where something is padded."""
        trained, total = sum(int(row.sequences[0].loss_mask.sum()) for row in rows), 0.0
        for start in range(0, len(rows), self.rows_at_once):
            some = [row.sequences[0] for row in rows[start : start + self.rows_at_once]]
            longest = max(len(d.input_ids) for d in some)
            ids = torch.zeros(len(some), longest, dtype=torch.long)
            labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
            for i, d in enumerate(some):
                n = len(d.input_ids)
                ids[i, :n], mask[i, :n] = torch.as_tensor(d.input_ids), 1
                labels[i, :n] = torch.where(torch.as_tensor(d.loss_mask), torch.as_tensor(d.input_ids), -100)
            self.computed += ids.numel()
            padded = None if bool(mask.all()) else mask.to(self.device)
            with self.autocast():
                logits = self.model(input_ids=ids.to(self.device), attention_mask=padded, use_cache=False).logits
            total += self._backward(logits[:, :-1], labels[:, 1:].to(self.device), trained)
        return total


class PlainPacked(Arm):
    """One packed sequence for the whole step, isolated by restarting position ids, with full logits.

    On a GPU attention is PyTorch's for sequences of any length, which is told where each ends.
    """

    def __init__(self, work: Workload, folder: Path, device: str, dtype: Any = "auto") -> None:
        super().__init__(work, folder, device, dtype)
        if self.device.type == "cuda":
            register_varlen()
            self.model.get_base_model().set_attn_implementation("bench_varlen")

    def step(self, rows: list[Any]) -> float:
        """Micro-batches of at most 2,048 tokens, on a GPU of 4,096."""
        from lmtune.batching.packing import pack_bins

        documents = [row.sequences[0] for row in rows]
        trained, total = sum(int(d.loss_mask.sum()) for d in documents), 0.0
        for group in pack_bins([len(d.input_ids) for d in documents], 4096 if self.device.type == "cuda" else 2048):
            some = [documents[i] for i in group]
            ids = torch.cat([torch.as_tensor(d.input_ids) for d in some])[None].to(self.device)
            positions = torch.cat([torch.arange(len(d.input_ids)) for d in some])[None].to(self.device)
            labels = torch.cat(
                [torch.where(torch.as_tensor(d.loss_mask), torch.as_tensor(d.input_ids), -100) for d in some]
            )[None].to(self.device)
            self.computed += ids.numel()
            lengths = [len(d.input_ids) for d in some]
            edges: dict[str, Any] = {}
            if self.device.type == "cuda":
                ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=self.device)
                edges = {"cu_seq_lens_q": ends, "max_length_q": max(lengths)}
            with self.autocast():
                logits = self.model(input_ids=ids, position_ids=positions, use_cache=False, **edges).logits
            total += self._backward(logits[:, :-1], labels[:, 1:], trained)
        return total


def register_varlen() -> None:
    """Make `bench_varlen` known to transformers: PyTorch's attention over `cu_seq_lens_q`, as TRL gives it."""
    from transformers import AttentionInterface

    from lmtune.kernels.attention import torch_varlen

    def attend(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
        scaling: float | None = None, cu_seq_lens_q: Any = None, max_length_q: Any = None, **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        longest = int(max_length_q)
        q, k, v = (tensor.squeeze(0).transpose(0, 1).contiguous() for tensor in (query, key, value))
        attended = torch_varlen(q, k, v, cu_seq_lens_q, cu_seq_lens_q, longest, longest, scaling, (-1, 0))
        return attended[None], None

    AttentionInterface.register("bench_varlen", attend)
