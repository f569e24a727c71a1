"""`lmtune verify` beside what real servers of others have answered: recordings in `tests/data/served`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lmtune.export.served import Said, chat, completion
from tests.recorded_server import RECORDINGS, about, recorded, recorded_run, verify

FILES = sorted(path.stem for path in RECORDINGS.glob("*.jsonl"))


def test_each_server_has_a_right_and_a_wrong_recording() -> None:
    found = {(about(RECORDINGS / f"{name}.jsonl")["server"].split()[0], name.endswith("_tuned")) for name in FILES}
    assert found == {(server, right) for server in ("vLLM", "llama.cpp") for right in (True, False)}


@pytest.mark.parametrize("name", FILES)
def test_what_was_served_is_told(name: str, tmp_path: Path) -> None:
    file = RECORDINGS / f"{name}.jsonl"
    head = about(file)
    with recorded(file) as (url, missed):
        found = verify(url, recorded_run(tmp_path), head["model"])
    assert missed == [], f"verify asks otherwise: record {file} again"
    assert (found.verdict, found.weights, found.way) == (head["verdict"], head["weights"], head["way"])
    assert (found.variant and found.variant.key) == head["template"]
    assert found.is_right == name.endswith("_tuned")
    print("\n".join(found.lines))


def answers(name: str) -> list[dict[str, Any]]:
    """Each exchange of a recording."""
    return [json.loads(line) for line in (RECORDINGS / f"{name}.jsonl").read_text().splitlines()[1:]]


def said(name: str, path: str) -> tuple[Said, dict[str, Any]]:
    """What the first answer of a route says, and the request."""
    one = next(one for one in answers(name) if one["path"] == path)
    echoed = one["request"]["prompt"] if one["request"].get("echo") else None
    read = chat(one["answer"]) if path.endswith("chat/completions") else completion(one["answer"], echoed)
    return read, one["request"]


def test_forms_of_vllm() -> None:
    scored, request = said("vllm_tuned", "/v1/completions")
    assert scored.prompt_names == tuple(request["prompt"])
    assert scored.prompt_tops[0] == {}
    assert all(name in tops for name, tops in zip(scored.prompt_names[1:], scored.prompt_tops[1:], strict=True))
    answer, _ = said("vllm_tuned", "/v1/chat/completions")
    assert (answer.text, answer.finish_reason) == ("We open at 9:45 am on weekdays.", "stop")
    assert "".join(str(token) for token in answer.tokens).startswith(answer.text)
    assert all(len(tops) == 5 for tops in answer.tops)
    assert answer.prompt_tokens == 9


def test_forms_of_llama_cpp() -> None:
    scored, _ = said("llama_cpp_tuned", "/v1/completions")
    assert scored.prompt_tops == ()  # `echo` is left out without a word
    for path in ("/v1/completions", "/v1/chat/completions"):
        one = next(one for one in answers("llama_cpp_tuned") if one["path"] == path and not one["request"].get("echo"))
        answer = (chat if path.endswith("chat/completions") else completion)(one["answer"])
        assert (answer.text, answer.finish_reason) == ("We open at 9:45 am on weekdays.", "stop")
        assert all(isinstance(token, int) for token in answer.tokens)
        assert all(len(tops) == 5 and min(tops.values()) < -1 for tops in answer.tops)
        assert answer.prompt_tokens == 9
