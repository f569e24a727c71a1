"""The formats of a row, told apart by their keys, and turned into messages.

    an answer: what is trained
    prompt/completion   {"prompt": "…", "completion": "…"}
    messages            {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    alpaca              {"instruction": "…", "input": "…", "output": "…"}            input may be missing
    sharegpt            {"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}
    text                {"text": "…"}

    a pair: a better and a worse answer to one prompt, each a text, a turn, or a conversation that repeats the prompt
    chosen/rejected     {"prompt": "…", "chosen": "…", "rejected": "…"}
    OpenAI preferences  {"input": {"messages": […]}, "preferred_output": […], "non_preferred_output": […]}

    a judged answer: good or not
    prompt/completion/label   {"prompt": "…", "completion": "…", "label": true}
    judged messages           {"messages": […], "label": true}

    a labelled whole: label is a text, a number or a list of texts
    text/label          {"text": "…", "label": "…"}
    prompt/label        {"prompt": "…", "label": "…"}
    labelled messages   {"messages": […], "label": "…"}

Each may carry a `weight`, all but text a `system` prompt, those with a prompt a `history` of earlier turns. A row is
taken as it is or refused with a reason; nothing is repaired. The names are those of the field: OpenAI's files, TRL's
data sets, Stanford Alpaca, ShareGPT dumps. A further format is one more entry of `_FORMATS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from lmtune.data.turns import REASONING_KEYS, UNSUPPORTED, ParsedRow, parse_answer, parse_turns
from lmtune.data.types import Label, Message, RowKind
from lmtune.data.values import (
    RowFault,
    is_filled,
    key_problems,
    kind_of,
    listed_keys,
    nearest,
    plain,
    plain_table,
    quoted,
    strings,
)

Format = Literal[
    "prompt/completion", "messages", "alpaca", "sharegpt", "text", "chosen/rejected", "OpenAI preferences",
    "prompt/completion/label", "judged messages", "text/label", "prompt/label", "labelled messages",
]  # fmt: skip
_Row = Mapping[str, Any]


class _Shape(NamedTuple):
    """How a format is known and read.

    Attributes:
        rows: the kind of its rows.
        required, optional: its keys.
        parse: a row's content.
        fits: whether a row that has the keys is of this format, where nothing else says it.
    """

    rows: RowKind
    required: tuple[str, ...]
    optional: tuple[str, ...]
    parse: Callable[[_Row], ParsedRow]
    fits: Callable[[_Row], bool] = lambda row: True

    def missing(self, row: _Row) -> list[str]:
        """The required keys that `row` lacks; tables have null where a row of another format has no value."""
        return [key for key in self.required if key not in row or (self.rows != "answer" and row[key] is None)]


_SYSTEM_KEYS = ("system", "system_prompt", "system_message")
_EXPECTED = (
    "a row has the keys prompt and completion, or messages, or instruction and output (alpaca), "
    "or conversations (sharegpt), or text; a pair has prompt, chosen and rejected; a labelled row text and label"
)
# By kind: what such a row is, an objective that takes it, and keys of it.
_KINDS: dict[RowKind, tuple[str, str, str]] = {
    "answer": ("an answer to train on", "sft", "prompt and completion alone"),
    "pair": ("a preference pair", "dpo", "prompt, chosen and rejected"),
    "judged": ("a judged answer", "kto", "prompt, completion and label (true or false)"),
    "labelled": ("a labelled text", "classification", "text and label"),
}
_ANSWER_KEYS = ("completion", "answer", "response", "output", "reply", "target", "assistant", "gpt", "bot")
_QUESTION_KEYS = ("prompt", "question", "query", "instruction", "input", "user", "human")
# Keys that say what would be lost, and what to do. A key that the row's format knows is not looked up.
_REFUSED = UNSUPPORTED | plain_table(
    (
        ("chosen", "rejected", "preferred_output", "non_preferred_output", "chosen_response", "rejected_response"),
        "half of a preference pair; write prompt, chosen and rejected, or to train on the better answer alone prompt "
        "and completion",
    ),
    (
        REASONING_KEYS,
        "this reasoning would be lost; write it into the answer as <think>…</think> with data.template: thinking",
    ),
    (_SYSTEM_KEYS, "this format has no system prompt; write the row as prompt and completion"),
    (("system_instruction", "developer"), "if this is the system prompt, name it system; else remove the key"),
    (
        ("history", "chat_history", "conversation_history"),
        "earlier turns would be lost; write them as turns of messages, or as [question, answer] pairs under history "
        "beside prompt or instruction",
    ),
    (("train_on_input", "train_on_inputs"), "only answers are trained, never questions; remove the key"),
)
_LABELS = {plain(key) for key in ("label", "kto_label", "kto_tag")}
_ANSWERS = {plain(key) for key in (*_ANSWER_KEYS, "answers", "responses", "outputs", "summary")}
_CONTEXT = {
    plain(key) for key in ("context", "passage", "document", "input", "query", "rationale", "explanation", "label")
}


def detect_format(row: _Row, rows: RowKind | None = None) -> Format:
    """The format whose required keys the row has, among those of the kind `rows` if the row's use is known.

    Raises:
        RowFault: the keys fit none; says which key is missing or probably meant, or which objective takes such rows.
    """
    complete = [name for name, shape in _FORMATS.items() if not shape.missing(row)]
    wanted = [name for name in complete if _FORMATS[name].rows == rows and rows != "answer"]
    for name in (*wanted, *(name for name in complete if _FORMATS[name].fits(row))):
        if rows not in (None, (found := _FORMATS[name].rows)):
            (what, objective, _), (wanted_what, _, keys) = _KINDS[found], _KINDS[rows]
            lacking = [shape.missing(row) for shape in _FORMATS.values() if shape.rows == rows != "answer"]
            near = next((hint for missing in lacking if len(missing) == 1 and (hint := nearest(missing[0], row))), "")
            reason = f"the row is {what} ({name}), not {wanted_what}; set objective.kind: {objective}, or write {keys}"
            raise RowFault(reason + near, once=f"kind {found}")
        return name
    if problems := key_problems(row, (), _REFUSED):
        raise RowFault("; ".join(problems))
    shapes = sorted(_FORMATS.values(), key=lambda shape: (shape.rows != (rows or "answer"), len(shape.missing(row))))
    for shape in shapes:
        if found_keys := [key for key in shape.required if key not in (missing := shape.missing(row))]:
            hint = nearest(missing[0], row) or _renaming(row)
            raise RowFault(f"{' and '.join(missing)} missing beside {' and '.join(found_keys)}{hint}")
    what = f"unknown keys {listed_keys(row)}{_renaming(row)}" if row else "the row is empty"
    raise RowFault(f"{what}; {_EXPECTED}")


def kind_of_format(format: Format) -> RowKind:
    """What rows of this format can be used for."""
    return _FORMATS[format].rows


def _renaming(row: _Row) -> str:
    """Which keys would make a row if they were renamed, or nothing."""
    if turns := [key for key, value in row.items() if isinstance(value, list) and value and isinstance(value[0], dict)]:
        return f"; rename {quoted(turns[0])} to messages"
    questions, answers = ([key for key in row if plain(key) in names] for names in (_QUESTION_KEYS, _ANSWER_KEYS))
    if len(questions) != 1 or len(answers) != 1:
        return ""
    wanted = zip((questions[0], answers[0]), ("prompt", "completion"), strict=True)
    return "; rename " + " and ".join(f"{quoted(old)} to {new}" for old, new in wanted if old != new)


def parse_row(row: _Row, format: Format) -> ParsedRow:
    """The row's messages or text.

    Raises:
        RowFault: a value is missing, of the wrong type, empty where it is trained, roles are out of order, or the row
            says more than would be trained.
    """
    shape = _FORMATS[format]
    known = (*shape.required, *shape.optional, "weight")
    further = sorted(row.keys() - known)
    if problems := further and _further_problems(row, shape, known, further):
        raise RowFault("; ".join(problems))
    weight = _weight(row.get("weight"))
    parsed = shape.parse(row)
    parsed.weight = weight
    for key in further:
        if is_filled(row[key]) and (plain(key) in _CONTEXT or _is_other_answer(row, key, known)):
            parsed.warnings.append(f"{key} is neither in the question nor trained; write it into one of them if needed")
        elif row[key] is False or is_filled(row[key]):
            parsed.ignored_keys.add(key)
    for message in (*parsed.messages, *parsed.rejected[-1:]):
        if not message.content.strip() and message.role == "assistant" and message.trained:
            parsed.warnings.append("an answer holds only white space")
        elif not message.content.strip() and message.role == "user":
            parsed.warnings.append("a question is empty")
    return parsed


def _weight(value: Any) -> float:
    """How much a row counts."""
    if value is None:
        return 1.0
    if isinstance(value, (bool, str, list, dict)) or not 0 <= value < math.inf:
        raise RowFault(f"weight is {kind_of(value)}; it must be a number, 0 or more: how much the row counts")
    return float(value)


def _further_problems(row: _Row, shape: _Shape, known: tuple[str, ...], further: list[str]) -> list[str]:
    problems = key_problems(row, known, _REFUSED)
    for key in further:
        if shape.rows == "answer" and plain(key) in _LABELS and row[key] in (0, 1):
            problems.append(
                f"{key} is {kind_of(row[key])}; if it judges the answer, write prompt, completion and label and set "
                "objective.kind: kto, else remove the key"
            )
        elif ("text" in known or shape.rows == "labelled") and _is_other_answer(row, key, known):
            what = (
                "would not be trained; name them prompt and completion"
                if shape.rows == "answer"
                else ("would not be read; write it into text, or both as messages")
            )
            problems.append(f"{key} beside {shape.required[0]} {what}, or remove {key}")
    return problems


def _is_other_answer(row: _Row, key: str, known: tuple[str, ...]) -> bool:
    """Whether `key` holds an answer that stands in none of the row's known values."""
    value = row[key]
    if plain(key) not in _ANSWERS or not isinstance(value, str) or not is_filled(value):
        return False
    return all(value.strip() not in str(row[name]) for name in known if name in row)


