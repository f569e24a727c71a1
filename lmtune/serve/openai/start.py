"""Starts the API: the models by their names, the key, the page beside it.

serve(["runs/support", "base=tiny"], Address(port=8000, auth="lmtune:KEY"))
"""

from __future__ import annotations

import functools
import os
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI

from lmtune.config.schema import ModelConfig, Quantization
from lmtune.errors import ConfigError, LmtuneError
from lmtune.inference.load import LoadedModel
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

KEY = "LMTUNE_API_KEY"
USER = "lmtune"  # of the page


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
    if sign and rest and not Path(target).exists():
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


class _Models:
    """Loads what is served, one at a time."""

    def __init__(self, quantization: Quantization | None, base: str | None) -> None:
        self._shared, self._lock = SharedModels(quantization, base), threading.Lock()
        self.catalog = Catalog()

    def load(self, target: str) -> LoadedModel:
        with self._lock:
            return self._shared.load(target)

    def load_checkpoint(self, tuning: FineTuning, name: str) -> LoadedModel | None:
        """The model of a checkpoint of a job, by the name that is listed for it."""
        found = tuning.checkpoint(name)
        if found is None:
            return None
        with self._lock:
            return self._shared.load_checkpoint(str(found[0]), found[1])

    def on_model(self, name: str, run: Path) -> None:
        """A job has made a model: it can be used at once."""
        self.catalog.promise(name, lambda: self.load(str(run)), int(time.time()))
        try:
            self.catalog.load(name)
        except LmtuneError as error:  # a model for which there is no memory; the next request says it again
            warn(f"{name}: cannot be loaded: {error}")


def serve(
    targets: Sequence[str], address: Address, quantization: Quantization | None = None, base: str | None = None,
    max_tokens: int = MAX_TOKENS, max_requests: int = 256, has_page: bool = True, jobs: JobSettings | None = None,
) -> None:  # fmt: skip
    """Serve models until Ctrl-C or SIGTERM; answers under way are finished first.

    Args:
        targets: as of `named`.
        address: where; its password is the key.
        quantization, base: as of `SharedModels`.
        max_tokens: where an answer is cut whose request does not say it.
        max_requests: under way at once.
        has_page: whether the chat page is at `/`.
        jobs: of the fine-tuning jobs; None serves no such routes.

    Raises:
        ConfigError: two models have one name, or one is a classifier; or another server works in the folder of jobs.
        ModelError: there is no such model.
        LmtuneError: no port is free.
    """
    models, loaded, bases = _Models(quantization, base), list[LoadedModel](), dict[str, ModelConfig]()
    for name, target in map(named, targets):
        loaded.append(models.load(target))
        models.catalog.add(name, loaded[-1])
        if loaded[-1].date_note:
            err.print(f"[dim]{escape(name)}: {escape(str(loaded[-1].date_note))}[/]")
        if (trained := trainable(name, target, quantization, base)) is not None:
            bases.setdefault(*trained)
    answering = Answering(Metrics(), max_requests)
    works: list[Work] = [answering]
    tuning = None if jobs is None else _fine_tuning(jobs, models, bases)
    page: FastAPI | None = None
    if has_page:
        from lmtune.serve.server import build_application
        from lmtune.serve.studio.conversation import Activity

        with progress("building the page"):
            works.append(activity := Activity())
            page = build_application(loaded, address, activity)
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
        run_server(application, address, works, "lmtune serve: {}/v1")
    finally:
        answering.close()
        if tuning is not None:
            tuning.close()


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
    for model in tuning.models():
        models.catalog.promise(model.name, functools.partial(models.load, str(model.run)), model.created)
    return tuning
