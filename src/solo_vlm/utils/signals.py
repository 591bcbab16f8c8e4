"""Signals that ask a process to finish its work and end."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # SIGHUP: the terminal was closed


@contextmanager
def handle_stop_signals(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Handle all stop signals in the body, except for an ignored SIGHUP: nohup means to go on.

    Output to a terminal that was closed is discarded from then on, instead of failing.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            _discard_lost_output()
        handler(number, frame)

    numbers = [
        number
        for number in STOP_SIGNALS
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
    ]
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _discard_lost_output() -> None:
    outputs = select.poll()
    for descriptor in (1, 2):
        outputs.register(descriptor, select.POLLOUT)
    for descriptor, state in outputs.poll(0):
        if state & (select.POLLHUP | select.POLLERR):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)
