"""Two models on the same rows: paired figures, and the rows that got worse first."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from lmtune.errors import DataError
from lmtune.evaluation.answer_metrics import answer_metric
from lmtune.evaluation.compare import compare
from lmtune.evaluation.results import RowResult, scores_of
from lmtune.evaluation.tables import comparison_table, describe_worse
from lmtune.io.console import out
from lmtune.recipes import compare as recipe
from tests.sample_run import write_base, write_run


def results(answers: dict[int, str], losses: dict[int, float] | None = None) -> list[RowResult]:
    return [
        RowResult(
            f"rows.jsonl:{line}",
            f"question {line}",
            "yes",
            said,
            {"loss": ((losses or {}).get(line, 1.0), 4.0), "token_accuracy": (2.0, 4.0)},
        )
        for line, said in answers.items()
    ]


def test_rows_are_paired_by_their_place_and_those_that_got_worse_come_first() -> None:
    first = results({1: "yes", 2: "no", 3: "no", 4: "yes", 9: "yes"})
    second = results({4: "yes", 3: "yes", 2: "yes", 1: "no", 7: "yes"})
    found = compare(first, second, [answer_metric("exact"), answer_metric("f1")])
    assert found.left_out == 2
    assert found.deciding == "exact"
    assert found.scores["exact"] == (0.5, 0.75)
    difference = found.differences["exact"]
    assert (difference.wins, difference.losses, difference.ties) == (2, 1, 1)
    assert difference.verdict == "not told apart"
    assert [(row.first.location, row.gain) for row in found.rows] == [
        ("rows.jsonl:1", -1), ("rows.jsonl:4", 0), ("rows.jsonl:2", 1), ("rows.jsonl:3", 1),
    ]  # fmt: skip
    assert describe_worse(found.rows, 3)[0] == "\n1 row got worse:"
    assert "first:     yes" in describe_worse(found.rows, 3)[-2]


def test_the_first_metric_orders_the_rows_and_the_next_those_that_it_does_not_tell_apart() -> None:
    """A loss in nats is no reason to stand before a row that is wrong now."""
    first = results({1: "yes", 2: "yes", 3: "no", 4: "yes"}, {1: 4.0, 2: 4.0, 3: 4.0, 4: 4.0})
    second = results({1: "yes", 2: "no", 3: "yes", 4: "yes"}, {1: 40.0, 2: 4.0, 3: 80.0, 4: 2.0})
    found = compare(first, second, [answer_metric("exact")])
    assert [(row.first.location, row.gain) for row in found.rows] == [
        ("rows.jsonl:2", -1), ("rows.jsonl:1", -9), ("rows.jsonl:4", 0.5), ("rows.jsonl:3", 1),
    ]  # fmt: skip


def test_a_clear_difference_is_said_in_words() -> None:
    first, second = (dict.fromkeys(range(60), "no"), {line: "yes" if line % 3 else "no" for line in range(60)})
    found = compare(results(first), results(second), [answer_metric("exact")])
    sentence = found.differences["exact"].sentence("runs/b")
    assert sentence.startswith("runs/b is better: it wins 7"), sentence
    with out.capture() as shown:
        out.print(comparison_table("runs/a", "runs/b", found))
    assert "40 / 0 / 20" in shown.get()
    narrow = Console(width=80)
    with narrow.capture() as shown:
        narrow.print(comparison_table("runs/boosting25", "runs/the-best", found))
    assert any("66.7 %" in line and "40 / 0 / 20" in line for line in shown.get().splitlines()), shown.get()


def of_preferences(rewards: list[float], is_likelier: list[bool], kl: bool = False) -> list[RowResult]:
    """Pairs, or judged answers, as `evaluate` has them."""
    found = []
    for line, (reward, likelier) in enumerate(zip(rewards, is_likelier, strict=True)):
        parts = {"loss": (0.7 - reward, 1.0), "reward_chosen": (reward, 1.0), "accuracy": (float(reward > 0), 1.0)}
        parts |= {"kl": (0.0, 1.0)} if kl else {"pair_accuracy": (float(likelier), 1.0)}
        found.append(RowResult(f"pairs.jsonl:{line + 1}", parts=parts))
    return found


@pytest.mark.parametrize(("is_kto", "deciding"), [(False, "pair_accuracy"), (True, "loss")])
def test_a_base_that_is_its_own_reference_does_not_lose_by_that(is_kto: bool, deciding: str) -> None:
    """Its rewards are 0, so none is right; a model that has moved by chance is no better."""
    by_chance = [0.1 if line % 2 else -0.1 for line in range(40)]
    base = of_preferences([0.0] * 40, [True] * 40, is_kto)
    found = compare(base, of_preferences(by_chance, [True] * 40, is_kto), ())
    assert found.deciding == deciding
    assert found.differences[deciding].verdict == "not told apart"
    better = compare(base, of_preferences([0.1] * 40, [True] * 40, is_kto), ()).differences[deciding]
    assert better.verdict == ("better" if is_kto else "not told apart")


def test_rewards_of_0_are_numbers_and_no_shares() -> None:
    found = scores_of(of_preferences([0.0] * 40, [True] * 40), ())
    assert found["reward_chosen"].interval == (0, 0)
    low, high = found["pair_accuracy"].interval or (0, 0)
    assert 0.9 < low < high == 1


def test_a_lower_loss_is_better() -> None:
    first = [replace(row, answer=None) for row in results(dict.fromkeys(range(30), ""))]
    second = [replace(row, parts={**row.parts, "loss": (0.5, 4.0)}) for row in first]
    found = compare(first, second, [answer_metric("exact")])
    assert found.scores == {"loss": (0.25, 0.125), "token_accuracy": (0.5, 0.5)}
    assert (found.deciding, found.differences["loss"].verdict) == ("loss", "better")
    assert found.differences["loss"].value == 0.125, "positive where the second is better"
    assert all(row.gain == 0.125 for row in found.rows)


@pytest.mark.parametrize("name", ["mean_absolute_error", "squared_error"])
def test_values_are_compared_by_how_far_off_they_are(name: str) -> None:
    """Not by the share of them that is off by less than a half."""
    first, second = (
        [RowResult(f"rows:{n}", answer="1", parts={name: (off, 1.0), "accuracy": (1.0, 1.0)}) for n in range(12)]
        for off in (0.25, 0.125)
    )
    found = compare(first, second, [])
    assert (found.deciding, found.scores[name]) == (name, (0.25, 0.125))
    assert found.differences[name].verdict == "better"
    with out.capture() as shown:
        out.print(comparison_table("a", "b", found))
    assert "0.1250" in shown.get()


def test_models_of_different_objectives_and_rows_in_common_are_needed() -> None:
    classified = [RowResult(f"a:{right}", parts={"accuracy": (right, 1.0)}) for right in (1.0, 0.0)]
    assert compare(classified, classified, []).scores == {"accuracy": (0.5, 0.5)}
    with pytest.raises(DataError, match="trained for different things"):
        compare(classified, [RowResult("a:1.0", parts={"loss": (1.0, 1.0)})], [])
    with pytest.raises(DataError, match="no row that both"):
        compare(classified, [], [])


@pytest.mark.slow
def test_a_run_beside_its_base_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_base(base := tmp_path / "base")
    run, rows = write_run(tmp_path / "support", str(base)), tmp_path / "held.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"Say {n}", "completion": str(n)}) + "\n" for n in range(4)))
    arguments = {"rows": 3, "max_new_tokens": 4, "max_length": 256, "shown": 2}
    recipe.main(
        str(base), str(run.path), [rows], ["exact", "chrf"], output=tmp_path / "rows.jsonl", as_json=True, **arguments
    )
    tree = json.loads(capsys.readouterr().out)
    assert list(tree["scores"]) == ["exact", "chrf", "loss", "token_accuracy", "sequence_accuracy"]
    assert tree["differences"]["loss"]["verdict"] in ("better", "worse", "not told apart")
    assert len(tree["rows"]) == 4
    written = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["gain"] for row in written] == sorted(row["gain"] for row in written)
