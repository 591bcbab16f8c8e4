"""`solo scaling sweep`: train sizes at budgets, then fit and plot."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from solo_vlm.cli._common import (
    STDERR,
    STDOUT,
    Executor,
    ExecutorOption,
    ProcessesOption,
    print_json,
    quiet_libraries,
)
from solo_vlm.cli.scaling._laws import fit_and_draw, show_laws


def sweep(
    settings: Annotated[str, typer.Argument(help="YAML file, or a name such as sweeps/toy.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings as key=value.")] = None,
    processes: ProcessesOption = 1,
    executor: ExecutorOption = Executor.LOCAL,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train every size at every budget, then fit and plot. Started again, it goes on where it stopped."""
    quiet_libraries()
    from solo_vlm.experiments.scaling.sweep import run_sweep
    from solo_vlm.experiments.scaling.sweep_settings import SweepSettings

    loaded = SweepSettings.load(settings, overrides or [])
    root = Path(loaded.root)
    table = run_sweep(loaded, processes, executor.value, _report)
    analysis = fit_and_draw(table, root / "fit.json", root / "plots")
    if json:
        print_json({**analysis.as_dict(), "results": str(table), "plots": str(root / "plots")})
        return
    show_laws(analysis, [])
    STDOUT.print(f"results: {table}\nplots: {root / 'plots'}", highlight=False)


def _report(name: str, done: int, total: int) -> None:
    STDERR.print(f"{name}: done, {done} of {total}", highlight=False)
