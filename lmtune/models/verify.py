"""Is a merged model the one that was trained? The logits of both on the same rows, and the largest difference.

A row runs once through each model's body, and the head runs over some positions at a time through the model's own
forward pass, so that caps and scales of logits are included. Only maxima and counts are kept.

A mixture of experts sends each token to the experts with the highest scores. Where two scores are almost equal,
rounding decides, and from that token on two equal models differ by more than rounding. Such tokens are *rerouted* and
counted apart, and only if the scores themselves agree to rounding.
"""

from __future__ import annotations

import contextlib
import inspect
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lmtune.errors import LmtuneError
from lmtune.io.console import progress, warn
from lmtune.models.block_weights import BlockWeights, recompute_buffers
from lmtune.models.head import classifier_head
from lmtune.models.libraries import quiet_libraries
from lmtune.models.structure import config_and_class
from lmtune.models.tuning.adapter_files import Into

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SLICE = 2**22  # elements of logits that are subtracted at once
_FEWEST_POSITIONS = 64
_OFFLOADED = ".offloaded"


@dataclass(frozen=True)
class MergeReport:
    """How close a merged model is to the adapter model it was made from, on held-out rows.

    Attributes:
        into: `trained` (dequantized) or `original` base weights.
        dtype: of the written weights.
        rows, tokens: how much was compared.
        logits_difference: largest difference of a logit to the adapter over the same weights, relative to the largest.
        bound: the largest that is accepted.
        difference_to_trained: the same to the adapter over the base as it was trained, quantized or not.
        bound_to_trained: the largest that is accepted; None for `original`, which is meant to differ.
        top1_agreement: share of tokens for which the trained model has the same most likely next token.
        kl: mean over tokens of the Kullback-Leibler divergence of the merged model's next token from the trained
            model's, in nats.
        update_kept: share of the adapter's update of the weights, by its norm, that is left after rounding to `dtype`.
        rerouted_tokens: of a mixture of experts: tokens at or after one that rounding sent to other experts than in the
            adapter model; the differences above are of all other tokens.
        rerouted_difference: the largest difference of those tokens; None without such tokens.
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
    top1_agreement: float
    kl: float
    update_kept: float = 1.0
    rerouted_tokens: int = 0
    rerouted_difference: float | None = None
    accepted: bool = False


def verify(
    folder: Path, sequences: Sequence[Sequence[int]], *, reference: LogitsReader, trained: LogitsReader | None,
    bound: float, bound_to_trained: float, into: Into, dtype: torch.dtype, device: torch.device,
) -> MergeReport:  # fmt: skip
    """Compare a merged folder with the adapter model.

    Args:
        folder: the merged model.
        sequences: token ids of held-out rows.
        reference: the adapter over the same weights in fp32.
        trained: the adapter model as it was trained; None where that is the same.
        bound, bound_to_trained: how much rounding explains.
        into: which base weights were merged into.
        dtype: of the written weights.
        device: on a GPU the merged model is loaded whole.
    """
    offloaded, is_whole = folder / _OFFLOADED, device.type == "cuda"
    others = [(reference, bound), *([(trained, bound_to_trained)] if trained is not None else [])]
    try:
        with progress("comparing the merged model", total=len(sequences)) as shown:
            try:
                results = compare(sequences, _load_plain(folder, offloaded, device, is_whole), others, shown.advance)
            except RuntimeError as error:
                if is_whole or "meta" not in str(error):
                    raise
                # A layer reads a weight of another module (Llama 4), so all weights must be in memory
                shown.at(0)
                results = compare(sequences, _load_plain(folder, offloaded, device, True), others, shown.advance)
    finally:
        shutil.rmtree(offloaded, ignore_errors=True)
    to_reference, to_trained = results[0], results[-1]
    return MergeReport(
        into=into,
        dtype=str(dtype).removeprefix("torch."),
        rows=len(sequences),
        tokens=to_reference.tokens,
        logits_difference=to_reference.difference,
        bound=bound,
        difference_to_trained=to_trained.difference,
        bound_to_trained=None if into == "original" else bound_to_trained,
        top1_agreement=to_trained.top1_agreement,
        kl=to_trained.kl,
        rerouted_tokens=max(result.rerouted for result in results),
        rerouted_difference=max((d for r in results if (d := r.rerouted_difference) is not None), default=None),
    )


def require_bounds(report: MergeReport, accept_difference: bool = False) -> MergeReport:
    """The report; LmtuneError where a difference is larger than its bound, unless it is accepted."""
    for difference, bound, other in (
        (report.logits_difference, report.bound, "the adapter over the same weights"),
        (report.difference_to_trained, report.bound_to_trained, "the model as it was trained"),
    ):
        if bound is not None and not difference <= bound:  # true for NaN
            text = (
                f"the merged model's logits differ from those of {other} by {difference:.2g} of the largest logit; "
                f"expected at most {bound:.2g} (rounding)"
            )
            if not accept_difference or difference != difference:
                way = "" if report.dtype == "float32" else "--dtype float32 writes it without rounding, "
                raise LmtuneError(f"{text}; nothing was kept; {way}--accept-difference keeps such a model")
            warn(f"{text}; kept, because of --accept-difference")
            report = replace(report, accepted=True)
    return report


def _load_plain(folder: Path, offloaded: Path, device: torch.device, is_whole: bool) -> LogitsReader:
    """The folder as any user of transformers loads it, computing in fp32; its weights stay on the disk until the layer
    that they belong to runs, unless `is_whole`."""
    quiet_libraries()
    _, kind = config_and_class(folder)
    if is_whole:
        model = kind.from_pretrained(folder, dtype="auto", device_map={"": device}).eval()
        weights = BlockWeights(model)
        recompute_buffers(model)
        return LogitsReader(model, partial(weights.in_dtype, torch.float32))
    model = kind.from_pretrained(folder, dtype="auto", device_map={"": "disk"}, offload_folder=str(offloaded)).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.float()  # without memory: what is read from the disk becomes this dtype
    recompute_buffers(model)
    return LogitsReader(model, torch.no_grad)


def compare(
    sequences: Sequence[Sequence[int]], merged: LogitsReader, others: Sequence[tuple[LogitsReader, float]],
    each: Callable[[], None] | None = None,
) -> list[Comparison]:  # fmt: skip
    """Compare a model with others, each with the share by which a router's scores may differ where it chose otherwise.

    `each` is called after each row.
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