def _prompt_completion(row: _Row) -> ParsedRow:
    prompt, completion = strings(row, "prompt", "completion", filled="completion")
    return _with_context(row, Message("user", prompt), Message("assistant", completion))


def _alpaca(row: _Row) -> ParsedRow:
    _, output = strings(row, "instruction", "output", filled="output")
    return _with_context(row, Message("user", _instruction(row)), Message("assistant", output))


def _instruction(row: _Row) -> str:
    names = ("instruction", *(["input"] * (row.get("input") not in (None, ""))))  # exporters write none as null
    return "\n\n".join(strings(row, *names))


def _text(row: _Row) -> ParsedRow:
    (text,) = strings(row, "text", filled="text")
    return ParsedRow(text=text, warnings=[] if text.strip() else ["a text holds only white space"])


def _messages(row: _Row) -> ParsedRow:
    return _with_system(row, parse_turns(row["messages"], "messages"))


def _sharegpt(row: _Row) -> ParsedRow:
    return _with_system(row, parse_turns(row["conversations"], "conversations"))


def _with_context(row: _Row, *turns: Message) -> ParsedRow:
    """`turns` behind those in `history`, a list of [question, answer] pairs, as LLaMA-Factory writes them."""
    history, earlier = row.get("history"), list[Message]()
    for index, pair in enumerate(history if isinstance(history, list) else [history] * is_filled(history)):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowFault("history must be a list of [question, answer] pairs; or write the row as messages")
        named = {"[0]": pair[0], "[1]": pair[1]}
        question, answer = strings(named, "[0]", "[1]", prefix=f"history[{index}]", filled="[1]")
        earlier += [Message("user", question), Message("assistant", answer)]
    return _with_system(row, ParsedRow((*earlier, *turns)))


