"""A list of turns, as chat dumps and OpenAI's files write it, to messages.

Both spellings, `role` and `content` or `from` and `value`, are taken under either list's name, and the usual names of
the roles. What a turn says besides its text is used (`weight`, `reasoning_content`) or is a fault (`tool_calls`,
`images`): nothing that the assistant says or sees is silently dropped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lmtune.data.types import Label, Message, Role
from lmtune.data.values import RowFault, is_filled, key_problems, kind_of, listed_keys, plain_table, quoted, strings

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_CALLS = "tool calls are not supported yet, and without them the answer is not whole; remove the row"
# What a row or a turn may hold that is not supported: keys, and what to do.
UNSUPPORTED = plain_table(
    (("tool_calls", "tool_call", "function_call", "function_calls"), _CALLS),
    (
        ("tools", "functions", "available_tools"),
        "these would be in the prompt, and tool calls are not supported yet; remove the row, or the key if no tool is "
        "to be used",
    ),
    (
        ("image", "images", "image_url", "image_urls", "video", "videos", "audio", "audios"),
        "only text is trained; remove the row, or the key if the text stands alone",
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
    "ai": "assistant",
}  # fmt: skip
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_TOOL_ROLES = (
    "tool", "function", "ipython", "observation", "function_call", "function_response", "tool_call", "tool_response",
    "tool_result",
)  # fmt: skip
_WEIGHT_KEYS = ("weight", "train", "loss", "include")
_USED = ("role", "from", "content", "value", *REASONING_KEYS, *_WEIGHT_KEYS)
Ending = Literal["answer", "question", "any"]  # which message a list of turns must end with
_TEXT_PARTS = ("text", "input_text", "output_text")  # chat completions, and the two of OpenAI's Responses


@dataclass
class ParsedRow:
    """A row's content, as `Example` has it, and what is odd about it though it is used."""

    messages: tuple[Message, ...] = ()
    text: str | None = None
    rejected: tuple[Message, ...] = ()
    label: Label | None = None
    weight: float = 1.0
    ignored_keys: set[str] = field(default_factory=set)
    warnings: list[str] = field(default_factory=list)


def parse_turns(turns: Any, key: str, ending: Ending = "answer") -> ParsedRow:
    """The messages of the list under `key`; if it is to end with an answer, up to the last one that is trained.

    Raises:
        RowFault: a turn cannot be read, says what would be lost, or stands where it may not.
    """
    if not isinstance(turns, list) or not turns:
        raise RowFault(f"{key} is {kind_of(turns)}; it must be a list of turns")
    parsed = ParsedRow()
    messages = [_message(turn, f"{key}[{index}]", parsed) for index, turn in enumerate(turns)]
    parsed.ignored_keys = {
        f"{key}[].{name}"
        for turn in turns
        for name in turn.keys() - _USED
        if turn[name] is False or is_filled(turn[name])
    }
    _check_order([message.role for message in messages], key, ending)
    parsed.messages = tuple(messages)
    if ending != "answer":
        return parsed
    answers = [index for index, message in enumerate(messages) if message.role == "assistant" and message.trained]
    if not answers:
        raise RowFault(f"every answer in {key} is marked as not trained; remove the row")
    parsed.messages = tuple(messages[: answers[-1] + 1])  # what follows has no influence on what is trained
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
        return parse_turns(turns, key)
    parsed = ParsedRow()
    message = _message(turns[0], key if turns is not value else f"{key}[0]", parsed)
    if message.role != "assistant" or not message.trained:
        raise RowFault(f"{key} holds no answer that is trained; expected a text or turns that end with the assistant")
    parsed.messages = (message,)
    return parsed


def from_transcript(text: Any) -> list[dict[str, str]] | None:
    """The turns of a text of `Human:` and `Assistant:` paragraphs, as HH-RLHF writes them; None for any other."""
    before, *found = _SPEAKER.split(text) if isinstance(text, str) else [""]
    if before.strip() or not found:
        return None
    return [{"role": who, "content": said.strip()} for who, said in zip(found[::2], found[1::2], strict=True)]


def _message(turn: Any, where: str, parsed: ParsedRow) -> Message:
    if not isinstance(turn, dict):
        raise RowFault(f"{where} is {kind_of(turn)}; it must be an object with role and content (or from and value)")
    role_key = "role" if "role" in turn else "from"
    content_key = "content" if "content" in turn else "value"
    if role_key not in turn or content_key not in turn:
        raise RowFault(
            f"{where} has the keys {listed_keys(turn)}; a turn is an object with role and content (or from and value)"
        )
    for one, other in (("role", "from"), ("content", "value")):
        if one in turn and other in turn and turn[one] != turn[other]:
            raise RowFault(f"{where} has both {one} and {other}, which differ; keep one")
    if problems := key_problems(turn, _USED, UNSUPPORTED, prefix=f"{where}."):
        raise RowFault("; ".join(problems))
    role = _role(turn, role_key, where)
    trained = _is_trained(turn, where, role, parsed)
    content = {content_key: _joined(turn[content_key], f"{where}.{content_key}")}
    filled = content_key if role == "assistant" and trained else None
    (text,) = strings(content, content_key, prefix=f"{where}.", filled=filled)
    return Message(role, _with_reasoning(turn, where, role, text, parsed), trained)


def _role(turn: Mapping[str, Any], key: str, where: str) -> Role:
    (given,) = strings(turn, key, prefix=f"{where}.")
    name = given.strip().lower()
    if name in _TOOL_ROLES:
        raise RowFault(f"{where} is a tool's turn ({key}: {quoted(given)}); {_CALLS}")
    if name not in _ROLES:
        others = ", ".join(other for other in _ROLES if other != _ROLES[other])
        raise RowFault(f"{where}.{key} is {quoted(given)}; known: system, user, assistant (also {others})")
    return _ROLES[name]


def _joined(content: Any, where: str) -> Any:
    """The text of a content that is a list of parts of text, put together as it stands; any other content as it is."""
    if not isinstance(content, list) or not content:
        return content
    texts = []
    for index, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type", "text") not in _TEXT_PARTS:
            kind = f"of type {quoted(str(part['type']))}" if isinstance(part, dict) else kind_of(part)
            raise RowFault(
                f'{where}[{index}] is {kind}; only parts {{"type": "text", "text": "…"}} are trained; remove the row'
            )
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


def _check_order(roles: Sequence[Role], key: str, ending: Ending) -> None:
    """A system message only first; then user and assistant by turns, from a user on."""
    first = 1 if roles[0] == "system" else 0
    for index, role in enumerate(roles[first:], start=first):
        expected = "user" if (index - first) % 2 == 0 else "assistant"
        if role != expected:
            raise RowFault(
                f"{key}[{index}] is from {role}; expected {expected}: a system turn comes first, then user and "
                f"assistant alternate; {'join it with the turn before it, or ' * (index > first)}remove it"
            )
    if ending == "answer" and roles[-1] != "assistant":
        raise RowFault(f"{key} ends with {roles[-1]}; expected an answer, which is what is trained")
    if ending == "question" and roles[-1] != "user":
        raise RowFault(f"{key} ends with {roles[-1]}; expected the user, whom both answers answer")
    if roles[-1] == "system":
        raise RowFault(f"{key} ends with system; expected a turn of the user or the assistant")
