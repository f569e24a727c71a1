"""Each format is known by its keys; what is wrong in a row is named with the key."""

from __future__ import annotations

from typing import Any

import pytest

from lmtune.data.formats import detect_format, parse_row
from lmtune.data.values import RowFault, quoted

U, A, S = "user", "assistant", "system"


def turns(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": f"{role} {index}"} for index, role in enumerate(roles)]


@pytest.mark.parametrize(
    ("row", "format", "messages"),
    [
        ({"prompt": "p", "completion": "c"}, "prompt/completion", [(U, "p"), (A, "c")]),
        ({"prompt": "", "completion": "c"}, "prompt/completion", [(U, ""), (A, "c")]),
        ({"messages": turns(S, U, A)}, "messages", [(S, "system 0"), (U, "user 1"), (A, "assistant 2")]),
        ({"instruction": "i", "output": "o"}, "alpaca", [(U, "i"), (A, "o")]),
        ({"instruction": "i", "input": "", "output": "o"}, "alpaca", [(U, "i"), (A, "o")]),
        ({"instruction": "i", "input": None, "output": "o"}, "alpaca", [(U, "i"), (A, "o")]),
        ({"instruction": "i", "input": "x", "output": "o"}, "alpaca", [(U, "i\n\nx"), (A, "o")]),
        (
            {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "h"},
                               {"from": "gpt", "value": "g"}]},
            "sharegpt", [(S, "s"), (U, "h"), (A, "g")],
        ),
        ({"prompt": "p", "completion": "c", "system": "s"}, "prompt/completion", [(S, "s"), (U, "p"), (A, "c")]),
        ({"instruction": "i", "output": "o", "system": "s", "input": "x"}, "alpaca",
         [(S, "s"), (U, "i\n\nx"), (A, "o")]),
        ({"instruction": "i", "output": "o", "system": None, "history": []}, "alpaca", [(U, "i"), (A, "o")]),
        ({"instruction": "i", "output": "o", "system": "s", "history": [["q", "a"], ["r", "b"]]}, "alpaca",
         [(S, "s"), (U, "q"), (A, "a"), (U, "r"), (A, "b"), (U, "i"), (A, "o")]),
        ({"prompt": "p", "completion": "c", "history": [["q", "a"]]}, "prompt/completion",
         [(U, "q"), (A, "a"), (U, "p"), (A, "c")]),
    ],
)  # fmt: skip
def test_each_format_becomes_messages(row: dict[str, Any], format: str, messages: list[tuple[str, str]]) -> None:
    assert detect_format(row) == format
    parsed = parse_row(row, format)  # type: ignore[arg-type]
    assert [(message.role, message.content) for message in parsed.messages] == messages
    assert not parsed.ignored_keys


def test_text_has_no_messages() -> None:
    assert detect_format({"text": "once"}) == "text"
    parsed = parse_row({"text": "once"}, "text")
    assert parsed.text == "once"
    assert parsed.messages == ()


@pytest.mark.parametrize("value", ["2024-01-01", "2024-01-01T00:00:00Z", "12:30", "1e5", "null", "01/02/2024"])
def test_strings_that_look_like_something_else_stay_strings(value: str) -> None:
    parsed = parse_row({"prompt": value, "completion": value}, "prompt/completion")
    assert [message.content for message in parsed.messages] == [value, value]


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"instruction": "i", "input": "", "output": "o", "text": "t"}, "alpaca"),  # Stanford Alpaca's own columns
        ({"prompt": "p", "messages": turns(U, A)}, "messages"),
    ],
)
def test_extra_columns_do_not_change_the_format(row: dict[str, Any], format: str) -> None:
    assert detect_format(row) == format
    assert parse_row(row, format).ignored_keys  # type: ignore[arg-type]


