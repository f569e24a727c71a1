"""How a chat template writes tools and tool calls, found out with a probe; and calls read back from what it wrote.

    support = find_tool_support(render, tokens, "<|im_end|>", ends_with_next_turn=False)
    support.form.read('<tool_call>\\n{"name": "lamp", "arguments": {}}\\n</tool_call>')     # [("lamp", {})]

Templates want the arguments of a call as an object or as JSON text: the form is taken in which a call that is rendered
reads back as the same call. Three kinds of call are told apart: one JSON object (Qwen3, Llama 3.1), arguments in JSON
behind a name (gpt-oss, DeepSeek V3), and forms without JSON (Qwen3.5, Gemma 4), in which the name and every value of
the call must at least be found.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from lmtune.data.types import Message, ToolCall

Call = tuple[str, Any]  # name, arguments as a JSON value
_QUESTION, _RESULT = "probe question", "probe result"
_CALLS = tuple(
    ToolCall(f"probe_{name}", json.dumps({"probe_key": f"probe {name} value"}), f"probe000{number}")
    for number, name in enumerate(("one", "two"), start=1)
)
_TOOLS = tuple(
    json.dumps({
        "type": "function", "function": {
            "name": call.name, "description": "probe description", "parameters": {
                "type": "object", "required": ["probe_key"],
                "properties": {"probe_key": {"type": "string", "description": "probe words"}},
            },
        },
    })
    for call in _CALLS
)  # fmt: skip
CALL_OPENING = "<tool_call>"  # of a call as chat shows it
_REPLIED = re.compile(r"<tool_call>\n(?P<call>\{.*?\})\n</tool_call>\n?", re.DOTALL)
_MARK = re.compile(r"\s*(<[^<>]*>|[^\s<]+)")  # what stands behind a value
_DECODER = json.JSONDecoder()
# What to do where a template has no place for something of tools
ELSEWHERE = "use another model, or put a template that has into the model's folder (chat_template.jinja)"


class Render(Protocol):
    """The text of a conversation; None if the template refuses it."""

    def __call__(
        self, messages: Sequence[Message], tools: Sequence[str], prompt: bool, as_object: bool
    ) -> str | None: ...


@dataclass(frozen=True)
class CallFormat:
    """How a template writes calls.

    Attributes:
        as_object: whether it wants arguments as an object; else as JSON text.
        lead: what stands before each call, without white space at its ends.
        keys: of the name and of the arguments, where a call is one JSON object.
        between: what stands between the name and the arguments where these alone are JSON; None in forms without JSON.
        end: the token after the last call.
        written: a call as the probe found it, for the control tokens in it.
        closing: what ends a value, in forms without JSON.
        first: `lead` with what stands before the first call alone.
    """

    as_object: bool
    lead: str
    keys: tuple[str, str] | None
    between: str | None
    end: str = ""
    written: str = ""
    closing: str = ""
    first: str = ""

    @property
    def is_json(self) -> bool:
        """Whether calls can be read back."""
        return self.keys is not None or self.between is not None

    @staticmethod
    def before_first(written: str, lead: str) -> str:
        """What of the probe's text stands before its first call: to the end of `lead`, or without one to the name."""
        if lead and lead in written:
            return written[: written.index(lead) + len(lead)]
        return written.partition(_CALLS[0].name)[0] if not lead and not written.lstrip().startswith("{") else ""

    @property
    def frame(self) -> tuple[str, str, str] | None:
        """What an answer of one call says before the name, between it and the arguments, and after these; None where
        they do not come in this order, or are not JSON."""
        arguments = json.loads(_CALLS[0].arguments)
        place = next(((start, end) for start, value, end in _objects(self.written) if value == arguments), None)
        before, name, rest = self.written.partition(_CALLS[0].name)
        if not self.is_json or place is None or not name or place[0] < len(before):
            return None
        between = rest[: place[0] - len(before) - len(name)]
        after = self.written[place[1] :]
        return before, between, after.partition(self.end)[0] if self.end else after

    def read(self, text: str) -> list[Call] | None:
        """The calls in an answer's text; None if what begins as a call is none, or the form is not JSON."""
        found: list[Call] = []
        end = 0
        while self.is_json and (not self.lead or (end := text.find(self.lead, end)) >= 0):
            start = _skip(text, end + len(self.lead))
            try:
                call, end = self._read_one(text, start)
            except ValueError:
                return None if self.lead else found
            found.append(call)
        return found if self.is_json else None

    def _read_one(self, text: str, start: int) -> tuple[Call, int]:
        if self.keys is not None:
            call, end = _DECODER.raw_decode(text, start)
            if not isinstance(call, dict) or any(key not in call for key in self.keys):
                raise ValueError
            return (call[self.keys[0]], call[self.keys[1]]), end
        assert self.between is not None
        begin = text.index(self.between, start)
        arguments, end = _DECODER.raw_decode(text, begin + len(self.between))
        return (text[start:begin], arguments), end

    def fault(self, text: str, calls: Sequence[ToolCall]) -> str | None:
        """Why `text`, what the template makes of `calls`, does not say the same calls; None if it does."""
        wanted = [(call.name, json.loads(call.arguments)) for call in calls]
        if not self.is_json:
            parts = [part for call in wanted for part in _parts(call)]
            missing = next((part for part in parts if not any(form in text for form in _written(part))), None)
            if missing is not None:
                return f"the chat template drops {missing!r} of a tool call"
            ends = self.closing and any(isinstance(part, str) and self.closing in part for part in parts)
            return f"a tool call holds {self.closing!r}, with which the chat template ends a value" if ends else None
        read = self.read(text)
        same = [_strict(one) == _strict(other) for one, other in zip(read or (), wanted, strict=False)]
        if read is not None and all(same) and len(read) == len(wanted):
            return None
        if read and all(same) and len(read) < len(wanted):
            return f"the chat template renders {len(read)} of {len(wanted)} calls of a turn; write one call a turn"
        shown = (
            "no call"
            if not read
            else ", ".join(f"{name}({json.dumps(given, ensure_ascii=False)})" for name, given in read)
        )
        return f"the chat template renders the tool calls so that they read back as others ({shown[:200]})"


