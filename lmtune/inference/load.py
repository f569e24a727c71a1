"""A model ready to answer, from whatever the user has: a run, an adapter, a merged or plain folder, a Hub id, `tiny`.

    loaded = load_for_inference("runs/support")
    with loaded.use_base(): …          # the same weights without the adapter

The template, system prompt and stop tokens are those of training: an adapter folder keeps them in `lmtune.json`.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from lmtune.config.load import build_config, load_config
from lmtune.config.schema import Dtype, FinetuneConfig, LoraConfig, ModelConfig, Quantization
from lmtune.data.rendering import Renderer, Template
from lmtune.errors import CheckpointError, ConfigError, LmtuneError, ModelError, is_failure
from lmtune.forward.ensemble import EnsembleForward
from lmtune.forward.packed import PackedForward
from lmtune.inference.chat_model import ChatModel
from lmtune.inference.engine import TransformersEngine
from lmtune.io.atomic import write_json
from lmtune.io.console import err, escape
from lmtune.models.base import base_fingerprint, load_model, load_tokenizer, resolve_name, stored_head
from lmtune.models.changed_weights import write_changed
from lmtune.models.gguf import is_gguf
from lmtune.models.head import Head, classifier_head
from lmtune.models.locate import adapter_base, is_local, run_config, shareable_name
from lmtune.models.members import Members
from lmtune.models.model_folder import GENERATION, read_tree, write_adapter_texts
from lmtune.models.structure import empty_model
from lmtune.models.tensor_shards import checkpoint_weights
from lmtune.models.tuning.adapter_files import CONFIG, METADATA, WEIGHTS, Metadata, check_adapter, trained_rows
from lmtune.models.tuning.base import Tensors
from lmtune.models.tuning.beside_lora import add_rows, add_tokens
from lmtune.models.tuning.lora import ADAPTER as ACTIVE
from lmtune.models.tuning.lora import Lora, add_adapter, load_adapter, save_adapter
from lmtune.models.validate import CONFIG as MODEL_CONFIG
from lmtune.models.validate import tokenizer_problem
from lmtune.runs.ensembles import EnsembleFile, Method, find_ensemble
from lmtune.runs.store import (
    STATE,
    RunDirectory,
    checkpoint_folders,
    find_run,
    near_runs,
    problem_of,
    run_hint,
    similar_runs,
    step_of,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TARGETS = "a run, an adapter or model folder, a GGUF file, a Hub id, or tiny"


@dataclass(frozen=True, kw_only=True)
class LoadedModel(ChatModel):
    """A model of this process, in evaluation mode.

    Attributes:
        model: a transformers model, or a PeftModel over one.
        tokenizer: its tokenizer.
        has_adapter: whether `use_base` makes a difference; not for a classifier, whose base has no head.
        member_runs: the runs that the members come from; empty where one is an adapter without its run.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    member_runs: tuple[RunDirectory, ...] = ()
    engine: TransformersEngine = field(repr=False)

    def packed_forward(self) -> PackedForward:
        """Scores rows with this model, or with its members."""
        if not self.members.adapters:
            return PackedForward(self.model)
        return EnsembleForward(cast("PeftModel", self.model), self.members, self.head)

    @contextlib.contextmanager
    def use_base(self) -> Iterator[None]:
        """The base model inside the block; no-op without an adapter."""
        if not self.has_adapter:
            yield
            return
        with self.model.disable_adapter():
            yield


