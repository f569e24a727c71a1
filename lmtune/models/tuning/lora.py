"""LoRA adapters (https://arxiv.org/abs/2106.09685) through PEFT: attach, save as plain PEFT, load with every key.

PEFT drops a misspelt target module without a word, and only warns when tensors do not fit the base. Here both are
errors. An adapter folder is what plain PEFT loads, plus `lmtune.json`.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors.torch import load_file, save_file

from lmtune.config.schema import Dtype, LoraConfig, ModelConfig
from lmtune.errors import ConfigError, ModelError
from lmtune.io.atomic import name_disk_errors
from lmtune.io.text import format_list
from lmtune.kernels.lora_linear import exact_magnitudes, fuse
from lmtune.models.base import base_fingerprint, check_bitsandbytes, load_tokenizer
from lmtune.models.device import dense_weights_fit
from lmtune.models.head import classifier_head
from lmtune.models.structure import base_of, is_streamed
from lmtune.models.tuning.adapter_files import (
    CONFIG,
    METADATA,
    WEIGHTS,
    LoraSettings,
    Metadata,
    check_adapter,
    is_too_slow_to_match,
    trained_rows,
)
from lmtune.models.tuning.base import ParameterGroup, Tensors, TunedModel, trainable
from lmtune.models.tuning.beside_lora import beside_lora, hold_rows
from lmtune.models.tuning.targets import Targets, find_targets, for_peft, use_layers_own_adapter

if TYPE_CHECKING:
    from peft import LoraConfig as PeftConfig
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER = "default"


class Lora:
    """A LoRA adapter, new or started from a saved one."""

    kind: ClassVar[str] = "lora"
    load_dtype: ClassVar[Dtype | None] = None

    def __init__(self, config: LoraConfig, base: ModelConfig | None = None, start: Path | None = None) -> None:
        """
        Args:
            config: rank, alpha, dropout, target modules, variant.
            base: the stored model, whose fingerprint is compared with that of `start`; None does not compare.
            start: the adapter folder that training begins from; None for a new adapter.
        """
        self.config, self.base, self.start = config, base, start

    def changed(self, base: PreTrainedModel) -> Iterable[torch.nn.Parameter]:
        """None, but where PiSSA takes its start out of the weights, or rows of new tokens are put into them."""
        adds_rows = self.config.new_tokens or (self.start is not None and trained_rows(check_adapter(self.start)))
        return list(base.parameters()) if adds_rows or self.config.init_lora_weights == "pissa" else ()

    def apply(self, base: PreTrainedModel, seed: int, base_name: str) -> TunedModel:
        """Put the adapter on `base`; `adapter_config.json` will name `base_name`.

        Raises:
            ConfigError: a target module matches nothing in the model, or the variant does not run over this base.
            ModelError: `start` is damaged, or does not fit this base exactly.
        """
        if self.start is None:
            tokenizer = None
            if self.config.new_tokens:
                assert self.base is not None
                tokenizer = load_tokenizer(self.base, alone=True)
            return TunedModel(attach_adapter(base, self.config, seed, base_name, tokenizer))
        check_variant(base, self.config, find_targets(base, self.config.target_modules))
        changes = {"lora_dropout": self.config.dropout, "inference_mode": False, "task_type": _task(base)}
        fingerprint = None if self.base is None else base_fingerprint(self.base)
        peft_model = _with_saved(base, self.start, fingerprint, changes)
        peft_model.peft_config[ADAPTER].base_model_name_or_path = base_name
        return TunedModel(peft_model)

    def parameter_groups(self, model: TunedModel, weight_decay: float) -> list[ParameterGroup]:
        """All of the adapter; with LoRA+ its B matrices apart, at a higher rate."""
        parameters, ratio = model.trainable(), self.config.lora_plus_ratio
        if ratio == 1:
            return [{"params": list(parameters.values()), "weight_decay": weight_decay}]
        b = [parameter for name, parameter in parameters.items() if ".lora_B." in name]
        others = [parameter for name, parameter in parameters.items() if ".lora_B." not in name]
        return [
            {"params": others, "weight_decay": weight_decay},
            {"params": b, "weight_decay": weight_decay, "lr_scale": ratio},
        ]

    def initial_tensors(self, model: TunedModel) -> list[torch.Tensor]:
        """The adapter's weights, and with PiSSA those under it and its start."""
        made = [parameter.detach() for parameter in model.trainable().values()]
        if (initial := getattr(model.module, "lmtune_initial_adapter", None)) is not None:
            layers = [module for module in model.base.modules() if hasattr(module, "get_base_layer")]
            made += [*initial.values(), *(layer.get_base_layer().weight.detach() for layer in layers)]
        return made

    def save(self, model: TunedModel, folder: Path, metadata: Metadata, tensors: Tensors | None = None) -> None:
        """Write an adapter folder as plain PEFT reads it."""
        save_adapter(model.module, folder, metadata, tensors)

    def load(self, base: PreTrainedModel, folder: Path, fingerprint: str | None = None) -> TunedModel:
        """Put a saved adapter on `base`, in evaluation mode."""
        return TunedModel(load_adapter(base, folder, fingerprint))


