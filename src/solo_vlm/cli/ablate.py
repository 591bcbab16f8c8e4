"""`solo ablate`: train variants of a pipeline of stages over several seeds, and compare them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from solo_vlm.cli._common import (
    STDOUT,
    ExecutorOption,
    JsonOption,
    ProcessesOption,
    print_json,
    print_table,
    quiet_libraries,
)
from solo_vlm.utils.errors import SoloError

if TYPE_CHECKING:
    from solo_vlm.experiments.ablations.settings import Ablation


def ablate(
    name: Annotated[str | None, typer.Argument(help="Name from --list, or path of a YAML file.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings as key=value.")] = None,
    list_all: Annotated[bool, typer.Option("--list", help="List the package's ablations and exit.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be trained and what is finished, and exit.")
    ] = False,
    seeds: Annotated[int | None, typer.Option(min=2, help="Number of seeds per variant.")] = None,
    fraction: Annotated[
        float, typer.Option(min=0.001, max=1.0, help="Share of the training steps to run, for a first look.")
    ] = 1.0,
    out: Annotated[Path | None, typer.Option(help="Root folder for data, models and results.")] = None,
    processes: ProcessesOption = 1,
    executor: ExecutorOption = "local",
    json: JsonOption = False,
) -> None:
    """Train a base pipeline and its variants, and report the differences with 95% intervals.

    Run the same command again to resume. Ablations with the same root folder share identical runs.
    """
    quiet_libraries()
    from solo_vlm.experiments.ablations.settings import Ablation, list_ablations

    if list_all:
        known = list_ablations()
        if json:
            return print_json(known)
        return STDOUT.print("".join(f"{name:20} {question}\n" for name, question in known.items()), end="")
    if name is None:
        raise SoloError("give the name of an ablation (solo ablate --list), or the path of a YAML file")
    given = {"seeds": seeds, "root": out and str(out)}
    ablation = Ablation.load(name, overrides or [], **{key: value for key, value in given.items() if value})
    if dry_run:
        return _plan(ablation, fraction, json)
    from solo_vlm.train.metrics import progress_bar

    try:
        from solo_vlm.experiments.ablations.report import (
            COLUMNS,
            EFFECT_COLUMNS,
            effect_lines,
            result_lines,
            write_report,
        )
        from solo_vlm.experiments.ablations.run import run_ablation

        with progress_bar() as progress:
            report, folder = run_ablation(ablation, progress, fraction, processes, executor)
        write_report(report, folder)
    except ImportError as error:
        raise SoloError(f"{error.name} is not installed: pip install 'solo-vlm[science]'") from error
    facts = report.as_dict()
    if json:
        return print_json({**facts, "folder": str(folder)})
    print_table(facts["question"], COLUMNS, result_lines(facts), left=2)
    if effects := list(effect_lines(facts)):
        print_table("Main effects and interactions", EFFECT_COLUMNS, effects, left=2)
    for note in facts["notes"]:
        STDOUT.print(note, style="dim")
    STDOUT.print(f"report: {folder / 'report.html'}")


def _plan(ablation: Ablation, fraction: float, json: bool) -> None:
    from solo_vlm.experiments.ablations.pipeline import make_plan

    plan = make_plan(ablation, fraction)
    if json:
        return print_json(plan)
    rows = []
    for variant, planned in plan["variants"].items():
        first = (variant, "; ".join(planned["changes"]))
        for stage, found in planned["stages"].items():
            steps = "" if found["steps"] is None else f"{found['steps']:,}"
            rows.append((*first, stage, steps, f"{sum(found['runs'].values())} of {len(found['runs'])}"))
            first = ("", "")
    print_table(plan["question"], ("variant", "changes", "stage", "steps", "finished"), rows, left=3)
    missing = plan["missing"]
    STDOUT.print(f"to be trained: {missing['runs']} runs, {missing['steps']:,} steps")
