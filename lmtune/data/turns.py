"""A list of turns, as chat dumps and OpenAI's files write it, to messages.

Both spellings, `role` and `content` or `from` and `value`, are taken under either list's name, and the usual names of
the roles. What a turn says besides its text is used (`weight`, `reasoning_content`, `tool_calls`) or is a fault
(`images`): nothing that the assistant says or sees is silently dropped. Turns in an order that no template takes have
one outcome each, which is counted: those of one role in a row are joined, what stands before the first question or
after the last answer that is trained is cut off.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lmtune.data.replies import split_reply
from lmtune.data.tools import CALL_KEYS, calls_of, read_calls
from lmtune.data.types import Label, Message, Role, ToolCall
from lmtune.data.values import RowFault, is_filled, key_problems, kind_of, listed_keys, plain_table, quoted, strings

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# What a row or a turn may hold that is not supported: keys, and what to do.
UNSUPPORTED = plain_table(
    (
        ("tool_calls", "tool_call", "function_call", "function_calls"),
        "calls would be lost; write the row as messages, with tool_calls on a turn of the assistant",
    ),
    (
        ("tools", "functions", "available_tools"),
        "these would be lost; write the row as messages, with tools beside them, or remove the key if no tool is used",
    ),
    (
        ("image", "images", "image_url", "image_urls", "video", "videos", "audio", "audios"),
        "only text is read; remove the key if the text stands alone",
    ),
    (
        ("reasoning_details", "thinking_blocks", "thought", "thoughts", "cot", "complex_cot", "chain_of_thought"),
        "this reasoning would be lost; write it into the answer as <think>…</think> with data.template: thinking",
    ),
    (
        ("mask", "masked", "is_masked", "no_train", "skip", "ignore", "exclude", "loss_mask"),
        "this seems to say that the turn is not trained; write weight: 0 on an answer that is not",
    ),
    (("documents",), "these would be lost; write them into the question, or remove the key"),
)
_ROLES: dict[str, Role] = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "ai": "assistant", "function_call": "assistant", "tool_call": "assistant",
    "tool": "tool", "function": "tool", "ipython": "tool", "observation": "tool", "function_response": "tool",
    "tool_response": "tool", "tool_result": "tool",
}  # fmt: skip
_CALLING = ("function_call", "tool_call")  # roles whose text is a call
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_WEIGHT_KEYS = ("weight", "train", "loss", "include")
_USED = ("role", "from", "content", "value", *REASONING_KEYS, *_WEIGHT_KEYS, *CALL_KEYS)
_OF_RESULTS = ("tool_call_id", "name")  # further keys of a tool's turn
_BETWEEN = "\n\n"  # two turns that are joined
# What a list of turns must end with: an answer that is trained (what follows is cut), an answer, a question, or any.
Ending = Literal["trained", "answer", "question", "any"]
_TEXT_PARTS = ("text", "input_text", "output_text")  # chat completions, and the two of OpenAI's Responses


@dataclass
class ParsedRow:
    """A row's content, as `Example` has it, and what is odd about it though it is used."""

    messages: tuple[Message, ...] = ()
    text: str | None = None
    rejected: tuple[Message, ...] = ()
    label: Label | None = None
    weight: float = 1.0
    tools: tuple[str, ...] = ()
    origin: int | None = None
    ignored_keys: set[str] = field(default_factory=set)
    warnings: list[str] = field(default_factory=list)
    outcomes: set[str] = field(default_factory=set)


