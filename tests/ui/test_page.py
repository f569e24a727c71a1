"""The app's endpoints as a client of any kind uses them: answers, leaving in the middle, stopping.

What is wrong in a request is in tests/bad_input/test_http.py.
"""

from __future__ import annotations

import time

import httpx

from tests.ui.client import GOOD, Client, wait_until_idle
from tests.ui.conftest import RunningApp


def test_an_answer_ends_with_its_figures(app: RunningApp) -> None:
    message = Client(app, "figures").run("send", ["Hello", *GOOD])
    assert message["success"]
    assert "tokens" in str(message["output"])


def test_a_client_that_leaves_in_the_middle_ends_its_answer(app: RunningApp) -> None:
    client = Client(app, "leaver")
    assert client.join("send", ["count", *GOOD[:5], 3000, ""]).status_code == 200
    with client.http.stream("GET", "/gradio_api/queue/data", params={"session_hash": "leaver"}) as answer:
        for line in answer.iter_lines():
            if "process_generating" in line:
                break
    client.http.close()
    wait_until_idle(app)


def test_clear_and_stop_answer_at_once_during_an_answer(app: RunningApp) -> None:
    client = Client(app, "stopper")
    client.join("send", ["count", *GOOD[:5], 3000, ""])
    end = time.monotonic() + 10
    while not app.activity.num_answering:
        assert time.monotonic() < end
        time.sleep(0.02)
    config = client.http.get("/config").json()
    stop = next(d["id"] for d in config["dependencies"] if any(t[1] == "stop" for t in d["targets"]))
    body = {"data": [], "fn_index": stop, "session_hash": "stopper"}
    assert client.http.post("/gradio_api/run/predict", json=body).status_code == 200
    wait_until_idle(app, 3)


def test_nothing_but_the_four_calls_is_offered_to_programs(app: RunningApp) -> None:
    offered = httpx.get(f"{app.url}/gradio_api/info").json()["named_endpoints"]
    assert set(offered) <= {"/send", "/retry", "/edit", "/example"}
