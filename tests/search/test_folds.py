"""Folds: every row is scored once, families stay together, labels are spread, and copies change nothing."""

import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lmtune.config.schema import DataConfig
from lmtune.data.prepare.augmenting import Changes, augment
from lmtune.data.rendering import Renderer
from lmtune.data.selection import Selection
from lmtune.data.store import TokenizedData, tokenize
from lmtune.data.types import RowKind
from lmtune.errors import ConfigError
from lmtune.search.crossval import CrossValidation, Spread
from lmtune.search.folds import fold_selections, group_values
from lmtune.search.tables import crossval_tables
from tests.tokenizers import CHATML, make_tokenizer


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(rows: list[dict[str, Any]], kind: RowKind = "answer", name: str = "rows.jsonl") -> TokenizedData:
    """The rows as a run has them."""
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tokenize([name], Renderer(make_tokenizer(CHATML)), DataConfig(train=name), rows=kind)


def answers(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"question {n}", "completion": f"answer {n}", **more} for n in range(count)]


def texts_of(data: TokenizedData, rows: tuple[int, ...]) -> set[int]:
    return {int(data.content[row]) for row in rows}


def check_whole(selections: list[Selection], num_rows: int) -> None:
    """Each row is scored in one fold and trained in all others."""
    assert sorted(row for one in selections for row in one.validation or ()) == list(range(num_rows))
    for one in selections:
        assert sorted((*one.train, *(one.validation or ()))) == list(range(num_rows))


def test_every_row_is_scored_once_and_folds_differ_by_a_row_at_most() -> None:
    selections = fold_selections(read(answers(23)), 5)
    check_whole(selections, 23)
    assert sorted(len(one.validation or ()) for one in selections) == [4, 4, 5, 5, 5]
    assert fold_selections(read(answers(23)), 5, seed=1) != selections


def test_labels_are_spread_as_evenly_as_they_can_be() -> None:
    """43 of a frequent class and 7 of a rare one over five folds."""
    rows = [{"text": f"text {n}", "label": "rare" if n % 7 == 3 else "often"} for n in range(50)]
    data = read(rows, "labelled")
    labels = data.labels
    selections = fold_selections(data, 5)
    check_whole(selections, 50)
    of_folds = [Counter(labels[row] for row in one.validation or ()) for one in selections]
    assert sorted(counts["rare"] for counts in of_folds) == [1, 1, 1, 2, 2]
    assert {counts["often"] for counts in of_folds} <= {8, 9}


def test_numbers_are_spread_by_tenths() -> None:
    data = read([{"text": f"text {n}", "label": float(n)} for n in range(100)], "labelled")
    for one in fold_selections(data, 5):
        assert Counter(row // 10 for row in one.validation or ()) == dict.fromkeys(range(10), 2)


def test_rows_of_one_prompt_are_in_one_fold() -> None:
    rows = [{"prompt": f"question {n % 8}", "completion": f"answer {n}"} for n in range(24)]
    for one in fold_selections(read(rows), 4):
        held = {row % 8 for row in one.validation or ()}
        assert len(one.validation or ()) == 6
        assert not held & {row % 8 for row in one.train}


def test_groups_stay_together_and_join_families() -> None:
    """Authors of two rows each; a question of two authors makes one family of both."""
    rows = [{"prompt": f"question {n}", "completion": "x", "author": f"a{n // 2}"} for n in range(20)]
    rows[2]["prompt"] = rows[7]["prompt"]
    rows[19]["author"] = None
    data = read(rows)
    values = group_values(data, "author")
    assert values[:3] == ["a0", "a0", "a1"]
    assert values[19] is None
    selections = fold_selections(data, 3, groups=values)
    check_whole(selections, 20)
    for one in selections:
        held = set(one.validation or ())
        for together in ({2, 3, 6, 7}, {0, 1}, {16, 17}):
            assert held & together in (set(), together)


def test_a_group_that_no_row_has_is_named() -> None:
    data = read(answers(4, author="x"))
    with pytest.raises(ConfigError, match="--group: autor: no row has a value of this key; did you mean author"):
        group_values(data, "autor")


def test_copies_are_trained_with_their_family_never_scored_and_move_no_row() -> None:
    rows = [{"text": f"the lamp number {n} came broken today", "label": "ab"[n % 3 == 0]} for n in range(30)]
    plain = read(rows, "labelled", "plain.jsonl")
    augment("plain.jsonl", Path("more.jsonl"), Changes(delete=0.3, copies=3))
    more = tokenize(
        ["more.jsonl"], Renderer(make_tokenizer(CHATML)), DataConfig(train="more.jsonl"), rows="labelled"
    )  # fmt: skip
    assert more.copies.sum() > 60
    before, now = fold_selections(plain, 5, seed=3), fold_selections(more, 5, seed=3)
    for one, other in zip(before, now, strict=True):
        assert texts_of(plain, one.validation or ()) == texts_of(more, other.validation or ())
        held = {int(more.prompt[row]) for row in other.validation or ()}
        assert not held & {int(more.prompt[row]) for row in other.train}
        assert len(other.train) + sum(int(more.prompt[row]) in held for row in range(len(more))) == len(more)


def test_more_folds_than_families_are_refused() -> None:
    rows = [{"prompt": f"question {n % 3}", "completion": f"answer {n}"} for n in range(12)]
    with pytest.raises(ConfigError, match="--folds: 4; the rows make 3 families that must stay together"):
        fold_selections(read(rows), 4)


def test_rows_of_one_prompt_in_all_are_families_by_their_content() -> None:
    rows = [{"prompt": "write a line", "completion": f"line {n % 6}"} for n in range(12)]
    data = read(rows)
    for one in fold_selections(data, 3):
        assert not texts_of(data, one.validation or ()) & texts_of(data, one.train)


def test_five_folds_are_shown_whole_on_80_columns_and_no_share_is_beyond_1() -> None:
    scores = {
        name: Spread.of([part * n for n in (1, 2, 3, 4, 5)])
        for name, part in {"loss": 1.5, "perplexity": 900.0, "token_accuracy": 0.2, "sequence_accuracy": 0.2,
                           "exact_match": 0.2}.items()
    }  # fmt: skip
    result = CrossValidation("plain-folds", 5, None, "loss", 50, scores, scores, ("a",) * 5, (9,) * 5)
    console = Console(width=80, file=io.StringIO())
    for table in crossval_tables(result, scores, result):
        console.print(table)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in shown
    assert re.search(r"Sequence accuracy +60\.0 % +60\.0 % +31\.6 % +1\.1 % to 100\.0 %", shown), shown
    assert re.search(r"fold 5 +7\.5000 +4500 +100\.0 %", shown)
    assert re.search(r"Loss +4\.5000 +0\.0\d+ to 8\.9\d+\n", shown)
