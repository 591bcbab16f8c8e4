"""Graceful stop on signals, and joint exit of all processes when one of them fails.

A process that waits in a collective cannot notice that another one has failed. The first failure is therefore
written to the store that all processes share, and a thread in each process polls the store for it.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import FrameType
from typing import NoReturn

from rich.console import Console
from torch.distributed import Store  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous.utils import _matches_machine_hostname

from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.signals import handle_stop_signals

_KEY = "solo_vlm/failure"
_POLL_SECONDS = 0.5
_ECHO_SECONDS = 3.0  # an unexpected error may be caused by another process's failure, which then comes first
_EXIT_SECONDS = 3.0  # all exit together this long after a failure: it is printed and read by then
_STORE_SECONDS = 3.0  # extra time for the host of the store, which the torchruns of other machines read
_LOST_SECONDS = 10.0  # without a store before giving up; at the end of a run its host exits first


class Stopped(SoloError):
    """A signal stopped the run, and its state is saved.

    Attributes:
        exit_code: 128 + signal number, as in shells.
    """

    raised_by_all = True

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class StopRequest:
    """Signal handler that records the first signal.

    A repeated SIGTERM has no effect: launchers send it both directly and through torchrun. A repeated SIGINT
    (Ctrl-C twice) raises KeyboardInterrupt at once.

    Attributes:
        signal: Number of the first signal, 0 for none.
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
        """Defer KeyboardInterrupt until the body, which saves, has finished."""
        before, self._may_interrupt = self._may_interrupt, False
        try:
            yield
        finally:
            self._may_interrupt = before


@contextmanager
def catch_signals(request: StopRequest | None = None) -> Iterator[StopRequest]:
    """Record stop signals in a request; no-op outside the main thread (Python's rule)."""
    request = request or StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    with handle_stop_signals(request):
        yield request


@dataclass(frozen=True)
class Failure:
    """Failure that ends a run.

    Attributes:
        message: Error message; unexpected errors include the process and host.
        exit_code: Exit code of all processes.
        time: Seconds since the epoch.
    """

    rank: int
    message: str
    exit_code: int
    time: float

    @classmethod
    def from_exception(cls, error: BaseException, rank: int) -> Failure:
        """Describe an exception raised in this process."""
        if isinstance(error, SoloError):
            return cls(rank, str(error), error.exit_code, time.time())
        if isinstance(error, KeyboardInterrupt):
            return cls(rank, "interrupted", 130, time.time())
        place = f"process {rank} on {socket.gethostname()}"
        return cls(rank, f"{place}: {type(error).__name__}: {error}", 1, time.time())


@contextmanager
def fail_together(store: Store, rank: int, stop: StopRequest) -> Iterator[None]:
    """Run the body; an exception in any process ends all processes of the run.

    The process that failed first raises its exception. All others exit silently, even while they hang in a
    collective.
    """
    watch = _Watch(store.clone(), rank)  # type: ignore[attr-defined]
    watch.start()
    try:
        yield
    except Stopped:  # raised by all processes together, after saving
        raise
    except BaseException as error:
        is_certain = isinstance(error, SoloError | KeyboardInterrupt)
        failure = _publish(store, Failure.from_exception(error, rank), is_certain)
        if failure.rank != rank:
            _exit(failure)
        if stop.signal and not is_certain:  # most likely sent by torchrun after another process died
            print(f"solo: {failure.message}", file=sys.stderr)
            _exit(failure)
        _write_error_file(failure)
        if _hosts_store(rank):  # exit after the error is printed and the other processes have read it
            atexit.register(_delay_exit, failure)
        raise
    finally:
        watch.stopped.set()


class _Watch(threading.Thread):
    """Thread that ends this process when another one publishes a failure, or the store is lost."""

    def __init__(self, store: Store, rank: int) -> None:
        super().__init__(name="failure-watch", daemon=True)
        self._store = store
        self._rank = rank
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(_POLL_SECONDS):
            try:
                failure = None
                if self._store.check([_KEY]):
                    failure = Failure(**json.loads(self._store.get(_KEY)))
            except RuntimeError:
                if self.stopped.wait(_LOST_SECONDS):
                    return
                message = "lost the connection to the process that hosts the store of the run"
                failure = Failure(-1, message, 1, time.time())
            if failure and failure.rank == self._rank:
                return
            if failure:
                _exit(failure)


def _publish(store: Store, failure: Failure, is_certain: bool) -> Failure:
    """Publish this process's failure unless another one came first; return the first.

    A failure `is_certain` if it cannot be a consequence of another process's.
    """
    deadline = time.monotonic() + (0.0 if is_certain else _ECHO_SECONDS)
    try:
        while time.monotonic() < deadline and not store.check([_KEY]):
            time.sleep(0.1)
        return Failure(**json.loads(store.compare_set(_KEY, "", json.dumps(asdict(failure)))))
    except RuntimeError:  # the store is gone
        return failure


def _exit(failure: Failure) -> NoReturn:
    """Exit because of another process's failure, without waiting for other threads."""
    _write_error_file(failure)
    _delay_exit(failure)
    Console(stderr=True).show_cursor()  # a progress bar may have hidden it
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(failure.exit_code)


def _write_error_file(failure: Failure) -> None:
    """Write the file from which torchrun prints the root cause on each machine.

    See `torch.distributed.elastic.multiprocessing.errors.ProcessFailure`.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": failure.message, "timestamp": str(int(failure.time))}
        with open(path, "w") as file:  # noqa: PTH123
            json.dump({"message": {"message": failure.message, "extraInfo": extra}}, file)


def _delay_exit(failure: Failure) -> None:
    """Sleep until all processes exit together.

    torchrun ends all processes of its machine when the first one exits, and the store ends with it.
    """
    time.sleep(min(max(failure.time + _EXIT_SECONDS - time.time(), 0.0), _EXIT_SECONDS))
    if _has_other_agents() and _matches_machine_hostname(os.environ["MASTER_ADDR"]):
        time.sleep(_STORE_SECONDS)


def _hosts_store(rank: int) -> bool:
    """Return whether other processes may lose the store when this one exits."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return _has_other_agents()
    return rank == 0


def _has_other_agents() -> bool:
    return int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1
