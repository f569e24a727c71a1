"""Adapters of one base, and the base, answered by vLLM: what `SharedModels` is for lmtune's own engine.

with VllmModels.start(["runs/support", "runs/sales"], Settings()) as models:
    support = models.load("runs/support")
"""

from __future__ import annotations

import itertools
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import torch

from lmtune.config.load import load_config
from lmtune.config.schema import FinetuneConfig, LoraConfig, ModelConfig, Quantization
from lmtune.errors import ConfigError, ModelError
from lmtune.export.vllm import check_servable, fitting_rank, write_adapter
from lmtune.inference.adapter_source import AdapterSource, find_adapter
from lmtune.inference.chat_model import ChatModel
from lmtune.inference.load import build_renderer, saved_tokenizer
from lmtune.io.console import err, escape, progress, warn
from lmtune.io.text import one_line
from lmtune.models.base import base_fingerprint, dtype_of, load_tokenizer, resolve_name, stored_head
from lmtune.models.device import default_device
from lmtune.models.gguf import is_gguf
from lmtune.models.members import BASE, Members
from lmtune.models.structure import config_and_class
from lmtune.models.tuning.adapter_files import Metadata
from lmtune.runs.ensembles import find_ensemble
from lmtune.runs.store import find_run
from lmtune.serve.openai.catalog import NO_ANSWERS
from lmtune.serve.vllm.engine import VllmEngine
from lmtune.serve.vllm.process import VllmProcess

_BASE = "base"  # its name at vLLM
_ADAPTERS_A_BATCH = 8
_PROBE_DIFFERENCE = 1e-6  # of log-probabilities, that an adapter makes at least


@dataclass(frozen=True)
class Settings:
    """How vLLM is started.

    Attributes:
        quantization: of the base, by default that of training.
        base: where it is, if not where the adapters name it.
        arguments: further words for `vllm serve`.
        has_jobs: whether adapters come later.
    """

    quantization: Quantization | None = None
    base: str | None = None
    arguments: str = ""
    has_jobs: bool = False


def find_vllm() -> str | None:
    """The program `vllm`: beside this Python, or on the path."""
    beside = Path(sys.executable).with_name("vllm")
    return str(beside) if beside.is_file() else shutil.which("vllm")


def is_of_use() -> str | None:
    """Why vLLM is not chosen here; None if it is."""
    if not torch.cuda.is_available():
        return "no GPU, on which vLLM would be faster"
    return None if find_vllm() else "no program vllm on the path"


class VllmModels:
    """Loads models into one vLLM.

    Args:
        base: of all.
        process: that serves it.
        engine: to it.
    """

    def __init__(self, base: ModelConfig, settings: Settings, process: VllmProcess, engine: VllmEngine) -> None:
        self._base, self._settings, self._process, self.engine = base, settings, process, engine
        self._folder = tempfile.TemporaryDirectory(prefix="lmtune-adapters-")
        self._architecture = _architecture(base)
        self._numbers = itertools.count(1)

    @classmethod
    def start(cls, targets: Sequence[str], settings: Settings) -> VllmModels:
        """Start vLLM with the base of all `targets`; the adapters come by `load`.

        Raises:
            ConfigError: vLLM is not there, or the targets have several bases.
            ModelError: a target is no model, or one that vLLM cannot serve beside others.
            LmtuneError: vLLM does not start.
        """
        program = find_vllm()
        if program is None:
            raise ConfigError("--engine: vllm; expected the program vllm on the path; install it in an environment of "
                              "its own (docs/server.md), or use --engine lmtune")  # fmt: skip
        sources = [find_adapter(target, settings.quantization, settings.base) for target in targets]
        bases = [_plain(target, settings.quantization) if source is None else source.base
                 for target, source in zip(targets, sources, strict=True)]  # fmt: skip
        for target, other in zip(targets, bases, strict=True):
            if not _is_same(other, bases[0]):
                raise ConfigError(f"{target}: another base than {targets[0]} has; vLLM serves one a server")
        for base in {base.quantization: base for base in bases if base.quantization != "none"}.values():
            warn(f"{base.name}: trained over {base.quantization}, which vLLM does not have; it serves the base "
                 "unquantized, so answers differ a little; --engine lmtune serves what was trained")  # fmt: skip
        adapters = [source for source in sources if source is not None]
        words = _command(program, bases[0], adapters, settings)
        err.print(f"[dim]{escape(shlex.join(words))}[/]", soft_wrap=True)
        process = VllmProcess(words)
        try:
            with progress("starting vLLM"):
                process.wait_until_ready()
            engine = VllmEngine(process.url, process.key, _BASE, _vocab_size(bases[0]), f"{bases[0].name}, by vLLM")
            return cls(bases[0], settings, process, engine)
        except BaseException:
            process.close()
            raise

    def __enter__(self) -> VllmModels:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) \
            -> None:  # fmt: skip
        self.close()

    def load(self, target: str) -> ChatModel:
        """What `target` names, over the base that vLLM has.

        Raises:
            ModelError: it is over another base, or trains what vLLM does not serve as an adapter.
        """
        source = find_adapter(target, self._settings.quantization, self._settings.base)
        if source is not None:
            return self._adapter(source)
        model = _plain(target, self._settings.quantization)
        self._check_base(target, model)
        metadata = Metadata.read(Path(resolve_name(model.name)))
        tokenizer = load_tokenizer(model, alone=True)
        renderer = build_renderer(
            tokenizer, model, metadata.template, metadata.system, stop_token_ids=metadata.stop_token_ids
        )
        return ChatModel(
            name=Path(target).name, renderer=renderer, engine=self.engine, system=metadata.system,
            trained_at=metadata.rendered_at, members=Members((BASE,)),
            head=metadata.head or stored_head(model),
        )  # fmt: skip

    def load_checkpoint(self, target: str, step: int) -> ChatModel:
        """A run's adapter as it was after a step. Errors as of `load`."""
        source = find_adapter(target, self._settings.quantization, self._settings.base)
        if source is None or isinstance(source.place, Path):
            raise ModelError(f"{target}: not a run with an adapter, so its checkpoints are no models that share a base")
        return self._adapter(replace(source, step=step))

    def can_load(self, target: str) -> bool:
        """Whether a run's adapter is over the base that vLLM has."""
        source = find_adapter(target, self._settings.quantization, self._settings.base)
        return source is None or _is_same(source.base, self._base)

    def check(self) -> None:
        """LmtuneError if vLLM has ended."""
        self._process.check()

    def close(self) -> None:
        """End vLLM."""
        self.engine.close()
        self._process.close()
        self._folder.cleanup()

    def _adapter(self, source: AdapterSource) -> ChatModel:
        self._check_base(source.name, source.base)
        name = f"adapter-{next(self._numbers):04d}"
        target = Path(self._folder.name) / name
        target.mkdir()
        with source.folder(self._settings.base) as folder:
            write_adapter(folder, target, self._architecture)
            metadata = Metadata.read(folder)
            has_tokenizer = (folder / "tokenizer_config.json").is_file()
            tokenizer = saved_tokenizer(folder) if has_tokenizer else load_tokenizer(source.base, alone=True)
        self.engine.add_adapter(name, str(target))
        renderer = build_renderer(
            tokenizer, source.base, metadata.template, metadata.system, stop_token_ids=metadata.stop_token_ids
        )
        self._probe(source.name, name)
        return ChatModel(
            name=source.name, renderer=renderer, engine=self.engine, has_adapter=metadata.head is None,
            system=metadata.system, trained_at=metadata.rendered_at, run=source.run, head=metadata.head,
            members=Members((name,)),
        )  # fmt: skip

    def _check_base(self, target: str, base: ModelConfig) -> None:
        if not _is_same(base, self._base):
            raise ModelError(f"{target}: over another base than vLLM serves here, {self._base.name}")

    def _probe(self, target: str, name: str) -> None:
        """Warn where vLLM answers as the base: it leaves out weights whose names it does not know."""
        tokens = [token % self.engine.vocab_size for token in range(1, 33)]
        tuned, base = (self.engine.score(tokens, Members((who,))) for who in (name, BASE))
        apart = max(abs(one.logprob - other.logprob) for one, other in zip(tuned, base, strict=True))
        if apart < _PROBE_DIFFERENCE:
            warn(f"{target}: vLLM answers as the base does; has the adapter learned something? see lmtune verify")