def load_for_inference(
    target: str, quantization: Quantization | None = None, base: str | None = None, method: Method | None = None
) -> LoadedModel:  # fmt: skip
    """Load what `target` names.

    Args:
        target: run directory or name, ensemble, adapter folder, merged or plain model folder, GGUF file, Hub id, or
            `tiny`.
        quantization: of the base; by default what the adapter was trained over, and none for a plain model.
        base: where the base of a run or adapter is, a folder, GGUF file or Hub id, if not where it names it.
        method: of an ensemble, in place of its own.

    Raises:
        ConfigError: `base` is given for a model without adapter, or `method` for one that is no ensemble.
        ModelError: no such run, adapter or model, or a damaged one.
    """
    if not target.strip():
        raise ModelError(f"no model is named; give {_TARGETS}")
    if (ensemble := find_ensemble(target)) is not None:
        return load_members(EnsembleFile.read(ensemble), ensemble, quantization, base, method)
    if method is not None:
        raise ConfigError(f"--vote: {target} is one model; expected an ensemble, with members that vote; leave it out")
    run = find_run(target)
    if run is not None:
        if not isinstance((settings := load_config(FinetuneConfig, run.config)).tuning, LoraConfig):
            return replace(_load_whole(run, settings, quantization, base), run=run)
        config = run_config(run, base)
        model = config.model if quantization is None else replace(config.model, quantization=quantization)
        with usable_adapter(run, base) as adapter:
            return replace(_load_with_adapter(adapter, model, f"{run.name} ({config.model.name})"), run=run)
    folder = Path(target)
    run = find_run(folder.resolve().parent) if folder.is_dir() else None  # its adapter or merged folder
    if (folder / WEIGHTS).is_file() or (folder / CONFIG).is_file():
        loaded = _load_with_adapter(folder, adapter_base(folder, quantization, base), folder.resolve().name)
        return replace(loaded, run=run)
    if base is not None:
        raise ConfigError(f"--base: {target} has no adapter, so no base belongs to it; leave --base out")
    _check_spelling(target)
    try:
        return replace(_load_plain(ModelConfig(name=target, quantization=quantization or "none")), run=run)
    except ModelError as error:
        is_missing = target != "tiny" and not folder.is_dir() and "check the spelling" in str(error)
        if not is_missing or ("/" in target and not near_runs(target)):
            raise
        raise ModelError(
            f"{target}: no such run, folder or model; {run_hint(target)} (a model of the Hub is user/name)"
        ) from error


def _load_whole(
    run: RunDirectory, config: FinetuneConfig, quantization: Quantization | None, base: str | None
) -> LoadedModel:
    """What a run made of the model's own weights: its folder, or the base with those of a checkpoint."""
    name = f"{run.name} ({config.model.name})"
    saved = saved_weights(run)
    if saved is None:
        if base is not None:
            raise ConfigError(f"--base: {run.path} holds a whole model, so no base belongs to it; leave --base out")
        dtype = config.model.dtype
        return replace(_load_plain(ModelConfig(name=str(run.merged), quantization=quantization or "none", dtype=dtype)),
                       name=name)  # fmt: skip
    config, head = run_config(run, base), run_head(run)
    # Held whole: what is written to a layer that comes and goes would be gone with it.
    model = load_model(replace(config.model, offload="none"), head=head)
    tokenizer = load_run_tokenizer(config)
    with torch.no_grad():
        for key, tensor in saved.weights.items():
            model.get_parameter(key).copy_(tensor)
    renderer = build_renderer(tokenizer, config.model, config.data.template, config.data.system, now=run.rendered_at())
    metadata = run_metadata(config, renderer, base_fingerprint(config.model), head=head)
    return loaded_model(model, tokenizer, config.model, name, metadata, has_adapter=False)


def _load_with_adapter(folder: Path, base: ModelConfig, name: str) -> LoadedModel:
    metadata = Metadata.read(folder)
    model = load_model(base, head=metadata.head)
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = saved_tokenizer(folder) if has_tokenizer else load_tokenizer(base)
    if has_tokenizer and (rows := trained_rows(check_adapter(folder))):
        plain = load_tokenizer(base)
        new = [str(token) for token in tokenizer.convert_ids_to_tokens(sorted(set(rows)))]
        if not set(new) & plain.get_vocab().keys():  # the base alone has the rows that training began with
            add_rows(model, plain, new)
    model = load_adapter(model, folder, base_fingerprint(base))
    return loaded_model(model, tokenizer, base, name, metadata, has_adapter=metadata.head is None)


