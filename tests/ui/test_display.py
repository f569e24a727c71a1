"""What the chatbot is given to show."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmtune.data.examples import Message
from lmtune.ui.display import harmless, origin, plain, shown, status, typed

JOINER = "\u2060"


def texts(entries: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(entry["role"], entry["content"][0]["text"]) for entry in entries]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a < b & c > d", "a < b & c > d"), ("<b>bold</b>", "<*b>bold<*/b>"), ("<!-- no -->", "<*!-- no -->"),
        ("&lt;b&gt; &#60;", "&*lt;b&*gt; &*#60;"), ("![x](http://a/b.png)", "!*[x](http://a/b.png)"),
        ("`<b>` and <b>", "`<b>` and <*b>"), ("``a ` <b>`` <i>", "``a ` <b>`` <*i>"),
        ("```html\n<b>&amp;</b>\n```\n<b>", "```html\n<b>&amp;</b>\n```\n<*b>"),
        ("```\n<b> never closed", "```\n<b> never closed"), ("~~~\n<b>\n~~~\n<b>", "~~~\n<b>\n~~~\n<*b>"),
        ("one ` tick <b>", "one ` tick <*b>"), ("text ```<b>``` text", "text ```<b>``` text"), ("", ""),
    ],
)  # fmt: skip
def test_nothing_outside_code_is_live(text: str, wanted: str) -> None:
    assert harmless(text) == wanted.replace("*", JOINER)


@given(st.text(st.sampled_from("ab<>&!`~[]()/#;\n \"'"), max_size=60))
def test_only_joiners_are_added_and_an_edit_takes_them_away(text: str) -> None:
    assert typed(harmless(text)) == text
    assert typed([{"type": "text", "text": harmless(text)}]) == text


def test_reasoning_is_an_entry_of_its_own() -> None:
    asked = Message("user", "Why?")
    entries = shown([asked, Message("assistant", "<think>\nhm <b>\n</think>\n\nBecause.")])
    assert texts(entries) == [("user", "Why?"), ("assistant", f"hm <{JOINER}b>"), ("assistant", "Because.")]
    assert entries[1]["metadata"] == {"title": "Thinking", "status": "done"}
    pending = shown([asked, Message("assistant", "<think>\nhm")], answering=True)
    assert texts(pending) == [("user", "Why?"), ("assistant", "hm")]
    assert pending[1]["metadata"]["status"] == "pending"


def test_an_edited_entry_is_found_behind_reasoning() -> None:
    messages = [
        Message("user", "a"), Message("assistant", "<think>b</think>c"), Message("user", "d"),
        Message("assistant", "e"),
    ]  # fmt: skip
    assert [origin(messages, index) for index in range(-1, 6)] == [-1, 0, 1, 1, 2, 3, -1]


def test_an_answer_without_a_word_is_shown_as_such_once_it_is_over() -> None:
    messages = [Message("user", "a"), Message("assistant", "")]
    assert texts(shown(messages, answering=True)) == [("user", "a")]
    assert texts(shown(messages)) == [("user", "a"), ("assistant", "*(no answer)*")]


def test_leading_blanks_of_code_stay() -> None:
    assert texts(shown([Message("user", "    x = 1\n  y")])) == [("user", "    x = 1\n  y")]


def test_a_status_line_is_plain_text() -> None:
    assert status("") == ""
    assert status("<b> *x*", is_error=True) == (f'<div class="error" role="alert">{plain("<b> *x*")}</div>')
    assert plain("<b> *x*") == "&#60;b&#62; &#42;x&#42;"
