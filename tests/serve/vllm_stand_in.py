"""What a `vllm serve` says, by a model of lmtune's own engine: `python -m tests.serve.vllm_stand_in serve MODEL …`.

Its requests and answers have the forms of vLLM 0.32; a field of a request that vLLM does not have is refused.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from lmtune.inference.load import LoadedModel
from lmtune.inference.request import Request as EngineRequest
from lmtune.inference.request import Sampling, TokenLogprobs
from lmtune.inference.shared import SharedModels
from lmtune.models.members import BASE, Members

FIELDS = {
    "model", "prompt", "stream", "max_tokens", "temperature", "top_p", "seed", "ignore_eos", "return_token_ids",
    "stop_token_ids", "skip_special_tokens", "logit_bias", "logprobs", "return_tokens_as_token_ids",
    "structured_outputs", "prompt_logprobs",
}  # fmt: skip


def application_of(model: str, name: str, key: str) -> FastAPI:
    """A server of the model in a folder, under a name."""
    shared = SharedModels("none", model)
    served: dict[str, LoadedModel] = {name: shared.load(model)}
    application = FastAPI()

    @application.middleware("http")
    async def guard(http: Request, call_next: Any) -> Response:
        if http.url.path.startswith("/v1") and http.headers.get("authorization") != f"Bearer {key}":
            return _refusal(401, "Unauthorized")
        answer: Response = await call_next(http)
        return answer

    @application.get("/health")
    async def health() -> Response:
        return Response()

    @application.get("/v1/models")
    async def models() -> dict[str, Any]:
        limit = served[name].engine.max_positions
        return {"object": "list", "data": [{"id": one, "max_model_len": limit} for one in served]}

    @application.post("/v1/load_lora_adapter")
    async def load(http: Request) -> Response:
        body = await http.json()
        served[body["lora_name"]] = shared.load(body["lora_path"])
        return PlainTextResponse(f"Success: LoRA adapter '{body['lora_name']}' added successfully.")

    @application.post("/v1/completions")
    async def complete(http: Request) -> Response:
        body = await http.json()
        if unknown := body.keys() - FIELDS:
            return _refusal(400, f"Extra inputs: {sorted(unknown)}")
        if (found := served.get(body["model"])) is None:
            return _refusal(404, f"The model `{body['model']}` does not exist.")
        members = Members((BASE,)) if body["model"] == name else found.members
        if "prompt_logprobs" in body:
            return JSONResponse(_scored(found, members, body))
        return StreamingResponse(_chunks(found, members, body), media_type="text/event-stream")

    return application


def _refusal(status: int, message: str) -> Response:
    return JSONResponse(
        {"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}}, status
    )


def _scored(found: LoadedModel, members: Members, body: dict[str, Any]) -> dict[str, Any]:
    places = found.engine.score(body["prompt"], members, max(1, body["prompt_logprobs"]))
    told = [
        {str(token): {"logprob": value, "rank": rank, "decoded_token": "…"}
         for rank, (token, value) in enumerate([(place.token, place.logprob), *place.top])}
        for place in places
    ]  # fmt: skip
    return {"choices": [{"index": 0, "text": "…", "finish_reason": "length", "prompt_logprobs": [None, *told]}]}


def _chunks(found: LoadedModel, members: Members, body: dict[str, Any]) -> Iterator[bytes]:
    stops = body["stop_token_ids"]
    bias = tuple((int(token), value) for token, value in body.get("logit_bias", {}).items())
    sampling = Sampling(body["temperature"], body["top_p"], body["max_tokens"], body["seed"], (), bias)
    asked = EngineRequest(body["prompt"], sampling, members, body.get("logprobs"))
    generation, count = found.engine.submit(asked), 0
    for count, token in enumerate(generation, start=1):
        is_stop = token in stops
        reason = "stop" if is_stop else "length" if count == body["max_tokens"] else None
        logprobs = None if body.get("logprobs") is None else _logprobs(generation.logprobs[count - 1])
        choice = {"index": 0, "text": "…", "logprobs": logprobs, "finish_reason": reason, "token_ids": [token],
                  "prompt_token_ids": body["prompt"] if count == 1 else None}  # fmt: skip
        yield f"data: {json.dumps({'id': 'cmpl-1', 'choices': [choice]})}\n\n".encode()
        if is_stop:
            break
    yield b"data: [DONE]\n\n"


def _logprobs(one: TokenLogprobs) -> dict[str, Any]:
    tops = {f"token_id:{token}": value for token, value in (*one.top, (one.token, one.logprob))}
    return {"tokens": [f"token_id:{one.token}"], "token_logprobs": [one.logprob], "top_logprobs": [tops]}


def main(words: list[str]) -> None:
    """Serve; the words are those of `vllm serve`."""
    options = dict(itertools.pairwise(words))
    print("serve", *words, flush=True)
    application = application_of(words[1], options["--served-model-name"], os.environ["VLLM_API_KEY"])
    uvicorn.run(application, host=options["--host"], port=int(options["--port"]), log_level="warning")


if __name__ == "__main__":
    main(sys.argv[1:])
