"""What a model says, how it is streamed, and that training and chat put the same tokens before an answer."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtune.data.rendering import Renderer, Template
from lmtune.data.replies import split_reply
from lmtune.data.types import Example, Message
from lmtune.errors import ConfigError, LmtuneError
from lmtune.inference.chat import AnswerInfo, ChatSession, Detokenizer
from lmtune.inference.engine import TransformersEngine
from lmtune.inference.load import LoadedModel
from lmtune.inference.request import Request, Sampler, Sampling
from lmtune.kernels.attention import packed_attention
from tests.chat_models import chat_model, never_stops, parrot, random_model
from tests.tokenizers import CHANNELS, CHAT_TEMPLATES, EMPTY_THOUGHT_FIELD, QWEN3, QWEN35, R1, make_tokenizer

pytestmark = pytest.mark.slow  # seconds together; left out of `make test-fast`

WARM = Sampling(temperature=1.0, top_p=0.9, max_new_tokens=24, seed=5)
SHORT = Sampling(max_new_tokens=24)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return chat_model()


def generated(loaded: LoadedModel, prompt: list[int], max_new_tokens: int, use_base: bool = False) -> list[int]:
    """What transformers' own greedy generation says, without the stop token."""
    with loaded.use_base() if use_base else contextlib.nullcontext(), torch.no_grad():
        output = loaded.model.generate(
            input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=max_new_tokens,
            eos_token_id=list(loaded.renderer.stop_token_ids), pad_token_id=0,
        )  # fmt: skip
    new = output[0, len(prompt) :].tolist()
    return new[:-1] if new[-1] in loaded.renderer.stop_token_ids else new


def batch(
    loaded: LoadedModel,
    prompts: list[list[int]],
    stops: list[int] | None = None,
    max_new_tokens: int = 20,
    **limits: int,
) -> list[list[int]]:
    """What the engine generates for all prompts together."""
    sampling = Sampling(max_new_tokens=max_new_tokens, stop_token_ids=tuple(stops or loaded.renderer.stop_token_ids))
    return TransformersEngine(loaded.model, **limits).generate([Request(prompt, sampling) for prompt in prompts])


def spy_on_reading(loaded: LoadedModel) -> list[list[int]]:
    """The token ids of every forward pass from now on."""
    seen: list[list[int]] = []
    loaded.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    return seen


# --- options


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1}, {"temperature": math.nan}, {"temperature": "hot"}, {"top_p": 0.0}, {"top_p": 1.01},
        {"max_new_tokens": 0}, {"max_new_tokens": 1.5}, {"seed": -1}, {"seed": None},
    ],
)  # fmt: skip
def test_an_option_out_of_bounds_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(wrong))}: .*; expected "):
        Sampling(**wrong)


# --- the prompt


@pytest.mark.parametrize("name", ["chatml", "qwen3", "llama2"])
def test_what_is_read_is_what_training_put_before_the_answer(name: str) -> None:
    turns = [Message("user", "What is the capital of <|im_end|> France?"), Message("assistant", "Paris."),
             Message("user", "Of Italy?")]  # fmt: skip
    for count in (1, 3):
        loaded = chat_model(template=CHAT_TEMPLATES[name])  # another engine, which has read nothing
        asked = [Message("system", "Be brief."), *turns[:count]]
        document = loaded.renderer.render(Example("a", 1, (*asked, Message("assistant", "Rome."))))[-1]
        session = ChatSession(loaded, "Be brief.", turns[: count - 1])
        seen = spy_on_reading(loaded)
        session.reply(turns[count - 1].content, Sampling(max_new_tokens=1))
        loss_mask = document.loss_mask.tolist()
        first_trained = len(loss_mask) - loss_mask[::-1].index(False)
        assert seen[-1] == document.input_ids[:first_trained].tolist()


def test_training_s_system_prompt_is_used_where_the_user_gives_none() -> None:
    seen = []
    for system in (None, "Be brief.", "Be long."):
        loaded = chat_model(system="Be brief.")
        seen.append(spy_on_reading(loaded))
        ChatSession(loaded, system).reply("Hello", Sampling(max_new_tokens=1))
    assert seen[0] == seen[1] != seen[2]


def test_a_conversation_too_long_for_the_model_is_refused_and_the_question_taken_back() -> None:
    session = ChatSession(chat_model(positions=64))
    session.reply("Hello", Sampling(max_new_tokens=4))
    before = session.messages
    with pytest.raises(LmtuneError, match=r"tokens long, and random reads at most 64; clear it, or shorten"):
        session.reply("the dog " * 60)
    assert session.messages == before
    session.reply("a", Sampling(max_new_tokens=2))