def parse_turns(turns: Any, key: str, ending: Ending = "trained") -> ParsedRow:
    """The messages of the list under `key`.

    Raises:
        RowFault: a turn cannot be read, says what would be lost, or stands where it may not.
    """
    if not isinstance(turns, list) or not turns:
        raise RowFault(f"{key} is {kind_of(turns)}; it must be a list of turns")
    parsed = ParsedRow()
    is_trained = ending != "question"
    messages = [_message(turn, f"{key}[{index}]", parsed, is_trained) for index, turn in enumerate(turns)]
    for turn, message in zip(turns, messages, strict=True):
        used = (*_USED, *_OF_RESULTS) if message.role == "tool" else _USED
        unused = [name for name in turn if name not in used and (turn[name] is False or is_filled(turn[name]))]
        parsed.ignored_keys |= {f"{key}[].{name}" for name in unused}
    messages = _joined(_with_results(messages, key), key, parsed)
    messages = _begun(_in_order_of_calls(messages, parsed), key, parsed)
    parsed.messages = tuple(_ended(messages, key, ending, parsed))
    if any(turn.role == "system" for turn in parsed.messages[1:]):
        parsed.outcomes.add("later_system")
    if any(not turn.trained for turn in parsed.messages):
        parsed.outcomes.add("not_trained")
    return parsed


def parse_answer(value: Any, key: str) -> ParsedRow:
    """The answer under `key`: a text, a turn of the assistant, or a list of turns, which may begin with the prompt.

    Raises:
        RowFault: it is something else, or as `parse_turns`.
    """
    if isinstance(value, str):
        return ParsedRow((Message("assistant", strings({key: value}, key, filled=key)[0]),))
    turns = value if isinstance(value, list) else [value]
    if len(turns) != 1:
        return parse_turns(turns, key, "answer")
    parsed = ParsedRow()
    message = _message(turns[0], key if turns is not value else f"{key}[0]", parsed)
    if message.role != "assistant" or not message.trained:
        raise RowFault(f"{key} holds no answer that is trained; expected a text or turns that end with the assistant")
    parsed.messages = tuple(_with_results([message], key))
    return parsed


def is_answer(turn: Any) -> bool:
    """Whether the assistant says a turn of JSON."""
    role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    return isinstance(role, str) and _ROLES.get(role.strip().lower()) == "assistant"


def from_transcript(text: Any) -> list[dict[str, str]] | None:
    """The turns of a text of `Human:` and `Assistant:` paragraphs, as HH-RLHF writes them; None for any other."""
    before, *found = _SPEAKER.split(text) if isinstance(text, str) else [""]
    if before.strip() or not found:
        return None
    return [{"role": who, "content": said.strip()} for who, said in zip(found[::2], found[1::2], strict=True)]


def _message(turn: Any, where: str, parsed: ParsedRow, is_trained: bool = True) -> Message:
    if not isinstance(turn, dict):
        raise RowFault(f"{where} is {kind_of(turn)}; it must be an object with role and content (or from and value)")
    role_key = "role" if "role" in turn else "from"
    content_key = "content" if "content" in turn else "value"
    if role_key not in turn:
        raise _no_turn(turn, where)
    for one, other in (("role", "from"), ("content", "value")):
        if one in turn and other in turn and turn[one] != turn[other]:
            raise RowFault(f"{where} has both {one} and {other}, which differ; keep one")
    role, calling = _role(turn, role_key, where, parsed)
    used = (*_USED, *(_OF_RESULTS if role == "tool" else ()))
    if problems := key_problems(turn, used, UNSUPPORTED, prefix=f"{where}."):
        raise RowFault("; ".join(problems))
    trained = _is_trained(turn, where, role, parsed)
    calls = read_calls(turn, where, parsed.warnings)
    if calls and role != "assistant":
        raise RowFault(f"{where} is from {role} and holds calls; only the assistant calls tools")
    if calling:
        calls, text = (*calls, *calls_of(turn.get(content_key), f"{where}.{content_key}", parsed.warnings)), ""
    elif calls and turn.get(content_key) is None:
        text = ""
    else:
        if content_key not in turn:
            raise _no_turn(turn, where)
        content = {content_key: _text_of(turn[content_key], f"{where}.{content_key}")}
        filled = content_key if role == "assistant" and trained and is_trained and not calls else None
        (text,) = strings(content, content_key, prefix=f"{where}.", filled=filled)
    content_of = _with_reasoning(turn, where, role, text, parsed)
    if role != "tool":
        return Message(role, content_of, trained, calls)
    number, name = (turn.get(key) or "" for key in _OF_RESULTS)
    strings({"tool_call_id": number, "name": name}, *_OF_RESULTS, prefix=f"{where}.")
    return Message(role, content_of, tool_call_id=number or None, name=name or None)