def test_keys_that_are_not_used_are_named() -> None:
    row = {"messages": [{"role": U, "content": "q", "name": "Ann"}, {"role": A, "content": "a"}], "id": 3}
    assert parse_row(row, "messages").ignored_keys == {"id", "messages[].name"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({}, ["empty"]),
        ({"question": "q", "answer": "a"}, ['rename "question" to prompt and "answer" to completion']),
        ({"prompt": "p"}, ["completion missing"]),
        ({"prompt": "p", "completions": "c"}, ["completion missing", '"completions"', "meant"]),
        ({"prompt": None, "completion": 3}, ["prompt is null", "completion is a number (3)"]),
        ({"instruction": "i", "input": 3, "output": "o"}, ["input is a number"]),
        ({"text": ""}, ["text is empty"]),
        ({"messages": []}, ["an empty list"]),
        ({"messages": "hello"}, ['a string ("hello")']),
        ({"messages": ["hello"]}, ["messages[0]", "role and content"]),
        ({"messages": [{"role": U, "content": None}]}, ["messages[0].content is null"]),
        ({"messages": [{"role": U, "content": [{"type": "text"}]}]}, ["messages[0].content[0]", "a part of text"]),
        ({"messages": [{"role": "critic", "content": "x"}]}, ['"critic"', "system, user, assistant"]),
        ({"messages": turns(S)}, ["ends with system"]),
        ({"prompt": "p", "completion": "c", "system": ["s"]}, ["system is a list"]),
        ({"prompt": "p", "completion": "c", "system": "s", "system_prompt": "t"}, ["differ; keep one"]),
        ({"text": "t", "system": "s"}, ["system beside text"]),
        ({"instruction": "i", "output": "o", "history": [["q"]]}, ["history", "[question, answer] pairs"]),
        ({"instruction": "i", "output": "o", "history": "q"}, ["history", "[question, answer] pairs"]),
        ({"instruction": "i", "output": "o", "history": [["q", ""]]}, ["history[0][1] is empty"]),
        ({"messages": turns(U, A), "history": [["q", "a"]]}, ["history", "turns of the conversation"]),
        ({"messages": turns(U, A), "tools": [{"type": "function"}]}, ["tools", "tool calls", "remove"]),
        ({"messages": turns(U, A), "rejected": "bad"}, ["rejected", "preferences"]),
        ({"conversations": turns(U), "chosen": {"value": "a"}, "rejected": {"value": "b"}}, ["ends with", "chosen"]),
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, ["preference", "prompt and completion"]),
        ({"input": {"messages": []}, "preferred_output": [], "non_preferred_output": []}, ["preference"]),
        ({"prompt": "p", "completion": "c", "label": False}, ["label is false", "bad one"]),
        ({"text": "t", "label": "sport"}, ["label is a string"]),
        ({"prompt": "p", "completion": "c", "weight": 0.5}, ["weight is a number (0.5)"]),
        ({"prompt": "p", "completion": "c", "weight": 0}, ["weight is a number (0)", "remove the row"]),
        ({"prompt": "p", "completion": "c", "train": False}, ["train is false", "remove it"]),
        ({"prompt": "p", "completion": "c", "train_on_input": True}, ["train_on_input", "only answers"]),
        ({"prompt": "p", "completion": "c", "reasoning": "r"}, ["reasoning would be lost", "<think>"]),
        ({"prompt": "p", "completion": "c", "images": ["x.png"]}, ["images", "only text"]),
        ({"prompt": turns(U), "completion": turns(A)}, ["lists", "messages"]),
        ({"messages": turns(U, A), "conversations": turns(U, A, U, A)}, ["differ; keep one"]),
        ({"dialog": turns(U, A)}, ['"dialog"', "rename it to messages"]),
        ({"instruction": "i", "response": "r"}, ["output missing", 'rename "instruction" to prompt', '"response"']),
        ({"conversations": [{"from": "referee", "value": "x"}]}, ['conversations[0].from is "referee"']),
    ],
)  # fmt: skip
def test_faults_say_what_and_where(row: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(RowFault) as fault:
        parse_row(row, detect_format(row))
    for word in words:
        assert word in str(fault.value)


def test_white_space_as_an_answer_is_a_warning() -> None:
    assert parse_row({"prompt": "p", "completion": " \n"}, "prompt/completion").warnings
    assert not parse_row({"prompt": "p", "completion": " x"}, "prompt/completion").warnings


def test_quoted_spells_out_what_a_terminal_would_obey() -> None:
    assert quoted("a\x1b[2Jb\ud800\u202e") == '"a\\x1b[2Jb\\ud800\\u202e"'


def test_a_key_that_may_matter_warns_by_line_and_others_are_named_once() -> None:
    parsed = parse_row(
        {"prompt": "p", "completion": "c", "context": "x", "label": "A", "weight": 1}, "prompt/completion"
    )
    assert [warning.split()[0] for warning in parsed.warnings] == ["context", "label"]
    assert parsed.ignored_keys == {"weight"}
    with_nothing = {"prompt": "p", "completion": "c", "context": "", "images": [], "tools": "[]", "rejected": None}
    assert parse_row(with_nothing, "prompt/completion") == parse_row(
        {"prompt": "p", "completion": "c"}, "prompt/completion"
    )


@pytest.mark.parametrize(
    ("further", "words"),
    [
        ({"System": "s"}, ["System is used only as system"]),
        ({"system-prompt": "s"}, ["only as system_prompt"]),
        ({"system_instruction": "s"}, ["name it system"]),
        ({"History": [["q", "a"]]}, ["only as history"]),
        ({"chat_history": [["q", "a"]]}, ["name it history"]),
        ({"Tools": [{"name": "f"}]}, ["tool"]),
        ({"Weight": 0}, ["Weight is a number (0)", "remove the row"]),
        ({"Complex_CoT": "r"}, ["reasoning would be lost"]),
        ({"kto_tag": True}, ["labels are not supported"]),
        ({"is_valid": False}, ["should not be trained"]),
    ],
)
def test_a_key_that_matters_is_known_in_any_spelling(further: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(RowFault) as fault:
        parse_row({"prompt": "p", "completion": "c", **further}, "prompt/completion")
    for word in words:
        assert word in str(fault.value), str(fault.value)


@pytest.mark.parametrize("key", ["completion", "summary", "Response", "labels"])
def test_an_answer_beside_a_text_is_not_lost(key: str) -> None:
    row = {"text": "Tell me.", key: "No."}
    with pytest.raises(RowFault, match=f"{key} beside text"):
        parse_row(row, detect_format(row))
    assert parse_row({**row, "text": "Tell me. No."}, "text").text == "Tell me. No."


def test_a_second_answer_is_a_warning() -> None:
    row = parse_row({"prompt": "p", "completion": "c", "response": "d", "answer": "c"}, "prompt/completion")
    assert [warning for warning in row.warnings if "response" in warning]
    assert row.ignored_keys == {"answer"}


@pytest.mark.parametrize("row", [{"Prompt": "p", "Completion": "c"}, {"Question": "p", "Response": "c"}])
def test_the_renaming_is_found_in_any_spelling(row: dict[str, str]) -> None:
    with pytest.raises(RowFault, match=f'rename "{next(iter(row))}" to prompt'):
        detect_format(row)
