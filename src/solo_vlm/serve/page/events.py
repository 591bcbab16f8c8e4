"""From the thread that works to the visitor who waits: what a job emits, one JSON object a line."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from threading import Event
from typing import Any

from solo_vlm.serve.page.worker import Worker
from solo_vlm.utils.errors import SoloError

Emit = Callable[[dict[str, Any]], None]
ShouldStop = Callable[[], bool]
Job = Callable[[Emit, ShouldStop], None]

_LOG = logging.getLogger(__name__)


def stream_events(worker: Worker, job: Job) -> AsyncIterator[str]:
    """Queue a job and stream what it emits. A visitor who leaves stops it.

    What it raises ends the stream as `{"event": "error", "error": ...}`, since it is too late for a status.

    Args:
        worker: does the job.
        job: gets a function that emits an event, and one that tells whether to stop.

    Raises:
        BusyError: the queue is full.
    """
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
    stop = Event()

    def emit(event: dict[str, Any] | None) -> None:
        loop.call_soon_threadsafe(events.put_nowait, event)

    def work() -> None:
        try:
            if not stop.is_set():
                job(emit, stop.is_set)
        except SoloError as error:
            emit({"event": "error", "error": str(error)})
        except Exception as error:
            _LOG.exception("an answer failed")
            emit({"event": "error", "error": f"this failed on the server: {type(error).__name__}"})
        finally:
            emit(None)

    async def lines() -> AsyncIterator[str]:
        try:
            while (event := await events.get()) is not None:
                yield json.dumps(event) + "\n"
        finally:
            stop.set()

    worker.submit(work)
    return lines()
