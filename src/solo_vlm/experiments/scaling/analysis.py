"""Everything that points allow to be fitted, and how well runs that were held out are predicted."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from solo_vlm.experiments.scaling.isoflop import IsoFlopFit, fit_isoflop
from solo_vlm.experiments.scaling.laws import ScalingFit, fit_scaling_law
from solo_vlm.experiments.scaling.mixture_law import MixtureFit, fit_mixture_law
from solo_vlm.experiments.scaling.points import Points, Table, read_points
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import new_file


@dataclass(frozen=True)
class Analysis:
    """Laws fitted to a table of points.

    Attributes:
        table: the points.
        fit: of L(N, D).
        mixture: of text and vision tokens apart; none without them.
        isoflop: of the profiles; none where there are too few.
        notes: why one of these is missing, and what else to know.
    """

    table: Table
    fit: ScalingFit
    mixture: MixtureFit | None
    isoflop: IsoFlopFit | None
    notes: Sequence[str]

    @property
    def predictions(self) -> list[dict[str, Any]]:
        """Of the runs that were held out: loss, the law's prediction and its interval, relative error."""
        held = self.table.holdout
        if held is None:
            return []
        return [self._predict(*run) for run in zip(held.names, held.n, held.d, held.loss, strict=True)]

    def as_dict(self, budgets: Sequence[float] = ()) -> dict[str, Any]:
        """Plain values, for JSON; null where a figure is not a number. Budgets are in FLOPs."""
        return _plain(
            {
                **self.fit.as_dict(budgets),
                "holdout": self.predictions,
                "mixture": self.mixture.as_dict() if self.mixture else None,
                "isoflop": self.isoflop.as_dict() if self.isoflop else None,
                "notes": list(self.notes),
            }
        )

    def write(self, path: Path, budgets: Sequence[float] = ()) -> None:
        """Write `as_dict` as JSON."""
        with new_file(path) as partial:
            partial.write_text(json.dumps(self.as_dict(budgets), indent=2) + "\n")

    def _predict(self, name: str, n: float, d: float, loss: float) -> dict[str, Any]:
        predicted = float(self.fit.law.loss(n, d))
        return {
            "run": name,
            "n": n,
            "d": d,
            "loss": loss,
            "predicted": predicted,
            "interval": self.fit.interval(lambda law: float(law.loss(n, d))),
            "error": predicted / loss - 1,
        }


def analyse(path: Path) -> Analysis:
    """Read a table and fit whatever it allows.

    Raises:
        SoloError: as `points.read_points`, or its points do not determine a law.
    """
    table = read_points(path)
    points = table.fitted
    notes = ["d = flops / (6 n), for want of a column d"] if points.d_from_flops else []
    fit = fit_scaling_law(points.n, points.d, points.loss)
    mixture = isoflop = None
    try:
        isoflop = fit_isoflop(points.flops, points.n, points.loss)
    except SoloError as error:
        notes.append(str(error))
    try:
        mixture = _mixture(points)
    except SoloError as error:
        notes.append(str(error))
    return Analysis(table, fit, mixture, isoflop, notes)


def _mixture(points: Points) -> MixtureFit | None:
    if points.d_text is None or points.d_vision is None:
        return None
    return fit_mixture_law(points.n, points.d_text, points.d_vision, points.loss)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value
