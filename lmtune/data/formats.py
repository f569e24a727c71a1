"""The five formats of a row, told apart by their keys, and turned into messages.

    prompt/completion   {"prompt": "…", "completion": "…"}
    messages            {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    alpaca              {"instruction": "…", "input": "…", "output": "…"}            input may be missing
    sharegpt            {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}
    text                {"text": "…"}

All but text may carry a `system` prompt; prompt/completion and alpaca also a `history` of earlier turns. A row is taken
as it is or refused with a reason; nothing is repaired. What further keys mean stands in `lmtune.data.turns`. The
names are those of the field: OpenAI's chat rows, Stanford Alpaca, ShareGPT dumps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lmtune.data.turns import CALL_FAULT, CALL_KEYS, MEDIA_KEYS, OTHER_THOUGHT_KEYS, REASONING_KEYS, parse_turns
from lmtune.data.types import Message
from lmtune.data.values import RowFault, is_filled, kind_of, listed_keys, nearest, plain, quoted, strings, text_problem

Format = Literal["prompt/completion", "messages", "alpaca", "sharegpt", "text"]

SYSTEM_KEYS = ("system", "system_prompt", "system_message")
HISTORY_KEY = "history"

# In the order of their claim: Alpaca's own files carry a "text" column too, chat dumps often a "prompt".
_KEYS: dict[Format, tuple[tuple[str, ...], tuple[str, ...]]] = {  # required, optional
    "messages": (("messages",), SYSTEM_KEYS),
    "sharegpt": (("conversations",), SYSTEM_KEYS),
    "prompt/completion": (("prompt", "completion"), (*SYSTEM_KEYS, HISTORY_KEY)),
    "alpaca": (("instruction", "output"), ("input", *SYSTEM_KEYS, HISTORY_KEY)),
    "text": (("text",), ()),
}
KNOWN = (
    "a row has the keys prompt and completion, or messages, or instruction and output (alpaca), "
    "or conversations (sharegpt), or text"
)
_TURNS_NAMES = (
    "messages",
    "conversations",
    "message",
    "dialog",
    "dialogs",
    "dialogue",
    "dialogues",
    "conversation",
    "chat",
    "chats",
    "turns",
    "contents",
)
ANSWER_KEYS = ("completion", "answer", "response", "output", "reply", "target", "assistant", "gpt", "bot")
_QUESTION_NAMES = ("prompt", "question", "query", "instruction", "input", "user", "human")


@dataclass
class ParsedRow:
    """A row's content, and what is odd about it though it is used."""

    messages: tuple[Message, ...] = ()
    text: str | None = None
    ignored_keys: frozenset[str] = frozenset()
    warnings: list[str] = field(default_factory=list)


def detect_format(row: Mapping[str, Any]) -> Format:
    """The format whose required keys the row has.

    Raises:
        RowFault: the keys fit none; says which key is missing or probably meant.
    """
    for name, (required, _) in _KEYS.items():
        if all(key in row for key in required):
            return name
    if fault := preference_fault(row):
        raise RowFault(fault)
    if turns := [key for key, value in row.items() if plain(key) in _TURNS_NAMES and isinstance(value, list)]:
        raise RowFault(f"unknown key {quoted(turns[0])}; rename it to messages")
    for required, _ in _KEYS.values():
        found = [key for key in required if key in row]
        if found:
            missing = [key for key in required if key not in row]
            hint = nearest(missing[0], row) or _renaming(row)
            raise RowFault(f"{' and '.join(missing)} missing beside {' and '.join(found)}{hint}")
    if not row:
        raise RowFault(f"the row is empty; {KNOWN}")
    raise RowFault(f"unknown keys {listed_keys(row)}{_renaming(row)}; {KNOWN}")


def _renaming(row: Mapping[str, Any]) -> str:
    """Which keys would make a question and an answer if they were renamed, or nothing."""
    questions, answers = ([key for key in row if plain(key) in names] for names in (_QUESTION_NAMES, ANSWER_KEYS))
    if len(questions) != 1 or len(answers) != 1:
        return ""
    wanted = zip((questions[0], answers[0]), ("prompt", "completion"), strict=True)
    return "; rename " + " and ".join(f"{quoted(old)} to {new}" for old, new in wanted if old != new)


def parse_row(row: Mapping[str, Any], format: Format) -> ParsedRow:
    """The row's messages or text.

    Raises:
        RowFault: a value is missing, of the wrong type, empty where it is trained, roles are out of order, or the row
            says more than would be trained.
    """
    required, optional = _KEYS[format]
    known, parsed = (*required, *optional), ParsedRow()
    problems = []
    try:
        parsed = _PARSERS[format](row)
    except RowFault as fault:
        problems.append(str(fault))
    further = row.keys() - known
    if further:
        problems += further_problems(row, known, format == "text")
    if problems:
        raise RowFault("; ".join(problems))
    if further:
        trained = parsed.text or "\n".join(m.content for m in parsed.messages if m.role == "assistant")
        warned = further_warnings(row, known, trained)
        parsed.warnings += warned.values()
        parsed.ignored_keys |= {key for key in further - warned.keys() if row[key] is False or is_filled(row[key])}
    for message in parsed.messages:
        if message.role == "assistant" and message.trained and not message.content.strip():
            parsed.warnings.append("an answer holds only white space")
        elif message.role == "user" and not message.content.strip():
            parsed.warnings.append("a question is empty")
    return parsed


