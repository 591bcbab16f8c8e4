"""SIGTERM and SIGINT: finish the step, save, stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from solo_vlm.utils.errors import SoloError


class Stopped(SoloError):
    """The run was asked to stop, and has saved where it stands.

    Attributes:
        exit_code: 128 and the signal's number, as shells have it.
    """

    is_common = True

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class StopRequest:
    """Which signal has come, if any.

    A repeated SIGTERM changes nothing: launchers send it to a process once themselves and once through
    torchrun. A repeated SIGINT, of somebody at a keyboard, does not wait for the end of the step.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._may_interrupt = True

    def __call__(self, number: int, frame: FrameType | None) -> None:
        is_repeated = bool(self.signal)
        self.signal = self.signal or number
        if is_repeated and number == signal.SIGINT and self._may_interrupt:
            raise KeyboardInterrupt

    @contextmanager
    def uninterrupted(self) -> Iterator[None]:
        """Let no signal end the body, which saves."""
        before, self._may_interrupt = self._may_interrupt, False
        try:
            yield
        finally:
            self._may_interrupt = before


@contextmanager
def listen(request: StopRequest | None = None) -> Iterator[StopRequest]:
    """Note SIGTERM and SIGINT instead of dying by them; Python allows it in the main thread only."""
    request = request or StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