# --- the answer


@pytest.mark.parametrize("use_base", [False, True])
@pytest.mark.parametrize(("seed", "dora"), [(0, False), (2, True)])
def test_temperature_0_is_transformers_greedy_generation(seed: int, dora: bool, use_base: bool) -> None:
    loaded = chat_model(seed, dora=dora)
    session = ChatSession(loaded)
    for question in ("What is the capital of France?", "the lazy dog"):
        prompt = loaded.renderer.prompt_ids([*session.messages, Message("user", question)])
        wanted = generated(loaded, prompt, 40, use_base)
        said = session.reply(question, Sampling(max_new_tokens=40), use_base)
        assert said == loaded.renderer.decode(wanted).rstrip("\ufffd")


def test_sampling_follows_the_warped_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -3.0])
    for temperature, top_p in ((0.7, 1.0), (1.5, 1.0), (1.0, 0.8)):
        weights = (logits / temperature).softmax(-1)
        kept = torch.tensor([weights[:index].sum() < top_p for index in range(4)])
        wanted = torch.where(kept, weights, 0.0)
        draws = torch.tensor([Sampler(Sampling(temperature, top_p, seed=seed))(logits) for seed in range(1500)])
        shares = torch.bincount(draws, minlength=4) / 1500
        assert torch.allclose(shares, wanted / wanted.sum(), atol=0.04)


def test_equal_seeds_give_equal_answers_whoever_else_is_speaking(model: LoadedModel) -> None:
    alone = ChatSession(model).reply("Hello", WARM)
    assert ChatSession(model).reply("Hello", Sampling(1.0, 0.9, 24, seed=6)) != alone
    first, second = ChatSession(model), ChatSession(model)
    streams = [first.stream("Hello", WARM), second.stream("Hello", WARM, use_base=True)]
    pieces: list[list[str]] = [[], []]
    while streams[0] or streams[1]:
        for index, stream in enumerate(streams):
            if stream and (piece := next(stream, None)) is not None:
                pieces[index].append(piece)
            else:
                streams[index] = None  # type: ignore[call-overload]
    assert "".join(pieces[0]) == alone
    assert "".join(pieces[1]) == ChatSession(model).reply("Hello", WARM, use_base=True) != alone


def test_an_error_inside_reaches_the_caller_as_itself(model: LoadedModel) -> None:
    session = ChatSession(chat_model())
    session.reply("Hello", SHORT)
    before = session.messages
    hook = session.model.model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
    with pytest.raises(MemoryError, match="no room"):
        session.reply("And now?", SHORT)
    hook.remove()
    assert session.messages == before
    assert session.reply("And now?", SHORT) == reply_after(before, "And now?", session.model)


def reply_after(messages: list[Message], question: str, loaded: LoadedModel) -> str:
    """What a session that has read nothing answers in this conversation."""
    return ChatSession(loaded, messages=messages).reply(question, SHORT)


def test_a_broken_model_is_said_to_be_broken() -> None:
    loaded = chat_model(adapter=False)
    with torch.no_grad():
        loaded.model.model.norm.weight.fill_(math.nan)
    with pytest.raises(LmtuneError, match="NaN or infinity"):
        ChatSession(loaded).reply("Hello")


def test_training_s_attention_is_put_aside_for_the_time(model: LoadedModel) -> None:
    wanted = ChatSession(model).reply("Hello", SHORT)
    prompt = model.renderer.prompt_ids([Message("user", "Hello")])
    wanted_batch = batch(model, [prompt], None, 24)
    with packed_attention(model.model):
        before = model.model.config._attn_implementation
        assert ChatSession(model).reply("Hello", SHORT) == wanted
        assert batch(model, [prompt], None, 24) == wanted_batch
        assert model.model.config._attn_implementation == before


# --- the KV cache


def test_a_further_turn_reads_only_its_own_tokens() -> None:
    loaded = chat_model()
    session = ChatSession(loaded)
    seen = spy_on_reading(loaded)
    session.reply("What is the capital of France?", SHORT)
    first = session.messages
    del seen[:]
    said = session.reply("Be brief.", SHORT)
    prompt = loaded.renderer.prompt_ids([*first, Message("user", "Be brief.")])
    assert len(seen[0]) <= len(prompt) - len(loaded.renderer.prompt_ids(first[:1]))
    assert prompt[-len(seen[0]) :] == seen[0]
    assert said == reply_after(first, "Be brief.", loaded)


