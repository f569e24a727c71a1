"""Answers that have to be a call of a tool."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from lmtune.serve.openai.text import ChatText
from tests.chat_models import chat_model
from tests.serve.api_server import Api, api_of
from tests.tokenizers import CALLS_AS_JSON, CALLS_AS_TEXT, CALLS_AS_XML, CALLS_END_APART

ASKED: list[Any] = [{"role": "user", "content": "hello"}]
# calls right behind the mark of the assistant
BEHIND_THE_MARK = CALLS_AS_JSON.replace("\n<call>", "<call>")
NAMES = {
    "behind": BEHIND_THE_MARK,
    "json": CALLS_AS_JSON,
    "text": CALLS_AS_TEXT,
    "apart": CALLS_END_APART,
    "xml": CALLS_AS_XML,
}


def tool(name: str, **properties: Any) -> Any:
    parameters = {
        "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False,
    }  # fmt: skip
    return {"type": "function", "function": {"name": name, "description": "…", "parameters": parameters}}


TOOLS = [tool("lamp", on={"type": "boolean"}), tool("door", wide={"$ref": "#/$defs/width"})]
TOOLS[1]["function"]["parameters"]["$defs"] = {"width": {"enum": [1, 2, 3]}}


@pytest.fixture(scope="module")
def api() -> Iterator[Api]:
    with api_of({name: chat_model(seed=3, template=template) for name, template in NAMES.items()}) as one:
        yield one


@pytest.mark.parametrize("model", ["behind", "json", "text", "apart"])
@pytest.mark.parametrize("seed", range(3))
def test_required_is_one_call_of_a_tool(api: Api, model: str, seed: int) -> None:
    answer = api.client.chat.completions.create(
        model=model, messages=ASKED, tools=TOOLS, tool_choice="required", seed=seed, max_tokens=200
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls or ()
    assert call.type == "function"
    given = json.loads(call.function.arguments)
    assert (call.function.name, given.keys()) in (("lamp", {"on"}), ("door", {"wide"}))
    assert given.get("on") in (True, False, None)
    assert given.get("wide") in (1, 2, 3, None)


@pytest.mark.parametrize("model", ["json", "text", "apart"])
@pytest.mark.parametrize("name", ["lamp", "door"])
def test_a_named_tool_is_called_also_in_a_stream(api: Api, model: str, name: str) -> None:
    chunks = list(api.client.chat.completions.create(
        model=model, messages=ASKED, tools=TOOLS, tool_choice={"type": "function", "function": {"name": name}},
        max_tokens=200, stream=True,
    ))  # fmt: skip
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert [call.function.name for call in calls if call.function] == [name]
    assert not any(chunk.choices[0].delta.content for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize(
    ("model", "tools", "choice", "says"),
    [
        ("json", TOOLS, {"type": "function", "function": {"name": "oven"}}, "oven; expected one of lamp, door"),
        ("json", None, "required", "needs tools"),
        ("xml", TOOLS, "required", "does not write calls as JSON"),
        ("json", [tool("lamp", on={"type": "nothing"})], "required", "cannot be kept to"),
        ("json", [{"type": "function", "function": {"name": "lamp", "parameters": 5}}], "required", "schema of an obj"),
        (
            "json",
            [{"type": "function", "function": {"name": "lamp", "parameters": {"type": "array"}}}],
            "required",
            "expected the JSON schema of an object",
        ),
    ],
)
def test_what_cannot_be_called_is_said(api: Api, model: str, tools: Any, choice: Any, says: str) -> None:
    body = {"model": model, "messages": ASKED, "tool_choice": choice, **({"tools": tools} if tools else {})}
    with pytest.raises(openai.BadRequestError, match=says):
        api.client.chat.completions.create(**body)
    assert api.is_idle()


def test_a_model_without_a_place_for_tools_says_so_of_tools() -> None:
    with api_of({"bare": chat_model(seed=3)}) as bare:
        body = {"model": "bare", "messages": ASKED, "tools": TOOLS, "max_tokens": 2}
        answer = bare.http.post("/chat/completions", json=body)
        said = "tools: the chat template has no place for tools, and the model would not see them"
        assert answer.json()["error"] | {"type": "", "code": ""} == {
            "message": said, "type": "", "param": "tools", "code": ""
        }  # fmt: skip
        assert bare.http.post("/chat/completions", json={**body, "tool_choice": "none"}).status_code == 200


def test_one_call_alone_where_they_may_not_be_parallel() -> None:
    renderer = chat_model(seed=3, template=CALLS_AS_JSON).renderer
    said = renderer.tokenizer.encode('<call>{"name": "lamp", "arguments": {"on": true}}</call>' * 2)
    for most, number in ((None, 2), (1, 1)):
        text = ChatText(renderer, has_tools=True, most_calls=most)
        text.feed(said)
        assert [call.name for call in text.finish().calls] == ["lamp"] * number