def _with_system(row: _Row, parsed: ParsedRow) -> ParsedRow:
    """`parsed` with the row's own system prompt first."""
    given = [key for key in _SYSTEM_KEYS if is_filled(row.get(key))]
    own = [message.content for message in parsed.messages[:1] if message.role == "system"]
    prompts = {*own, *strings(row, *given)}
    if len(prompts) > 1:
        raise RowFault(f"{' and '.join([*given, *['the system turn'] * len(own)])} differ; keep one")
    if prompts and not own:
        parsed.messages = (Message("system", prompts.pop()), *parsed.messages)
    return parsed


def _pair(row: _Row) -> ParsedRow:
    """A pair whose answers stand behind the prompt of the row, or as conversations that repeat it."""
    begins = any(isinstance(row[key], list) and len(row[key]) > 1 for key in ("chosen", "rejected"))
    asked = _asked(row, *(("prompt",) if begins else ("prompt", "messages", "conversations", "instruction")))
    parsed = _paired(row, None if begins else asked, "chosen", "rejected")
    texts = {turn.content.strip() for turn in parsed.messages}
    if asked is not None and not all(turn.content.strip() in texts for turn in asked.messages):
        raise RowFault("prompt is not the one that chosen and rejected begin with; keep one")
    return parsed


def _openai_pair(row: _Row) -> ParsedRow:
    given = row["input"]
    if not isinstance(given, dict):
        raise RowFault(f"input is {kind_of(given)}; it must be an object with messages")
    if problems := key_problems(given, ("messages",), UNSUPPORTED, prefix="input."):
        raise RowFault("; ".join(problems))
    asked = parse_turns(given.get("messages"), "input.messages", "question")
    return _paired(row, asked, "preferred_output", "non_preferred_output")


