"""Cost of hostile requests to `solo serve`, for the server and for other clients.

    python benchmarks/hostile.py [--only PATTERN] [--fuzz N] [--seed 0] [--json] [--out FILE]

A server with default limits and a model with two million random weights receives one request after another:
the corpus of the tests and, with --fuzz, N random variations, half of them of image files. Each result has
the status, the time to the response, the peak memory above idle, and the slowest concurrent responses of
/health and to a text request.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil
from environment import environment, publish
from serving import make_model, served

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.serve import hostile, hostile_images, mutated_images

from solo_vlm.serve.limits import Limits

BODY_SECONDS = 3.0  # time limit of the server for bodies that never end; their seconds count from there
CLOSED = 0  # no status: none came, or TCP dropped it, since the client had sent more than its request
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP")
_MAX_SEED_BYTES, _MAX_SEED_FILE_BYTES = 100_000, 500_000
MAX_TOKENS = 8  # of an answer: generation is not what is measured
TEXT = {"messages": [{"role": "user", "content": "what is this?"}], "max_tokens": 4}


@dataclass
class Cost:
    """Cost of one request, or the maximum over several.

    Attributes:
        megabytes: Peak memory of the server above idle, in MB.
        health: Slowest concurrent response of /health, in seconds.
        text: Slowest concurrent response to a text request of another client, in seconds.
    """

    seconds: float = 0.0
    megabytes: float = 0.0
    health: float = 0.0
    text: float = 0.0

    def __or__(self, other: Cost) -> Cost:
        return Cost(*(max(getattr(self, f.name), getattr(other, f.name)) for f in fields(Cost)))


class Observer:
    """Threads that measure a server until the context exits."""

    def __init__(self, host: str, process: psutil.Process) -> None:
        self._host = host
        self._process = process
        self._stopped = Event()
        self._peak = 0
        self._answers: list[tuple[str, float, float]] = []
        self._threads = [
            Thread(target=self._repeat, args=(self._sample_memory, 0.005)),
            Thread(target=self._repeat, args=(self._ask_health, 0.01)),
            Thread(target=self._repeat, args=(self._ask_text, 0.05)),
        ]

    def __enter__(self) -> Observer:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def measure(self, send: Callable[[], None]) -> Cost:
        """Return the cost of sending requests, but for their seconds."""
        self._peak = self._memory()
        self._answers.clear()
        started = time.perf_counter()
        send()
        while len(answers := list(self._answers)) < 2 or len({name for name, *_ in answers}) < 2:
            self._check()  # until at least one of each overlaps or follows the request
        slowest = {"health": 0.0, "text": 0.0}
        for name, asked, answered in answers:
            slowest[name] = max(slowest[name], answered - max(asked, started))
        return Cost(megabytes=(self._peak - self.idle) / 1e6, **slowest)

    def _check(self) -> None:
        if not all(thread.is_alive() for thread in self._threads):
            raise RuntimeError("the server did not answer another client")
        time.sleep(0.002)

    def settle(self) -> None:
        """Store the current memory as that of the idle server."""
        time.sleep(0.5)
        self.idle = self._memory()

    def _memory(self) -> int:
        family = [self._process, *self._process.children(recursive=True)]
        return sum(process.memory_info().rss for process in family)

    def _repeat(self, task: Callable[[], None], pause: float) -> None:
        while not self._stopped.wait(pause):
            task()

    def _sample_memory(self) -> None:
        self._peak = max(self._peak, self._memory())

    def _ask_health(self) -> None:
        self._ask("health", "GET", "/health")

    def _ask_text(self) -> None:
        headers = {"Content-Type": "application/json"}
        self._ask("text", "POST", "/v1/chat/completions", json.dumps(TEXT), headers)

    def _ask(self, name: str, *request: Any) -> None:
        started = time.perf_counter()
        connection = http.client.HTTPConnection(self._host, timeout=120)
        connection.request(*request)
        response = connection.getresponse()
        response.read()
        connection.close()
        if response.status != 200:
            raise RuntimeError(f"{name} was answered with status {response.status}")
        self._answers.append((name, started, time.perf_counter()))


def corpus() -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yield each request's name and the function that builds it."""
    limits = Limits()
    for name, body in hostile.costly_bodies(limits.max_request_bytes).items():
        yield f"costly body: {name}", lambda body=body: hostile.http(body())
    for name, request in hostile.requests(limits.max_request_bytes).items():
        yield name, lambda request=request: request
    for name, file in hostile_images.costly_images().items():
        yield _image(name), lambda file=file: hostile.http(_question_about(file()))


def _image(name: str) -> str:
    return f"image: {name}"


def _question_about(file: bytes) -> bytes:
    url = f"data:;base64,{base64.b64encode(file).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is this?"}]
    return json.dumps({"messages": [{"role": "user", "content": parts}], "max_tokens": 1}).encode()


