"""One thread that answers the requests that wait, as many together as fit."""

from __future__ import annotations

import copy
import logging
from collections import deque
from threading import Condition, Lock, Thread
from typing import Any

from solo_vlm.generate import GenerationPipeline
from solo_vlm.models.solo.processing_solo import Message
from solo_vlm.serve.batch import answer_together
from solo_vlm.serve.job import Job

logger = logging.getLogger(__name__)


class Engine:
    """Answers jobs in the order in which they come.

    Args:
        pipeline: the model. Nobody else may use it from now on.
        max_batch: jobs answered together.
        max_batch_tokens: rows times longest prompt and answer of a batch of several.
    """

    def __init__(self, pipeline: GenerationPipeline, max_batch: int, max_batch_tokens: int) -> None:
        self._running: list[Job] = []
        self._pipeline = pipeline
        self._max_batch = max_batch
        self._max_batch_tokens = max_batch_tokens
        self._jobs: deque[Job] = deque()
        self._changed = Condition()
        self._closed = False
        # A fast tokenizer changes while it encodes: no two threads may use one.
        self._encoding = Lock()
        self._tokenizer = copy.deepcopy(pipeline.processor.tokenizer)
        self._thread = Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def context(self) -> int | None:
        """Tokens of prompt and answer together, where the model has a limit."""
        return self._pipeline.context_length

    @property
    def running(self) -> int:
        """Jobs that are being answered."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Jobs that are not begun."""
        return len(self._jobs)

    def encode(self, chat: list[Message]) -> Any:
        """Model inputs of a chat; any thread may ask.

        Raises:
            SoloError: a chat that the template refuses, or longer than the model's context.
        """
        with self._encoding:
            return self._pipeline.encode([chat])

    def submit(self, job: Job) -> None:
        """Put a job in the queue."""
        with self._changed:
            self._jobs.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Drop a job that is not done: at once while it waits, with its next token while it runs."""
        with self._changed:
            job.cancelled = True
            if job in self._jobs:
                self._jobs.remove(job)

    def close(self) -> None:
        """Drop every job, and end."""
        with self._changed:
            self._closed = True
            for job in self._running:
                job.cancelled = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while not self._closed:
            batch = self._next_batch()
            try:
                if batch:
                    answer_together(self._pipeline, self._tokenizer, batch)
            except Exception as error:
                logger.exception("a batch of %d requests failed", len(batch))
                for job in batch:
                    job.put(error)
            self._running = []

    def _next_batch(self) -> list[Job]:
        """Jobs that fit together, the longest waiting first; none once the engine is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed)
            batch: list[Job] = []
            while self._jobs and not self._closed and self._fits([*batch, self._jobs[0]]):
                batch.append(self._jobs.popleft())
            self._running = batch
            return batch

    def _fits(self, batch: list[Job]) -> bool:
        """Whether jobs can be one batch: a padded row is as long as the longest prompt and answer."""
        length = max(job.prompt_tokens for job in batch) + max(job.sampling.max_tokens for job in batch)
        small = len(batch) <= self._max_batch and len(batch) * length <= self._max_batch_tokens
        return len(batch) == 1 or (small and length <= (self.context or length))
