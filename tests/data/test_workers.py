"""Worker processes: what the user reads when one is killed, and the limit of open files."""

from __future__ import annotations

import os
import signal

import pytest

from solo_vlm.data.loader import PackedLoader
from solo_vlm.data.streams import VirtualStream
from solo_vlm.data.workers import WORKER_ENDED, raise_open_files_limit, worker_errors
from solo_vlm.utils.errors import SoloError

resource = pytest.importorskip("resource")


def kill(number: int) -> VirtualStream:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def crash(number: int) -> VirtualStream:
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError


def leave(number: int) -> VirtualStream:
    os._exit(3)


@pytest.mark.parametrize("end", [kill, crash, leave])
def test_end_of_a_worker_is_one_line(end):
    loader = PackedLoader(end, 4, 64, 0, workers=2)
    with pytest.raises(SoloError, match=WORKER_ENDED), worker_errors():
        next(iter(loader))


def test_other_errors_stay():
    with pytest.raises(RuntimeError, match="other"), worker_errors():
        raise RuntimeError("other")


def test_soft_limit_of_open_files_is_raised():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 1, hard))
        raise_open_files_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= soft
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
