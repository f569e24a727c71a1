"""What tabs talk about: columns, settings, stopping, and that tabs are strangers to each other."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from lmtune.errors import LmtuneError
from lmtune.inference.request import Sampling
from lmtune.serve.studio import conversation as module
from lmtune.serve.studio.conversation import Activity, Conversation, Mode, Settings, Tabs
from lmtune.serve.studio.display import speaker_name
from tests.chat_models import parrot

MODELS = [parrot(name="shop"), parrot(name="plain", adapter=False)]


def settings(mode: Mode = "tuned", system: str = "", model: int = 0, max_new_tokens: int = 3000) -> Settings:
    return Settings(model, mode, system, Sampling(max_new_tokens=max_new_tokens))


def finish(answer: AsyncIterator[None]) -> int:
    """Run an answer to its end; how often the page would have been redrawn."""

    async def run() -> int:
        return len([None async for _ in answer])

    return asyncio.run(run())


def said(talk: Conversation, column: int = 0) -> list[str]:
    return [message.content for message in talk.columns[column].messages]


def given_by(talk: Conversation, column: int = 0) -> list[str]:
    """Who gave each answer of a column, as the page says it."""
    return [speaker_name(info) for _, info in talk.columns[column].turns if info is not None]


def wait_for_no_answers(seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while any(thread.name == "lmtune-answer" for thread in threading.enumerate()):
        assert time.monotonic() < end, "a thread goes on answering"
        time.sleep(0.01)


def test_side_by_side_the_base_hears_the_whole_conversation() -> None:
    talk = Conversation([parrot(0.02)], Activity())
    assert finish(talk.send("one", settings())) > 1
    finish(talk.send("two", settings("both")))
    assert said(talk) == ["one", "You asked: one", "two", "You asked: two"]
    assert said(talk, 1) == ["one", "You asked: one", "two", "Base heard: two"]
    finish(talk.edit(2, "three", settings("both")))
    assert said(talk, 1)[2:] == ["three", "Base heard: three"]
    finish(talk.retry(settings("base")))
    assert len(talk.columns) == 1
    assert said(talk)[2:] == ["three", "Base heard: three"]


def test_each_answer_keeps_its_speaker_through_every_switch() -> None:
    talk = Conversation(MODELS, Activity())
    finish(talk.send("one", settings("tuned")))
    finish(talk.send("two", settings("both")))
    assert given_by(talk) == ["shop · tuned", "shop · tuned"]
    assert given_by(talk, 1) == ["shop · tuned", "shop · base"]
    talk.choose(0, "base")
    assert said(talk) == ["one", "You asked: one", "two", "Base heard: two"]
    finish(talk.edit(0, "three", settings("base")))
    talk.choose(0, "both")
    assert given_by(talk) == given_by(talk, 1) == ["shop · base"]
    finish(talk.retry(settings("both")))
    assert (given_by(talk), given_by(talk, 1)) == (["shop · tuned"], ["shop · base"])
    finish(talk.send("four", settings(model=1)))
    assert given_by(talk) == ["shop · tuned", "plain"]
    assert talk.undo() == "four"
    assert given_by(talk) == ["shop · tuned"]


def test_a_speaker_comes_back_to_its_own_answers_as_far_as_it_gave_some() -> None:
    talk = Conversation(MODELS, Activity())
    finish(talk.send("one", settings("both")))
    finish(talk.send("two", settings("base")))
    talk.choose(0, "both")
    assert said(talk) == ["one", "You asked: one", "two", "Base heard: two"]
    assert said(talk, 1) == ["one", "Base heard: one", "two", "Base heard: two"]
    finish(talk.edit(0, "new", settings("tuned")))
    talk.choose(0, "base")
    assert said(talk) == ["new", "You asked: new"]
    talk.clear()
    talk.choose(0, "both")
    assert (said(talk), said(talk, 1)) == ([], [])


def test_only_the_answers_that_were_cut_go_on() -> None:
    talk = Conversation(MODELS, Activity())
    finish(talk.send("Hello", settings("both", max_new_tokens=5)))
    cut = said(talk), said(talk, 1)
    finish(talk.continue_answers(settings("both")))
    assert (said(talk), said(talk, 1)) == (["Hello", "You asked: Hello"], ["Hello", "Base heard: Hello"])
    assert cut != (said(talk), said(talk, 1))
    with pytest.raises(LmtuneError, match="nothing to continue"):
        finish(talk.continue_answers(settings()))


def test_a_question_that_cannot_be_answered_is_taken_back_from_all() -> None:
    talk = Conversation([parrot(positions=30)], Activity())
    with pytest.raises(LmtuneError, match="at most 30"):
        finish(talk.send("much too long a question for so small a head", settings()))
    assert said(talk) == []

    talk = Conversation([parrot()], Activity())
    finish(talk.send("one", settings("both")))

    def fail_with_adapter(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs.get("adapter_names"):
            raise MemoryError("no room")

    hook = talk.columns[0].model.model.register_forward_pre_hook(fail_with_adapter, with_kwargs=True)
    with pytest.raises(MemoryError):
        finish(talk.send("two", settings("both")))
    hook.remove()
    wait_for_no_answers()
    assert (said(talk), said(talk, 1)) == (["one", "You asked: one"], ["one", "Base heard: one"])


def test_a_system_prompt_counts_from_the_next_answer_on_and_empty_is_that_of_training() -> None:
    talk = Conversation([parrot(system="Trained")], Activity())
    answers = []
    for system in ("", " Be brief. ", "  "):
        finish(talk.send("system", settings(system=system)))
        answers.append(said(talk)[-1])
    assert answers == ["Trained", "Be brief.", "Trained"]


@pytest.mark.parametrize("way", ["abandoned", "switched", "cleared", "closing"])
def test_an_answer_under_way_is_ended(way: str) -> None:
    activity = Activity()
    talk = Conversation([parrot(0.002)], activity)

    async def run() -> None:
        answer = talk.send("count", settings("both"))
        async for _ in answer:
            assert activity.num_answering == 1
            if talk.num_tokens() < 5:
                continue
            if way == "abandoned":
                await answer.aclose()  # type: ignore[attr-defined]
            elif way == "switched":
                talk.choose(0, "base")
            elif way == "cleared":
                talk.clear()
            else:
                activity.closing = True
                activity.stop_all()

    asyncio.run(asyncio.wait_for(run(), 10))
    assert activity.num_answering == 0
    wait_for_no_answers()
    assert (said(talk) == []) == (way == "cleared")
    assert len("".join(said(talk))) < 500
    if way == "closing":
        with pytest.raises(LmtuneError, match="closing"):
            finish(talk.send("Hello", settings()))


def test_tabs_are_apart_and_forgotten_when_closed() -> None:
    tabs = Tabs(MODELS, Activity())
    first, second = tabs.of(("", "a")), tabs.of(("", "b"))
    finish(first.send("secret", settings()))
    assert tabs.of(("", "a")) is first
    assert said(second) == []
    assert tabs.of(("someone", "a")) is not first
    tabs.close(("", "a"))
    assert said(first) == []
    assert tabs.of(("", "a")) is not first
    tabs.close(("", "unheard of"))


def test_the_tab_unused_for_longest_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TABS", 3)
    tabs = Tabs(MODELS, Activity())
    talks = {key: tabs.of(("", key)) for key in "abc"}
    for talk in talks.values():
        finish(talk.send("Hello", settings()))
    tabs.of(("", "a"))
    assert said(talks["b"]) == ["Hello", "You asked: Hello"]
    tabs.of(("", "d"))
    assert tabs.of(("", "b")) is not talks["b"]
    assert said(talks["b"]) == []


def test_the_browsers_copy_brings_a_conversation_back_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    talk, again = Conversation(MODELS, Activity()), Conversation(MODELS, Activity())
    assert talk.to_json() == ""
    finish(talk.send("one", settings()))
    finish(talk.send("two é <b>", settings("both")))
    assert again.restore_json(talk.to_json()) == (0, "both")
    assert [session.turns for session in again.columns] == [session.turns for session in talk.columns]
    finish(again.send("three", settings("both")))
    assert [session.messages[-1].content for session in again.columns] == ["You asked: three", "Base heard: three"]
    for mode, model in (("base", 0), ("tuned", 1)):
        talk.choose(model, mode)  # type: ignore[arg-type]
        assert again.restore_json(talk.to_json()) == (model, mode)
        assert again.columns[0].turns == talk.columns[0].turns
    monkeypatch.setattr(module, "_MAX_JSON", 20)
    assert talk.to_json() == ""


TURNS = [["one"], ["two", "shop", False, "stop"]]


@pytest.mark.parametrize(
    "copy",
    ["", "{", "[" * 100_000, [], [2, 1, [["shop", False, TURNS]]], [1, 0, [["shop", False, TURNS]]],
     [1, 1, [["other", False, TURNS]]], [1, 1, [["shop", False, TURNS[:1]]]], [1, 1, [["shop", False, TURNS[::-1]]]]],
    ids=range(9),
)  # fmt: skip
def test_a_copy_in_another_form_is_left_out(copy: Any) -> None:
    talk = Conversation(MODELS, Activity())
    assert talk.restore_json(copy if isinstance(copy, str) else json.dumps(copy)) is None
    assert talk.columns[0].messages == []
    assert talk.restore_json(json.dumps([1, 1, [["shop", False, TURNS]]])) == (0, "tuned")
