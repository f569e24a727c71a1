"""What a browser keeps of a conversation, so that a page that is loaded again goes on with it.

The text lies in the browser's local storage and nowhere else; the server reads it back as it reads any request: what is
not in this form, or was said by models that this app does not have, is left out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, get_args

from lmtune.data.types import Message
from lmtune.inference.chat import AnswerInfo
from lmtune.inference.engine import FinishReason
from lmtune.inference.load import LoadedModel
from lmtune.serve.studio.conversation import Conversation, Mode, Speaker, Turn

MAX_CHARACTERS = 400_000  # a request may hold a million bytes, and a browser keeps a few million
_VERSION = 1


def to_text(talk: Conversation, models: Sequence[LoadedModel]) -> str:
    """What to keep of `talk`; nothing of one without a word, or too long to be sent back."""
    snapshot = talk.snapshot()
    if not any(turns for _, turns in snapshot):
        return ""
    sessions = [
        [models[index].name, base, [_written(message, info) for message, info in turns]]
        for (index, base), turns in snapshot
    ]
    text = json.dumps([_VERSION, len(talk.columns), sessions], separators=(",", ":"))
    return text if len(text) <= MAX_CHARACTERS else ""


def bring_back(text: Any, talk: Conversation, models: Sequence[LoadedModel]) -> tuple[int, Mode] | None:
    """Make of `talk` what `text` keeps; returns the model and mode of then, None if there is nothing to bring back."""
    if not isinstance(text, str) or not text:
        return None
    try:
        version, num_columns, sessions = json.loads(text)
        known = {model.name: index for index, model in enumerate(models)}
        snapshot = [
            (_speaker(known[name], base, models), [_read(one) for one in turns])
            for name, base, turns in sessions
            if name in known
        ]
        shown = [speaker for speaker, _ in snapshot[:num_columns]]
    except (TypeError, ValueError, KeyError, RecursionError):
        return None
    if version != _VERSION or num_columns not in (1, 2) or len(shown) != num_columns or not _alternates(snapshot):
        return None
    if num_columns == 2 and shown != [(shown[0][0], False), (shown[0][0], True)]:
        return None
    talk.restore(snapshot, num_columns)
    return shown[0][0], "both" if num_columns == 2 else "base" if shown[0][1] else "tuned"


def _written(message: Message, info: AnswerInfo | None) -> list[Any]:
    if info is None:
        return [message.content]
    return [message.content, info.model, info.use_base, info.finish_reason or "stopped"]


def _read(one: Sequence[Any]) -> Turn:
    """A question, or an answer with who gave it.

    Raises:
        ValueError: it is neither.
    """
    if len(one) not in (1, 4) or not isinstance(one, list) or not isinstance(one[0], str):
        raise ValueError
    one[0].encode()  # half a character is no text
    if len(one) == 1:
        return Message("user", one[0]), None
    content, model, use_base, reason = one
    if not isinstance(model, str) or use_base not in (True, False, None) or reason not in get_args(FinishReason):
        raise ValueError
    return Message("assistant", content), AnswerInfo(model, use_base, reason)


def _speaker(index: int, base: Any, models: Sequence[LoadedModel]) -> Speaker:
    return index, bool(base) and models[index].has_adapter


def _alternates(snapshot: Sequence[tuple[Speaker, Sequence[Turn]]]) -> bool:
    """Whether each session is of questions that are answered."""
    roles = ["user", "assistant"]
    return all(
        len(turns) % 2 == 0 and all(message.role == roles[number % 2] for number, (message, _) in enumerate(turns))
        for _, turns in snapshot
    )
