"""Templates by what they do around an answer: what is trained, what generation is asked for, what a reply says."""

from __future__ import annotations

import pytest

from lmtune.data.rendering import Renderer, Template
from lmtune.data.replies import split_reply
from lmtune.data.types import Example, Message
from lmtune.errors import DataError, ModelError
from tests.data.test_rendering import example, trained_texts, whole
from tests.tokenizers import (
    CHANNELS,
    CHATML,
    EMPTY_THOUGHT,
    EMPTY_THOUGHT_FIELD,
    KEEPS_REASONING,
    LLAMA2,
    NO_END,
    OPENS_THINKING,
    PREFILLED,
    QWEN3,
    QWEN35,
    R1,
    TRIMS,
    WORD,
    WRAPPED,
    make_tokenizer,
    turns,
)

THOUGHT = "<think>\nwhy\n</think>\n\nHi"
IMPERATIVE = "set data.template: thinking"
_ASKS = "<|im_start|>assistant\n"
EMPTY_THINK_ONLY = CHATML.replace(_ASKS, f"{_ASKS}<think>\n\n</think>\n\n")


def renderer_of(template: str, option: Template = "auto") -> Renderer:
    return Renderer(make_tokenizer(template), option)


def reply_of(renderer: Renderer, row: Example) -> tuple[str | None, str]:
    """What a model trained on the row's last answer says, in pieces as in chat and whole as in evaluation."""
    document = renderer.render(row)[-1]
    prompt = renderer.prompt_ids(row.messages[:-1])
    assert document.input_ids[: len(prompt)].tolist() == prompt, "trained after what generation starts from"
    assert not document.loss_mask[len(prompt) - 1]
    said = document.input_ids[len(prompt) :]
    assert said[-1] in renderer.stop_token_ids
    parser = renderer.reply_parser()
    streamed = "".join(parser.feed(renderer.marked_text([token])) for token in said) + parser.finish()
    assert streamed == renderer.decode(said)
    return split_reply(streamed)


