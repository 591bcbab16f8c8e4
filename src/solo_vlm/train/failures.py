"""When one process of a run fails, all end, and the first failure is the one that is reported.

A process that waits in a collective operation cannot notice that another one has failed. So the first failure
is announced in the store that all processes share, and a thread in each of them looks for it there.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import NoReturn

from rich.console import Console
from torch.distributed import Store  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous.utils import _matches_machine_hostname

from solo_vlm.train.stopping import Stopped, StopRequest
from solo_vlm.utils.errors import SoloError

_KEY = "solo_vlm/failure"
_POLL_SECONDS = 0.5
_ECHO_SECONDS = 3.0  # an unexpected error may be the echo of another process's death, which is reported first
_LEAVE_SECONDS = 3.0  # after a failure all leave together: it is printed by then, and all have read it
_STORE_SECONDS = 3.0  # that the machine with the store, which other machines' torchruns read, stays longer
_LOST_SECONDS = 10.0  # without a store before a process gives up; at the end of a run its host leaves first


@dataclass(frozen=True)
class Failure:
    """The failure that ends a run.

    Attributes:
        rank: process that failed.
        message: one line for a user's error, else also where it happened.
        exit_code: for all processes.
        time: in seconds since the epoch.
    """

    rank: int
    message: str
    exit_code: int
    time: float

    @classmethod
    def of(cls, error: BaseException, rank: int) -> Failure:
        """The failure of a process by an exception."""
        if isinstance(error, SoloError):
            return cls(rank, str(error), error.exit_code, time.time())
        if isinstance(error, KeyboardInterrupt):
            return cls(rank, "interrupted", 130, time.time())
        place = f"process {rank} on {socket.gethostname()}"
        return cls(rank, f"{place}: {type(error).__name__}: {error}", 1, time.time())


@contextmanager
def fail_together(store: Store, rank: int, stop: StopRequest) -> Iterator[None]:
    """Run the body; an exception in it, in whatever process, ends all processes of the run.

    The exception that came first is raised in its own process. The other processes exit without a word, even
    if they are stuck in a collective operation.

    Args:
        store: shared by all processes.
        rank: of this process.
        stop: signals that the body has noted.
    """
    watch = _Watch(store.clone(), rank)  # type: ignore[attr-defined]
    watch.start()
    try:
        yield
    except Stopped:  # by all of them together, and saved
        raise
    except BaseException as error:
        is_certain = isinstance(error, SoloError | KeyboardInterrupt)
        failure = _announce(store, Failure.of(error, rank), is_certain)
        if failure.rank != rank:
            _exit(failure)
        if stop.signal and not is_certain:  # torchrun's, most likely, which has seen another process die
            print(f"solo: {failure.message}", file=sys.stderr)
            _exit(failure)
        _write_error_file(failure)
        if _others_need(rank):  # until the error has been printed, and then as long as the others
            atexit.register(_stay, failure)
        raise
    finally:
        watch.stop()


class _Watch(threading.Thread):
    """Ends this process when another one has announced a failure, or when the store is gone."""

    def __init__(self, store: Store, rank: int) -> None:
        super().__init__(name="failure-watch", daemon=True)
        self._store = store
        self._rank = rank
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(_POLL_SECONDS):
            try:
                failure = _read(self._store)
            except RuntimeError:
                if self._stopped.wait(_LOST_SECONDS):
                    return
                message = "the process that connects all processes of the run is gone"
                failure = Failure(-1, message, 1, time.time())
            if failure and failure.rank == self._rank:
                return
            if failure:
                _exit(failure)

    def stop(self) -> None:
        self._stopped.set()


def _announce(store: Store, failure: Failure, certain: bool) -> Failure:
    """The failure that ends the run: this one, if no other came before.

    Args:
        store: shared by all processes.
        failure: of this process.
        certain: whether it cannot be a consequence of another process's end.
    """
    deadline = time.monotonic() + (0.0 if certain else _ECHO_SECONDS)
    try:
        while time.monotonic() < deadline and not store.check([_KEY]):
            time.sleep(0.1)
        return Failure(**json.loads(store.compare_set(_KEY, "", json.dumps(asdict(failure)))))
    except RuntimeError:  # no store, nobody to tell
        return failure


def _read(store: Store) -> Failure | None:
    return Failure(**json.loads(store.get(_KEY))) if store.check([_KEY]) else None


def _exit(failure: Failure) -> NoReturn:
    """End this process, whatever its other threads do, for the failure of another one."""
    _write_error_file(failure)
    _stay(failure)
    Console(stderr=True).show_cursor()  # a progress bar may have hidden it
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(failure.exit_code)


def _write_error_file(failure: Failure) -> None:
    """What torchrun prints at its end as the cause, on each machine.

    See `torch.distributed.elastic.multiprocessing.errors.ProcessFailure`.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": failure.message, "timestamp": str(int(failure.time))}
        with open(path, "w") as file:  # noqa: PTH123
            json.dump({"message": {"message": failure.message, "extraInfo": extra}}, file)


def _stay(failure: Failure) -> None:
    """Wait until it is time to leave.

    torchrun ends all processes of its machine when the first one leaves, and takes the store with it.
    """
    time.sleep(min(max(failure.time + _LEAVE_SECONDS - time.time(), 0.0), _LEAVE_SECONDS))
    if _has_agents_elsewhere() and _matches_machine_hostname(os.environ["MASTER_ADDR"]):
        time.sleep(_STORE_SECONDS)


def _others_need(rank: int) -> bool:
    """Whether other processes lose the store when this one leaves."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return _has_agents_elsewhere()
    return rank == 0


def _has_agents_elsewhere() -> bool:
    return int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1
