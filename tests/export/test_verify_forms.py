"""What servers say, in the forms that they document, and what is made of it: tokens, log-probabilities, nearness."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lmtune.data.rendering import Renderer
from lmtune.data.types import Message
from lmtune.export.nearness import Nearness, divergence, of_answers, of_places
from lmtune.export.prompt_variants import CHATML as CHATML_PROMPT
from lmtune.export.prompt_variants import variants
from lmtune.export.served import Said, chat, completion, has_logprobs
from lmtune.export.tokens_of_texts import TokenNumbers
from tests.tokenizers import CHATML, LLAMA2, make_tokenizer

# /v1/completions with echo and logprobs, as vLLM answers: the prompt by id, too, and the token that follows it.
VLLM_ECHO = {
    "id": "cmpl-1", "object": "text_completion", "model": "support",
    "choices": [{
        "index": 0, "text": "Hello world!", "finish_reason": "length", "stop_reason": None,
        "logprobs": {
            "text_offset": [0, 5, 11], "tokens": ["Hello", " world", "!"], "token_logprobs": [None, -1.5, -0.25],
            "top_logprobs": [None, {" world": -1.5, " there": -0.5}, {"!": -0.25, ".": -2.0}],
        },
        "prompt_logprobs": [None, {"7": {"logprob": -1.5, "rank": 2, "decoded_token": " world"},
                                   "9": {"logprob": -0.5, "rank": 1, "decoded_token": " there"}}],
    }],
    "usage": {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3},
}  # fmt: skip
# The same of a server started with --return-tokens-as-token-ids.
VLLM_NUMBERS = {
    "choices": [{
        "text": " ok", "finish_reason": "stop",
        "logprobs": {"tokens": ["token_id:5"], "token_logprobs": [-0.1], "top_logprobs": [{"token_id:5": -0.1,
                     "token_id:6": -3.0}], "text_offset": [0]},
    }],
}  # fmt: skip
VLLM_CHAT = {
    "object": "chat.completion",
    "choices": [{
        "message": {"role": "assistant", "content": "Yes", "reasoning_content": None, "tool_calls": []},
        "finish_reason": "stop", "stop_reason": 2,
        "logprobs": {"content": [{"token": "Yes", "bytes": [89, 101, 115], "logprob": -0.2, "top_logprobs": [
            {"token": "Yes", "bytes": [89, 101, 115], "logprob": -0.2}, {"token": "No", "bytes": [78, 111],
             "logprob": -9999.0}]}]},
    }],
    "usage": {"prompt_tokens": 12, "completion_tokens": 2, "total_tokens": 14}, "prompt_logprobs": None,
}  # fmt: skip
# llama.cpp's server: chats and completions of now name tokens by id; its own route of now, and of 2024.
LLAMA_CPP_CHAT = {
    "choices": [{
        "finish_reason": "length", "index": 0, "message": {"role": "assistant", "content": "Yes"},
        "logprobs": {"content": [{"id": 5, "token": "Yes", "bytes": [89, 101, 115], "logprob": -0.2, "top_logprobs": [
            {"id": 5, "token": "Yes", "bytes": [89, 101, 115], "logprob": -0.2},
            {"id": 6, "token": "No", "bytes": [78, 111], "logprob": -1.75}]}]},
    }],
    "usage": {"completion_tokens": 1, "prompt_tokens": 12, "total_tokens": 13}, "timings": {"prompt_n": 3},
}  # fmt: skip
LLAMA_CPP_OWN = {
    "content": "Yes",
    "tokens": [],
    "stop": True,
    "stop_type": "eos",
    "tokens_evaluated": 12,
    "completion_probabilities": LLAMA_CPP_CHAT["choices"][0]["logprobs"]["content"],  # type: ignore[index]
}
LLAMA_CPP_2024 = {
    "content": "Yes", "tokens_evaluated": 12,
    "completion_probabilities": [{"content": "Yes", "probs": [
        {"tok_str": "Yes", "prob": 0.8}, {"tok_str": "No", "prob": 0.1}, {"tok_str": "?", "prob": 0.0}]}],
}  # fmt: skip
LLAMA_CPP_SAMPLED = {  # with post_sampling_probs
    "content": "Yes", "completion_probabilities": [{"id": 5, "token": "Yes", "prob": 0.8, "top_probs": [
        {"id": 5, "token": "Yes", "prob": 0.8}, {"id": 6, "token": "No", "prob": 0.2}]}],
}  # fmt: skip


def test_vllm() -> None:
    said = completion(VLLM_ECHO, [3, 7])
    assert said.prompt_names == (3, 7)
    assert said.prompt_tops == ({}, {7: -1.5, 9: -0.5})
    choice: Any = {**VLLM_ECHO["choices"][0], "prompt_logprobs": None}  # type: ignore[index,dict-item]
    said = completion({**VLLM_ECHO, "choices": [choice]}, [3, 7])
    assert said.prompt_names == ("Hello", " world")
    assert said.prompt_tops == ({}, {" world": -1.5, " there": -0.5})
    assert completion(VLLM_NUMBERS) == Said(" ok", "stop", (5,), ({5: -0.1, 6: -3.0},))
    said = chat(VLLM_CHAT)
    assert said == Said("Yes", "stop", ("Yes",), ({"Yes": -0.2, "No": -9999.0},), prompt_tokens=12)


def test_llama_cpp() -> None:
    places = ((5,), ({5: -0.2, 6: -1.75},))
    assert chat(LLAMA_CPP_CHAT) == Said("Yes", "length", *places, prompt_tokens=12)
    assert completion(LLAMA_CPP_OWN) == Said("Yes", "stop", *places, prompt_tokens=12)
    said = completion(LLAMA_CPP_2024)
    assert said.tokens == ("Yes",)
    assert said.tops[0] == pytest.approx({"Yes": math.log(0.8), "No": math.log(0.1), "?": math.log(1e-30)})
    assert completion(LLAMA_CPP_SAMPLED).tops[0] == pytest.approx({5: math.log(0.8), 6: math.log(0.2)})


@pytest.mark.parametrize(
    "tree",
    [
        {}, {"choices": []}, {"choices": None}, {"choices": [None]}, {"choices": [{"logprobs": None}]},
        {"choices": [{"text": None, "logprobs": {"content": None}}]}, {"choices": [{"message": "x"}]},
        {"choices": [{"logprobs": {"tokens": ["a"], "token_logprobs": [None, 1]}}]},
        {"choices": [{"logprobs": {"tokens": ["a"], "token_logprobs": ["x"], "top_logprobs": [7]}}]},
        {"choices": [{"logprobs": {"content": [{"token": "a", "logprob": None}]}}], "usage": {"prompt_tokens": "x"}},
        {"choices": [{"logprobs": {"content": ["a"]}, "prompt_logprobs": [None, 3]}], "usage": []},
    ],
)  # fmt: skip
def test_what_is_absent_null_or_no_number_is_left_out(tree: dict[str, Any]) -> None:
    for said in (completion(tree), chat(tree), completion(tree, [1])):
        assert not any(said.tops)
        assert not any(said.prompt_tops)
        assert (said.text, said.prompt_tokens) == ("", None)
        assert not has_logprobs(said)


def test_a_prompt_of_another_length_is_not_taken_for_scored() -> None:
    assert completion(VLLM_ECHO, [3, 7, 8]) == Said(prompt_tokens=2)
    plain = {"choices": [{"text": "!", "logprobs": {"tokens": ["!"], "token_logprobs": [-0.1], "top_logprobs": None}}]}
    assert completion(plain, [3, 7]).prompt_tops == ()
    said = completion(plain)
    assert said.tops == ({"!": -0.1},)
    assert has_logprobs(said)
    assert not has_logprobs(Said(tokens=("!",), tops=({"!": 0.0, ".": -9999.0},)))


def test_tokens_are_found_by_their_text() -> None:
    tokenizer = make_tokenizer(CHATML)
    numbers = TokenNumbers(tokenizer, len(tokenizer) - 1)
    for ids in (tokenizer.encode(" the dog\n\n<|im_end|>"), [tokenizer.convert_tokens_to_ids("Ġ")]):
        for number in ids:
            assert numbers.of(tokenizer.decode([number])) == number
    assert numbers.of("Ġthe") == numbers.of(" the")
    assert [numbers.of(text) for text in ("", "�", "not a token", -1, len(tokenizer) - 1)] == [None] * 5
    assert numbers.tops({" the": -1.0, "not a token": -2.0, 5: -3.0}) == {numbers.of(" the"): -1.0, 5: -3.0}

    pieces = {"<unk>": 0, "▁the": 1, "the": 2, "▁": 3, "<0x0A>": 4}
    backend = Tokenizer(models.BPE(pieces, [], unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    numbers = TokenNumbers(PreTrainedTokenizerFast(tokenizer_object=backend), 5)
    assert [numbers.of(text) for text in (" the", "the", " ", "▁the", "\n")] == [1, 2, 3, 1, 4]


def test_chatml_is_tried_with_and_without_a_beginning_token() -> None:
    tokenizer = make_tokenizer(LLAMA2)
    tried = variants(Renderer(tokenizer), [Message("user", "Hello")])
    forms = [ids for (variant, _), ids in tried.items() if variant is CHATML_PROMPT]
    assert [ids[0] == tokenizer.bos_token_id for ids in forms] == [False, True]
    assert forms[0] == forms[1][1:]


def logs(*probabilities: float) -> Any:
    return np.log(np.array(probabilities))


def test_divergence_is_at_most_that_of_all_tokens() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        p, q = generator.dirichlet([0.3] * 50, size=2)
        whole = float((p * np.log(p / q)).sum())
        some = [divergence(np.log(p[:k]), np.log(q[:k])) for k in (1, 5, 50)]
        assert 0 <= some[0] <= some[1] <= some[2] <= whole + 1e-6
        assert divergence(np.log(p[:5]), np.log(p[:5])) == 0


def near(to_tuned: float, to_base: float, share: float | None = None, **changes: Any) -> Nearness:
    settings = {"by": "logprobs", "between": 1.0, "rows": 4, "count": 40, "expected": {"f16": 1e-7, "q4_k_m": 0.02}}
    return Nearness(**{**settings, **changes}, to_tuned=to_tuned, to_base=to_base, share=share)  # type: ignore[arg-type]


def test_what_it_is_near_to() -> None:
    wanted = {
        "tuned": [near(1e-7, 1, 1.0), near(0.07, 1, 0.9), near(0.4, 1, by="answers"), near(9e-4, 1, expected={})],
        "base": [near(1.0, 1e-7, 0.0), near(1.0, 0.07, -0.1), near(1.0, 0.0, by="answers")],
        "neither": [near(0.2, 1.0, 0.9), near(1.0, 1.0), near(0.6, 1.0, by="answers"), near(0.05, 0.3, 0.5)],
        "unknown": [near(0.0, 0.0, between=0.0), near(0.04, 0.05), near(0.5, 0.5, by="answers"), near(0, 1, count=0)],
    }  # fmt: skip
    assert {name: [one.weights for one in each] for name, each in wanted.items()} == {
        name: [name] * len(each) for name, each in wanted.items()
    }
    assert near(3e-7, 1.0).nearest_type == "f16"
    assert near(0.01, 1.0).nearest_type == "q4_k_m"
    assert near(0.01, 1.0, expected={}).nearest_type is None
    assert near(0.01, 1.0, expected={"f16": 1e-7, "bf16": 0.004, "q8_0": 0.008}).fitting_types == ["q8_0", "bf16"]


def test_places_and_answers() -> None:
    tuned, base, half = [logs(0.9)], [logs(0.1)], [(logs(0.9) + logs(0.1)) / 2]
    assert [of_places(one, tuned, base, 1).share for one in (tuned, base, half)] == pytest.approx([1, 0, 0.5])
    assert of_places(tuned, tuned, tuned, 1).share is None
    found = of_answers(
        ["It is 7.", "It", "no", "same"], ["It is", "It is", "yes", "same"], ["It", "It", "maybe", "same"]
    )
    assert (found.count, found.rows) == (3, 4)
    assert (found.to_tuned, found.to_base) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert of_answers([""], [""], ["x"]).weights == "tuned"
