"""Comparison of an ablation's variants: means over seeds, paired differences, tables, plot, HTML report."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from solo_vlm.experiments.ablations.measure import Kind
from solo_vlm.experiments.ablations.pipeline import Pipeline
from solo_vlm.experiments.ablations.settings import BASE, Ablation, describe_changes, join_factors
from solo_vlm.utils.files import new_file, write_text
from solo_vlm.utils.pages import png_url, render, save_figure

COLUMNS = ("metric", "variant", "mean", "difference", "95% interval", "p")
EFFECT_COLUMNS = ("metric", "effect", "difference", "95% interval", "p")

_CONFIDENCE = 0.95
_FEW_SEEDS = 5
_DECIMALS = 12  # equates values that differ by rounding, such as 0.55 - 0.5 and 0.61 - 0.56
_PANEL_WIDTH, _PANEL_HEIGHT, _VARIANT_WIDTH = 3.2, 3.4, 0.5  # inches; the panel grows with many variants
_SEED_COLOR, _BASE_COLOR, _VARIANT_COLOR = "#999999", "#000000", "#0072B2"

_SCHEMA = pa.schema(
    [
        ("variant", pa.string()),
        ("seed", pa.int64()),
        ("metric", pa.string()),
        ("kind", pa.string()),  # accuracy or loss
        ("value", pa.float64()),
        ("n", pa.int64()),  # held-out samples
    ]
)


class Row(NamedTuple):
    """Result of one variant with one seed: a row of `results.parquet`."""

    variant: str
    seed: int
    metric: str
    kind: Kind
    value: float
    n: int


class Estimate(NamedTuple):
    """Mean over seeds with its 95% interval, and the two-sided p-value of a true mean of zero.

    The p-value is None if all values are equal.
    """

    mean: float
    low: float
    high: float
    p_value: float | None


def estimate(values: Sequence[float]) -> Estimate:
    """Estimate the mean of at least two independent values, with an interval from Student's t distribution.

    Equal values give an interval of zero width, which reflects the resolution of the metric rather than the
    true mean.

    Applied to the differences of a variant from the base with the same seeds, this is the paired t-test.
    """
    from scipy.stats import ttest_1samp

    mean = float(np.mean(values))
    if np.ptp(np.round(values, _DECIMALS)) == 0:
        return Estimate(mean, mean, mean, None)
    test: Any = ttest_1samp(values, 0.0)
    low, high = test.confidence_interval(_CONFIDENCE)
    return Estimate(mean, float(low), float(high), float(test.pvalue))


@dataclass(frozen=True)
class Comparison:
    """Comparison of all variants on one metric.

    Attributes:
        kind: "accuracy" (higher is better) or "loss".
        n: Number of held-out samples.
        values: One value per seed, by variant.
    """

    metric: str
    kind: Kind
    n: int
    values: Mapping[str, Sequence[float]]

    @cached_property
    def means(self) -> dict[str, Estimate]:
        """Mean over seeds, by variant."""
        return {variant: estimate(values) for variant, values in self.values.items()}

    @cached_property
    def differences(self) -> dict[str, Estimate]:
        """Mean difference from the base, paired by seed, by variant."""
        base = self.values[BASE]
        return {
            variant: estimate([value - other for value, other in zip(values, base, strict=True)])
            for variant, values in self.values.items()
            if variant != BASE
        }

    def effects(self, factors: Sequence[str]) -> dict[str, Estimate]:
        """Estimate main effects and interactions of factors, all of whose combinations are variants.

        A main effect is the difference that a factor makes, averaged over the others. An interaction is how
        much more difference a factor makes when the other is there. Both are paired by seed (Montgomery,
        "Design and Analysis of Experiments", chapter 6).
        """
        effects = {}
        for number in range(1, len(factors) + 1):
            for chosen in combinations(factors, number):
                contrast = np.zeros(len(self.values[BASE]))
                for present in _subsets(factors):
                    sign = (-1) ** len(set(chosen) - set(present))
                    contrast += sign * np.asarray(self.values[join_factors(present)])
                contrast /= 2 ** (len(factors) - number)
                effects[" x ".join(chosen)] = estimate(contrast.tolist())
        return effects


def _subsets(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    return chain.from_iterable(combinations(names, number) for number in range(len(names) + 1))


@dataclass(frozen=True)
class Report:
    """Results of an ablation.

    Attributes:
        fraction: Share of the steps that was trained.
        steps: Steps by variant and stage; None if the stage trains until its data ends.
    """

    ablation: Ablation
    fraction: float
    steps: Mapping[str, Mapping[str, int | None]]
    comparisons: Sequence[Comparison]

    @classmethod
    def make(
        cls, ablation: Ablation, fraction: float, pipelines: Sequence[Pipeline], rows: Sequence[Row]
    ) -> Report:
        """Compare the variants."""
        steps = {
            pipeline.variant: {
                name: stage.run.recipe.steps for name, stage in pipeline.stages.items() if stage.run
            }
            for pipeline in pipelines
        }
        by_metric: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            by_metric[row.metric].append(row)
        return cls(ablation, fraction, steps, [_compare(found) for found in by_metric.values()])

    @property
    def notes(self) -> list[str]:
        """Notes on reading the intervals and p-values."""
        from scipy.stats import t

        settings = self.ablation.settings
        errors = float(t.ppf((1 + _CONFIDENCE) / 2, settings.seeds - 1))
        notes = [
            f"95% intervals by Student's t distribution over {settings.seeds} seeds: mean ± {errors:.2f} "
            "standard errors" + (" (wide; more seeds narrow it)." if settings.seeds < _FEW_SEEDS else "."),
            "Differences (pp: percentage points) are paired by seed: all variants share a seed's initial "
            "weights and, on the same data, its order. They do not cover the choice of held-out samples.",
        ]
        if (tests := len(settings.variants) * len(self.comparisons)) > 1:
            notes.append(f"p-values are not corrected for multiple comparisons; there are {tests}.")
        if settings.factors:
            notes.append(
                "A main effect (one factor) is averaged over the other factors; an interaction (A x B) is "
                "how much more difference A makes where B is."
            )
        if self.fraction != 1:
            notes.append(f"Only {self.fraction:.3g} of the steps were trained.")
        return notes

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        settings = self.ablation.settings
        changes = {BASE: {}, **settings.variants}
        return {
            "ablation": self.ablation.name,
            "question": settings.question,
            "seeds": settings.seeds,
            "fraction": self.fraction,
            "variants": {
                variant: {"changes": describe_changes(changes[variant]), "steps": self.steps[variant]}
                for variant in settings.variant_names
            },
            "axis": settings.axis and settings.axis.model_dump(),
            "metrics": {
                comparison.metric: {
                    "kind": comparison.kind,
                    "n": comparison.n,
                    "values": comparison.values,
                    "means": {
                        variant: {"mean": m.mean, "low": m.low, "high": m.high}
                        for variant, m in comparison.means.items()
                    },
                    "differences": {variant: d._asdict() for variant, d in comparison.differences.items()},
                    "effects": {
                        name: effect._asdict()
                        for name, effect in comparison.effects(tuple(settings.factors)).items()
                    },
                }
                for comparison in self.comparisons
            },
            "notes": self.notes,
        }

    def write(self, path: Path) -> None:
        """Write `as_dict` as JSON."""
        write_text(path, json.dumps(self.as_dict(), indent=2) + "\n")


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write results as a parquet file."""
    with new_file(path) as partial:
        pq.write_table(pa.Table.from_pylist([row._asdict() for row in rows], _SCHEMA), partial)