def test_base_and_tuned_do_not_share_what_they_read(model: LoadedModel) -> None:
    session = ChatSession(model)
    for turn, use_base in enumerate([False, True, True, False]):
        before = session.messages
        fresh = ChatSession(model, messages=before)
        question = f"question {turn}"
        assert session.reply(question, SHORT, use_base) == fresh.reply(question, SHORT, use_base)


def test_retry_with_the_same_seed_says_the_same_and_reads_nothing_again() -> None:
    session = ChatSession(chat_model())
    said = session.reply("Hello", WARM)
    seen = spy_on_reading(session.model)
    assert "".join(session.retry(WARM)) == said
    assert [len(ids) for ids in seen] == [1] * len(seen)
    assert "".join(session.retry(Sampling(1.0, 0.9, 24, seed=9))) != said
    assert [message.role for message in session.messages] == ["user", "assistant"]
    assert "".join(session.retry(WARM, use_base=True)) == ChatSession(session.model).reply("Hello", WARM, use_base=True)


def test_a_cache_that_cannot_be_cropped_is_read_anew() -> None:
    loaded = chat_model(window=8)
    session = ChatSession(loaded)
    for question in ("What is the capital of France?", "Be brief."):
        before = session.messages
        assert session.reply(question, SHORT) == reply_after(before, question, loaded)
    seen = spy_on_reading(loaded)
    said = "".join(session.edit(0, "the lazy dog", SHORT))
    assert seen[0] == loaded.renderer.prompt_ids(session.messages[:1])
    assert said == reply_after([], "the lazy dog", loaded)


def test_a_long_prompt_is_read_in_parts_and_can_be_stopped_between() -> None:
    loaded = chat_model(positions=4096)
    seen = spy_on_reading(loaded)
    question = "x" * 1500
    said = ChatSession(loaded).reply(question, SHORT)
    assert [len(ids) for ids in seen][:2] == [512, 512]
    prompt = loaded.renderer.prompt_ids([Message("user", question)])
    assert said.rstrip("\ufffd") == loaded.renderer.decode(generated(loaded, prompt, 24)).rstrip("\ufffd")
    loaded = chat_model(positions=4096)
    session, seen = ChatSession(loaded), spy_on_reading(loaded)
    assert session.prompt_progress == (0, 0)
    hook = loaded.model.register_forward_pre_hook(lambda *_: session.stop())
    assert session.reply(question, SHORT) == ""
    hook.remove()
    assert len(seen) == 1
    assert session.prompt_progress[0] == 512 < session.prompt_progress[1]
    assert session.reply("Hello", SHORT) == reply_after(session.messages[:-2], "Hello", loaded)


# --- how answers end, going on, taking back


def test_an_answer_knows_who_gave_it_and_how_it_ended() -> None:
    narrow = ChatSession(parrot(positions=90))
    narrow.reply("count", Sampling(max_new_tokens=300))
    assert narrow.turns[1][1] == AnswerInfo("parrot", False, "context")
    session = ChatSession(parrot())
    session.reply("Hello")
    session.reply("count", Sampling(max_new_tokens=5), use_base=True)
    stream = session.stream("Hello", SHORT)
    next(stream)
    assert session.turns[-1][1] == AnswerInfo("parrot", False, None)
    stream.close()  # type: ignore[attr-defined]
    infos = [info for message, info in session.turns if message.role == "assistant"]
    assert infos == [
        AnswerInfo("parrot", False, "stop"), AnswerInfo("parrot", True, "length"),
        AnswerInfo("parrot", False, "stopped"),
    ]  # fmt: skip
    assert all(info is None for message, info in session.turns if message.role == "user")
    "".join(session.edit(0, "Hello", SHORT))
    assert [info for _, info in session.turns] == [None, AnswerInfo("parrot", False, "stop")]
    plain = ChatSession(parrot(adapter=False), messages=session.messages, infos=[info for _, info in session.turns])
    plain.reply("Hello", SHORT, use_base=True)
    assert plain.turns[1][1] == AnswerInfo("parrot", False, "stop")
    assert plain.turns[3][1] == AnswerInfo("parrot", None, "stop")