def _prompt_completion(row: Mapping[str, Any]) -> ParsedRow:
    if isinstance(row["prompt"], list) and isinstance(row["completion"], list):
        raise RowFault("prompt and completion are lists; write both as one list of turns under messages")
    prompt, completion = strings(row, "prompt", "completion", filled="completion")
    return _one_more_turn(row, prompt, completion)


def _alpaca(row: Mapping[str, Any]) -> ParsedRow:
    instruction, output = strings(row, "instruction", "output", filled="output")
    more = row.get("input")
    if more is not None and more != "":  # exporters write a missing input as null
        (more,) = strings(row, "input")
        instruction = f"{instruction}\n\n{more}"
    return _one_more_turn(row, instruction, output)


def _one_more_turn(row: Mapping[str, Any], question: str, answer: str) -> ParsedRow:
    turns = (*earlier_turns(row), Message("user", question), Message("assistant", answer))
    return ParsedRow(messages=with_system(row, turns))


def _text(row: Mapping[str, Any]) -> ParsedRow:
    (text,) = strings(row, "text", filled="text")
    if given := [key for key in SYSTEM_KEYS if is_filled(row.get(key))]:
        raise RowFault(f"{given[0]} beside text, which is trained as it stands; write the row as prompt and completion")
    warnings = [] if text.strip() else ["a text holds only white space"]
    return ParsedRow(text=text, warnings=warnings)


def _messages(row: Mapping[str, Any]) -> ParsedRow:
    return _turns(row, "messages")


def _sharegpt(row: Mapping[str, Any]) -> ParsedRow:
    return _turns(row, "conversations")


def _turns(row: Mapping[str, Any], key: str) -> ParsedRow:
    other = row.get("conversations")
    if key == "messages" and is_filled(other) and other != row[key]:
        raise RowFault("messages and conversations differ; keep one of them")
    turns = parse_turns(row[key], key)
    return ParsedRow(with_system(row, turns.messages, key), None, frozenset(turns.ignored_keys), turns.warnings)


_PARSERS: dict[Format, Callable[[Mapping[str, Any]], ParsedRow]] = {
    "prompt/completion": _prompt_completion, "messages": _messages, "alpaca": _alpaca, "sharegpt": _sharegpt,
    "text": _text,
}  # fmt: skip


# --- further keys of a row

PREFERENCE_KEYS = (
    "chosen", "rejected", "preferred_output", "non_preferred_output", "chosen_response", "rejected_response",
)  # fmt: skip
_REFUSED: tuple[tuple[tuple[str, ...], str], ...] = (  # keys, and what would be lost and what to do
    (
        ("tools", "functions", "available_tools", "tool_definitions", "function_definitions"),
        "these would be in the prompt, and tool calls (tool_calls) are not supported yet; remove the row, or the key "
        "if no tool is to be used",
    ),
    (CALL_KEYS, CALL_FAULT),
    (PREFERENCE_KEYS, "preferences are not supported yet; remove the key to train on the row's own answer alone"),
    (
        (*REASONING_KEYS, *OTHER_THOUGHT_KEYS, "complex_cot"),
        "this reasoning would be lost; write it into the answer as <think>…</think> with data.template: thinking",
    ),
    (
        tuple(key for key in MEDIA_KEYS if key not in ("file", "files")),  # of a row, those say where it comes from
        "only text is trained; remove the row, or the key if the text stands alone",
    ),
    (
        ("sys_prompt", "system_instruction", "system_instructions", "developer", "developer_prompt"),
        "if this is the system prompt, name it system; else remove the key",
    ),
    (
        ("chat_history", "conversation_history", "dialogue_history"),
        "earlier turns would be lost; name it history if it is a list of [question, answer] pairs, or write the row as "
        "messages",
    ),
    (("documents",), "these would be lost; write them into the question, or remove the key"),
    ((HISTORY_KEY,), "earlier turns would be lost; write them as turns of the conversation, or remove the key"),
    (("mask_history",), "to train on the last answer only, give each earlier one weight: 0 instead"),
    (
        ("train_on_input", "train_on_inputs", "train_on_prompt"),
        "only answers are trained, never questions; remove the key",
    ),
)
_ADVICE = {plain(key): advice for keys, advice in _REFUSED for key in keys}
_OWN_KEYS = {plain(key): key for key in (*SYSTEM_KEYS, HISTORY_KEY)}
_WEIGHTS = {plain(key) for key in ("weight", "weights", "loss_weight", "sample_weight")}
_SWITCHES = {
    **{plain(key): False for key in ("train", "training", "trainable", "learn", "loss", "should_train", "is_valid")},
    **{plain(key): True for key in ("masked", "is_masked", "skip", "ignore", "exclude")},
}
_LABELS = {plain(key) for key in ("label", "kto_label", "kto_tag")}
_WARNED = {
    plain(key)
    for key in (
        "context", "contexts", "passage", "document", "input", "query", "rationale", "explanation", "analysis",
        "scratchpad", "preamble", "instructions", "label",
    )
}  # fmt: skip
_ANSWERS = {plain(key) for key in (*ANSWER_KEYS, "answers", "responses", "outputs", "targets", "labels", "summary")}


