"""A config composed to the parts of a run: what is loaded before the first step.

parts = compose(config, parallel)       # tokenizer, rows, tuned model, forward pass, objective
parts.job(resumed)                     # what `lmtune.training.loop.train` works with
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from lmtune.batching.packing import MicroBatch
from lmtune.batching.plan import Planner
from lmtune.batching.prefixes import Ints, shareable_prefix
from lmtune.config.metrics import GENERATED, Direction, direction_of
from lmtune.config.schema import (
    Dtype,
    FinetuneConfig,
    FullConfig,
    LoraConfig,
    ModelConfig,
    PartialConfig,
)
from lmtune.data.rendering import Renderer
from lmtune.data.selection import Selection
from lmtune.data.store import LoadedData, load_data
from lmtune.data.types import ExampleStore, WithValues
from lmtune.errors import ConfigError, LmtuneError, ModelError
from lmtune.evaluation.generative import Answer
from lmtune.evaluation.measures import majority
from lmtune.evaluation.scoring import (
    RowScores,
    Scores,
    check_lengths,
    evaluate,
    plural_of,
    score_objective,
    score_rows,
    sequence_logprobs,
)
from lmtune.forward.packed import Outputs, PackedForward
from lmtune.inference.load import build_renderer, load_run_tokenizer
from lmtune.inference.start_adapter import StartingAdapter, starting_adapter
from lmtune.io.console import progress, warn
from lmtune.kernels.lora_linear import fuse
from lmtune.models.base import DTYPES, base_fingerprint, check_bitsandbytes, dtype_of, load_model
from lmtune.models.device import dense_weights_fit, free_memory
from lmtune.models.head import Head, classifier_head
from lmtune.models.locate import shareable_name
from lmtune.models.offload import can_stream, mapped_bytes
from lmtune.models.parameters import Parameters, count_parameters
from lmtune.models.structure import is_streamed
from lmtune.models.tensor_shards import held_share
from lmtune.models.tuning.adapter_files import Metadata
from lmtune.models.tuning.base import TunedModel, Tuning, trainable
from lmtune.models.tuning.full import Full
from lmtune.models.tuning.lora import Lora
from lmtune.models.tuning.partial import Partial
from lmtune.objectives.base import Objective
from lmtune.objectives.chosen import find_head, objective_of
from lmtune.parallel.base import Parallel
from lmtune.runs.store import RunDirectory
from lmtune.training import memory
from lmtune.training.checkpoint import Checkpoint, restore
from lmtune.training.estimate import token_cost
from lmtune.training.loop import TrainingJob
from lmtune.training.memory import checkpoint_layers, measure_activations
from lmtune.training.optim import MOMENT_BYTES, OPTIMIZERS, check_optimizer
from lmtune.training.shared import Shared
from lmtune.training.state import RunSignature, TrainResult, TrainState

# What a section of the config stands for, by its type. A tuning is made from its section, the base in the dtype of
# computation, and the adapter that it begins from.
TUNINGS: dict[type, Callable[[Any, ModelConfig, Path | None], Tuning]] = {
    LoraConfig: Lora,
    FullConfig: lambda section, base, start: Full(base),
    PartialConfig: lambda section, base, start: Partial(section, base),
}


@dataclass
class Components:
    """What a run works with."""

    config: FinetuneConfig
    parallel: Parallel
    renderer: Renderer
    data: LoadedData
    tuning: Tuning
    objective: Objective
    model: TunedModel
    forward: PackedForward
    fingerprint: str  # of the base
    parameters: Parameters
    micro_batch_tokens: int  # the budget that fits the memory
    start: StartingAdapter | None = None  # that training begins from; None is a new one
    head: Head | None = None  # of a classifier; None of a language model
    selection: Selection | None = None  # of the rows; None where the settings alone say which are used
    rows: ExampleStore | None = None  # to train on, with what the objective computes before the first step
    held_out: ExampleStore | None = None  # to score on, likewise
    validated: list[RowScores] = field(default_factory=list)  # so far
    begun: bool = False  # whether the run's files are those of this process; before that, they are not its to change

    @property
    def signature(self) -> RunSignature:
        """What must be equal for a checkpoint of this run to be continued."""
        start = self.start.sha256 if self.start is not None else None
        selection = self.selection.sha256 if self.selection is not None else None
        return RunSignature.of(self.config, self.data.key, self.fingerprint, self.data.signature, start, selection)

    def precompute(self) -> None:
        """Compute what the objective needs of the model as it is before the first step, once."""
        if self.rows is None:
            plural = plural_of(self.objective)
            find = partial(sequence_logprobs, self.forward, self.objective.units, parallel=self.parallel.scoring)
            with self.parallel.passes():
                self.rows = self.objective.precompute(self.data.train, partial(find, what=plural))
                if self.data.validation is not None:
                    self.held_out = self.objective.precompute(
                        self.data.validation, partial(find, what=f"held-out {plural}")
                    )  # fmt: skip

    def job(self, resumed: Checkpoint | None = None) -> tuple[TrainingJob, TrainState]:
        """What the loop works with, and where it begins; the tensors of `resumed` are in the model and the optimizer.

        The micro-batch budget goes on as it was, perhaps halved, unless another one is asked for now.
        """
        train = self.config.train
        self.precompute()
        assert self.rows is not None
        data = self.rows
        optimizer = OPTIMIZERS[train.optimizer](self.tuning.parameter_groups(self.model, train.weight_decay))
        state = TrainState(micro_batch_tokens=self.micro_batch_tokens)
        if resumed is not None:
            restore(resumed, optimizer, self.model.trainable())
            state = replace(resumed.state.train)
            if resumed.state.micro_batch_setting != train.micro_batch_tokens:
                state.micro_batch_tokens = self.micro_batch_tokens

        def shareable_of(row: int) -> list[Ints]:
            return [shareable_prefix(one.input_ids, one.loss_mask) for one in data[row].sequences]

        planner = Planner(
            data.sequences, train, self.parallel.world_size, state.micro_batch_tokens,
            shareable_of if self.forward.shares_prefixes else None,
            token_cost(memory.shape_of(self.model.module, self.parameters)), self.objective.units,
        )  # fmt: skip
        job = TrainingJob(planner, data, self.forward, self.objective, self.model, optimizer, self.parallel, train)
        return job, state

    @property
    def deciding(self) -> tuple[str, Direction]:
        """Which score of the validation rows says which step is the best, and which way is better."""
        metric = self.config.evaluation.metric
        return self.objective.selection if metric is None else (metric, direction_of(metric))

    def validate(self) -> Scores:
        """Scores of the validation rows; answers are generated if what they score is to decide."""
        assert self.held_out is not None
        tokens, parallel = self.micro_batch_tokens, self.parallel.scoring
        with self.parallel.passes():
            found = score_rows(self.forward, self.objective, self.held_out, tokens, parallel=parallel)
        scores, metric = found.scores, self.deciding[0]
        if metric == GENERATED and (answered := self.score("the model", found)) is not None:
            scores = answered[0]
        if scores.as_dict().get(metric) is None:
            raise LmtuneError(f"evaluation.metric: {metric} cannot be measured on the validation rows; choose another")
        self.validated.append(replace(found, scores=scores))
        return scores

    def score_tuned(self, result: TrainResult) -> tuple[Scores, list[Answer]] | None:
        """As `score`, after training: the rows were scored with these weights already, at the last or the best step."""
        name, _ = self.deciding
        best = [found for found in self.validated if found.scores.value(name) == result.state.best_loss]
        known = self.validated[-1:] if result.weights is None else best[:1]  # none if an earlier process scored them
        return self.score("the tuned model", *known)

    def score_base(self) -> tuple[Scores, list[Answer]] | None:
        """As `score`, before training; a classifier's head is new, so the best constant answer stands for its base."""
        if self.head is None:
            return self.score("the base")
        if self.held_out is None or not isinstance(self.rows, WithValues) or "target" not in self.rows.columns:
            return None
        weights = self.rows.sequences.weights
        constant = torch.from_numpy(
            majority(
                self.head, self.rows.columns["target"].astype(np.float64),
                np.ones(len(self.rows)) if weights is None else weights,
            )
        ).float()  # fmt: skip

        def run(batch: MicroBatch) -> Outputs:
            return Outputs.of_scores(constant.to(batch.weights.device).expand(len(batch.example_of), -1))

        return score_objective(
            self.forward, self.objective, self.held_out, self.micro_batch_tokens, self.parallel.scoring,
            self.head.constant, run
        ), []  # fmt: skip

    def score(self, who: str, known: RowScores | None = None) -> tuple[Scores, list[Answer]] | None:
        """All scores of the validation rows, and the answers the model generated; None without such rows.

        `who`, the base or the tuned model, is named in the progress shown; `known` is what `validate` found.
        """
        if self.held_out is None:
            return None
        settings = self.config.evaluation
        with self.parallel.passes():
            return evaluate(
                self.forward, self.renderer, self.held_out, settings.exact_match_rows, settings.max_new_tokens,
                self.micro_batch_tokens, self.objective, self.parallel.scoring, who, known,
            )  # fmt: skip


