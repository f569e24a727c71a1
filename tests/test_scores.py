"""`evaluate` from the command line: intervals, the base beside the tuned model, slices, rows; and answers in files."""

import json
from pathlib import Path
from typing import Any

import pytest

from lmtune.errors import ConfigError, DataError
from lmtune.evaluation.answer_files import aligned, answers_of_file, read_answers
from lmtune.evaluation.answer_metrics import answer_metric
from lmtune.evaluation.compare import compare as compared_rows
from lmtune.evaluation.compare import slices_of
from lmtune.evaluation.results import RowResult, scores_of, values_of
from lmtune.evaluation.showing import draw_confusion
from lmtune.evaluation.slices import MISSING, slice_names
from lmtune.evaluation.tables import slices_table
from lmtune.recipes import compare, evaluate
from tests.sample_run import write_base, write_run
from tests.workplace import write_rows

ROWS = [
    {"prompt": f"Say {n}", "completion": str(n % 4), "topic": "odd" if n % 2 else "even", "meta": {"n": n}}
    for n in range(16)
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a run over it, and rows."""
    folder = tmp_path_factory.mktemp("scores")
    write_base(folder / "base")
    write_run(folder / "support", str(folder / "base"))
    write_rows(folder / "held.jsonl", ROWS)
    return folder


def evaluated(place: Path, capsys: pytest.CaptureFixture[str], target: str = "support", **options: Any) -> Any:
    given = {"exact_match_rows": 12, "max_new_tokens": 4, "max_length": 256, "as_json": True, **options}
    evaluate.main(str(place / target), [place / "held.jsonl"], **given)
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_every_score_has_an_interval_and_the_base_beside_it(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    tree = evaluated(place, capsys, metric=["chrf", "f1"], by="topic", output=place / "rows.jsonl")
    names = {"loss", "perplexity", "token_accuracy", "sequence_accuracy", "exact_match", "chrf", "f1"}
    for part in ("base", "tuned"):
        assert names <= tree[part].keys()
        for name in names:
            low, high = tree["intervals"][part][name]
            assert low - 1e-9 <= tree[part][name] <= high + 1e-9, name
    assert list(tree["differences"]) == ["chrf", "f1", "loss", "token_accuracy", "sequence_accuracy"]
    assert tree["verdict"].startswith("chrf: tuned is ")
    assert [(one["slice"], one["rows"]) for one in tree["slices"]] == [("even", 8), ("odd", 8)]
    written = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
    assert written == tree["rows"]
    assert [row["gain"] for row in written] == sorted(row["gain"] for row in written)
    assert {"row", "question", "reference", "base", "tuned", "scores"} <= written[0].keys()
    whole = sum(row["scores"]["tuned"]["sequence_accuracy"] for row in written) / len(written)
    assert whole == tree["tuned"]["sequence_accuracy"]
    answered = [row for row in written if row["tuned"] is not None]
    assert (len(answered), len(written)) == (12, 16)
    assert all("f1" not in row["scores"]["tuned"] for row in written if row not in answered)
    for part in ("base", "tuned"):
        for name in ("f1", "exact_match"):  # means of rows; chrF is over all rows together
            values = [row["scores"][part][name] for row in answered]
            assert sum(values) / 12 == pytest.approx(tree[part][name]), name
    assert all(list(row["scores"]["tuned"])[:2] == ["chrf", "f1"] for row in answered)
    assert all(
        row["gain"] == pytest.approx(row["scores"]["tuned"]["chrf"] - row["scores"]["base"]["chrf"])
        for row in answered
        if row["scores"]["tuned"]["chrf"] != row["scores"]["base"]["chrf"]
    )


@pytest.mark.slow
def test_a_terminal_sees_the_same(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"as_json": False, "by": "meta.n", "shown": 2, "exact_match_rows": 12, "max_new_tokens": 4}
    evaluate.main(str(place / "support"), [place / "held.jsonl"], **options)
    shown = capsys.readouterr().out
    for text in ("base (95 %)", "tuned (95 %)", "Exact match", "over 16 rows, answers to 12", "f1: tuned is", "0 to 3"):
        assert text in shown, text
    evaluate.main(str(place / "base"), [place / "held.jsonl"], **{**options, "by": "source"})
    alone = capsys.readouterr().out
    assert "score (95 %)" in alone
    assert "held.jsonl" in alone
    assert "tuned" not in alone


def results(count: int = 8) -> list[RowResult]:
    return [RowResult(f"held.jsonl:{n + 1}", f"Say {n}", str(n), str(n // 2 * 2), length=10 + n) for n in range(count)]


def test_slices_are_by_a_field_by_length_or_by_source(place: Path) -> None:
    rows, paths = results(16), [str(place / "held.jsonl")]
    names = slice_names("topic", paths, rows)
    assert names["held.jsonl:2"] == "odd"
    assert set(slice_names("source", paths, rows).values()) == {"held.jsonl"}
    lengths = slice_names("length", paths, rows)
    assert list(dict.fromkeys(lengths.values())) == [
        "10 to 13 tokens", "14 to 17 tokens", "18 to 21 tokens", "22 to 25 tokens"
    ]  # fmt: skip
    assert list(dict.fromkeys(slice_names("meta.n", paths, rows).values())) == [
        "0 to 3",
        "4 to 7",
        "8 to 11",
        "12 to 15",
    ]
    with pytest.raises(ConfigError, match=r"--by tpoic: no row has this field; expected length, source, or one of"):
        slice_names("tpoic", paths, rows)
    found = slices_of(names, None, rows, [answer_metric("exact")])
    assert [(one.name, one.rows, one.scores["exact"].value) for one in found] == [("even", 8, 1), ("odd", 8, 0)]
    worse = [RowResult(row.location, row.question, row.reference, "no") for row in rows]
    (even, odd) = slices_of(names, rows, worse, [answer_metric("exact")])
    assert even.compared.differences["exact"].verdict == "worse"
    assert odd.compared.differences["exact"].verdict == "not told apart"


def test_a_row_without_the_field_is_a_slice_of_its_own(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "length": "short"}, {"prompt": "b"}])
    rows = [RowResult("rows.jsonl:1", length=3), RowResult("rows.jsonl:2", length=4)]
    assert slice_names("length", [str(tmp_path / "rows.jsonl")], rows) == {
        "rows.jsonl:2": MISSING, "rows.jsonl:1": "short"
    }, "a field goes before the length in tokens"  # fmt: skip
    (tmp_path / "list.json").write_text('[{"prompt": "a", "t": 1}, {"prompt": "b", "t": 2}]')
    with pytest.raises(DataError, match=r"several rows stand on list\.json:1"):
        slice_names("t", [str(tmp_path / "list.json")], rows)


def test_a_file_of_answers_stands_for_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**row, "prediction": row["completion"] if n < 12 else "?"} for n, row in enumerate(ROWS)]
    write_rows(tmp_path / "a.jsonl", rows)
    write_rows(tmp_path / "b.jsonl", [{**row, "prediction": "?"} for row in reversed(ROWS)])
    read = read_answers(str(tmp_path / "a.jsonl"))
    assert (read[1].question, read[1].reference, read[1].answer) == ("Say 1", "1", "1")
    evaluate.main(str(tmp_path / "a.jsonl"), metric=["exact"], by="topic", as_json=True)
    tree = json.loads(capsys.readouterr().out)
    assert tree["tuned"]["exact"]["value"] == 0.75
    assert tree["tuned"]["exact"]["interval"] == pytest.approx([0.505, 0.898], abs=1e-3)  # Wilson
    assert [one["slice"] for one in tree["slices"]] == ["even", "odd"]
    assert [row["scores"]["tuned"]["exact"] for row in tree["rows"]] == 12 * [1.0] + 4 * [0.0]
    compare.main(str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), metric=["exact"], as_json=True)
    tree = json.loads(capsys.readouterr().out)
    difference = tree["differences"]["exact"]
    assert (difference["wins"], difference["losses"], difference["ties"], difference["verdict"]) == (0, 12, 4, "worse")
    assert tree["rows"][0]["question"] == "Say 0"
    assert tree["rows"][0]["scores"] == {"first": {"exact": 1.0}, "second": {"exact": 0.0}}
    assert answers_of_file(str(tmp_path / "b.jsonl"), ["Say 3"]) == ["?"]
    with pytest.raises(ConfigError, match="no answer to 1 prompt, such as 'Say more'"):
        answers_of_file(str(tmp_path / "b.jsonl"), ["Say more"])
    with pytest.raises(ConfigError, match=r"leave .*held\.jsonl out"):
        compare.main(str(tmp_path / "a.jsonl"), "tiny", [tmp_path / "held.jsonl"])
    with pytest.raises(ConfigError, match="DATA: missing"):
        evaluate.main("tiny")


def test_predicted_classes_are_scored_and_rows_without_prediction_are_named(tmp_path: Path) -> None:
    write_rows(tmp_path / "classes.jsonl", [{"text": "good", "label": "pos", "prediction": "pos", "probability": 0.9}])
    (row,) = read_answers(str(tmp_path / "classes.jsonl"))
    assert (row.parts, row.is_answer) == ({"accuracy": (1.0, 1.0)}, False)
    write_rows(tmp_path / "values.jsonl", [{"text": "good", "label": 2.0, "prediction": 2.5}])
    assert read_answers(str(tmp_path / "values.jsonl"))[0].parts == {"squared_error": (0.25, 1)}
    write_rows(tmp_path / "none.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(DataError, match=r"none\.jsonl:1: no prediction; expected rows as `lmtune predict` writes them"):
        read_answers(str(tmp_path / "none.jsonl"))
    with pytest.raises(ConfigError, match="no question in common"):
        aligned([RowResult("a:1", "one")], [RowResult("b:1", "two")])


def test_calls_are_compared_in_the_rows_that_have_one() -> None:
    call = '<tool_call>\n{"name": "lamp", "arguments": {"on": true}}\n</tool_call>'
    rows = [
        RowResult("a:1", "on", call, '{"name": "lamp", "parameters": {"on": true}}'),
        RowResult("a:2", "hi", "hi", "no"),
    ]
    assert scores_of(rows, [answer_metric("tool_call")])["tool_call"].rows == 1
    assert scores_of(rows, [answer_metric("tool_call")])["tool_call"].value == 1
    assert [values_of(row, [answer_metric("tool_call")]) for row in rows] == [{"tool_call": 1.0}, {}]
    assert "tool_call" not in scores_of(rows[1:], [answer_metric("tool_call")])


def test_a_table_of_slices_shows_what_the_sentence_is_about() -> None:
    """Of a classifier its accuracy, not its loss; also where the first slice has fewer scores than others."""
    alike: dict[str, dict[str, tuple[float, float]]] = {
        "accuracy": {"loss": (0.5, 1.0), "accuracy": (1.0, 1.0)},
        "mean_absolute_error": {"loss": (0.5, 1.0), "accuracy": (0.0, 1.0), "mean_absolute_error": (0.5, 1.0)},
        "squared_error": {"squared_error": (0.25, 1.0)},
        "pair_accuracy": {"loss": (0.5, 1.0), "accuracy": (1.0, 1.0), "pair_accuracy": (1.0, 1.0)},
        "loss": {"loss": (0.5, 4.0), "token_accuracy": (2.0, 4.0), "sequence_accuracy": (0.0, 1.0)},
    }
    for wanted, parts in alike.items():
        rows = [RowResult(f"a:{n}", parts=parts) for n in range(4)]
        found = slices_of({row.location: "even" if n % 2 else "odd" for n, row in enumerate(rows)}, None, rows, [])
        assert slices_table(found, "topic").title == wanted
        assert compared_rows(rows, rows, []).deciding == wanted
    answered = [RowResult(f"b:{n}", "q", "yes", "yes", alike["loss"]) for n in range(4)]
    names = {row.location: row.location[0] for row in [*rows, *answered]}
    for first in (None, [*rows, *answered]):
        table = slices_table(slices_of(names, first, [*rows, *answered], [answer_metric("exact")]), "source")
        assert table.title == "exact"
        assert table.row_count == 2


def test_it_is_said_where_the_confusion_matrix_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes = {"labels": ["a", "b"], "confusion": [[3, 1], [0, 4]]}
    draw_confusion(tmp_path / "confusion.svg", classes)
    shown = capsys.readouterr()
    assert (shown.out, "confusion.svg" in shown.err) == ("", True)
    assert (tmp_path / "confusion.svg").read_text().startswith("<svg")
    draw_confusion(None, None)
    with pytest.raises(ConfigError, match="--confusion: only a model that gives one class a row"):
        draw_confusion(tmp_path / "none.svg", None)