def load_members(
    ensemble: EnsembleFile, folder: Path, quantization: Quantization | None = None, base: str | None = None,
    method: Method | None = None,
) -> LoadedModel:  # fmt: skip
    """The adapters of all members of an ensemble in `folder` on one base, to answer together.

    Raises:
        ModelError: a member is not there, or its base, head or prompts are others than those of the first.
    """
    places = ensemble.places(folder)
    first = load_for_inference(str(places[0]), quantization, base)
    if not hasattr(first.model, "peft_config"):
        raise ModelError(f"{places[0]}: no LoRA adapter; the members of an ensemble are adapters of one base")
    # of one length, since PEFT finds an adapter's tensors by its name in theirs
    names = [ACTIVE, *(f"member-{number:04d}" for number in range(2, len(places) + 1))]
    with _adapter_of(places[0], base) as adapter:
        shared = _shared(Metadata.read(adapter))
    for name, place in zip(names[1:], places[1:], strict=True):
        with _adapter_of(place, base) as adapter:
            own = _shared(Metadata.read(adapter))
            if apart := [key for key, value in own.items() if value != shared[key]]:
                raise ModelError(f"{place}: another {apart[0]} than {places[0]} has; members of an ensemble share it")
            add_adapter(cast("PeftModel", first.model), adapter, name)
    members = Members(tuple(names), ensemble.weights, method or ensemble.method)
    name, runs = f"{folder.name} ({len(names)} members: {first.name}, …)", [find_run(place) for place in places]
    known = tuple(run for run in runs if run is not None)
    return replace(first, name=name, members=members, member_runs=known if len(known) == len(runs) else ())


def _shared(metadata: Metadata) -> dict[str, Any]:
    """What the members of an ensemble have in common, by what it is called."""
    head = metadata.head
    return {
        "base model": metadata.base_fingerprint, "quantization": metadata.quantization, "template": metadata.template,
        "system prompt": metadata.system, "head": None if head is None else (head.kind, head.labels),
    }  # fmt: skip


@contextlib.contextmanager
def _adapter_of(place: Path, base: str | None) -> Iterator[Path]:
    """The adapter folder of a run, or `place`, for as long as the block lasts."""
    run = find_run(place)
    with contextlib.nullcontext(place) if run is None else usable_adapter(run, base) as adapter:
        yield adapter


def _load_plain(model: ModelConfig) -> LoadedModel:
    metadata = Metadata.read(Path(resolve_name(model.name)))
    loaded = load_model(model)
    if metadata.head is None and classifier_head(loaded) is not None:  # another tool's
        metadata = replace(metadata, head=stored_head(model))
    tokenizer = load_tokenizer(model)
    return loaded_model(loaded, tokenizer, model, Path(model.name).name, metadata, has_adapter=False)


def loaded_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, base: ModelConfig, name: str, metadata: Metadata,
    has_adapter: bool, engine: TransformersEngine | None = None,
) -> LoadedModel:  # fmt: skip
    """A model with the renderer that its metadata describe, and an engine of its own unless one is given."""
    renderer = build_renderer(
        tokenizer, base, metadata.template, metadata.system, stop_token_ids=metadata.stop_token_ids
    )
    return LoadedModel(
        name=name, renderer=renderer, engine=engine or TransformersEngine(model), has_adapter=has_adapter,
        system=metadata.system, trained_at=metadata.rendered_at, head=metadata.head, model=model, tokenizer=tokenizer,
    )  # fmt: skip


def _check_spelling(target: str) -> None:
    """Raise ModelError for a name in `runs/`, or almost a run's, that is no known model: it is not asked of the Hub."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if target == "tiny" or is_local(target) or is_gguf(target):
        return
    near, is_run = similar_runs(target), Path(target).parent.name == "runs"
    try:
        is_known = isinstance(try_to_load_from_cache(target, "config.json"), str)
    except HFValidationError:  # no model can have this name
        is_known = False
    if is_run or (near and not is_known):
        hint = f"did you mean {' or '.join(near)}?" if near else run_hint(Path(target).name)
        raise ModelError(f"{target}: no such run or folder; {hint} (a model of the Hub is user/name)")


# --- the tokenizer, the renderer and the stop tokens


def load_run_tokenizer(config: FinetuneConfig, alone: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a run: the base's, with the tokens that the run adds; `alone`: no model will be loaded after it.

    Raises:
        ConfigError: a token to add is one already.
        ModelError: the base's cannot be found or read.
    """
    tokenizer = load_tokenizer(config.model, alone)
    if isinstance(config.tuning, LoraConfig) and config.tuning.new_tokens:
        add_tokens(tokenizer, config.tuning.new_tokens)
    return tokenizer


