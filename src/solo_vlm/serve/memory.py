"""Memory of the server's process at rest."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_M_MMAP_THRESHOLD = -3  # of malloc.h
_LARGE_BLOCK_BYTES = 4 * 2**20


def return_large_blocks() -> None:
    """Make malloc return freed blocks of 4 MiB and more to the system.

    As such blocks are freed, glibc raises its own threshold to 32 MiB. Decoded images then stay in the heaps
    of threads, and memory at rest doubles.
    """
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK_BYTES)
