"""Plots of fitted laws: PNG files, and one self-contained HTML page with the plots and their points."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from solo_vlm.experiments.scaling.analysis import Analysis
from solo_vlm.experiments.scaling.fitting import Array
from solo_vlm.utils.files import write_text
from solo_vlm.utils.pages import png_url, render, save_figure

PAGE = "laws.html"

_MAX_SIZES = 12  # distinguishable by color
_CURVE_POINTS = 60
# The colorblind-safe palette of Okabe and Ito.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")


def write_plots(analysis: Analysis, out: Path) -> list[Path]:
    """Write `law.png`, `optimum.png`, `isoflop.png` (given profiles) and `laws.html`; return the paths."""
    figures = {"law": _draw_law(analysis), "optimum": _draw_optimum(analysis)}
    if analysis.isoflop:
        figures["isoflop"] = _draw_profiles(analysis)
    for name, figure in figures.items():
        save_figure(figure, out / f"{name}.png")
    page = render(
        "solo_vlm.experiments.scaling",
        "laws.html.jinja",
        plots={name: png_url((out / f"{name}.png").read_bytes()) for name in figures},
        facts=analysis.as_dict(),
        points=analysis.table.fitted,
        law=analysis.fit.law,
    )
    write_text(out / PAGE, page)
    return [*(out / f"{name}.png" for name in figures), out / PAGE]


def _draw_law(analysis: Analysis) -> Any:
    """Draw loss over tokens: measured points, and the law as one curve per model size."""
    law, points, held_out = analysis.fit.law, analysis.table.fitted, analysis.table.holdout
    title = (
        f"L = {law.E:.3g} + {law.A:.3g} / N^{law.alpha:.3g} + {law.B:.3g} / D^{law.beta:.3g}, "
        f"{analysis.fit.n_points} runs"
    )
    figure, axes = _new_axes(title, "tokens D", "loss (nats per token)", yscale="log")
    sizes: Array = np.unique(points.n)
    longest = max([points.d.max(), *([held_out.d.max()] if held_out else [])])
    d = np.geomspace(points.d.min(), longest, _CURVE_POINTS)
    if len(sizes) > _MAX_SIZES:
        sizes = np.geomspace(sizes[0], sizes[-1], 5)
        _scatter(axes, points.d, points.loss, len(sizes), "measured")
    else:
        for color, n in enumerate(sizes):
            _scatter(axes, points.d[points.n == n], points.loss[points.n == n], color)
    for color, n in enumerate(sizes):
        _line(axes, d, law.loss(n, d), color, f"N = {n:.3g}")
    if held_out:
        for color, n in enumerate(np.unique(held_out.n), start=len(sizes) + 1):
            runs, label = held_out.n == n, f"N = {n:.3g}, held out"
            _scatter(axes, held_out.d[runs], held_out.loss[runs], color, label, marker="*", s=140)
            _line(axes, d, law.loss(n, d), color, "predicted")
    return _with_legend(figure, axes)


def _draw_optimum(analysis: Analysis) -> Any:
    """Draw the optimal model size over the budget with its 95% interval, and the sizes of the runs."""
    fit, points = analysis.fit, analysis.table.fitted
    figure, axes = _new_axes("Compute-optimal model size", "FLOPs C = 6 N D", "parameters N", yscale="log")
    flops = np.geomspace(points.flops.min(), 10 * points.flops.max(), _CURVE_POINTS)
    best = np.array([fit.law.optimum(c).n for c in flops])
    edges = np.array([fit.interval(lambda law, c=c: law.optimum(c).n) for c in flops])  # type: ignore[misc]
    axes.fill_between(
        flops, edges[:, 0], edges[:, 1], color=_COLORS[0], alpha=0.2, linewidth=0, label="95% interval"
    )
    _line(axes, flops, best, 0, f"N ~ C^{fit.law.a:.3g}")
    _scatter(axes, points.flops, points.n, 1, "runs")
    return _with_legend(figure, axes)


def _draw_profiles(analysis: Analysis) -> Any:
    """Draw loss over model size at each budget, with the fitted parabolas."""
    fit = analysis.isoflop
    assert fit is not None
    title = f"IsoFLOP profiles: N ~ C^{fit.a:.3g}, D ~ C^{fit.b:.3g}"
    figure, axes = _new_axes(title, "parameters N", "loss (nats per token)")
    for color, profile in enumerate(fit.profiles):
        n = np.geomspace(profile.n.min(), profile.n.max(), _CURVE_POINTS)
        _scatter(axes, profile.n, profile.loss, color)
        _line(axes, n, np.polyval(profile.parabola, np.log(n)), color, f"C = {profile.flops:.3g}")
    return _with_legend(figure, axes)


def _new_axes(title: str, x: str, y: str, yscale: str = "linear") -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=x, ylabel=y, xscale="log", yscale=yscale)
    axes.grid(which="both", alpha=0.2)
    return figure, axes


def _scatter(
    axes: Any, x: Array, y: Array, color: int, label: str | None = None, marker: str = "o", s: int = 18
) -> None:
    axes.scatter(x, y, zorder=3, color=_COLORS[color % len(_COLORS)], label=label, marker=marker, s=s)


def _line(axes: Any, x: Array, y: Any, color: int, label: str) -> None:
    axes.plot(x, y, linewidth=1.3, color=_COLORS[color % len(_COLORS)], label=label)


def _with_legend(figure: Any, axes: Any) -> Any:
    axes.legend(frameon=False, loc="upper right")
    return figure
