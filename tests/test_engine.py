"""The engine: requests share each pass whatever they are and whenever they come, and each gets what it would alone."""

from __future__ import annotations

import contextlib
import itertools
import threading
from typing import Any

import pytest
import torch

from lmtune.errors import LmtuneError
from lmtune.inference import engine as engine_module
from lmtune.inference import prefixes
from lmtune.inference.engine import TransformersEngine
from lmtune.inference.request import Generation, Request, Sampling
from lmtune.models.members import AS_IS, BASE, Members
from tests.architectures import architecture
from tests.chat_models import parrot, random_model

LONG = Sampling(max_new_tokens=30)
PROMPTS = [list(range(5, 5 + length)) for length in (40, 3, 17, 1, 26, 9)]


def passes(model: Any) -> list[list[int]]:
    """`[rows, columns]` of every forward pass from now on."""
    seen: list[list[int]] = []
    model.register_forward_pre_hook(lambda m, a, kwargs: seen.append([*kwargs["input_ids"].shape]), with_kwargs=True)
    return seen


def alone(model: Any, request: Request) -> list[int]:
    """What an engine that has read nothing and serves nobody else answers."""
    return list(TransformersEngine(model).submit(request))


def interleaved(generations: list[Generation], order: int) -> list[list[int]]:
    """The tokens of all, asked for in turns; each is asked from a later turn on than the one before."""
    answers: list[list[int]] = [[] for _ in generations]
    open_ones, turn = set(range(len(generations))), 0
    while open_ones:
        for place in sorted(open_ones):
            if turn < place * order:
                continue
            token = next(generations[place], None)
            if token is None:
                open_ones.discard(place)
            else:
                answers[place].append(token)
        turn += 1
    return answers


@pytest.mark.parametrize("order", [0, 3])
def test_each_gets_the_tokens_that_it_would_get_alone(order: int) -> None:
    model = random_model(2)
    members = [AS_IS, Members((BASE,)), AS_IS, Members(("default",)), Members((BASE,)), AS_IS]
    samplings = [
        LONG,
        LONG,
        Sampling(0.9, 0.9, 20, seed=3),
        Sampling(max_new_tokens=1),
        LONG,
        Sampling(max_new_tokens=7),
    ]
    requests = [Request(*one) for one in zip(PROMPTS, samplings, members, strict=True)]
    wanted = [alone(model, request) for request in requests]
    engine = TransformersEngine(model)
    assert interleaved([engine.submit(request) for request in requests], order) == wanted
    assert TransformersEngine(model).generate(requests) == wanted
    assert [len(one) for one in wanted] == [30, 30, 20, 1, 30, 7]


def test_all_that_generate_share_a_pass() -> None:
    model = random_model()
    engine = TransformersEngine(model)
    engine.generate([Request([5])])  # of which kind its cache is is known from now on
    seen = passes(model)
    generations = [engine.submit(Request(prompt, LONG)) for prompt in PROMPTS]
    interleaved(generations, 0)
    assert [6, 1] in seen
    assert len(seen) <= 30 + 2, "the prompts are read together, too"


@pytest.mark.parametrize("name", ["qwen3_next", "gemma3_text", "gpt2", "deepseek_v3", "mamba2"])
def test_caches_of_every_kind_are_shared(name: str) -> None:
    """Windows that move on, states in place of keys, keys and values of different sizes, learned positions."""
    model = architecture(name).eval()
    prompts = [[5 + (7 * place + step) % 90 for step in range(length)] for place, length in enumerate((21, 4, 33, 12))]
    requests = [Request(prompt, Sampling(max_new_tokens=12)) for prompt in prompts]
    wanted = [alone(model, request) for request in requests]
    engine = TransformersEngine(model)
    assert interleaved([engine.submit(request) for request in requests], 2) == wanted


