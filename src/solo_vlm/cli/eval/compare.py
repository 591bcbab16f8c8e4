"""`solo eval compare`: two runs on the same questions."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from solo_vlm.cli._common import STDOUT, print_json

if TYPE_CHECKING:
    from rich.table import Table

    from solo_vlm.evaluate.compare import Comparison


def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="Folder of a run.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Folder of another run.")],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare two runs, task by task: difference, 95% interval and p-value (paired bootstrap)."""
    from solo_vlm.evaluate.compare import compare_runs
    from solo_vlm.evaluate.run_folder import RunFolder

    comparisons = compare_runs(RunFolder(first), RunFolder(second))
    if json:
        tasks = [asdict(comparison) for comparison in comparisons]
        print_json({"first": str(first), "second": str(second), "tasks": tasks})
        return
    STDOUT.print(f"A: {first}\nB: {second}", highlight=False)
    STDOUT.print(_table(comparisons))
    for comparison in comparisons:
        if comparison.left_out:
            STDOUT.print(f"{comparison.title}: {comparison.left_out:,} rows of one run only are left out")
    STDOUT.print(
        "On the rows that both runs have; answers are read by rules. Paired bootstrap over questions (over "
        "images for MME), 10,000 resamples.",
        highlight=False,
    )


def _table(comparisons: list[Comparison]) -> Table:
    from rich.table import Table

    table = Table(show_edge=False)
    table.add_column("task", overflow="fold")
    for column in ("rows", "A", "B", "B - A", "95% interval", "p"):
        table.add_column(column, justify="right", no_wrap=True)
    for comparison in comparisons:
        low, high = comparison.interval
        table.add_row(
            comparison.title,
            f"{comparison.n:,}",
            f"{comparison.first:,.1f}",
            f"{comparison.second:,.1f}",
            f"{comparison.difference:+,.1f}",
            f"{low:+,.1f} to {high:+,.1f}",
            f"{comparison.p_value:.4f}",
        )
    return table
