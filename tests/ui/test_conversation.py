"""What tabs talk about: columns, settings, stopping, and that tabs are strangers to each other."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from lmtune.data.types import Message
from lmtune.errors import LmtuneError
from lmtune.inference.engine import Sampling
from lmtune.serve.studio import conversation as module
from lmtune.serve.studio.conversation import Activity, Conversation, Mode, Settings, Tabs
from lmtune.serve.studio.display import speaker_name
from tests.chat_models import parrot


def settings(mode: Mode = "tuned", system: str = "", model: int = 0, max_new_tokens: int = 3000) -> Settings:
    return Settings(model, mode, system, Sampling(max_new_tokens=max_new_tokens))


def finish(answer: AsyncIterator[None]) -> int:
    """Run an answer to its end; how often the page would have been redrawn."""

    async def run() -> int:
        return len([None async for _ in answer])

    return asyncio.run(run())


def said(talk: Conversation, column: int = 0) -> list[str]:
    return [message.content for message in talk.columns[column].messages]


def wait_for_no_answers(seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while any(thread.name == "lmtune-answer" for thread in threading.enumerate()):
        assert time.monotonic() < end, "a thread goes on answering"
        time.sleep(0.01)


def test_an_answer_is_followed_to_its_end() -> None:
    talk = Conversation([parrot(0.005)], Activity())
    assert finish(talk.send("Hello there, parrot, how are you today?", settings())) > 2
    assert said(talk) == [
        "Hello there, parrot, how are you today?",
        "You asked: Hello there, parrot, how are you today?",
    ]
    assert talk.num_tokens() > 5


def test_side_by_side_the_base_hears_the_whole_conversation() -> None:
    talk = Conversation([parrot()], Activity())
    finish(talk.send("one", settings()))
    finish(talk.send("two", settings("both")))
    assert said(talk) == ["one", "You asked: one", "two", "You asked: two"]
    assert said(talk, 1) == ["one", "You asked: one", "two", "Base heard: two"]
    finish(talk.retry(settings("both")))
    finish(talk.edit(2, "three", settings("both")))
    assert said(talk, 1)[2:] == ["three", "Base heard: three"]
    finish(talk.retry(settings("base")))
    assert len(talk.columns) == 1
    assert said(talk)[2:] == ["three", "Base heard: three"]


def given_by(talk: Conversation, column: int = 0) -> list[str]:
    """Who gave each answer of a column, as the page says it."""
    return [speaker_name(info) for _, info in talk.columns[column].turns if info is not None]


def test_each_answer_keeps_its_speaker_through_every_switch() -> None:
    models = [parrot(name="shop"), parrot(name="plain", adapter=False)]
    talk = Conversation(models, Activity())
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
    talk.choose(1, "tuned")
    assert given_by(talk) == ["shop · tuned"]
    finish(talk.send("four", settings(model=1)))
    assert given_by(talk) == ["shop · tuned", "plain"]
    assert talk.undo() == "four"
    assert given_by(talk) == ["shop · tuned"]


def test_a_speaker_comes_back_to_its_own_answers_as_far_as_it_gave_some() -> None:
    talk = Conversation([parrot()], Activity())
    finish(talk.send("one", settings("both")))
    talk.choose(0, "base")
    assert said(talk) == ["one", "Base heard: one"]
    finish(talk.send("two", settings("base")))
    talk.choose(0, "both")
    assert said(talk) == ["one", "You asked: one", "two", "Base heard: two"]
    assert said(talk, 1) == ["one", "Base heard: one", "two", "Base heard: two"]
    borrowed = [(speaker_name(own), [*map(speaker_name, others)]) for own, others in talk.borrowed_answers()]
    assert borrowed == [("parrot · tuned", ["parrot · base"]), ("parrot · base", [])]
    talk.choose(0, "tuned")
    finish(talk.edit(0, "new", settings("tuned")))
    talk.choose(0, "base")
    assert said(talk) == ["new", "You asked: new"]
    talk.clear()
    talk.choose(0, "both")
    assert (said(talk), said(talk, 1)) == ([], [])


def test_a_switch_stops_the_answer_under_way() -> None:
    talk = Conversation([parrot(0.002)], Activity())

    async def run() -> None:
        async for _ in talk.send("count", settings()):
            if talk.num_tokens() > 5:
                talk.choose(0, "base")

    asyncio.run(run())
    wait_for_no_answers()
    assert given_by(talk) == ["parrot · tuned"]
    talk.choose(0, "tuned")
    info = talk.columns[0].turns[-1][1]
    assert info is not None
    assert info.finish_reason == "stopped"


def test_only_the_answers_that_were_cut_go_on() -> None:
    talk = Conversation([parrot()], Activity())
    with pytest.raises(LmtuneError, match="nothing to continue"):
        finish(talk.continue_answers(settings()))
    finish(talk.send("Hello", settings("both", max_new_tokens=5)))
    cut = said(talk), said(talk, 1)
    finish(talk.continue_answers(settings("both")))
    assert (said(talk), said(talk, 1)) == (["Hello", "You asked: Hello"], ["Hello", "Base heard: Hello"])
    assert cut != (said(talk), said(talk, 1))


def test_a_question_that_one_of_two_cannot_answer_was_heard_by_nobody() -> None:
    talk = Conversation([parrot()], Activity())
    finish(talk.send("one", settings("both")))

    def fail(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs.get("adapter_names"):
            raise MemoryError("no room")

    hook = talk.columns[0].model.model.register_forward_pre_hook(fail, with_kwargs=True)
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


def test_an_abandoned_answer_is_stopped() -> None:
    activity = Activity()
    talk = Conversation([parrot(0.002)], activity)

    async def run() -> None:
        answer = talk.send("count", settings())
        await anext(answer)
        assert activity.num_answering == 1
        await answer.aclose()  # type: ignore[attr-defined]

    asyncio.run(run())
    assert activity.num_answering == 0
    wait_for_no_answers()
    assert len(said(talk)[-1]) < 500


def test_clear_during_an_answer_leaves_nothing() -> None:
    talk = Conversation([parrot(0.002)], Activity())

    async def run() -> None:
        async for _ in talk.send("count", settings("both")):
            talk.clear()

    asyncio.run(run())
    assert said(talk) == []
    assert said(talk, 1) == []
    wait_for_no_answers()


def test_an_error_reaches_the_page_and_the_question_is_taken_back() -> None:
    talk = Conversation([parrot(positions=30)], Activity())
    for mode in ("tuned", "both"):
        with pytest.raises(LmtuneError, match="at most 30"):
            finish(talk.send("much too long a question for so small a head", settings(mode)))
        assert [said(talk, column) for column in range(len(talk.columns))] == [[]] * len(talk.columns)
    with pytest.raises(LmtuneError, match="no question yet"):
        finish(talk.retry(settings()))


def test_an_app_that_closes_takes_no_further_question() -> None:
    activity = Activity()
    talk = Conversation([parrot()], activity)
    activity.closing = True
    with pytest.raises(LmtuneError, match="closing"):
        finish(talk.send("Hello", settings()))


def test_stop_all_ends_every_answer() -> None:
    activity = Activity()
    tabs = Tabs([parrot(0.002)], activity)
    talks = [tabs.of(("", str(number))) for number in range(4)]

    async def run() -> None:
        async def follow(talk: Conversation) -> None:
            async for _ in talk.send("count", settings()):
                pass

        tasks = [asyncio.create_task(follow(talk)) for talk in talks]
        while activity.num_answering < 4 or not all(talk.num_tokens() for talk in talks):
            await asyncio.sleep(0.01)
        activity.stop_all()
        await asyncio.wait_for(asyncio.gather(*tasks), 5)

    asyncio.run(run())
    assert activity.num_answering == 0
    wait_for_no_answers()


def test_tabs_are_apart_and_forgotten_when_closed() -> None:
    tabs = Tabs([parrot()], Activity())
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
    monkeypatch.setattr(module, "_MAX_CACHES", 2)
    tabs = Tabs([parrot()], Activity())
    talks = {key: tabs.of(("", key)) for key in "abc"}
    for talk in talks.values():
        finish(talk.send("Hello", settings()))
    tabs.of(("", "a"))
    assert not talks["b"].columns[0]._caches
    assert talks["a"].columns[0]._caches
    assert said(talks["b"]) == ["Hello", "You asked: Hello"]
    tabs.of(("", "d"))
    assert len(tabs) == 3
    assert tabs.of(("", "b")) is not talks["b"]
    assert talks["b"].columns[0].messages == [] != [Message("user", "Hello")]


# --- the browser's copy

MODELS = [parrot(name="shop"), parrot(name="plain", adapter=False)]


def talked() -> Conversation:
    talk = Conversation(MODELS, Activity())
    finish(talk.send("one", settings()))
    finish(talk.send("two é <b>", settings("both")))
    return talk


def test_a_conversation_comes_back_whole() -> None:
    talk, again = talked(), Conversation(MODELS, Activity())
    assert again.restore_json(talk.to_json()) == (0, "both")
    assert [session.turns for session in again.columns] == [session.turns for session in talk.columns]
    finish(again.send("three", settings("both")))
    assert [session.messages[-1].content for session in again.columns] == ["You asked: three", "Base heard: three"]
    choices: tuple[tuple[Mode, int], ...] = (("base", 0), ("tuned", 1))
    for mode, model in choices:
        talk.choose(model, mode)
        assert again.restore_json(talk.to_json()) == (model, mode)
        assert again.columns[0].turns == talk.columns[0].turns


def test_nothing_is_kept_of_an_empty_conversation_or_one_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Conversation(MODELS, Activity()).to_json() == ""
    monkeypatch.setattr(module, "_MAX_JSON", 20)
    assert talked().to_json() == ""


GOOD = [1, 1, [["shop", False, [["one"], ["two", "shop", False, "stop"]]]]]


@pytest.mark.parametrize(
    "copy",
    [
        "", "{", "[" * 100_000, "[]", "{}", [2, *GOOD[1:]], [1, 0, GOOD[2]], [1, 2, GOOD[2]], [1, 2, GOOD[2] * 2],
        [1, 1, [["other", False, GOOD[2][0][2]]]], [1, 1, [["shop", False, [["one"]]]]], [1, 1, [["shop", False]]],
        [1, 1, [["shop", False, [["two", "shop", False, "stop"], ["one"]]]]], [1, 1, [[["shop"], False, []]]],
        [1, 1, [["shop", False, [["one"], ["two", "shop", 7, "stop"]]]]], [1, "1", GOOD[2]],
        [1, 1, [["shop", False, [["one"], ["two", "shop", False, "gone"]]]]], [1, 1, [["shop", False, "ab"]]],
        [1, 1, [["shop", False, [["\ud800"], ["two", "shop", False, "stop"]]]]],
        [1, 1, [["shop", False, [["one"], ["two", {}, False, "stop"]]]]],
    ],
)  # fmt: skip
def test_a_copy_in_another_form_is_left_out(copy: Any) -> None:
    talk = Conversation(MODELS, Activity())
    assert talk.restore_json(copy if isinstance(copy, str) else json.dumps(copy)) is None
    assert talk.columns[0].messages == []
    assert talk.restore_json(json.dumps(GOOD)) == (0, "tuned")
