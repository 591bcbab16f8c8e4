"""What came of an ablation: every arm on every metric, and how the variants differ from the base."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from solo_vlm.experiments.ablations.chain import Chain
from solo_vlm.experiments.ablations.measure import Kind
from solo_vlm.experiments.ablations.settings import BASE, Ablation, describe
from solo_vlm.experiments.ablations.statistics import Estimate, estimate, standard_errors
from solo_vlm.utils.files import new_file

_FEW_SEEDS = 5

_SCHEMA = pa.schema(
    [
        ("arm", pa.string()),
        ("seed", pa.int64()),
        ("metric", pa.string()),
        ("kind", pa.string()),  # accuracy or loss
        ("value", pa.float64()),
        ("n", pa.int64()),  # held-out samples
    ]
)


class Row(NamedTuple):
    """A value of an arm under a seed, as in the table of results."""

    arm: str
    seed: int
    metric: str
    kind: Kind
    value: float
    n: int


@dataclass(frozen=True)
class Comparison:
    """The arms on one metric.

    Attributes:
        metric: its name.
        kind: "accuracy", of which more is better, or "loss".
        n: held-out samples.
        values: of each arm, one a seed.
    """

    metric: str
    kind: Kind
    n: int
    values: Mapping[str, Sequence[float]]

    @cached_property
    def means(self) -> dict[str, Estimate]:
        """Of each arm, over the seeds."""
        return {arm: estimate(values) for arm, values in self.values.items()}

    @cached_property
    def differences(self) -> dict[str, Estimate]:
        """Of each variant from the base, over the seeds, paired."""
        base = self.values[BASE]
        return {
            arm: estimate([value - other for value, other in zip(values, base, strict=True)])
            for arm, values in self.values.items()
            if arm != BASE
        }


@dataclass(frozen=True)
class Report:
    """An ablation's results.

    Attributes:
        ablation: as it was run.
        fraction: of all steps that were trained.
        steps: of each arm, stage by stage; None where the data's end decides.
        comparisons: one a metric.
    """

    ablation: Ablation
    fraction: float
    steps: Mapping[str, Mapping[str, int | None]]
    comparisons: Sequence[Comparison]

    @classmethod
    def make(
        cls, ablation: Ablation, fraction: float, chains: Sequence[Chain], rows: Sequence[Row]
    ) -> Report:
        """Compare the arms.

        Args:
            ablation: as it was run, with at least two seeds.
            fraction: of all steps that were trained.
            chains: that were trained.
            rows: all that was measured of them.
        """
        steps = {
            chain.arm: {stage: link.run.recipe.steps for stage, link in chain.stages.items() if link.run}
            for chain in chains
        }
        by_metric: dict[str, list[Row]] = {}
        for row in rows:
            by_metric.setdefault(row.metric, []).append(row)
        return cls(ablation, fraction, steps, [_compare(found) for found in by_metric.values()])

    @property
    def notes(self) -> list[str]:
        """What to know of the figures."""
        settings = self.ablation.settings
        errors = standard_errors(settings.seeds)
        notes = [
            f"Intervals are 95%, by Student's t distribution over {settings.seeds} seeds: {errors:.2f} "
            "standard errors to either side"
            + (", which is wide; more seeds narrow them." if settings.seeds < _FEW_SEEDS else "."),
            "Differences (pp: percentage points) are paired: arms share a seed's first weights and, of the "
            "same data, the order. Held-out samples are the same throughout: intervals do not cover others.",
        ]
        if (tests := len(settings.variants) * len(self.comparisons)) > 1:
            notes.append(f"Each p-value is of one comparison by itself, and there are {tests}.")
        if self.fraction != 1:
            notes.append(f"Only {self.fraction:.3g} of all steps were trained: a first look.")
        return notes

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        settings = self.ablation.settings
        changes = {BASE: [], **{arm: describe(stages) for arm, stages in settings.variants.items()}}
        return {
            "ablation": self.ablation.name,
            "question": settings.question,
            "seeds": settings.seeds,
            "fraction": self.fraction,
            "arms": {arm: {"changes": changes[arm], "steps": self.steps[arm]} for arm in settings.arms},
            "axis": settings.axis and settings.axis.model_dump(),
            "metrics": {
                comparison.metric: {
                    "kind": comparison.kind,
                    "n": comparison.n,
                    "values": comparison.values,
                    "means": {
                        arm: {"mean": m.mean, "low": m.low, "high": m.high}
                        for arm, m in comparison.means.items()
                    },
                    "differences": {arm: d._asdict() for arm, d in comparison.differences.items()},
                }
                for comparison in self.comparisons
            },
            "notes": self.notes,
        }

    def write(self, path: Path) -> None:
        """Write `as_dict` as JSON."""
        with new_file(path) as partial:
            partial.write_text(json.dumps(self.as_dict(), indent=2) + "\n")


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write the table of results, a parquet file."""
    with new_file(path) as partial:
        pq.write_table(pa.Table.from_pylist([row._asdict() for row in rows], _SCHEMA), partial)


def _compare(rows: Sequence[Row]) -> Comparison:
    values: dict[str, list[float]] = {}
    for row in sorted(rows, key=lambda row: row.seed):
        values.setdefault(row.arm, []).append(row.value)
    return Comparison(rows[0].metric, rows[0].kind, rows[0].n, values)
