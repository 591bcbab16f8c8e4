"""The address at which a server is to be found."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from solo_vlm.utils.errors import SoloError

_BACKLOG = 2048  # connections that wait to be accepted


@dataclass(frozen=True)
class Address:
    """A socket that is bound, and the URL that a client on this machine asks."""

    socket: socket.socket
    url: str

    def listen(self) -> None:
        """Let connections wait from now on until they are accepted. Before, they are refused.

        Raises:
            SoloError: somebody else listens here by now.
        """
        with _errors_as_advice(*self.socket.getsockname()[:2]):
            self.socket.listen(_BACKLOG)


@contextmanager
def take_address(host: str, port: int) -> Iterator[Address]:
    """Take an address, before a model is loaded for long.

    Args:
        host: name or address; 0.0.0.0 and :: stand for all of this machine.
        port: 0: any that is free.

    Raises:
        SoloError: it cannot be had.
    """
    with _errors_as_advice(host, port):
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with _errors_as_advice(host, port):
            bound.bind(address)
        name = "localhost" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
        yield Address(bound, f"http://{name}:{bound.getsockname()[1]}")


@contextmanager
def _errors_as_advice(host: str, port: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = f"cannot listen on {host}, port {port}: {error.strerror}; try another --port"
        raise SoloError(reason) from error
