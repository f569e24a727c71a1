"""The benchmark of many clients, on a server of this process."""

from __future__ import annotations

import asyncio
import os
from argparse import Namespace

import pytest

from benchmarks.serving import measure
from lmtune.inference.load import load_for_inference
from tests.serve.api_server import KEY, api_of


def test_each_client_gets_the_tokens_that_it_is_measured_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    tiny = load_for_inference("tiny")
    with api_of({"tiny": tiny}) as api:
        one, four, left = asyncio.run(measure(Namespace(
            url=f"{api.url}/v1/", model="tiny", clients=[1, 4], tokens=12, repeats=1, leaving=3, pid=os.getpid(),
            end=list(tiny.renderer.stop_token_ids),
        )))  # fmt: skip
        assert api.is_idle()
    assert (one["tokens"], four["tokens"]) == (12, 48)
    assert 0 < four["first_p50"] <= four["first_p99"] <= four["end_p99"]
    assert four["tokens_per_second"] > 0
    assert left["left"] == 3
    assert left["memory_gib"] > 0