def build_renderer(
    tokenizer: PreTrainedTokenizerBase, model: ModelConfig, template: Template = "auto", system: str | None = None, *,
    stop_token_ids: Sequence[int] = (), now: str | None = None,
) -> Renderer:  # fmt: skip
    """The renderer of a run: its template and system prompt, and all stop tokens that the model's own config names.

    `stop_token_ids` are more of them, from `lmtune.json`; `now` is the time for a template that writes it.
    """
    return Renderer(tokenizer, template, system, (*generation_stop_tokens(model), *stop_token_ids), now)


def generation_stop_tokens(model: ModelConfig) -> tuple[int, ...]:
    """The end tokens in the base's generation config, if it has one."""
    from transformers import GenerationConfig

    try:
        ids = GenerationConfig.from_pretrained(resolve_name(model.name), revision=model.revision).eos_token_id
    except (OSError, ValueError):  # many base models have no generation_config.json
        return ()
    return () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)


def stop_tokens(folder: Path) -> tuple[int, ...]:
    """What the model of an adapter folder stops at, the trained end of an answer first.

    Raises:
        ModelError: neither `lmtune.json` nor `generation_config.json` names one.
    """
    if ids := Metadata.read(folder).stop_token_ids:
        return ids
    if stated := read_tree(folder / GENERATION).get("eos_token_id"):
        return tuple(stated) if isinstance(stated, list) else (stated,)
    raise ModelError(f"{folder}: generation_config.json names no end token (eos_token_id); train the adapter again")


def saved_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside an adapter, with its template; such a folder has no config.json of a model."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except BaseException as error:
        if not is_failure(error):
            raise
        raise ModelError(f"{folder}: cannot read its tokenizer: {error}") from error
    if problem := tokenizer_problem(tokenizer):
        raise ModelError(f"{folder}: {problem}")
    return tokenizer


def run_metadata(
    config: FinetuneConfig, renderer: Renderer, fingerprint: str, folder: Path | None = None, head: Head | None = None
) -> Metadata:
    """The metadata of a run's adapter; a base in a folder is named from `folder`, where the file will be."""
    return Metadata(
        base_model=shareable_name(config.model.name, folder), revision=config.model.revision,
        quantization=config.model.quantization, dtype=config.model.dtype, base_fingerprint=fingerprint,
        template=config.data.template, system=config.data.system, stop_token_ids=tuple(renderer.stop_token_ids),
        stop_tokens=tuple(renderer.stop_tokens), rendered_at=renderer.rendered_at, head=head,
    )  # fmt: skip


def run_head(run: RunDirectory) -> Head | None:
    """The head that a run trains; None where it trains a language model.

    Raises:
        CheckpointError: `environment.json` is damaged.
    """
    tree = run.read_json(run.environment).get("head")
    try:
        return None if tree is None else build_config(Head, cast("dict[str, object]", tree), "head")
    except ConfigError as error:
        raise CheckpointError(f"{run.environment}: damaged: {error}; restore it from a copy") from None


# --- a run that is not finished: the adapter of a checkpoint


_TRIES = 5  # the run deletes checkpoints as it writes newer ones


@dataclass(frozen=True)
class Saved:
    """A checkpoint's weights.

    Attributes:
        step: after which it was saved.
        total_steps: of the run.
        is_best: whether it was chosen by the validation rows, and is not the newest.
        weights: what is trained, by name.
    """

    step: int
    total_steps: int | None
    is_best: bool
    weights: Tensors

    def __str__(self) -> str:
        of = f" of {self.total_steps}" if self.total_steps else ""
        return f"step {self.step}{of}" + (", the best so far by its validation loss" if self.is_best else "")


@contextlib.contextmanager
def usable_adapter(run: RunDirectory, base: str | None = None) -> Iterator[Path]:
    """An adapter folder with the run's weights so far, for as long as the block lasts.

    Raises:
        ModelError: the run has neither an adapter nor a checkpoint that is whole.
    """
    saved = saved_weights(run)
    if saved is None:
        yield run.adapter
        return
    with tempfile.TemporaryDirectory(prefix="lmtune-") as folder:
        write_adapter(run, saved, Path(folder), base)
        yield Path(folder)


