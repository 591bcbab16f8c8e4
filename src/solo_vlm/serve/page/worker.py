"""One thread that does all of the model's work, and a queue of limited length before it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import BoundedSemaphore
from typing import TypeVar

Result = TypeVar("Result")


class BusyError(Exception):
    """As many jobs wait as may."""


class Worker:
    """Does one job after the other.

    Args:
        waiting: jobs that may wait while one runs.
    """

    def __init__(self, waiting: int) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._places = BoundedSemaphore(waiting + 1)

    def submit(self, job: Callable[[], Result]) -> Future[Result]:
        """Queue a job.

        Raises:
            BusyError: the queue is full.
        """
        if not self._places.acquire(blocking=False):
            raise BusyError("the model is busy and the queue is full: try again in a moment")
        future = self._thread.submit(job)
        future.add_done_callback(lambda _: self._places.release())
        return future

    def close(self) -> None:
        """Forget the jobs that wait; the running one ends in its own time."""
        self._thread.shutdown(wait=False, cancel_futures=True)
