"""Events reach the visitor in order, and one who leaves stops the work."""

from __future__ import annotations

import asyncio
import json
import time
from threading import Event

from solo_vlm.serve.page.events import stream_events
from solo_vlm.serve.page.worker import Worker
from solo_vlm.utils.errors import SoloError


def test_what_a_job_emits_arrives_and_its_error_comes_last():
    def job(emit, should_stop):
        emit({"number": 1})
        emit({"number": 2})
        raise SoloError("shorten it")

    async def read():
        return [json.loads(line) async for line in stream_events(Worker(0), job)]

    assert asyncio.run(read()) == [{"number": 1}, {"number": 2}, {"event": "error", "error": "shorten it"}]


def test_a_visitor_who_leaves_stops_the_job_and_those_that_wait_for_nobody():
    stopped, begun = Event(), []

    def endless(emit, should_stop):
        emit({})
        while not should_stop():
            time.sleep(0.001)
        stopped.set()

    async def leave():
        worker = Worker(2)
        first = stream_events(worker, endless)
        second = stream_events(worker, lambda emit, should_stop: begun.append(should_stop))
        await anext(first)
        waiting = asyncio.ensure_future(anext(second))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await first.aclose()
        await asyncio.to_thread(worker.submit(stopped.is_set).result, 10)

    asyncio.run(leave())
    assert stopped.is_set()
    assert begun == []
