"""Whatever a client sends, the server answers it or says what is wrong: never 500, and nothing stays under way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai.types
import openai.types.chat
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.chat_models import chat_model
from tests.serve.api_server import Api, api_of

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6,
)  # fmt: skip
TEXT = st.text(st.characters(codec=None), max_size=20)
MESSAGE: Any = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool", "developer"]) | JSON, "content": TEXT | JSON},
    optional={"name": TEXT, "tool_calls": JSON, "tool_call_id": TEXT, "reasoning_content": TEXT},
)
SAMPLED = {
    "temperature": st.floats(-1, 3) | JSON, "top_p": st.floats(-0.5, 1.5) | JSON, "n": st.integers(-1, 3) | JSON,
    "seed": st.integers(-(2**70), 2**70) | JSON, "stop": TEXT | st.lists(TEXT, max_size=5) | JSON,
    "stream": st.booleans() | JSON, "stream_options": JSON, "logit_bias": JSON, "user": TEXT,
}  # fmt: skip
FORM = st.fixed_dictionaries({"type": st.sampled_from(["text", "json_object", "json_schema"])}, optional={
    "json_schema": st.fixed_dictionaries({"name": TEXT}, optional={"schema": JSON})})  # fmt: skip
CHAT: Any = st.fixed_dictionaries(
    {"model": st.just("random") | TEXT, "messages": st.lists(MESSAGE, max_size=4) | JSON, "max_tokens": st.just(4)},
    optional={**SAMPLED, "logprobs": st.booleans() | JSON, "top_logprobs": st.integers(-1, 30), "tools": JSON,
              "tool_choice": JSON, "response_format": FORM | JSON, "max_completion_tokens": st.integers(-5, 8)},
)  # fmt: skip
COMPLETION: Any = st.fixed_dictionaries(
    {"model": st.just("random"), "max_tokens": st.integers(-1, 6),
     "prompt": TEXT | st.lists(TEXT, max_size=3) | st.lists(st.integers(-2, 400), max_size=9) | JSON},
    optional={**SAMPLED, "logprobs": st.integers(-1, 30) | JSON, "echo": st.booleans() | JSON, "suffix": TEXT},
)  # fmt: skip


@pytest.fixture(scope="module")
def api() -> Iterator[Api]:
    with api_of({"random": chat_model(positions=64)}) as one:
        yield one


def check(api: Api, path: str, body: Any, kind: Any) -> None:
    """A request has an answer of OpenAI's type, or an error in its form."""
    import json

    content = json.dumps(body).encode()
    answer = api.http.post(path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code < 500, answer.text
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    elif answer.headers["content-type"].startswith("application/json"):
        kind.model_validate(answer.json(), strict=True)
    else:
        assert answer.text.endswith("data: [DONE]\n\n")
    assert api.is_idle()


@given(CHAT)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_any_chat(api: Api, body: Any) -> None:
    check(api, "/chat/completions", body, openai.types.chat.ChatCompletion)


@given(COMPLETION)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_any_completion(api: Api, body: Any) -> None:
    check(api, "/completions", body, openai.types.Completion)