def saved_weights(run: RunDirectory) -> Saved | None:
    """What to take of a run that is not finished, and says so; None where its result is there.

    Raises:
        ModelError: the run has neither a result nor a checkpoint that is whole.
    """
    status = None
    with contextlib.suppress(LmtuneError):  # a summary that is damaged says nothing about the weights
        status = run.read_summary().status
    tuning = load_config(FinetuneConfig, run.config).tuning
    saved = None if run.has_result(tuning) and status in ("complete", None) else newest_saved(run)
    if saved is not None:
        err.print(f"{escape(str(run.path))} is not finished: uses {saved}")
    elif not (run.result(tuning) / (CONFIG if isinstance(tuning, LoraConfig) else MODEL_CONFIG)).exists():
        # what is there and no file is named by who reads it
        what = "adapter" if isinstance(tuning, LoraConfig) else "model"
        raise ModelError(f"{run.path}: this run has no {what} yet; finish it with the same `lmtune finetune` command")
    return saved


def newest_saved(run: RunDirectory) -> Saved | None:
    """The weights of the run's newest checkpoint that is whole, or of its best one where the run keeps that."""
    for _ in range(_TRIES):
        with contextlib.suppress(OSError):
            folders = [path for path in reversed(checkpoint_folders(run.checkpoints)) if problem_of(path) is None]
            if not folders:
                return None
            state = json.loads((folders[0] / STATE).read_text(encoding="utf-8"))
            keep_best = load_config(FinetuneConfig, run.config).evaluation.keep_best
            best = state.get("counters", {}).get("best_step") if keep_best else None
            chosen = next((path for path in folders if step_of(path) == best), folders[0])
            total = state.get("total_steps")
            return Saved(step_of(chosen), total, chosen != folders[0], dict(checkpoint_weights(chosen)))
    return None


def saved_at(run: RunDirectory, step: int) -> Saved:
    """The weights of the run's checkpoint after `step`.

    Raises:
        ModelError: it is not there any more, or not whole.
    """
    folder = next((path for path in checkpoint_folders(run.checkpoints) if step_of(path) == step), None)
    if folder is None or problem_of(folder) is not None:
        raise ModelError(f"{run.path}: no whole checkpoint of step {step}; the newest are kept (run.keep_checkpoints)")
    return Saved(step, None, False, dict(checkpoint_weights(folder)))


def write_adapter(run: RunDirectory, saved: Saved, folder: Path, base: str | None = None) -> None:
    """Fill an empty folder as the run would fill `adapter/` with these weights; `base` is where its base is now."""
    config = run_config(run, base)
    tokenizer = load_run_tokenizer(config)
    renderer = build_renderer(tokenizer, config.model, config.data.template, config.data.system, now=run.rendered_at())
    head = run_head(run)
    metadata = run_metadata(config, renderer, base_fingerprint(config.model), run.adapter, head)
    assert isinstance(config.tuning, LoraConfig)
    if config.tuning.init_lora_weights == "pissa":  # which takes a part of the base's weights
        model = load_model(replace(config.model, offload="none"), head=head)
    else:
        model = empty_model(resolve_name(config.model.name), config.model.revision, head)
    tuned = Lora(config.tuning, config.model).apply(model, config.train.seed, shareable_name(config.model.name))
    save_adapter(tuned.module, folder, metadata, saved.weights)
    write_adapter_texts(config.model, renderer, folder, writes=head is None)


def write_model(run: RunDirectory, saved: Saved, folder: Path, base: str | None = None) -> None:
    """Fill an empty folder as the run would fill `merged/` with these weights; `base` is where its base is now."""
    config = run_config(run, base)
    stored = replace(config.model, dtype=cast(Dtype, run.trained_dtype() or "float32"))
    tokenizer = load_run_tokenizer(config)
    renderer = build_renderer(tokenizer, config.model, config.data.template, config.data.system, now=run.rendered_at())
    head = run_head(run)
    metadata = run_metadata(config, renderer, base_fingerprint(config.model), run.merged, head)
    write_changed(stored, load_model(stored, "cpu", head), saved.weights, folder, metadata.stop_token_ids)
    write_json(folder / METADATA, metadata.as_dict())
    write_adapter_texts(config.model, renderer, folder, writes=head is None)