def _no_turn(turn: Mapping[str, Any], where: str) -> RowFault:
    held = f"has the keys {listed_keys(turn)}" if turn else "is empty"
    return RowFault(f"{where} {held}; a turn is an object with role and content (or from and value)")


def _role(turn: Mapping[str, Any], key: str, where: str, parsed: ParsedRow) -> tuple[Role, bool]:
    """Who speaks, and whether the turn's text is a call."""
    (given,) = strings(turn, key, prefix=f"{where}.")
    name = given.strip().lower()
    if name not in _ROLES:
        others = ", ".join(other for other in _ROLES if other != _ROLES[other])
        raise RowFault(f"{where}.{key} is {quoted(given)}; expected system, user, assistant or tool", f"also {others}")
    if name == "developer":
        parsed.outcomes.add("developer_as_system")
    return _ROLES[name], name in _CALLING


def _text_of(content: Any, where: str) -> Any:
    """The text of a content that is a list of parts of text, put together as it stands; any other content as it is."""
    if not isinstance(content, list) or not content:
        return content
    texts = []
    for index, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type", "text") not in _TEXT_PARTS:
            kind = f"of type {quoted(str(part['type']))}" if isinstance(part, dict) else kind_of(part)
            reason = f'{where}[{index}] is {kind}; expected parts {{"type": "text", "text": "…"}}'
            raise RowFault(reason, "remove the row")
        texts += strings(part, "text", prefix=f"{where}[{index}].")
    return "".join(texts)


def _is_trained(turn: Mapping[str, Any], where: str, role: Role, parsed: ParsedRow) -> bool:
    """Whether an answer is trained, as `weight` (OpenAI) and its relatives say."""
    trained = True
    for key in _WEIGHT_KEYS:
        value = turn.get(key)
        if value is None:
            continue
        if isinstance(value, str) or value not in (0, 1):
            raise RowFault(f"{where}.{key} is {kind_of(value)}; it must be 0 or 1 (false or true), trained or not")
        trained &= bool(value)
        if role != "assistant" and value:
            parsed.warnings.append(f"{key} on a turn of {role} changes nothing: only the assistant's are trained")
    return trained or role != "assistant"


def _with_reasoning(turn: Mapping[str, Any], where: str, role: Role, content: str, parsed: ParsedRow) -> str:
    """`content`, with the reasoning that stands in a field of its own before it as <think>…</think>.

    A template that takes reasoning in a field gets it back from there, see `lmtune.data.templates`.
    """
    key = next((key for key in REASONING_KEYS if is_filled(turn.get(key))), None)
    if key is None:
        return content
    thought = strings(turn, key, prefix=f"{where}.")[0].strip("\n")
    if role != "assistant" or "<think>" in content or "</think>" in content + thought:
        raise RowFault(f"{where}.{key}: reasoning stands on an answer, in {key} or as <think>…</think>; keep one")
    parsed.warnings.append(
        f"{key} is trained before the answer as <think>…</think>; data.template: thinking is for models that think"
    )
    return f"<think>\n{thought}\n</think>\n\n{content}"


def _with_results(messages: Sequence[Message], key: str) -> list[Message]:
    """`messages` in which each call has an id, and each result that of the call before it that it answers."""
    found: list[Message] = []
    number, open_calls = 0, list[ToolCall]()
    for index, message in enumerate(messages):
        if message.tool_calls:
            calls = []
            for call in message.tool_calls:
                number += 1
                calls.append(call if call.id else replace(call, id=f"call{number:05d}"))
            message = replace(message, tool_calls=tuple(calls))
            open_calls = [*(open_calls if found and found[-1].role == "assistant" else []), *calls]
        elif message.role == "tool":
            message = _matched(message, open_calls, f"{key}[{index}]")
            open_calls = [call for call in open_calls if call.id != message.tool_call_id]
        else:
            if open_calls and found[-1].role == "tool":
                raise RowFault(
                    f"{key}[{index}] stands before the result of a call ({quoted(open_calls[0].name)}); add a tool "
                    "turn for each call"
                )
            open_calls = []
        found.append(message)
    return found


