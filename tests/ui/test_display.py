"""What the chatbot is given to show."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from lmtune.data.types import Message
from lmtune.inference.chat import AnswerInfo
from lmtune.serve.studio.conversation import Turn
from lmtune.serve.studio.display import (
    Entry,
    escape_markdown,
    original_text,
    render_turns,
    sanitize_markdown,
    status_line,
)

JOINER, SEPARATOR = "\u2060", "\u2063"


@pytest.mark.parametrize(
    ("text", "wanted"),  # ^ a joiner, * a separator
    [
        ("a < b & c > d, ~~e~~", "a < b & c > d, ~~e~~"), ("<b>bold</b> &lt;", "<^b>bold<^/b> &^lt;"),
        ("![x](y) `<b>`\r\n[x]: /y", "!^[x](y) `<^b>`\n[x]^: /y"), ("<\u2060b>\u2063", "<^b>"),
        ("```html\n<b>&amp;</b>\n```\n<b>", "```html\n<b>&amp;</b>\n```\n\n<^b>"),
        ("a\n\n``` C++ \nvector<int>\n````~\t", "a\n\n```c++\nvector<int>\n```"),
        ("```\n<b> never closed", "```\n<b> never closed"), ("~~~\n```\n~~~", "````\n```\n````"),
        ("- a\n  ```\n  <b>\n\t<i>\n    c\n  ```\n- d", "- a\n\n```\n<b>\n\t<i>\n  c\n```\n\n- d"),
        ("```mermaid\n<b>\n```", "```\n<b>\n```"), ("```cpp\n", "```c\n"),
        ("$$a$$ and \\(b\\) and \\[c\\]", "*$$a$$* and *\\(b\\)* and *\\[c\\]*"), ("\\) \\( \\] $$", "\\) \\( \\] $$"),
        ("$$\n```\n$$\n```\n$$", "$$\n\n```\n$$\n```\n\n$$"), ("$$ \\( $$ \\)", "*$$ \\( $$* \\)"),
    ],
)  # fmt: skip
def test_only_code_and_maths_keep_every_letter(text: str, wanted: str) -> None:
    assert sanitize_markdown(text) == wanted.replace("^", JOINER).replace("*", SEPARATOR)


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
        for token in parser.parse(sanitize_markdown(text)):
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
    assert sanitize_markdown(original_text(sanitize_markdown(text))) == sanitize_markdown(text)


@given(st.text(st.sampled_from("ab<>&!`~[]()/#;:$\\ \"'"), max_size=60))
def test_only_joiners_and_separators_are_added_to_a_line_and_an_edit_takes_them_away(text: str) -> None:
    text = f"a{text}"  # a line that is no fence
    assert original_text(sanitize_markdown(text)) == text
    assert original_text([{"type": "text", "text": sanitize_markdown(text)}]) == text


def test_an_answer_under_way_is_only_appended_to() -> None:
    text = "So:\n\n```python\nif a < b & c:\n    print('<b>')\n"
    ends = range(text.index("\n", 5) + 1, len(text) + 1)
    assert all(sanitize_markdown(text[:end]) == text[:end] for end in ends)


@pytest.mark.parametrize(
    "text",
    ["`" * 100_000, "```\n" * 25_000, "```" + " " * 100_000 + "!", "\\[" * 50_000, "$" * 100_000,
     "!" + "\\" * 100_000, "`" * 50_000 + "\na" * 25_000],
    ids=lambda text: text[:6],
)  # fmt: skip
def test_time_is_linear(text: str) -> None:
    begin = time.process_time()
    sanitize_markdown(text)
    assert time.process_time() - begin < 1


def turns_of(*texts: str, info: AnswerInfo | None = None) -> list[Turn]:
    """Questions and answers by turns."""
    by = info or AnswerInfo("shop", False, "stop")
    return [
        (Message("assistant", text), by) if number % 2 else (Message("user", text), None)
        for number, text in enumerate(texts)
    ]


def shown(entries: Sequence[Entry]) -> list[tuple[str, str]]:
    return [(entry.value["role"], entry.value["content"][0]["text"]) for entry in entries]


def test_reasoning_is_an_entry_of_its_own() -> None:
    entries = render_turns(turns_of("Why?", "<think>\nhm <b>\n</think>\n\nBecause.", "    a\n  b"))
    assert shown(entries) == [
        ("user", "Why?"), ("assistant", f"hm <{JOINER}b>"), ("assistant", "Because."), ("user", "    a\n  b"),
    ]  # fmt: skip
    assert entries[1].value["metadata"] == {"title": "Thinking", "status": "done"}
    assert [entry.message for entry in entries] == [0, 1, 1, 2]
    assert [entry.label for entry in entries] == ["", "shop · tuned", "", ""]
    pending = render_turns(turns_of("Why?", "<think>\nhm"), answering=True)
    assert shown(pending) == [("user", "Why?"), ("assistant", "hm")]
    assert pending[1].value["metadata"]["status"] == "pending"


def test_how_an_answer_ended_is_shown_once_it_is_over() -> None:
    assert shown(render_turns(turns_of("a", ""), answering=True)) == [("user", "a")]
    assert shown(render_turns(turns_of("a", ""))) == [("user", "a"), ("assistant", "*(no answer)*")]
    for info, label in (
        (AnswerInfo("shop", True, "length"), "shop · base · cut at the limit"),
        (AnswerInfo("plain", None, "stopped"), "plain · stopped"), (AnswerInfo("shop", False, None), "shop · tuned"),
    ):  # fmt: skip
        assert render_turns(turns_of("a", "b", info=info))[1].label == label
    assert "options" not in render_turns(turns_of("a", "b"), answering=True, can_continue=True)[-1].value
    options = render_turns(turns_of("a", "b"), can_continue=True)[-1].value["options"]
    assert options == [{"label": "Continue", "value": "continue"}]


@pytest.mark.parametrize("text", ["`List<String>` && b", "~~~ C++\na<b>\n~~~\nc\r\nd", "$$a<b$$", "<b>&lt;\n\n![x](y)"])
def test_a_copy_button_gives_the_message(text: str) -> None:
    for entry in render_turns(turns_of(text, text)):
        assert (entry.copied or re.sub(f"[{JOINER}{SEPARATOR}]", "", entry.value["content"][0]["text"])) == text


def test_a_status_line_is_plain_text() -> None:
    assert escape_markdown("<b> *x*") == (text := "&#60;b&#62; &#42;x&#42;")
    assert status_line("<b> *x*", is_error=True) == f'<div class="error" role="alert">{text}</div>'
