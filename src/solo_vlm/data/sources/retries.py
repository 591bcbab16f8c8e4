"""Retries of reads from disks and networks: which errors they can help with, how long, and what is said."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from huggingface_hub import constants, get_session
from tenacity import RetryCallState, retry, retry_if_exception, stop_after_delay, wait_exponential_jitter

from solo_vlm.utils.errors import first_line
from solo_vlm.utils.files import causes

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

_ATTEMPTS = 5
_ATTEMPTS_AT_START = 2  # to reach a host that has no address or accepts no connections
_LONGEST = 180.0  # seconds after which no further attempt begins, unless a server asks for a longer wait
_LONGEST_ASKED = 300.0  # seconds that Retry-After may ask for: the hub counts requests by five minutes
_LONGEST_NAME = 200
_exponential = wait_exponential_jitter(multiplier=0.5, max=30)
_NETWORKING = ("aiohttp", "asyncio", "botocore", "httpx", "httpx2")  # not all of their errors are OSErrors
_UNREACHABLE = ("ConnectError", "ClientConnectorError", "ClientConnectorDNSError", "EndpointConnectionError")


def retried(read: Callable[P, R]) -> Callable[P, R]:
    """Retry with exponential backoff when the disk or the network fails; then raise the error."""
    return _retrying(lambda error: _ATTEMPTS)(read)


def retried_at_start(read: Callable[P, R]) -> Callable[P, R]:
    """Retry like `retried`, but end soon if the host of a new source cannot be reached at all."""
    return _retrying(lambda error: _ATTEMPTS_AT_START if is_unreachable(error) else _ATTEMPTS)(read)


def bound_waits_for_hub() -> None:
    """Give requests to the hub that have no timeout, such as for listings, the one of downloads."""
    client = get_session()
    hooks = client.event_hooks
    if _set_timeout not in hooks["request"]:
        client.event_hooks = {**hooks, "request": [*hooks["request"], _set_timeout]}


def _set_timeout(request: Any) -> None:
    given = request.extensions.get("timeout", {})
    kinds = ("connect", "read", "write", "pool")
    request.extensions["timeout"] = {
        kind: given.get(kind) or constants.HF_HUB_DOWNLOAD_TIMEOUT for kind in kinds
    }


def _retrying(attempts: Callable[[BaseException], int]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    too_long = stop_after_delay(_LONGEST)

    def stop(state: RetryCallState) -> bool:
        error = _error(state)
        if state.attempt_number >= attempts(error):
            return True
        return too_long(state) and not _asked(error)

    def say(state: RetryCallState) -> None:
        error = _error(state)
        logger.warning(
            "waiting for %s (%s): attempt %d of %d in %.1f s",
            _name(state.args),
            first_line(error),
            state.attempt_number + 1,
            attempts(error),
            state.upcoming_sleep,
        )

    return retry(
        retry=retry_if_exception(_is_transient),
        stop=stop,
        wait=lambda state: max(_exponential(state), _asked(_error(state))),
        before_sleep=say,
        reraise=True,
    )


def _error(state: RetryCallState) -> BaseException:
    assert state.outcome is not None
    error = state.outcome.exception()
    assert error is not None
    return error


def _name(arguments: tuple[Any, ...]) -> str:
    """Return the name of what is read: the first argument that is or has a path or URL."""
    urls = (getattr(each, "url", each) for each in arguments)
    return next((url[:_LONGEST_NAME] for url in urls if isinstance(url, str)), "storage")


def _asked(error: BaseException) -> float:
    """Return the seconds that a server asks to wait; 0 if it does not."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    try:
        return min(float(headers.get("Retry-After", 0)), _LONGEST_ASKED)
    except ValueError:  # a date
        return 0.0


def _is_transient(error: BaseException) -> bool:
    """Return whether a retry can help: not if content is broken or a file is missing."""
    if isinstance(error, FileNotFoundError | IsADirectoryError | PermissionError):
        return False
    status = getattr(getattr(error, "response", None), "status_code", None)  # of the hub
    if status is not None and status < 500 and status not in (408, 429):
        return False
    return is_read_failure(error)


def is_read_failure(error: BaseException) -> bool:
    """Return whether the disk or the network failed, or access was lost."""
    if isinstance(error, OSError):
        return is_system_error(error)
    return type(error).__module__.partition(".")[0] in _NETWORKING


def is_system_error(error: OSError) -> bool:
    """Return whether disk or network failed; pyarrow raises OSError without errno for broken content."""
    return error.errno is not None or type(error) is not OSError


def is_unreachable(error: BaseException) -> bool:
    """Return whether a host has no address, or accepts no connections."""
    return any(
        isinstance(cause, ConnectionRefusedError | socket.gaierror) or type(cause).__name__ in _UNREACHABLE
        for cause in causes(error)
    )
