"""`solo ablate`: train variants of a chain of stages over several seeds, and compare them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from solo_vlm.cli._common import (
    STDOUT,
    Executor,
    ExecutorOption,
    ProcessesOption,
    print_json,
    quiet_libraries,
)
from solo_vlm.utils.errors import SoloError

if TYPE_CHECKING:
    from solo_vlm.experiments.ablations.settings import Ablation


def ablate(
    name: Annotated[str | None, typer.Argument(help="A name of --list, or a YAML file.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings as key=value.")] = None,
    list_all: Annotated[bool, typer.Option("--list", help="Show the ablations of the package.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what will be trained, and what is there already.")
    ] = False,
    seeds: Annotated[int | None, typer.Option(min=2, help="Repetitions of every arm.")] = None,
    fraction: Annotated[
        float, typer.Option(min=0.001, max=1.0, help="Share of the training steps, for a first look.")
    ] = 1.0,
    out: Annotated[Path | None, typer.Option(help="Folder for data, models and results.")] = None,
    processes: ProcessesOption = 1,
    executor: ExecutorOption = Executor.LOCAL,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train a base and its variants, and report the differences with their intervals.

    Started again, it goes on where it stopped. Ablations in the same folder share what is trained alike.
    """
    quiet_libraries()
    from solo_vlm.experiments.ablations.settings import Ablation

    if list_all:
        return _list(json)
    if name is None:
        raise SoloError("name an ablation (solo ablate --list shows them), or a YAML file")
    given = {"seeds": seeds, "root": out and str(out)}
    ablation = Ablation.load(name, overrides or [], **{key: value for key, value in given.items() if value})
    if dry_run:
        return _plan(ablation, fraction, json)
    _run(ablation, fraction, processes, executor, json)


def _list(json: bool) -> None:
    from rich.table import Table

    from solo_vlm.experiments.ablations.settings import list_ablations

    if json:
        return print_json(list_ablations())
    table = Table("ablation", "question", show_edge=False)
    for name, question in list_ablations().items():
        table.add_row(name, question)
    STDOUT.print(table)


def _plan(ablation: Ablation, fraction: float, json: bool) -> None:
    from solo_vlm.experiments.ablations.plan import make_plan, plan_table

    plan = make_plan(ablation, fraction)
    if json:
        return print_json(plan)
    STDOUT.print(plan_table(plan))
    missing = plan["missing"]
    STDOUT.print(f"to be trained: {missing['runs']} runs, {missing['steps']:,} steps", highlight=False)


def _run(ablation: Ablation, fraction: float, processes: int, executor: Executor, json: bool) -> None:
    from solo_vlm.experiments.ablations.plots import write_plots
    from solo_vlm.experiments.ablations.run import run_ablation
    from solo_vlm.experiments.ablations.table import results_table
    from solo_vlm.train.metrics import progress_bar

    try:
        with progress_bar() as progress:
            report, folder = run_ablation(ablation, progress, fraction, processes, executor.value)
        write_plots(report, folder)
    except ImportError as error:
        raise SoloError(f"{error.name} is not installed: pip install 'solo-vlm[science]'") from error
    facts = report.as_dict()
    if json:
        return print_json({**facts, "folder": str(folder)})
    STDOUT.print(results_table(facts))
    for note in facts["notes"]:
        STDOUT.print(note, style="dim", highlight=False)
    STDOUT.print(f"report: {folder / 'report.html'}", highlight=False)