def test_logits_in_a_batch_are_those_alone() -> None:
    model = random_model(1)
    kept: list[torch.Tensor] = []
    model.register_forward_hook(lambda m, a, output: kept.append(output.logits[:, -1]))

    def read(prompts: list[list[int]], names: list[str]) -> torch.Tensor:
        engine = TransformersEngine(model)
        engine.generate([Request([5])])
        del kept[:]
        engine.generate(
            [Request(p, Sampling(max_new_tokens=4), Members((n,))) for p, n in zip(prompts, names, strict=True)]
        )
        return torch.stack([one[-1] for one in kept])

    names = ["default", BASE, "default"]
    single = read([PROMPTS[1]], [names[1]])
    together = read([*PROMPTS[:3:2], PROMPTS[1]], [names[0], names[2], names[1]])
    assert single.shape == together.shape
    assert float((single - together).abs().max()) <= 1e-5 * float(single.abs().max())


def test_what_was_read_is_not_read_again_by_whomever() -> None:
    model = random_model()
    engine = TransformersEngine(model)
    system = list(range(100, 140))
    first = list(engine.submit(Request([*system, 5, 6], LONG)))
    seen = passes(model)
    request = Request([*system, 7, 8], LONG)
    assert list(engine.submit(request)) == alone(model, request)
    assert seen[0] == [1, 2]
    del seen[:]
    whole = Request([*system, 5, 6, *first, 9], LONG)
    assert list(engine.submit(whole)) == alone(model, whole)
    assert seen[0] == [1, 2], "the last token of an answer is read by nobody"
    del seen[:]
    list(engine.submit(Request([*system, 7, 8], LONG, Members((BASE,)))))
    assert seen[0] == [1, 42], "others read for themselves"
    nothing_kept = TransformersEngine(model, prefix_bytes=0)
    del seen[:]
    assert [list(nothing_kept.submit(request)) for _ in range(2)] == [alone(model, request)] * 2
    assert [shape for shape in seen if shape[1] > 1] == [[1, 42]] * 3


def test_few_prefixes_are_kept_and_no_more_than_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "MAX_PREFIXES", 3)
    model = random_model()
    short = Sampling(max_new_tokens=2)

    def reads_again(prompts: int, prefix_bytes: int) -> list[bool]:
        """Of each prompt, whether nothing of it was kept after the last one."""
        engine = TransformersEngine(model, prefix_bytes=prefix_bytes)
        asked = [Request([5 + place] * 20, short) for place in range(prompts)]
        for request in asked:
            list(engine.submit(request))
        seen, found = passes(model), []
        for request in reversed(asked):
            del seen[:]
            list(engine.submit(request))
            found.append([1, 20] in seen)
        return found[::-1]

    assert reads_again(3, 2**29) == [False] * 3
    assert reads_again(4, 2**29) == [True, False, False, False]
    one = 2 * 2 * 2 * 21 * 16 * 4 + 512 * 4  # layers, keys and values, heads, tokens, size of a head, fp32; logits
    assert reads_again(3, 2 * one) == [True, False, False]


def test_one_that_is_cancelled_leaves_and_the_others_go_on() -> None:
    model = random_model()
    engine = TransformersEngine(model)
    requests = [Request(prompt, LONG) for prompt in PROMPTS[:3]]
    wanted = [alone(model, request) for request in requests]
    first, second, third = (engine.submit(request) for request in requests)
    begun = [next(generation) for generation in (first, second, third)]
    second.cancel()
    assert list(second) == []
    assert second.finish_reason == "stopped"
    seen = passes(model)
    assert [begun[0], *first] == wanted[0]
    assert {rows for rows, _ in seen} == {2}
    del third  # nobody waits for it
    assert list(engine.submit(requests[1])) == wanted[1]
    assert seen[-1][0] == 1