def _paired(row: _Row, asked: ParsedRow | None, better: str, worse: str) -> ParsedRow:
    """The answers under the keys `better` and `worse` to what was `asked`, or to what one of them begins with."""
    found = [parse_answer(row[key], key) for key in (better, worse)]
    before = next((parsed.messages[:-1] for parsed in found if len(parsed.messages) > 1), ())
    before = before if asked is None else asked.messages
    if not before:
        named = next((f"; rename {quoted(key)} to prompt" for key in row if plain(key) in _QUESTION_KEYS), "")
        raise RowFault(f"prompt is missing beside {better} and {worse}{named}")
    for parsed in found:
        parsed.messages = parsed.messages if len(parsed.messages) > 1 else (*before, *parsed.messages)
    one, other = ([(turn.role, turn.content) for turn in parsed.messages] for parsed in found)
    if one[:-1] != other[:-1]:
        turn = next((index for index, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), 0)
        raise RowFault(
            f"{better} and {worse} differ at turn {turn + 1}, before their last answers; a pair has one prompt: end "
            "both with the first answer that differs"
        )
    chosen, rejected = (_with_system(row, parsed) for parsed in found)
    warnings = [*(asked.warnings if asked else ()), *chosen.warnings, *rejected.warnings]
    if one == other:
        warnings.append(f"{better} and {worse} are the same answer; the pair says nothing")
    return ParsedRow(
        _last_alone_trained(chosen.messages), rejected=_last_alone_trained(rejected.messages),
        warnings=list(dict.fromkeys(warnings)), ignored_keys=chosen.ignored_keys | rejected.ignored_keys,
    )  # fmt: skip


def _asked(row: _Row, *keys: str) -> ParsedRow | None:
    """What a row asks under the first of `keys` that it has: a text, turns, or an instruction with its input."""
    key = next((key for key in keys if row.get(key) is not None), None)
    if key is None:
        return None
    if isinstance(row[key], list):
        return parse_turns(row[key], key, "question")
    return _with_context(row, Message("user", _instruction(row) if key == "instruction" else strings(row, key)[0]))


def _judged(row: _Row) -> ParsedRow:
    """A prompt and an answer to it, each a text or turns."""
    asked, parsed = _asked(row, "prompt"), parse_answer(row["completion"], "completion")
    assert asked is not None  # `prompt` is required
    parsed.messages = (*asked.messages, *parsed.messages[-1:])
    parsed.warnings += asked.warnings
    return _judged_row(_with_system(row, parsed), row["label"])


