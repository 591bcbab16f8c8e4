"""Analysis of a table of points: fits of every law that it determines, and predictions of held-out runs."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import to_jsonable_python

from solo_vlm.experiments.scaling.fitting import Array
from solo_vlm.experiments.scaling.isoflop import IsoFlopFit, fit_isoflop
from solo_vlm.experiments.scaling.laws import (
    FLOPS_PER_PARAMETER_AND_TOKEN,
    MixtureFit,
    ScalingFit,
    fit_mixture_law,
    fit_scaling_law,
)
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import write_text

_BY_MODALITY = {"d_text", "d_vision"}
_TRUE = ("true", "1", "yes")


@dataclass(frozen=True)
class Points:
    """Runs of different model and data sizes.

    Attributes:
        n: Parameters, (points,).
        d: Tokens, (points,).
        loss: Nats per token, (points,).
        d_text: Text tokens, (points,), if the file has the column.
        d_vision: Vision tokens, (points,), if the file has the column.
        d_from_flops: Whether d = flops / (6 n), because the file has no tokens.
        names: Names of the runs.
    """

    n: Array
    d: Array
    loss: Array
    d_text: Array | None
    d_vision: Array | None
    d_from_flops: bool
    names: Sequence[str]

    @property
    def flops(self) -> Array:
        """Budgets C = 6 N D, (points,)."""
        return FLOPS_PER_PARAMETER_AND_TOKEN * self.n * self.d


@dataclass(frozen=True)
class Table:
    """Points of a file.

    Attributes:
        holdout: Points to predict (column `holdout`); None if the file has none.
    """

    fitted: Points
    holdout: Points | None


@dataclass(frozen=True)
class Analysis:
    """Laws fitted to a table of points.

    Attributes:
        mixture: Fit of the mixture law; None if text and vision tokens are not given separately.
        isoflop: Fit of the IsoFLOP profiles; None if there are too few.
        notes: Reasons for missing fits, and other remarks.
    """

    table: Table
    fit: ScalingFit
    mixture: MixtureFit | None
    isoflop: IsoFlopFit | None
    notes: Sequence[str]

    @property
    def predictions(self) -> list[dict[str, Any]]:
        """Held-out runs: measured loss, predicted loss with its interval, relative error."""
        held_out = self.table.holdout
        if held_out is None:
            return []
        runs = zip(held_out.names, held_out.n, held_out.d, held_out.loss, strict=True)
        return [self._predict(*run) for run in runs]

    def as_dict(self, budgets: Sequence[float] = ()) -> dict[str, Any]:
        """Return plain values, for JSON, with null for NaN; `budgets` are in FLOPs."""
        facts = {
            **self.fit.as_dict(budgets),
            "holdout": self.predictions,
            "mixture": self.mixture.as_dict() if self.mixture else None,
            "isoflop": self.isoflop.as_dict() if self.isoflop else None,
            "notes": self.notes,
        }
        return to_jsonable_python(facts, inf_nan_mode="null")

    def write(self, path: Path, budgets: Sequence[float] = ()) -> None:
        """Write `as_dict` as JSON."""
        write_text(path, json.dumps(self.as_dict(budgets), indent=2) + "\n")

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


def analyze(path: Path) -> Analysis:
    """Read a table and fit every law that its points determine."""
    table = read_points(path)
    points = table.fitted
    notes = ["d = flops / (6 n), as the table has no column d"] if points.d_from_flops else []
    fit = fit_scaling_law(points.n, points.d, points.loss)
    mixture = isoflop = None
    try:
        isoflop = fit_isoflop(points.flops, points.n, points.loss)
    except SoloError as error:
        notes.append(str(error))
    if points.d_text is not None and points.d_vision is not None:
        try:
            mixture = fit_mixture_law(points.n, points.d_text, points.d_vision, points.loss)
        except SoloError as error:
            notes.append(str(error))
    return Analysis(table, fit, mixture, isoflop, notes)


def read_points(path: Path) -> Table:
    """Read `n`, `loss`, `d` (or `flops`), and optionally `d_text`, `d_vision`, `run` and `holdout`.

    Args:
        path: CSV or parquet file; other columns are ignored.

    Raises:
        SoloError: The file cannot be read, lacks a column, or has a value that is not a positive number.
    """
    rows = _read_rows(path)
    if not rows:
        raise SoloError(f"{path} has no rows")
    columns = rows[0].keys()
    if not {"n", "loss"} <= columns or not ("d" in columns or "flops" in columns or columns >= _BY_MODALITY):
        raise SoloError(
            f"{path} has the columns {', '.join(columns)}: expected n and loss, and d "
            "(or d_text and d_vision, or flops)"
        )
    fitted: list[tuple[int, dict[str, Any]]] = []
    holdout: list[tuple[int, dict[str, Any]]] = []
    for number, row in enumerate(rows, start=1):
        is_held_out = str(row.get("holdout", "")).strip().lower() in _TRUE
        (holdout if is_held_out else fitted).append((number, row))
    return Table(_points(path, fitted), _points(path, holdout) if holdout else None)


def _points(path: Path, rows: Sequence[tuple[int, Mapping[str, Any]]]) -> Points:
    def column(name: str, zero: bool = False) -> Array:
        return np.array([_number(path, row, name, values.get(name), zero) for row, values in rows])

    columns = rows[0][1].keys() if rows else set()
    n, text, vision = column("n"), None, None
    if columns >= _BY_MODALITY:
        text, vision = column("d_text"), column("d_vision", zero=True)
    if "d" in columns:
        d = column("d")
    elif text is not None and vision is not None:
        d = text + vision
    else:
        d = column("flops") / (FLOPS_PER_PARAMETER_AND_TOKEN * n)
    return Points(
        n=n,
        d=d,
        loss=column("loss"),
        d_text=text,
        d_vision=vision,
        d_from_flops="d" not in columns and text is None,
        names=[str(values.get("run", row)) for row, values in rows],
    )


def _read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            return list(pq.read_table(path).to_pylist())
        with path.open(newline="", encoding="utf-8-sig") as file:
            return [
                {name.strip(): value for name, value in row.items() if isinstance(name, str)}
                for row in csv.DictReader(file)
            ]
    except (OSError, ValueError, csv.Error) as error:
        raise SoloError(f"cannot read {path}: {error}") from error


def _number(path: Path, row: int, column: str, value: Any, zero: bool) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if math.isfinite(number) and (number > 0 or (zero and number == 0)):
        return number
    raise SoloError(f"{path}, row {row}, column {column}: {value!r} is not a positive number")
