"""The app's endpoints as a client of any kind uses them: answers, errors, leaving in the middle."""

from __future__ import annotations

import html
import json
import time
from typing import Any

import httpx
import pytest

from tests.ui.conftest import RunningApp

GOOD = [0, "tuned", "", 0, 1, 20, ""]  # model, mode, system, temperature, top p, most tokens, seed


class Client:
    """One session of Gradio's protocol, by hand."""

    def __init__(self, app: RunningApp, session: str) -> None:
        self.http = httpx.Client(base_url=app.url, timeout=30)
        self.session = session
        self.functions = {d["api_name"]: d["id"] for d in self.http.get("/config").json()["dependencies"]}

    def join(self, name: str, data: list[Any]) -> httpx.Response:
        body = {"data": data, "fn_index": self.functions[name], "session_hash": self.session}
        return self.http.post("/gradio_api/queue/join", json=body)

    def run(self, name: str, data: list[Any]) -> dict[str, Any]:
        """The last message of a call."""
        assert self.join(name, data).status_code == 200
        with self.http.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.session}) as answer:
            for line in answer.iter_lines():
                if line.startswith("data:"):
                    message: dict[str, Any] = json.loads(line[5:])
                    if message["msg"] == "process_completed":
                        return message
        raise AssertionError("the stream ended too early")


def wait_until_idle(app: RunningApp, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while app.activity.num_answering or app.activity.num_pages_drawing:
        assert time.monotonic() < end, "an answer goes on that nobody waits for"
        time.sleep(0.02)


def test_an_answer_ends_with_its_figures(app: RunningApp) -> None:
    message = Client(app, "figures").run("send", ["Hello", *GOOD])
    assert message["success"]
    assert "tokens" in str(message["output"])


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (0, 7, "not in the list"), (0, None, "model: got None"), (1, "neither", "not in the list"),
        (3, -1, "less than minimum"), (3, "hot", "Expected a `float`"), (3, True, "temperature: got True"),
        (4, 0, "less than minimum"), (5, -5, "less than minimum"), (5, 10**9, "greater than maximum"),
        (5, 2.5, "max_new_tokens: got 2.5"), (6, "-1", "seed: got '-1'"), (6, "9" * 30, "seed: got 999"),
        (6, "twelve", "seed: got 'twelve'"), (6, "\u00b2", "seed: got"),
    ],
)  # fmt: skip
def test_a_setting_out_of_bounds_is_named(app: RunningApp, place: int, value: Any, said: str) -> None:
    settings = [*GOOD]
    settings[place] = value
    found = str(Client(app, f"wrong {place} {value}").run("send", ["Hello", *settings])["output"])
    assert said in html.unescape(found)
    assert "Traceback" not in found
    assert "You asked" not in found


def test_a_call_with_too_few_values_is_refused_and_the_app_goes_on(app: RunningApp) -> None:
    client = Client(app, "few")
    for data in ([], ["Hello"], ["Hello", *GOOD, "more", "and more"]):
        response = client.join("send", data)
        assert response.status_code in (200, 400, 422)
    assert Client(app, "after").run("send", ["Hello", *GOOD])["success"]


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