@pytest.mark.parametrize(
    ("template", "option", "row", "learns", "reasoning", "answer"),
    [
        (CHANNELS, "auto", "Hi", "<pad>final<s>Hi</s>", None, "Hi"),
        (CHANNELS, "thinking", "Hi", "<pad>final<s>Hi</s>", None, "Hi"),
        (CHANNELS, "thinking", THOUGHT,
         "<pad>analysis<s>why<|im_end|><|im_start|>assistant<pad>final<s>Hi</s>", "why", "Hi"),
        (CHANNELS, "auto", " <pad>final<s>Hi </s>", "<pad>final<s> <pad>final<s>Hi </s></s>", None,
         " <pad>final<s>Hi </s>"),
        (WORD, "auto", "final", "<pad>final<s>final<|im_end|>", None, "final"),
        (WRAPPED, "auto", "Hi", "<pad>final<s>Hi<s><|im_end|>", None, "Hi"),
        (WRAPPED, "auto", "Hi<s>", "<pad>final<s>Hi<s><s><|im_end|>", None, "Hi<s>"),
        (EMPTY_THOUGHT, "auto", "Hi", "Hi<|im_end|>", None, "Hi"),
        (EMPTY_THOUGHT, "auto", "<pad>thought\n<s>Hi", "<pad>thought\n<s>Hi<|im_end|>", None, "<pad>thought\n<s>Hi"),
        (EMPTY_THOUGHT, "thinking", "Hi", "Hi<|im_end|>", None, "Hi"),
        (EMPTY_THOUGHT_FIELD, "auto", "  Hi\n", "  Hi\n<|im_end|>", None, "  Hi\n"),
        (EMPTY_THOUGHT_FIELD, "thinking", "Hi", "Hi<|im_end|>", None, "Hi"),
        (EMPTY_THOUGHT_FIELD, "thinking", THOUGHT, "<pad>thought\nwhy\n<s>Hi<|im_end|>", "why", "Hi"),
        (PREFILLED, "auto", "Hi", "Hi<|im_end|>", None, "Hi"),
        (PREFILLED, "auto", "Sure: Hi", "Sure: Hi<|im_end|>", None, "Sure: Hi"),
        (QWEN35, "auto", "Hi", "Hi<|im_end|>", None, "Hi"),
        (QWEN35, "thinking", THOUGHT, "why\n</think>\n\nHi<|im_end|>", "why", "Hi"),
        (QWEN35, "thinking", "Hi", "\n</think>\n\nHi<|im_end|>", None, "Hi"),
        (QWEN35, "thinking", "<think>why</think>\n    Hi\n", "why\n</think>\n\n    Hi\n<|im_end|>", "why", "    Hi\n"),
        (R1, "thinking", THOUGHT, "why\n</think>\n\nHi<|im_end|>", "why", "Hi"),
        (R1, "thinking", "Hi", "\n</think>\n\nHi<|im_end|>", None, "Hi"),
        (OPENS_THINKING, "thinking", "Hi", "\n</think>\n\nHi<|im_end|>", None, "Hi"),
        (QWEN3, "thinking", THOUGHT, THOUGHT + "<|im_end|>", "why", "Hi"),
        (QWEN3, "thinking", "Hi", "<think>\n\n</think>\n\nHi<|im_end|>", None, "Hi"),
        (QWEN3, "auto", "\n\n Hi \n", "\n\n Hi \n<|im_end|>", None, "\n\n Hi \n"),
        (QWEN3, "thinking", "<think> why </think>\n    Hi\n",
         "<think>\nwhy\n</think>\n\n    Hi\n<|im_end|>", "why", "    Hi\n"),
        (KEEPS_REASONING, "thinking", THOUGHT, "why\n</think>\n\nHi<|im_end|>", "why", "Hi"),
        (CHATML, "auto", "<think>why</think>Hi", "<think>why</think>Hi<|im_end|>", "why", "Hi"),
        (TRIMS, "auto", "    place = 2\n", "    place = 2\n<|im_end|>", None, "    place = 2\n"),
        (TRIMS, "auto", "\n\n\nfox <|im_end|> ", "\n\n\nfox <|im_end|> <|im_end|>", None, "\n\n\nfox <|im_end|> "),
        (TRIMS, "auto", "  ", "  <|im_end|>", None, "  "),
        (LLAMA2, "auto", "  Hi\n", "   Hi\n </s>", None, "  Hi\n "),
        (NO_END.replace("message['content']", "(message['content'] | trim)"), "auto", "  Hi\n", "  Hi\n</s>", None,
         "  Hi\n"),
        (turns("(message['content'] | replace('\\n\\n', '\\n'))"), "auto", "a\n\n\nb", "a\n\n\nb<|im_end|>", None,
         "a\n\n\nb"),
        (turns("(message['content'].split() | join(' '))"), "auto", " a\n  b ", " a\n  b <|im_end|>", None, " a\n  b "),
    ],
)  # fmt: skip
def test_an_answer_is_trained_as_it_is_written_and_read_back(
    template: str, option: Template, row: str, learns: str, reasoning: str | None, answer: str
) -> None:
    renderer = renderer_of(template, option)
    asked = example("Hello", row)
    document = renderer.render(asked)[-1]
    assert trained_texts(renderer, document) == [learns]
    assert reply_of(renderer, asked) == (reasoning, answer)
    later = example("Hello", row, "you", row)
    assert reply_of(renderer, later) == (reasoning, answer)
    assert reply_of(renderer, example("Hello", row, system="Be brief.")) == (reasoning, answer)


