"""A reply is taken apart alike, however its template lays it out and however it comes in pieces."""

from __future__ import annotations

import pytest

from lmtune.data.replies import ReplyFormat, ReplyParser, is_still_reasoning, split_reply

CALL, MARK, END = "\U0010f000", "\U0010f001", "\U0010f002"
MARKS = {7: CALL, 8: MARK, 9: END}
THINK = ReplyFormat("", "<think>", "</think>")
OPENED = ReplyFormat("", "<think>", "</think>", is_opened=True)
CHANNELS = ReplyFormat(
    f"{CALL}final{MARK}", f"{CALL}analysis{MARK}", f"{END}assistant{CALL}final{MARK}", marks=MARKS
)  # fmt: skip
WORD = ReplyFormat(f"final{MARK}", marks=MARKS)
CASES = [
    (ReplyFormat(), "Hi", None, "Hi"),
    (ReplyFormat(), "<think>why</think>Hi", "why", "Hi"),
    (ReplyFormat(" "), " Hi ", None, "Hi "),
    (THINK, "Hi <think> no", None, "Hi <think> no"),
    (THINK, "  Hi", None, "  Hi"),
    (THINK, "<think>\nwhy\n</think>\n\nHi", "why", "Hi"),
    (THINK, "\n<think>why</think>    place = 2\n", "why", "    place = 2\n"),
    (THINK, "<think>\na <b> </thin\n c\n</think>\n\n    place\n", "a <b> </thin\n c", "    place\n"),
    (THINK, "<think>\n\n</think>\n\nHi", None, "Hi"),
    (THINK, "<think>\nwhy", "why", ""),
    (THINK, "<thi", None, "<thi"),
    (THINK, "", None, ""),
    (OPENED, "why\n</think>\n\nHi </think>", "why", "Hi </think>"),
    (OPENED, "\n</think>\n\nHi", None, "Hi"),
    (OPENED, "why not", "why not", ""),
    (OPENED, "", None, ""),
    (CHANNELS, f"{CALL}final{MARK}  Hi", None, "  Hi"),
    (CHANNELS, f"{CALL}analysis{MARK}why{END}assistant{CALL}final{MARK}Hi", "why", "Hi"),
    (CHANNELS, f"{CALL}analysis{MARK}why{END}assis", "why", ""),
    (CHANNELS, f"{CALL}analysis{MARK}why{END}assistant and more", "whyassistant and more", ""),
    (CHANNELS, "final answer", None, "final answer"),
    (CHANNELS, "<|channel|>final<|message|>Hi", None, "<|channel|>final<|message|>Hi"),
    (WORD, f"final{MARK}Item", None, "Item"),
    (WORD, "finally", None, "finally"),
    (WORD, "final", None, "final"),
]


@pytest.mark.parametrize("step", [1, 3, 1000])
@pytest.mark.parametrize(("form", "text", "reasoning", "answer"), CASES)
def test_reasoning_and_answer(form: ReplyFormat, text: str, reasoning: str | None, answer: str, step: int) -> None:
    parser = ReplyParser(form)
    reply = "".join(parser.feed(text[at : at + step]) for at in range(0, len(text), step)) + parser.finish()
    found, said = split_reply(reply)
    assert said == answer
    assert (found or "").removesuffix("assis") == (reasoning or "")
    assert not set(reply) & set(MARKS.values())


def test_what_is_streamed_only_ever_grows() -> None:
    parser, reply, answers = ReplyParser(OPENED), "", [""]
    for letter in "because\n</think>\n\n  It is.\n\nSo.":
        reply += parser.feed(letter)
        answers.append(split_reply(reply)[1])
        assert answers[-1].startswith(answers[-2])
        assert is_still_reasoning(reply) == ("because"[:1] in reply and "</think>" not in reply)
    assert answers[-1] == "  It is.\n\nSo."