@pytest.mark.parametrize("use_base", [False, True])
def test_a_cut_answer_goes_on_as_if_it_had_not_been_cut(use_base: bool) -> None:
    loaded = never_stops(chat_model())
    whole = ChatSession(loaded).reply("Hello", Sampling(max_new_tokens=23), use_base)
    session = ChatSession(loaded)
    session.reply("Hello", Sampling(max_new_tokens=8), use_base)
    for more in (1, 14):
        assert session.can_continue
        "".join(session.continue_answer(Sampling(max_new_tokens=more)))
    assert session.messages == [Message("user", "Hello"), Message("assistant", whole)]
    assert session.num_answer_tokens == 23


def test_the_last_question_can_be_taken_back() -> None:
    session = ChatSession(parrot())
    assert session.undo() is None
    session.reply("one")
    session.reply("two")
    assert session.undo() == "two"
    assert session.reply("three") == "You asked: three"
    assert [message.content for message in session.messages][::2] == ["one", "three"]
    stream = session.stream("four")
    next(stream)
    assert session.undo() == "four"
    assert "".join(stream) == ""
    assert len(session.messages) == 4


# --- stop, edit, clear


def test_stop_from_another_thread_ends_the_answer_and_keeps_what_was_said(model: LoadedModel) -> None:
    session = ChatSession(model)
    stream = session.stream("Hello", Sampling(temperature=1.0, max_new_tokens=300))
    said = next(stream) + next(stream)
    stopper = threading.Thread(target=session.stop)
    stopper.start()
    stopper.join()
    said += "".join(stream)
    assert len(said) < 60
    assert 2 <= session.num_answer_tokens < 60
    assert session.messages == [Message("user", "Hello"), Message("assistant", said)]
    before = session.messages
    assert session.reply("Be brief.", SHORT) == reply_after(before, "Be brief.", model)


def test_a_new_question_ends_the_answer_under_way(model: LoadedModel) -> None:
    session = ChatSession(model)
    first = session.stream("Hello", WARM)
    said = next(first)
    answer = session.reply("Be brief.", SHORT)
    assert "".join(first) == ""
    assert session.messages == [
        Message("user", "Hello"), Message("assistant", said), Message("user", "Be brief."),
        Message("assistant", answer),
    ]  # fmt: skip
    assert answer == reply_after(session.messages[:2], "Be brief.", model)


def test_edit_replaces_a_question_and_drops_what_followed(model: LoadedModel) -> None:
    session = ChatSession(model)
    first = session.reply("Hello", SHORT)
    session.reply("What is the capital of France?", SHORT)
    session.reply("Be brief.", SHORT)
    answer = "".join(session.edit(2, "the lazy dog", SHORT))
    assert session.messages == [
        Message("user", "Hello"), Message("assistant", first), Message("user", "the lazy dog"),
        Message("assistant", answer),
    ]  # fmt: skip
    assert answer == reply_after(session.messages[:2], "the lazy dog", model)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda session: session.stream(" \n"), "question is empty"),
        (lambda session: session.edit(1, "x"), "message 1 is not a question"),
        (lambda session: session.edit(-1, "x"), "message -1 is not a question"),
        (lambda session: session.continue_answer(), "nothing to continue"),
        (lambda session: ChatSession(session.model).retry(), "no question yet"),
    ],
)
def test_what_cannot_be_asked_is_refused(ask: Callable[[ChatSession], Any], message: str) -> None:
    session = ChatSession(parrot())
    session.reply("Hello")
    with pytest.raises(LmtuneError, match=message):
        ask(session)
    assert session.messages[-1].content == "You asked: Hello"


# --- pieces of text


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), min_size=1, max_size=30))
def test_pieces_are_whole_characters_and_make_the_text(text: str) -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    decoder = Detokenizer(lambda some: str(tokenizer.decode(some)))
    pieces = [decoder.add(token) for token in ids]
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) + decoder.finish() == text


def test_a_character_cut_off_by_the_end_is_dropped_and_invalid_utf8_does_not_pile_up() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer.encode("ab😀", add_special_tokens=False)
    decoder = Detokenizer(lambda some: str(tokenizer.decode(some)))
    said = "".join(decoder.add(token) for token in ids[:-1])
    assert said + decoder.finish() == "ab"
    decoder = Detokenizer(lambda some: str(tokenizer.decode(some)))
    said = "".join(decoder.add(ids[-1]) for _ in range(100))
    assert said.count("\ufffd") > 90


# --- batches


