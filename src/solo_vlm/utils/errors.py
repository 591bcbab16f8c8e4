"""Errors that a user can cause and mend. The command line prints them as one line and exits with code 2."""

from __future__ import annotations


class SoloError(Exception):
    """Something the user gave is wrong; the message says what, and what to do."""

    exit_code = 2
    is_common = False  # whether all processes of a run raise it together