@dataclass(frozen=True)
class ToolSupport:
    """What a template does with tools; each fault says why it does not, and `ELSEWHERE` what to do.

    Attributes:
        form: how it writes calls; None beside a `call_fault`.
    """

    form: CallFormat | None = None
    tools_fault: str | None = None
    call_fault: str | None = None
    result_fault: str | None = None


def find_tool_support(render: Render, tokens: Mapping[str, bool], end: str, ends_with_next_turn: bool) -> ToolSupport:
    """Try a template.

    Args:
        render: it.
        tokens: those that the tokenizer was given apart from its vocabulary, and whether each is special.
        end: what ends an answer.
        ends_with_next_turn: whether an answer ends where the next turn begins.
    """
    question, special = Message("user", _QUESTION), [token for token, is_special in tokens.items() if is_special]
    asked = render([question], _TOOLS, True, True)
    lists = asked is not None and all(call.name in asked for call in _CALLS)
    tools_fault = None if lists else "the chat template has no place for tools, and the model would not see them"
    given = _TOOLS if lists else ()
    no_calls = "the chat template has no place for tool calls"
    before = render([question], given, True, True)
    found: list[CallFormat] = []
    for as_object in (True, False):
        one, two = (
            render([question, Message("assistant", "", tool_calls=calls)], given, False, as_object)
            for calls in (_CALLS[:1], _CALLS)
        )
        if one is not None and before is not None:
            form = _form_of(
                _after_question(one), _after_question(before), two and _after_question(two), as_object, tokens
            )
            found += [form] if form is not None else []
    form = next((form for form in sorted(found, key=lambda form: not form.is_json)), None)
    if form is None:
        return ToolSupport(None, tools_fault, no_calls, no_calls)
    answered = [
        question, Message("assistant", "", tool_calls=_CALLS[:1]),
        Message("tool", _RESULT, tool_call_id=_CALLS[0].id, name=_CALLS[0].name),
    ]  # fmt: skip
    seen = render(answered, given, True, form.as_object)
    result_fault = None
    as_answer = render([*answered[:2], Message("assistant", _RESULT)], given, True, form.as_object)
    if seen is None or _RESULT not in seen or seen == as_answer:
        result_fault = "the chat template has no place for the results of tools"
    texts = [render([question, Message("assistant", "", tool_calls=calls)], given, False, form.as_object)
             for calls in (_CALLS[:1], _CALLS)]  # fmt: skip
    ended = _end_of(texts, seen if ends_with_next_turn else None, special, end)
    if ended is None:
        endless = "the chat template has no token that ends a tool call, so the model would never stop after one"
        return ToolSupport(None, tools_fault, endless, result_fault)
    return ToolSupport(replace(form, end=ended), tools_fault, None, result_fault)


def call_text(calls: Sequence[Call]) -> str:
    """Calls as chat shows and remembers them, whatever the template's form is."""
    return "\n".join(
        f"{CALL_OPENING}\n" + json.dumps({"name": name, "arguments": given}, ensure_ascii=False) + "\n</tool_call>"
        for name, given in calls
    )


def split_calls(reply: str) -> tuple[str, tuple[ToolCall, ...]]:
    """(text, calls) of a reply that ends in calls in the form of `call_text`."""
    start = reply.find(f"{CALL_OPENING}\n{{")
    calls: list[ToolCall] = []
    position = start
    while 0 <= position < len(reply):
        found = _REPLIED.match(reply, position)
        try:
            call = json.loads(found["call"]) if found else None
        except ValueError:
            call = None
        if (
            found is None
            or not isinstance(call, dict)
            or not isinstance(call.get("arguments"), dict)
            or not call.get("name")
        ):
            return reply, ()
        calls.append(
            ToolCall(str(call["name"]), json.dumps(call["arguments"], ensure_ascii=False), f"call{len(calls) + 1:05d}")
        )
        position = found.end()
    return (reply[:start].rstrip("\n"), tuple(calls)) if calls else (reply, ())


