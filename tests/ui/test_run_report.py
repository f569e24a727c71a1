"""The report as a reader opens it: in Chromium, light and dark, wide and narrow, sorted by a click, printed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from lmtune.evaluation.answer_metrics import token_f1
from lmtune.runs.report import write_report
from tests.sample_run import SUMMARY, write_records

CONTRASTS = """() => {
  const linear = (part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  const luminance = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).map((part) => linear(part / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const texts = document.querySelectorAll("h1, h2, td, small, .tick, pre, .tokens b, .tokens i");
  return [...texts].filter((one) => !one.closest(".picture")).map((one) => {
    let below = one;
    while (getComputedStyle(below).backgroundColor === "rgba(0, 0, 0, 0)") below = below.parentElement;
    const ink = getComputedStyle(one)[one.closest("svg") ? "fill" : "color"];
    const two = [luminance(ink), luminance(getComputedStyle(below).backgroundColor)].sort((a, b) => b - a);
    return (two[0] + 0.05) / (two[1] + 0.05);
  });
}"""
COVERED = """() => [...document.querySelectorAll(".chart svg")].flatMap((chart) => {
  const boxes = [...chart.querySelectorAll("text")].map((one) => [one.textContent, one.getBBox()]);
  const lines = [...chart.querySelectorAll("polyline")].flatMap((line) =>
    Array.from({length: 2000}, (_, part) => line.getPointAtLength((part / 1999) * line.getTotalLength())));
  return boxes.filter(([, box]) => lines.some((point) =>
    point.x > box.x && point.x < box.x + box.width && point.y > box.y && point.y < box.y + box.height,
  )).map(([name]) => name);
})"""
pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with answers, classes, tokens and lengths."""
    run = write_records(tmp_path_factory.mktemp("runs") / "support")
    rows = [
        {"question": f"question {n}", "reference": "yes it is", "base": "no", "tuned": "yes it is" if n else "0" * 99}
        for n in range(12)
    ]
    run.predictions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    classes = {"labels": ["a", "b"], "confusion": [[3, 1], [0, 4]]}
    estimate = {"base_weights_gib": 0.5, "activations_gib": 0.1, "memory_gib": 0.6}
    run.summary.write_text(json.dumps({**SUMMARY, "classes": classes, "best_step": 60, "estimate": estimate}))
    bars = {"edges": [0, 10, 20], "train": [4, 7], "validation": [1, 2], "limit": 20}
    tokens = [["Who", False], ["·are", False], ["·you", True]]
    # gradients around the norm at which they are clipped
    steps = [json.loads(line) for line in run.events.read_text().splitlines()]
    lines = [json.dumps({**step, "grad_norm": 1 + 0.4 * (-1) ** step["step"]}) + "\n" for step in steps]
    run.events.write_text("".join(lines))
    run.preview.write_text(json.dumps({"rows": [{"where": "a.jsonl:1", "tokens": tokens, "more": 5}], "lengths": bars}))
    write_report([run], run.report, token_f1)
    return run.report


@pytest.fixture(params=["light", "dark"])
def page(browser: Browser, report: Path, request: pytest.FixtureRequest) -> Iterator[Page]:
    """The page on a telephone, and all that it complains of or asks the network for."""
    context = browser.new_context(viewport={"width": 390, "height": 800}, color_scheme=request.param)
    page = context.new_page()
    found: list[str] = []
    page.on("request", lambda asked: found.append(asked.url))
    page.on("pageerror", lambda error: found.append(str(error)))
    page.on("console", lambda message: found.append(message.text))
    page.goto(report.as_uri())
    yield page
    assert found == [report.as_uri()]
    context.close()


def test_the_page_fits_its_window_and_follows_its_colours(page: Page, request: pytest.FixtureRequest) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    light = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light == ("light" in request.node.name)
    contrasts = page.evaluate(CONTRASTS)
    assert min(contrasts) >= 4.5  # WCAG's AA


def test_a_telephone_shows_the_scores_of_both_models_at_once(page: Page) -> None:
    assert page.locator(".wide").first.evaluate("one => one.scrollWidth - one.clientWidth") <= 0
    assert page.locator(".scores th").all_inner_texts() == ["", "base", "tuned"]


def test_no_text_of_a_chart_lies_on_its_curve(page: Page) -> None:
    assert page.evaluate(COVERED) == []
    for chart, mark in (("Gradient norm", "clipped at 1"), ("Loss", "best step 60")):
        caption = page.locator("figcaption", has_text=chart).first
        assert mark in caption.inner_text()


def test_answers_are_sorted_by_a_click_and_values_shown_under_the_pointer(page: Page) -> None:
    first = page.locator(".answers tbody tr").first
    assert "question 0" in first.inner_text()
    page.get_by_role("button", name="row").click()
    page.get_by_role("button", name="row").click()
    assert "question 11" in first.inner_text()
    chart = page.locator(".chart svg").first
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.99, box["y"] + box["height"] / 2)
    assert page.locator(".chart output").first.inner_text().startswith("step 120 · each step 0.02")


def test_the_page_prints_all_columns(browser: Browser, report: Path) -> None:
    page = browser.new_page(color_scheme="dark", viewport={"width": 700, "height": 1000})
    page.goto(report.as_uri())
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    hidden = "[...document.querySelectorAll('.wide')].map((one) => one.scrollWidth - one.clientWidth)"
    assert max(page.evaluate(hidden)) <= 0
    assert page.pdf().startswith(b"%PDF")
    page.close()