@pytest.mark.parametrize(
    ("template", "option", "row", "words"),
    [
        (QWEN3, "auto", THOUGHT, IMPERATIVE), (QWEN35, "auto", THOUGHT, IMPERATIVE), (R1, "auto", THOUGHT, IMPERATIVE),
        (KEEPS_REASONING, "auto", THOUGHT, IMPERATIVE), (CHANNELS, "auto", THOUGHT, IMPERATIVE),
        (CHANNELS, "chat", THOUGHT, IMPERATIVE), (EMPTY_THOUGHT, "auto", THOUGHT, IMPERATIVE),
        (EMPTY_THOUGHT_FIELD, "auto", "<think>why", IMPERATIVE), (QWEN3, "thinking", "<think>why", "has no end"),
        (OPENS_THINKING, "auto", "Hi", "opens a <think> part before every answer"),
        (turns("(message['content'] | replace('<', '&lt;'))"), "auto", "a < b", "rewrites this answer"),
        (turns("(message['content'] | upper)").replace("PROBE", "probe"), "auto", "Hi", "rewrites"),
        (turns("(message['content'] | replace('=', ':'))"), "auto", "a = b", "rewrites this answer"),
        (turns("(message['content'] | replace('<b>', ''))"), "auto", "<b>a", "rewrites this answer"),
        (turns("(message['content'] | lower)"), "auto", "Hi", "rewrites this answer"),
        (EMPTY_THINK_ONLY, "auto", THOUGHT, IMPERATIVE),
        (EMPTY_THINK_ONLY, "thinking", THOUGHT, "empty <think> part before every answer"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_as_it_is_written_is_refused(
    template: str, option: Template, row: str, words: str
) -> None:
    if "upper" in template:
        template = turns("(message['content'] if 'probe' in message['content'] else message['content'] | upper)")
    with pytest.raises(DataError, match=r"rows.jsonl:7: ") as error:
        renderer_of(template, option).render(example("Hello", row))
    assert words in str(error.value)


def test_an_answer_in_history_may_begin_another_sequence() -> None:
    """The template trims answers in history, so what follows one with white space stands on other tokens."""
    renderer = renderer_of(TRIMS)
    first, second = renderer.render(example("Hello", "  Hi", "you", "me"))
    assert trained_texts(renderer, first) == ["  Hi<|im_end|>"]
    assert trained_texts(renderer, second) == ["me<|im_end|>"]
    assert "assistant\nHi<|im_end|>" in whole(renderer, second)
    assert len(renderer.render(example("Hello", "Hi", "you", "me"))) == 1


@pytest.mark.parametrize("stopped", ["<think>\nwhy", "<think>"])
@pytest.mark.parametrize("template", [QWEN3, R1, CHANNELS, KEEPS_REASONING])
def test_a_reply_that_was_stopped_while_it_reasoned_goes_back_as_history(template: str, stopped: str) -> None:
    renderer = renderer_of(template, "thinking")
    ids = renderer.prompt_ids([Message("user", "Hello"), Message("assistant", stopped), Message("user", "you")])
    assert ids[-1] == renderer.prompt_ids([Message("user", "you")])[-1]


def test_history_of_channels_holds_answers_alone() -> None:
    renderer = renderer_of(CHANNELS)
    text = renderer.tokenizer.decode(
        renderer.prompt_ids([Message("user", "Hello"), Message("assistant", THOUGHT), Message("user", "you")])
    )
    assert "<pad>final<s>Hi<|im_end|>" in text
    assert "why" not in text
    assert "think" not in text


def test_reasoning_that_ends_as_answers_do_is_refused_once() -> None:
    template = CHANNELS.replace("('</s>' if loop.last else '<|im_end|>')", "'<|im_end|>'")
    with pytest.raises(ModelError, match=r"data.template: thinking: .* ends reasoning with <\|im_end\|>"):
        renderer_of(template, "thinking")
    assert reply_of(renderer_of(template), example("Hello", "Hi")) == (None, "Hi")


def test_a_token_that_stands_before_every_answer_stops_no_generation() -> None:
    tokenizer = make_tokenizer(WORD)
    mark = tokenizer.convert_tokens_to_ids("<s>")
    assert Renderer(tokenizer, eos_token_ids=[mark, 9]).stop_token_ids == (4, 1, 9)


@pytest.mark.parametrize("template", [LLAMA2, turns("('' if message['role'] == 'system' else message['content'])")])
def test_a_later_system_turn_that_a_template_drops_or_writes_as_an_answer_is_refused(template: str) -> None:
    """Llama 2's template writes whatever is not the user's as an answer."""
    row = [Message("user", "a"), Message("assistant", "b"), Message("system", "s"), Message("user", "c")]
    renderer = renderer_of(template)
    with pytest.raises(DataError, match=r"rows.jsonl:7: a system turn stands after the first turn"):
        renderer.render(Example("rows.jsonl", 7, (*row, Message("assistant", "d"))))
    with pytest.raises(ModelError, match="a system turn stands after the first turn"):
        renderer.prompt_ids(row)
    assert "<|im_start|>system\ns<|im_end|>" in Renderer(make_tokenizer(CHATML)).tokenizer.decode(
        renderer_of(CHATML).prompt_ids(row)
    )
