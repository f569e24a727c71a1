"""The app as its user has it: in a headless Chromium, from the first question to the last setting.

Where Chromium is missing the tests are skipped, and fail with LMTUNE_REQUIRE_BROWSER=1, as CI has it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from tests.chat_models import parrot
from tests.ui.conftest import PATIENCE, RunningApp
from tests.ui.test_display import ATTACKS

pytestmark = [pytest.mark.browser, pytest.mark.slow]
FROM_TEXT = (  # a link in Markdown has a target
    ":is(b, img, a:not([target]), form, button, input, details, svg, .mermaid)"
    ":not(.copy_code_button, .copy_code_button *)"
)


class Tab:
    """The page in one browser tab, and what it asked of the network."""

    def __init__(self, browser: Browser, url: str, width: int = 1280, height: int = 800) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": height})
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on(
            "console", lambda message: self.complaints.append(message.text) if message.type == "error" else None
        )
        self.url = url
        self.page.goto(url)
        expect(self.page.locator("#question textarea")).to_be_visible()

    @property
    def question(self) -> Locator:
        return self.page.locator("#question textarea")

    @property
    def status(self) -> Locator:
        return self.page.locator("#status")

    def answers(self, column: int = 0) -> Locator:
        return self.page.locator(".answers").nth(column).locator(".bot.message")

    def questions(self, column: int = 0) -> Locator:
        return self.page.locator(".answers").nth(column).locator(".user.message")

    def set(self, name: str, value: str) -> None:
        """Type `value` into a field of the settings."""
        self.page.locator(f"#{name} :is(textarea, input:not([type=range]))").fill(value)

    def choose(self, mode: str) -> None:
        self.page.locator(f"#mode input[value={mode}]").check()

    def press(self, name: str) -> None:
        """Press the last of the buttons of that name in the chat."""
        self.page.locator(f".answers button[aria-label='{name}'], .answers button[title='{name}']").last.click()

    def speakers(self, column: int = 0) -> list[str]:
        """What stands above the answers."""
        return self.page.locator(".answers").nth(column).locator(".speaker").all_inner_texts()

    def send(self, text: str) -> None:
        self.question.fill(text)
        self.question.press("Enter")

    def ask(self, text: str, answer: str) -> None:
        """Send `text`, and wait until the last answer is `answer` and over."""
        self.send(text)
        expect(self.answers().last).to_have_text(answer)
        self.wait_for_end()

    def clipboard(self) -> str:
        return str(self.page.evaluate("navigator.clipboard.readText()"))

    def wait_for_end(self) -> None:
        expect(self.status).to_contain_text(re.compile("token"))

    def close(self) -> None:
        foreign = [url for url in self.requests if not url.startswith((self.url, "data:", "blob:"))]
        self.context.close()
        assert foreign == []
        assert self.complaints == []


@pytest.fixture
def open_tab(browser: Browser, app: RunningApp) -> Iterator[Callable[..., Tab]]:
    """Open the app; at the end no page may have asked another host for anything, or complained."""
    tabs: list[Tab] = []

    def new_tab(url: str = app.url, **size: int) -> Tab:
        tabs.append(Tab(browser, url, **size))
        return tabs[-1]

    yield new_tab
    for tab in tabs:
        tab.close()


def test_a_conversation(open_tab: Callable[..., Tab]) -> None:
    tab = open_tab()
    expect(tab.page.locator("#header")).to_contain_text("2.4 million parameters on the CPU, with its LoRA adapter.")
    expect(tab.page.locator("#header")).to_contain_text("Everything stays on this computer.")
    tab.page.locator(".answers .example", has_text="Where do customers").click()
    expect(tab.answers()).to_have_text("You asked: Where do customers park their cars?")
    tab.wait_for_end()
    tab.ask("And again", "You asked: And again")
    expect(tab.question).to_have_value("")
    assert tab.questions().all_inner_texts() == ["Where do customers park their cars?", "And again"]
    tab.page.locator(".answers button[aria-label='Edit'], .answers button[title='Edit']").first.click()
    editor = tab.page.locator(".answers textarea")
    expect(editor).to_have_value("Where do customers park their cars?")
    editor.fill("Hello <b>you</b>")
    tab.press("Submit")
    expect(tab.answers()).to_have_count(1)
    expect(tab.answers()).to_have_text(re.compile("You asked: Hello <\u2060?b>you<\u2060?/b>"))
    assert tab.questions().count() == 1
    tab.page.locator("#clear").click()
    expect(tab.answers()).to_have_count(0)
    expect(tab.questions()).to_have_count(0)
    tab.ask("New", "You asked: New")


def test_an_answer_streams_and_can_be_stopped(open_tab: Callable[..., Tab], app: RunningApp) -> None:
    tab = open_tab()
    tab.set("max-new-tokens", "3000")
    tab.send("count")
    expect(tab.answers()).to_contain_text("1 2 3")
    expect(tab.answers()).to_contain_text("20 21 22")
    expect(tab.page.get_by_role("button", name="Stop")).to_be_visible()
    tab.page.keyboard.press("Escape")
    expect(tab.page.get_by_role("button", name="Send")).to_be_visible()
    tab.wait_for_end()
    assert tab.speakers() == ["parrot · tuned · stopped"]
    assert len(tab.answers().inner_text()) < 4000
    assert app.activity.num_answering == 0
    tab.ask("Go on", "You asked: Go on")


def test_settings_reach_the_model_and_a_cut_answer_goes_on_where_it_was_cut(open_tab: Callable[..., Tab]) -> None:
    tab = open_tab()
    tab.set("max-new-tokens", "9")
    tab.ask("count", "1 2 3 4 5")
    expect(tab.status).to_contain_text("cut at the limit")
    assert tab.speakers() == ["parrot · tuned · cut at the limit"]
    tab.page.get_by_role("button", name="Continue").click()
    expect(tab.answers()).to_have_text("1 2 3 4 5 6 7 8 9")
    tab.set("max-new-tokens", "200")
    tab.set("temperature", "0.5")
    tab.page.locator("#temperature input[type=number]").press("Tab")
    tab.set("seed", "1234")
    tab.ask("system", "none")
    expect(tab.status).to_contain_text("seed 1234")
    expect(tab.page.get_by_role("button", name="Continue")).to_have_count(0)
    tab.set("system", "Be brief, *please*.")
    tab.press("Retry")
    expect(tab.answers().last).to_have_text("Be brief, please.")
    assert tab.questions().count() == 2


def test_base_and_tuned_side_by_side_come_back_when_the_page_is_loaded_again(open_tab: Callable[..., Tab]) -> None:
    tab = open_tab()
    tab.ask("one", "You asked: one")
    tab.choose("base")
    expect(tab.page.locator(".answers").first).to_contain_text("Base model")
    tab.ask("two", "Base heard: two")
    tab.choose("both")
    expect(tab.answers(1)).to_have_count(2)
    tab.ask("three", "You asked: three")
    expect(tab.answers(1).last).to_have_text("Base heard: three")
    tab.page.reload()
    expect(tab.answers(1).last).to_have_text("Base heard: three")
    expect(tab.page.locator("#mode input[value=both]")).to_be_checked()
    assert tab.speakers() == ["parrot · tuned", "parrot · base", "parrot · tuned"]
    assert tab.speakers(1) == ["parrot · tuned", "parrot · base", "parrot · base"]
    tab.choose("tuned")
    expect(tab.page.locator(".answers").nth(1)).to_be_hidden()
    tab.press("Undo")
    expect(tab.question).to_have_value("three")
    assert tab.questions().all_inner_texts() == ["one", "two"]
    tab.page.locator("#clear").click()
    expect(tab.answers()).to_have_count(0)
    tab.page.reload()
    expect(tab.page.locator(".answers .example").first).to_be_visible()
    expect(tab.questions()).to_have_count(0)


def test_on_a_phone_what_is_wrong_is_said_in_sight_and_the_question_kept(open_tab: Callable[..., Tab]) -> None:
    tab = open_tab(width=390, height=844)
    expect(tab.page.locator("#seed")).to_be_hidden()
    tab.page.get_by_role("button", name="Settings").click()
    expect(tab.page.locator("#mode")).to_be_in_viewport(ratio=1)
    tab.set("seed", "-1")
    tab.page.keyboard.press("Escape")
    expect(tab.page.locator("#seed")).to_be_hidden()
    tab.send("Hello")
    expect(tab.page.locator("#status [role=alert]")).to_contain_text("seed: '-1'")
    expect(tab.question).to_have_value("Hello")
    tab.page.get_by_role("button", name="Settings").click()
    tab.set("seed", "")
    tab.page.keyboard.press("Escape")
    tab.send("word " * 15_000)
    expect(tab.page.locator("#status [role=alert]")).to_contain_text("reads at most 4096; clear it, or shorten")
    expect(tab.question).to_have_value("word " * 15_000)
    for part in ("#question .submit-button", "#status [role=alert]", "#clear"):
        expect(tab.page.locator(part)).to_be_in_viewport(ratio=1)
    assert "Traceback" not in tab.page.content()
    tab.ask("An unbroken " + "w" * 200, "You asked: An unbroken " + "w" * 200)
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 390


def test_model_output_is_never_html(open_tab: Callable[..., Tab]) -> None:
    tab = open_tab()
    evil = '<img src="http://evil.example/a.png" onerror="document.title=1"> <script>document.title=2</script> '
    evil += (
        "![x](http://evil.example/b.png) <style>body{display:none}</style> [k](javascript:document.title=3) &lt;i&gt;"
    )
    tab.send(evil)
    expect(tab.answers()).to_contain_text("&")
    tab.wait_for_end()
    shown = tab.answers().inner_text().replace("\u2060", "")
    assert '<img src="http://evil.example/a.png" onerror="document.title=1">' in shown
    assert "<script>document.title=2</script>" in shown
    assert "&lt;i&gt;" in shown
    assert tab.page.locator(".answers .message img, .answers .message script").count() == 0
    assert tab.page.locator(".answers .message a[href^='javascript']").count() == 0
    assert tab.page.title() == "parrot · lmtune"
    tab.ask("`<b>` is **bold**", "You asked: <b> is bold")
    assert tab.answers().last.locator("code").inner_text() == "<b>"


def test_no_attack_is_live(open_tab: Callable[..., Tab], start_app: Callable[..., Iterator[RunningApp]]) -> None:
    """A quarter of them; tests/ui/test_display.py has them all, with other parsers."""
    running = start_app(parrot())
    tab = open_tab(next(running).url)
    for attack in ATTACKS[::4]:
        tab.send(f"So:\n\n{attack}\n\nover")
        expect(tab.answers()).to_contain_text("over")
        tab.wait_for_end()
        bubbles = tab.page.locator(".answers .message .md")
        assert bubbles.count() == 2, attack
        assert bubbles.locator(FROM_TEXT).evaluate_all("found => found.map(one => one.outerHTML)") == [], attack
        tab.page.locator("#clear").click()
        expect(tab.answers()).to_have_count(0)
    assert [url for url in tab.requests if "leak" in url] == []
    next(running, None)


def test_code_and_maths_are_shown_as_they_were_said(open_tab: Callable[..., Tab]) -> None:
    tab = open_tab()
    code = "vector<int> a;  # &amp; ![x](y) $$\nif b<c and d&e:\n    s = r'\\[<b>\\]' \"``\""
    tab.send(f"Start:\n```constructor\na\n```\nSo:\n```python\n{code}\n```\nand \\(x^2\\) or $$y < z$$ over")
    expect(tab.answers()).to_contain_text("over")
    tab.wait_for_end()
    assert tab.answers().locator("pre code").all_text_contents() == ["a\n", code + "\n"]
    assert tab.answers().locator("pre code.language-python .token").count() > 0
    expect(tab.answers().locator(".katex")).to_have_count(2)
    assert tab.answers().locator(".katex-display, .katex-error").count() == 1
    assert "\u2063" not in tab.answers().inner_text()
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.answers().locator(".copy_code_button").last.click()
    assert tab.clipboard().rstrip("\n") == code


def test_what_is_copied_is_what_was_said(open_tab: Callable[..., Tab]) -> None:
    tab = open_tab()
    text = "Use `List<String>` and `a && b`, or List<String> && !![c] &amp; [d]: e"
    text += "\n~~~ C++\nvector<int> &a = b && c;\n~~~\n```mermaid\na-->b\n```\n$$x<y$$ over"
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.send(text)
    tab.wait_for_end()
    for part, said in ((".user-row", text), (".bot-row", f"You asked: {text}")):
        tab.page.locator(f".answers {part} + .message-buttons button[aria-label='Copy message']").click()
        assert tab.clipboard() == said
    for code in tab.answers().locator("code").all():
        code.click(click_count=3)
        tab.page.keyboard.press("Control+c")
        assert "\u2060" not in tab.clipboard()
        assert code.inner_text().strip() in text
    tab.page.locator(".answers button[aria-label='Edit']").click()
    tab.page.locator(".answers textarea").press("Control+a")
    tab.page.keyboard.press("Control+c")
    assert not {"\u2060", "\u2063"} & set(tab.clipboard())
    assert "\u2060" not in tab.page.locator(".answers").first.inner_text()


def test_tabs_never_see_each_other(open_tab: Callable[..., Tab]) -> None:
    first, second = open_tab(), open_tab()
    first.ask("my secret", "You asked: my secret")
    second.ask("Hello", "You asked: Hello")
    assert "secret" not in second.page.content()
    second.page.reload()
    expect(second.answers()).to_have_text("You asked: Hello")
    assert "secret" not in second.page.content()


def test_several_models_and_one_without_adapter(
    open_tab: Callable[..., Tab], start_app: Callable[..., Iterator[RunningApp]]
) -> None:
    models = [parrot(name="first"), parrot(name="second", adapter=False, system="Be kind")]
    running = start_app(*models, examples=[["Only of the first"], []])
    tab = open_tab(next(running).url)

    def choose(name: str) -> None:
        tab.page.locator("#model input").click()
        tab.page.get_by_role("option", name=name).click()
        expect(tab.page.locator("#header h1")).to_contain_text(name)
        expect(tab.page).to_have_title(f"{name} · lmtune")

    choose("second")
    expect(tab.page.locator(".answers").first).to_contain_text("second is ready")
    expect(tab.page.locator(".answers .example")).to_have_count(0)
    expect(tab.page.locator("#system textarea")).to_have_attribute("placeholder", "Be kind")
    choose("first")
    expect(tab.page.locator(".answers .example")).to_have_text("Only of the first")
    tab.choose("base")
    tab.ask("one", "Base heard: one")
    choose("second")
    expect(tab.page.locator("#mode")).to_be_hidden()
    tab.ask("two", "You asked: two")
    assert tab.speakers() == ["first · base", "second"]
    next(running, None)
