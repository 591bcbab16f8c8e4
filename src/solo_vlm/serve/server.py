"""Server lifecycle, from binding the address to graceful shutdown."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import ceil
from multiprocessing import active_children
from types import FrameType
from typing import NoReturn, cast

import uvicorn
from starlette.applications import Starlette

from solo_vlm.generate import GenerationPipeline
from solo_vlm.serve.app import make_app
from solo_vlm.serve.connections import Connection
from solo_vlm.serve.engine import Engine
from solo_vlm.serve.limits import Limits
from solo_vlm.serve.memory import return_large_blocks
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.signals import handle_stop_signals

logger = logging.getLogger(__name__)

_BACKLOG = 2048  # connections waiting to be accepted
_CLOSE_SECONDS = 0.5  # after the drain, for clients to read why their request ended
_EXIT_SECONDS = 1.5  # after the drain, for the rest of the shutdown


def serve_model(
    load: Callable[[], GenerationPipeline],
    name: str,
    host: str,
    port: int,
    limits: Limits,
    api_keys: Sequence[str],
    on_ready: Callable[[str], None],
) -> NoReturn:
    """Serve a model until SIGTERM, SIGINT or SIGHUP, then finish in-flight requests and end the process.

    Args:
        load: Function that loads the model, called once the address is known to be free.
        name: Model name that requests must use, if they name one.
        host: Name or address to listen on.
        port: Port to listen on; 0 picks a free one.
        limits: Limits on each request and on all together.
        api_keys: Accepted API keys; empty if none is required.
        on_ready: Called with the server's URL once it accepts connections.

    Raises:
        SoloError: The address is not available, or the model cannot be loaded.
    """
    return_large_blocks()
    with bind(host, port) as address:
        engine = Engine(load(), limits.max_batch, limits.max_batch_tokens)
        server = Server(make_app(engine, name, limits, api_keys, host), limits)
        address.listen()
        # Before uvicorn does, and when it raises signals again after its shutdown.
        with handle_stop_signals(server.handle_exit):
            on_ready(address.url)
            server.run(sockets=[address.socket])
    _exit()


class Server(uvicorn.Server):
    """Server of uvicorn, with a bounded shutdown: in-flight requests have `max_drain_seconds`.

    Args:
        app: Result of `make_app`.
        limits: Limits of connections and of the shutdown.
    """

    def __init__(self, app: Starlette, limits: Limits) -> None:
        connection = cast("type[asyncio.Protocol]", partial(Connection, limits))
        super().__init__(
            uvicorn.Config(
                app,
                http=connection,
                ws="none",
                timeout_keep_alive=ceil(limits.max_head_seconds),  # longer than clients keep a connection
                log_config=None,
                log_level="error",  # no line for each malformed request
                access_log=False,
                server_header=False,
            )
        )
        self._app = app
        self._drain_seconds = limits.max_drain_seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin the shutdown, and set an alarm that ends the process even if a thread hangs.

        A second SIGINT ends the process at once.
        """
        if self.should_exit and sig == signal.SIGINT:
            _exit()
        if not self.should_exit:
            signal.signal(signal.SIGALRM, lambda *_: _exit())
            signal.setitimer(signal.ITIMER_REAL, self._drain_seconds + _EXIT_SECONDS)
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for in-flight requests; after the time limit, end them and close their connections."""
        loop = asyncio.get_running_loop()
        loop.call_later(self._drain_seconds, self._stop_requests)
        loop.call_later(self._drain_seconds + _CLOSE_SECONDS, self._close_connections)
        await super().shutdown(sockets)

    def _stop_requests(self) -> None:
        if stopped := self._app.state.stop_requests():
            logger.warning(
                "requests unfinished after --max-drain-seconds %g: %d", self._drain_seconds, stopped
            )

    def _close_connections(self) -> None:
        for connection in self.server_state.connections:
            connection.transport.abort()


def _exit() -> NoReturn:
    """End the process at once, because threads that still run could block or crash its teardown."""
    for child in active_children():
        child.kill()
    os._exit(0)


@dataclass(frozen=True)
class Address:
    """A bound socket, and its URL for clients on this machine."""

    socket: socket.socket
    url: str

    def listen(self) -> None:
        """Queue connections until they are accepted; earlier ones fail.

        Raises:
            SoloError: Another process started to listen here first.
        """
        with _advise(*self.socket.getsockname()[:2]):
            self.socket.listen(_BACKLOG)


@contextmanager
def bind(host: str, port: int) -> Iterator[Address]:
    """Bind an address early, so that a conflict is reported before a model is loaded.

    Args:
        host: Name or address; 0.0.0.0 and :: stand for all interfaces.
        port: 0 picks a free one.

    Raises:
        SoloError: The address is not available.
    """
    with _advise(host, port):
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with _advise(host, port):
            bound.bind(address)
        name = "localhost" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
        yield Address(bound, f"http://{name}:{bound.getsockname()[1]}")


@contextmanager
def _advise(host: str, port: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SoloError(
            f"cannot listen on {host}, port {port}: {error.strerror}; choose another --port"
        ) from error
