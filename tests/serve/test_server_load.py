"""32 concurrent clients: no errors except 429, correct answers only, no growth of memory."""

from __future__ import annotations

import asyncio

import psutil
import pytest
from serving import make_requests, run_load, run_sequentially, served

CLIENTS = 32


@pytest.mark.slow
def test_server_survives_a_minute_of_load(solo, tmp_path):
    solo.save(tmp_path / "solo")
    requests = make_requests(12, tokens=16)
    with served(tmp_path / "solo", "--max-concurrent", "24") as server:
        memory = psutil.Process(server.process.pid).memory_info
        alone = asyncio.run(run_sequentially(server.url, requests))
        expected = {number: text for number, text, *_ in alone.answers}
        assert len(expected) == len(requests)
        asyncio.run(run_load(server.url, requests, CLIENTS, seconds=10.0))
        before = memory().rss
        result = asyncio.run(run_load(server.url, requests, CLIENTS, seconds=60.0))
        grown = memory().rss - before
    print(f"{len(result.answers)} answers, {len(result.errors)} errors; {before:,} bytes and {grown:+,}")
    assert set(result.errors) <= {429}
    assert len(result.answers) > CLIENTS
    assert all(text == expected[number] for number, text, *_ in result.answers)
    assert grown < max(20e6, 0.05 * before)
