"""Two models compared by their logits, a row at a time and a quarter of a row's logits at once.

    comparison = compare(sequences, trained, merged)
    comparison.difference, comparison.same_top1

Of each model the body runs once a row; its last hidden states are kept, and the head runs over some positions at a time
(by the model's own forward pass, so that caps and scales of the logits are in it). Kept are maxima and counts only.

A mixture of experts sends each token to the experts that its router scores highest. Where two scores are almost equal
rounding decides, and a steep router makes much of a small difference; from that token on two equal models differ by
more than rounding. `Routing` records the scores and who was chosen: tokens at and after such a choice are counted
apart, and only if the scores themselves agree to rounding.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

_SLICE = 2**22  # elements of logits that are subtracted at once
_FEWEST_POSITIONS = 64


class Reader:
    """A model that is asked for the logits of a row, some positions at a time."""

    def __init__(self, model: Any, mode: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        """
        Args:
            model: a transformers model, with or without adapter layers in it.
            mode: a context in which it computes.
        """
        self._model, self._mode = model, mode
        self._body = model.base_model  # all but the head, or the model itself where it has no such part
        self.routing = Routing(model)
        self._outputs: Any = None
        self._kept: dict[int, tuple[Any, list[torch.Tensor]]] = {}

    def keep(self, sequences: Sequence[Sequence[int]]) -> None:
        """Read all rows now, and keep their hidden states, so that the body is not needed any more."""
        for number, ids in enumerate(sequences):
            self._read(ids)
            self._kept[number] = (self._to_cpu(self._outputs), self.routing.chosen)

    def read(self, number: int, ids: Sequence[int]) -> None:
        """Run the body over a row."""
        if number in self._kept:
            self._outputs, self.routing.chosen = self._kept.pop(number)
        else:
            self._read(ids)

    @torch.no_grad()
    def logits(self, ids: Sequence[int], begin: int, end: int) -> torch.Tensor:
        """fp32 logits `[end - begin, V]` of the row that was read last, on the CPU."""
        outputs = self._outputs
        if self._body is self._model:
            found: torch.Tensor = outputs.logits[0, begin:end].float().cpu()
            return found
        device = self._device()
        part = type(outputs)(outputs)
        part["last_hidden_state"] = outputs.last_hidden_state[:, begin:end].to(device)
        before = self._body.__dict__.get("forward")
        self._body.forward = lambda *args, **kwargs: part
        try:
            with self._mode():
                tokens = torch.tensor([list(ids[begin:end])], device=device)
                logits: torch.Tensor = self._model(input_ids=tokens, use_cache=False).logits[0].float().cpu()
                return logits
        finally:
            del self._body.forward
            if before is not None:  # the library that loads a model's weights as they are needed puts one there
                self._body.forward = before

    @torch.no_grad()
    def _read(self, ids: Sequence[int]) -> None:
        def keep(module: Any, args: Any, output: Any) -> None:
            self._outputs = output

        hook = self._body.register_forward_hook(keep)
        try:
            with self._mode(), self.routing.recorded():
                can_be_few = "logits_to_keep" in inspect.signature(type(self._model).forward).parameters
                few = {"logits_to_keep": 1} if can_be_few and self._body is not self._model else {}
                tokens = torch.tensor([list(ids)], device=self._device())
                whole = self._model(input_ids=tokens, use_cache=False, **few)
        finally:
            hook.remove()
        if self._body is not self._model and not hasattr(self._outputs, "last_hidden_state"):
            self._body = self._model  # then its logits are kept for the whole row
            with self._mode():
                self._outputs = self._model(input_ids=tokens, use_cache=False) if few else whole

    def _device(self) -> torch.device:
        device = next(self._model.parameters()).device
        return torch.device("cpu") if device.type == "meta" else device

    def _to_cpu(self, outputs: Any) -> Any:
        kept = type(outputs)(outputs)
        kept["last_hidden_state"] = outputs.last_hidden_state.cpu()
        return kept


class Routing:
    """What the routers of a mixture of experts chose in the last row.

    Attributes:
        chosen: of each router in order: its scores `[t, E]` and the experts `[t, k]` that it chose.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.chosen: list[Any] = []

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Record the choices of one pass inside the block."""
        self.chosen = []
        hooks = [
            module.register_forward_hook(lambda m, args, output, index=index: self._keep(output, index))
            for kind, index in _routers(self._model) for module in self._model.modules() if isinstance(module, kind)
        ]  # fmt: skip
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def first_difference(self, other: Routing, bound: float) -> int | None:
        """The first token that another model's routers sent to other experts, or in other shares, where rounding of the
        scores explains it; None where there is none, or where the scores themselves differ by more than `bound` of the
        largest."""
        first = None
        for (scores, experts), (others, other_experts) in zip(self.chosen, other.chosen, strict=False):
            same = (experts.sort(-1).values == other_experts.sort(-1).values).all(-1)
            same &= (scores.softmax(-1) - others.softmax(-1)).abs().amax(-1) <= bound
            if first is not None:
                same = same[:first]  # what follows another choice is another token
            if bool(same.all()):
                continue
            place = int((~same).nonzero()[0])
            apart = float((scores[place] - others[place]).abs().max())
            if not apart <= bound * float(scores[place].abs().max()):  # a NaN is no small difference
                return None
            first = place
        return first

    def _keep(self, output: Any, index: int) -> None:
        parts = [
            part for part in (output if isinstance(output, tuple) else (output,)) if isinstance(part, torch.Tensor)
        ]
        scores = parts[min(index, len(parts) - 1)].detach().float().cpu()
        scores = scores.reshape(-1, scores.shape[-1])
        named = [part for part in parts if not part.is_floating_point()]
        if named:
            experts = named[0].cpu()
        else:
            config = self._model.config.get_text_config()
            experts = scores.topk(min(getattr(config, "num_experts_per_tok", 1) or 1, scores.shape[-1])).indices
        self.chosen.append((scores, experts.reshape(scores.shape[0], -1)))


@dataclass
class Comparison:
    """How far a model is from a reference, over all rows.

    Attributes:
        tokens: how many logits' rows were compared.
        difference: the largest difference of a logit, as a share of the reference's largest logit.
        same_top1: the share of tokens with the same likeliest next token.
        routed_otherwise: how many tokens a router's rounding has sent another way, or follow one that was.
        routed_difference: `difference` of those, which `difference` leaves out.
    """

    tokens: int = 0
    routed_otherwise: int = 0
    _most: float = 0.0
    _routed: float = 0.0
    _largest: float = 0.0
    _same: int = 0
    _first: int | None = field(default=None, repr=False)

    @property
    def difference(self) -> float:
        """Of the tokens that both models route alike; of all, where there is no such token."""
        return self._share(self._most if self.tokens > self.routed_otherwise else self._routed)

    @property
    def routed_difference(self) -> float | None:
        """Of the others."""
        return self._share(self._routed) if self.routed_otherwise else None

    @property
    def same_top1(self) -> float:
        """Of all tokens."""
        return self._same / max(1, self.tokens)

    def begin_row(self, first: int | None) -> None:
        """From the token `first` on, differences are counted apart."""
        self._first = first

    def add(self, begin: int, reference: torch.Tensor, other: torch.Tensor) -> None:
        """Compare two `[n, V]` of the same row, whose first position is `begin`."""
        rows = max(1, _SLICE // reference.shape[-1])
        for start in range(0, len(reference), rows):
            one, two = reference[start : start + rows], other[start : start + rows]
            most = (one - two).abs().amax(-1)  # [n]
            split = len(most) if self._first is None else min(len(most), max(0, self._first - begin - start))
            self._most = _max(self._most, most[:split])
            self._routed = _max(self._routed, most[split:])
            self.routed_otherwise += len(most) - split
            self._largest = max(self._largest, *(float(abs(end)) for end in one.aminmax()))
            self._same += int((one.argmax(-1) == two.argmax(-1)).sum())
            self.tokens += len(one)

    def _share(self, most: float) -> float:
        return most / self._largest if self._largest else most


def compare(
    sequences: Sequence[Sequence[int]], merged: Reader, others: Sequence[tuple[Reader, float]],
    each: Callable[[], None] | None = None,
) -> list[Comparison]:  # fmt: skip
    """Hold a model against others on some rows.

    Args:
        sequences: token ids of each row.
        merged: the model.
        others: each of the others, with the share by which a router's scores may differ where it chose otherwise.
        each: called after each row.
    """
    results = [Comparison() for _ in others]
    for number, ids in enumerate(sequences):
        for reader in (merged, *(reader for reader, _ in others)):
            reader.read(number, ids)
        for result, (reader, bound) in zip(results, others, strict=True):
            result.begin_row(reader.routing.first_difference(merged.routing, bound))
        # a quarter of a row, so that the logits of all models together are at most those of one row
        step = max(_FEWEST_POSITIONS, -(-len(ids) // 4))
        for begin in range(0, len(ids), step):
            end = min(begin + step, len(ids))
            written = merged.logits(ids, begin, end)
            for result, (reader, _) in zip(results, others, strict=True):
                result.add(begin, reader.logits(ids, begin, end), written)
        if each is not None:
            each()
    return results


def _max(so_far: float, values: torch.Tensor) -> float:
    """The larger of both; not a number where a value is none, which no bound then lets pass."""
    if not len(values):
        return so_far
    most = float(values.max())  # of a NaN among them, NaN
    return most if most != most or most > so_far else so_far


def _routers(model: Any) -> Iterator[tuple[type[Any], int]]:
    """The classes of a model's routers, as transformers knows them to record their scores, and where those are."""
    from transformers.utils.output_capturing import OutputRecorder

    for module in model.modules():
        recorders = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", ())
        for recorder in recorders if isinstance(recorders, (list, tuple)) else (recorders,):
            if isinstance(recorder, OutputRecorder):
                yield recorder.target_class, recorder.index or 0
            elif isinstance(recorder, type):
                yield recorder, 0
        if recorders:
            return