def compose(
    config: FinetuneConfig, parallel: Parallel, selection: Selection | None = None, shared: Shared | None = None
) -> Components:
    """Load tokenizer, rows and model, and choose the objective and the trained parameters.

    `selection` is of the rows that the settings name; a classifier has the classes of all of these. `shared` holds what
    an earlier run of this process has loaded, and takes what this one loads.

    ConfigError, DataError or ModelError if something is wrong with them; nothing was written but the row cache.
    """
    with starting_adapter(config) as start:
        own = config if start is None else replace(config, tuning=start.settings)
        return _compose(own, parallel, start, selection, shared)


def _compose(
    config: FinetuneConfig, parallel: Parallel, start: StartingAdapter | None, selection: Selection | None,
    shared: Shared | None,
) -> Components:  # fmt: skip
    check_bitsandbytes(config.model.quantization)
    check_optimizer(config.train.optimizer, parallel.device)
    if parallel.equal_passes and config.model.offload == "layers":
        raise ConfigError("model.offload: layers; each process holds a part of the base with parallel.kind: fsdp; set "
                          "one of them")  # fmt: skip
    if parallel.equal_passes and not isinstance(config.tuning, LoraConfig) and config.train.optimizer != "adamw":
        raise ConfigError(f"train.optimizer: {config.train.optimizer}; its moments are in blocks, which parallel.kind: "
                          f"fsdp cannot share out; expected adamw for tuning.kind: {config.tuning.kind}")  # fmt: skip
    if parallel.device.type == "cuda" and config.model.dtype != "float32":
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in 32 bit beside a 16-bit model
    renderer, data = load_rows(config, parallel, shared)
    head = find_head(
        config.objective, data, renderer.tokenizer, config.train.seed, renderer.uses_chat_template
    )  # fmt: skip
    if head is not None and head.pad_token_id is not None:  # saved with the tokenizer, as transformers needs it
        renderer.tokenizer.pad_token_id = head.pad_token_id
    if start is not None:
        _check_same_head(start, head)
    if selection is not None:
        data = data.selected(selection, config.data)
    stored = _with_dtype(config, parallel)
    dtype = DTYPES[stored.dtype]
    tuning = TUNINGS[type(config.tuning)](config.tuning, stored, None if start is None else start.folder)
    offload = stored.offload if can_stream(config.tuning) else "none"
    loaded = replace(stored, dtype=tuning.load_dtype or stored.dtype, offload=offload)
    base = (
        load_model(loaded, parallel.load_device, head, parallel.equal_passes) if shared is None
        else shared.base(loaded, parallel.load_device, head, parallel.equal_passes, tuning)
    )  # fmt: skip
    if head is None and classifier_head(base) is not None:
        raise ModelError(
            f"model.name: {config.model.name}: a classifier, which cannot write; expected a language model for "
            f"objective.kind: {config.objective.kind}"
        )
    parts = [part for part in (data.train, data.validation) if part is not None]
    check_lengths(base, parts, "data.max_length", tell=parallel.is_main)
    fingerprint = base_fingerprint(config.model)
    parameters = count_parameters(base, config.tuning, config.model.quantization, dtype)
    with progress("preparing the adapter and the kernels"):
        model = tuning.apply(base, config.train.seed, shareable_name(config.model.name))
        for tensor in tuning.initial_tensors(model):
            parallel.broadcast(tensor)
        if model.has_adapter:
            keeps = not parallel.equal_passes and dense_weights_fit(model.module, parallel.device)
            fuse(model.module, all(parallel.gather([keeps])))
        parallel.shard(model, dtype)
        forward = PackedForward(model.module, dtype, joins_layers=not parallel.equal_passes)
    for capabilities in parallel.gather([forward.capabilities]):  # the plan, which all ranks make alike, depends on it
        forward.capabilities = forward.capabilities.intersect(capabilities)
    if parallel.equal_passes and not forward.packs:  # which makes as many passes as a micro-batch has sequences
        raise ModelError(f"parallel.kind: fsdp; {forward.capabilities.packing}; expected replicated for this model")
    if parallel.is_main:
        for note in forward.disabled_optimizations:
            warn(f"{note}; this is slower, with the same result")
    objective = objective_of(config.objective, head)
    with progress("measuring how much fits in memory"):
        budget = _choose_micro_batch(config, forward, data, parallel, parameters)
    return Components(
        config, parallel, renderer, data, tuning, objective, model, forward, fingerprint, parameters, budget, start,
        head, selection,
    )  # fmt: skip


