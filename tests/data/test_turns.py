"""Turns in every spelling; what a turn says besides its text is used or refused, never silently dropped."""

from __future__ import annotations

from typing import Any

import pytest

from lmtune.data.formats import ParsedRow, detect_format, parse_row
from lmtune.data.values import RowFault

QUESTION = {"role": "user", "content": "q"}


def parsed(*turns: Any, key: str = "messages", **further: Any) -> ParsedRow:
    row = {key: list(turns), **further}
    return parse_row(row, detect_format(row))


def answer(**keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "a", **keys}


def said(row: ParsedRow) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in row.messages]


@pytest.mark.parametrize("key", ["messages", "conversations"])
@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
        [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        [{"from": "user", "content": "q"}, {"role": "Assistant", "value": "a"}],
        [{"role": "user", "from": "human", "value": "q"}, {"role": "model", "content": "a", "value": "a"}],
        [{"from": "prompter", "value": "q"}, {"from": "AI", "value": "a"}],
    ],
)
def test_both_spellings_and_the_usual_roles_are_taken_under_both_names(key: str, turns: list[Any]) -> None:
    row = parsed(*turns, key=key)
    assert said(row) == [("user", "q"), ("assistant", "a")]
    assert not row.ignored_keys


@pytest.mark.parametrize("role", ["system", "developer", "System"])
def test_the_developer_gives_the_system_prompt(role: str) -> None:
    row = parsed({"role": role, "content": "s"}, QUESTION, answer())
    assert said(row) == [("system", "s"), ("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "a"}], "a"),
        ([{"type": "text", "text": "a "}, {"type": "text", "text": "b"}], "a b"),
        ([{"type": "output_text", "text": "a", "annotations": []}], "a"),
        ([{"text": "a"}], "a"),
    ],
)
def test_parts_of_text_are_put_together_as_they_stand(content: list[Any], text: str) -> None:
    assert said(parsed(QUESTION, answer(content=content)))[-1] == ("assistant", text)


CALL = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        # calls, whatever the text beside them is
        ([QUESTION, answer(tool_calls=CALL)], ["messages[1].tool_calls", "not supported yet", "remove the row"]),
        ([QUESTION, answer(content=None, tool_calls=CALL)], ["messages[1].tool_calls"]),
        ([QUESTION, answer(content=None, function_call={"name": "f"})], ["messages[1].function_call"]),
        ([QUESTION, {"role": "tool", "tool_call_id": "c", "content": "1"}], ['role: "tool"', "tool calls"]),
        ([QUESTION, {"from": "function_call", "value": "{}"}], ['from: "function_call"']),
        # what is no text
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, answer()],
         ["messages[0].content[0]", '"image_url"', "remove the row"]),
        ([{"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "input_audio"}]}, answer()],
         ["messages[0].content[1]", '"input_audio"']),
        ([QUESTION, answer(content=["a"])], ["messages[1].content[0] is a string"]),
        ([QUESTION, answer(content=[{"type": "text", "text": 3}])], ["content[0].text is a number (3)"]),
        ([QUESTION, answer(content=[{"type": "text", "text": ""}])], ["messages[1].content is empty"]),
        ([QUESTION, answer(content=[{"type": "thinking", "thinking": "t"}])], ['"thinking"', "<think>"]),
        ([QUESTION, answer(audio={"id": "x"})], ["messages[1].audio", "only text"]),
        ([{**QUESTION, "images": ["x.png"]}, answer()], ["messages[0].images"]),
        ([QUESTION, answer(refusal="I can't.")], ["messages[1].refusal", "write what the assistant says"]),
        # reasoning
        ([QUESTION, answer(reasoning_content=["t"])], ["messages[1].reasoning_content is a list"]),
        ([QUESTION, answer(reasoning="t", thinking="u")], ["reasoning and .thinking differ"]),
        ([QUESTION, answer(reasoning="t", content="<think>u</think>a")], ["both in reasoning and as <think>"]),
        ([{**QUESTION, "reasoning": "t"}, answer()], ["messages[0].reasoning", "turn of user"]),
        ([QUESTION, answer(reasoning_details=[{"text": "t"}])], ["messages[1].reasoning_details", "<think>"]),
        # weights
        ([QUESTION, answer(weight=0)], ["every answer in messages", "remove the row"]),
        ([QUESTION, answer(weight=0), QUESTION, answer(train=False)], ["every answer in messages"]),
        ([QUESTION, answer(weight=0.5)], ["messages[1].weight is a number (0.5)", "0 or 1"]),
        ([QUESTION, answer(weight="0")], ['messages[1].weight is a string ("0")']),
        ([{**QUESTION, "train": True}, answer()], ["messages[0].train is true", "only the assistant's"]),
        # spelling and order
        ([{"role": "user", "from": "gpt", "content": "q"}, answer()], ["both role and from", "keep one"]),
        ([{"role": "user", "content": "q", "value": "p"}, answer()], ["both content and value"]),
        ([{"user": "q"}, {"assistant": "a"}], ['messages[0] has the keys "user"', "role and content"]),
        ([{"speaker": "user", "content": "q"}, answer()], ["messages[0].role is missing"]),
        ([answer(), QUESTION, answer()], ["messages[0]", "begins with a question", "remove this turn"]),
        ([QUESTION, QUESTION, answer()], ["messages[1]", "join it with the turn before"]),
        ([QUESTION, answer(), QUESTION], ["ends with user", "remove"]),
        ([{"role": "system", "content": "s"}, {"role": "developer", "content": "t"}, QUESTION, answer()],
         ["messages[1]", "only stand first"]),
    ],
)  # fmt: skip
def test_faults_name_the_turn_and_what_to_do(turns: list[Any], words: list[str]) -> None:
    with pytest.raises(RowFault) as fault:
        parsed(*turns)
    for word in words:
        assert word in str(fault.value), str(fault.value)


