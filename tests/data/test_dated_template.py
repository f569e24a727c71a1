"""A template that writes today's date: it is said, no day's rows are taken for another's, and a run keeps its date."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers.utils.chat_template_utils as chat_template_utils

from lmtune.config.schema import DataConfig
from lmtune.data.rendering import Renderer
from lmtune.data.store import load_data
from lmtune.data.types import Message
from lmtune.inference.load import load_for_inference
from tests.data.test_rendering import example, whole
from tests.tokenizers import CHATML, DATED, make_tokenizer
from tests.workplace import finetune, inside, make_workplace

QUESTION = [Message("user", "Hello")]


@pytest.fixture
def on_day(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Set the clock of templates to a day of January 2031."""

    def set_day(day: int) -> None:
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz: datetime.tzinfo | None = None) -> Clock:
                return cls(2031, 1, day, 12, 30, tzinfo=tz)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)

    return set_day


def test_the_date_is_told_and_keeps_rows_of_different_days_apart(on_day: Callable[[int], None]) -> None:
    renderer = Renderer(make_tokenizer(DATED))
    on_day(3)
    first = renderer.fingerprint
    assert renderer.rendered_at == "2031-01-03 12:30:00"
    assert "which writes today's date (2031-01-03)" in renderer.description
    assert renderer.fingerprint == first
    on_day(4)
    assert "which writes today's date (2031-01-04)" in renderer.description
    assert renderer.fingerprint != first
    assert "Today is 04 Jan 2031." in renderer.tokenizer.decode(renderer.prompt_ids(QUESTION))


@pytest.mark.parametrize(
    "template",
    [
        DATED.replace("strftime_now('%d %b %Y')", 'strftime_now( format = "%Y" )'),
        DATED.replace("strftime_now('%d %b %Y')", "(strftime_now('%A') if strftime_now is defined else 'x')"),
        "{% macro day() %}{{ strftime_now('%d') }}{% endmacro %}" + DATED.replace("strftime_now('%d %b %Y')", "day()"),
        "\n" + DATED, " {%- set form = '%d' %}" + DATED.replace("'%d %b %Y'", "'%d'"),
    ],
)  # fmt: skip
def test_a_date_is_kept_however_it_is_written(template: str, on_day: Callable[[int], None]) -> None:
    on_day(3)
    today = Renderer(make_tokenizer(template))
    text = whole(today, today.render(example("Hello", "Hi"))[0])
    now = today.rendered_at
    assert now is not None
    assert "Today is ." not in text
    on_day(27)
    kept = Renderer(make_tokenizer(template), now=now)
    assert whole(kept, kept.render(example("Hello", "Hi"))[0]) == text


@pytest.mark.parametrize(
    "template", [CHATML, CHATML + "{% if tools %}{{ strftime_now('%d') }}{% endif %}", CHATML + "{# strftime_now #}"]
)
def test_a_template_that_writes_no_date_has_none(template: str, on_day: Callable[[int], None]) -> None:
    renderer = Renderer(make_tokenizer(template))
    assert renderer.rendered_at is None
    assert "date" not in renderer.description
    on_day(3)
    before = renderer.fingerprint
    on_day(4)
    assert renderer.fingerprint == before


def test_a_format_that_is_not_written_out_is_told_too(on_day: Callable[[int], None]) -> None:
    renderer = Renderer(make_tokenizer("{% set form = '%d' %}" + DATED.replace("'%d %b %Y'", "form")))
    on_day(3)
    before = renderer.fingerprint
    assert renderer.rendered_at == "2031-01-03 12:30:00"
    on_day(4)
    assert renderer.fingerprint != before


def test_rows_of_an_earlier_day_are_not_taken_from_the_cache(tmp_path: Path, on_day: Callable[[int], None]) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "Hello", "completion": "Hi"}) + "\n")
    config = DataConfig(train=(str(tmp_path / "rows.jsonl"),), validation_fraction=0.0)
    for day in (3, 4, 4):
        on_day(day)
        renderer = Renderer(make_tokenizer(DATED))
        data = load_data(config, renderer, 0)
        text = renderer.tokenizer.decode(data.train[0].sequences[0].input_ids)
        assert f"Today is 0{day} Jan 2031." in text
        assert data.report.rendered_at == f"2031-01-0{day} 12:30:00"


@pytest.mark.slow
def test_a_run_keeps_the_date_of_its_beginning(
    tmp_path: Path, on_day: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_workplace(tmp_path / "work", chat_template=DATED)
    on_day(3)
    run, _ = finetune(folder, train__max_steps=2, evaluation__exact_match_rows=0)
    assert "which writes today's date (2031-01-03)" in " ".join(capsys.readouterr().err.split())
    assert json.loads((run.adapter / "lmtune.json").read_text())["rendered_at"] == "2031-01-03 12:30:00"
    (run.adapter / "adapter_model.safetensors").unlink()  # as if the run had been stopped before its end
    on_day(4)
    finetune(folder, train__max_steps=2, evaluation__exact_match_rows=0)
    told = " ".join(capsys.readouterr().err.split())
    assert "resumes after step 2" in told
    assert "2031-01-03, when this run began" in told
    second, _ = finetune(folder, train__max_steps=2, evaluation__exact_match_rows=0, run__name="second")
    for path, day in ((run, 3), (second, 4)):
        with inside(folder):
            loaded = load_for_inference(str(path.path))
        first_row = json.loads(path.verification.read_text())["sequences"][0]
        assert f"Today is 0{day} Jan 2031" in loaded.tokenizer.decode(first_row)
        note = "the chat template writes today's date, 2031-01-04; in training it wrote 2031-01-03"
        assert loaded.date_note == (note if day == 3 else None)
    assert not (run.path / "adapter" / "data.json").exists()
