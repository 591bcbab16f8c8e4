"""Intervals and p-values against independent computations."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from solo_vlm.evaluate.scoring.score import (
    Unit,
    bootstrap_interval,
    mean_interval,
    paired_difference,
    score_of,
)


def units(values, stratum=""):
    return [Unit(f"{stratum}{n}", float(value), stratum) for n, value in enumerate(values)]


def test_mean_interval_matches_wilsons_formula():
    correct, n, z = 37, 120, stats.norm.ppf(0.975)
    share = correct / n
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    interval = mean_interval(units([100] * correct + [0] * (n - correct)))
    assert interval == pytest.approx((100 * (middle - half), 100 * (middle + half)))


def test_score_is_the_sum_over_strata():
    assert score_of([*units([0, 200], "a"), *units([50], "b")]) == 150


def test_bootstrap_interval_matches_scipy():
    rng = np.random.default_rng(0)
    strata = [rng.choice([0.0, 50.0, 200.0], n, p=(0.2, 0.3, 0.5)) for n in (20, 60, 200)]
    reference = stats.bootstrap(
        strata,
        lambda *samples, axis: sum(sample.mean(axis=axis) for sample in samples),
        n_resamples=10_000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    ours = bootstrap_interval([unit for n, values in enumerate(strata) for unit in units(values, str(n))])
    assert ours == pytest.approx((reference.low, reference.high), abs=2.0)


def test_paired_difference_matches_sign_test():
    """Against the exact sign test: 60 questions are correct in one run only, 40 of them in the second."""
    first = [100] * 20 + [0] * 40 + [100] * 300 + [0] * 140
    second = [0] * 20 + [100] * 40 + [100] * 300 + [0] * 140
    difference, (low, high), p_value = paired_difference(units(first), units(second))
    assert difference == pytest.approx(4)
    assert 0 < low < 4 < high
    assert p_value == pytest.approx(stats.binomtest(40, 60).pvalue, abs=0.01)
    assert paired_difference(units(second), units(first))[0] == pytest.approx(-4)


def test_equal_runs_have_p_value_one():
    values = units([100, 0, 100])
    assert paired_difference(values, values) == (0, (0, 0), 1)


def test_p_values_are_calibrated_under_no_difference():
    rng = np.random.default_rng(0)
    p_values = [
        paired_difference(units(100.0 * (rng.random(200) < 0.6)), units(100.0 * (rng.random(200) < 0.6)))[2]
        for _ in range(100)
    ]
    assert 0.01 <= np.mean(np.array(p_values) < 0.05) <= 0.10
