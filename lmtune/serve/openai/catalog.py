"""The models that a server has, by the names that programs use."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from lmtune.data.rendering import Renderer
from lmtune.errors import ConfigError
from lmtune.inference.load import LoadedModel
from lmtune.serve.openai.errors import ApiError
from lmtune.serve.openai.grammar import Grammars


@dataclass(frozen=True)
class Served:
    """A model under a name.

    Attributes:
        name: by which it is asked for.
        loaded: the model.
        renderer: a copy of the model's, for the server's thread alone: a tokenizer is not for several at once.
        grammars: make its answers keep to a schema.
        created: when it was made, in seconds since 1970.
    """

    name: str
    loaded: LoadedModel
    renderer: Renderer
    grammars: Grammars
    created: int = field(default_factory=lambda: int(time.time()))

    def as_dict(self) -> dict[str, object]:
        """As `/v1/models` tells it."""
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "lmtune"}


class Catalog:
    """Names and their models; may be added to while the server runs."""

    def __init__(self) -> None:
        self._models: dict[str, Served] = {}

    def add(self, name: str, loaded: LoadedModel, created: int | None = None) -> None:
        """Serve a model.

        Raises:
            ConfigError: the name is taken, or the model is a classifier.
        """
        if name in self._models:
            raise ConfigError(f"{name}: two models have this name; give one another: NAME=RUN_OR_MODEL")
        if loaded.head is not None:
            raise ConfigError(f"{name}: a classifier, which gives no answers; use lmtune predict or lmtune chat")
        renderer = copy.deepcopy(loaded.renderer)
        grammars = Grammars(renderer, int(loaded.model.config.get_text_config().vocab_size))
        served = Served(name, loaded, renderer, grammars)
        self._models[name] = served if created is None else Served(name, loaded, renderer, grammars, created)

    def find(self, name: str) -> Served:
        """The model of a name.

        Raises:
            ApiError: there is none.
        """
        if (served := self._models.get(name)) is None:
            known = ", ".join(self._models)
            message = f"The model `{name}` does not exist. This server has: {known}."
            raise ApiError(404, message, param="model", code="model_not_found")
        return served

    def remove(self, name: str) -> None:
        """Serve a model no longer. Errors as of `find`."""
        self.find(name)
        del self._models[name]

    def __iter__(self) -> Iterator[Served]:
        return iter(list(self._models.values()))

    def __contains__(self, name: str) -> bool:
        return name in self._models
