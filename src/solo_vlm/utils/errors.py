"""Errors caused by user input, printed as one line; the process exits with code 2."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class SoloError(Exception):
    """Invalid user input; the message says what is wrong and what to do.

    Attributes:
        exit_code: Exit code of the command.
        raised_by_all: Whether all processes of a run raise it, so that only the first one prints it.
    """

    exit_code = 2
    raised_by_all = False


def did_you_mean(name: str, known: Iterable[str], count: int = 1) -> str:
    """Return the end of an error message that suggests the closest known names; empty if none is close."""
    near = get_close_matches(name, list(dict.fromkeys(known)), n=count)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type if there is no message.

    A line that ends with a colon, as of lists and nested errors, is joined with the next one.
    """
    if isinstance(error, KeyError):  # its message is the key alone
        return f"missing {error}"
    lines = map(str.strip, (str(error).strip() or type(error).__name__).splitlines())
    first, *rest = filter(None, lines)
    return f"{first} {rest[0]}" if first.endswith(":") and rest else first