def further_problems(row: Mapping[str, Any], known: tuple[str, ...], is_text: bool) -> list[str]:
    """What in the row's further keys would be lost, each with what to do; `known` are its format's own keys."""
    found = []
    for key in row.keys() - set(known):
        name, value = plain(key), row[key]
        if is_filled(value) and _OWN_KEYS.get(name, key) != key:
            found.append(f"{key} is used only as {_OWN_KEYS[name]}; rename it, or remove the key")
        elif is_filled(value) and name in _ADVICE:
            found.append(f"{key}: {_ADVICE[name]}")
        elif name in _WEIGHTS and value is not None and (isinstance(value, str) or value != 1):
            advice = "remove the row" if value == 0 else "weights of rows are not used yet; set 1 or remove the key"
            found.append(f"{key} is {kind_of(value)}; {advice}")
        elif name in _SWITCHES and value is _SWITCHES[name]:
            found.append(f"{key} is {kind_of(value)}: the row should not be trained; remove it")
        elif name in _LABELS and value is not None and (is_text or value in (0, 1)):
            found.append(
                f"{key} is {kind_of(value)}: labels are not supported yet; remove the row if the answer is a bad one, "
                "else the key"
            )
        elif is_text and _is_lost_answer(name, value, row["text"]):
            found.append(
                f"{key} beside text would not be trained; rename text to prompt and {key} to completion, or remove "
                f"{key}"
            )
    return sorted(found)


def _is_lost_answer(name: str, value: object, trained: object) -> bool:
    return name in _ANSWERS and isinstance(value, str) and is_filled(value) and value.strip() not in str(trained)


def further_warnings(row: Mapping[str, Any], known: tuple[str, ...], trained: str) -> dict[str, str]:
    """What may be lost with keys that are not used, by key; `trained` is the row's text or answers."""
    return {
        key: f"{key} is neither in the question nor trained; write it into one of them if it belongs there"
        for key in row
        if key not in known and is_filled(row[key])
        if plain(key) in _WARNED or _is_lost_answer(plain(key), row[key], trained)
    }


def system_prompt(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """The row's own system prompt as a message, or none.

    Raises:
        RowFault: it is not text, or given twice.
    """
    given = [key for key in SYSTEM_KEYS if is_filled(row.get(key))]
    if problems := [f"{key} {problem}" for key in given if (problem := text_problem(row[key]))]:
        raise RowFault("; ".join(problems))
    if len({row[key] for key in given}) > 1:
        raise RowFault(f"{' and '.join(given)} differ; keep one")
    return tuple(Message("system", row[key]) for key in given[:1])


def with_system(row: Mapping[str, Any], messages: tuple[Message, ...], key: str = "") -> tuple[Message, ...]:
    """`messages` with the row's own system prompt first.

    Raises:
        RowFault: they begin with another one.
    """
    system = system_prompt(row)
    if not system or messages[0].role != "system":
        return (*system, *messages)
    if messages[0].content != system[0].content:
        named = next(name for name in SYSTEM_KEYS if is_filled(row.get(name)))
        raise RowFault(f"{named} differs from the system message in {key}[0]; keep one")
    return messages


def earlier_turns(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """The turns in `history`, a list of [question, answer] pairs, as LLaMA-Factory writes them; all are trained.

    Raises:
        RowFault: it is not such a list.
    """
    history = row.get(HISTORY_KEY)
    if not is_filled(history):
        return ()
    messages: list[Message] = []
    for index, pair in enumerate(history if isinstance(history, list) else [None]):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowFault(f"{HISTORY_KEY} must be a list of [question, answer] pairs; or write the row as messages")
        named = {"[0]": pair[0], "[1]": pair[1]}
        question, answer = strings(named, "[0]", "[1]", prefix=f"{HISTORY_KEY}[{index}]", filled="[1]")
        messages += [Message("user", question), Message("assistant", answer)]
    return tuple(messages)


def preference_fault(row: Mapping[str, Any]) -> str | None:
    """What is said of a row that is a preference pair and nothing else."""
    pair = [key for key in PREFERENCE_KEYS if key in row]
    if len(pair) < 2:
        return None
    return (
        f"the row is a preference ({listed_keys(pair)}), which is not supported yet; to train on the better answer "
        "alone, write it as prompt and completion"
    )
