"""Memory of `solo serve` at rest, during and after requests with images of many sizes and formats.

    python benchmarks/image_memory.py [--requests 500] [--json] [--out FILE]

Four clients send images of 0.07 to 10 megapixels as JPEG, PNG, WebP and GIF to a server without caches, whose
model has two million random weights. Memory is measured while no request is in flight.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import psutil
from environment import environment, publish
from PIL import Image
from serving import make_model, served

WIDTHS = (300, 640, 1024, 2000, 3600)
FORMATS: dict[str, dict[str, Any]] = {
    "JPEG": {},
    "PNG": {"compress_level": 1},
    "WEBP": {"method": 0},
    "GIF": {},
}
CLIENTS = 4
BATCH = 50


def make_bodies() -> list[bytes]:
    """Return a request to the page's image endpoint for each width, format, and kind of transparency."""
    rng, bodies = np.random.default_rng(0), []
    for width in WIDTHS:
        height = width * 3 // 4
        noise = rng.integers(0, 256, (height // 75, width // 75, 3), dtype=np.uint8)
        picture = Image.fromarray(noise).resize((width, height), Image.Resampling.BILINEAR)
        for file_format, options in FORMATS.items():
            for image in (picture, picture.convert("RGBA")) if file_format in ("PNG", "WEBP") else (picture,):
                file = io.BytesIO()
                image.save(file, file_format, **options)
                url = f"data:;base64,{base64.b64encode(file.getvalue()).decode()}"
                bodies.append(json.dumps({"image_url": {"url": url}}).encode())
    return bodies


def run(url: str, process: psutil.Process, requests: int) -> dict[str, Any]:
    """Send the requests; return memory in MB by number of requests."""
    bodies, rng = make_bodies(), np.random.default_rng(1)

    def send(number: int) -> None:
        request = Request(f"{url}/api/image", bodies[number], {"Content-Type": "application/json"})
        with urlopen(request, timeout=300) as response:
            response.read()

    megabytes: dict[int, int] = {}
    with ThreadPoolExecutor(CLIENTS) as clients:
        for done in range(0, requests + 1, BATCH):
            megabytes[done] = round(process.memory_info().rss / 1e6)
            print(f"{done:5d} requests: {megabytes[done]:5d} MB", flush=True)
            if done < requests:
                list(clients.map(send, rng.integers(0, len(bodies), BATCH).tolist()))
    return {"megabytes_after_requests": megabytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=500, help=f"a multiple of {BATCH}")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write it to a file")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as temporary,
        served(make_model(Path(temporary)), "--max-cached-image-bytes", "0", "--prefix-cache", "0") as server,
    ):
        measured = run(server.url, psutil.Process(server.process.pid), arguments.requests)
    results = {"environment": environment(), **measured}
    publish(results, arguments.json, arguments.out)


if __name__ == "__main__":
    main()
