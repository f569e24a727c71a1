"""The example data: what ships is what the generator writes, and the held-out questions are really held out."""

from __future__ import annotations

import json
from pathlib import Path

from lmtune.demo import support_data, support_heldout
from tools.world.support import FACTS, INTENTS, Row, heldout_rows, training_rows, write_examples
from tools.world.wording import expand, normalized


def shipped(path: Path) -> list[Row]:
    return [Row(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_shipped_files_are_what_the_generator_writes(tmp_path: Path) -> None:
    write_examples(tmp_path)
    assert (tmp_path / "support.jsonl").read_bytes() == support_data().read_bytes()
    assert (tmp_path / "support_heldout.jsonl").read_bytes() == support_heldout().read_bytes()


def test_no_held_out_wording_is_in_the_training_file() -> None:
    """Neither as it stands nor in other case or punctuation."""
    training = {normalized(row.prompt) for row in shipped(support_data())}
    assert not training & {normalized(row.prompt) for row in shipped(support_heldout())}


def test_every_fact_is_taught_in_ten_wordings_and_asked_in_two_others() -> None:
    taught = [row.completion for row in training_rows()]
    assert all(taught.count(row.completion) == 10 for row in heldout_rows())
    assert len({fact.answer for fact in FACTS.values()}) == len(FACTS)
    facts = {fact.answer for fact in FACTS.values()}
    for rows in (training_rows(), heldout_rows()):
        asked = [normalized(row.prompt) for row in rows if row.completion in facts]
        assert len(asked) == len(set(asked))


def test_a_wording_belongs_to_one_intent() -> None:
    """Else its answer would be a matter of chance."""
    owner: dict[str, str] = {}
    for key, intent in INTENTS.items():
        wordings = [wording for template in intent.asks for wording in expand(template)]
        for wording in [*wordings, *(FACTS[key].heldout if key in FACTS else ())]:
            assert owner.setdefault(normalized(wording), key) == key, wording
