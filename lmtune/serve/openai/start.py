"""Starts the API: the models by their names, the key, the page beside it.

serve(["runs/support", "base=tiny"], Address(port=8000, auth="lmtune:KEY"))
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from fastapi import FastAPI

from lmtune.config.schema import Quantization
from lmtune.errors import ConfigError
from lmtune.inference.load import LoadedModel
from lmtune.inference.shared import SharedModels
from lmtune.io.console import err, escape, progress
from lmtune.runs.ensembles import find_ensemble
from lmtune.runs.store import find_run
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


def serve(
    targets: Sequence[str], address: Address, quantization: Quantization | None = None, base: str | None = None,
    max_tokens: int = MAX_TOKENS, max_requests: int = 256, has_page: bool = True,
) -> None:  # fmt: skip
    """Serve models until Ctrl-C or SIGTERM; answers under way are finished first.

    Args:
        targets: as of `named`.
        address: where; its password is the key.
        quantization, base: as of `SharedModels`.
        max_tokens: where an answer is cut whose request does not say it.
        max_requests: under way at once.
        has_page: whether the chat page is at `/`.

    Raises:
        ConfigError: two models have one name, or one is a classifier.
        ModelError: there is no such model.
        LmtuneError: no port is free.
    """
    shared, catalog, loaded = SharedModels(quantization, base), Catalog(), list[LoadedModel]()
    for name, target in map(named, targets):
        loaded.append(shared.load(target))
        catalog.add(name, loaded[-1])
        if loaded[-1].date_note:
            err.print(f"[dim]{escape(name)}: {escape(str(loaded[-1].date_note))}[/]")
    answering = Answering(Metrics(), max_requests)
    works: list[Work] = [answering]
    page: FastAPI | None = None
    if has_page:
        from lmtune.serve.server import build_application
        from lmtune.serve.studio.conversation import Activity

        with progress("building the page"):
            works.append(activity := Activity())
            page = build_application(loaded, address, activity)
    assert address.auth is not None
    key = address.auth.partition(":")[2]
    application = build_api(catalog, answering, key, address.allowed_hosts, max_tokens, page=page)
    err.print(f"models: {escape(', '.join(served.name for served in catalog))}")
    if page is not None:
        err.print(f"[dim]the page at / asks for user {USER} and, as password, the key[/]")
    try:
        run_server(application, address, works, "lmtune serve: {}/v1")
    finally:
        answering.close()
