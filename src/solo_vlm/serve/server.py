"""Runs the server: on a socket, until it is asked to stop."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import uvicorn

from solo_vlm.generate import GenerationPipeline
from solo_vlm.serve.address import take_address
from solo_vlm.serve.app import make_app
from solo_vlm.serve.engine import Engine
from solo_vlm.serve.limits import Limits


def serve_model(
    load: Callable[[], GenerationPipeline],
    name: str,
    host: str,
    port: int,
    limits: Limits,
    api_keys: Sequence[str],
    on_ready: Callable[[str], None],
) -> None:
    """Serve a model until SIGTERM or SIGINT; then finish what has begun, and return.

    Args:
        load: makes the model. Called when the address is known to be free.
        name: that requests call the model.
        host: address to listen on.
        port: to listen on; 0: any that is free.
        limits: of each request, and of all together.
        api_keys: see `make_app`.
        on_ready: told the server's URL.

    Raises:
        SoloError: the address cannot be had, or the model cannot be loaded.
    """
    with take_address(host, port) as address:
        engine = Engine(load(), limits.max_batch, limits.max_batch_tokens)
        config = uvicorn.Config(
            make_app(engine, name, limits, api_keys),
            http="h11",  # it limits the size of headers
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=round(limits.max_drain_seconds),
        )
        address.listen()
        on_ready(address.url)
        with _signals_only_for_uvicorn():
            uvicorn.Server(config).run(sockets=[address.socket])


@contextmanager
def _signals_only_for_uvicorn() -> Iterator[None]:
    """Once it has stopped, uvicorn sends itself the signal again, which would kill a process that is done."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
