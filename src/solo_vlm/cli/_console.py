"""Consoles and output of the verbs: figures to stdout, everything else to stderr."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console

STDERR = Console(stderr=True)
STDOUT = Console(soft_wrap=True)  # a path that wraps cannot be copied


def print_json(value: Any) -> None:
    """One JSON object on stdout, and nothing else."""
    print(json.dumps(value, ensure_ascii=False))


def quiet_libraries() -> None:
    """Keep transformers' own progress bars and notes off the terminal."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
