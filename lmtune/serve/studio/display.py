"""From messages to what Gradio's chatbot shows: Markdown, but never live HTML or a picture from somewhere else.

The chatbot turns HTML in a message into HTML on the page. What a model says, and what a user types, should be read as
it is, so an invisible word joiner (U+2060) is put into whatever would begin a tag, an entity, an image, a link's
definition or a fence, inline code included: what is code is the page's to say, and it says otherwise than the standard.

Only blocks of code keep every letter. They are found by a strict rule, and written anew in a form that cannot be read
in two ways: at the margin, between blank lines, with a fence longer than any within, and no language that is drawn.

The page would also take maths from one end of the text to the other, and blocks of code with it. So it is told to look
for maths between other marks than those that are typed: the same, with an invisible separator (U+2063) outside, which
only maths that ends before the next block of code is given.

An edited question comes back with the joiners and separators, and loses them again; line ends and the form of its
blocks of code stay as they were shown. On the page `studio.script` takes the joiners out of what is shown and
copied, where a text can no longer become a tag; a message's copy button gives what was said, letter by letter.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lmtune.data.replies import is_still_reasoning, split_reply
from lmtune.data.types import Message
from lmtune.inference.chat import AnswerInfo
from lmtune.inference.engine import FinishReason
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


def shown(messages: Sequence[Message], answering: bool = False, can_continue: bool = False) -> list[dict[str, Any]]:
    """`messages` for `gr.Chatbot`; reasoning becomes an entry of its own, folded away.

    Args:
        messages: turns of user and assistant.
        answering: the last one is still being said.
        can_continue: offer to go on with the last one.
    """
    entries = [entry.value for entry in _entries(messages, answering)]
    if entries and can_continue and not answering:
        entries[-1]["options"] = [{"label": "Continue", "value": "continue"}]
    return entries


def notes(turns: Sequence[Turn], answering: bool = False) -> list[list[str]]:
    """For each entry of `shown`, what stands above it and what its copy button should give where it would give another
    text; both may be empty.

    Args:
        turns: the messages, each answer with who gave it and how it ended.
        answering: the last one is still being said.
    """
    found: list[list[str]] = []
    labelled: set[int] = set()
    for entry in _entries([message for message, _ in turns], answering):
        info = turns[entry.number][1]
        above = "" if info is None or entry.number in labelled else label(info) + _ENDINGS.get(info.finish_reason, "")
        labelled.add(entry.number)
        found.append([above, "" if answering or _is_copied_well(entry) else entry.source])
    return found


def origin(messages: Sequence[Message], index: int) -> int:
    """Which of `messages` the entry `index` of `shown(messages)` shows; -1 for none."""
    origins = [entry.number for entry in _entries(messages, False)]
    return origins[index] if 0 <= index < len(origins) else -1


def label(info: AnswerInfo) -> str:
    """Who gave an answer: the run's or model's name, and whether with its adapter."""
    side = {True: " · base", False: " · tuned", None: ""}[info.use_base]
    return f"{info.model}{side}"


@functools.lru_cache(maxsize=1024)
def harmless(text: str) -> str:
    """`text` as Markdown in which HTML and images are text."""
    shown_lines: list[str] = []
    for lines in _parts(_INVISIBLE.sub("", text).replace("\r\n", "\n").replace("\r", "\n")):
        if shown_lines and shown_lines[-1] and lines[0]:
            shown_lines.append("")
        shown_lines += lines
    return "\n".join(shown_lines)


def typed(value: Any) -> str:
    """What the user wrote, from the value of an edit event: a text, or a list of parts."""
    parts = value if isinstance(value, list) else [value]
    texts = [part.get("text", "") if isinstance(part, dict) else str(part) for part in parts]
    return _INVISIBLE.sub("", "".join(texts))


def plain(text: str) -> str:
    """`text` as Markdown that shows it letter by letter."""
    return re.sub(r"[!-/:-@\[-`{-~]", lambda found: f"&#{ord(found[0])};", text)


def status(text: str, is_error: bool = False, is_busy: bool = False) -> str:
    """A line under the chat, as Markdown; one that moves while something is `is_busy`."""
    role = "alert" if is_error else "status"
    kind = "error" if is_error else "note busy" if is_busy else "note"
    return f'<div class="{kind}" role="{role}">{plain(text)}</div>' if text else ""


def _parts(text: str) -> Iterator[list[str]]:
    """The lines of `text`, by turns those outside of blocks of code and those of one, as they are to be shown."""
    outside: list[str] = []
    lines = iter(text.split("\n"))
    for line in lines:
        opening = _OPENING.fullmatch(line.rstrip(" \t"))
        if opening is None:
            outside.append(line)
            continue
        if outside:
            yield _broken_up(outside)
            outside = []
        yield _fenced(opening, lines)
    if outside:
        yield _broken_up(outside)


def _fenced(opening: re.Match[str], lines: Iterator[str]) -> list[str]:
    """The block of code that `opening` begins and `lines` go on with; it stays open if they end before it does."""
    content: list[str] = []
    is_closed = False
    marks, indent = opening["marks"], len(opening["indent"])
    for line in lines:
        if _closes(line, marks):
            is_closed = True
            break
        content.append(line[min(indent, len(line) - len(line.lstrip(" "))) :])
    longest = max((len(run) for line in content for run in re.findall("`{3,}", line)), default=2)
    fence = "`" * (longest + 1)
    language = opening["language"].lower()
    written = [fence + _LANGUAGES.get(language, language), *content]
    return [*written, fence] if is_closed else written


def _closes(line: str, marks: str) -> bool:
    """Whether `line` ends a block of code that `marks` began."""
    begun = line.lstrip(" ")
    return len(line) - len(begun) <= 3 and begun.startswith(marks) and not begun.rstrip(" \t").strip("`~")


def _broken_up(lines: list[str]) -> list[str]:
    """Lines outside of blocks of code, with joiners in what would be live, and separators around maths."""
    return _with_maths(_LIVE.sub(_joined, "\n".join(lines))).split("\n")


def _joined(found: re.Match[str]) -> str:
    return _JOINER.join(found[0]) if len(found[0]) > 1 else found[0] + _JOINER


def _with_maths(text: str) -> str:
    """`text` with separators around its maths; each search goes on where the last ended, so that time is linear."""
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


@dataclass(frozen=True)
class _Entry:
    """What the chatbot shows as one.

    Attributes:
        number: of the message that it is, or is of.
        source: the text that was said.
        value: as the chatbot takes it.
    """

    number: int
    source: str
    value: dict[str, Any]


def _entries(messages: Sequence[Message], answering: bool) -> list[_Entry]:
    entries: list[_Entry] = []
    for number, message in enumerate(messages):
        under_way = answering and number == len(messages) - 1 and message.role == "assistant"
        text = message.content
        reasoning, answer = split_reply(text) if message.role == "assistant" else (None, text)
        if reasoning is not None:
            state = "pending" if under_way and is_still_reasoning(text) else "done"
            entries.append(_Entry(number, reasoning, _value("assistant", reasoning, "Thinking", state)))
            text = answer
        source = text
        if not text.strip() and message.role == "assistant":
            if under_way:  # the line under the chat says what goes on
                continue
            text = "*(no answer)*"
        entries.append(_Entry(number, source, _value(message.role, text)))
    return entries


def _is_copied_well(entry: _Entry) -> bool:
    """Whether the page's own copy button gives what was said, once the invisible characters are gone."""
    text: str = entry.value["content"][0]["text"]
    return "metadata" not in entry.value and _INVISIBLE.sub("", text) == entry.source


def _value(role: str, text: str, title: str | None = None, state: str = "done") -> dict[str, Any]:
    value: dict[str, Any] = {"role": role, "content": [{"type": "text", "text": harmless(text)}]}
    if title is not None:
        value["metadata"] = {"title": title, "status": state}
    return value
