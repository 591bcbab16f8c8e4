"""Charts as PNG files, by matplotlib, and as one interactive page that needs nothing else, by Plotly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solo_vlm.experiments.scaling.charts import Chart, Series
from solo_vlm.utils.files import new_file

if TYPE_CHECKING:
    import plotly.graph_objects as go

PAGE = "laws.html"

# Okabe and Ito's colours, which those see too who do not see all colours.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")


def write_plots(charts: Sequence[Chart], out: Path) -> list[Path]:
    """Write each chart as `out/NAME.png`, and all as `out/laws.html`; return the paths.

    Args:
        charts: what to draw.
        out: folder.
    """
    paths = []
    for chart in charts:
        paths.append(out / f"{chart.name}.png")
        with new_file(paths[-1]) as partial:
            _picture(chart).savefig(partial, dpi=120, format="png")
    paths.append(out / PAGE)
    with new_file(paths[-1]) as partial:
        partial.write_text(_page(charts), encoding="utf-8")
    return paths


def _picture(chart: Chart) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for series in chart.series:
        style: dict[str, Any] = {"color": _colour(series), "label": series.name}
        if series.low is not None:
            axes.fill_between(series.x, series.low, series.y, alpha=0.2, linewidth=0, **style)
        elif series.kind == "line":
            axes.plot(series.x, series.y, linewidth=1.3, **style)
        else:
            held = series.kind == "held out"
            style |= {"marker": "*" if held else "o", "s": 140 if held else 18}
            axes.scatter(series.x, series.y, zorder=3, **style)
    axes.set(xlabel=chart.x, ylabel=chart.y, title=chart.title, xscale="log")
    if chart.log_y:
        axes.set_yscale("log")
    axes.grid(which="both", alpha=0.2)
    axes.legend(frameon=False, loc="upper right")
    return figure


def _page(charts: Sequence[Chart]) -> str:
    parts = [
        _interactive(chart).to_html(full_html=False, include_plotlyjs=number == 0)
        for number, chart in enumerate(charts)
    ]
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><title>Scaling laws</title>'
    return head + "\n".join(parts) + "</html>\n"


def _interactive(chart: Chart) -> go.Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    for series in chart.series:
        style: dict[str, Any] = {
            "name": series.name,
            "showlegend": series.name is not None,
            "x": series.x,
            "y": series.y,
        }
        if series.kind == "band":
            edge = {"mode": "lines", "line": {"width": 0, "color": _colour(series)}}
            figure.add_scatter(x=series.x, y=series.low, showlegend=False, hoverinfo="skip", **edge)
            figure.add_scatter(fill="tonexty", **edge, **style)
        elif series.kind == "line":
            figure.add_scatter(mode="lines", line={"color": _colour(series)}, **style)
        else:
            held = series.kind == "held out"
            marker = {
                "color": _colour(series),
                "symbol": "star" if held else "circle",
                "size": 14 if held else 7,
            }
            figure.add_scatter(mode="markers", marker=marker, **style)
    figure.update_layout(title=chart.title, template="plotly_white")
    figure.update_xaxes(title=chart.x, type="log")
    figure.update_yaxes(title=chart.y, type="log" if chart.log_y else "linear")
    return figure


def _colour(series: Series) -> str:
    return _COLOURS[series.colour % len(_COLOURS)]
