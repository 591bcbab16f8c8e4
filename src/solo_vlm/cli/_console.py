"""Consoles and output of the verbs: figures to stdout, everything else to stderr."""

from __future__ import annotations

import json
import logging
import warnings
from typing import Any

from rich.console import Console

STDERR = Console(stderr=True)
STDOUT = Console(soft_wrap=True)  # a path that wraps cannot be copied


def print_json(value: Any) -> None:
    """One JSON object on stdout, and nothing else."""
    print(json.dumps(value, ensure_ascii=False))


def quiet_libraries() -> None:
    """Keep transformers' own progress bars and notes off the terminal, and torch's on its inner workings."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
