"""What a model generates, taken apart: its reasoning, and the answer.

A template may format a reply in several ways: reasoning in <think> tags, which the prompt may already have opened; in
channels, whose names stand between control tokens (`<|channel|>analysis<|message|>…`); or a word between control tokens
before every answer. A reply is brought into one form, whatever the template's is:

    <think>
    reasoning
    </think>

    answer

or the answer alone where there is no reasoning. That is the form in which chat streams and remembers a reply, and in
which rows hold reasoning; `split_reply` takes it apart. `ReplyFormat` is found by probing the template
(`lmtune.data.templates`), `ReplyParser` does the work piece by piece.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from lmtune.data.calls import CallFormat, call_text

OPENING, CLOSING = "<think>", "</think>"
_REPLY = re.compile(r"\s*<think>(?P<reasoning>.*?)(?:</think>(?:\s*\n|[ \t]*)(?P<answer>.*)|\Z)", re.DOTALL)


def split_reply(text: str) -> tuple[str | None, str]:
    """(reasoning, answer) of a reply; the reasoning is None where there is none, the answer empty where it is to come.

    The answer keeps the indentation of its first line.
    """
    found = _REPLY.fullmatch(text)
    return (None, text) if found is None else (found["reasoning"].strip(), found["answer"] or "")


def is_still_reasoning(text: str) -> bool:
    """Whether a reply, maybe unfinished, has begun to reason and not ended."""
    found = _REPLY.fullmatch(text)
    return found is not None and found["answer"] is None


@dataclass(frozen=True)
class ReplyFormat:
    """How replies are formatted in tokens. In the texts, control tokens are the characters that `marks` gives them.

    Attributes:
        lead: what stands before an answer without reasoning.
        opening, closing: what stands around reasoning, without white space at their ends; empty where the template has
            no place for reasoning, so that a reply is taken as it is.
        is_opened: the prompt ends inside the reasoning.
        marks: for each control token of these texts one character that no text holds.
        names: by these characters, the tokens as text.
        calls: the form of tool calls, where control tokens are a part of it; else calls are text like any other.
    """

    lead: str = ""
    opening: str = ""
    closing: str = ""
    is_opened: bool = False
    marks: Mapping[int, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    calls: CallFormat | None = None


class ReplyParser:
    """Brings a reply, piece by piece, into the form of this module; nothing is let out that may be half a mark."""

    def __init__(self, form: ReplyFormat) -> None:
        self._form = form
        self._unmarked = str.maketrans("", "", "".join(form.marks.values()))
        self._named = str.maketrans(dict(form.names))
        self._call_lead = form.calls.first if form.calls is not None else ""
        self._held = ""  # not let out yet
        self._read = self._reasoning if form.is_opened else self._start
        self._has_reasoning = False

    def feed(self, text: str) -> str:
        """What `text` adds to the reply, maybe nothing yet."""
        self._held += text
        return self._read(False).translate(self._unmarked)

    def finish(self) -> str:
        """What was held back."""
        return self._read(True).translate(self._unmarked)

    # Each of these lets out what it can of `_held`, and hands over to the next.

    def _start(self, ended: bool) -> str:
        form, bare = self._form, self._held.lstrip()
        if form.opening and bare.startswith(form.opening):
            self._held, self._read = bare[len(form.opening) :], self._reasoning
        elif form.lead and self._held.startswith(form.lead):
            self._held, self._read = self._held[len(form.lead) :], self._answer
        elif not ended and (form.opening.startswith(bare) or form.lead.startswith(self._held)):
            return ""
        else:
            self._read = self._answer
        return self._read(ended)

    def _reasoning(self, ended: bool) -> str:
        reasoning, closing, rest = self._held.partition(self._form.closing)
        if not closing and self._call_lead and self._form.closing[0] in self._form.names:
            said, mark, after = self._held.partition(self._form.closing[0])
            if self._call_lead in after:  # it reasons, then calls a tool
                reasoning, closing, rest = said, mark, after[after.index(self._call_lead) :]
        if closing or ended:
            self._held, self._read = rest, self._closed
        else:
            reasoning = _without_beginning(reasoning, self._form.closing).rstrip()
            if self._call_lead and self._form.closing[0] in self._form.names:
                reasoning = reasoning.partition(self._form.closing[0])[0].rstrip()
            self._held = self._held[len(reasoning) :]
        said = reasoning if self._has_reasoning else reasoning.lstrip()
        if said and not self._has_reasoning:
            self._has_reasoning = True
            said = f"{OPENING}\n{said}"
        if not closing:
            return said
        return (f"{said.rstrip()}\n{CLOSING}\n\n" if self._has_reasoning else "") + self._read(ended)

    def _closed(self, ended: bool) -> str:
        bare = self._held.lstrip()
        if not bare and not ended:
            return ""
        blank = self._held[: len(self._held) - len(bare)]
        self._held, self._read = blank.rpartition("\n")[2] + bare, self._answer
        return self._answer(ended)

    def _answer(self, ended: bool) -> str:
        said, self._held = self._held, ""
        if not self._call_lead:
            return said
        text, lead, rest = said.partition(self._call_lead)
        if ended and lead:
            assert self._form.calls is not None
            calls = self._form.calls.read(lead + rest)
            if not calls:
                return said.translate(self._named)
            return (f"{text.rstrip()}\n" if text.strip() else "") + call_text(calls)
        if not ended and not lead:
            text = _without_beginning(said, self._call_lead)
        if not ended and not text.strip():  # a blank before a call is none of the answer's
            text = ""
        self._held = said[len(text) :]
        return text


def _without_beginning(text: str, mark: str) -> str:
    """`text` without what may be the beginning of `mark` at its end."""
    return text[: len(text) - next(n for n in range(len(mark), -1, -1) if text.endswith(mark[:n]))]
