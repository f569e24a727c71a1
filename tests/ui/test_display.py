"""What the chatbot is given to show."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from lmtune.data.types import Message
from lmtune.inference.chat import AnswerInfo
from lmtune.serve.studio.display import MATHS, harmless, notes, origin, plain, shown, status, typed

JOINER, SEPARATOR = "\u2060", "\u2063"


def texts(entries: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(entry["role"], entry["content"][0]["text"]) for entry in entries]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a < b & c > d", "a < b & c > d"), ("<b>bold</b>", "<*b>bold<*/b>"), ("<!-- no -->", "<*!-- no -->"),
        ("&lt;b&gt; &#60;", "&*lt;b&*gt; &*#60;"), ("![x](http://a/b.png)", "!*[x](http://a/b.png)"),
        ("[!\\[x](y)", "[!*\\[x](y)"), ("[x]: /y 'z'", "[x]*: /y 'z'"),
        ("`<b>` and <b>", "`<*b>` and <*b>"), ("``a ` <b>`` <i>", "``a ` <*b>`` <*i>"), ("", ""),
        ("one ` tick <b>", "one ` tick <*b>"), ("text ```<b>``` text", "text `*`*`<*b>`*`*` text"),
        ("    ```\n    <b>", "    `*`*`\n    <*b>"), ("> ~~~\n> <b>", "> ~*~*~\n> <*b>"), ("~~a~~", "~~a~~"),
        ("``` `\n<b>", "`*`*` `\n<*b>"), ("```a b\n<b>", "`*`*`a b\n<*b>"), ("<\u2060b>\u2063", "<*b>"),
        ("<b\r&lt;\r\n![", "<*b\n&*lt;\n!*["),
    ],
)  # fmt: skip
def test_nothing_outside_code_is_live(text: str, wanted: str) -> None:
    assert harmless(text) == wanted.replace("*", JOINER)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("```html\n<b>&amp;</b>\n```\n<b>", "```html\n<b>&amp;</b>\n```\n\n<*b>"),
        ("a\n\n``` C++ \nvector<int>\n````~\t", "a\n\n```c++\nvector<int>\n```"),
        ("```\n<b> never closed", "```\n<b> never closed"), ("```", "```"), ("```\n", "```\n"),
        ("~~~\n<b>\n~~~\n<b>", "```\n<b>\n```\n\n<*b>"), ("~~~\n```\n~~~", "````\n```\n````"),
        ("~~~\n`````x\n~~~", "``````\n`````x\n``````"), ("````\n```\n````", "````\n```\n````"),
        ("```\na\n```\n```\nb\n```", "```\na\n```\n\n```\nb\n```"),
        ("- a\n  ```\n  <b>\n\t<i>\n    c\n  ```\n- d", "- a\n\n```\n<b>\n\t<i>\n  c\n```\n\n- d"),
        ("```\n    ```\n<b>\n   ```", "````\n    ```\n<b>\n````"), ("```\r\n<b>\r```\r", "```\n<b>\n```\n"),
        ("```\n<b>\f\n```\u2028\n```", "````\n<b>\f\n```\u2028\n````"),
        ("```mermaid\n<b>\n```", "```\n<b>\n```"), ("```Mermaid", "```"), ("```constructor", "```"),
        ("```cpp\n", "```c\n"),
    ],
)  # fmt: skip
def test_blocks_of_code_keep_every_letter_between_fences_of_one_form(text: str, wanted: str) -> None:
    assert harmless(text) == wanted.replace("*", JOINER)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("$$a$$ and \\(b\\) and \\[c\\]", "*$$a$$* and *\\(b\\)* and *\\[c\\]*"), ("$$$$", "$$$$"),
        ("$$\n```\n$$\n```\n$$", "$$\n\n```\n$$\n```\n\n$$"), ("\\) \\( \\] $$", "\\) \\( \\] $$"),
        ("$$ \\( $$ \\)", "*$$ \\( $$* \\)"), ("\\( \\( $$$a$$", "\\( \\( *$$$a$$*"),
    ],
)  # fmt: skip
def test_maths_ends_before_the_next_block_of_code(text: str, wanted: str) -> None:
    assert harmless(text) == wanted.replace("*", SEPARATOR)
    assert {delimiter["left"][0] + delimiter["right"][-1] for delimiter in MATHS} == {SEPARATOR * 2}


HTML = '<b><img src="/theme.css?leak=1">'
FORM = "<form><button>x</button><input></form><a name=x>y</a><details><summary>z</summary></details><svg></svg>"
ATTACKS = [
    HTML, FORM, f"\\`{FORM}\\`", f"`{HTML}`", f"\\`{HTML}\\`", f"`` ` ``{HTML}`", f"``a`{HTML}``", f"a\\\\`{HTML}`",
    f"`a\n\n{HTML}`",
    f"\n\n``` `\n\n{HTML}", f"\n\n~~~ `\n~~~\n{HTML}", f"```\n~~~\n```\n{HTML}\n```", f"````\n```\n{HTML}\n```",
    f"1. a\n   ```\n\n{HTML}", f"- a\n    ```\n\n{HTML}\n", f"-\n\n  ```\n{HTML}", f"10) a\n\n    ```\n\n{HTML}",
    f"> ```\n{HTML}\n```", f"> a\n```\n> {HTML}\n```\n{HTML}", f">```\n> {HTML}", f"- > ```\n{HTML}",
    f"```mermaid\ngraph TD\nA[{HTML}]\n```", f"```Mermaid\n{HTML}\n```", f"~~~ mermaid\n{HTML}\n~~~",
    f"    ```mermaid\n    {HTML}\n    ```", f"a\n```mermaid\n{HTML}```\n", f"> ```mermaid\n> {HTML}\n> ```",
    "\\`![x](/theme.css?leak=1)\\`", "![x][y]\n\n[y]: /theme.css?leak=1", "[!\\[x\\](/theme.css?leak=1)](y)",
    "|a|\n|-|\n|!\\[x](/theme.css?leak=1)|", f"|a|\n|-|\n|`{HTML}\\|`|\n```\n{HTML}",
    f'[x]: y "\n\n```\n"\n{HTML}\n\n```\n', f"[x]: y (\n\n```\n)\n{HTML}\n\n```\n", f"[x]:\n```\n{HTML}\n```",
    f"$$\n\n```\n$$\n{HTML}\n```", f"\\[\n```\n\\]\n{HTML}\n```", f"$$\n\n```\n{HTML}\n```\n\n$$\n{HTML}",
    f"```\n\\(\n```\n\\) {HTML}\n```\n{HTML}\n```", f"```\n$$\n```\na $$ b\n```\n{HTML}\n```", f"$${HTML}$$",
    f"\u2063$$\n\n```\n$$\u2063\n{HTML}\n```", f"%%%LATEX_BLOCK_0%%% $$&lt;b&gt;{HTML}$$",
    f"```\r{HTML}\r```\r{HTML}", f"```\f\n{HTML}\n```", f"```\n{HTML}\n```\f\n{HTML}", f"a\u2028```\n{HTML}\n```",
    f"```\u2028{HTML}\n", f"\t```\n{HTML}", f" \t```\n\t{HTML}\n```\n{HTML}", f"```\n{HTML}\n\t```\n{HTML}",
    f"```a\x85{HTML}\n```\n{HTML}", f"<!--\n```\n-->{HTML}\n```", f"<pre>\n```\n</pre>{HTML}\n```",
    f"a\n===\n```\n---\n{HTML}", "&lt;b&gt;&#60;b&#62;", "<http://a.example/>", f"[^1]: ```\n{HTML}\n\n[^1]",
    f"<\u2060b>x</\u2060b>{HTML}", f"<\nb>{HTML}", f"<\0b>{HTML}", f"`````{HTML}```", f"~~~~{HTML}~~~",
]  # fmt: skip
PARSERS = [
    MarkdownIt("commonmark", {"html": True}),
    MarkdownIt("gfm-like", {"html": True, "linkify": False}),
]
LIVE = {"html_inline", "html_block", "image"}


def live(text: str) -> list[str]:
    """What parsers of Markdown take for HTML or a picture in what is shown for `text`, or for a block that is drawn."""
    found = []
    for parser in PARSERS:
        for token in parser.parse(harmless(text)):
            found += [part.content for part in [token, *(token.children or [])] if part.type in LIVE]
            found += [token.info] * (token.type == "fence" and token.info.lower().startswith("mermaid"))
    return found


@pytest.mark.parametrize("text", ATTACKS)
def test_no_attack_is_live(text: str) -> None:
    assert live(text) == []


PIECES = [
    "`", "``", "```", "````", "~~~", "\\", "\n", "\n\n", "\r", " ", "    ", "\t", "> ", "1. ", "- ", "<b>",
    "<img src=x>", "![x](y)", "[x]: y \"", '"', "[", "](y)", "&lt;", "$$", "\\[", "\\]", "mermaid", "|", "|-|",
    "a", "\f",
]  # fmt: skip


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=25).map("".join))
def test_no_text_is_live(text: str) -> None:
    assert live(text) == []
    assert harmless(typed(harmless(text))) == harmless(text)


@given(st.text(st.sampled_from("ab<>&!`~[]()/#;:$\\ \"'"), max_size=60))
def test_only_joiners_and_separators_are_added_to_a_line_and_an_edit_takes_them_away(text: str) -> None:
    text = f"a{text}"  # a line that is no fence
    assert typed(harmless(text)) == text
    assert typed([{"type": "text", "text": harmless(text)}]) == text


def test_an_answer_under_way_is_only_appended_to() -> None:
    text = "So:\n\n```python\nif a < b & c:\n    print('<b>')\n"
    ends = range(text.index("\n", 5) + 1, len(text) + 1)
    assert all(harmless(text[:end]) == text[:end] for end in ends)


@pytest.mark.parametrize(
    "text",
    ["`" * 100_000, "`" * 100_000 + "a", "```\n" * 25_000, "```" + " " * 100_000 + "!", "\\[" * 50_000, "$" * 100_000,
     "!" + "\\" * 100_000, "```\n" + "`" * 100_000 + "a", "`" * 50_000 + "\na" * 25_000, " " * 100_000 + "`"],
    ids=lambda text: text[:6],
)  # fmt: skip
def test_time_is_linear(text: str) -> None:
    begin = time.process_time()
    harmless(text)
    assert time.process_time() - begin < 1


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


def test_each_answer_says_who_gave_it_and_how_it_ended() -> None:
    asked = (Message("user", "a"), None)
    turns = [
        asked, (Message("assistant", "<think>b</think>c"), AnswerInfo("shop", False, "stop")),
        asked, (Message("assistant", "d"), AnswerInfo("shop", True, "length")),
        asked, (Message("assistant", "e"), AnswerInfo("plain", None, "stopped")),
    ]  # fmt: skip
    above = [line for line, _ in notes(turns)]
    assert above == [
        "", "shop · tuned", "", "", "shop · base · cut at the limit", "", "plain · stopped",
    ]  # fmt: skip
    assert len(above) == len(shown([message for message, _ in turns]))


@pytest.mark.parametrize("text", ["`List<String>` && b", "~~~ C++\na<b>\n~~~\nc\r\nd", "$$a<b$$", "<b>&lt;\n\n![x](y)"])
def test_what_a_copy_button_gives_is_what_was_said(text: str) -> None:
    turns = [(Message("user", text), None), (Message("assistant", text), AnswerInfo("shop", False, "stop"))]
    for entry, (_, original) in zip(shown([message for message, _ in turns]), notes(turns), strict=True):
        assert (original or re.sub(f"[{JOINER}{SEPARATOR}]", "", entry["content"][0]["text"])) == text


def test_a_cut_answer_offers_to_go_on_once_it_is_over() -> None:
    messages = [Message("user", "a"), Message("assistant", "b")]
    assert "options" not in shown(messages)[-1]
    assert "options" not in shown(messages, answering=True, can_continue=True)[-1]
    assert shown(messages, can_continue=True)[-1]["options"] == [{"label": "Continue", "value": "continue"}]


def test_a_status_line_is_plain_text() -> None:
    assert status("") == ""
    assert status("<b> *x*", is_error=True) == (f'<div class="error" role="alert">{plain("<b> *x*")}</div>')
    assert plain("<b> *x*") == "&#60;b&#62; &#42;x&#42;"