def test_more_than_there_is_room_for_wait_in_their_order() -> None:
    model = random_model()
    engine = TransformersEngine(model, batch_tokens=2 * (9 + 30))
    prompts = [[5 + place] * 9 for place in range(5)]
    requests = [Request(prompt, LONG) for prompt in prompts]
    wanted = [alone(model, request) for request in requests]
    seen = passes(model)
    generations = [engine.submit(request) for request in requests]
    assert list(generations[-1]) == wanted[-1]
    assert all(generation.is_over for generation in generations)
    assert max(rows for rows, _ in seen) == 2
    assert [list(generation) for generation in generations[:-1]] == wanted[:-1]


def test_an_error_ends_those_of_its_pass_alone() -> None:
    model = random_model()
    engine = TransformersEngine(model)
    generations = [engine.submit(Request(prompt, LONG)) for prompt in PROMPTS[:2]]
    for generation in generations:
        next(generation)
    hook = model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
    for generation in generations:
        with pytest.raises(MemoryError, match="no room"):
            list(generation)
        assert generation.finish_reason == "stopped"
    hook.remove()
    assert list(engine.submit(Request(PROMPTS[0], LONG))) == alone(model, Request(PROMPTS[0], LONG))


@pytest.mark.parametrize("cancels", [True, False])
def test_no_memory_for_what_is_kept_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch, cancels: bool) -> None:
    model = random_model()
    engine = TransformersEngine(model)
    list(engine.submit(Request(PROMPTS[0], LONG)))
    under_way, other = engine.submit(Request(PROMPTS[1], LONG)), engine.submit(Request(PROMPTS[3], LONG))
    for generation in (under_way, other):
        next(generation)
    for module in (engine_module, prefixes):
        monkeypatch.setattr(module, "copy_of", lambda cache: (_ for _ in ()).throw(MemoryError("no room")))
    if cancels:
        other.cancel()  # what it has read is kept
    asked = under_way if cancels else engine.submit(Request(PROMPTS[0], LONG))  # of which much was read
    engine.step()  # as a server's thread does
    with pytest.raises(MemoryError, match="no room"):
        list(asked)
    assert engine.num_requests == 0
    monkeypatch.undo()
    assert list(engine.submit(Request(PROMPTS[0], LONG))) == alone(model, Request(PROMPTS[0], LONG))


def test_a_row_whose_logits_are_not_finite_is_the_only_one_that_ends() -> None:
    model = random_model(adapter=False)
    engine = TransformersEngine(model)
    engine.generate([Request([5])])
    with torch.no_grad():
        model.model.embed_tokens.weight[400] = float("nan")
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.nan_to_num())
    good, bad = engine.submit(Request([5, 6], LONG)), engine.submit(Request([400, 6], LONG))
    with pytest.raises(LmtuneError, match="NaN or infinity"):
        list(bad)
    assert list(good) == alone(model, Request([5, 6], LONG))