def test_a_batch_says_what_each_prompt_alone_would(model: LoadedModel) -> None:
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
    prompts = [model.renderer.prompt_ids([Message("user", " ".join(words[:count]))]) for count in (9, 1, 5, 3)]
    stops = list(model.renderer.stop_token_ids)
    answers = batch(model, prompts, stops, 20)
    assert answers == [generated(model, prompt, 20) for prompt in prompts]
    assert batch(model, prompts, stops, 20, batch_tokens=1) == answers
    assert batch(model, [], stops, 20) == []


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("own", [{"suppress_tokens": "said"}, {"min_new_tokens": 19}])
def test_a_model_s_own_generation_settings_change_a_batch_no_more_than_a_chat(
    own: dict[str, Any], adapter: bool
) -> None:
    loaded = chat_model(seed=3, adapter=adapter)
    prompt = loaded.renderer.prompt_ids([Message("user", "the lazy dog")])
    stops = list(loaded.renderer.stop_token_ids)
    (plain,) = batch(loaded, [prompt], stops, 20)
    end = plain[3]
    (cut,) = batch(loaded, [prompt], [end], 20)
    config = loaded.model.generation_config
    for key, value in own.items():
        setattr(config, key, plain[:1] if value == "said" else value)
    assert batch(loaded, [prompt], stops, 20) == [plain]
    assert batch(loaded, [prompt], [end], 20) == [cut]
    assert loaded.model.generation_config is config, "what the model came with is put back"


def test_a_prompt_that_fills_the_model_is_refused() -> None:
    loaded = chat_model(positions=32)
    with pytest.raises(LmtuneError, match="prompt 1: 40 tokens; expected fewer than the model reads, 32"):
        batch(loaded, [[5], [5] * 40], [2], 4)


# --- replies with reasoning and channels


def scripted(template: str, option: Template, said: str, max_new_tokens: int = 64) -> LoadedModel:
    """A model that always says `said`, control tokens included."""
    tokenizer = make_tokenizer(template)
    model = random_model(adapter=False)
    renderer = Renderer(tokenizer, option)
    loaded = LoadedModel(
        name="scripted", renderer=renderer, engine=TransformersEngine(model), model=model, tokenizer=tokenizer
    )
    script = tokenizer.encode(said, add_special_tokens=False)
    place = [0]

    def follow(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        fed = kwargs["input_ids"]
        place[0] = 0 if fed.shape[1] > 1 else place[0] + 1
        output.logits[..., script[min(place[0], len(script) - 1)]] = 1e4
        return output

    loaded.model.register_forward_hook(follow, with_kwargs=True)
    return loaded


ANALYSIS = "<pad>analysis<s>why<|im_end|><|im_start|>assistant<pad>final<s>"


@pytest.mark.parametrize(
    ("template", "option", "said", "reasoning", "answer"),
    [
        (CHANNELS, "auto", "<pad>final<s>Item 5.</s>", None, "Item 5."),
        (CHANNELS, "auto", ANALYSIS + "Item 5.</s>", "why", "Item 5."),
        (R1, "thinking", "why</think>Item 5.<|im_end|>", "why", "Item 5."),
        (R1, "auto", "why</think>Item 5.<|im_end|>", "why", "Item 5."),
        (QWEN35, "thinking", "why\n</think>\n\n  Item 5.<|im_end|>", "why", "  Item 5."),
        (QWEN3, "thinking", "<think>\nwhy\n</think>\n\nItem 5.<|im_end|>", "why", "Item 5."),
        (EMPTY_THOUGHT_FIELD, "thinking", "<pad>thought\nwhy\n<s>Item 5.<|im_end|>", "why", "Item 5."),
    ],
)  # fmt: skip
def test_a_reply_is_its_answer_after_its_reasoning(
    template: str, option: Template, said: str, reasoning: str | None, answer: str
) -> None:
    loaded = scripted(template, option, said)
    session = ChatSession(loaded)
    pieces = list(session.stream("Where is item 5?", Sampling(max_new_tokens=64)))
    assert split_reply("".join(pieces)) == (reasoning, answer)
    assert session.messages[-1].content == "".join(pieces)
    assert len(pieces) > 3, "it is streamed"
    history = loaded.tokenizer.decode(loaded.renderer.prompt_ids([*session.messages, Message("user", "And 6?")]))
    assert history.count("Item 5.") == 1
    assert history.count("final") == (template == CHANNELS)
    assert "why" not in history or template == EMPTY_THOUGHT_FIELD, "which keeps reasoning in history"
