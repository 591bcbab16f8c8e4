"""Shared parts of the commands: consoles, JSON output, progress bars, common options."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.json_lines import json_line

if TYPE_CHECKING:
    from rich.table import Table

STDERR = Console(stderr=True, highlight=False)  # progress and logs
STDOUT = Console(soft_wrap=True, highlight=False)  # results; a path that wraps cannot be copied

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
ExecutorOption = Annotated[
    Literal["local", "ray"],
    typer.Option("--engine", help="Run on this machine (local), or on the Ray cluster at RAY_ADDRESS (ray)."),
]
ProcessesOption = Annotated[int, typer.Option(min=1, help="Maximum number of concurrent runs.")]
QuantizeOption = Annotated[
    Literal["int8", "nf4"] | None,
    typer.Option(help="Quantize the weights to 8 or 4 bits (pip install 'solo-vlm\\[quantize]')."),
]


def is_first_process() -> bool:
    """Return whether this is the process of a launcher such as torchrun that prints, or the only one."""
    return (os.environ.get("RANK") or "0") == "0"


def print_json(value: Any) -> None:
    """Print one JSON object on stdout. Bytes of a file name that are not Unicode are escaped."""
    print(json_line(value).decode(), end="")


def print_table(
    title: str | None,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    left: int = 1,
    rules_before: Container[int] = (),
) -> None:
    """Print a table: `left` columns are left-aligned, the others are right-aligned and never wrap.

    With `left` > 1, a row with an empty first cell continues the section above it; `rules_before` gives rows
    below a rule.
    """
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_edge=False)
    for number, column in enumerate(columns):
        is_left = number < left
        table.add_column(column, justify="left" if is_left else "right", no_wrap=not is_left, overflow="fold")
    for number, row in enumerate(rows):
        if number in rules_before or (left > 1 and row[0]):
            table.add_section()
        table.add_row(*row)
    print_whole(table)


def print_whole(table: Table) -> None:
    """Print a table in full, wider than the terminal if it does not fit, instead of truncating text."""
    from rich.cells import cell_len
    from rich.measure import Measurement

    for column in table.columns:
        if column.no_wrap:
            column.min_width = max(cell_len(str(cell)) for cell in (column.header, *column.cells))
    needed = Measurement.get(STDOUT, STDOUT.options.update(width=10_000), table).minimum
    table.width = needed if needed > STDOUT.width else None
    STDOUT.print(table)


def quiet_libraries() -> None:
    """Silence transformers' progress bars and notes, and torch's warnings about its internals."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback that takes the completed and the total amount of work; draws on a terminal only."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=STDERR, transient=True, disable=not STDERR.file.isatty()) as progress:
        task = progress.add_task(title)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def parse_pixels(option: str, text: str) -> tuple[int, int]:
    """Parse the value of an option, an image size such as "1024x768", into (width, height)."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise SoloError(f"{option} {text}: expected WIDTHxHEIGHT in pixels, such as 1024x768")
    return int(match[1]), int(match[2])
