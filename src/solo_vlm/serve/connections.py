"""HTTP connections of the server, with limits on reads, idle time and their number."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from solo_vlm.serve.limits import Limits

_READ_BYTES = 2**14  # at most 3,000 chunks of one byte, which h11 parses in a hundredth of a second


class Connection(H11Protocol, asyncio.BufferedProtocol):
    """Connection of uvicorn, with limits.

    Reads are small, so that parsing never delays other connections. A connection is closed if the headers of
    its next request do not arrive in time, or if it has been idle longest when there are too many.
    """

    def __init__(self, limits: Limits, **options: Any) -> None:
        super().__init__(**options)
        self._limits = limits
        self._buffer = bytearray(_READ_BYTES)
        self._idle_since = self.loop.time()
        self._timer: asyncio.TimerHandle | None = None

    def get_buffer(self, sizehint: int) -> bytearray:
        """Return the buffer into which the transport reads."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Process the bytes in the buffer."""
        self.data_received(bytes(memoryview(self._buffer)[:nbytes]))

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_request()
        if len(self.connections) > self._limits.max_connections:
            idle = [other for other in self.connections if isinstance(other, Connection) and other._is_idle()]
            longest = min(idle, key=lambda other: other._idle_since)
            self.connections.discard(longest)
            longest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_timer()

    def on_response_complete(self) -> None:
        self._expect_request()
        super().on_response_complete()

    def _expect_request(self) -> None:
        self._idle_since = self.loop.time()
        self._stop_timer()
        self._timer = self.loop.call_later(
            self._limits.max_head_seconds, self._close_unless_requested, self.cycle
        )

    def _close_unless_requested(self, last_cycle: object) -> None:
        if self.cycle is last_cycle:
            self.transport.abort()

    def _stop_timer(self) -> None:
        if self._timer:
            self._timer.cancel()

    def _is_idle(self) -> bool:
        """Return whether no response is in progress, or its client does not read it."""
        if self.cycle is None or self.cycle.response_complete or self.flow.write_paused:
            return True
        return self.scope["method"] != "POST"  # pages take milliseconds
