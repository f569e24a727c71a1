"""The API as OpenAI's own client uses it, and what that client cannot say."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_params

from lmtune.data.types import Message
from lmtune.inference.load import load_for_inference
from lmtune.inference.request import Request, Sampling
from lmtune.serve.openai.answers import Answering
from lmtune.serve.openai.application import build_api
from lmtune.serve.openai.catalog import Catalog
from lmtune.serve.openai.metrics import Metrics
from lmtune.serve.openai.schemas import ChatRequest, CompletionRequest
from tests.chat_models import chat_model, parrot
from tests.serve.api_server import KEY, Api, api_of

HOT: list[Any] = [{"role": "user", "content": "What is the opposite of hot?"}]
SKY: list[Any] = [{"role": "user", "content": "What colour is the sky?"}]
NUMBER = {"type": "object", "properties": {"number": {"type": "integer", "minimum": 1}}, "required": ["number"],
          "additionalProperties": False}  # fmt: skip
CHAT_FIELDS = {*chat_params.CompletionCreateParamsBase.__annotations__, "stream"}
COMPLETION_FIELDS = {*completion_create_params.CompletionCreateParamsBase.__annotations__, "stream"}
NOT_SUPPORTED = {
    "audio", "function_call", "functions", "modalities", "moderation", "prediction",
    "prompt_cache_options", "prompt_cache_retention", "reasoning_effort", "verbosity", "web_search_options",
}  # fmt: skip


@pytest.fixture(scope="module")
def api() -> Iterator[Api]:
    with api_of(
        {"tiny": load_for_inference("tiny"), "parrot": parrot(0.002), "random": chat_model(positions=64)}
    ) as one:
        yield one


def greedy(text: str) -> str:
    """What the engine alone answers."""
    loaded = load_for_inference("tiny")
    sampling = Sampling(max_new_tokens=64, stop_token_ids=tuple(loaded.renderer.stop_token_ids))
    return loaded.renderer.decode(
        list(loaded.engine.submit(Request(loaded.renderer.prompt_ids([Message("user", text)]), sampling)))
    )


def test_a_chat_is_what_the_model_says(api: Api) -> None:
    answer = api.client.chat.completions.create(model="tiny", messages=HOT, temperature=0)
    (choice,) = answer.choices
    assert choice.message.content == greedy("What is the opposite of hot?") == "The opposite of hot is cold."
    assert (choice.finish_reason, answer.model, answer.object) == ("stop", "tiny", "chat.completion")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.completion_tokens == 7


def test_bytes_of_log_probabilities_are_whole_though_tokens_end_inside_characters(api: Api) -> None:
    asked: Any = [{"role": "user", "content": "你好"}]
    answer = api.client.chat.completions.create(model="parrot", messages=asked, logprobs=True, temperature=0)
    assert answer.choices[0].logprobs is not None
    tokens = answer.choices[0].logprobs.content or []
    said = b"".join(bytes(token.bytes or ()) for token in tokens)
    assert said.decode() == answer.choices[0].message.content
    assert "你好" in said.decode()
    assert any("\ufffd" in token.token for token in tokens)


def test_a_stream_is_the_same_in_pieces(api: Api) -> None:
    chunks = list(api.client.chat.completions.create(
        model="tiny", messages=HOT, temperature=0, stream=True, stream_options={"include_usage": True}, logprobs=True,
    ))  # fmt: skip
    *said, last = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in said) == "The opposite of hot is cold."
    assert [chunk.choices[0].finish_reason for chunk in said[-2:]] == [None, "stop"]
    assert said[0].choices[0].delta.role == "assistant"
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 7
    tokens = [
        one.token for chunk in said if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content or ()
    ]
    assert "".join(tokens) == "The opposite of hot is cold."
    assert len({chunk.id for chunk in chunks}) == 1


def test_many_clients_get_what_they_would_alone(api: Api) -> None:
    async def ask() -> list[str | None]:
        client = openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key=KEY, max_retries=0)
        asked = [
            client.chat.completions.create(model="tiny", messages=messages, temperature=0)
            for messages in [HOT, SKY] * 8
        ]
        return [answer.choices[0].message.content for answer in await asyncio.gather(*asked)]

    assert asyncio.run(ask()) == ["The opposite of hot is cold.", "The sky is blue."] * 8


def test_an_asynchronous_stream(api: Api) -> None:
    async def ask() -> str:
        client = openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key=KEY, max_retries=0)
        stream = await client.chat.completions.create(model="tiny", messages=SKY, temperature=0, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(ask()) == "The sky is blue."


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "said"), [("is", "The sky "), (["ue", "zz"], "The sky is bl"), ("blue.", "The sky is ")]
)
def test_a_stop_string_cuts_though_tokens_do_not_end_there(api: Api, stream: bool, stop: Any, said: str) -> None:
    given: dict[str, Any] = {"model": "tiny", "temperature": 0, "stop": stop, "max_tokens": 20}
    if not stream:
        (choice,) = api.client.chat.completions.create(messages=SKY, **given).choices
        assert (choice.message.content, choice.finish_reason) == (said, "stop")
        return
    chunks = list(api.client.chat.completions.create(messages=SKY, stream=True, **given))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == said
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert api.is_idle()


def test_several_answers_differ_and_a_seed_repeats_them(api: Api) -> None:
    given: dict[str, Any] = {"model": "random", "messages": HOT, "n": 4, "max_tokens": 8}
    one, two, other = (
        [choice.message.content for choice in api.client.chat.completions.create(seed=seed, **given).choices]
        for seed in (7, 7, 8)
    )
    assert one == two != other
    assert len(set(one)) > 1
    chunks = list(api.client.chat.completions.create(seed=7, stream=True, **given))
    streamed = ["".join(c.choices[0].delta.content or "" for c in chunks if c.choices[0].index == n) for n in range(4)]
    assert streamed == one
    one_token = api.client.chat.completions.create(model="tiny", messages=HOT, max_completion_tokens=1)
    assert one_token.choices[0].finish_reason == "length"


def test_log_probabilities_of_an_answer(api: Api) -> None:
    answer = api.client.chat.completions.create(
        model="tiny", messages=SKY, temperature=0, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    loaded = load_for_inference("tiny")
    prompt = loaded.renderer.prompt_ids([Message("user", SKY[0]["content"])])
    said = loaded.tokenizer.encode("The sky is blue.", add_special_tokens=False)
    scored = loaded.engine.score([*prompt, *said], num_top=3)[len(prompt) - 1 :]
    assert [one.logprob for one in logprobs.content] == pytest.approx([one.logprob for one in scored], abs=1e-4)
    for one, want in zip(logprobs.content, scored, strict=True):
        assert bytes(one.bytes or ()).decode() == one.token
        assert [top.logprob for top in one.top_logprobs] == pytest.approx([top for _, top in want.top], abs=1e-4)


def test_a_completion_echoes_and_scores_its_prompt(api: Api) -> None:
    answer = api.client.completions.create(
        model="tiny", prompt=["The sky is", "A dog"], max_tokens=3, echo=True, logprobs=2, temperature=0
    )
    sky, dog = answer.choices
    assert sky.text == "The sky is blue."
    assert dog.text.startswith("A dog")
    assert sky.logprobs is not None
    assert sky.logprobs.tokens == ["The", " sky", " is", " blue", "."]
    assert sky.logprobs.text_offset == [0, 3, 7, 10, 15]
    assert sky.logprobs.token_logprobs is not None
    assert sky.logprobs.token_logprobs[0] is None
    loaded = load_for_inference("tiny")
    scored = [one.logprob for one in loaded.engine.score(loaded.tokenizer.encode("The sky is blue."))]
    assert sky.logprobs.token_logprobs[1:] == pytest.approx(scored, abs=1e-4)
    alone = api.client.completions.create(model="tiny", prompt="The sky is blue.", max_tokens=0, echo=True, logprobs=0)
    assert alone.choices[0].text == "The sky is blue."
    assert alone.choices[0].logprobs is not None
    assert alone.choices[0].logprobs.token_logprobs[1:] == pytest.approx(scored, abs=1e-4)  # type: ignore[index]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 5


def test_completions_of_tokens_and_texts_in_a_stream(api: Api) -> None:
    ids = load_for_inference("tiny").tokenizer.encode("The sky is")
    given: dict[str, Any] = {"model": "tiny", "max_tokens": 4, "temperature": 0}
    whole = api.client.completions.create(prompt=ids, **given)
    chunks = list(api.client.completions.create(prompt="The sky is", stream=True, echo=True, logprobs=1, **given))
    assert (
        "".join(chunk.choices[0].text for chunk in chunks) == f"The sky is{whole.choices[0].text}" == "The sky is blue."
    )
    tokens = [
        token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.tokens or ()
    ]
    assert "".join(tokens) == "The sky is blue."
    offsets = [
        at for chunk in chunks if chunk.choices[0].logprobs for at in chunk.choices[0].logprobs.text_offset or ()
    ]
    assert offsets == [0, 3, 7, 10, 15]


@pytest.mark.parametrize("model", ["tiny", "random"])
def test_an_answer_keeps_to_a_schema(api: Api, model: str) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "number", "schema": NUMBER, "strict": True}}
    answer = api.client.chat.completions.create(model=model, messages=HOT, response_format=form, seed=1, n=3)
    for choice in answer.choices:
        assert choice.message.content is not None
        if choice.finish_reason == "stop":
            assert json.loads(choice.message.content)["number"] >= 1
        else:
            assert choice.message.content.startswith('{"number": ')
    any_object = api.client.chat.completions.create(model="tiny", messages=HOT, response_format={"type": "json_object"})
    assert (any_object.choices[0].message.content or "").startswith("{")


def test_a_bias_rules_tokens_out_and_in(api: Api) -> None:
    tokenizer = load_for_inference("tiny").tokenizer
    (blue,) = tokenizer.encode(" blue", add_special_tokens=False)
    (green,) = tokenizer.encode(" green", add_special_tokens=False)
    given: dict[str, Any] = {"model": "tiny", "messages": SKY, "temperature": 0, "max_tokens": 5}

    def said(bias: dict[str, int]) -> str | None:
        return api.client.chat.completions.create(logit_bias=bias, **given).choices[0].message.content

    assert "blue" not in (said({str(blue): -100}) or "blue")
    assert (said({str(green): 100}) or "").split() == ["green"] * 5
    answer = api.http.post("/chat/completions", json={**given, "logit_bias": {"999999": 1}})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "logit_bias")


WRONG: list[tuple[dict[str, Any], str | None, str]] = [
    ({"model": "nothing"}, "model", "does not exist. This server has: tiny, parrot, random."),
    ({"temperature": 3}, "temperature", "temperature: a number (3); expected at most 2"),
    ({"temperature": "warm", "n": 0}, "temperature", "n: a number (0); expected at least 1"),
    ({"suffixes": 1}, "suffixes", "suffixes: unknown field; remove it"),
    ({"frequency_penalty": 1.5}, "frequency_penalty", "expected 0"),
    ({"messages": []}, "messages", "messages: an empty list; expected at least 1"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages",
     'messages[0].role is "king"; expected system, user, assistant or tool'),
    ({"messages": [{}]}, "messages", "messages[0] is empty; a turn is an object with role and content"),
    ({"messages": [*HOT, {"role": "system", "content": "x"}]}, "messages", "expected a turn of the user or of a tool"),
    ({"logit_bias": {"a": 1}}, "logit_bias.a", "a whole number"),
    ({"logit_bias": {"5": "b"}}, "logit_bias.5", "a number"),
    ({"stop": 17}, "stop", "stop: a number (17); expected a text or a list"),
    ({"tool_choice": {"type": "function"}}, "tool_choice.function", "missing"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages", "content"),
    ({"messages": [*HOT, {"role": "assistant", "content": "Cold."}]}, "messages", "the last turn is the assistant's"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages",
     'of type "image_url"; expected parts {"type": "text", "text": "…"}'),
    ({"messages": [{"role": "user", "content": "hot " * 5000}]}, "messages", "reads at most"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, None, ""),
    ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    ({"stop": ["a"] * 40}, "stop", "at most 16"),
    ({"tools": [{"type": "function"}]}, "tools", "tools"),
    ({"tool_choice": "required"}, "tool_choice", "needs tools"),
    ({"tool_choice": "maybe"}, "tool_choice", "'auto' or 'required'"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "missing"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "number of"}}}}, "response_format",
     "cannot be kept to: Invalid type: number of"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}}, None, "no answer does"),
]  # fmt: skip
# words for whoever has the rows or the model, not for who asks; and those of a parser
NOT_FOR_CLIENTS = ("trained", "train on", "remove the row", "Input should", "%json", "<state>", "gpt", "whom")


@pytest.mark.parametrize(("change", "param", "says"), WRONG)
def test_what_is_wrong_is_said_by_field(api: Api, change: dict[str, Any], param: str | None, says: str) -> None:
    body = json.dumps({"model": "tiny", "messages": HOT, "max_tokens": 4, **change})
    answer = api.http.post("/chat/completions", content=body, headers={"content-type": "application/json"})
    assert not any(word in answer.text for word in NOT_FOR_CLIENTS)
    if param is None:
        assert answer.status_code in (200, 400)
        assert says in answer.text
        return
    error = answer.json()["error"]
    assert answer.status_code == (404 if param == "model" else 400)
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert says in error["message"]


@pytest.mark.parametrize(("prompt", "says"), [
    ([-1], "prompt.0: a number (-1); expected a text or at least 0 or a list"),
    (7, "prompt: a number (7); expected a text or a list"),
    (["hot"] * 2000, "prompt: 2000 prompts of 2 answers each; expected at most 2048 answers in all"),
])  # fmt: skip
def test_a_prompt_that_is_none(api: Api, prompt: object, says: str) -> None:
    answer = api.http.post("/completions", json={"model": "tiny", "prompt": prompt, "n": 2, "max_tokens": 1})
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, says)


def test_what_clients_leave_unset_may_be_null_and_an_answer_empty(api: Api) -> None:
    talk = [*HOT, {"role": "assistant", "content": ""}, *HOT]
    body = {"model": "tiny", "messages": talk, "max_tokens": 2, "reasoning_effort": None, "parallel_tool_calls": None}
    assert api.http.post("/chat/completions", json=body).status_code == 200


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff", b'{"model": NaN}', b"[" * 5000, b'{"model": "tiny"}'])
def test_a_body_that_is_none(api: Api, body: bytes) -> None:
    for path in ("/chat/completions", "/completions"):
        answer = api.http.post(path, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400
        assert answer.json()["error"]["message"]


def test_a_body_that_is_not_json_is_called_so(api: Api) -> None:
    answer = api.http.post(
        "/chat/completions", content=b'{"model": "tiny",', headers={"content-type": "application/json"}
    )
    error = answer.json()["error"]
    assert error["param"] == "body"
    assert error["message"].startswith("body: not JSON at character 17: ")
    form = {"content-type": "application/x-www-form-urlencoded"}  # what curl -d sends
    answer = api.http.post("/chat/completions", content=json.dumps({"model": "tiny", "messages": HOT}), headers=form)
    assert "not sent as JSON; expected an object, and the header content-type" in answer.json()["error"]["message"]


@pytest.mark.parametrize("page", [None, FastAPI()])
def test_what_is_not_there_is_said_in_openais_shape_beside_a_page_too(page: FastAPI | None) -> None:
    with TestClient(build_api(Catalog(), Answering(Metrics()), KEY, page=page)) as client:
        asked = {("POST", "/v1/embeddings"): 404, ("GET", "/v1/chat/completions"): 405, ("PUT", "/v1/models/x"): 405,
                 ("GET", "/v1"): 404, ("TRACE", "/v1/models"): 405, ("POST", "/chat/completions"): 404}  # fmt: skip
        for (method, path), status in asked.items():
            answer = client.request(method, path, headers={"authorization": f"Bearer {KEY}"})
            assert answer.status_code == status
            assert answer.json()["error"]["type"] == "invalid_request_error"
            assert path in answer.json()["error"]["message"]


def test_a_name_that_is_not_the_servers_is_said() -> None:
    with TestClient(build_api(Catalog(), Answering(Metrics()), KEY, ["localhost", "[::1]"])) as client:
        for host, status in (("localhost:8000", 200), ("[::1]:80", 200), ("evil.example", 400), ("[", 400)):
            answer = client.get("/health", headers={"host": host})
            assert answer.status_code == status
        assert answer.json()["error"]["code"] == "invalid_host"


def test_who_has_no_key_gets_nothing(api: Api) -> None:
    url, body = f"{api.url}/v1/chat/completions", {"model": "tiny", "messages": HOT}
    for given in (b"", b"Bearer wrong", KEY.encode(), b"Bearer \xff"):
        answer = httpx.post(url, headers={b"authorization": given}, json=body)
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert KEY not in answer.text
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{api.url}/v1", api_key="other", max_retries=0).models.list()
    assert httpx.get(f"{api.url}/health").json()["status"] == "ok"


def test_models_are_listed_by_name(api: Api) -> None:
    assert [model.id for model in api.client.models.list()] == ["tiny", "parrot", "random"]
    assert api.client.models.retrieve("tiny").owned_by == "lmtune"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        api.client.models.retrieve("nothing/else")
    for path in ("/embeddings", "/chat"):
        answer = api.http.post(path, json={})
        assert (answer.status_code, answer.json()["error"]["type"]) == (404, "invalid_request_error")
    assert api.http.get("/chat/completions").status_code == 405


def test_a_client_that_leaves_ends_its_answer(api: Api) -> None:
    counting = {"model": "parrot", "messages": [{"role": "user", "content": "count"}], "max_tokens": 3000}
    with api.http.stream("POST", "/chat/completions", json={**counting, "stream": True}) as answer:
        lines = answer.iter_lines()  # kept, since the connection is closed with it
        next(lines)
        assert api.answering.num_answering == 1
    assert api.is_idle()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{api.url}/v1/chat/completions", json=counting, timeout=0.3, headers={"authorization": f"Bearer {KEY}"}
        )
    assert api.is_idle()
    counts = httpx.get(f"{api.url}/metrics").text
    assert 'lmtune_requests_total{model="parrot",status="left"} 2.0' in counts
    assert "lmtune_running_requests 0.0" in counts


def test_a_client_that_leaves_ends_the_scoring_of_its_prompts(api: Api) -> None:
    body = {"model": "random", "prompt": [[5] * 60] * 1500, "max_tokens": 0, "echo": True, "logprobs": 1}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{api.url}/v1/completions", json=body, timeout=0.3, headers={"authorization": f"Bearer {KEY}"})
    assert api.is_idle(1.0)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/chat/completions", {"model": "tiny", "messages": HOT, "temperature": 1e-300, "max_tokens": 4}, 200),
        ("/completions", {"model": "tiny", "prompt": "The", "temperature": 1e-300, "max_tokens": 4}, 200),
        ("/completions", {"model": "tiny", "prompt": "\ud83d x"}, 400),
        ("/completions", {"model": "\ud83d", "prompt": "x"}, 404),
    ],
)
def test_odd_values_are_answered_or_refused(api: Api, path: str, body: dict[str, Any], status: int) -> None:
    answer = api.http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text


def test_a_schema_that_is_too_complex_is_no_whole_answer(api: Api) -> None:
    schema = {"type": "string", "pattern": "^" + "(a|b)?" * 500 + "$"}
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match=r"cannot keep to its form|cannot be kept to"):
        api.client.chat.completions.create(model="tiny", messages=HOT, response_format=form, max_tokens=20)


def test_a_model_that_was_named_at_the_start_is_not_deleted(api: Api) -> None:
    with pytest.raises(openai.PermissionDeniedError, match="named when the server was started"):
        api.client.models.delete("tiny")
    with pytest.raises(openai.NotFoundError):
        api.client.models.delete("nothing")
    assert api.client.models.retrieve("tiny").id == "tiny"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/chat/completions", "/completions"])
def test_an_answer_that_the_server_cuts_does_not_pass_as_whole(path: str, stream: bool) -> None:
    asked = {"prompt": "The"} if path == "/completions" else {"messages": HOT}
    bias = {str(token): -100 for token in load_for_inference("tiny").renderer.stop_token_ids}
    body = {"model": "tiny", "max_tokens": 1500, "stream": stream, "logit_bias": bias, **asked}
    with api_of({"tiny": load_for_inference("tiny")}) as api, ThreadPoolExecutor() as pool:
        answer = pool.submit(api.http.post, path, json=body)
        while not api.answering.num_answering:
            time.sleep(0.01)
        time.sleep(0.2)
        api.answering.stop_all()
        said = answer.result(10)
    assert stream or said.status_code == 503
    assert "server_closing" in said.text
    assert 'finish_reason": "stop' not in said.text
    assert "[DONE]" not in said.text


def test_more_requests_than_the_bound_are_told_to_try_again() -> None:
    counting: Any = {"model": "parrot", "messages": [{"role": "user", "content": "count"}], "max_tokens": 200}
    with api_of({"parrot": parrot(0.005)}, max_requests=2) as api:
        threads = [threading.Thread(target=api.client.chat.completions.create, kwargs=counting) for _ in range(2)]
        for thread in threads:
            thread.start()
        while api.answering.num_answering < 2:
            time.sleep(0.01)
        with pytest.raises(openai.RateLimitError, match="2 requests are under way") as refused:
            api.client.chat.completions.create(**counting)
        assert refused.value.response.headers["retry-after"] == "1"
        for thread in threads:
            thread.join()
        patient = api.client.with_options(max_retries=3)
        assert patient.chat.completions.create(**{**counting, "max_tokens": 2}).choices[0].finish_reason == "length"
        api.answering.closing = True
        with pytest.raises(openai.InternalServerError, match="closing"):
            api.client.chat.completions.create(**counting)


def test_fields_are_those_of_the_openai_package() -> None:
    own = {field.alias or name for name, field in ChatRequest.model_fields.items()}
    assert own <= CHAT_FIELDS
    assert CHAT_FIELDS - own == NOT_SUPPORTED, "docs/serving.md lists what is refused"
    own = set(CompletionRequest.model_fields) - {
        "metadata", "service_tier", "store", "safety_identifier", "prompt_cache_key",  # of chats, taken here too
    }  # fmt: skip
    assert own <= COMPLETION_FIELDS
    assert COMPLETION_FIELDS - own == {"suffix"}
