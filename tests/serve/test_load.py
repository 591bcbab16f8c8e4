"""32 clients at once: no error but 429, no answer but the right one, no growth of memory."""

from __future__ import annotations

import asyncio

import psutil
import pytest
from serving import load, one_by_one, questions, served

CLIENTS = 32


def check(folder, seconds: float, warm_up: float) -> None:
    asked = questions(12, tokens=16)
    with served(folder, "--max-concurrent", "24") as server:
        memory = psutil.Process(server.process.pid).memory_info
        alone = asyncio.run(one_by_one(server.url, asked))
        right = {number: text for number, text, *_ in alone.answers}
        assert len(right) == len(asked)
        asyncio.run(load(server.url, asked, CLIENTS, warm_up))
        before = memory().rss
        result = asyncio.run(load(server.url, asked, CLIENTS, seconds))
        grown = memory().rss - before
    print(f"{len(result.answers)} answers, {len(result.errors)} errors; {before:,} bytes and {grown:+,}")
    assert set(result.errors) <= {429}
    assert len(result.answers) > CLIENTS
    assert all(text == right[number] for number, text, *_ in result.answers)
    assert grown < max(20e6, 0.05 * before)


@pytest.fixture(scope="module")
def folder(solo, tmp_path_factory):
    path = tmp_path_factory.mktemp("loaded") / "solo"
    solo.save(path)
    return path


def test_a_few_seconds(folder):
    check(folder, seconds=5.0, warm_up=2.0)


@pytest.mark.slow
def test_a_minute(folder):
    check(folder, seconds=60.0, warm_up=10.0)
