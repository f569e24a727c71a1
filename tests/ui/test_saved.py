"""What a browser keeps of a conversation, and what of it is believed."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from lmtune.inference.engine import Sampling
from lmtune.serve.studio import saved as module
from lmtune.serve.studio.conversation import Activity, Conversation, Mode, Settings
from lmtune.serve.studio.saved import bring_back, to_text
from tests.chat_models import parrot

MODELS = [parrot(name="shop"), parrot(name="plain", adapter=False)]


def ask(talk: Conversation, text: str, mode: Mode, model: int = 0) -> None:
    async def run() -> None:
        async for _ in talk.send(text, Settings(model, mode, "", Sampling(max_new_tokens=30))):
            pass

    asyncio.run(run())


def talked() -> Conversation:
    talk = Conversation(MODELS, Activity())
    ask(talk, "one", "tuned")
    ask(talk, "two é <b>", "both")
    return talk


def test_a_conversation_comes_back_whole() -> None:
    talk, again = talked(), Conversation(MODELS, Activity())
    assert bring_back(to_text(talk, MODELS), again, MODELS) == (0, "both")
    assert [session.turns for session in again.columns] == [session.turns for session in talk.columns]
    ask(again, "three", "both")
    assert [session.messages[-1].content for session in again.columns] == ["You asked: three", "Base heard: three"]
    for mode, model in (("base", 0), ("tuned", 1)):
        talk.choose(model, mode)  # type: ignore[arg-type]
        assert bring_back(to_text(talk, MODELS), again, MODELS) == (model, mode)
        assert again.columns[0].turns == talk.columns[0].turns


def test_nothing_is_kept_of_an_empty_conversation_or_one_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Conversation(MODELS, Activity())
    assert to_text(talk, MODELS) == ""
    assert bring_back("", talk, MODELS) is None
    monkeypatch.setattr(module, "MAX_CHARACTERS", 20)
    assert to_text(talked(), MODELS) == ""


def test_the_words_of_models_that_are_not_here_stay_away() -> None:
    others = [parrot(name="other")]
    talk = Conversation(others, Activity())
    assert bring_back(to_text(talked(), MODELS), talk, others) is None
    assert talk.columns[0].messages == []


GOOD = [1, 1, [["shop", False, [["one"], ["two", "shop", False, "stop"]]]]]


@pytest.mark.parametrize(
    "wrong",
    [
        None, 5, "{", "[" * 100_000, "[]", "{}", [2, *GOOD[1:]], [1, 0, GOOD[2]], [1, 2, GOOD[2]], [1, True, []],
        [1, 3, GOOD[2] * 3], [1, 2, GOOD[2] * 2], [1, 1, [["shop", False, [["one"]]]]], [1, 1, [["shop", False]]],
        [1, 1, [["shop", False, [["two", "shop", False, "stop"], ["one"]]]]], [1, 1, [[["shop"], False, []]]],
        [1, 1, [["shop", False, [["one"], ["two", "shop", 7, "stop"]]]]], [1, "1", GOOD[2]],
        [1, 1, [["shop", False, [["one"], ["two", "shop", False, "gone"]]]]], [1, 1, [["shop", False, "ab"]]],
        [1, 1, [["shop", False, [["\ud800"], ["two", "shop", False, "stop"]]]]], [1, 1.5, GOOD[2]],
        [1, 1, [["shop", False, [["one"], ["two", {}, False, "stop"]]]]],
        [1, 1, [["shop", False, [["one"], ["two", "shop", False, ["stop"]]]]]],
    ],
)  # fmt: skip
def test_what_is_in_no_form_of_ours_is_left_out(wrong: Any) -> None:
    talk = Conversation(MODELS, Activity())
    text = wrong if isinstance(wrong, str) or wrong is None else json.dumps(wrong)
    assert bring_back(text, talk, MODELS) is None
    assert talk.columns[0].messages == []
    assert bring_back(json.dumps(GOOD), talk, MODELS) == (0, "tuned")
