"""Starts the API: the models by their names, the key, the page beside it.

serve(["runs/support", "base=tiny"], Address(port=8000, auth="lmtune:KEY"))
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from fastapi import FastAPI

from lmtune.config.schema import ModelConfig, Quantization
from lmtune.errors import ConfigError, LmtuneError
from lmtune.inference.chat_model import ChatModel
from lmtune.inference.shared import SharedModels
from lmtune.io.console import err, escape, progress, warn
from lmtune.models.locate import adapter_base, run_config
from lmtune.models.tuning.adapter_files import CONFIG
from lmtune.runs.ensembles import find_ensemble
from lmtune.runs.store import find_run
from lmtune.serve.fine_tuning.service import FineTuning
from lmtune.serve.openai.answers import Answering
from lmtune.serve.openai.application import MAX_TOKENS, build_api
from lmtune.serve.openai.catalog import Catalog
from lmtune.serve.openai.metrics import Metrics
from lmtune.serve.server import Address, Work, run_server

if TYPE_CHECKING:
    from lmtune.serve.studio.conversation import Activity

KEY = "LMTUNE_API_KEY"
USER = "lmtune"  # of the page
EngineKind = Literal["auto", "lmtune", "vllm"]


def serving_address(host: str, port: int) -> Address:
    """Where the API is served; the key is that of the environment, or a new one, which is shown.

    Raises:
        ConfigError: others could reach the server, and no key is set.
    """
    key = os.environ.get(KEY, "").strip()
    if not key and not Address(auth="any:any", host=host).is_local:
        raise ConfigError(f"{KEY}: not set; at {host} other machines could use the server; set it to a secret of yours")
    if not key:
        key = f"sk-lmtune-{secrets.token_urlsafe(24)}"
        err.print(f"API key: {key}   [dim](of this start; set {KEY} to keep one)[/]", soft_wrap=True)
    return Address(host, port, auth=f"{USER}:{key}")


def named(target: str) -> tuple[str, str]:
    """(name, what to load) of `NAME=RUN_OR_MODEL`, or of a run, folder or Hub id alone."""
    name, sign, rest = target.partition("=")
    if sign and not (name and rest):
        raise ConfigError(f"{target}; expected NAME=RUN_OR_MODEL")
    if sign and not Path(target).exists():
        return name, rest
    run = find_run(target)
    if run is not None:
        return run.name, target
    return Path(target).resolve().name if find_ensemble(target) or Path(target).exists() else target, target


@dataclass(frozen=True)
class JobSettings:
    """Where fine-tuning jobs are kept, and what they start from.

    Attributes:
        runs: the folder of their runs; files and queue are in its `.serve`.
        defaults: a YAML file of config sections that every job starts from.
    """

    runs: Path = Path("runs")
    defaults: Path | None = None


class Loader(Protocol):
    """Loads what is served."""

    def load(self, target: str) -> ChatModel:
        """What `target` names, as of `load_for_inference`."""

    def can_load(self, target: str) -> bool:
        """Whether the base of a run is one that it has, or can have."""

    def load_checkpoint(self, target: str, step: int) -> ChatModel:
        """A run's adapter as it was after a step."""


class _Models:
    """Loads what is served, one at a time."""

    def __init__(self, loader: Loader) -> None:
        self._loader, self._lock = loader, threading.Lock()
        self.catalog = Catalog()

    def load(self, target: str) -> ChatModel:
        with self._lock:
            return self._loader.load(target)

    def can_load(self, target: str) -> bool:
        return self._loader.can_load(target)

    def load_checkpoint(self, tuning: FineTuning, name: str) -> ChatModel | None:
        """The model of a checkpoint of a job, by the name that is listed for it."""
        found = tuning.checkpoint(name)
        if found is None:
            return None
        with self._lock:
            return self._loader.load_checkpoint(str(found[0]), found[1])

    def on_model(self, name: str, run: Path) -> None:
        """A job has made a model: it can be used at once."""
        self.catalog.promise(name, lambda: self.load(str(run)), int(time.time()))
        try:
            self.catalog.load(name)
        except LmtuneError as error:  # a model for which there is no memory; the next request says it again
            warn(f"{name}: cannot be loaded: {error}")


@dataclass(frozen=True)
class EngineSettings:
    """What generates the tokens.

    Attributes:
        kind: `lmtune`, `vllm`, or `auto`: vLLM where there is a GPU and it is installed.
        quantization: of all bases, by default what each adapter was trained over.
        base: where the base of all adapters is, if not where they name it.
        vllm_arguments: further words for `vllm serve`.
    """

    kind: EngineKind = "auto"
    quantization: Quantization | None = None
    base: str | None = None
    vllm_arguments: str = ""