def test_threads_share_passes() -> None:
    model = random_model()
    engine = TransformersEngine(model)
    requests = [Request([5 + place, *prompt], LONG) for place, prompt in enumerate(PROMPTS * 2)]
    wanted = [alone(model, request) for request in requests]
    answers: dict[int, list[int]] = {}
    threads = [
        threading.Thread(target=lambda place=place: answers.update({place: list(engine.submit(requests[place]))}))
        for place in range(len(requests))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [answers[place] for place in range(len(requests))] == wanted


def test_a_model_whose_cache_is_unknown_answers_one_by_one() -> None:
    loaded = parrot()
    prompts = [
        loaded.tokenizer.encode(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n") for text in "abc"
    ]
    requests = [Request(prompt, Sampling(max_new_tokens=40, stop_token_ids=(4,))) for prompt in prompts]
    seen = passes(loaded.model)
    answers = interleaved([loaded.engine.submit(request) for request in requests], 0)
    assert [loaded.tokenizer.decode(answer) for answer in answers] == [f"You asked: {text}" for text in "abc"]
    assert {rows for rows, _ in seen} == {1}


@pytest.mark.parametrize("adapter", [AS_IS, Members((BASE,))])
def test_log_probabilities_are_those_of_the_whole_text(adapter: Members) -> None:
    model, prompt = random_model(2), PROMPTS[0]
    others = [Request(PROMPTS[place], LONG) for place in (2, 4)]
    asked = Request(prompt, Sampling(0.8, 0.9, 20, seed=1), adapter, num_logprobs=3)
    engine = TransformersEngine(model)
    generation, *rest = [engine.submit(request) for request in (asked, *others)]
    answer, *_ = interleaved([generation, *rest], 0)
    assert [one.token for one in generation.logprobs] == answer
    scored = TransformersEngine(model).score([*prompt, *answer], adapter, num_top=3)
    switch = model.disable_adapter() if adapter != AS_IS else contextlib.nullcontext()
    with torch.no_grad(), switch:
        plain = model(torch.tensor([[*prompt, *answer]])).logits[0, :-1].log_softmax(-1)
    wanted = plain[torch.arange(len(plain)), torch.tensor([*prompt, *answer][1:])]
    assert torch.allclose(torch.tensor([one.logprob for one in scored]), wanted, atol=1e-4)
    for got, want in zip(generation.logprobs, scored[len(prompt) - 1 :], strict=True):
        assert got.logprob == pytest.approx(want.logprob, abs=1e-4)
        assert [token for token, _ in got.top] == [token for token, _ in want.top]
        assert all(one >= other for (_, one), (_, other) in itertools.pairwise(got.top))


def test_a_long_text_is_scored_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = random_model(2), PROMPTS[0]
    whole = TransformersEngine(model).score(ids)
    monkeypatch.setattr("lmtune.inference.engine._PREFILL_TOKENS", 7)
    seen = passes(model)
    pieces = TransformersEngine(model).score(ids)
    assert [columns for _, columns in seen] == [7] * 5 + [4]
    assert [one.logprob for one in pieces] == pytest.approx([one.logprob for one in whole], abs=1e-4)
    assert TransformersEngine(model).score(ids[:1]) == []


def test_prompts_that_share_a_few_tokens_are_read_together() -> None:
    engine, sampling = TransformersEngine(model := random_model(2)), Sampling(max_new_tokens=2)
    prompts = [[5, 6, 7, *range(20 + place, 40 + place)] for place in range(5)]
    first, *others = [Request(prompt, sampling) for prompt in prompts]
    list(engine.submit(first))
    seen = passes(model)
    assert interleaved([engine.submit(request) for request in others], 0) == [alone(model, one) for one in others]
    assert [4, 23] in seen


class OnlyEven:
    """Allows even tokens, and after three of them the last of the vocabulary."""

    text, starts_after = "", ""

    def __init__(self, size: int) -> None:
        self.size, self.said = size, list[int]()

    def constraint(self) -> OnlyEven:
        return self

    def allowed(self) -> torch.Tensor | None:
        ids = torch.arange(self.size)
        return ids % 2 == 0 if len(self.said) < 3 else ids == self.size - 1

    def advance(self, token: int) -> None:
        self.said.append(token)
        if token == self.size - 1:
            raise LmtuneError("it has ended")


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_a_constraint_decides_which_tokens_may_come(temperature: float) -> None:
    model, size = random_model(2), random_model(2).config.vocab_size
    for stops in ((size - 1,), ()):
        rule = OnlyEven(size)
        engine = TransformersEngine(model)
        bound = Request(PROMPTS[0], Sampling(temperature, 1.0, 9, 0, stops), grammar=rule)
        free = Request(PROMPTS[0], LONG)
        ruled, other = engine.submit(bound), engine.submit(free)
        assert [token % 2 for token in itertools.islice(ruled, 3)] == [0] * 3
        if stops:
            assert list(ruled) == []
            assert ruled.finish_reason == "stop"
        else:
            with pytest.raises(LmtuneError, match="it has ended"):
                next(ruled)
        assert list(other) == alone(model, free)