def fuzzed(seeds: list[bytes], files: list[bytes], number: int, seed: int) -> Iterator[bytes]:
    """Yield random variations: of requests, most with the correct length, and of image files in requests.

    Args:
        seeds: Requests.
        files: Image files, which are mutated beside small ordinary ones.
        number: Number of variations, half of them or all of image files.
        seed: Seed of the random numbers.
    """
    rng = random.Random(seed)
    ordinary = [parts for name in _FORMATS for parts in mutated_images.SEEDS[name]]
    costly = [mutated_images.parts_of(file) for file in files]
    for _ in range(number):
        if not seeds or rng.random() < 0.5:
            parts = rng.choice(costly if costly and rng.random() < 0.2 else ordinary)
            yield hostile.http(_question_about(mutated_images.mutated(rng, parts, ordinary)))
            continue
        head, _, body = rng.choice(seeds).partition(b"\r\n\r\n")
        for _ in range(rng.randint(1, 4)):
            body = _varied(rng, body, rng.choice(seeds).partition(b"\r\n\r\n")[2])
        if rng.random() < 0.998:  # a body that is too short takes BODY_SECONDS
            head = re.sub(rb"(?i)(content-length: )\d+", rb"\g<1>%d" % len(body), head)
        yield head + b"\r\n\r\n" + body


def _varied(rng: random.Random, body: bytes, other: bytes) -> bytes:
    start, end = sorted(rng.randint(0, len(body)) for _ in range(2))
    piece = body[start:end]
    match rng.randrange(5):
        case 0:
            return body[:start] + body[end:]
        case 1:
            return body[:start] + piece * rng.randint(2, 50) + body[end:]
        case 2:
            return body[:start] + bytes([rng.randrange(256)]) + body[start + 1 :]
        case 3:
            at = rng.randint(0, len(other))
            return body[:start] + other[at : at + 1000] + body[end:]
        case _:
            return body[:start] + rng.choice([b'"', b"{", b"[", b"\\", b"null", b"1e9", b","]) + body[start:]


def run(url: str, process: psutil.Process, arguments: argparse.Namespace) -> dict[str, Any]:
    """Send all requests; return their costs."""
    host = url.removeprefix("http://")
    port = int(host.rpartition(":")[2])
    made = {name: make for name, make in corpus() if re.search(arguments.only, name)}
    results: dict[str, Any] = {}
    worst = Cost()
    with Observer(host, process) as observer:
        time.sleep(2)  # warm-up
        observer.settle()
        for name, make in made.items():
            statuses, cost = send(observer, port, [make()])
            results[name] = {"status": statuses[0], **asdict(cost)}
            worst |= cost
            if not arguments.json:
                print(describe(cost), f"{statuses[0]}  {name}", flush=True)
        if arguments.fuzz:
            seeds = [request for make in made.values() if len(request := make()) < _MAX_SEED_BYTES]
            images = [make for name, make in hostile_images.costly_images().items() if _image(name) in made]
            files = [file for make in images if len(file := make()) < _MAX_SEED_FILE_BYTES]
            variations = fuzzed(seeds, files, arguments.fuzz, arguments.seed)
            counts: Counter[int] = Counter()
            total = Cost()
            while batch := list(islice(variations, 100)):
                statuses, cost = send(observer, port, batch)
                counts.update(statuses)
                total |= cost
            results["fuzzed"] = {"requests": arguments.fuzz, "statuses": counts, **asdict(total)}
            worst |= total
            if not arguments.json:
                print(describe(total), f"{arguments.fuzz} variations: {dict(counts)}")
    if not arguments.json:
        print(describe(worst), "at most")
    return {"worst": asdict(worst), "requests": results}


def send(observer: Observer, port: int, requests: list[bytes]) -> tuple[list[int], Cost]:
    """Send requests one after another; return their statuses, and the cost of the costliest."""
    answers: list[tuple[int, float]] = []

    def exchange_all() -> None:
        for request in requests:
            started = time.perf_counter()
            try:
                status, _ = hostile.exchange(port, request)
            except (ConnectionError, TimeoutError):  # after 30 s
                status = CLOSED
            waited = BODY_SECONDS * (status == 408)
            answers.append((status, time.perf_counter() - started - waited))

    cost = observer.measure(exchange_all)
    return [status for status, _ in answers], replace(cost, seconds=max(seconds for _, seconds in answers))


def describe(cost: Cost) -> str:
    """Return one line of a table."""
    times = f"{cost.seconds:6.2f} s   /health {cost.health:5.2f} s   text {cost.text:5.2f} s"
    return f"{times} {cost.megabytes:7.0f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", metavar="PATTERN", help="requests whose name matches")
    parser.add_argument("--fuzz", type=int, default=0, metavar="N", help="number of random variations")
    parser.add_argument("--seed", type=int, default=0, help="seed of the variations")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write it to a file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        model = make_model(Path(temporary))
        options = ["--max-body-seconds", str(BODY_SECONDS), "--max-tokens", str(MAX_TOKENS)]
        with served(model, *options) as server:
            measured = run(server.url, psutil.Process(server.process.pid), arguments)
    results = {"environment": {**environment(), "load_average": psutil.getloadavg()[0]}, **measured}
    publish(results, arguments.json, arguments.out)


if __name__ == "__main__":
    main()