def _check_same_head(start: StartingAdapter, head: Head | None) -> None:
    """ConfigError if the adapter that training begins from has a head of other outputs, or one that is not wanted."""
    saved = Metadata.read(start.folder).head
    if head is None and saved is not None:
        raise ConfigError(
            f"tuning.adapter: {start.name} is of a classifier, which cannot write; expected that of a language model"
        )
    if head is not None and (saved is None or (saved.kind, saved.labels) != (head.kind, head.labels)):
        had = "writes, and has no head" if saved is None else f"has the outputs {', '.join(saved.labels)}"
        raise ConfigError(
            f"tuning.adapter: {start.name} {had}; expected {', '.join(head.labels)}, as the rows have them; begin from "
            "another adapter, or merge this one and set model.name to the merged folder"
        )


def _with_dtype(config: FinetuneConfig, parallel: Parallel) -> ModelConfig:
    """The model with its dtype chosen once for the run: `auto` measures, and a resumed run computes as it began."""
    model = config.model
    if model.dtype != "auto":
        return model
    before = None if config.run.resume == "never" else RunDirectory.of(config.run).trained_dtype()
    chosen = before or str(dtype_of(model, parallel.device)).removeprefix("torch.")
    return replace(model, dtype=cast(Dtype, parallel.gather([chosen])[0]))


