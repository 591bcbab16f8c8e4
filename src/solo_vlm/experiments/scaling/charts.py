"""What the fits of laws look like: charts as plain data, whoever draws them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from solo_vlm.experiments.scaling.analysis import Analysis
from solo_vlm.experiments.scaling.huber import Array
from solo_vlm.experiments.scaling.isoflop import IsoFlopFit
from solo_vlm.experiments.scaling.laws import ScalingFit
from solo_vlm.experiments.scaling.points import Table

_SIZES = 12  # that can be told apart by colour
_STEPS = 60  # of a curve


@dataclass(frozen=True)
class Series:
    """One of a chart's lines, clouds of points, or bands.

    Attributes:
        name: in the legend; none leaves it out there.
        x: (points,).
        y: (points,); of a band its upper edge.
        kind: how it is drawn; "held out" are points that stand out.
        colour: number of the colour, shared by what belongs together.
        low: (points,) lower edge of a band.
    """

    name: str | None
    x: Array
    y: Array
    kind: Literal["points", "held out", "line", "band"]
    colour: int
    low: Array | None = None


@dataclass(frozen=True)
class Chart:
    """A chart with logarithmic axes, but for the losses of IsoFLOP profiles.

    Attributes:
        name: of its file.
        title: above it.
        x: what is to the right.
        y: what is upwards.
        series: in the order in which they are drawn.
        log_y: whether y is logarithmic; x always is.
    """

    name: str
    title: str
    x: str
    y: str
    series: Sequence[Series]
    log_y: bool = True


def charts(analysis: Analysis) -> list[Chart]:
    """The law over its points, the optimal size over the budget, and IsoFLOP profiles where there are any."""
    drawn = [_law(analysis.fit, analysis.table), _optimum(analysis.fit, analysis.table)]
    return drawn + ([_profiles(analysis.isoflop)] if analysis.isoflop else [])


def _law(fit: ScalingFit, table: Table) -> Chart:
    points, held = table.fitted, table.holdout
    sizes: Array = np.unique(points.n)
    longest = max([points.d.max(), *([held.d.max()] if held else [])])
    d = np.geomspace(points.d.min(), longest, _STEPS)
    if len(sizes) > _SIZES:
        sizes = np.geomspace(sizes[0], sizes[-1], 5)
        series = [Series("measured", points.d, points.loss, "points", len(sizes))]
    else:
        series = [
            Series(None, points.d[points.n == n], points.loss[points.n == n], "points", colour)
            for colour, n in enumerate(sizes)
        ]
    series += [Series(f"N = {n:.3g}", d, fit.law.loss(n, d), "line", i) for i, n in enumerate(sizes)]
    if held:
        for number, n in enumerate(np.unique(held.n), start=len(sizes) + 1):
            runs = held.n == n
            series.append(Series(f"N = {n:.3g}, held out", held.d[runs], held.loss[runs], "held out", number))
            series.append(Series("predicted", d, fit.law.loss(n, d), "line", number))
    law = fit.law
    title = (
        f"L = {law.E:.3g} + {law.A:.3g} / N^{law.alpha:.3g} + {law.B:.3g} / D^{law.beta:.3g}, "
        f"{fit.n_points} runs"
    )
    return Chart("law", title, "tokens D", "loss (nats a token)", series)


def _optimum(fit: ScalingFit, table: Table) -> Chart:
    budgets = table.fitted.flops
    flops = np.geomspace(budgets.min(), 10 * budgets.max(), _STEPS)
    best = np.array([fit.law.optimum(c).n for c in flops])
    edges = np.array([fit.interval(lambda law, c=c: law.optimum(c).n) for c in flops])  # type: ignore[misc]
    series = [
        Series("95% interval", flops, edges[:, 1], "band", 0, low=edges[:, 0]),
        Series(f"N ~ C^{fit.law.a:.3g}", flops, best, "line", 0),
        Series("runs", budgets, table.fitted.n, "points", 1),
    ]
    return Chart("optimum", "Optimal size of a budget", "FLOPs C = 6 N D", "parameters N", series)


def _profiles(fit: IsoFlopFit) -> Chart:
    series = []
    for colour, profile in enumerate(fit.profiles):
        n = np.geomspace(profile.n.min(), profile.n.max(), _STEPS)
        name = f"C = {profile.flops:.3g}"
        series.append(Series(None, profile.n, profile.loss, "points", colour))
        curve = np.asarray(np.polyval(profile.parabola, np.log(n)), np.float64)
        series.append(Series(name, n, curve, "line", colour))
    title = f"IsoFLOP profiles: N ~ C^{fit.a:.3g}, D ~ C^{fit.b:.3g}"
    return Chart("isoflop", title, "parameters N", "loss (nats a token)", series, log_y=False)
