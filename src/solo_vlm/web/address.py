"""Where the page is to be found."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from solo_vlm.errors import SoloError


@dataclass(frozen=True)
class Connection:
    """A socket that listens, and the address that a browser on this machine opens."""

    socket: socket.socket
    url: str


@contextmanager
def listen(host: str, port: int) -> Iterator[Connection]:
    """Take an address, before a model is loaded for long.

    Raises:
        SoloError: it cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        server = socket.socket(family, kind, protocol)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(address)
    except OSError as error:
        raise SoloError(
            f"cannot listen on {host}, port {port}: {error.strerror}; try another --port"
        ) from error
    with server:
        name = "localhost" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
        yield Connection(server, f"http://{name}:{server.getsockname()[1]}")
