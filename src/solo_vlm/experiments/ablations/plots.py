"""The arms of an ablation on every metric: a PNG by matplotlib, and an interactive page by Plotly."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from solo_vlm.experiments.ablations.report import Comparison, Report
from solo_vlm.experiments.ablations.settings import BASE
from solo_vlm.experiments.ablations.table import COLUMNS, lines
from solo_vlm.utils.files import new_file
from solo_vlm.utils.pages import render

if TYPE_CHECKING:
    import plotly.graph_objects as go

_SEED, _BASE, _VARIANT = "#999999", "#000000", "#0072B2"


def write_plots(report: Report, out: Path) -> None:
    """Write `out/plot.png` and `out/report.html`: a dot for each seed, means with their 95% intervals.

    Dots of one seed are joined, since they are compared with each other. Variants in an order are drawn over
    their axis, the means joined.

    Args:
        report: of the ablation.
        out: folder.
    """
    facts = report.as_dict()
    with new_file(out / "plot.png") as partial:
        _picture(report).savefig(partial, dpi=120, format="png")
    page = render(
        "solo_vlm.experiments.ablations",
        "report.html.jinja",
        facts=facts,
        columns=COLUMNS,
        lines=list(lines(facts)),
        plot=_interactive(report).to_html(full_html=False, include_plotlyjs=True),
    )
    with new_file(out / "report.html") as partial:
        partial.write_text(page, encoding="utf-8")


def _picture(report: Report) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(report.comparisons), 3.4), layout="constrained")
    panels = figure.subplots(1, len(report.comparisons), squeeze=False)[0]
    for axes, comparison in zip(panels, report.comparisons, strict=True):
        _draw(axes, comparison, report)
    return figure


def _draw(axes: Any, comparison: Comparison, report: Report) -> None:
    from matplotlib.ticker import PercentFormatter

    axis, places = report.ablation.settings.axis, _places(report)
    for values in _by_seed(comparison, list(places)):
        axes.plot(places.values(), values, "o-", color=_SEED, markersize=3, linewidth=0.6)
    for arm, place in places.items():
        mean, low, high, _ = comparison.means[arm]
        axes.errorbar(place, mean, [[mean - low], [high - mean]], fmt="o", color=_colour(arm), capsize=4)
    if axis:
        axes.plot(places.values(), [comparison.means[arm].mean for arm in places], color=_VARIANT)
        axes.set_xlabel(axis.label)
    else:
        axes.set_xticks(list(places.values()), list(places), rotation=20, ha="right")
        axes.margins(x=0.25)
    if comparison.kind == "accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title(comparison.metric, fontsize="medium")
    axes.grid(axis="y", alpha=0.2)


def _interactive(report: Report) -> go.Figure:
    from plotly.subplots import make_subplots

    metrics = [comparison.metric for comparison in report.comparisons]
    figure = make_subplots(rows=1, cols=len(metrics), subplot_titles=metrics)
    for column, comparison in enumerate(report.comparisons, start=1):
        _add(figure, comparison, report, {"row": 1, "col": column})
    figure.update_layout(
        template="plotly_white", showlegend=False, height=400, margin={"l": 40, "r": 20, "t": 60, "b": 40}
    )
    return figure


def _add(figure: go.Figure, comparison: Comparison, report: Report, panel: dict[str, int]) -> None:
    axis, places = report.ablation.settings.axis, _places(report)
    arms, x = list(places), list(places.values())
    for seed, values in enumerate(_by_seed(comparison, arms)):
        line = {"color": _SEED, "width": 1}
        figure.add_scatter(x=x, y=values, text=arms, line=line, name=f"seed {seed}", **panel)
    means = [comparison.means[arm] for arm in arms]
    figure.add_scatter(
        x=x,
        y=[mean.mean for mean in means],
        error_y={"array": [m.high - m.mean for m in means], "arrayminus": [m.mean - m.low for m in means]},
        text=arms,
        mode="lines+markers" if axis else "markers",
        line={"color": _VARIANT},
        marker={"color": [_colour(arm) for arm in arms], "size": 10},
        name="mean",
        **panel,
    )
    if axis:
        figure.update_xaxes(title=axis.label, **panel)
    else:
        figure.update_xaxes(tickvals=x, ticktext=arms, range=[-0.5, len(arms) - 0.5], **panel)
    figure.update_yaxes(tickformat=".0%" if comparison.kind == "accuracy" else None, **panel)


def _places(report: Report) -> dict[str, float]:
    """The arms from left to right, and where they stand on the x axis."""
    settings = report.ablation.settings
    if settings.axis is None:
        return {arm: float(place) for place, arm in enumerate(settings.arms)}
    values = settings.axis.values
    return {arm: values[arm] for arm in sorted(settings.arms, key=lambda arm: values[arm])}


def _by_seed(comparison: Comparison, arms: list[str]) -> np.ndarray:
    """(seeds, arms) values."""
    return np.array([comparison.values[arm] for arm in arms]).T


def _colour(arm: str) -> str:
    return _BASE if arm == BASE else _VARIANT
