"""A list of turns, as chat dumps and OpenAI's files write it, to messages.

Both spellings, `role` and `content` or `from` and `value`, are taken under either list's name, and the usual names of
the roles. What a turn says besides its text is used (`weight`, `reasoning_content`) or is a fault (`tool_calls`,
`image_url`): nothing that the assistant says or sees is silently dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmtune.data.types import Message, Role
from lmtune.data.values import RowFault, is_filled, kind_of, listed_keys, plain, quoted, strings, text_problem

SPELLINGS = {"messages": ("role", "content"), "conversations": ("from", "value")}
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
CALL_KEYS = ("tool_calls", "function_call", "tool_call", "function_calls")
CALL_FAULT = "tool calls are not supported yet, and without them the answer is not whole; remove the row"
MEDIA_KEYS = (
    "image", "images", "image_url", "image_urls", "video", "videos", "audio", "audios", "file", "files", "attachments",
    "media", "img", "imgs",
)  # fmt: skip
_ROLES: dict[str, Role] = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "ai": "assistant",
}  # fmt: skip
_TOOL_ROLES = (
    "tool", "function", "ipython", "observation", "function_call", "function_response", "tool_call", "tool_response",
    "tool_result",
)  # fmt: skip
_LEARN_KEYS = (
    "weight", "train", "training", "trainable", "learn", "loss", "loss_weight", "loss_scale", "should_train",
    "do_train", "is_train", "train_on_turn", "compute_loss", "supervised",
)  # fmt: skip
_MASK_KEYS = ("mask", "masked", "is_masked", "no_train", "skip", "ignore", "exclude")  # these say what is not trained
_UNCLEAR_KEYS = (  # these may say so too, each program in its own way
    "loss_mask", "weights", "train_detail", "training_detail", "train_details",
)  # fmt: skip
_OFF_KEYS = ("include", "label")  # these where they are false
OTHER_THOUGHT_KEYS = (
    "reasoning_details", "reasoning_text", "thinking_blocks", "thinking_content", "think", "thought", "thoughts", "cot",
    "chain_of_thought", "thought_process",
)  # fmt: skip
_LOST_THOUGHTS = {*OTHER_THOUGHT_KEYS, "rationale", "analysis", "scratchpad"}  # of an answer; a row's may be its input
_PLAIN = {"role", "from", "content", "value"}
_TEXT_PARTS = ("text", "input_text", "output_text")  # chat completions, and the two of OpenAI's Responses


@dataclass
class Turns:
    """What a list of turns holds."""

    messages: tuple[Message, ...] = ()
    ignored_keys: set[str] = field(default_factory=set)
    warnings: list[str] = field(default_factory=list)


def parse_turns(turns: Any, key: str) -> Turns:
    """The messages of the list under `key`, up to the last answer that is trained.

    Raises:
        RowFault: a turn cannot be read, says what would be lost, or stands where it may not.
    """
    if not isinstance(turns, list) or not turns:
        raise RowFault(f"{key} is {kind_of(turns)}; it must be a list of turns")
    found, messages = Turns(), []
    for index, turn in enumerate(turns):
        where = f"{key}[{index}]"
        if not isinstance(turn, dict):
            raise RowFault(f"{where} is {kind_of(turn)}; it must be an object with {' and '.join(SPELLINGS[key])}")
        messages.append(_message(turn, where, SPELLINGS[key], found))
        if unused := turn.keys() - _USED:
            found.ignored_keys |= {f"{key}[].{name}" for name in unused if turn[name] is False or is_filled(turn[name])}
    check_order([message.role for message in messages], key)
    answers = [index for index, message in enumerate(messages) if message.role == "assistant" and message.trained]
    if not answers:
        raise RowFault(f"every answer in {key} is marked as not trained; remove the row")
    found.messages = tuple(messages[: answers[-1] + 1])  # what follows has no influence on what is trained
    return found


_USED = {*_PLAIN, *REASONING_KEYS, *_LEARN_KEYS, *_MASK_KEYS}
_LOST = {plain(key): "only text is trained; remove the row, or {key} if the text stands alone" for key in MEDIA_KEYS}
_LOST |= {plain(key): CALL_FAULT for key in (*CALL_KEYS, "tools", "functions")}
_LOST |= {
    plain(key): "this reasoning would be lost; write it into the answer as <think>…</think>" for key in _LOST_THOUGHTS
}
_LOST |= {
    plain(key): "this would be lost; write it into the text, or remove {key}"
    for key in ("context", "contexts", "document", "documents")
}
_LOST["refusal"] = "this would not be trained; write what the assistant says as its content"
_THOUGHTS = {plain(key) for key in _LOST_THOUGHTS}
_UNCLEAR, _OFF = {plain(key) for key in _UNCLEAR_KEYS}, {plain(key) for key in _OFF_KEYS}
_OWN_SPELLING = {plain(key): key for key in _USED}


def _message(turn: Mapping[str, Any], where: str, spelling: tuple[str, str], found: Turns) -> Message:
    further = turn.keys() - _PLAIN  # most turns have none
    if further:
        _check_further(turn, where)
    role = _role(turn, where, spelling)
    trained = not further or _is_trained(turn, where, role, found)
    content_key = _spelt(turn, where, ("content", "value"), spelling[1])
    content = _text_of(turn[content_key], f"{where}.{content_key}")
    filled = content_key if role == "assistant" and trained else None
    (content,) = strings({content_key: content}, content_key, prefix=f"{where}.", filled=filled)
    if further:
        content = _with_reasoning(turn, where, role, content, found)
    return Message(role, content, trained or role != "assistant")


def _check_further(turn: Mapping[str, Any], where: str) -> None:
    """Raise a `RowFault` for what the turn says besides its text, and would not be trained."""
    thinks = any(is_filled(turn.get(key)) for key in REASONING_KEYS)  # of which others are a copy
    for key in turn.keys() - _USED:
        name, value = plain(key), turn[key]
        if name in _OWN_SPELLING and (value is False or value == 0 or is_filled(value)):
            raise RowFault(f"{where}.{key} is used only as {_OWN_SPELLING[name]}; rename it, or remove the key")
        if is_filled(value) and name in _LOST and not (thinks and name in _THOUGHTS):
            raise RowFault(f"{where}.{key}: {_LOST[name].format(key=key)}")
        if (name in _UNCLEAR and value is not None) or (name in _OFF and value in (False, 0)):
            raise RowFault(
                f"{where}.{key} is {kind_of(value)}; whether a turn is trained is said by weight: 0 or 1, so use that, "
                "or remove the key"
            )


def _spelt(turn: Mapping[str, Any], where: str, names: tuple[str, str], usual: str) -> str:
    """Which of two names a turn uses for the same thing.

    Raises:
        RowFault: neither, or both with different values.
    """
    there = [name for name in names if name in turn]
    if len(there) == 2 and turn[names[0]] != turn[names[1]]:
        raise RowFault(f"{where} has both {' and '.join(names)}, which differ; keep one")
    if not there and not {*SPELLINGS["messages"], *SPELLINGS["conversations"]} & turn.keys():
        one, other = (" and ".join(spelling) for spelling in SPELLINGS.values())
        raise RowFault(f"{where} has the keys {listed_keys(turn)}; a turn is an object with {one} (or {other})")
    text = next((key for key in turn if plain(key) in ("text", "message", "parts", "body")), None)
    if not there and text and usual in ("content", "value"):
        hint = "write the text of its parts as" if text == "parts" else f"rename {quoted(text)} to"
        raise RowFault(f"{where}.{usual} is missing; {hint} {usual}")
    if not there:
        strings(turn, usual, prefix=f"{where}.")
    return there[0]


def _role(turn: Mapping[str, Any], where: str, spelling: tuple[str, str]) -> Role:
    both = "role" in turn and "from" in turn
    same = both and len({_ROLES.get(str(turn[key]).strip().lower()) for key in ("role", "from")}) == 1
    key = "role" if same else _spelt(turn, where, ("role", "from"), spelling[0])
    (name,) = strings(turn, key, prefix=f"{where}.")
    plain = name.strip().lower()
    if plain in _TOOL_ROLES:
        raise RowFault(f"{where} is a tool's turn ({key}: {quoted(name)}); {CALL_FAULT}")
    if plain not in _ROLES:
        raise RowFault(f"{where}.{key} is {quoted(name)}; known: system, user, assistant (also {', '.join(_OTHERS)})")
    return _ROLES[plain]


_OTHERS = [name for name in _ROLES if name not in ("system", "user", "assistant")]


def _text_of(content: Any, where: str) -> Any:
    """The text of a content that is a list of parts of text, put together as it stands; any other content as it is."""
    if not isinstance(content, list) or not content:
        return content
    texts = []
    for index, part in enumerate(content):
        place = f"{where}[{index}]"
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if kind in _TEXT_PARTS and isinstance(part, dict) and "text" in part:
            if problem := text_problem(part["text"]):
                raise RowFault(f"{place}.text {problem}")
            for key in part.keys() - {"type", "text"}:
                if plain(key) in _OWN_SPELLING or plain(key) in _UNCLEAR:
                    raise RowFault(f"{place}.{key}: a part has no weight of its own; give it to the whole turn")
            texts.append(part["text"])
        elif isinstance(part, dict) and kind not in _TEXT_PARTS:
            advice = "write it as <think>…</think> in the text" if kind in REASONING_KEYS else "remove the row"
            raise RowFault(f"{place} is of type {quoted(str(kind))}; only parts of text are trained; {advice}")
        else:
            raise RowFault(
                f'{place} is {kind_of(part)}; a part of text is an object like {{"type": "text", "text": "…"}}'
            )
    return "".join(texts)


def _is_trained(turn: Mapping[str, Any], where: str, role: Role, found: Turns) -> bool:
    """Whether the turn is trained, as `weight` (OpenAI) and its relatives say; questions never are."""
    trained = True
    for key in (*_LEARN_KEYS, *_MASK_KEYS):
        value = turn.get(key)
        if value is None:
            continue
        if isinstance(value, str) or value not in (0, 1):
            raise RowFault(f"{where}.{key} is {kind_of(value)}; it must be 0 or 1 (false or true), trained or not")
        asked = bool(value) != (key in _MASK_KEYS)
        trained &= asked
        if role != "assistant" and asked and value is True:
            raise RowFault(f"{where}.{key} is true, but only the assistant's turns are trained; remove {key} there")
        if role != "assistant" and asked and key not in _MASK_KEYS:
            found.warnings.append(
                f"{key} {value} on a turn of {role} changes nothing: only the assistant's are trained"
            )
    return trained


def _with_reasoning(turn: Mapping[str, Any], where: str, role: Role, content: str, found: Turns) -> str:
    """`content`, with the reasoning that stands in a field of its own before it as <think>…</think>.

    A template that takes reasoning in a field gets it back from there, see `lmtune.data.templates`.
    """
    thoughts: dict[str, str] = {}  # text -> key
    for key in REASONING_KEYS:
        if not is_filled(turn.get(key)):
            continue
        if problem := text_problem(turn[key]):
            raise RowFault(f"{where}.{key} {problem}")
        thoughts.setdefault(turn[key].strip("\n"), key)
    if not thoughts:
        return content
    (thought, key), *others = thoughts.items()
    if others:
        raise RowFault(f"{where}.{key} and .{others[0][1]} differ; keep one")
    if role != "assistant":
        raise RowFault(f"{where}.{key} stands on a turn of {role}; only answers hold reasoning, remove it")
    if "<think>" in content or "</think>" in content or "</think>" in thought:
        raise RowFault(f"{where} holds reasoning both in {key} and as <think>…</think>; keep one")
    found.warnings.append(
        f"{key} is trained before the answer as <think>…</think>; data.template: thinking is for models that think"
    )
    return f"<think>\n{thought}\n</think>\n\n{content}"


def check_order(roles: Sequence[Role], key: str) -> None:
    """A system message only first; then user and assistant by turns, from a user to an assistant.

    Raises:
        RowFault: with the index where the order breaks, and what to do.
    """
    first = 1 if roles[0] == "system" else 0
    for index, role in enumerate(roles[first:], start=first):
        wanted = "user" if (index - first) % 2 == 0 else "assistant"
        if role == "system":
            raise RowFault(f"{key}[{index}] is a system message; it may only stand first")
        if role != wanted and index == first:
            raise RowFault(
                f"{key}[{index}] is from assistant where user's turn is: a conversation begins with a question; remove "
                "this turn, or write the question before it"
            )
        if role != wanted:
            raise RowFault(
                f"{key}[{index}] is from {role} where {wanted}'s turn is; user and assistant alternate: join it with "
                f"the turn before it, or write the {wanted}'s turn between"
            )
    if roles[-1] != "assistant":
        raise RowFault(
            f"{key} ends with {roles[-1]}; the last turn must be the assistant's, which is what is trained: add it, or "
            "remove the turns after the last answer"
        )