class LogitsReader:
    """A model that is asked for the logits of a row, some positions at a time."""

    def __init__(self, model: PreTrainedModel, mode: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        """`model` has adapter layers in it or not, and computes in the context `mode`."""
        self._model, self._mode = model, mode
        self._body = model.base_model  # all but the head, or the model itself where it has no such part
        self.routing = Routing(model)
        self._outputs: Any = None
        self._precomputed: dict[int, tuple[Any, list[tuple[torch.Tensor, torch.Tensor]]]] = {}

    def precompute(self, sequences: Sequence[Sequence[int]]) -> None:
        """Run the body over all rows now, and keep their hidden states, so that it can be freed."""
        for number, ids in enumerate(sequences):
            self._run_body(ids)
            kept = type(self._outputs)(self._outputs)
            kept["last_hidden_state"] = self._outputs.last_hidden_state.cpu()
            self._precomputed[number] = (kept, self.routing.chosen)

    def read(self, number: int, ids: Sequence[int]) -> None:
        """Run the body over a row."""
        if number in self._precomputed:
            self._outputs, self.routing.chosen = self._precomputed.pop(number)
        else:
            self._run_body(ids)

    @torch.no_grad()
    def logits(self, ids: Sequence[int], begin: int, end: int) -> torch.Tensor:
        """fp32 logits `[end - begin, V]` of the row that was read last, on the CPU."""
        outputs = self._outputs
        if self._body is self._model:
            found: torch.Tensor = outputs.logits[0, begin:end].float().cpu()
            return found
        device, head = self._device(), classifier_head(self._model)
        if head is not None:  # whose own forward pass reads one position alone
            with self._mode():
                scores: torch.Tensor = head(outputs.last_hidden_state[0, begin:end].to(device).float()).float().cpu()
                return scores
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
            if before is not None:  # accelerate puts one there when it loads weights as they are needed
                self._body.forward = before

    @torch.no_grad()
    def _run_body(self, ids: Sequence[int]) -> None:
        def keep(module: Any, args: Any, output: Any) -> None:
            self._outputs = output

        hook = self._body.register_forward_hook(keep)
        try:
            with self._mode(), self.routing.recorded():
                can_skip_head = "logits_to_keep" in inspect.signature(type(self._model).forward).parameters
                few = {"logits_to_keep": 1} if can_skip_head and self._body is not self._model else {}
                tokens = torch.tensor([list(ids)], device=self._device())
                whole = self._model(input_ids=tokens, use_cache=False, **few)
        finally:
            hook.remove()
        if self._body is not self._model and not hasattr(self._outputs, "last_hidden_state"):
            self._body = self._model  # then its logits are kept for the whole row
            with self._mode():
                self._outputs = self._model(input_ids=tokens, use_cache=False) if few else whole

    def _device(self) -> torch.device:
        device: torch.device = next(self._model.parameters()).device
        return torch.device("cpu") if device.type == "meta" else device


class Comparison:
    """How far a model is from a reference, over all rows.

    Attributes:
        tokens: how many positions were compared.
        rerouted: how many tokens rounding sent to other experts, or follow one that was.
    """

    def __init__(self) -> None:
        self.tokens = self.rerouted = self._agreeing = 0
        self._divergence = 0.0
        self._difference = self._rerouted_difference = self._largest_logit = torch.zeros(())
        self._first_rerouted: int | None = None

    @property
    def difference(self) -> float:
        """The largest of a logit, as a share of the largest logit; of rerouted tokens only where all are."""
        is_proven = self.tokens > self.rerouted
        return self._share(self._difference if is_proven else self._rerouted_difference)

    @property
    def rerouted_difference(self) -> float | None:
        """The same of rerouted tokens."""
        return self._share(self._rerouted_difference) if self.rerouted else None

    @property
    def top1_agreement(self) -> float:
        """The share of tokens with the same most likely next token."""
        return self._agreeing / max(1, self.tokens)

    @property
    def kl(self) -> float:
        """Mean divergence of the other's next token from the reference's, in nats."""
        return max(0.0, self._divergence / max(1, self.tokens))

    def begin_row(self, first_rerouted: int | None) -> None:
        """Tokens from `first_rerouted` on are counted apart."""
        self._first_rerouted = first_rerouted

    def add(self, begin: int, reference: torch.Tensor, other: torch.Tensor) -> None:
        """Compare two `[n, V]` of the same row, whose first position is `begin`."""
        rows = max(1, _SLICE // reference.shape[-1])
        for start in range(0, len(reference), rows):
            one, two = reference[start : start + rows], other[start : start + rows]
            most = (one - two).abs().amax(-1)  # [n]
            first = self._first_rerouted
            split = len(most) if first is None else min(len(most), max(0, first - begin - start))
            zero = torch.zeros(1)  # `maximum` and `max` keep a NaN, which no bound then lets pass
            self._difference = torch.maximum(self._difference, torch.cat([most[:split], zero]).max())
            self._rerouted_difference = torch.maximum(self._rerouted_difference, torch.cat([most[split:], zero]).max())
            self._largest_logit = torch.maximum(self._largest_logit, torch.stack(one.aminmax()).abs().max())
            self.rerouted += len(most) - split
            logs, others = one.double().log_softmax(-1), two.double().log_softmax(-1)  # in fp32 small ones round to 0
            self._divergence += float((logs.exp() * (logs - others)).sum())
            self._agreeing += int((one.argmax(-1) == two.argmax(-1)).sum())
            self.tokens += len(one)

    def _share(self, difference: torch.Tensor) -> float:
        return float(difference / self._largest_logit) if self._largest_logit else float(difference)


class Routing:
    """What the routers of a mixture of experts chose in the last row.

    Attributes:
        chosen: of each router in order: its scores `[t, E]` and the experts `[t, k]` that it chose.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self.chosen: list[tuple[torch.Tensor, torch.Tensor]] = []

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Record the choices of one pass inside the block."""
        self.chosen = []
        hooks = [
            module.register_forward_hook(lambda m, args, output, index=index: self._record(output, index))
            for kind, index in _routers(self._model) for module in self._model.modules() if isinstance(module, kind)
        ]  # fmt: skip
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def first_difference(self, other: Routing, bound: float) -> int | None:
        """The first token that another model routes to other experts, or in other shares, because of rounding.

        None where there is no such token, or where the scores themselves differ by more than `bound` of the largest.
        """
        first = None
        for (scores, experts), (others, other_experts) in zip(self.chosen, other.chosen, strict=False):
            same = (experts.sort(-1).values == other_experts.sort(-1).values).all(-1)
            same &= (scores.softmax(-1) - others.softmax(-1)).abs().amax(-1) <= bound
            if first is not None:
                same = same[:first]  # after another choice the inputs differ
            if bool(same.all()):
                continue
            place = int((~same).nonzero()[0])
            apart = float((scores[place] - others[place]).abs().max())
            if not apart <= bound * float(scores[place].abs().max()):  # true for NaN
                return None
            first = place
        return first

    def _record(self, output: Any, index: int) -> None:
        parts = [p for p in (output if isinstance(output, tuple) else (output,)) if isinstance(p, torch.Tensor)]
        scores = parts[min(index, len(parts) - 1)].detach().float().cpu()
        scores = scores.reshape(-1, scores.shape[-1])
        experts = next((part.cpu() for part in parts if not part.is_floating_point()), None)
        if experts is None:
            config: Any = self._model.config
            most = getattr(config.get_text_config(), "num_experts_per_tok", 1) or 1
            experts = scores.topk(min(most, scores.shape[-1])).indices
        self.chosen.append((scores, experts.reshape(scores.shape[0], -1)))


def _routers(model: torch.nn.Module) -> Iterator[tuple[type[torch.nn.Module], int]]:
    """The classes of a model's routers, with the place of the scores in their outputs, as transformers records them."""
    from transformers.utils.output_capturing import OutputRecorder

    for module in model.modules():
        recorders: Any = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", ())
        for recorder in recorders if isinstance(recorders, (list, tuple)) else (recorders,):
            if isinstance(recorder, OutputRecorder):
                yield recorder.target_class, recorder.index or 0
            elif isinstance(recorder, type):
                yield recorder, 0
        if recorders:
            return