def load_rows(config: FinetuneConfig, parallel: Parallel, shared: Shared | None) -> tuple[Renderer, LoadedData]:
    """What the rows are rendered with, and all that the settings name."""
    begun_at = None if config.run.resume == "never" else RunDirectory.of(config.run).rendered_at()

    def load() -> tuple[Renderer, LoadedData]:
        renderer = _renderer(config, begun_at)
        with parallel.main_first():  # the others find the rows in the cache
            return renderer, load_data(config.data, renderer, config.train.seed, config.objective.rows)

    if shared is None:
        return load()
    new_tokens = config.tuning.new_tokens if isinstance(config.tuning, LoraConfig) else ()
    model = config.model.name, config.model.revision
    key = model, config.data, config.train.seed, config.objective, new_tokens, begun_at
    return shared.get("rows", key, load)


def _renderer(config: FinetuneConfig, begun_at: str | None) -> Renderer:
    """The run's renderer; a template that writes the date writes one for the whole run, whenever it is continued."""
    tokenizer = load_run_tokenizer(config)
    template, system = config.data.template, config.data.system
    renderer = build_renderer(tokenizer, config.model, template, system, now=begun_at)
    now = renderer.rendered_at
    return renderer if now is None else build_renderer(tokenizer, config.model, template, system, now=now)


def _choose_micro_batch(
    config: FinetuneConfig, forward: PackedForward, data: LoadedData, parallel: Parallel, parameters: Parameters
) -> int:
    """The micro-batch budget in tokens; switches activation checkpointing on where the settings or the memory ask it.

    All ranks take what suits the one with the least memory, so that they plan, and run out of memory, alike.
    """
    device, tokens = parallel.device, data.train.num_tokens
    share = float(data.train.num_targets.sum() / tokens.sum())
    shape = memory.shape_of(forward.model, parameters)
    # where weights are gathered for each layer, they would be counted with what the layer keeps
    measured = None if parallel.equal_passes else measure_activations(forward, share)
    activations = measured or memory.estimated_activations(shape, forward.dtype)
    # the weights are there already; their gradients and moments come with the first step, each where its weight is
    coming = memory.trained_bytes(shape, forward.dtype, MOMENT_BYTES[config.train.optimizer]) - 4 * parameters.trained
    coming = int(coming * held_share(trainable(forward.model)))
    if parallel.equal_passes:
        coming += int(memory.gathered_bytes(shape, config.model.quantization, forward.dtype))
    asked = None if config.train.micro_batch_tokens == "auto" else config.train.micro_batch_tokens
    rows = config.objective.rows
    mapped = 0 if is_streamed(forward.base) else mapped_bytes(forward.base)
    longest, free = memory.longest_unit(data.train.sequences, rows), max(0, free_memory(device, mapped) - coming)
    fitting = memory.fitting_micro_batch(activations, longest, free, device.type, asked, rows)
    of_ranks = parallel.gather([fitting])
    budget, needed = min(tokens for tokens, _ in of_ranks), max(layers for _, layers in of_ranks)
    wanted = config.train.gradient_checkpointing
    count = activations.num_layers if wanted is True else needed if wanted == "auto" else 0
    checkpoint_layers(forward.base, count)
    return budget if asked is None else asked
