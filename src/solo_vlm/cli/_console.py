"""Consoles and output of the verbs: figures to stdout, everything else to stderr."""

from __future__ import annotations

import logging
import warnings
from typing import Any

from rich.console import Console

from solo_vlm.utils.json_lines import json_line

STDERR = Console(stderr=True)
STDOUT = Console(soft_wrap=True)  # a path that wraps cannot be copied


def print_json(value: Any) -> None:
    """One JSON object on stdout, and nothing else. What a file name has that is no Unicode is escaped."""
    print(json_line(value).decode(), end="")


def quiet_libraries() -> None:
    """Keep transformers' own progress bars and notes off the terminal, and torch's on its inner workings."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