def test_what_exporters_write_for_nothing_is_nothing() -> None:
    nothing = {"tool_calls": None, "function_call": None, "refusal": None, "audio": None, "reasoning_content": "",
               "reasoning": None, "weight": None, "images": [], "annotations": []}  # fmt: skip
    row = parsed(QUESTION, answer(**nothing), tools=[], functions=None, system="")
    assert said(row) == [("user", "q"), ("assistant", "a")]
    assert not row.ignored_keys
    assert not row.warnings


class TestWeight:
    @pytest.mark.parametrize(
        "off",
        [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"should_train": False}, {"skip": True}],
    )
    def test_an_answer_without_weight_is_context_and_not_trained(self, off: dict[str, Any]) -> None:
        row = parsed(QUESTION, answer(content="bad", **off), QUESTION, answer(weight=1))
        assert [message.trained for message in row.messages] == [True, False, True, True]
        assert [message.content for message in row.messages] == ["q", "bad", "q", "a"]
        assert not row.ignored_keys
        assert not row.warnings

    def test_turns_after_the_last_trained_answer_are_cut_off(self) -> None:
        row = parsed(QUESTION, answer(), QUESTION, answer(content="bad", weight=0))
        assert said(row) == [("user", "q"), ("assistant", "a")]

    def test_an_empty_answer_that_is_not_trained_is_taken(self) -> None:
        assert len(parsed(QUESTION, answer(content="", weight=0), QUESTION, answer()).messages) == 4

    def test_a_weight_of_a_question_changes_nothing(self) -> None:
        row = parsed({**QUESTION, "weight": 0}, answer())
        assert all(message.trained for message in row.messages)
        assert not row.warnings
        assert "changes nothing" in parsed({**QUESTION, "weight": 1}, answer()).warnings[0]


class TestReasoning:
    @pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
    def test_it_is_trained_as_a_think_part(self, key: str) -> None:
        row = parsed(QUESTION, answer(**{key: "two\nlines\n"}))
        assert said(row)[-1] == ("assistant", "<think>\ntwo\nlines\n</think>\n\na")
        (warning,) = row.warnings
        assert key in warning
        assert "data.template: thinking" in warning

    def test_the_same_in_two_keys_is_one(self) -> None:
        row = parsed(QUESTION, answer(reasoning="t", reasoning_content="t", reasoning_details=[{"text": "t"}]))
        assert said(row)[-1][1] == "<think>\nt\n</think>\n\na"


class TestSystem:
    def test_the_row_s_own_goes_first_in_both_spellings(self) -> None:
        for key in ("messages", "conversations"):
            assert said(parsed(QUESTION, answer(), key=key, system="s"))[0] == ("system", "s")
        assert said(parsed(QUESTION, answer(), system_prompt="s"))[0] == ("system", "s")

    def test_an_equal_one_is_accepted(self) -> None:
        assert len(parsed({"role": "system", "content": "s"}, QUESTION, answer(), system="s").messages) == 3

    def test_another_one_is_a_fault(self) -> None:
        with pytest.raises(RowFault, match=r"system differs from the system message in messages\[0\]; keep one"):
            parsed({"role": "system", "content": "s"}, QUESTION, answer(), system="t")


@pytest.mark.parametrize(
    ("turn", "words"),
    [
        ({"Weight": 0}, ["messages[1].Weight", "only as weight"]),
        ({"reasoningContent": "r"}, ["only as reasoning_content"]),
        ({"toolCalls": CALL}, ["tool calls"]),
        ({"tools": CALL}, ["tool calls"]),
        ({"lossMask": 0}, ["lossMask is a number (0)", "weight: 0 or 1"]),
        ({"train_detail": [{"begin_offset": 0}]}, ["weight: 0 or 1"]),
        ({"skip": True}, ["marked as not trained"]),
        ({"include": False}, ["include is false", "weight: 0 or 1"]),
        ({"label": False}, ["label is false"]),
        ({"chain_of_thought": "r"}, ["reasoning would be lost"]),
        ({"context": "c"}, ["would be lost"]),
        ({"content": [{"type": "text", "text": "a", "weight": 0}]}, ["content[0].weight", "whole turn"]),
    ],
)
def test_what_a_turn_says_in_another_spelling_is_a_fault(turn: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(RowFault) as fault:
        parsed(QUESTION, answer(**turn))
    for word in words:
        assert word in str(fault.value), str(fault.value)


def test_a_switch_that_changes_nothing_is_accepted() -> None:
    row = parsed({**QUESTION, "skip": False, "include": True}, answer(skip=False, include=True, label="greeting"))
    assert [message.trained for message in row.messages] == [True, True]


def test_a_key_that_is_false_is_named_too() -> None:
    assert parsed(QUESTION, answer(is_good=False)).ignored_keys == {"messages[].is_good"}


@pytest.mark.parametrize(
    ("turn", "hint"),
    [
        ({"role": "user", "text": "q"}, 'rename "text" to content'),
        ({"role": "user", "parts": [{"text": "q"}]}, "parts"),
    ],
)
def test_a_text_under_another_name_is_found(turn: dict[str, Any], hint: str) -> None:
    with pytest.raises(RowFault, match=hint):
        parsed(turn, answer())
