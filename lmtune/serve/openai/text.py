"""The tokens of an answer as text, piece by piece: reasoning, content, tool calls, and where a stop string cuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lmtune.data.rendering import Renderer
from lmtune.data.replies import CLOSING, OPENING
from lmtune.data.types import ToolCall
from lmtune.inference.chat import Detokenizer

_REASONING_BEGINS, _REASONING_ENDS = f"{OPENING}\n", f"\n{CLOSING}\n\n"


@dataclass(frozen=True)
class Piece:
    """What is new of an answer.

    Attributes:
        content: of the answer.
        reasoning: before it.
        calls: of tools; they come with the last piece.
    """

    content: str = ""
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()


class StopStrings:
    """Lets text through up to the first of some strings; what may be the beginning of one waits."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held = tuple(stops), ""
        self.has_ended = False

    def feed(self, text: str) -> str:
        """What of the text so far can be let out."""
        if not self._stops or self.has_ended:
            return "" if self.has_ended else text
        self._held += text
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.has_ended = True
            return self._held[: min(found)]
        keep = max(_overlap(self._held, stop) for stop in self._stops)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out

    def finish(self) -> str:
        """What waits, as there is no more."""
        return "" if self.has_ended else self._held


class PlainText:
    """A completion: all that the model says, without control tokens."""

    def __init__(self, renderer: Renderer, stops: Sequence[str] = ()) -> None:
        self._detokenizer, self._stops = Detokenizer(renderer.plain_text), StopStrings(stops)

    @property
    def has_ended(self) -> bool:
        """Whether a stop string was said."""
        return self._stops.has_ended

    def feed(self, tokens: Sequence[int]) -> Piece:
        """What further tokens add."""
        return Piece(self._stops.feed("".join(self._detokenizer.add(token) for token in tokens)))

    def finish(self) -> Piece:
        """What is left at the end."""
        return Piece(self._stops.feed(self._detokenizer.finish()) + self._stops.finish())


class ChatText:
    """An answer of the assistant.

    Args:
        renderer: of the model.
        stops: end it; they are looked for in reasoning and content.
        has_tools: whether the answer may hold calls, which are read out of it.
        most_calls: further ones are left out.
    """

    def __init__(
        self, renderer: Renderer, stops: Sequence[str] = (), has_tools: bool = False, most_calls: int | None = None
    ) -> None:
        self._most_calls = most_calls
        self._renderer, self._parser = renderer, renderer.reply_parser()
        self._detokenizer, self._stops = Detokenizer(renderer.marked_text), StopStrings(stops)
        self._mark = renderer.call_mark if has_tools else None
        self._reasoning: bool | None = None  # not known yet
        self._held = ""  # of reasoning or content
        self._said = False  # whether there is content
        self._calls: str | None = None  # what begins as a call

    @property
    def has_ended(self) -> bool:
        """Whether a stop string was said."""
        return self._stops.has_ended

    def feed(self, tokens: Sequence[int]) -> Piece:
        """What further tokens add."""
        return self._pieces("".join(self._parser.feed(self._detokenizer.add(token)) for token in tokens))

    def finish(self) -> Piece:
        """What is left at the end."""
        rest = self._parser.feed(self._detokenizer.finish()) + self._parser.finish()
        before = self._pieces(rest)
        left = self._split(self._stops.finish(), ended=True)
        content, reasoning = before.content + left.content, before.reasoning + left.reasoning
        if self._calls is None:
            return Piece(content, reasoning)
        text, calls = self._renderer.calls_in(self._calls)
        return Piece(content + text, reasoning, calls[: self._most_calls])

    def _pieces(self, text: str) -> Piece:
        return self._split(self._stops.feed(text), ended=False)

    def _split(self, text: str, ended: bool) -> Piece:
        """Reasoning and content of what the parser gives, in which reasoning stands in tags."""
        self._held += text
        reasoning = ""
        if self._reasoning is None:
            if self._held.startswith(_REASONING_BEGINS):
                self._held, self._reasoning = self._held[len(_REASONING_BEGINS) :], True
            elif ended or not _REASONING_BEGINS.startswith(self._held):
                self._reasoning = False
            else:
                return Piece()
        if self._reasoning:
            reasoning, end, rest = self._held.partition(_REASONING_ENDS)
            if end:
                self._held, self._reasoning = rest, False
            else:
                keep = 0 if ended else _overlap(self._held, _REASONING_ENDS)
                reasoning, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
                return Piece(reasoning=reasoning)
        return Piece(self._content(ended), reasoning)

    def _content(self, ended: bool) -> str:
        """What of the text is not, and cannot become, a call."""
        if self._calls is not None:
            self._calls, self._held = self._calls + self._held, ""
            return ""
        if self._mark is None:
            text, self._held = self._held, ""
        elif self._mark == "":  # a call is the whole answer
            if not self._said and (not self._held.strip() or self._held.lstrip().startswith(("{", "["))):
                if ended or self._held.strip():
                    self._calls, self._held = self._held, ""
                return ""
            text, self._held = self._held, ""
        else:
            text, mark, rest = self._held.partition(self._mark)
            if mark:
                said = text.rstrip()
                self._calls, self._held, text = text[len(said) :] + mark + rest, "", said
            else:
                keep = 0 if ended else max(_overlap(text, self._mark), len(text) - len(text.rstrip()))
                text, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self._said = self._said or bool(text)
        return text


def _overlap(text: str, mark: str) -> int:
    """How many characters at the end of `text` are the beginning of `mark`."""
    return next((size for size in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:size])), 0)
