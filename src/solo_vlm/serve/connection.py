"""What a client sends, and whether it is still there."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from starlette.requests import Request
from starlette.types import Receive

from solo_vlm.serve.errors import ApiError
from solo_vlm.serve.limits import Limits


async def read_body(request: Request, limits: Limits) -> bytes:
    """The JSON text of a request, refused as soon as it is known to be too large or too slow.

    Raises:
        ApiError: 408, 413 or 415.
        ClientDisconnect: the client left before the end.
    """
    # Also keeps web pages of other sites out: a browser asks before it sends them JSON.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "send JSON, with the header Content-Type: application/json")
    limit, seconds = limits.max_request_bytes, limits.max_body_seconds
    too_large = ApiError(413, f"the body may have {limit:,} bytes", code="request_too_large")
    if int(request.headers.get("content-length", 0)) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise too_large
    except TimeoutError as error:
        raise ApiError(408, f"the body was not there within {seconds:g} s", code="timeout") from error
    return bytes(body)


async def unless_disconnected(work: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Do some work; cancel it when the client leaves.

    Args:
        work: answers the client. What it raises is raised here.
        receive: of the request, its body read.
    """
    working = asyncio.create_task(work)
    tasks = (working, asyncio.create_task(_disconnected(receive)))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
