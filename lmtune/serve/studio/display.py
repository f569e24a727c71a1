"""From messages to what Gradio's chatbot shows: Markdown, but never live HTML or a picture from somewhere else.

An invisible word joiner (U+2060) is put into whatever would begin a tag, an entity, an image, a link's definition or a
fence, inline code included: the page finds inline code by its own rules. Only fenced code keeps every letter. It is
found by a strict rule, and written anew in a form that has one reading only.

The page would also take maths from one end of the text to the other, and fenced code with it. So it looks for maths
between the usual delimiters with an invisible separator (U+2063) outside, which only maths that ends before the next
fenced code is given. An edited question loses both again, and `chat.js` takes them out of what is shown and copied.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lmtune.data.replies import is_still_reasoning, split_reply
from lmtune.inference.chat import AnswerInfo
from lmtune.inference.request import FinishReason
from lmtune.serve.studio.conversation import Turn

_JOINER = "\u2060"
_SEPARATOR = "\u2063"
_INVISIBLE = re.compile(f"[{_JOINER}{_SEPARATOR}]")
_MARKS = {"$$": "$$", "\\[": "\\]", "\\(": "\\)"}
MATHS = [
    {"left": _SEPARATOR + left, "right": right + _SEPARATOR, "display": left != "\\("} for left, right in _MARKS.items()
]
_OPENING = re.compile(r"(?P<indent> {0,3})(?P<marks>`{3,}|~{3,})[ \t]*(?P<language>[A-Za-z0-9+#.-]{0,20})")
_LANGUAGES = {"mermaid": "", "constructor": "", "cpp": "c"}  # one is drawn, with the others the page shows no answer
_LIVE = re.compile(r"<(?=[A-Za-z/!?])|&(?=[A-Za-z#])|!(?=\\*\[)|\](?=:)|`{3,}|~{3,}")
_ENDINGS: dict[FinishReason | None, str] = {
    "length": " · cut at the limit", "context": " · cut: the model can read no further", "stopped": " · stopped",
}  # fmt: skip
_BEGINS_MATHS = re.compile(r"\$\$|\\[\[(]")


@dataclass(frozen=True)
class Entry:
    """What the chatbot shows as one: a message, or the reasoning before an answer.

    Attributes:
        message: index of the message that it shows, or a part of.
        value: as the chatbot takes it.
        label: what stands above it.
        copied: what its copy button gives, where that is not the shown text.
    """

    message: int
    value: dict[str, Any]
    label: str
    copied: str


def render_turns(turns: Sequence[Turn], answering: bool = False, can_continue: bool = False) -> list[Entry]:
    """What the chatbot shows of a conversation; reasoning is an entry of its own, folded away.

    `answering`: the last answer is under way. `can_continue`: offer to go on with it.
    """
    entries: list[Entry] = []
    for index, (message, info) in enumerate(turns):
        is_answer = message.role == "assistant"
        under_way = answering and is_answer and index == len(turns) - 1
        label = "" if info is None else speaker_name(info) + _ENDINGS.get(info.finish_reason, "")
        reasoning, text = split_reply(message.content) if is_answer else (None, message.content)
        if reasoning is not None:
            state = "pending" if under_way and is_still_reasoning(message.content) else "done"
            value = {**_value("assistant", reasoning), "metadata": {"title": "Thinking", "status": state}}
            entries.append(Entry(index, value, label, "" if answering else reasoning))
            label = ""
        if under_way and not text.strip():  # the line under the chat says what goes on
            continue
        value = _value(message.role, text if text.strip() or not is_answer else "*(no answer)*")
        is_shown_as_it_is = _INVISIBLE.sub("", value["content"][0]["text"]) == text
        entries.append(Entry(index, value, label, "" if answering or is_shown_as_it_is else text))
    if entries and can_continue and not answering:
        entries[-1].value["options"] = [{"label": "Continue", "value": "continue"}]
    return entries


def speaker_name(info: AnswerInfo) -> str:
    """Who gave an answer: the run's or model's name, and whether with its adapter."""
    return info.model + {True: " · base", False: " · tuned", None: ""}[info.use_base]


@functools.lru_cache(maxsize=1024)
def sanitize_markdown(text: str) -> str:
    """`text` as Markdown in which HTML and images are text."""
    shown_lines: list[str] = []
    for lines in _parts(_INVISIBLE.sub("", text).replace("\r\n", "\n").replace("\r", "\n")):
        if shown_lines and shown_lines[-1] and lines[0]:
            shown_lines.append("")
        shown_lines += lines
    return "\n".join(shown_lines)


def original_text(value: Any) -> str:
    """What the user wrote, from the value of an edit event: a text, or a list of parts."""
    parts = value if isinstance(value, list) else [value]
    texts = [part.get("text", "") if isinstance(part, dict) else str(part) for part in parts]
    return _INVISIBLE.sub("", "".join(texts))


def escape_markdown(text: str) -> str:
    """`text` as Markdown that shows it letter by letter."""
    return re.sub(r"[!-/:-@\[-`{-~]", lambda found: f"&#{ord(found[0])};", text)


def status_line(text: str, is_error: bool = False, is_busy: bool = False) -> str:
    """A line under the chat, as Markdown; one that moves while something is `is_busy`."""
    role = "alert" if is_error else "status"
    kind = "error" if is_error else "note busy" if is_busy else "note"
    return f'<div class="{kind}" role="{role}">{escape_markdown(text)}</div>' if text else ""


def _parts(text: str) -> Iterator[list[str]]:
    """The lines of `text` as they are shown, by turns those outside and those of fenced code."""
    outside: list[str] = []
    lines = iter(text.split("\n"))
    for line in lines:
        opening = _OPENING.fullmatch(line.rstrip(" \t"))
        if opening is None:
            outside.append(line)
            continue
        if outside:
            yield _neutralize(outside)
            outside = []
        yield _fenced(opening, lines)
    if outside:
        yield _neutralize(outside)


def _fenced(opening: re.Match[str], lines: Iterator[str]) -> list[str]:
    """The fenced code that `opening` begins and `lines` go on with; it stays open if they end before it does."""
    content: list[str] = []
    is_closed = False
    marks, indent = opening["marks"], len(opening["indent"])
    for line in lines:
        begun = line.lstrip(" ")
        if len(line) - len(begun) <= 3 and begun.startswith(marks) and not begun.rstrip(" \t").strip("`~"):
            is_closed = True
            break
        content.append(line[min(indent, len(line) - len(line.lstrip(" "))) :])
    longest = max((len(run) for line in content for run in re.findall("`{3,}", line)), default=2)
    fence = "`" * (longest + 1)
    language = opening["language"].lower()
    written = [fence + _LANGUAGES.get(language, language), *content]
    return [*written, fence] if is_closed else written


def _neutralize(lines: list[str]) -> list[str]:
    """Lines outside of fenced code, with joiners in what would be live, and separators around maths."""

    def join(found: re.Match[str]) -> str:
        return _JOINER.join(found[0]) if len(found[0]) > 1 else found[0] + _JOINER

    return _mark_maths(_LIVE.sub(join, "\n".join(lines))).split("\n")


def _mark_maths(text: str) -> str:
    """`text` with separators around its maths; each search goes on where the last ended, in linear time."""
    parts, end = [], 0
    unending: set[str] = set()
    for found in _BEGINS_MATHS.finditer(text):
        left, start = found[0], found.start()
        if start < end or left in unending:
            continue
        stop = text.find(_MARKS[left], found.end() + 1)
        if stop < 0:
            unending.add(left)
            continue
        parts += [text[end:start], _SEPARATOR, text[start : stop + 2], _SEPARATOR]
        end = stop + 2
    return "".join([*parts, text[end:]])


def _value(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": sanitize_markdown(text)}]}