def _in_order_of_calls(messages: Sequence[Message], parsed: ParsedRow) -> list[Message]:
    """`messages` in which results stand in the order of their calls: most templates write no ids, so that decides."""
    found = list(messages)
    for start, message in enumerate(messages):
        end = start + 1
        while message.tool_calls and end < len(found) and found[end].role == "tool":
            end += 1
        number = {call.id: place for place, call in enumerate(message.tool_calls)}
        results = sorted(found[start + 1 : end], key=lambda one: number.get(one.tool_call_id or "", len(number)))
        if results != found[start + 1 : end]:
            found[start + 1 : end] = results
            parsed.outcomes.add("ordered_results")
    return found


def _matched(result: Message, open_calls: Sequence[ToolCall], where: str) -> Message:
    """`result` with the id and the name of the first of `open_calls` that fits what it says of them."""
    for call in open_calls:
        if result.tool_call_id in (None, call.id) and (result.tool_call_id or result.name in (None, call.name)):
            return replace(result, tool_call_id=call.id, name=call.name)
    which = result.tool_call_id or result.name
    raise RowFault(
        f"{where} is the result of a call{f' ({quoted(which)})' if which else ''} that is not in the turn of the "
        "assistant before it; a result names its call by tool_call_id and follows it"
    )


def _joined(messages: Sequence[Message], key: str, parsed: ParsedRow) -> list[Message]:
    """`messages` in which those of one role in a row are one; results of several calls stay apart."""
    found: list[Message] = []
    for index, message in enumerate(messages):
        if not found or found[-1].role != message.role or message.role == "tool":
            found.append(message)
            continue
        before, where = found[-1], f"{key}[{index}]"
        if before.trained != message.trained:
            raise RowFault(f"{where} follows a turn of the assistant, and one of the two is not trained; join them")
        if before.tool_calls and message.content:
            raise RowFault(f"{where} follows calls without their results; add a tool turn for each call")
        if message.role == "assistant" and before.content and split_reply(message.content)[0] is not None:
            raise RowFault(f"{where} reasons after the answer before it, which one turn cannot; join the two")
        content = _BETWEEN.join(filter(None, (before.content, message.content)))
        found[-1] = replace(before, content=content, tool_calls=(*before.tool_calls, *message.tool_calls))
        parsed.outcomes.add("joined")
    return found


def _begun(messages: list[Message], key: str, parsed: ParsedRow) -> list[Message]:
    """`messages` from the first of the user on, with what the system says before it."""
    first = next((index for index, message in enumerate(messages) if message.role == "user"), len(messages))
    if first == len(messages):
        raise RowFault(f"{key} holds no turn of the user; expected a question before the answer")
    system = [message for message in messages[:first] if message.role == "system"]
    if len(system) == first:
        return messages
    parsed.outcomes.add("cut_beginning")
    return _joined([*system, *messages[first:]], key, parsed)


def _ended(messages: list[Message], key: str, ending: Ending, parsed: ParsedRow) -> list[Message]:
    """`messages` with the ending that is asked for."""
    last = messages[-1].role
    if ending == "trained":
        answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
        if not answers:
            raise RowFault(f"{key} holds no answer, which is what is trained; add one, or remove the row")
        trained = [index for index in answers if messages[index].trained]
        if not trained:
            raise RowFault(f"every answer in {key} is marked as not trained; remove the row")
        if trained[-1] + 1 < len(messages):
            parsed.outcomes.add("cut_end")
        return messages[: trained[-1] + 1]  # what follows has no influence on what is trained
    if ending == "answer" and last != "assistant":
        raise RowFault(f"{key} ends with {last}; expected an answer, which is what is trained")
    if ending == "question" and last not in ("user", "tool"):
        raise RowFault(f"{key} ends with {last}; expected a turn of the user or of a tool")
    if last == "system":
        raise RowFault(f"{key} ends with system; expected a turn of the user or the assistant")
    return messages
