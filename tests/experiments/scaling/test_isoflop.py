"""IsoFLOP profiles: minima and their growth, on data with known minima."""

from __future__ import annotations

import numpy as np
import pytest
from scaling_fit import LAWS

from solo_vlm.experiments.scaling.isoflop import fit_isoflop
from solo_vlm.utils.errors import SoloError


def profiles(optimal, loss, factors, budgets=(1e18, 1e19, 1e20)):
    flops, n = (grid.ravel() for grid in np.meshgrid(budgets, factors, indexing="ij"))
    n = n * optimal(flops)
    return flops, n, loss(flops, n)


def test_parabolas_recover_their_minima():
    data = profiles(
        lambda flops: 0.1 * flops**0.45,
        lambda flops, n: 2 + 0.1 * np.log(n / (0.1 * flops**0.45)) ** 2,
        np.geomspace(0.3, 2, 5),
    )
    fit = fit_isoflop(*data, resamples=50)
    assert (fit.a, fit.b) == pytest.approx((0.45, 0.55))
    for profile in fit.profiles:
        assert profile.n_optimal == pytest.approx(0.1 * profile.flops**0.45)
        assert profile.d_optimal == pytest.approx(profile.flops / 6 / profile.n_optimal)
    assert fit.intervals["a"] == pytest.approx((0.45, 0.45))


def test_interval_covers_the_exponent_of_the_law():
    law = LAWS["besiroglu_2024"]
    generator = np.random.default_rng(0)
    data = profiles(
        lambda flops: np.array([law.optimum(c).n for c in flops]),
        lambda flops, n: law.loss(n, flops / 6 / n) * np.exp(0.001 * generator.standard_normal(len(n))),
        np.geomspace(0.4, 2.5, 7),
        np.geomspace(1e18, 1e21, 5),
    )
    fit = fit_isoflop(*data)
    low, high = fit.intervals["a"]
    assert low < law.a < high
    assert high - low < 0.2


def test_budgets_without_a_minimum_are_excluded_or_rejected():
    def data(offset):
        return profiles(
            lambda flops: flops**0.5,
            lambda flops, n: 2 + np.log(n / (offset(flops) * flops**0.5)) ** 2,
            np.geomspace(0.5, 2, 5),
        )

    fit = fit_isoflop(*data(lambda flops: np.where(flops > 5e19, 10, 1)), resamples=5)
    assert [profile.has_minimum for profile in fit.profiles] == [True, True, False]
    assert fit.a == pytest.approx(0.5)
    with pytest.raises(SoloError, match="both sides"):
        fit_isoflop(*data(lambda flops: 10))
