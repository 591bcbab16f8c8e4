"""32 clients at once: no error but 429, no answer but the right one, no growth of memory."""

from __future__ import annotations

import asyncio

import psutil
import pytest
from serving import load, one_by_one, questions, served

CLIENTS = 32


@pytest.mark.slow
def test_a_minute_of_many_clients(solo, tmp_path):
    solo.save(tmp_path / "solo")
    asked = questions(12, tokens=16)
    with served(tmp_path / "solo", "--max-concurrent", "24") as server:
        memory = psutil.Process(server.process.pid).memory_info
        alone = asyncio.run(one_by_one(server.url, asked))
        right = {number: text for number, text, *_ in alone.answers}
        assert len(right) == len(asked)
        asyncio.run(load(server.url, asked, CLIENTS, seconds=10.0))
        before = memory().rss
        result = asyncio.run(load(server.url, asked, CLIENTS, seconds=60.0))
        grown = memory().rss - before
    print(f"{len(result.answers)} answers, {len(result.errors)} errors; {before:,} bytes and {grown:+,}")
    assert set(result.errors) <= {429}
    assert len(result.answers) > CLIENTS
    assert all(text == right[number] for number, text, *_ in result.answers)
    assert grown < max(20e6, 0.05 * before)
