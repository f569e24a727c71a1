"""The models that a server has, by the names that programs use."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from starlette.concurrency import run_in_threadpool

from lmtune.data.rendering import Renderer
from lmtune.errors import ConfigError, LmtuneError
from lmtune.inference.chat_model import ChatModel
from lmtune.serve.openai.errors import ApiError
from lmtune.serve.openai.grammar import Grammars

NO_ANSWERS = "{}: a classifier, which gives no answers; use lmtune predict or lmtune chat"


@dataclass(frozen=True)
class Served:
    """A model under a name.

    Attributes:
        name: by which it is asked for.
        model: itself.
        renderer: a copy of the model's, for the server's thread alone: a tokenizer is not for several at once.
        grammars: make its answers keep to a schema.
        created: when it was made, in seconds since 1970.
    """

    name: str
    model: ChatModel
    renderer: Renderer
    grammars: Grammars
    created: int


@dataclass(frozen=True)
class _Promised:
    """A model that is loaded when it is first asked for."""

    load: Callable[[], ChatModel]
    created: int


class Catalog:
    """Names and their models; may be added to from any thread while the server runs.

    Attributes:
        more: loads the model of a name that is not listed; None where there is none.
        forget: called with the name of a model that is to be deleted; False where it may not be.
    """

    def __init__(self) -> None:
        self.more: Callable[[str], ChatModel | None] = lambda name: None
        self.forget: Callable[[str], bool] = lambda name: False
        self._models: dict[str, Served | _Promised] = {}
        self._loading = threading.Lock()

    def add(self, name: str, model: ChatModel, created: int | None = None) -> None:
        """Serve a model.

        Raises:
            ConfigError: the name is taken, or the model is a classifier.
        """
        if isinstance(self._models.get(name), Served):
            raise ConfigError(f"{name}: two models have this name; give one another: NAME=RUN_OR_MODEL")
        if model.head is not None:
            raise ConfigError(NO_ANSWERS.format(name))
        renderer = copy.deepcopy(model.renderer)
        grammars = Grammars(renderer, model.engine.vocab_size)
        self._models[name] = Served(name, model, renderer, grammars, int(time.time()) if created is None else created)

    def promise(self, name: str, load: Callable[[], ChatModel], created: int) -> None:
        """Serve a model that is loaded when it is first asked for."""
        self._models.setdefault(name, _Promised(load, created))

    async def find(self, name: str) -> Served:
        """The model of a name, loaded.

        Raises:
            ApiError: there is none, or it cannot be loaded.
        """
        found = self._models.get(name)
        if isinstance(found, Served):
            return found
        try:
            return await run_in_threadpool(self.load, name)
        except LmtuneError as error:
            raise ApiError(500, f"{name}: cannot be loaded: {error}", param="model", code="model_error") from None

    def load(self, name: str) -> Served:
        """The model of a name, loaded now if it was not. Errors as of `find`, or those of loading."""
        with self._loading:
            if name not in self._models and (loaded := self.more(name)) is not None:
                self.add(name, loaded)
            self._check(name)
            found = self._models[name]
            if isinstance(found, _Promised):
                self.add(name, found.load(), found.created)
            served = self._models[name]
            assert isinstance(served, Served)
            return served

    def entry(self, name: str) -> dict[str, object]:
        """A model as `/v1/models` tells it. Errors as of `find`."""
        self._check(name)
        return {"id": name, "object": "model", "created": self._models[name].created, "owned_by": "lmtune"}

    def delete(self, name: str) -> None:
        """Serve a model, and its checkpoints, no longer.

        Raises:
            ApiError: there is none, or it was named at the start.
        """
        self._check(name)
        if not self.forget(name):
            message = f"{name}: named when the server was started; expected a model that a fine-tuning job has made"
            raise ApiError(403, message, param="model")
        for known in list(self._models):
            if known == name or known.startswith(f"{name}:"):
                del self._models[known]

    @property
    def names(self) -> list[str]:
        """Of all models."""
        return list(self._models)

    def _check(self, name: str) -> None:
        if name not in self._models:
            message = f"The model `{name}` does not exist. This server has: {', '.join(self._models)}."
            raise ApiError(404, message, param="model", code="model_not_found")