def _judged_messages(row: _Row) -> ParsedRow:
    return _judged_row(_messages(row), row["label"])


def _judged_row(parsed: ParsedRow, label: Any) -> ParsedRow:
    if not _is_verdict(label):
        raise RowFault(f"label is {kind_of(label)}; it must be true or false (also 1 or 0): whether the answer is good")
    return replace(parsed, messages=_last_alone_trained(parsed.messages), label=bool(label))


def _last_alone_trained(messages: Sequence[Message]) -> tuple[Message, ...]:
    return (*(replace(turn, trained=turn.role != "assistant") for turn in messages[:-1]), messages[-1])


def _is_verdict(label: Any) -> bool:
    return not isinstance(label, str) and label in (0, 1)


def _is_judged(row: _Row) -> bool:
    return _is_verdict(row["label"]) and ("completion" in row or _ends_with_answer(row))


def _ends_with_answer(row: _Row) -> bool:
    turns = row["messages"]
    last = turns[-1] if isinstance(turns, list) and turns else None
    return isinstance(last, dict) and str(last.get("role", last.get("from"))).lower() not in ("user", "human")


def _is_conversation(row: _Row) -> bool:
    """Whether turns are there for their answers, not for a label."""
    return row.get("label") is None or _ends_with_answer(row)


def _label(value: Any) -> Label:
    """What a labelled row is: a text, a number, a truth, or texts of which each holds."""
    if isinstance(value, list):
        strings(
            {f"label[{index}]": item for index, item in enumerate(value)}, *(f"label[{i}]" for i in range(len(value)))
        )
        return tuple(value)
    if isinstance(value, str):
        return strings({"label": value}, "label", filled="label")[0]
    if isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise RowFault(f"label is {kind_of(value)}; it must be a text, a number, or a list of texts")


def _labelled_text(row: _Row) -> ParsedRow:
    return replace(_text(row), label=_label(row["label"]))


def _labelled_prompt(row: _Row) -> ParsedRow:
    asked = _asked(row, "prompt")
    assert asked is not None  # `prompt` is required
    return replace(_with_system(row, asked), label=_label(row["label"]))


def _labelled_messages(row: _Row) -> ParsedRow:
    return replace(_with_system(row, parse_turns(row["messages"], "messages", "any")), label=_label(row["label"]))


_ASKED = (*_SYSTEM_KEYS, "history")  # beside a prompt
# The first that fits is taken: Alpaca's own files carry a "text" column too, chat dumps often a "prompt".
_FORMATS: dict[Format, _Shape] = {
    "chosen/rejected": _Shape(
        "pair", ("chosen", "rejected"), ("prompt", "messages", "conversations", "instruction", "input", *_ASKED), _pair
    ),
    "OpenAI preferences": _Shape("pair", ("input", "preferred_output", "non_preferred_output"), (), _openai_pair),
    "prompt/completion/label": _Shape("judged", ("prompt", "completion", "label"), _ASKED, _judged, _is_judged),
    "judged messages": _Shape("judged", ("messages", "label"), _SYSTEM_KEYS, _judged_messages, _is_judged),
    "text/label": _Shape("labelled", ("text", "label"), (), _labelled_text),
    "messages": _Shape("answer", ("messages",), _SYSTEM_KEYS, _messages, _is_conversation),
    "sharegpt": _Shape("answer", ("conversations",), _SYSTEM_KEYS, _sharegpt),
    "prompt/completion": _Shape("answer", ("prompt", "completion"), _ASKED, _prompt_completion),
    "alpaca": _Shape("answer", ("instruction", "output"), ("input", *_ASKED), _alpaca),
    "text": _Shape("answer", ("text",), (), _text),
    "prompt/label": _Shape("labelled", ("prompt", "label"), _ASKED, _labelled_prompt),
    "labelled messages": _Shape("labelled", ("messages", "label"), _SYSTEM_KEYS, _labelled_messages),
}
