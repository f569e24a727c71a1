"""Tokens of an answer to reasoning, content and calls; stop strings; whatever the pieces are."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from lmtune.data.rendering import Renderer, Template
from lmtune.serve.openai.text import ChatText, PlainText, StopStrings
from tests.tokenizers import CALLS_AS_JSON, CALLS_AS_TEXT, CALLS_END_APART, CHATML, QWEN35, make_tokenizer

SIZES = (1, 2, 7, 1000)


def read(
    said: str, template: str, size: int, option: Template = "auto", stops: Sequence[str] = (), tools: bool = False
):
    """(content, reasoning, calls, pieces of content) of a reply that comes `size` tokens at a time."""
    renderer = Renderer(make_tokenizer(template), option)
    text = ChatText(renderer, stops, tools)
    ids = renderer.tokenizer.encode(said, add_special_tokens=False)
    pieces = []
    for start in range(0, len(ids), size):
        pieces.append(text.feed(ids[start : start + size]))
        if text.has_ended:
            break
    pieces.append(text.finish())
    calls = [(call.name, json.loads(call.arguments)) for piece in pieces for call in piece.calls]
    content = [piece.content for piece in pieces if piece.content]
    return "".join(content), "".join(piece.reasoning for piece in pieces), calls, content


@pytest.mark.parametrize("size", SIZES)
def test_text_comes_through_whole(size: int) -> None:
    said = "  An answer: <think is no tag>,\n\n two lines and 你好 "
    content, reasoning, calls, pieces = read(said, CHATML, size)
    assert (content, reasoning, calls) == (said, "", [])
    assert size > 7 or len(pieces) > 3


@pytest.mark.parametrize("size", SIZES)
def test_reasoning_is_a_field_of_its_own(size: int) -> None:
    content, reasoning, _, _ = read("first this,\n\nthen that\n</think>\n\nThe answer.", QWEN35, size, "thinking")
    assert (content, reasoning) == ("The answer.", "first this,\n\nthen that")
    content, reasoning, _, _ = read("it never ends", QWEN35, size, "thinking")
    assert (content, reasoning.strip()) == ("", "it never ends")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("template", "said", "text"),
    [
        (CALLS_AS_JSON, '\n<call>{"name": "lamp", "arguments": {"on": true}}</call>', ""),
        (CALLS_AS_JSON, 'Let me see.\n<call>{"name": "lamp", "arguments": {"on": true}}</call>', "Let me see."),
        (CALLS_AS_TEXT, '<pad>lamp\n```json\n{"on": true}\n```', ""),
        (CALLS_END_APART, ' to=lamp<pad>{"on": true}</s>', ""),
    ],
)
def test_calls_are_read_out_of_the_reply(size: int, template: str, said: str, text: str) -> None:
    content, _, calls, _ = read(said, template, size, tools=True)
    assert calls == [("lamp", {"on": True})]
    assert content == text


@pytest.mark.parametrize("size", SIZES)
def test_what_only_looks_like_a_call_is_text(size: int) -> None:
    said = "Not one: <call>{broken"
    assert read(said, CALLS_AS_JSON, size, tools=True)[0] == said
    assert read('<call>{"name": "a", "arguments": {}}</call>', CALLS_AS_JSON, size, tools=False)[2] == []


@pytest.mark.parametrize("size", SIZES)
def test_a_stop_string_may_lie_across_tokens(size: int) -> None:
    assert read("one two three four", CHATML, size, stops=("o three",))[0] == "one tw"
    assert read("one two three four", CHATML, size, stops=("none", "four five"))[0] == "one two three four"
    renderer = Renderer(make_tokenizer(CHATML), "auto")
    plain = PlainText(renderer, ("three",))
    ids = renderer.tokenizer.encode("one two three four", add_special_tokens=False)
    said = "".join(plain.feed(ids[start : start + size]).content for start in range(0, len(ids), size))
    assert said + plain.finish().content == "one two "
    assert plain.has_ended


def test_what_may_begin_a_stop_string_waits_and_nothing_else() -> None:
    stops = StopStrings(("abab", "xyz"))
    assert [stops.feed(text) for text in ("1a", "b", "a", "c", "xy", "a")] == ["1", "", "", "abac", "", "xya"[:2]]
    assert stops.finish() == "a"
