"""What a server counts, in the text form of Prometheus: https://prometheus.io/docs/instrumenting/exposition_formats/."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """Counts requests, tokens and seconds, by model."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("lmtune_requests", "Requests that have ended", ["model", "status"], registry=registry)
        self._prompt = Counter("lmtune_prompt_tokens", "Tokens of prompts", ["model"], registry=registry)
        self._tokens = Counter("lmtune_generated_tokens", "Tokens of answers", ["model"], registry=registry)
        self._first = Histogram(
            "lmtune_first_token_seconds", "Until the first token", ["model"], buckets=_SECONDS, registry=registry
        )
        self._seconds = Histogram(
            "lmtune_request_seconds", "Until the end of an answer", ["model"], buckets=_SECONDS, registry=registry
        )
        self._running = Gauge("lmtune_running_requests", "Under way or waiting", registry=registry)

    def answered(self, model: str, status: str, prompt_tokens: int, tokens: int, seconds: float) -> None:
        """A request has ended: `ok`, `error`, or `left` where the client was gone."""
        self._requests.labels(model, status).inc()
        self._prompt.labels(model).inc(prompt_tokens)
        self._tokens.labels(model).inc(tokens)
        self._seconds.labels(model).observe(seconds)

    def began(self, model: str, seconds: float) -> None:
        """The first token of an answer is there, after so long."""
        self._first.labels(model).observe(seconds)

    def running(self, number: int) -> None:
        """So many requests are under way or wait."""
        self._running.set(number)

    def text(self) -> bytes:
        """All of it for Prometheus."""
        return generate_latest(self._registry)
