"""Merging: the adapter's product added into the base's weights, and proof that nothing else changed.

For a base trained over in 4 or 8 bit the quantised weights are first turned back into numbers: merging into them as
they are would quantise the sum again, which moves the logits by several percent. So by default the merged model is
the one that was trained. `into="original"` adds the adapter to the base as published instead, which differs from what
was trained by the quantisation error; how much is measured and said.

The written folder is loaded again by plain transformers and its logits are compared twice: with the adapter over the
same weights, which proves the merge, and with the model as it was trained. Where layers in int8 have no adapter these
differ a little more, because bitsandbytes rounds activations to 8 bits there, which no merged model does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from lmtune.config import ModelConfig
from lmtune.errors import LmtuneError
from lmtune.models.adapters import load_adapter
from lmtune.models.fingerprint import base_fingerprint
from lmtune.models.libraries import quiet_libraries
from lmtune.models.loading import load_model, stored_dtype
from lmtune.writing import naming_in, new_folder

Into = Literal["trained", "original"]

# The most that logits may differ, relative to the largest one: what rounding the weights to their dtype costs.
BOUNDS = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
INT8_ACTIVATIONS = 8e-2  # what rounding activations to 8 bits adds to the comparison with the trained model


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

    def as_dict(self) -> dict[str, Any]:
        """For `merge.json` and the summary."""
        return asdict(self)


def merge(
    base: ModelConfig, adapter: Path, output: Path, into: Into, sequences: Sequence[Sequence[int]], tokenizer: Any,
    generation_config: Any, describe: Callable[[Path, MergeReport], None] | None = None,
) -> MergeReport:  # fmt: skip
    """Merge, write `output`, load it again, compare, and only then give it its name.

    Args:
        base: the model that was trained over, with its quantization.
        adapter: the adapter folder.
        output: the folder to write; an earlier one is replaced.
        into: which base weights to add to.
        sequences: token ids of held-out rows, for the comparison.
        tokenizer: saved beside the weights, with its template.
        generation_config: saved beside the weights, with the stop tokens.
        describe: adds what else belongs into the folder, such as its card, before it gets its name.

    Raises:
        LmtuneError: the merged weights are not finite, or the model differs by more than the bound; nothing is left
            behind.
        ConfigError: another process is writing `output` now.
        OSError: the disk is full or must not be written; nothing is left behind.
    """
    with new_folder(output) as staging:
        model = load_model(base)  # first: it looks at the files before anything reads them
        dtype, fingerprint = stored_dtype(base), base_fingerprint(base)
        model = load_adapter(model, adapter, fingerprint)
        trained, computed = logits(model, sequences), BOUNDS[model.get_base_model().dtype]
        if _rounds_activations(model):
            computed += INT8_ACTIVATIONS
        plain = load_model(replace(base, quantization="none")) if into == "original" else model.unload()
        model = load_adapter(_numbers(plain), adapter, fingerprint)
        reference = logits(model, sequences)
        with naming_in(output):
            _write(_merged(model).to(dtype), staging, tokenizer, generation_config)
            report = _compare(reference, trained, logits(_plain(staging), sequences), into, dtype, computed)
            _require_bounds(report)
            if describe is not None:
                describe(staging, report)
    return report


@torch.no_grad()
def logits(model: Any, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """fp32 logits `[t, V]` of each sequence of `t` tokens, each run alone, on the CPU."""
    device = next(model.parameters()).device
    return [
        model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False).logits[0].float().cpu()
        for ids in sequences
    ]


def _rounds_activations(model: Any) -> bool:
    """Whether a layer in int8 is bitsandbytes' own, without an adapter whose layer computes with the weights alone."""
    fused = {id(m.get_base_layer()) for m in model.modules() if hasattr(m, "lmtune_weight")}
    return any(type(m).__name__ == "Linear8bitLt" and id(m) not in fused for m in model.modules())


def _numbers(base: Any) -> Any:
    """The base in fp32, its quantised weights turned back into numbers.

    PEFT's layers over quantised weights would quantise the sum again, so this is done without an adapter on it.
    """
    if not getattr(base, "is_quantized", False):
        return base.float()
    plain = base.dequantize(dtype=base.dtype)  # its config may hold the name of one, which `dequantize` cannot take
    # how weights that were stored quantised were read, which `save_pretrained` would undo and cannot
    ways = getattr(plain, "_weight_conversions", None) or []
    plain._weight_conversions = [way for way in ways if _can_be_undone(way)]
    return plain.float()


def _can_be_undone(conversion: Any) -> bool:
    try:
        conversion.reverse_transform()
    except (NotImplementedError, ValueError):
        return False
    return True


def _merged(model: Any) -> Any:
    """The base with the adapter's product added; PEFT looks whether each sum is a number."""
    try:
        return model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        if "NaNs detected" not in str(error):
            raise
        raise LmtuneError(
            "the merged weights are not finite: the adapter's values are too large; nothing was kept; train it again, "
            "with a smaller train.learning_rate"
        ) from error


def _write(model: Any, folder: Path, tokenizer: Any, generation_config: Any) -> None:
    model.config._name_or_path = ""
    model.generation_config = generation_config
    model.save_pretrained(folder, state_dict=_as_published(model))
    tokenizer.save_pretrained(folder)


def _as_published(model: Any) -> dict[str, torch.Tensor]:
    """The weights as files of this architecture hold them: bitsandbytes turns GPT-2's transposed layers round."""
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        published = dict(type(model)(model.config).named_modules())
    state: dict[str, torch.Tensor] = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(published.get(name), Conv1D) and not isinstance(module, Conv1D):
            state[f"{name}.weight"] = state[f"{name}.weight"].T.contiguous()
    return state


def _plain(folder: Path) -> Any:
    """The folder as any user of transformers loads it, computing in fp32 so that only the weights are compared."""
    from transformers import AutoModelForCausalLM

    quiet_libraries()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _compare(
    reference: list[torch.Tensor], trained: list[torch.Tensor], merged: list[torch.Tensor], into: Into,
    dtype: torch.dtype, computed: float,
) -> MergeReport:  # fmt: skip
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(trained, merged, strict=True))
    tokens = sum(len(a) for a in merged)
    rounding = max(BOUNDS[dtype], computed)  # the trained model rounds activations to its dtype as well
    return MergeReport(
        into=into,
        dtype=str(dtype).removeprefix("torch."),
        rows=len(merged),
        tokens=tokens,
        logits_difference=_difference(reference, merged),
        bound=BOUNDS[dtype],
        difference_to_trained=_difference(trained, merged),
        bound_to_trained=None if into == "original" else rounding,
        same_first_choice=same / max(1, tokens),
    )


def _require_bounds(report: MergeReport) -> None:
    """Raise LmtuneError if the merged model is not the one that was trained."""
    for difference, bound, other in (
        (report.logits_difference, report.bound, "the adapter over the same weights"),
        (report.difference_to_trained, report.bound_to_trained, "the model as it was trained"),
    ):
        if bound is not None and not difference <= bound:  # a NaN is no small difference
            raise LmtuneError(
                f"the merged model's logits differ from those of {other} by {difference:.2g} of the largest, more than "
                f"the {bound:.2g} that rounding explains; nothing was kept; please report it"
            )


def _difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """The largest difference relative to the largest logit."""
    most = max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))
    return most / max(float(a.abs().max()) for a in one)