def _command(program: str, base: ModelConfig, adapters: Sequence[AdapterSource], settings: Settings) -> list[str]:
    """The words that start vLLM, without address and key."""
    dtype = str(dtype_of(base, default_device())).removeprefix("torch.")
    words = [
        program, "serve", resolve_name(base.name), "--served-model-name", _BASE, "--dtype", dtype,
        "--generation-config", "vllm", "--max-logprobs", "20", "--structured-outputs-config.backend", "guidance",
    ]  # fmt: skip
    if base.revision is not None:
        words += ["--revision", base.revision]
    if adapters or settings.has_jobs:
        ranks = [LoraConfig().rank] if settings.has_jobs else []
        for source in adapters:
            with source.folder(settings.base) as folder:
                if Metadata.read(folder).head is not None:
                    raise ConfigError(NO_ANSWERS.format(source.name))
                ranks.append(check_servable(folder))
        words += ["--enable-lora", "--max-loras", str(_ADAPTERS_A_BATCH), "--max-lora-rank",
                  str(fitting_rank(max(ranks)))]  # fmt: skip
    try:
        return [*words, *shlex.split(settings.arguments)]
    except ValueError as error:
        raise ConfigError(f"--vllm-args: {settings.arguments}: {one_line(error)}") from None


def _plain(target: str, quantization: Quantization | None) -> ModelConfig:
    """The model that a target without adapter names, as vLLM is to load it.

    Raises:
        ModelError: vLLM cannot.
    """
    if find_ensemble(target) is not None:
        raise ModelError(f"{target}: an ensemble, whose members answer together; vLLM has one adapter an answer; "
                         "use --engine lmtune")  # fmt: skip
    if is_gguf(target):
        raise ModelError(f"{target}: a GGUF file; vLLM is given model folders here; use --engine lmtune")
    if (run := find_run(target)) is not None:
        settings = load_config(FinetuneConfig, run.config)
        if not run.has_result(settings.tuning):
            raise ModelError(f"{target}: no result yet; finish the run with `lmtune finetune`")
        return ModelConfig(name=str(run.merged), quantization=quantization or "none", dtype=settings.model.dtype)
    return ModelConfig(name=target, quantization=quantization or "none")


def _is_same(one: ModelConfig, other: ModelConfig) -> bool:
    if (one.name, one.revision) == (other.name, other.revision):
        return True
    try:
        return base_fingerprint(one) == base_fingerprint(other)
    except ModelError:  # not on this machine yet
        return False


def _vocab_size(base: ModelConfig) -> int:
    return int(config_and_class(resolve_name(base.name), base.revision)[0].get_text_config().vocab_size)


def _architecture(base: ModelConfig) -> str:
    return str((config_and_class(resolve_name(base.name), base.revision)[0].architectures or [""])[0])
