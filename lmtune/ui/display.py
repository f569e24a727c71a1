"""From messages to what Gradio's chatbot shows: Markdown, but never live HTML or a picture from somewhere else.

The chatbot turns HTML in a message into HTML on the page. What a model says, and what a user types, should be read as
it is, so an invisible word joiner (U+2060) is put into whatever would begin a tag, an entity or an image, outside of
code, where Markdown shows it as it is already. An edited question comes back with the joiners, and loses them again.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from lmtune.data.examples import Message

_JOINER = "\u2060"
_CODE = re.compile(
    r"(?P<fence>^ {0,3}(?P<mark>`{3,}|~{3,})[^\n]*(?:\n(?:.*?^ {0,3}(?P=mark)[`~]*[ \t]*$|.*\Z)|\Z))"
    r"|(?P<inline>(?<!`)(?P<ticks>`+)(?!`)[^\n]+?(?<!`)(?P=ticks)(?!`))",
    re.MULTILINE | re.DOTALL,
)
_LIVE = re.compile(r"<(?=[A-Za-z/!?])|&(?=[A-Za-z#])|!(?=\[)")
_THOUGHT = re.compile(r"\s*<think>(?P<thought>.*?)(?:</think>\s*(?P<rest>.*)|\Z)", re.DOTALL)


def shown(messages: Sequence[Message], answering: bool = False) -> list[dict[str, Any]]:
    """`messages` for `gr.Chatbot`; reasoning becomes an entry of its own, folded away.

    Args:
        messages: turns of user and assistant.
        answering: the last one is still being said.
    """
    return [entry for _, entry in _entries(messages, answering)]


def origin(messages: Sequence[Message], index: int) -> int:
    """Which of `messages` the entry `index` of `shown(messages)` shows; -1 for none."""
    origins = [number for number, _ in _entries(messages, False)]
    return origins[index] if 0 <= index < len(origins) else -1


@functools.lru_cache(maxsize=1024)
def harmless(text: str) -> str:
    """`text` as Markdown in which HTML and images are text."""
    parts, end = [], 0
    for code in _CODE.finditer(text):
        parts += [_break_up(text[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, _break_up(text[end:])])


def typed(value: Any) -> str:
    """What the user wrote, from the value of an edit event: a text, or a list of parts."""
    parts = value if isinstance(value, list) else [value]
    texts = [part.get("text", "") if isinstance(part, dict) else str(part) for part in parts]
    return "".join(texts).replace(_JOINER, "")


def plain(text: str) -> str:
    """`text` as Markdown that shows it letter by letter."""
    return re.sub(r"[!-/:-@\[-`{-~]", lambda found: f"&#{ord(found[0])};", text)


def status(text: str, is_error: bool = False) -> str:
    """A line under the chat, as Markdown."""
    role = "alert" if is_error else "status"
    return f'<div class="{"error" if is_error else "note"}" role="{role}">{plain(text)}</div>' if text else ""


def _break_up(text: str) -> str:
    return _LIVE.sub(lambda found: found[0] + _JOINER, text)


def _entries(messages: Sequence[Message], answering: bool) -> list[tuple[int, dict[str, Any]]]:
    entries: list[tuple[int, dict[str, Any]]] = []
    for number, message in enumerate(messages):
        under_way = answering and number == len(messages) - 1 and message.role == "assistant"
        text = message.content
        if message.role == "assistant" and (found := _THOUGHT.fullmatch(text)):
            state = "done" if found["rest"] is not None or not under_way else "pending"
            entries.append((number, _entry("assistant", found["thought"].strip(), "Thinking", state)))
            text = found["rest"] or ""
            if not text and state == "pending":
                continue
        if not text.strip() and message.role == "assistant":
            if under_way:  # the page shows dots until the first word
                continue
            text = "*(no answer)*"
        entries.append((number, _entry(message.role, text)))
    return entries


def _entry(role: str, text: str, title: str | None = None, state: str = "done") -> dict[str, Any]:
    entry: dict[str, Any] = {"role": role, "content": [{"type": "text", "text": harmless(text)}]}
    if title is not None:
        entry["metadata"] = {"title": title, "status": state}
    return entry
