"""Prometheus metrics of the server."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from solo_vlm.serve.engine import Engine, Finish

_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)  # seconds


class Metrics:
    """Counters, histograms and gauges of one server, in their own registry."""

    def __init__(self, engine: Engine) -> None:
        registry = self._registry = CollectorRegistry()

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(name, help, labels, registry=registry)

        def histogram(name: str, help: str) -> Histogram:
            return Histogram(name, help, buckets=_BUCKETS, registry=registry)

        self._requests = counter("solo_requests", "Requests by path and HTTP status.", "path", "status")
        self._answers = counter("solo_answers", "Complete answers by finish reason.", "finish_reason")
        self._images = counter("solo_images", "Images in prompts.")
        self._prompt_tokens = counter("solo_prompt_tokens", "Tokens in prompts, images included.")
        self._answer_tokens = counter("solo_answer_tokens", "Tokens in complete answers.")
        self._first_text = histogram(
            "solo_first_text_seconds", "Time from a request's last byte to the first text of its answer."
        )
        self._answer = histogram(
            "solo_answer_seconds", "Time from a request's last byte to the end of its answer."
        )
        running = Gauge("solo_running", "Requests in the current batch.", registry=registry)
        running.set_function(lambda: engine.running)
        waiting = Gauge("solo_waiting", "Requests queued for the model.", registry=registry)
        waiting.set_function(lambda: engine.waiting)

    def count_request(self, path: str, status: int) -> None:
        """Count a finished request; status 499 means that the client left before the response."""
        self._requests.labels(path, status).inc()

    def count_prompt(self, tokens: int, images: int) -> None:
        """Count a prompt that is about to be answered."""
        self._prompt_tokens.inc(tokens)
        self._images.inc(images)

    async def observe(
        self, events: AsyncIterator[str | Finish], arrived: float
    ) -> AsyncIterator[str | Finish]:
        """Yield the events of an answer unchanged, and record their times.

        Args:
            events: Result of `Request.events`.
            arrived: Value of `time.monotonic` when the request was read.
        """
        begun = False
        async for event in events:
            seconds = time.monotonic() - arrived
            if not begun:
                self._first_text.observe(seconds)
                begun = True
            if isinstance(event, Finish):
                self._answer.observe(seconds)
                self._answers.labels(event.reason).inc()
                self._answer_tokens.inc(event.completion_tokens)
            yield event

    def exposition(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)
