"""Laws fitted to a table of points, in files and on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solo_vlm.cli._common import STDOUT
from solo_vlm.utils.errors import SoloError

if TYPE_CHECKING:
    from solo_vlm.experiments.scaling.analysis import Analysis


def fit_and_draw(
    points: Path, facts: Path | None, plots: Path | None, budgets: Sequence[float] = ()
) -> Analysis:
    """Fit a table of points; write what was found and draw it, where files are named for that.

    Raises:
        SoloError: as `analysis.analyse`, or the extra `science` is not installed.
    """
    try:
        from solo_vlm.experiments.scaling.analysis import analyse
        from solo_vlm.experiments.scaling.charts import charts
        from solo_vlm.experiments.scaling.plots import write_plots

        analysis = analyse(points)
        if facts:
            analysis.write(facts, budgets)
        if plots:
            write_plots(charts(analysis), plots)
    except ImportError as error:
        raise SoloError(f"{error.name} is not installed: pip install 'solo-vlm[science]'") from error
    return analysis


def show_laws(analysis: Analysis, budgets: Sequence[float]) -> None:
    """Parameters with intervals, optima, and predictions of held-out runs."""
    facts = analysis.as_dict(budgets)
    _show_parameters(facts, f"L = E + A / N^alpha + B / D^beta, {facts['n_points']} points")
    if facts["mixture"]:
        _show_parameters(facts["mixture"], "L = E + A / N^alpha + B / (T + g V)^beta")
    if facts["isoflop"]:
        _show_parameters(facts["isoflop"], "IsoFLOP profiles: N ~ C^a, D ~ C^b")
    if facts["optima"]:
        rows = [
            [_number(optimum[name]) for name in ("flops", "n", "d", "loss")] for optimum in facts["optima"]
        ]
        _show("Optimal for a budget", ("FLOPs", "parameters", "tokens", "loss"), rows)
    if facts["holdout"]:
        rows = [
            [run["run"], _number(run["loss"]), _number(run["predicted"]), f"{run['error']:+.1%}"]
            for run in facts["holdout"]
        ]
        _show("Held out", ("run", "loss", "predicted", "error"), rows)
    for note in facts["notes"]:
        STDOUT.print(note, style="dim", highlight=False)


def _show_parameters(facts: dict[str, Any], title: str) -> None:
    rows = [
        [name, _number(facts[name]), f"{_number(low)} to {_number(high)}"]
        for name, (low, high) in facts["intervals"].items()
    ]
    _show(title, ("parameter", "value", "95% interval"), rows)


def _show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    STDOUT.print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}"
