"""Each format is known by its keys and becomes messages; what cannot be used is named with its key."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from lmtune.data.formats import detect_format, kind_of_format, parse_row
from lmtune.data.turns import ParsedRow
from lmtune.data.types import OUTCOMES, RowKind
from lmtune.data.values import RowFault, quoted

U, A, S = "user", "assistant", "system"
PAIR = {"prompt": "p", "completion": "c"}
QUESTION = {"role": "user", "content": "q"}
CALL = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]


def parsed(row: dict[str, Any], rows: RowKind | None = None) -> ParsedRow:
    return parse_row(row, detect_format(row, rows))


def said(row: ParsedRow) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in row.messages]


def turns(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": f"{role} {index}"} for index, role in enumerate(roles)]


def answer(**keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "a", **keys}


def talk(*turns: Any, **further: Any) -> dict[str, Any]:
    return {"messages": list(turns), **further}


@pytest.mark.parametrize(
    ("row", "format", "messages"),
    [
        (PAIR, "prompt/completion", [(U, "p"), (A, "c")]),
        ({"prompt": "", "completion": "2024-01-01"}, "prompt/completion", [(U, ""), (A, "2024-01-01")]),
        ({"messages": turns(S, U, A)}, "messages", [(S, "system 0"), (U, "user 1"), (A, "assistant 2")]),
        ({"instruction": "i", "output": "o"}, "alpaca", [(U, "i"), (A, "o")]),
        ({"instruction": "i", "input": "", "output": "o"}, "alpaca", [(U, "i"), (A, "o")]),
        ({"instruction": "i", "input": None, "output": "o"}, "alpaca", [(U, "i"), (A, "o")]),
        ({"instruction": "i", "input": "x", "output": "o"}, "alpaca", [(U, "i\n\nx"), (A, "o")]),
        ({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "h"},
                            {"from": "gpt", "value": "g"}]}, "sharegpt", [(S, "s"), (U, "h"), (A, "g")]),
        ({**PAIR, "system": "s"}, "prompt/completion", [(S, "s"), (U, "p"), (A, "c")]),
        ({**PAIR, "history": [["q", "a"]]}, "prompt/completion", [(U, "q"), (A, "a"), (U, "p"), (A, "c")]),
        ({"instruction": "i", "output": "o", "system": None, "history": []}, "alpaca", [(U, "i"), (A, "o")]),
        ({"instruction": "i", "output": "o", "system": "s", "history": [["q", "a"], ["r", "b"]]}, "alpaca",
         [(S, "s"), (U, "q"), (A, "a"), (U, "r"), (A, "b"), (U, "i"), (A, "o")]),
        # both spellings of turns, the usual roles, parts of text
        ({"conversations": turns(U, A)}, "sharegpt", [(U, "user 0"), (A, "assistant 1")]),
        (talk({"from": "prompter", "value": "q"}, {"role": "Assistant", "value": "a"}), "messages",
         [(U, "q"), (A, "a")]),
        (talk({"role": "developer", "content": "s"}, QUESTION, answer()), "messages", [(S, "s"), (U, "q"), (A, "a")]),
        (talk(QUESTION, answer(content=[{"type": "text", "text": "a "}, {"text": "b"}])), "messages",
         [(U, "q"), (A, "a b")]),
        (talk(QUESTION, answer(), system_prompt="s"), "messages", [(S, "s"), (U, "q"), (A, "a")]),
        (talk({"role": "system", "content": "s"}, QUESTION, answer(), system="s"), "messages",
         [(S, "s"), (U, "q"), (A, "a")]),
        # what exporters write for nothing
        (talk(QUESTION, answer(tool_calls=None, audio=None, reasoning="", weight=None, images=[]), tools=[], system=""),
         "messages", [(U, "q"), (A, "a")]),
        ({**PAIR, "context": "", "images": [], "tools": "[]", "rejected": None}, "prompt/completion",
         [(U, "p"), (A, "c")]),
    ],
)  # fmt: skip
def test_each_format_becomes_messages(row: dict[str, Any], format: str, messages: list[tuple[str, str]]) -> None:
    assert detect_format(row) == format
    found = parsed(row)
    assert said(found) == messages
    assert not found.ignored_keys
    assert not [warning for warning in found.warnings if "empty" not in warning]


def test_a_text_is_trained_as_it_stands() -> None:
    assert parsed({"text": "once"}) == ParsedRow(text="once")
    assert parsed({"text": "Tell me. No.", "completion": "No."}).text == "Tell me. No."


@pytest.mark.parametrize(
    ("row", "format", "ignored"),
    [
        ({"instruction": "i", "input": "", "output": "o", "text": "t"}, "alpaca", {"text"}),  # Stanford Alpaca's own
        ({"prompt": "p", "messages": turns(U, A)}, "messages", {"prompt"}),
        (talk({**QUESTION, "name": "Ann"}, answer(is_good=False), id=3), "messages",
         {"id", "messages[].name", "messages[].is_good"}),
        ({**PAIR, "answer": "c", "weight": 1}, "prompt/completion", {"answer"}),
    ],
)  # fmt: skip
def test_keys_that_are_not_used_are_named(row: dict[str, Any], format: str, ignored: set[str]) -> None:
    assert detect_format(row) == format
    assert parsed(row).ignored_keys == ignored


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({**PAIR, "completion": " \n"}, "only white space"),
        ({**PAIR, "prompt": " "}, "question is empty"),
        ({**PAIR, "context": "x"}, "context"),
        ({**PAIR, "label": "A"}, "label"),
        ({**PAIR, "response": "d"}, "response"),
        (talk({**QUESTION, "weight": 1}, answer()), "weight on a turn of user changes nothing"),
        (talk(QUESTION, answer(reasoning="r")), "data.template: thinking"),
    ],
)
def test_what_may_matter_is_a_warning(row: dict[str, Any], words: str) -> None:
    (warning,) = parsed(row).warnings
    assert words in warning


@pytest.mark.parametrize(
    ("row", "words"),
    [
        # keys
        ({}, ["empty"]),
        ({"question": "q", "answer": "a"}, ['rename "question" to prompt and "answer" to completion']),
        ({"Prompt": "p", "Completion": "c"}, ['rename "Prompt" to prompt']),
        ({"dialog": turns(U, A)}, ['"dialog"', "to messages"]),
        ({"prompt": "p"}, ["completion missing"]),
        ({"prompt": "p", "completions": "c"}, ["completion missing", '"completions"', "meant"]),
        ({"instruction": "i", "response": "r"}, ["output missing", 'rename "instruction" to prompt', '"response"']),
        ({**PAIR, "System": "s"}, ["System is used only as system"]),
        ({**PAIR, "system_instruction": "s"}, ["name it system"]),
        ({**PAIR, "chat_history": [["q", "a"]]}, ["under history"]),
        ({**PAIR, "train_on_input": True}, ["train_on_input", "only answers"]),
        (talk(QUESTION, answer(**{"from": "user"})), ["both role and from, which differ"]),
        (talk(QUESTION, answer(value="other")), ["both content and value, which differ"]),
        (talk(QUESTION, answer(mask=True)), ["mask", "write weight: 0"]),
        # values
        ({"prompt": None, "completion": 3}, ["prompt is null", "completion is a number (3)"]),
        ({"instruction": "i", "input": 3, "output": "o"}, ["input is a number"]),
        ({"text": ""}, ["text is empty"]),
        ({"messages": []}, ["an empty list"]),
        ({"messages": "hello"}, ['a string ("hello")']),
        ({**PAIR, "system": ["s"]}, ["system is a list"]),
        ({**PAIR, "system": "s", "system_prompt": "t"}, ["differ; keep one"]),
        (talk({"role": "system", "content": "s"}, QUESTION, answer(), system="t"), ["differ; keep one"]),
        ({"text": "t", "system": "s"}, ["system", "prompt and completion"]),
        ({"text": "t", "Response": "a"}, ["Response beside text"]),
        ({"instruction": "i", "output": "o", "history": [["q"]]}, ["history", "[question, answer] pairs"]),
        ({"instruction": "i", "output": "o", "history": "q"}, ["history", "[question, answer] pairs"]),
        ({"instruction": "i", "output": "o", "history": [["q", ""]]}, ["history[0][1] is empty"]),
        (talk(QUESTION, answer(), history=[["q", "a"]]), ["history", "turns of messages"]),
        # what is not supported
        ({**PAIR, "tools": CALL}, ["tools", "write the row as messages"]),
        ({**PAIR, "tool_calls": CALL}, ["calls would be lost", "write the row as messages"]),
        (talk(QUESTION, answer(content=None, toolCalls=CALL)), ["messages[1].toolCalls"]),
        ({"messages": turns(U, A), "rejected": "bad"}, ["rejected", "half of a preference pair"]),
        ({**PAIR, "kto_tag": False}, ["kto_tag is false", "objective.kind: kto"]),
        *(({**PAIR, "weight": weight}, ["weight is", "0 or more"]) for weight in (-1, "1", True, math.inf, math.nan)),
        ({**PAIR, "images": ["x.png"]}, ["images", "only text"]),
        (talk({**QUESTION, "images": ["x.png"]}, answer()), ["messages[0].images"]),
        (talk({"role": "user", "content": [{"text": "q"}, {"type": "image_url"}]}, answer()),
         ["messages[0].content[1]", '"image_url"', "remove the row"]),
        # reasoning
        ({**PAIR, "reasoning": "r"}, ["reasoning would be lost", "<think>"]),
        (talk(QUESTION, answer(chain_of_thought="t")), ["messages[1].chain_of_thought", "<think>"]),
        (talk(QUESTION, answer(reasoning=["t"])), ["messages[1].reasoning is a list"]),
        (talk(QUESTION, answer(reasoning="t", content="<think>u</think>a")), ["messages[1].reasoning", "keep one"]),
        (talk({**QUESTION, "reasoning": "t"}, answer()), ["messages[0].reasoning", "on an answer"]),
        # turns
        ({"messages": ["hello"]}, ["messages[0]", "role and content"]),
        (talk({"user": "q"}, {"assistant": "a"}), ['messages[0] has the keys "user"', "role and content"]),
        (talk({"role": U, "content": None}), ["messages[0].content is null"]),
        (talk({"role": U, "content": [{"type": "text"}]}), ["messages[0].content[0].text is missing"]),
        (talk(QUESTION, answer(content=["a"])), ["messages[1].content[0] is a string"]),
        (talk(QUESTION, answer(content=[{"text": ""}])), ["messages[1].content is empty"]),
        (talk({"role": "critic", "content": "x"}), ['"critic"', "system, user, assistant or tool"]),
        (talk(QUESTION, answer(weight=0)), ["every answer in messages", "remove the row"]),
        (talk(QUESTION, answer(weight=0.5)), ["messages[1].weight is a number (0.5)", "0 or 1"]),
        (talk(QUESTION, answer(Weight=0)), ["messages[1].Weight", "only as weight"]),
        ({"messages": turns(S)}, ["no turn of the user"]),
        ({"messages": turns(S, A)}, ["no turn of the user"]),
        ({"messages": turns(U, S)}, ["holds no answer"]),
        (talk(QUESTION, answer(weight=0), answer()), ["messages[2]", "one of the two is not trained"]),
        (talk(QUESTION, answer(), answer(reasoning="r")), ["messages[2] reasons after the answer before it"]),
    ],
)  # fmt: skip
def test_faults_say_what_and_where(row: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(RowFault) as fault:
        parsed(row)
    for word in words:
        assert word in str(fault.value), str(fault.value)


@pytest.mark.parametrize("off", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}, {"include": False}])
def test_an_answer_without_weight_is_context_and_not_trained(off: dict[str, Any]) -> None:
    row = parsed(talk(QUESTION, answer(content="", **off), QUESTION, answer(weight=1), QUESTION, answer(**off)))
    assert said(row) == [(U, "q"), (A, ""), (U, "q"), (A, "a")], "what follows the last trained answer is cut off"
    assert [message.trained for message in row.messages] == [True, False, True, True]
    assert not row.ignored_keys
    assert not row.warnings


@pytest.mark.parametrize(
    ("given", "messages", "outcomes"),
    [
        (turns(U, U, A, A), [(U, "user 0\n\nuser 1"), (A, "assistant 2\n\nassistant 3")], {"joined"}),
        (turns(S, S, U, A), [(S, "system 0\n\nsystem 1"), (U, "user 2"), (A, "assistant 3")], {"joined"}),
        ([{"role": "developer", "content": "d"}, QUESTION, answer()], [(S, "d"), (U, "q"), (A, "a")],
         {"developer_as_system"}),
        (turns(U, A, S, U, A), [(U, "user 0"), (A, "assistant 1"), (S, "system 2"), (U, "user 3"), (A, "assistant 4")],
         {"later_system"}),
        (turns(A, U, A), [(U, "user 1"), (A, "assistant 2")], {"cut_beginning"}),
        (turns(S, A, S, U, A), [(S, "system 0\n\nsystem 2"), (U, "user 3"), (A, "assistant 4")],
         {"cut_beginning", "joined"}),
        (turns(U, A, U), [(U, "user 0"), (A, "assistant 1")], {"cut_end"}),
        (turns(U, A, U, U, S), [(U, "user 0"), (A, "assistant 1")], {"cut_end", "joined"}),
        ([QUESTION, answer(), QUESTION, answer(weight=0)], [(U, "q"), (A, "a")], {"cut_end"}),
        ([QUESTION, answer(weight=0), QUESTION, answer()], [(U, "q"), (A, "a"), (U, "q"), (A, "a")], {"not_trained"}),
        ([QUESTION, answer(content="<think>r</think>a")], [(U, "q"), (A, "<think>r</think>a")], {"reasoning"}),
        ([QUESTION, answer()], [(U, "q"), (A, "a")], set()),
    ],
)  # fmt: skip
def test_every_order_of_turns_has_one_outcome(
    given: list[Any], messages: list[tuple[str, str]], outcomes: set[str]
) -> None:
    for row in ({"messages": given}, {"conversations": given}):
        found = parsed(row)
        assert said(found) == messages
        assert found.outcomes == outcomes
        assert found.outcomes <= set(OUTCOMES)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_trained_as_a_think_part(key: str) -> None:
    row = parsed(talk(QUESTION, answer(**{key: "two\nlines\n"})))
    assert said(row)[-1] == (A, "<think>\ntwo\nlines\n</think>\n\na")


def test_quoted_spells_out_what_a_terminal_would_obey() -> None:
    assert quoted("a\x1b[2Jb\ud800\u202e") == '"a\\x1b[2Jb\\ud800\\u202e"'


HALVES = {"chosen": "good", "rejected": "bad"}
ASKED = [{"role": "system", "content": "s"}, QUESTION]
GOOD, BAD = answer(content="good"), answer(content="bad")


@pytest.mark.parametrize(
    ("row", "before"),
    [
        ({"prompt": "q", **HALVES}, [(U, "q")]),
        ({"prompt": "q", **HALVES, "system": "s", "history": [["r", "b"]]}, [(S, "s"), (U, "r"), (A, "b"), (U, "q")]),
        ({"instruction": "q", "input": "x", **HALVES}, [(U, "q\n\nx")]),
        # TRL's conversational rows, with the prompt apart and within; UltraFeedback repeats it as a text
        ({"prompt": ASKED, "chosen": [GOOD], "rejected": [BAD]}, [(S, "s"), (U, "q")]),
        ({"chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD]}, [(S, "s"), (U, "q")]),
        ({"prompt": "q ", "chosen": [*ASKED, GOOD], "rejected": [*ASKED, BAD], "messages": [*ASKED, GOOD]},
         [(S, "s"), (U, "q")]),
        ({"chosen": [QUESTION, answer(), QUESTION, GOOD], "rejected": [BAD]}, [(U, "q"), (A, "a"), (U, "q")]),
        # HH-RLHF
        ({"chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r: x\n\ny\n\nAssistant: good",
          "rejected": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r: x\n\ny\n\nAssistant: bad"},
         [(U, "q"), (A, "a"), (U, "r: x\n\ny")]),
        # LLaMA-Factory
        ({"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "good"},
          "rejected": {"from": "gpt", "value": "bad"}}, [(U, "q")]),
        # OpenAI
        ({"input": {"messages": ASKED, "tools": [], "parallel_tool_calls": True}, "preferred_output": [GOOD],
          "non_preferred_output": [BAD]}, [(S, "s"), (U, "q")]),
    ],
)  # fmt: skip
def test_a_pair_has_one_prompt_and_two_answers(row: dict[str, Any], before: list[tuple[str, str]]) -> None:
    for rows in (None, "pair"):
        assert kind_of_format(detect_format(row, rows)) == "pair"
        found = parsed(row, rows)
        assert said(found) == [*before, (A, "good")]
        assert [(message.role, message.content) for message in found.rejected] == [*before, (A, "bad")]
        for messages in (found.messages, found.rejected):
            trained = [message.trained for message in messages if message.role == A]
            assert trained == [False] * (len(trained) - 1) + [True]
        assert not found.warnings
        assert found.ignored_keys <= {"messages", "input.parallel_tool_calls"}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({**PAIR, "label": True}, [(U, "p"), (A, "c")]),
        ({"prompt": ASKED, "completion": [answer()], "label": 1}, [(S, "s"), (U, "q"), (A, "a")]),
        (talk(*ASKED, answer(), label=True), [(S, "s"), (U, "q"), (A, "a")]),
    ],
)
def test_a_judged_row_has_an_answer_that_is_good_or_not(row: dict[str, Any], messages: list[tuple[str, str]]) -> None:
    for judgement in (True, False):
        row["label"] = type(row["label"])(judgement)
        for rows in (None, "judged"):
            assert kind_of_format(detect_format(row, rows)) == "judged"
            found = parsed(row, rows)
            assert (said(found), found.label) == (messages, judgement)


@pytest.mark.parametrize("label", ["sport", 3, -0.5, True, ["a", "b"], []])
@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"text": "t"}, []),
        ({"prompt": "p", "system": "s"}, [(S, "s"), (U, "p")]),
        (talk(*ASKED), [(S, "s"), (U, "q")]),
        (talk(*ASKED, answer(), QUESTION), [(S, "s"), (U, "q"), (A, "a"), (U, "q")]),
    ],
)
def test_a_labelled_row_is_read_whole(row: dict[str, Any], messages: list[tuple[str, str]], label: Any) -> None:
    for rows in (None, "labelled"):
        assert kind_of_format(detect_format({**row, "label": label}, rows)) == "labelled"
        found = parsed({**row, "label": label}, rows)
        assert (found.text, said(found)) == (row.get("text"), messages)
        assert found.label == (tuple(label) if isinstance(label, list) else label)
        assert type(found.label) is (tuple if isinstance(label, list) else type(label))


def test_a_labelled_conversation_may_end_with_an_answer() -> None:
    found = parsed(talk(*ASKED, answer(), label="kind"), "labelled")
    assert (said(found)[-1], found.label) == ((A, "a"), "kind")
    assert parsed(talk(*ASKED, answer(), label=True), "labelled").label is True


@pytest.mark.parametrize(
    ("row", "rows", "words"),
    [
        ({"prompt": "q", **HALVES}, "answer", ["a preference pair", "objective.kind: dpo", "prompt and completion"]),
        (talk(QUESTION, answer(), **HALVES), "answer", ["a preference pair", "objective.kind: dpo"]),
        ({**PAIR, "label": False}, "answer", ["a judged answer", "objective.kind: kto", "prompt and completion"]),
        ({"text": "t", "label": "x"}, "answer", ["a labelled text", "objective.kind: classification"]),
        (talk(QUESTION, label="x"), "answer", ["a labelled text", "objective.kind: classification"]),
        (PAIR, "pair", ["an answer to train on", "objective.kind: sft", "prompt, chosen and rejected"]),
        (PAIR, "judged", ["an answer to train on", "label (true or false)"]),
        ({"text": "t"}, "labelled", ["an answer to train on", "text and label"]),
        ({"prompt": "q", **HALVES}, "labelled", ["a preference pair", "text and label"]),
        # of the right kind, but not right
        ({"prompt": "q", "chosen": "a"}, "pair", ["half of a preference pair"]),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "pair", ["half of a preference pair"]),
        ({"prompt": "q", "chosen": "a", "rejected": ""}, "pair", ["rejected is empty"]),
        ({"question": "q", **HALVES}, "pair", ["prompt is missing", 'rename "question" to prompt']),
        ({"prompt": "q", "chosen": [GOOD], "rejected": [QUESTION]}, "pair", ["rejected", "no answer"]),
        ({"chosen": [QUESTION, answer(), QUESTION, GOOD], "rejected": [QUESTION, BAD, QUESTION, BAD]}, "pair",
         ["differ at turn 2", "end both with the first answer"]),
        ({"prompt": "other", "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]}, "pair", ["prompt", "keep one"]),
        ({"prompt": [QUESTION, answer()], **HALVES}, "pair", ["prompt ends with assistant", "a turn of the user"]),
        ({"input": "q", "preferred_output": [GOOD], "non_preferred_output": [BAD]}, "pair", ["input is a string"]),
        ({"input": {"messages": ASKED, "tools": CALL}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
         "pair", ["input.tools[0] is a call"]),
        ({"prompt": "q", "chosen": [QUESTION, GOOD, QUESTION], "rejected": [QUESTION, BAD]}, "pair",
         ["chosen ends with user"]),
        (HALVES, "pair", ["prompt is missing"]),
        ({"prompt": [QUESTION], **HALVES, "history": [["q", "a"]]}, "pair", ["history beside turns"]),
        ({**PAIR, "completion": [QUESTION, answer()], "label": 1}, "judged", ["completion is a conversation"]),
        ({**PAIR, "label": "good"}, "judged", ["label is a string", "true or false"]),
        ({**PAIR, "label": 2}, "judged", ["label is a number (2)"]),
        ({"text": "t", "label": {"a": 1}}, "labelled", ["label is an object"]),
        ({"text": "t", "label": ["a", 1]}, "labelled", ["label[1] is a number"]),
        ({"text": "t", "label": ""}, "labelled", ["label is empty"]),
        ({"text": "t", "label": math.nan}, "labelled", ["label is a number (nan)"]),
        ({"text": "t", "labels": "x"}, "labelled", ["an answer to train on", '"labels" meant']),
        ({**PAIR, "label": "x"}, "labelled", ["completion beside prompt would not be read"]),
        (talk(*ASKED[:1], label="x"), "labelled", ["no turn of the user"]),
    ],
)  # fmt: skip
def test_a_row_of_another_kind_says_what_to_do(row: dict[str, Any], rows: RowKind, words: list[str]) -> None:
    with pytest.raises(RowFault) as fault:
        parsed(row, rows)
    for word in words:
        assert word in str(fault.value), str(fault.value)


def test_a_pair_of_equal_answers_teaches_nothing() -> None:
    (warning,) = parsed({"prompt": "q", "chosen": "a", "rejected": "a"}).warnings
    assert "same answer" in warning


def test_what_a_pair_does_not_use_is_said() -> None:
    found = parsed({"prompt": "q", "instruction": "Translate.", **HALVES, "messages": [QUESTION, GOOD]})
    assert found.ignored_keys == {"instruction", "messages"}
    assert found.warnings == ["instruction is not in the prompt; write it into the prompt if needed"]


def test_every_format_takes_a_weight() -> None:
    for row in (PAIR, talk(QUESTION, answer()), {"text": "t"}, {"prompt": "q", **HALVES}, {"text": "t", "label": "x"}):
        for given, weight in ((0, 0.0), (2.5, 2.5), (None, 1.0)):
            assert parsed({**row, "weight": given}).weight == weight


def test_the_rows_of_the_manual_are_of_the_kinds_that_it_says() -> None:
    page = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")
    blocks = [block.splitlines() for block in re.findall(r"```json\n(.*?)```", page, re.DOTALL)]
    kinds = [[kind_of_format(detect_format(json.loads(line))) for line in block] for block in blocks]
    assert kinds == [["answer"] * 5, ["pair", "judged", "labelled"]]


TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
RESULT = {"role": "tool", "tool_call_id": "c", "content": "r"}


@pytest.mark.parametrize(
    ("row", "messages", "trained"),
    [
        ({"prompt": [QUESTION], "completion": [answer()]}, [(U, "q"), (A, "a")], "1"),
        ({"prompt": "p", "completion": answer()}, [(U, "p"), (A, "a")], "1"),
        ({"prompt": [QUESTION], "completion": "c"}, [(U, "q"), (A, "c")], "1"),
        ({"prompt": [QUESTION, answer(), QUESTION], "completion": [answer()]},
         [(U, "q"), (A, "a"), (U, "q"), (A, "a")], "01"),
        ({"prompt": [QUESTION], "completion": [answer(content=None, tool_calls=CALL), RESULT, answer()],
          "tools": [TOOL]}, [(U, "q"), (A, ""), ("tool", "r"), (A, "a")], "11"),
    ],
)  # fmt: skip
def test_prompt_and_completion_as_turns_train_the_completion(
    row: dict[str, Any], messages: list[tuple[str, str]], trained: str
) -> None:
    found = parsed(row)
    assert said(found) == messages
    assert "".join(str(int(turn.trained)) for turn in found.messages if turn.role == A) == trained
    assert len(found.tools) == len(row.get("tools", ()))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": [QUESTION, answer()], "completion": [answer()]}, "one of the two is not trained"),
        ({"prompt": [QUESTION], "completion": []}, "completion is an empty list"),
        ({"prompt": [QUESTION], "completion": [QUESTION]}, "holds no answer"),
        ({"prompt": [QUESTION], "completion": "c", "history": [["a", "b"]]}, "history beside turns"),
    ],
)
def test_prompt_and_completion_as_turns_with_nothing_to_train(row: dict[str, Any], words: str) -> None:
    with pytest.raises(RowFault, match=words):
        parsed(row)


def test_results_stand_in_the_order_of_their_calls() -> None:
    """Most templates write results without ids, so that the first is read as that of the first call."""
    calls = [{**CALL[0], "id": id} for id in ("c1", "c2")]
    results = [{"role": "tool", "tool_call_id": id, "content": f"of {id}"} for id in ("c2", "c1")]
    found = parsed(talk(QUESTION, answer(content=None, tool_calls=calls), *results, answer()))
    assert said(found)[2:4] == [("tool", "of c1"), ("tool", "of c2")]
    assert "ordered_results" in found.outcomes
    with pytest.raises(RowFault, match=r'messages\[3\] stands before the result of a call \("f"\)'):
        parsed(talk(QUESTION, answer(content=None, tool_calls=calls), results[1], answer()))
