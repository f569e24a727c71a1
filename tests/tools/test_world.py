"""The pretraining world: the same seed gives the same documents, and the example shop is not among them."""

from __future__ import annotations

from random import Random

import pytest

from tools.world.support import FACTS, INTENTS, SHOP_NAME, heldout_rows
from tools.world.wording import expand, fill, normalized
from tools.world.words import SLOTS
from tools.world.world import Document, world


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return list(world(20_000, seed=1))


def test_the_same_seed_gives_the_same_documents() -> None:
    assert list(world(200, seed=3)) == list(world(200, seed=3))
    assert list(world(200, seed=3)) != list(world(200, seed=4))


def test_neither_the_shop_nor_its_answers_nor_held_out_wordings_occur(documents: list[Document]) -> None:
    held_out = {normalized(row.prompt) for row in heldout_rows()}
    answers = [fact.answer for fact in FACTS.values()]
    for document in documents:
        texts = [document] if isinstance(document, str) else [turn.content for turn in document]
        whole = " ".join(texts)
        assert SHOP_NAME.lower() not in whole.lower()
        assert not any(answer in whole for answer in answers)
        assert not {normalized(line) for text in texts for line in text.splitlines()} & held_out


def test_conversations_alternate_and_end_with_an_answer(documents: list[Document]) -> None:
    for document in documents:
        if not isinstance(document, str):
            spoken = [turn for turn in document if turn.role != "system"]
            assert [turn.role for turn in spoken] == ["user", "assistant"] * (len(spoken) // 2)
            assert all(turn.content.strip() == turn.content != "" for turn in document)


def test_a_shop_answers_the_same_question_the_same_way(documents: list[Document]) -> None:
    again = 0
    for document in documents:
        if isinstance(document, str):
            continue
        pairs = [(document[i].content, document[i + 1].content) for i in range(len(document) - 1)
                 if document[i].role == "user"]  # fmt: skip
        answers = dict(pairs)
        again += len(pairs) - len(answers)
        assert all(answers[question] == answer for question, answer in pairs)
    assert again > 0


def test_every_slot_is_known_and_nothing_is_left_unfilled() -> None:
    rng = Random(0)
    for intent in INTENTS.values():
        for template in intent.answers:
            assert "{" not in fill(template, rng)
        for template in intent.asks:
            assert not any(mark in wording for wording in expand(template) for mark in "[]|{}")
    assert all(len(set(choices)) == len(choices) for choices in SLOTS.values())
