"""Throughput and latency of `solo serve` at 1 to 32 concurrent clients.

    python benchmarks/serving.py [--model DIR] [--seconds 15] [--max-batch 8] [--json] [--out FILE]

Each client streams one answer of 32 tokens after another; half of the requests have an image. Without
--model, the model has two million random weights. Clients and server share the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
from environment import environment, publish
from PIL import Image

CLIENTS = (1, 2, 4, 8, 16, 32)
TOKENS = 32
WORDS = ("what", "where", "which", "color", "is", "there", "on", "the", "left", "of", "this", "red")


@dataclass
class Server:
    """A running `solo serve`."""

    url: str
    process: subprocess.Popen[str]


@dataclass
class Load:
    """Answers and errors of a load test.

    Attributes:
        answers: (request number, text, seconds to the first text, seconds to the end, tokens).
        errors: HTTP status, or the error message within a stream.
        seconds: Duration of the test.
    """

    answers: list[tuple[int, str, float, float, int]] = field(default_factory=list)
    errors: list[int | str] = field(default_factory=list)
    seconds: float = 0.0


@contextmanager
def served(model: Path | str, *options: str) -> Iterator[Server]:
    """Run `solo serve` in its own process on a free port."""
    command = [sys.executable, "-m", "solo_vlm", "serve", "--model", str(model), "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        output = ""
        while not (address := re.search(r"http://\S+", output)):
            if not (line := process.stderr.readline()):
                raise RuntimeError(f"the server did not start: {output}")
            output += line
        yield Server(address.group().removesuffix("/v1"), process)
    finally:
        process.terminate()
        process.communicate()


def make_requests(number: int, tokens: int = TOKENS) -> list[dict[str, Any]]:
    """Make different requests, every second one with an image."""
    rng = np.random.default_rng(0)
    made = []
    for index in range(number):
        parts: list[dict[str, Any]] = []
        if index % 2:
            parts.append({"type": "image_url", "image_url": {"url": _data_url(rng)}})
        text = " ".join(rng.choice(WORDS, int(rng.integers(3, 12))))
        parts.append({"type": "text", "text": f"{text}?"})
        message = {"role": "user", "content": parts}
        made.append({"messages": [message], "max_tokens": tokens, "temperature": 0})
    return made


async def run_load(url: str, requests: Sequence[dict[str, Any]], clients: int, seconds: float) -> Load:
    """Send requests from concurrent clients for some seconds. Clients wait after a 429."""
    numbers, started = count(), time.perf_counter()
    result = Load()

    async def client(session: aiohttp.ClientSession) -> None:
        while time.perf_counter() - started < seconds:
            await _send(session, url, requests, next(numbers) % len(requests), result)

    async with _session() as session:
        await asyncio.gather(*(client(session) for _ in range(clients)))
    result.seconds = time.perf_counter() - started
    return result


async def run_sequentially(url: str, requests: Sequence[dict[str, Any]]) -> Load:
    """Send every request once, from one client."""
    result = Load()
    async with _session() as session:
        for number in range(len(requests)):
            await _send(session, url, requests, number, result)
    return result


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))


async def _send(
    session: aiohttp.ClientSession, url: str, requests: Sequence[dict[str, Any]], number: int, result: Load
) -> None:
    body = {**requests[number], "stream": True, "stream_options": {"include_usage": True}}
    started, first, text, tokens = time.perf_counter(), 0.0, "", 0
    async with session.post(f"{url}/v1/chat/completions", json=body) as response:
        if response.status != 200:
            result.errors.append(response.status)
            await asyncio.sleep(float(response.headers.get("Retry-After", 0)))
            return
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line.removeprefix(b"data: "))
            if "error" in chunk:
                result.errors.append(chunk["error"]["message"])
                return
            first = first or time.perf_counter() - started
            text += "".join(choice["delta"].get("content", "") for choice in chunk["choices"])
            tokens = chunk.get("usage", {}).get("completion_tokens", 0)
    result.answers.append((number, text, first, time.perf_counter() - started, tokens))


def summarize(result: Load) -> dict[str, float]:
    """Return throughput and latency percentiles."""
    _, _, first, whole, tokens = zip(*result.answers, strict=True)
    return {
        "requests_per_second": len(whole) / result.seconds,
        "tokens_per_second": sum(tokens) / result.seconds,
        **{f"first_text_ms_p{p}": 1e3 * float(np.percentile(first, p)) for p in (50, 95)},
        **{f"answer_ms_p{p}": 1e3 * float(np.percentile(whole, p)) for p in (50, 95)},
        "errors": len(result.errors),
    }


def make_model(folder: Path) -> Path:
    """Write a SOLO model of two million random weights."""
    from solo_vlm.models.from_llm import from_llm
    from solo_vlm.quickstart.llm import write_untrained_llm

    write_untrained_llm(folder / "llm", [" ".join(WORDS)] * 3)
    from_llm(folder / "llm").save(folder / "solo")
    return folder / "solo"


def _data_url(rng: np.random.Generator) -> str:
    pixels = rng.integers(0, 256, (96, 128, 3), dtype=np.uint8)  # 12 patches
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder or hub ID")
    parser.add_argument("--seconds", type=float, default=15.0, help="duration per number of clients")
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write it to a file")
    arguments = parser.parse_args()
    results: dict[str, Any] = {
        "environment": {**environment(), "load_average": psutil.getloadavg()[0]},
        "max_batch": arguments.max_batch,
        "seconds": arguments.seconds,
    }
    requests = make_requests(16)
    with tempfile.TemporaryDirectory() as temporary:
        model = arguments.model or make_model(Path(temporary))
        with served(model, "--max-batch", str(arguments.max_batch)) as server:
            asyncio.run(run_sequentially(server.url, requests))  # warm-up
            for clients in CLIENTS:
                result = summarize(asyncio.run(run_load(server.url, requests, clients, arguments.seconds)))
                results[f"clients_{clients}"] = result
                if not arguments.json:
                    print(f"{clients:2} clients", *(f"{name} {value:.1f}" for name, value in result.items()))
    publish(results, arguments.json, arguments.out)


if __name__ == "__main__":
    main()
