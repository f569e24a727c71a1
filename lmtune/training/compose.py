"""The parts of a fine-tuning run put together: what is loaded before the first step, and what is saved after the last.

session = prepare(config, accelerator)        # tokenizer, rows, model, adapter
outcome = train(session.job(run, checkpoint))
save_tuned(session, run.adapter, outcome.weights)
"""

from __future__ import annotations

import contextlib
import platform
import subprocess
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch

from lmtune.config.schema import FinetuneConfig
from lmtune.data.store import LoadedData, load_data
from lmtune.errors import ConfigError
from lmtune.evaluation.generative import Answer
from lmtune.evaluation.scoring import Scores, check_lengths, evaluate, teacher_forced
from lmtune.forward.packed import PackedForward
from lmtune.inference.load import build_renderer, run_metadata
from lmtune.io.atomic import new_folder
from lmtune.io.console import progress, warn
from lmtune.kernels.lora_linear import fuse
from lmtune.models.base import base_fingerprint, check_bitsandbytes, compute_dtype, load_model, load_tokenizer
from lmtune.models.device import dense_weights_fit, free_memory
from lmtune.models.locate import shareable_name
from lmtune.models.model_folder import write_adapter_texts
from lmtune.models.parameters import Parameters, count_parameters
from lmtune.models.tuning.lora import Tensors, attach_adapter, attach_saved, initial_tensors, save_adapter
from lmtune.runs.log import Accuracies
from lmtune.runs.store import RunDirectory
from lmtune.training import memory
from lmtune.training.checkpoint import Checkpoint
from lmtune.training.checkpoint import Tensors as CheckpointTensors
from lmtune.training.estimate import token_cost
from lmtune.training.loop import Job, Outcome
from lmtune.training.memory import checkpoint_layers, measure_activations
from lmtune.training.resume import identity
from lmtune.training.start_adapter import StartingAdapter, starting_adapter

T = TypeVar("T")
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "lmtune")


