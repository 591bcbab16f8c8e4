"""Request bodies: their type, size and number of values are checked while they arrive.

Parsing and validation take memory and time per JSON value, so a million empty objects would cost far more
than its bytes suggest. The values are counted before.
"""

from __future__ import annotations

from starlette.requests import Request

from solo_vlm.serve.limits import Limits
from solo_vlm.serve.protocol import ApiError

SMALL_BODY = 2**20
"""Bytes up to which a body takes no shared memory, so that requests without images are always read."""


class BodyMemory:
    """Memory budget shared by all bodies that are being read or prepared."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0

    def take(self, size: int) -> None:
        """Reserve more bytes; raise status 429 if the budget is exhausted."""
        if self._taken + size > self._limit:
            message = "Too many large requests are being read. Please retry later."
            raise ApiError(429, message, code="too_many_requests", headers={"Retry-After": "1"})
        self._taken += size

    def give_back(self, size: int) -> None:
        """Return reserved bytes."""
        self._taken -= size


class Body:
    """Body of one request; it keeps its part of the shared memory until it is released."""

    def __init__(self, limits: Limits, memory: BodyMemory) -> None:
        self._limits = limits
        self._memory = memory
        self._data = bytearray()
        self._room = 0

    def __len__(self) -> int:
        return len(self._data)

    def take(self) -> bytearray:
        """Hand the bytes over to their only reader."""
        data, self._data = self._data, bytearray()
        return data

    def release(self) -> None:
        """Return the reserved memory once the body has been freed."""
        self._memory.give_back(self._room)
        self._data, self._room = bytearray(), 0

    async def read(self, request: Request) -> None:
        """Read a JSON body.

        Raises:
            ApiError: 400, 413, 415 or 429, once the body has too many values, is too large, has another type,
                or exceeds the memory left.
        """
        # Browsers send JSON to other sites only after a preflight request, which this server does not grant.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "Unsupported content type. Send JSON as Content-Type: application/json.")
        self._check_size(int(request.headers.get("content-length", 0)))
        counter = ValueCounter(self._limits.max_values)
        async for chunk in request.stream():
            self._make_room(len(self._data) + len(chunk))
            counter.feed(chunk)
            self._data += chunk

    def _check_size(self, size: int) -> None:
        if size > (limit := self._limits.max_request_bytes):
            message = f"Request body too large: the maximum is {limit:,} bytes."
            raise ApiError(413, message, code="request_too_large")

    def _make_room(self, size: int) -> None:
        self._check_size(size)
        if (needed := size - SMALL_BODY - self._room) > 0:
            self._memory.take(needed)
            self._room += needed


class ValueCounter:
    """Counter of the values in a JSON text, by the commas and opening brackets outside strings.

    The count is exact for every valid prefix of a text, and a parser reads no further.
    """

    def __init__(self, maximum: int) -> None:
        self._maximum = maximum
        self._values = 0
        self._quotes = 0
        self._in_string = False
        self._backslash = b""  # at the end of a chunk: escapes the first character of the next one

    def feed(self, chunk: bytes) -> None:
        """Count the values of the next chunk.

        Raises:
            ApiError: 400, if there are too many.
        """
        text = (self._backslash + chunk).replace(rb"\\", b"")
        self._backslash = b"\\" if text.endswith(b"\\") else b""
        pieces = text.replace(rb"\"", b"").split(b'"')  # alternately outside and inside of strings
        outside = b"".join(pieces[self._in_string :: 2])
        self._in_string ^= len(pieces) % 2 == 0
        self._values += sum(map(outside.count, (b",", b"[", b"{")))
        self._quotes += len(pieces) - 1
        # A comma or bracket precedes at most two strings: a member's name and value.
        if self._values > self._maximum or self._quotes > 4 * self._maximum + 2:
            message = f"Too many values in the request body: at most {self._maximum:,} are allowed."
            raise ApiError(400, message, code="too_many_values")
