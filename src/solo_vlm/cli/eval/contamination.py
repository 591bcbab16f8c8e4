"""`solo eval contamination`: what of some benchmarks a training mixture holds."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from solo_vlm.cli._common import STDOUT, print_json, progress_bar, quiet_libraries
from solo_vlm.cli.eval._tasks import DataRoot, Tasks, task_names

if TYPE_CHECKING:
    from rich.table import Table

    from solo_vlm.evaluate.contamination.check import Contamination


def contamination(
    mixture: Annotated[str, typer.Option(help="YAML file of a mixture or a recipe, or a recipe's name.")],
    out: Annotated[Path, typer.Option(help="Folder for contamination.json and a page with the matches.")],
    tasks: Tasks = None,
    data_root: DataRoot = None,
    distance: Annotated[
        int, typer.Option(min=0, max=16, help="Bits of 64 in which two images' hashes may differ.")
    ] = 4,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read; 0: this one.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Look for a benchmark's images and questions in a training mixture."""
    quiet_libraries()
    from solo_vlm.data.mixture import Mixture
    from solo_vlm.evaluate.benchmarks import get
    from solo_vlm.evaluate.contamination.check import check_mixture
    from solo_vlm.evaluate.contamination.page import write_page
    from solo_vlm.evaluate.data_root import load_benchmark
    from solo_vlm.evaluate.rows import Rows
    from solo_vlm.utils.files import new_file

    settings = Mixture.load(mixture)
    benchmarks = {
        name: Rows.of(get(name), load_benchmark(get(name), data_root)) for name in task_names(tasks)
    }
    with progress_bar("reading") as on_progress:
        found = check_mixture(benchmarks, settings, distance, workers, on_progress)
    facts = {"mixture": mixture, **found.as_dict()}
    with new_file(out / "contamination.json") as partial:
        partial.write_text(json_format.dumps(facts, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    write_page(out / "contamination.html", mixture, found, benchmarks)
    if json:
        print_json(facts)
        return
    STDOUT.print(_table(found))
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in found.skipped.items())
    STDOUT.print(
        f"in {found.training_rows:,} rows with {found.training_images:,} images"
        + (f" (skipped: {skipped})" if skipped else ""),
        highlight=False,
    )
    STDOUT.print(f"matches: {out / 'contamination.html'}", highlight=False)


def _table(found: Contamination) -> Table:
    from rich.table import Table

    table = Table(show_edge=False)
    table.add_column("task")
    for column in ("rows", "images", "found", "questions", "found"):
        table.add_column(column, justify="right")
    for task, findings in found.tasks.items():
        table.add_row(
            task,
            f"{findings.rows:,}",
            f"{findings.images:,}",
            f"{len(findings.image_matches):,} rows",
            f"{findings.questions:,}",
            f"{len(findings.question_matches):,} rows",
        )
    return table
