"""What is needed to talk to a model, whatever runs it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

from lmtune.data.rendering import Renderer
from lmtune.inference.base import Engine
from lmtune.models.head import Head
from lmtune.models.members import AS_IS, BASE, Members
from lmtune.runs.store import RunDirectory


@dataclass(frozen=True, kw_only=True)
class ChatModel:
    """A model that answers.

    Attributes:
        name: for people.
        renderer: turns messages into the tokens of training.
        engine: generates tokens with the model, for any number of conversations; of all that answer over one base.
        has_adapter: whether the base, without it, answers otherwise.
        system: the system prompt of training, used where the user gives none.
        trained_at: the time that the template wrote into the prompts of training, if it writes one.
        run: the run that the model comes from, if that is known.
        head: of a classifier; None for a language model.
        members: who answers, of several adapters on the model.
    """

    name: str
    renderer: Renderer
    engine: Engine = field(repr=False)
    has_adapter: bool = False
    system: str | None = None
    trained_at: str | None = None
    run: RunDirectory | None = None
    head: Head | None = None
    members: Members = AS_IS

    @property
    def lock(self) -> contextlib.AbstractContextManager[bool]:
        """Held by whoever runs the model, since switching the adapter off concerns all threads."""
        return self.engine.lock

    def answering(self, use_base: bool = False) -> Members:
        """Who answers a request, by `Request.members`."""
        return Members((BASE,)) if use_base and self.has_adapter else self.members

    @property
    def date_note(self) -> str | None:
        """What to say where the template writes another date now than it wrote in training."""
        now = self.renderer.rendered_at
        if now is None or self.trained_at is None or now[:10] == self.trained_at[:10]:
            return None
        return f"the chat template writes today's date, {now[:10]}; in training it wrote {self.trained_at[:10]}"