def common_prefix(one: str, other: str) -> str:
    """What both begin with."""
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:same]


def holds_in_key(text: str, token: str) -> bool:
    """Whether a key of a JSON text holds `token`: transformers guards values against control tokens, and not keys."""

    def keys(value: Any) -> bool:
        if isinstance(value, dict):
            return any(token in key for key in value) or any(map(keys, value.values()))
        return isinstance(value, list) and any(map(keys, value))

    return keys(json.loads(text))


def _after_question(text: str) -> str:
    return text.rpartition(_QUESTION)[2]


def _form_of(
    one: str, before: str, two: str | None, as_object: bool, tokens: Collection[str]
) -> CallFormat | None:  # fmt: skip
    """The form of a call in `one`, the text after a question; `two` is that of two calls, `before` that of a prompt."""
    first = _find(one, _CALLS[0])
    if first is None:
        return None
    start, end, keys, between = first
    same = len(common_prefix(one, before))
    for token in tokens:  # that is not cut
        at = one.find(token, max(0, same - len(token) + 1))
        same = at if 0 <= at < same else same
    lead = one[min(same, start) : start]
    second = _find(two, _CALLS[1]) if two is not None else None
    begun = _find(two, _CALLS[0]) if two is not None else None
    if two is not None and second is not None and begun is not None and begun[1] <= second[0]:
        gap, head = two[begun[1] : second[0]][::-1], lead[::-1]
        lead = common_prefix(gap, head)[::-1]
    mark = None if keys or between is not None else _MARK.match(one, end)
    closing = mark[1] if mark else ""
    return CallFormat(as_object, lead.strip(), keys, between, written=one[min(same, start) :], closing=closing)


def _find(text: str, call: ToolCall) -> tuple[int, int, tuple[str, str] | None, str | None] | None:
    """(start, end, keys, between) of `call` in `text`, as `CallFormat` has them; None if it is not there."""
    arguments = json.loads(call.arguments)
    name_at = text.find(call.name)
    alone: tuple[int, int] | None = None
    for start, value, end in _objects(text):
        named = [key for key, item in value.items() if item == call.name]
        given = [key for key, item in value.items() if item == arguments]
        if named and given:
            return start, end, (named[0], given[0]), None
        if value == arguments and 0 <= name_at < start and alone is None:
            alone = start, end
    if alone is not None:
        return name_at, alone[1], None, text[name_at + len(call.name) : alone[0]]
    value_at = text.find(arguments["probe_key"])
    if name_at < 0 or value_at < 0:
        return None
    return name_at, value_at + len(arguments["probe_key"]), None, None


def _objects(text: str) -> Iterator[tuple[int, dict[str, Any], int]]:
    """Every JSON object in `text`, those inside of others too."""
    for found in re.finditer(r"\{", text):
        try:
            value, end = _DECODER.raw_decode(text, found.start())
        except ValueError:
            continue
        if isinstance(value, dict):
            yield found.start(), value, end


def _end_of(texts: Sequence[str | None], seen: str | None, special: Collection[str], end: str) -> str | None:
    """The token after a turn of calls, the same after one as after two, and not inside; `seen`: with a result after."""
    one = texts[0] or ""
    if seen is not None:  # where the next turn begins
        rest = seen[len(common_prefix(one, seen)) :].lstrip()
        return max((token for token in special if rest.startswith(token)), key=len, default=None)
    found = None
    for text in filter(None, texts):
        tail = _after_question(text).rstrip()
        token = max(
            (token for token in {*special, end} if token.strip() and tail.endswith(token)), key=len, default=None
        )
        begun = tail.rfind(_CALLS[0].name)
        if token is None or tail.count(token, max(begun, 0)) != 1 or found not in (None, token):
            return None
        found = token
    return found


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def _strict(call: Call) -> str:
    """A call as text, in which 1, 1.0 and true differ."""
    return json.dumps(call, sort_keys=True, ensure_ascii=False)


def _parts(call: Call) -> Iterator[Any]:
    """The name of a call, and every key and value in its arguments."""
    yield call[0]
    yield from _values(call[1])


def _values(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _values(item)
    elif isinstance(value, list):
        for item in value:
            yield from _values(item)
    elif value is not None:
        yield value


def _written(value: Any) -> tuple[str, ...]:
    """How a value may be written."""
    if isinstance(value, str):
        return value, json.dumps(value, ensure_ascii=False)[1:-1], repr(value)[1:-1]
    return str(value), json.dumps(value)