def result_lines(facts: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Format one line per metric and variant of `Report.as_dict`, with the cells of `COLUMNS`.

    The metric is named on its first line only.
    """
    for metric, found in facts["metrics"].items():
        share = found["kind"] == "accuracy"
        for number, (variant, mean) in enumerate(found["means"].items()):
            difference = found["differences"].get(variant)
            compared = _format_difference(difference, share) if difference else ("", "", "")
            yield ("" if number else metric, variant, format_value(mean["mean"], share), *compared)


def effect_lines(facts: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Format one line per metric and effect of `Report.as_dict`, with the cells of `EFFECT_COLUMNS`."""
    for metric, found in facts["metrics"].items():
        for number, (name, effect) in enumerate(found.get("effects", {}).items()):
            cells = _format_difference(effect, found["kind"] == "accuracy")
            yield ("" if number else metric, name, *cells)


def format_value(value: float, share: bool) -> str:
    """Format an accuracy (a share) or a loss."""
    return f"{value:.1%}" if share else f"{value:.3f}"


def write_report(report: Report, out: Path) -> None:
    """Write `out/plot.png` and the self-contained page `out/report.html`.

    The plot has one panel per metric: a dot per seed and the means with their 95% intervals. Dots of one
    seed are joined, as differences are paired by seed. If the ablation has an axis, variants are placed
    along it and the means are joined. If it has factors, panels of their effects follow below.
    """
    facts = report.as_dict()
    save_figure(_draw(report), out / "plot.png")
    page = render(
        "solo_vlm.experiments.ablations",
        "report.html.jinja",
        facts=facts,
        columns=COLUMNS,
        lines=list(result_lines(facts)),
        effect_columns=EFFECT_COLUMNS,
        effects=list(effect_lines(facts)),
        format_value=format_value,
        plot=png_url((out / "plot.png").read_bytes()),
    )
    write_text(out / "report.html", page)


def _compare(rows: Sequence[Row]) -> Comparison:
    values: dict[str, list[float]] = {}
    for row in sorted(rows, key=lambda row: row.seed):
        values.setdefault(row.variant, []).append(row.value)
    return Comparison(rows[0].metric, rows[0].kind, rows[0].n, values)


def _format_difference(difference: dict[str, Any], share: bool) -> tuple[str, str, str]:
    """Format a difference, its interval and its p-value; differences of shares in percentage points."""
    mean, low, high = (difference[key] * (100 if share else 1) for key in ("mean", "low", "high"))
    p = "-" if difference["p_value"] is None else f"{difference['p_value']:.3f}"
    if share:
        return f"{mean:+.1f} pp", f"{low:+.1f} to {high:+.1f}", p
    return f"{mean:+.3f}", f"{low:+.3f} to {high:+.3f}", p


def _draw(report: Report) -> Any:
    from matplotlib.figure import Figure

    factors = tuple(report.ablation.settings.factors)
    rows = 2 if factors else 1
    width = max(_PANEL_WIDTH, _VARIANT_WIDTH * len(report.ablation.settings.variant_names))
    figure = Figure(figsize=(width * len(report.comparisons), _PANEL_HEIGHT * rows), layout="constrained")
    panels = figure.subplots(rows, len(report.comparisons), squeeze=False)
    for axes, comparison in zip(panels[0], report.comparisons, strict=True):
        _draw_panel(axes, comparison, report)
    if factors:
        for axes, comparison in zip(panels[1], report.comparisons, strict=True):
            _draw_effects(axes, comparison, factors)
        for axes in panels[1, 1:]:
            axes.tick_params(labelleft=False)
    return figure


def _draw_panel(axes: Any, comparison: Comparison, report: Report) -> None:
    from matplotlib.ticker import PercentFormatter

    axis, positions = report.ablation.settings.axis, _positions(report)
    by_seed = np.array([comparison.values[variant] for variant in positions]).T  # (seeds, variants)
    for values in by_seed:
        axes.plot(positions.values(), values, "o-", color=_SEED_COLOR, markersize=3, linewidth=0.6)
    for variant, position in positions.items():
        mean, low, high, _ = comparison.means[variant]
        color = _BASE_COLOR if variant == BASE else _VARIANT_COLOR
        axes.errorbar(position, mean, [[mean - low], [high - mean]], fmt="o", color=color, capsize=4)
    if axis:
        means = [comparison.means[variant].mean for variant in positions]
        axes.plot(positions.values(), means, color=_VARIANT_COLOR)
        axes.set_xlabel(axis.label)
    else:
        crowded = _VARIANT_WIDTH * len(positions) > _PANEL_WIDTH
        axes.set_xticks(list(positions.values()), list(positions), rotation=45 if crowded else 20, ha="right")
        axes.margins(x=0.05 if crowded else 0.25)
    if comparison.kind == "accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title(comparison.metric, fontsize="medium")
    axes.grid(axis="y", alpha=0.2)


def _draw_effects(axes: Any, comparison: Comparison, factors: Sequence[str]) -> None:
    """Draw main effects and interactions with their 95% intervals, the first one at the top."""
    scale, unit = (100, "percentage points") if comparison.kind == "accuracy" else (1, "nats per token")
    effects = comparison.effects(factors)
    axes.axvline(0, color=_SEED_COLOR, linewidth=0.8)
    for place, (mean, low, high, _) in enumerate(effects.values()):
        reach = [[scale * (mean - low)], [scale * (high - mean)]]
        axes.errorbar(scale * mean, place, xerr=reach, fmt="o", color=_VARIANT_COLOR, capsize=4)
    axes.set_yticks(range(len(effects)), list(effects))
    axes.invert_yaxis()
    axes.set_xlabel(f"difference ({unit})")
    axes.grid(axis="x", alpha=0.2)


def _positions(report: Report) -> dict[str, float]:
    """Return the x position of each variant, from left to right."""
    names, axis = report.ablation.settings.variant_names, report.ablation.settings.axis
    if axis is None:
        return {variant: float(index) for index, variant in enumerate(names)}
    return {variant: axis.values[variant] for variant in sorted(names, key=axis.values.__getitem__)}