@contextlib.contextmanager
def _loading(
    settings: EngineSettings, targets: Sequence[str], has_jobs: bool
) -> Iterator[tuple[Loader, Callable[[], None]]]:
    """Who loads the models, and a check that raises LmtuneError when what runs them has ended."""
    from lmtune.serve.vllm import models as vllm

    why = "asked for" if settings.kind == "lmtune" else vllm.is_of_use()
    if settings.kind == "vllm" or (settings.kind == "auto" and why is None):
        options = vllm.Settings(settings.quantization, settings.base, settings.vllm_arguments, has_jobs)
        try:
            models = vllm.VllmModels.start(targets, options)
        except LmtuneError as error:
            if settings.kind == "vllm":
                raise
            why = str(error)
        else:
            with models:
                err.print(f"[dim]engine: vLLM, {escape(str(vllm.find_vllm()))}[/]")
                yield models, models.check
            return
    err.print(f"[dim]engine: lmtune's own ({escape(str(why))})[/]")
    yield SharedModels(settings.quantization, settings.base), lambda: None


def serve(
    targets: Sequence[str], address: Address, engine: EngineSettings | None = None, max_tokens: int = MAX_TOKENS,
    max_requests: int = 256, has_page: bool = True, jobs: JobSettings | None = None,
) -> None:  # fmt: skip
    """Serve models until Ctrl-C or SIGTERM; answers under way are finished first.

    Args:
        targets: as of `named`.
        address: where; its password is the key.
        engine: what generates.
        max_tokens: where an answer is cut whose request does not say it.
        max_requests: under way at once.
        has_page: whether the chat page is at `/`.
        jobs: of the fine-tuning jobs; None serves no such routes.

    Raises:
        ConfigError: two models have one name, or one is a classifier; or another server works in the folder of jobs.
        ModelError: there is no such model.
        LmtuneError: no port is free, or the engine has ended.
    """
    engine = engine or EngineSettings()
    of_names = list(map(named, targets))
    with _loading(engine, [target for _, target in of_names], jobs is not None) as (loader, check):
        models, loaded, bases = _Models(loader), list[ChatModel](), dict[str, ModelConfig]()
        for name, target in of_names:
            loaded.append(models.load(target))
            models.catalog.add(name, loaded[-1])
            if loaded[-1].date_note:
                err.print(f"[dim]{escape(name)}: {escape(str(loaded[-1].date_note))}[/]")
            if (trained := trainable(name, target, engine.quantization, engine.base)) is not None:
                bases.setdefault(*trained)
        answering = Answering(Metrics(), max_requests)
        works: list[Work] = [answering]
        tuning = None if jobs is None else _fine_tuning(jobs, models, bases)
        page: FastAPI | None = None
        if has_page:
            page, activity = _page(loaded, address)
            works.append(activity)
        assert address.auth is not None
        routers = [] if tuning is None else [tuning.router]
        application = build_api(
            models.catalog, answering, address.auth.partition(":")[2], address.allowed_hosts, max_tokens, routers, page
        )
        err.print(f"models: {escape(', '.join(models.catalog.names))}")
        if page is not None:
            err.print(f"[dim]the page at / asks for user {USER} and, as password, the key[/]")
        if tuning is not None:
            tuning.start()
            err.print(f"[dim]fine-tuning jobs over: {escape(', '.join(bases) or 'no model of these')}[/]")
        try:
            run_server(application, address, works, "lmtune serve: {}/v1", check)
        finally:
            answering.close()
            if tuning is not None:
                tuning.close()


def _page(models: Sequence[ChatModel], address: Address) -> tuple[FastAPI, Activity]:
    from lmtune.serve.server import build_application
    from lmtune.serve.studio.conversation import Activity

    with progress("building the page"):
        activity = Activity()
        return build_application(models, address, activity), activity


def trainable(
    name: str, target: str, quantization: Quantization | None, base: str | None
) -> tuple[str, ModelConfig] | None:
    """What a job can train of a target, by its name: a plain model, or the base of an adapter."""
    if find_ensemble(target) is not None:
        return None
    if (run := find_run(target)) is not None:
        model = run_config(run, base).model
    elif (Path(target) / CONFIG).is_file():
        model = adapter_base(Path(target), quantization, base)
    else:
        return name, ModelConfig(name=target, quantization=quantization or "none")
    return Path(model.name).name, model


def _fine_tuning(jobs: JobSettings, models: _Models, bases: Mapping[str, ModelConfig]) -> FineTuning:
    tuning = FineTuning(jobs.runs / ".serve", jobs.runs, lambda: bases, jobs.defaults, models.on_model)
    models.catalog.more = functools.partial(models.load_checkpoint, tuning)
    models.catalog.forget = tuning.delete_model
    for model in filter(lambda model: models.can_load(str(model.run)), tuning.models()):
        models.catalog.promise(model.name, functools.partial(models.load, str(model.run)), model.created)
    return tuning
