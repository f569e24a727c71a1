"""What a row's further keys mean, those that its format does not name: used, refused, warned of, or only named.

A key that says what is learned or seen (tools, images, a preference, a weight) is a fault where it is not used, because
the row without it teaches something else. A key that may say so (`context`) is a warning. Numbers, sources and the like
stay one quiet line a file. A key is known in any spelling (`systemPrompt`, `Weight`), and used in its own only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmtune.data.turns import CALL_FAULT, CALL_KEYS, MEDIA_KEYS, OTHER_THOUGHT_KEYS, REASONING_KEYS
from lmtune.data.types import Message
from lmtune.data.values import RowFault, is_filled, kind_of, listed_keys, plain, strings, text_problem

SYSTEM_KEYS = ("system", "system_prompt", "system_message")
HISTORY_KEY = "history"
PREFERENCE_KEYS = (
    "chosen", "rejected", "preferred_output", "non_preferred_output", "chosen_response", "rejected_response",
)  # fmt: skip
_REFUSED: tuple[tuple[tuple[str, ...], str], ...] = (  # keys, and what would be lost and what to do
    (
        ("tools", "functions", "available_tools", "tool_definitions", "function_definitions"),
        "these would be in the prompt, and tool calls (tool_calls) are not learned yet; remove the row, or the key if "
        "no tool is to be used",
    ),
    (CALL_KEYS, CALL_FAULT),
    (PREFERENCE_KEYS, "preferences are not learned yet; remove the key to learn the row's own answer alone"),
    (
        (*REASONING_KEYS, *OTHER_THOUGHT_KEYS, "complex_cot"),
        "this reasoning would be lost; write it into the answer as <think>…</think> with data.template: thinking",
    ),
    (
        tuple(key for key in MEDIA_KEYS if key not in ("file", "files")),  # of a row, those say where it comes from
        "only text is learned; remove the row, or the key if the text stands alone",
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
    (("mask_history",), "to learn the last answer only, give each earlier one weight: 0 instead"),
    (
        ("train_on_input", "train_on_inputs", "train_on_prompt"),
        "only answers are learned, never questions; remove the key",
    ),
)
_ADVICE = {plain(key): advice for keys, advice in _REFUSED for key in keys}
_OWN_SPELLING = {plain(key): key for key in (*SYSTEM_KEYS, HISTORY_KEY)}
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
ANSWER_KEYS = ("completion", "answer", "response", "output", "reply", "target", "assistant", "gpt", "bot")
_ANSWERS = {plain(key) for key in (*ANSWER_KEYS, "answers", "responses", "outputs", "targets", "labels", "summary")}


def further_problems(row: Mapping[str, Any], known: tuple[str, ...], is_text: bool) -> list[str]:
    """What in the row's further keys would be lost, each with what to do; `known` are its format's own keys."""
    found = []
    for key in row.keys() - set(known):
        name, value = plain(key), row[key]
        if is_filled(value) and _OWN_SPELLING.get(name, key) != key:
            found.append(f"{key} is used only as {_OWN_SPELLING[name]}; rename it, or remove the key")
        elif is_filled(value) and name in _ADVICE:
            found.append(f"{key}: {_ADVICE[name]}")
        elif name in _WEIGHTS and value is not None and (isinstance(value, str) or value != 1):
            advice = "remove the row" if value == 0 else "weights of rows are not used yet; set 1 or remove the key"
            found.append(f"{key} is {kind_of(value)}; {advice}")
        elif name in _SWITCHES and value is _SWITCHES[name]:
            found.append(f"{key} is {kind_of(value)}: the row should not be learned; remove it")
        elif name in _LABELS and value is not None and (is_text or value in (0, 1)):  # a truth, or a class of a text
            found.append(
                f"{key} is {kind_of(value)}: labels are not learned yet; remove the row if the answer is a bad one, "
                "else the key"
            )
        elif is_text and _is_lost_answer(name, value, row["text"]):
            found.append(
                f"{key} beside text would not be learned; rename text to prompt and {key} to completion, or remove "
                f"{key}"
            )
    return sorted(found)


def _is_lost_answer(name: str, value: object, learned: object) -> bool:
    return name in _ANSWERS and isinstance(value, str) and is_filled(value) and value.strip() not in str(learned)


def further_warnings(row: Mapping[str, Any], known: tuple[str, ...], learned: str) -> dict[str, str]:
    """What may be lost with keys that are not used, by key; `learned` is the row's text or answers."""
    return {
        key: f"{key} is neither in the question nor learned; write it into one of them if it belongs there"
        for key in row
        if key not in known and is_filled(row[key])
        if plain(key) in _WARNED or _is_lost_answer(plain(key), row[key], learned)
    }


def system_prompt(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """The row's own system prompt as a message, or none.

    Raises:
        RowFault: it is no text, or given twice.
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
    """The turns in `history`, a list of [question, answer] pairs, as LLaMA-Factory writes them; all are learned.

    Raises:
        RowFault: it is no such list.
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
        f"the row is a preference ({listed_keys(pair)}), which is not learned yet; to learn the better answer alone, "
        "write it as prompt and completion"
    )
