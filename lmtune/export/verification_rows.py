"""The rows of a run's `verification.json` as an endpoint is asked them: tokens, where the answer begins, and messages.

The file holds tokens. A chat endpoint wants messages and renders them itself, so they are read back from the tokens: by
what the template writes around the turns of a probe. Only messages that render to exactly the tokens of the row count;
a row with tools, or one of a template that changes contents, has none and is asked without.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from lmtune.data.rendering import Renderer
from lmtune.data.types import Message
from lmtune.errors import ModelError
from lmtune.runs.store import RunDirectory

_S, _U, _A, _V = "probe system", "probe question", "probe answer", "another question"


@dataclass(frozen=True)
class VerificationRow:
    """A held-out row.

    Attributes:
        ids: of the whole row.
        num_prompt: how many of them stand before the answer.
        messages: the conversation before the answer, with its system prompt; empty where it cannot be told.
    """

    ids: tuple[int, ...]
    num_prompt: int
    messages: tuple[Message, ...] = ()

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens before the answer."""
        return self.ids[: self.num_prompt]


def verification_rows(run: RunDirectory, renderer: Renderer, system: str | None) -> list[VerificationRow]:
    """The run's rows, the shortest first.

    Args:
        run: a run.
        renderer: that of the run.
        system: its system prompt, which a client sends.

    Raises:
        ModelError: it has none.
        CheckpointError: the file is damaged.
    """
    rows, lengths = run.read_verification(), run.read_prompt_lengths()
    known: list[int | None] = [None] * len(rows) if lengths is None else [*lengths]
    reader = _Reader(renderer, system)
    found = []
    for ids, length in zip(rows, known, strict=True):
        number = reader.answer_start(ids) if length is None else length
        number = number if 0 < number < len(ids) else max(1, len(ids) // 2)  # a text: its first half is the prompt
        found.append(VerificationRow(tuple(ids), number, reader.messages(ids[:number])))
    return sorted((row for row in found if len(row.ids) > 1), key=lambda row: len(row.ids))


class _Reader:
    """Reads tokens back, by what the template writes around turns."""

    def __init__(self, renderer: Renderer, system: str | None) -> None:
        self._renderer, self._system = renderer, system
        self._around = dict[bool, tuple[str, ...]]()
        if not renderer.uses_chat_template:
            return
        for has_system in (False, True):
            first = [Message("system", _S)] if has_system else []
            with contextlib.suppress(ModelError, ValueError):
                one = self._text(renderer.prompt_ids([*first, Message("user", _U)]))
                turns = [*first, Message("user", _U), Message("assistant", _A), Message("user", _V)]
                several = self._text(renderer.prompt_ids(turns))
                lead, rest = one.split(_S) if has_system else ("", one)
                before, after = rest.split(_U)
                to_answer = several.split(_U)[1].split(_A)[0]
                to_question = several.split(_A)[1].split(_V)[0]
                self._around[has_system] = lead, before, to_answer, to_question, after

    def answer_start(self, ids: Sequence[int]) -> int:
        """Where the last answer begins, in a file of an earlier version that does not say it; 0 if unknown."""
        if not self._renderer.uses_chat_template:
            return 0
        one, two = (self._renderer.prompt_ids([Message("user", text)])[::-1] for text in (_U, _A))
        same = next((n for n, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), 0)
        tail = one[:same][::-1]
        starts = (end for end in range(len(ids) - 1, same - 1, -1) if list(ids[end - same : end]) == tail)
        return next(starts, 0) if same else 0

    def messages(self, prompt: Sequence[int]) -> tuple[Message, ...]:
        """The messages that render to these tokens, with the system prompt as a client sends it; none if unknown."""
        text = self._text(prompt)
        for has_system, (lead, before, to_answer, to_question, after) in self._around.items():
            start = text.find(before, len(lead))
            system = text[len(lead) : start]
            if start < 0 or bool(system) != has_system or not text.startswith(lead) or not text.endswith(after):
                continue
            first = [Message("system", system)] if has_system else []
            with contextlib.suppress(ModelError, ValueError):
                turns = self._turns(text[start + len(before) :].removesuffix(after), to_answer, to_question)
                if self._renderer.prompt_ids([*first, *turns]) == list(prompt):
                    own = [Message("system", self._system)] if self._system and not has_system else []
                    return (*own, *first, *turns)
        return ()

    def _turns(self, text: str, to_answer: str, to_question: str) -> list[Message]:
        """Questions and answers in turn."""
        turns: list[Message] = []
        while True:
            question, found, text = text.partition(to_answer)
            turns.append(Message("user", question))
            if not found:
                return turns
            answer, _, text = text.partition(to_question)
            turns.append(Message("assistant", answer))

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._renderer.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
