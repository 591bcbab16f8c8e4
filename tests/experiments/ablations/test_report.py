"""Comparison of variants: intervals, tables, and files."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy import stats

from solo_vlm.experiments.ablations.pipeline import build_pipelines
from solo_vlm.experiments.ablations.report import (
    COLUMNS,
    EFFECT_COLUMNS,
    Comparison,
    Report,
    Row,
    effect_lines,
    estimate,
    result_lines,
    write_report,
    write_rows,
)

NAMES = {"base": (0.50, 0.56, 0.58), "from-scratch": (0.40, 0.43, 0.52), "no-stage1": (0.55, 0.61, 0.66)}
LOSS = {"base": (1.0, 1.2, 1.3), "from-scratch": (1.5, 1.4, 1.9), "no-stage1": (1.1, 1.2, 1.5)}


@pytest.fixture
def report(load):
    ablation = load("seeds=3")
    rows = [
        Row(variant, seed, metric, kind, value, 7)
        for metric, kind, table in (("names", "accuracy", NAMES), ("names loss", "loss", LOSS))
        for variant, values in table.items()
        for seed, value in reversed(list(enumerate(values)))
    ]
    return Report.make(ablation, 1.0, build_pipelines(ablation), rows)


def test_interval_matches_students_t(report):
    """4.303 is the 97.5% quantile of t with two degrees of freedom."""
    mean, low, high, _ = report.comparisons[0].means["base"]
    values = np.array(NAMES["base"])
    reach = 4.302653 * values.std(ddof=1) / 3**0.5
    assert (mean, low, high) == pytest.approx((values.mean(), values.mean() - reach, values.mean() + reach))


@pytest.mark.parametrize("variant", ["from-scratch", "no-stage1"])
def test_differences_are_paired_by_seed(report, variant):
    for comparison, table in zip(report.comparisons, (NAMES, LOSS), strict=True):
        test = stats.ttest_rel(table[variant], table["base"])
        difference = comparison.differences[variant]
        assert difference.mean == pytest.approx(np.mean(table[variant]) - np.mean(table["base"]))
        assert (difference.low, difference.high) == pytest.approx(tuple(test.confidence_interval(0.95)))
        assert difference.p_value == pytest.approx(test.pvalue)


def test_intervals_cover_the_true_mean_95_percent_of_the_time():
    rng = np.random.default_rng(0)
    held = [low <= 2.0 <= high for _, low, high, _ in map(estimate, rng.normal(2.0, 0.3, (2000, 3)))]
    assert 0.935 < np.mean(held) < 0.965  # three standard errors of the share are 0.015


def test_effects_equal_a_regression_on_coded_factors():
    factors, seeds = ("a", "b", "c"), 4
    rng = np.random.default_rng(0)
    names = [
        [name for name, on in zip(factors, levels, strict=True) if on] for levels in product((0, 1), repeat=3)
    ]
    values = {" + ".join(present) or "base": rng.normal(size=seeds).tolist() for present in names}
    effects = Comparison("m", "loss", 7, values).effects(factors)
    coded = np.array([[0.5 if name in present else -0.5 for name in factors] for present in names])
    terms = [term for size in (1, 2, 3) for term in combinations(range(3), size)]
    design = np.array([[1.0, *(np.prod(row[list(term)]) for term in terms)] for row in coded])
    fitted = np.linalg.solve(design, np.array(list(values.values())))  # (terms, seeds)
    assert list(effects) == [" x ".join(factors[index] for index in term) for term in terms]
    for effect, by_seed in zip(effects.values(), fitted[1:], strict=True):
        assert effect == pytest.approx(estimate(by_seed.tolist()))


def test_report_of_factors_shows_their_effects(load, report, tmp_path):
    ablation = load(
        "seeds=3",
        "variants=null",
        "factors={from-scratch: {init: {from_scratch: true}}, x: {sft: {steps: 3}}}",
    )
    comparisons = [
        replace(one, values={**one.values, "x": one.values["base"], "from-scratch + x": one.values["base"]})
        for one in report.comparisons
    ]
    designed = replace(report, ablation=ablation, comparisons=comparisons)
    steps = {variant: {"sft": 3} for variant in ablation.settings.variant_names}
    designed = replace(designed, steps=steps)
    lines = list(effect_lines(designed.as_dict()))
    assert [line[1] for line in lines[:3]] == ["from-scratch", "x", "from-scratch x x"]
    assert {len(line) for line in lines} == {len(EFFECT_COLUMNS)}
    write_report(designed, tmp_path)
    assert "from-scratch x x" in (tmp_path / "report.html").read_text()


def test_equal_values_have_no_p_value():
    """Values that differ only by rounding count as equal."""
    same = estimate([0.55 - 0.5, 0.61 - 0.56, 0.63 - 0.58])
    assert same.p_value is None
    assert same[:3] == pytest.approx((0.05, 0.05, 0.05))


def test_files_contain_the_results(report, tmp_path):
    report.write(tmp_path / "report.json")
    facts = json.loads((tmp_path / "report.json").read_text())
    assert facts["variants"]["no-stage1"] == {
        "changes": ["without stage1", "sft.steps = 7"],
        "steps": {"sft": 7},
    }
    assert facts["metrics"]["names"]["values"]["base"] == list(NAMES["base"])
    assert facts["metrics"]["names loss"]["differences"]["no-stage1"]["mean"] == pytest.approx(0.1)
    assert any("3 seeds" in note and "4.30 standard errors" in note for note in facts["notes"])
    assert any("there are 4" in note for note in facts["notes"])
    row = Row("base", 1, "names", "accuracy", 0.5, 7)
    write_rows(tmp_path / "results.parquet", [row])
    assert pq.read_table(tmp_path / "results.parquet").to_pylist() == [row._asdict()]


def test_accuracy_differences_are_in_percentage_points(report):
    table = list(result_lines(report.as_dict()))
    assert table[1][:5] == ("", "from-scratch", "45.0%", "-9.7 pp", "-18.4 to -0.9")
    assert table[3] == ("names loss", "base", "1.167", "", "", "")
    assert table[5][2:4] == ("1.267", "+0.100")
    assert {len(line) for line in table} == {len(COLUMNS)}


@pytest.mark.parametrize("axis", ["null", "{label: start, values: {base: 2, from-scratch: 0, no-stage1: 1}}"])
def test_report_shows_every_seed_and_variant(load, report, tmp_path, axis):
    ablation = load("seeds=3", f"axis={axis}", "question=Is 1 < 2?")
    write_report(replace(report, ablation=ablation), tmp_path)
    assert Image.open(tmp_path / "plot.png").width > 500
    page = (tmp_path / "report.html").read_text()
    assert "Is 1 &lt; 2?" in page
    for part in ("from-scratch", "seed 2", "-18.4 to -0.9", "without stage1; sft.steps = 7"):
        assert part in page