def attach_adapter(
    model: torch.nn.Module, tuning: LoraConfig, seed: int, base_name: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PeftModel:  # fmt: skip
    """Wrap `model` in a PeftModel with a new adapter; its weights are fp32 and depend on `seed` alone.

    Args:
        model: the frozen base.
        tuning: rank, alpha, dropout, target modules, variant.
        seed: of the random initial weights.
        base_name: what `adapter_config.json` names as the base; never an absolute path.
        tokenizer: of the base, to which new tokens are added; needed if `tuning` names some.

    Raises:
        ConfigError: a target module matches nothing in the model, or the variant does not run over this base.
    """
    check_bitsandbytes("none")  # PEFT imports it
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    found = find_targets(model, tuning.target_modules)
    check_variant(model, tuning, found)
    beside = beside_lora(model, tuning, found, tokenizer)
    alpha = int(tuning.alpha) if float(tuning.alpha).is_integer() else tuning.alpha
    config = PeftLoraConfig(
        r=tuning.rank, lora_alpha=alpha, lora_dropout=tuning.dropout, use_rslora=tuning.use_rslora,
        use_dora=tuning.use_dora, init_lora_weights="pissa" if tuning.init_lora_weights == "pissa" else True,
        fan_in_fan_out=_is_transposed(model), task_type=_task(model),
        **for_peft(model, tuning.target_modules, found), **beside,
    )  # fmt: skip
    use_layers_own_adapter(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            peft_model = get_peft_model(model, config)  # type: ignore[arg-type, unused-ignore]
        except (ValueError, TypeError) as error:
            raise ConfigError(f"adapter: PEFT cannot attach it to this model: {error}") from error
    peft_model.peft_config[ADAPTER].base_model_name_or_path = base_name
    for parameter in trainable(peft_model).values():
        parameter.data = parameter.data.float()
    exact_magnitudes(peft_model, base_of(peft_model).dtype)
    if tuning.init_lora_weights == "pissa":
        # PiSSA moves the initial product out of the base; it is needed again to save a plain LoRA for the whole base
        peft_model.lmtune_initial_adapter = {n: p.detach().clone() for n, p in trainable(peft_model).items()}
    return peft_model


def save_adapter(model: PeftModel, folder: Path, metadata: Metadata, weights: Tensors | None = None) -> None:
    """Write `adapter_model.safetensors`, `adapter_config.json` and `lmtune.json` as plain PEFT reads them.

    Args:
        model: a PeftModel.
        folder: an existing folder.
        metadata: for `lmtune.json`.
        weights: trainable parameters by name to save instead of the model's own.

    Raises:
        OSError: names the file that could not be written.
    """
    from peft import get_peft_model_state_dict

    own = {n: p for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    known = {id(own[name]): tensor for name, tensor in (weights or {}).items()}
    state = {name: known.get(id(parameter), parameter.detach()) for name, parameter in own.items()}  # what is tied too
    config = model.peft_config[ADAPTER].to_dict()
    if (initial := getattr(model, "lmtune_initial_adapter", None)) is not None:
        state = dict(_without_pissa(state, initial, config))
    # PEFT's own names: without the adapter's, and of DoRA's magnitudes without `.weight` too
    stored = get_peft_model_state_dict(model, state, save_embedding_layers=False)
    stored = {name: tensor.contiguous().cpu() for name, tensor in stored.items()}
    seen: set[int] = set()
    for name, tensor in stored.items():
        if tensor.data_ptr() in seen:  # a tied weight: safetensors wants each tensor in memory of its own
            stored[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    write_adapter_files(folder, stored, config, metadata)


def write_adapter_files(folder: Path, stored: Tensors, config: Mapping[str, object], metadata: Metadata) -> None:
    """Write an adapter folder from tensors by PEFT's names and PEFT's config as a dict.

    Raises:
        OSError: names the file that could not be written.
    """
    with name_disk_errors(folder / WEIGHTS):
        save_file(dict(stored), folder / WEIGHTS, metadata={"format": "pt"})
    written = {**config, "inference_mode": True}
    if isinstance(modules := config["modules_to_save"], list):  # PEFT adds the names of a head at each load
        written["modules_to_save"] = list(dict.fromkeys(modules))
    for name, tree in ((CONFIG, written), (METADATA, metadata.as_dict())):
        with name_disk_errors(folder / name):
            (folder / name).write_text(json.dumps(tree, indent=2, default=_plain) + "\n", encoding="utf-8")


def load_adapter(model: torch.nn.Module, folder: Path, fingerprint: str | None = None) -> PeftModel:
    """Put a saved adapter on `model`; returns a PeftModel in evaluation mode, which computes as in training.

    Args:
        model: the base the adapter was trained over.
        folder: an adapter folder, ours or plain PEFT's.
        fingerprint: the base's fingerprint, compared with the one that `lmtune.json` holds.

    Raises:
        ModelError: a file is missing or damaged, or the tensors do not fit this base exactly.
    """
    peft_model = _with_saved(model, folder, fingerprint)
    peft_model.requires_grad_(False)
    fuse(peft_model, dense_weights_fit(peft_model, next(model.parameters()).device))
    return peft_model.eval()


@contextlib.contextmanager
def weights_of(model: PeftModel, folder: Path) -> Iterator[None]:
    """Inside the block the adapter of `model` has the weights that `folder` holds, of an adapter of the same form.

    Raises:
        ModelError: a file is missing or damaged, or the tensors do not fit.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    _, state = read_adapter(folder)
    _check_tensors(model, state, folder)
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    own = {name: tensor.clone() for name, tensor in own.items()}
    set_peft_model_state_dict(model, state)
    try:
        yield
    finally:
        set_peft_model_state_dict(model, own)


def add_adapter(peft_model: PeftModel, folder: Path, name: str, fingerprint: str | None = None) -> None:
    """Put a further saved adapter on the base of `peft_model`, by `name`; the active one stays.

    Args:
        peft_model: of `load_adapter`.
        folder, fingerprint: as of `load_adapter`.
        name: no part of which is the name of another adapter there.

    Raises:
        ModelError: as of `load_adapter`; or it trains rows of the embeddings, of which a model has one set.
    """
    from peft import set_peft_model_state_dict

    config, state = _saved(peft_model, folder, fingerprint)
    if config.trainable_token_indices:
        raise ModelError(f"{folder}: this adapter has tokens of its own (tuning.new_tokens); it cannot share a base")
    try:
        peft_model.add_adapter(name, config)
    except Exception as error:  # as in `_with_saved`
        raise ModelError(f"{folder}: PEFT cannot put this adapter beside the others: {error}") from error
    _check_tensors(peft_model, state, folder, name)
    set_peft_model_state_dict(peft_model, state, adapter_name=name)
    peft_model.requires_grad_(False)
    fuse(peft_model, dense_weights_fit(peft_model, next(peft_model.parameters()).device))
    peft_model.eval()


def _with_saved(
    model: torch.nn.Module, folder: Path, fingerprint: str | None, changes: dict[str, Any] | None = None
) -> PeftModel:
    """`model` with a saved adapter, some of whose settings are changed."""
    from peft import PeftModel, set_peft_model_state_dict

    lora, state = _saved(model, folder, fingerprint, changes)
    if rows := trained_rows(check_adapter(folder)):
        hold_rows(model, max(rows) + 1)
    try:
        peft_model = PeftModel(model, lora)  # type: ignore[arg-type, unused-ignore]
    except Exception as error:  # what PEFT raises for values that make no sense together is of any kind
        raise ModelError(f"{folder}: PEFT cannot put this adapter on the base model: {error}") from error
    if changes is not None:  # it is trained further: in fp32, before 16 bit could round what was saved
        for parameter in trainable(peft_model).values():
            parameter.data = parameter.data.float()
    _check_tensors(peft_model, state, folder)
    set_peft_model_state_dict(peft_model, state)
    return peft_model


def _saved(
    model: torch.nn.Module, folder: Path, fingerprint: str | None, changes: dict[str, Any] | None = None
) -> tuple[PeftConfig, Tensors]:
    """PEFT's config and the tensors of a saved adapter for `model`, some of whose settings are changed."""
    check_bitsandbytes("none")
    from peft import LoraConfig as PeftLoraConfig

    config, state = read_adapter(folder)
    trained_on = Metadata.read(folder).base_fingerprint
    if fingerprint and trained_on and fingerprint != trained_on:
        raise ModelError(
            f"{folder}: this adapter was trained over another base model; it does not fit this one's weights"
        )
    if is_too_slow_to_match(config, [name for name, _ in model.named_modules()]):
        raise ModelError(f"{folder}: {CONFIG}: a regular expression is too slow (possible catastrophic backtracking)")
    own = {"init_lora_weights": True, "fan_in_fan_out": _is_transposed(model)}
    try:
        lora = PeftLoraConfig(**{**config, **own, **(changes or {})})
        use_layers_own_adapter(lora)
    except Exception as error:  # what PEFT raises for values that make no sense together is of any kind
        raise ModelError(f"{folder}: PEFT cannot put this adapter on the base model: {error}") from error
    return lora, state


def read_adapter(folder: Path) -> tuple[LoraSettings, Tensors]:
    """Settings and tensors of an adapter folder, after `check_adapter`."""
    try:
        return check_adapter(folder), load_file(folder / WEIGHTS)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from None


def check_variant(model: torch.nn.Module, tuning: LoraConfig, found: Targets) -> None:
    """Raise ConfigError for a variant that PEFT cannot run over this base, which may be on the meta device."""
    if is_streamed(base_of(model)) and base_of(model).device.type == "cuda":
        outside = {"head", "embeddings"}
        reads = {"use_dora: true": tuning.use_dora, "modules_to_save": not outside.issuperset(tuning.modules_to_save)}
        if setting := next((setting for setting, is_set in reads.items() if is_set), None):
            raise ConfigError(
                f"tuning.{setting}: reads weights of layers before they are in the GPU's memory; set model.offload: "
                "none, or leave it out"
            )
    if not for_peft(model, tuning.target_modules, found)["target_parameters"]:
        return
    wrong = {
        f"dropout: {tuning.dropout:g}; expected 0": tuning.dropout > 0,
        "use_dora: true; expected false": tuning.use_dora,
        "init_lora_weights: pissa; expected default": tuning.init_lora_weights == "pissa",
    }
    if setting := next((setting for setting, is_set in wrong.items() if is_set), None):
        raise ConfigError(
            f"tuning.{setting} where the experts of a mixture are adapted (PEFT cannot); or name "
            "tuning.target_modules outside the experts, such as [q_proj, k_proj, v_proj, o_proj]"
        )


def _task(model: PreTrainedModel) -> str:
    """What PEFT calls the kind of a model: by it plain PEFT knows that a classifier's head comes with the adapter."""
    return "CAUSAL_LM" if classifier_head(model) is None else "SEQ_CLS"


def _is_transposed(model: torch.nn.Module) -> bool:
    """Whether linear layers hold `W[in, out]`, as GPT-2's do where they are not quantized."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in model.modules())


def _check_tensors(peft_model: PeftModel, state: Tensors, folder: Path, adapter: str = ADAPTER) -> None:
    """Raise ModelError with every tensor that is missing, unexpected, of another shape, or not finite."""
    from peft import get_peft_model_state_dict

    # without `save_embedding_layers=False` PEFT asks the Hub whether the base's vocabulary was changed
    wanted = get_peft_model_state_dict(peft_model, adapter_name=adapter, save_embedding_layers=False)
    problems = [f"missing: {name}" for name in wanted if name not in state]
    problems += [f"unexpected: {name}" for name in state if name not in wanted]
    for name in wanted.keys() & state.keys():
        if wanted[name].shape != state[name].shape:
            problems.append(f"{name}: shape {list(state[name].shape)}, the base needs {list(wanted[name].shape)}")
        elif not torch.isfinite(state[name]).all():
            problems.append(f"{name}: holds NaN or infinity")
    if problems or not state:
        raise ModelError(f"{folder}: this adapter does not fit the base model\n{format_list(sorted(problems), 8)}")


def _without_pissa(state: Tensors, initial: Tensors, config: dict[str, Any]) -> Tensors:
    """A plain LoRA for the whole base from one over PiSSA's residual: B A - B0 A0 = [B, -B0] [A; A0], rank doubled."""
    plain = {}
    for name, tensor in state.items():
        if "lora_" not in name:
            plain[name] = tensor
            continue
        start = initial[name].to(tensor)
        plain[name] = torch.cat([tensor, start], 0) if "lora_A" in name else torch.cat([tensor, -start], 1)
    config["r"] *= 2
    # the scaling alpha / rank (or alpha / sqrt(rank)) stays what it was
    config["lora_alpha"] *= math.sqrt(2) if config["use_rslora"] else 2
    config["init_lora_weights"] = True
    return plain


def _plain(value: object) -> object:
    """JSON for what `LoraConfig.to_dict` holds beyond plain types; sets sorted: equal runs write equal files."""
    return sorted(value) if isinstance(value, set) else str(value)
