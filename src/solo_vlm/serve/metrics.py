"""What the server tells Prometheus."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from solo_vlm.serve.engine import Engine
from solo_vlm.serve.job import Finish

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class Metrics:
    """Counters, histograms and gauges of one server, in a registry of its own.

    Args:
        engine: whose jobs are counted.
    """

    def __init__(self, engine: Engine) -> None:
        registry = self._registry = CollectorRegistry()
        self._requests = Counter(
            "solo_requests", "Requests by path and HTTP status.", ["path", "status"], registry=registry
        )
        self._answers = Counter(
            "solo_answers", "Complete answers, by their end.", ["finish_reason"], registry=registry
        )
        self._images = Counter("solo_images", "Images of prompts.", registry=registry)
        self._prompt_tokens = Counter(
            "solo_prompt_tokens", "Tokens of prompts, images included.", registry=registry
        )
        self._answer_tokens = Counter("solo_answer_tokens", "Tokens of complete answers.", registry=registry)
        self._first_text = Histogram(
            "solo_first_text_seconds",
            "From a request's last byte to the first text of its answer.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._answer = Histogram(
            "solo_answer_seconds",
            "From a request's last byte to the end of its answer.",
            buckets=_SECONDS,
            registry=registry,
        )
        running = Gauge("solo_running", "Requests that are being answered.", registry=registry)
        running.set_function(lambda: engine.running)
        waiting = Gauge("solo_waiting", "Requests that wait for the model.", registry=registry)
        waiting.set_function(lambda: engine.waiting)

    def count_request(self, path: str, status: int) -> None:
        """A request that has its answer; 499 stands for a client that has left without one."""
        self._requests.labels(path, status).inc()

    def count_prompt(self, tokens: int, images: int) -> None:
        """A prompt that will be answered."""
        self._prompt_tokens.inc(tokens)
        self._images.inc(images)

    async def observe(
        self, pieces: AsyncIterator[str | Finish], arrived: float
    ) -> AsyncIterator[str | Finish]:
        """The pieces of an answer as they are, with their times taken.

        Args:
            pieces: of `Job.events`.
            arrived: when the request was read, by `time.monotonic`.
        """
        begun = False
        async for piece in pieces:
            seconds = time.monotonic() - arrived
            if not begun:
                self._first_text.observe(seconds)
                begun = True
            if isinstance(piece, Finish):
                self._answer.observe(seconds)
                self._answers.labels(piece.reason).inc()
                self._answer_tokens.inc(piece.answer_tokens)
            yield piece

    def exposition(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry)
