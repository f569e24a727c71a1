"""`report.html`: one page of bounded size that loads nothing and escapes everything, written at the end of a run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from lmtune.errors import ConfigError
from lmtune.evaluation.answer_metrics import token_f1
from lmtune.io.atomic import keep_lines
from lmtune.recipes import report as recipe
from lmtune.runs.charts import smoothed, thinned
from lmtune.runs.report import write_report
from lmtune.runs.store import RunDirectory
from tests.sample_run import METRICS, SUMMARY, write_records
from tests.workplace import finetune, make_workplace

EVIL = '</script><img src=x onerror="alert(1)">'


def with_steps(run: RunDirectory, count: int) -> RunDirectory:
    """The run, after so many steps."""
    line = {"type": "step", "time": "2026-01-31T12:00:00.000+00:00", **METRICS[0]}
    run.events.write_text(
        "".join(json.dumps({**line, "step": n + 1, "loss": 3 / (n + 1)}) + "\n" for n in range(count))
    )
    return run


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    monkeypatch.chdir(tmp_path)
    return write_records(tmp_path / "runs" / "support")


def page_of(run: RunDirectory) -> str:
    write_report([run], run.report, token_f1)
    return run.report.read_text(encoding="utf-8")


def test_the_page_loads_nothing_and_shows_nothing_unescaped(run: RunDirectory) -> None:
    rows = [{"question": EVIL, "reference": EVIL, "base": EVIL, "tuned": EVIL}]
    run.predictions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bars = {"edges": [0, 10], "train": [1], "validation": None, "limit": 10}
    tokens = [[EVIL, True], ["x", False]]
    run.preview.write_text(json.dumps({"rows": [{"where": EVIL, "tokens": tokens, "more": 0}], "lengths": bars}))
    run.environment.write_text(json.dumps({"device": EVIL}))
    classes = {"labels": [EVIL, "b"], "confusion": [[1, 0], [0, 1]]}
    run.summary.write_text(json.dumps({**SUMMARY, "reason": EVIL, "classes": classes}))
    with run.events.open("a") as file:
        time = "2026-01-31T12:00:00.000+00:00"
        file.write(json.dumps({"type": "warning", "time": time, "step": 120, "message": EVIL}) + "\n")
    page = page_of(run)
    assert "<img" not in page
    assert page.count("</script>") == 1
    assert not re.search(r'(src|href)="(?!#)|url\(|@import|https?://(?!www\.w3\.org/2000/svg)', page)
    assert "default-src 'none'" in page


def test_what_got_worse_comes_first(run: RunDirectory) -> None:
    rows = [
        {"question": "better", "reference": "a b", "base": "c", "tuned": "a b"},
        {"question": "same", "reference": "a b", "base": "a b", "tuned": "a b"},
        {"question": "worse", "reference": "a b", "base": "a b", "tuned": "c"},
    ]
    run.predictions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = page_of(run)
    assert re.findall(r"<td>(better|same|worse)</td>", page) == ["worse", "same", "better"]
    assert "nearer to the reference in 1 of 3 held-out rows, farther from it in 1" in page


@pytest.mark.parametrize("left_out", ["predictions", "preview", "environment", "data", "events", "metrics"])
def test_a_run_is_shown_as_far_as_it_got(run: RunDirectory, left_out: str) -> None:
    getattr(run, left_out).unlink(missing_ok=True)
    if left_out == "events":
        run.metrics.unlink()
    assert "support" in page_of(run)


def test_the_size_does_not_grow_with_the_steps(run: RunDirectory) -> None:
    page_of(with_steps(run, 1000))
    before = run.report.stat().st_size
    page_of(with_steps(run, 20_000))
    assert run.report.stat().st_size < 1.1 * before < 500_000


def test_thinning_keeps_first_last_lowest_and_highest() -> None:
    y = [0.0] * 10_000
    y[5003], y[7001] = 9.0, -9.0
    points = thinned(list(range(10_000)), y, stretches=50)
    assert len(points) <= 102
    assert {(0, 0.0), (5003, 9.0), (7001, -9.0), (9999, 0.0)} <= set(points)
    assert points == sorted(points)


def test_smoothing_is_a_weighted_mean_that_does_not_lag() -> None:
    line = [float(n) for n in range(1000)]
    assert smoothed(line, [1.0] * 1000)[500] == pytest.approx(500)
    assert smoothed([1.0, 5.0, 1.0], [1.0, 0.0, 1.0]) == pytest.approx([1.0, 1.0, 1.0])
    assert smoothed([4.0], [2.0]) == [4.0]


def test_several_runs_stand_beside_each_other_in_a_file_of_its_own(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_records(run.path.with_name("other"))
    other.config.write_text(other.config.read_text().replace("rank: 4", "rank: 16"))
    with pytest.raises(ConfigError, match="several runs have one page"):
        recipe.main(["support", "other"])
    recipe.main(["support", "other"], output=Path("both.html"), as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert (told["page"], told["picture"]) == ("both.html", "both.png")
    page = Path("both.html").read_text(encoding="utf-8")
    assert "<td>tuning.rank</td><td>4</td><td>16</td>" in page
    assert page.count("<details>") == 2
    assert not run.report.exists()


@pytest.mark.parametrize(("output", "message"), [("page.pdf", "ends in .html"), ("none/page.html", "not a folder")])
def test_a_page_that_cannot_be_is_refused(run: RunDirectory, output: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe.main(["support"], output=Path(output))


def test_a_run_writes_its_report_at_its_end(tmp_path: Path) -> None:
    run, _ = finetune(make_workplace(tmp_path), evaluation__every_steps=4)
    page = run.report.read_text(encoding="utf-8")
    for part in ("Scores", "Curves", "Memory", "Answers", "Data", "Tokens", "Events", "Settings", "Environment"):
        assert f">{part}</h2>" in page
    assert re.search(r'(?s)<h3>train\.jsonl:1</h3><div class="tokens">.*<b>', page)
    assert str(tmp_path) not in page
    with Image.open(run.loss_picture) as picture:
        assert picture.size == (1200, 640)
        assert len(set(picture.get_flattened_data())) > 50 if hasattr(picture, "get_flattened_data") else True


def test_a_report_that_cannot_be_drawn_fails_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no such font")

    monkeypatch.setattr("lmtune.runs.report.loss_png", broken)
    run, summary = finetune(make_workplace(tmp_path))
    assert summary["status"] == "complete"
    assert "no report: no such font" in run.events.read_text()


def test_a_damaged_record_is_named(run: RunDirectory) -> None:
    keep_lines(run.events, 3)
    with run.events.open("a") as file:
        file.write("half\n")
    with pytest.raises(Exception, match=r"events\.jsonl:4: damaged"):
        recipe.main(["support"])
