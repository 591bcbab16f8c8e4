"""Errors caused by user input, printed as one line; the process exits with code 2."""

from __future__ import annotations


class SoloError(Exception):
    """Invalid user input; the message says what is wrong and what to do.

    Attributes:
        exit_code: exit code of the command.
        raised_by_all: whether all processes of a run raise it, so that only the first one prints it.
    """

    exit_code = 2
    raised_by_all = False