@dataclass
class Session:
    """What a run works with.

    Attributes:
        config: the settings.
        accelerator: the processes.
        renderer: rows to tokens, with the tokenizer in it.
        data: training rows, validation rows or None, and every row's fate.
        forward: the model with a new adapter.
        fingerprint: of the base.
        parameters: how many are trained, frozen and quantised.
        micro_batch_tokens: the budget that fits the memory.
        start: the adapter that training begins from, or None for a new one.
        validated: the scores of each validation so far.
        begun: whether the run's files are those of this session; before that, they are not its to change.
    """

    config: FinetuneConfig
    accelerator: Any
    renderer: Any
    data: LoadedData
    forward: PackedForward
    fingerprint: str
    parameters: Parameters
    micro_batch_tokens: int
    start: StartingAdapter | None = None
    validated: list[Scores] = field(default_factory=list)
    begun: bool = False

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint of this run to be continued."""
        start = self.start.sha256 if self.start is not None else None
        return identity(self.config, self.data.key, self.fingerprint, self.data.signature, start)

    def base_alone(self) -> contextlib.AbstractContextManager[Any]:
        """The base without an adapter inside the block; a new adapter changes nothing yet."""
        return contextlib.nullcontext() if self.start is None else self.forward.model.disable_adapter()

    def job(self, run: RunDirectory, resumed: Checkpoint | None) -> Job:
        """The training job."""
        return Job(
            run, self.config, self.forward, self.data.train, self.accelerator, self.micro_batch_tokens, self.identity,
            self.validate if self.data.validation is not None else None, resumed,
            token_cost(memory.shape_of(self.forward.model, self.parameters)),
        )  # fmt: skip

    def validate(self) -> Accuracies:
        """Teacher-forced scores of the validation rows."""
        scores = teacher_forced(self.forward, self.data.validation, self.micro_batch_tokens, self.accelerator)
        self.validated.append(scores)
        return Accuracies(scores.loss, scores.sequence_accuracy, scores.token_accuracy)

    def score_tuned(self, outcome: Outcome) -> tuple[Scores, list[Answer]] | None:
        """As `score`, after training: the rows were scored with these weights already, at the last or the best step."""
        loss = outcome.counters.best_loss
        best = [scores for scores in self.validated if scores.loss == loss]
        known = self.validated[-1:] if outcome.weights is None else best[:1]  # none if an earlier process scored them
        return self.score("the tuned model", *known)

    def score(self, who: str, known: Scores | None = None) -> tuple[Scores, list[Answer]] | None:
        """All scores of the validation rows, and the answers the model generated; None without such rows.

        `who`, the base or the tuned model, is named in the progress shown; `known` is what `validate` found.
        """
        if self.data.validation is None:
            return None
        settings = self.config.evaluation
        return evaluate(
            self.forward, self.renderer, self.data.validation, settings.exact_match_rows, settings.max_new_tokens,
            self.micro_batch_tokens, self.accelerator, who, known,
        )  # fmt: skip


def prepare(config: FinetuneConfig, accelerator: Any) -> Session:
    """Load tokenizer, rows, model and adapter.

    Raises:
        ConfigError, DataError, ModelError: something is wrong with them; nothing was written but the row cache.
    """
    with starting_adapter(config) as start:
        if start is None:
            return _prepare(config, accelerator, None)
        if len(set(_from_all(start.sha256, accelerator))) > 1:
            raise ConfigError(f"adapter.adapter: {start.name} changes while it is read; wait until that run has ended")
        return _prepare(replace(config, adapter=start.settings), accelerator, start)


def _prepare(config: FinetuneConfig, accelerator: Any, start: StartingAdapter | None) -> Session:
    check_bitsandbytes(config.model.quantization)
    if accelerator.device.type == "cuda" and config.model.dtype != "float32":
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in 32 bit beside a 16-bit model
    tokenizer = load_tokenizer(config.model)
    template, system = config.data.template, config.data.system
    renderer = build_renderer(tokenizer, config.model, template, system, now=begun_at(config))
    if (now := renderer.rendered_at) is not None:  # one date for the whole run, whenever it is gone on with
        renderer = build_renderer(tokenizer, config.model, template, system, now=now)
    with accelerator.main_process_first():  # the others find the rows in the cache
        data = load_data(config.data, renderer, config.train.seed)
    _check_patience(config, data)
    model = load_model(config.model, accelerator.device)
    parts = [part for part in (data.train, data.validation) if part is not None]
    check_lengths(model, parts, "data.max_length", tell=accelerator.is_main_process)
    fingerprint = base_fingerprint(config.model)
    name = shareable_name(config.model.name)
    parameters = count_parameters(model, config.adapter, config.model.quantization, model.dtype)
    with progress("preparing the adapter and the kernels"):
        if start is None:
            model = attach_adapter(model, config.adapter, config.train.seed, name)
        else:
            model = attach_saved(model, start.folder, fingerprint, config.adapter, name)
        for tensor in initial_tensors(model):
            accelerator.take_from_main(tensor)
        keep_dense = all(_from_all(dense_weights_fit(model, accelerator.device), accelerator))
        fuse(model, keep_dense)
        forward = PackedForward(model)
    _agree(forward, accelerator)
    if accelerator.is_main_process:
        for note in forward.notes:
            warn(f"{note}; this is slower, with the same result")
    with progress("measuring how much fits in memory"):
        budget = _fit(config, forward, data, accelerator, parameters)
    return Session(config, accelerator, renderer, data, forward, fingerprint, parameters, budget, start)


def _check_patience(config: FinetuneConfig, data: LoadedData) -> None:
    """Raise ConfigError where patience waits for scores that no row gives."""
    if config.evaluation.patience is not None and data.validation is None:
        raise ConfigError(
            f"evaluation.patience: {config.evaluation.patience} waits for validation scores, and no row could be held "
            f"out by data.validation_fraction: {config.data.validation_fraction}, for all {len(data.train):,} rows are "
            "equal; add other rows, name data.validation, or set evaluation.patience: null"
        )


def begun_at(config: FinetuneConfig) -> str | None:
    """The time that the template wrote when the run began; None for a new run, or a template that writes none."""
    run = RunDirectory.of(config.run)
    if config.run.resume == "never" or not run.data.is_file():
        return None
    return run.rendered_at()


def verification_rows(session: Session, count: int = 16) -> dict[str, Any]:
    """The tokens of some held-out rows (learned ones where none are held out), on which a merge is verified later.

    Of a row that makes several sequences the last, which holds all of it: each costs a pass over all weights.
    """
    rows = session.data.train if session.data.validation is None else session.data.validation
    some = [rows[index].sequences[-1] for index in range(min(count, len(rows)))]
    return {"sequences": [document.input_ids.tolist() for document in some]}


def save_tuned(session: Session, folder: Path, weights: Tensors | CheckpointTensors | None) -> None:
    """Write the adapter folder: plain PEFT files, tokenizer with template, generation config with the stop tokens.

    The folder appears complete or not at all; one from before is replaced.

    Args:
        session: the run.
        folder: where to.
        weights: the adapter's tensors, or None for the model's own.
    """
    with new_folder(folder) as staging:
        metadata = run_metadata(session.config, session.renderer, session.fingerprint, folder)
        save_adapter(session.forward.model, staging, metadata, weights)
        write_adapter_texts(session.config.model, session.renderer, staging)


def environment(session: Session) -> dict[str, Any]:
    """Versions, device, git revision and data hashes, for `environment.json`; no path and no name of a machine."""
    device = session.accelerator.device
    return {
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "processes": session.accelerator.num_processes,
        "torch_threads": torch.get_num_threads(),
        "git_revision": _git_revision(),
        "data_sha256": session.data.key,
        "tokens_sha256": session.data.signature,
        "base_fingerprint": session.fingerprint,
        **({"starting_adapter_sha256": session.start.sha256} if session.start is not None else {}),
        "slower_than_could_be": session.forward.notes,
    }


def _version(library: str) -> str | None:
    """The installed version; None for a library that is not there, as bitsandbytes may be."""
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _agree(forward: PackedForward, accelerator: Any) -> None:
    """Take only the fast ways that every process takes: the plan, which all make alike, depends on them."""
    for reasons in _from_all(forward.reasons, accelerator):
        forward.disable(reasons)


def _from_all(value: T, accelerator: Any) -> list[T]:
    """What each process has for `value`."""
    return list(accelerator.gather_object([value])) if accelerator.num_processes > 1 else [value]


def _fit(
    config: FinetuneConfig, forward: PackedForward, data: LoadedData, accelerator: Any, parameters: Parameters
) -> int:
    """The micro-batch budget in tokens; switches gradient checkpointing on where the settings or the memory ask it.

    All processes take what suits the one with the least memory, so that they plan, and run out of memory, alike.
    """
    device, tokens = accelerator.device, data.train.num_tokens
    share = float(data.train.num_targets.sum() / tokens.sum())
    activations = measure_activations(forward, share)
    if activations is None:
        shape = memory.shape_of(forward.model, parameters)
        activations = memory.estimated_activations(shape, compute_dtype(device, config.model.dtype))
    asked = None if config.train.micro_batch_tokens == "auto" else config.train.micro_batch_tokens
    fitting = memory.fitting_micro_batch(
        activations, data.train.sequences.longest, free_memory(device), device.type, asked
    )
    all_of_them = _from_all(fitting, accelerator)
    budget, needed = min(b for b, _ in all_of_them), max(n for _, n in all_of_them)
    wanted = config.train.gradient_checkpointing
    count = activations.num_layers if wanted is True else needed if wanted == "auto" else 0
    checkpoint_layers(forward.base, count)
    return budget if asked is None else asked


def _git_revision() -> str | None:
    """The commit of the folder the command was run in, if it is a checkout."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
