"""Requests in OpenAI's form: the fields that are understood, and those that are taken because clients send them.

https://platform.openai.com/docs/api-reference/chat/create and /completions/create. Any other field is an error that
names it: a field that is silently ignored is an answer that was not asked for.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_TOP_LOGPROBS = 20
MAX_CHOICES = 128
MAX_STOPS = 16
_MAX_INT = 2**63 - 1

Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
TopP = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
NumTokens = Annotated[int, Field(ge=1, le=_MAX_INT)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0, le=_MAX_INT)]
Seed = Annotated[int, Field(ge=-_MAX_INT - 1, le=_MAX_INT)]
StopText = Annotated[str, Field(min_length=1, max_length=500)]
Stop = StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)]
TokenIds = list[TokenId]


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_unset(cls, body: Any) -> Any:
        """Without unknown fields that are null, as clients send what they do not set."""
        if not isinstance(body, dict):
            return body
        known = {field.alias or name for name, field in cls.model_fields.items()}
        return {name: value for name, value in body.items() if value is not None or name in known}


class StreamOptions(_Form):
    """`include_usage`: a last chunk counts the tokens."""

    include_usage: bool = False
    include_obfuscation: bool = False


class JsonSchema(_Form):
    """The schema of an answer; it is always kept to, `strict` or not."""

    name: str = ""
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(_Form):
    """`text`, `json_object`, or `json_schema` with its schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ToolName(_Form):
    """`name` of a tool."""

    name: str


class NamedTool(_Form):
    """The tool that the answer is to call."""

    type: Literal["function"]
    function: ToolName


class _Sampled(_Form):
    """What both kinds of requests have.

    Attributes:
        user, metadata, store, service_tier, safety_identifier, prompt_cache_key: taken, without a meaning here.
        frequency_penalty, presence_penalty: only 0.
    """

    model: str
    temperature: Temperature | None = None
    top_p: TopP | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: Seed | None = None
    logit_bias: Annotated[dict[TokenId, Bias], Field(max_length=1024)] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(_Sampled):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_tokens: NumTokens | None = None
    max_completion_tokens: NumTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None


class CompletionRequest(_Sampled):
    """The body of `/v1/completions`."""

    prompt: str | Annotated[list[str], Field(min_length=1)] | TokenIds | Annotated[list[TokenIds], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=0, le=_MAX_INT)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Literal[1] | None = None
