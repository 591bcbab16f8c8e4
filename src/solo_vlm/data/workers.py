"""Worker processes that read data: their limits, their end, and errors that torch reports of them."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import process_exists
from solo_vlm.utils.signals import STOP_SIGNALS

_OPEN_FILES = 65_536  # raised up to this: every tensor of a waiting batch is an open file

WORKER_ENDED = (
    "a worker process that reads data was ended, as by the system when memory runs out: use fewer workers or "
    "a machine with more memory, and run the same command again"
)

# What torch reports of workers, and what to tell the user.
_ERRORS = {
    "Too many open files|received 0 items of ancdata": (
        "too many open files: raise the limit (ulimit -n), or set data.workers to fewer, or to 0"
    ),
    "unable to .* shared memory|signal: Bus error": (
        "shared memory (/dev/shm) is too small for the packed sequences that workers prepare: enlarge it, as "
        "with 'docker run --shm-size 16g', or set data.workers to fewer, or to 0"
    ),
    "DataLoader worker .*(is killed by signal|exited unexpectedly)": WORKER_ENDED,
}


def raise_open_files_limit() -> None:
    """Raise the soft limit of open files of this process and its workers towards the hard one."""
    with suppress(ImportError, ValueError, OSError):  # Windows; a limit of the system below the hard one
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def end_with(owner: int) -> None:
    """End this worker when its owner requests it or exits, but not on signals to the process group.

    The owner handles those signals, and needs its workers until it has saved a checkpoint.
    """
    if not hasattr(signal, "sigtimedwait"):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

    def wait() -> None:
        while process_exists(owner):
            sent = signal.sigtimedwait(STOP_SIGNALS, 5.0)
            if sent and sent.si_pid == owner:
                break
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def worker_errors() -> Iterator[None]:
    """Raise one line for a worker that died in the body; torch raises it anywhere in the main thread."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        explained = explain_worker_error(error)
        if explained is None:
            raise
        raise explained from error


def explain_worker_error(error: Exception) -> SoloError | None:
    """Return a one-line error for what torch reports of workers, here or in one; None for other errors."""
    if not isinstance(error, RuntimeError | OSError):
        return None
    found = (text for pattern, text in _ERRORS.items() if re.search(pattern, str(error)))
    return next(map(SoloError, found), None)
