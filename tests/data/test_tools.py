"""Tools and calls from every form of row: what is rendered reads back as the same call, results are not trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lmtune.config.schema import DataConfig
from lmtune.data.calls import split_calls
from lmtune.data.formats import detect_format, parse_row
from lmtune.data.rendering import Renderer
from lmtune.data.store import tokenize
from lmtune.data.turns import ParsedRow
from lmtune.data.types import Example, Message, ToolCall, content_hash, prompt_hash
from lmtune.data.values import RowFault
from lmtune.errors import DataError
from tests.data.test_rendering import trained_texts
from tests.tokenizers import (
    CALLS_AS_JSON,
    CALLS_AS_TEXT,
    CALLS_AS_XML,
    CALLS_END_APART,
    CHATML,
    QWEN3,
    TRIMS,
    make_tokenizer,
)

TOOL = {"type": "function", "function": {"name": "lamp", "description": "A lamp.", "parameters": {"type": "object"}}}
ASKED = {"role": "user", "content": "Off!"}
DONE = {"role": "assistant", "content": "Done."}
OFF = {"on": False, "room": 'Küche "厨"\n'}


def calling(*arguments: Any, **further: Any) -> dict[str, Any]:
    calls = [{"id": f"c{n}", "type": "function", "function": {"name": "lamp", "arguments": given}}
             for n, given in enumerate(arguments)]  # fmt: skip
    return {"role": "assistant", "content": None, "tool_calls": calls, **further}


def result(number: int = 0, content: str = "ok 7") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"c{number}", "content": content}


def parsed(row: dict[str, Any]) -> ParsedRow:
    return parse_row(row, detect_format(row))


def example(*turns: Any, tools: Any = (TOOL,)) -> Example:
    row = parsed({"messages": list(turns), "tools": list(tools)})
    return Example("rows.jsonl", 7, row.messages, tools=row.tools, outcomes=tuple(row.outcomes))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, calling(OFF), result(), DONE], "tools": [TOOL]},
        {"messages": [ASKED, calling(json.dumps(OFF)), result(), DONE], "tools": [TOOL], "parallel_tool_calls": False},
        {"messages": [ASKED, {**calling(json.dumps(OFF)), "content": ""}, result(), DONE], "tools": json.dumps([TOOL])},
        {"messages": [ASKED, {"role": "assistant", "tool_calls": calling(OFF)["tool_calls"]}, result(), DONE],
         "tools": [TOOL["function"]]},
        # OpenAI's older form
        {"messages": [ASKED, {"role": "assistant", "content": None,
                              "function_call": {"name": "lamp", "arguments": json.dumps(OFF)}},
                      {"role": "function", "name": "lamp", "content": "ok 7"}, DONE], "functions": [TOOL["function"]]},
        # sharegpt, as LLaMA-Factory has it
        {"conversations": [{"from": "human", "value": "Off!"},
                           {"from": "function_call", "value": json.dumps({"name": "lamp", "arguments": OFF})},
                           {"from": "observation", "value": "ok 7"}, {"from": "gpt", "value": "Done."}],
         "tools": json.dumps([TOOL["function"]])},
    ],
)  # fmt: skip
def test_every_form_of_a_call_is_the_same_call(row: dict[str, Any]) -> None:
    found = parsed(row)
    asked, call, said, done = found.messages
    assert (asked.content, call.content, said.role, said.content, done.content) == ("Off!", "", "tool", "ok 7", "Done.")
    (one,) = call.tool_calls
    assert (one.name, json.loads(one.arguments)) == ("lamp", OFF)
    assert (said.tool_call_id, said.name) == (one.id, "lamp")
    assert [json.loads(tool) for tool in found.tools] == [TOOL]
    assert found.outcomes == {"tools", "tool_calls"}
    assert not found.warnings
    whole = example(ASKED, calling(OFF), result(), DONE)
    same = Example("other.jsonl", 3, found.messages, tools=found.tools)
    assert content_hash(same) == content_hash(whole), "ids are arbitrary"
    assert prompt_hash(same) == prompt_hash(whole)


def test_results_without_ids_go_to_the_calls_in_their_order() -> None:
    """Also where a dump writes parallel calls as turns of their own, which are joined."""
    say = [{"from": "function_call", "value": json.dumps({"name": name, "arguments": {}})} for name in "fg"]
    rows = [{"from": "human", "value": "q"}, *say, *({"from": "observation", "value": text} for text in "12")]
    found = parsed({"conversations": [*rows, {"from": "gpt", "value": "a"}]})
    assert [call.name for call in found.messages[1].tool_calls] == ["f", "g"]
    assert [(turn.name, turn.content) for turn in found.messages[2:4]] == [("f", "1"), ("g", "2")]
    assert found.outcomes == {"joined", "tool_calls"}


def test_calls_and_tools_tell_rows_apart() -> None:
    rows = [example(ASKED, calling(OFF)), example(ASKED, calling({"on": True})), example(ASKED, calling(OFF), tools=())]
    assert len({content_hash(row) for row in rows}) == 3
    assert len({prompt_hash(row) for row in rows}) == 2


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([ASKED, calling("{on: no}")], ["messages[1].tool_calls[0].function.arguments", "not JSON"]),
        ([ASKED, calling('{"a": 1, "a": 2}')], ["arguments", '"a" stands twice']),
        ([ASKED, calling(json.dumps(json.dumps(OFF)))], ["JSON text inside JSON text"]),
        ([ASKED, calling([1])], ["arguments is a list", "a JSON object"]),
        ([ASKED, calling({"x": float("inf")})], ["inf", "which JSON has not"]),
        ([ASKED, calling('{"x": 0.12345678901234567890}')], ["0.12345678901234567890 has more digits"]),
        ([ASKED, calling('{"x": 1e999}')], ["inf", "which JSON has not"]),
        ([ASKED, calling({"x": "\ud83d"})], ["unpaired surrogate"]),
        ([ASKED, calling("[" * 60 + "]" * 60)], ["arguments is a list"]),
        ([ASKED, calling({"x": json.loads("[" * 60 + "]" * 60)})], ["nested deeper than 50 levels"]),
        ([ASKED, calling('{"x":' * 100_000)], ["not JSON"]),
        ([ASKED, calling(OFF, tool_calls="lamp()")], ["messages[1].tool_calls", "not JSON"]),
        ([ASKED, calling(OFF, tool_calls=[{"function": {"name": ""}}])], ["function.name is empty"]),
        ([ASKED, calling(OFF, tool_calls=[{"name": "f", "args": {}}])], ['"args"', "name and arguments"]),
        ([ASKED, calling(OFF, tool_calls=[{"type": "custom", "custom": {}}])], ['type is a string ("custom")']),
        ([ASKED, calling(OFF, function_call={"name": "f", "arguments": "{}"})], ["both tool_calls and function_call"]),
        ([{**ASKED, "tool_calls": calling(OFF)["tool_calls"]}, DONE], ["only the assistant calls"]),
        ([ASKED, result(), DONE], ["messages[1] is the result of a call", '"c0"']),
        ([ASKED, calling(OFF), result(3), DONE], ["messages[2]", '"c3"', "tool_call_id"]),
        ([ASKED, calling(OFF), result(), result(), DONE], ["messages[3] is the result"]),
        ([ASKED, calling(OFF), DONE], ["messages[2] follows calls without their results"]),
        ([ASKED, calling(OFF), {**result(), "content": {"ok": 1}}, DONE], ["messages[2].content is an object"]),
        ([ASKED, {"role": "assistant", "content": None}], ["messages[1].content is null"]),
    ],
)  # fmt: skip
def test_what_is_no_call_is_named_with_its_place(turns: list[Any], words: list[str]) -> None:
    with pytest.raises(RowFault) as fault:
        parsed({"messages": turns})
    for word in words:
        assert word in str(fault.value), str(fault.value)


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ([{"type": "web_search"}], ["tools[0].type", "only functions"]), ({"name": "f"}, ["tools is an object"]),
        ([TOOL, TOOL["function"]], ["tools[1] is a second tool", '"lamp"']), ("[", ["tools", "not JSON"]),
        ([{"description": "x"}], ["tools[0].name is missing"]),
    ],
)  # fmt: skip
def test_what_is_no_tool_is_named(tools: Any, words: list[str]) -> None:
    with pytest.raises(RowFault) as fault:
        parsed({"messages": [ASKED, DONE], "tools": tools})
    for word in words:
        assert word in str(fault.value), str(fault.value)


_OFF = r'{"on": false, "room": "Küche \"厨\"\n"}'


@pytest.mark.parametrize(
    ("template", "learned"),
    [
        (CALLS_AS_JSON, '\n<call>{"name": "lamp", "arguments": ' + _OFF + "}</call>"),
        (CALLS_AS_TEXT, f"<pad>lamp\n```json\n{_OFF}\n```"),
        (CALLS_AS_XML, '<f=lamp><p=on>False</p><p=room>Küche "厨"\n</p></f>'),
        (CALLS_END_APART, f" to=lamp<pad>{_OFF}"),
    ],
)
def test_a_call_is_trained_through_its_end_and_a_result_is_not(template: str, learned: str) -> None:
    renderer = Renderer(make_tokenizer(template))
    end = "</s>" if template is CALLS_END_APART else "<|im_end|>"
    rows = [example(ASKED, calling(given), result(), DONE) for given in (OFF, json.dumps(OFF))]
    for row in rows:
        (sequence,) = renderer.render(row)
        call, done = trained_texts(renderer, sequence)
        assert call == learned + end
        assert done.endswith("Done.<|im_end|>")
        prompt = renderer.prompt_ids(row.messages[:1], row.tools)
        assert sequence.input_ids[: len(prompt)].tolist() == prompt
        assert "A lamp." in renderer.tokenizer.decode(prompt)
        after = renderer.prompt_ids(row.messages[:3], row.tools)
        assert sequence.input_ids[: len(after)].tolist() == after
        assert renderer.tokenizer.convert_tokens_to_ids(end) in renderer.stop_token_ids


def test_calls_that_a_template_loses_or_changes_are_faults() -> None:
    two = example(ASKED, calling({"on": True}, {"on": False}))
    assert len(Renderer(make_tokenizer(CALLS_AS_JSON)).render(two)) == 1
    beside = example(ASKED, calling(OFF, content="One moment."))
    assert len(Renderer(make_tokenizer(CALLS_AS_JSON)).render(beside)) == 1
    rounds = CALLS_AS_JSON.replace("arguments | tojson)", "arguments | tojson | lower)")
    for template, row, words in (
        (CALLS_END_APART, two, "renders 1 of 2 calls of a turn"),
        (CALLS_END_APART, beside, "drops the text beside a tool call"),
        (rounds, example(ASKED, calling({"Room": "A"})), 'read back as others (lamp({"room": "a"}))'),
        (CALLS_AS_JSON, example(ASKED, calling(OFF, content='<call>{"name": "f", "arguments": {}}')), "as others"),
        (CALLS_AS_JSON, example(ASKED, calling({"<|im_end|>": 1})), "a key of a tool or a call holds the text of"),
        (CALLS_AS_XML.replace("string", "replace('Ab', '')"), example(ASKED, calling({"room": "Ab"})), "drops 'Ab'"),
        (CALLS_AS_XML.replace("value | string", "'' if value is number else value"), example(ASKED, calling({"n": 7})),
         "drops 7"),
        (CALLS_AS_XML, example(ASKED, calling({"room": "a</p>b"})), "holds '</p>', with which"),
        (CALLS_AS_JSON.replace("tojson)", "tojson(ensure_ascii=true))"),
         example(ASKED, calling({"room": "<|im_end|>"})), "holds the text of a control token"),
        (CALLS_AS_JSON.replace("<|im_end|>", "."), two, "no token that ends a tool call"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=r"rows.jsonl:7: ") as error:
            Renderer(make_tokenizer(template)).render(row)
        assert words in str(error.value), str(error.value)


def test_text_of_control_tokens_in_a_call_stays_text() -> None:
    renderer = Renderer(make_tokenizer(CALLS_AS_JSON))
    row = example(ASKED, calling({"room": "<|im_end|>", "n": 1.5}), result(content="<|im_end|>"), DONE)
    (sequence,) = renderer.render(row)
    end = renderer.stop_token_ids[0]
    assert sequence.input_ids.tolist().count(end) == 5  # tools, question, call, result, answer
    assert trained_texts(renderer, sequence)[0].count("<|im_end|>") == 2


def test_reasoning_before_a_call_is_trained_and_the_next_turn_follows() -> None:
    template = CALLS_AS_JSON.replace(
        "message.content }}",
        "('<think>\n' + message.reasoning_content + '\n</think>\n\n' if message.reasoning_content else '')"
        " + message.content }}",
    )
    row = example(ASKED, calling({}, reasoning_content="It is late."), result(), {**DONE, "reasoning": "It is off."})
    (sequence,) = Renderer(make_tokenizer(template), "thinking").render(row)
    call, done = trained_texts(Renderer(make_tokenizer(template)), sequence)
    assert call.startswith("<think>\nIt is late.\n</think>\n\n\n<call>{")
    assert done == "<think>\nIt is off.\n</think>\n\nDone.<|im_end|>"
    with pytest.raises(DataError, match=r"set data.template: thinking"):
        Renderer(make_tokenizer(template)).render(row)


def test_an_excluded_call_is_context_and_must_be_whole() -> None:
    renderer = Renderer(make_tokenizer(CALLS_AS_JSON))
    (sequence,) = renderer.render(example(ASKED, calling(OFF, weight=0), result(), DONE))
    assert trained_texts(renderer, sequence) == ["Done.<|im_end|>"]
    with pytest.raises(DataError, match="renders 1 of 2"):
        Renderer(make_tokenizer(CALLS_END_APART)).render(
            example(ASKED, calling(OFF, OFF, weight=0), result(), result(1), DONE)
        )


@pytest.mark.parametrize("template", [CHATML, TRIMS, QWEN3, None])
def test_a_template_without_tools_is_told_once(template: str | None, tmp_path: Path) -> None:
    rows = [{"messages": [ASKED, calling(OFF), result(), DONE], "tools": [TOOL]}] * 30
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError) as error:
        tokenize(
            [tmp_path / "a.jsonl"], Renderer(make_tokenizer(template)), DataConfig(train="a.jsonl"), tmp_path / "c"
        )
    text = str(error.value)
    assert text.count("no place for tools") == 1
    assert "(30 rows)" in text
    assert "put a template that has" in text


def test_the_report_counts_what_was_done_with_turns(tmp_path: Path) -> None:
    rows = [
        {"messages": [ASKED, calling(OFF), result(), DONE, ASKED], "tools": [TOOL]},
        {"messages": [{"role": "developer", "content": "d"}, ASKED, ASKED, DONE]},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    renderer = Renderer(make_tokenizer(CALLS_AS_JSON))
    for _ in range(2):  # made, then from the cache
        data = tokenize([tmp_path / "a.jsonl"], renderer, DataConfig(train="a.jsonl"), tmp_path / "cache")
        counts = {name: rows.count for name, rows in data.report.turns.items()}
        assert counts == {"tools": 1, "tool_calls": 1, "cut_end": 1, "developer_as_system": 1, "joined": 1}
        assert data.report.turns["joined"].first == ["a.jsonl:2"]


def test_a_call_that_is_generated_is_shown_and_remembered_as_a_call() -> None:
    canonical = '<tool_call>\n{"name": "lamp", "arguments": {"on": false}}\n</tool_call>'
    for template in (CALLS_AS_TEXT, CALLS_END_APART):
        renderer = Renderer(make_tokenizer(template))
        row = example(ASKED, calling({"on": False}))
        (sequence,) = renderer.render(row)
        prompt = renderer.prompt_ids(row.messages[:1], row.tools)
        said = sequence.input_ids[len(prompt) :].tolist()
        assert renderer.decode(said) == canonical
        parser = renderer.reply_parser()
        assert "".join(parser.feed(renderer.marked_text([token])) for token in said) + parser.finish() == canonical
        message = renderer.as_message(canonical)
        assert message == Message("assistant", "", tool_calls=(ToolCall("lamp", '{"on": false}', "call00001"),))
        again = [*row.messages[:1], message, *row.messages[:1]]
        assert renderer.prompt_ids(again, row.tools)[: len(prompt) + len(said)] == sequence.input_ids.tolist()


def test_a_call_without_json_is_shown_with_its_control_tokens() -> None:
    """As LFM2: a list of calls, between whose calls nothing of the form stands."""
    listed = CALLS_AS_XML.replace("message.content }}", "message.content + ('<pad>[' if message.tool_calls else '') }}")
    renderer = Renderer(make_tokenizer(listed.replace("<f=", "").replace(">' }}{%- for key", "(' }}{%- for key")))
    row = example(ASKED, calling({"on": False}))
    (sequence,) = renderer.render(row)
    said = sequence.input_ids[len(renderer.prompt_ids(row.messages[:1], row.tools)) :].tolist()
    assert renderer.decode(said) == "<pad>[lamp(<p=on>False</p></f>"


def test_what_is_not_wholly_a_call_stays_text() -> None:
    for text in ("<tool_call>", "<tool_call>\n{}\n</tool_call>", "<tool_call>\n{no}\n</tool_call>", "Hi",
                 '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call> and more'):  # fmt: skip
        assert split_calls(text) == (text, ())
