"""Scaling laws: fits recover the law behind the data, with calibrated intervals."""

from __future__ import annotations

import numpy as np
import pytest
from scaling_fit import LAWS, coverage, runs
from scipy.optimize import least_squares, minimize_scalar
from scipy.special import huber

from solo_vlm.experiments import fit_scaling_law
from solo_vlm.experiments.scaling.laws import ScalingLaw, fit_mixture_law
from solo_vlm.utils.errors import SoloError

PARAMETERS = ("E", "A", "B", "alpha", "beta")


@pytest.mark.parametrize("name", LAWS)
def test_noiseless_data_recovers_the_law(name):
    law = LAWS[name]
    fit = fit_scaling_law(*runs(law, seed=0, points=60, noise=0), resamples=20)
    for parameter in PARAMETERS:
        assert getattr(fit.law, parameter) == pytest.approx(getattr(law, parameter), rel=2e-3)
    assert fit.objective < 1e-9


def test_exponents_of_the_published_laws():
    hoffmann, besiroglu = LAWS["hoffmann_2022"], LAWS["besiroglu_2024"]
    # Hoffmann et al. 2022, table 2: 0.46 and 0.54 (before rounding); Besiroglu et al. 2024: 0.51 and 0.49.
    assert (hoffmann.a, hoffmann.b) == pytest.approx((0.28 / 0.62, 0.34 / 0.62))
    assert (round(besiroglu.a, 2), round(besiroglu.b, 2)) == (0.51, 0.49)


@pytest.mark.parametrize("flops", [1e18, 5.76e23])
def test_optimum_matches_numeric_minimization(flops):
    law = LAWS["besiroglu_2024"]
    found = minimize_scalar(
        lambda log_n: law.loss(np.exp(log_n), flops / 6 / np.exp(log_n)), bounds=(10, 40), method="bounded"
    )
    optimum = law.optimum(flops)
    assert optimum.n == pytest.approx(np.exp(found.x), rel=1e-3)
    assert optimum.d == pytest.approx(flops / 6 / optimum.n)
    assert optimum.loss == pytest.approx(found.fun)


def test_minimum_matches_another_optimizer():
    law = LAWS["besiroglu_2024"]
    n, d, loss = runs(law, seed=1, points=100, noise=0.005)
    fit = fit_scaling_law(n, d, loss, resamples=1)

    def residuals(parameters):
        a, b, e, alpha, beta = parameters
        terms = [a - alpha * np.log(n), b - beta * np.log(d), np.full_like(n, e)]
        return np.logaddexp.reduce(terms) - np.log(loss)

    parameters = [np.log(law.A), np.log(law.B), np.log(law.E), law.alpha, law.beta]
    other = least_squares(
        residuals, parameters, loss="huber", f_scale=1e-3, x_scale="jac", xtol=1e-12, ftol=1e-12
    )
    assert fit.objective == pytest.approx(huber(1e-3, residuals(_parameters(fit.law))).sum(), rel=1e-6)
    assert fit.objective <= other.cost * (1 + 1e-6)


def test_outlier_stays_within_the_intervals():
    n, d, loss = runs(LAWS["hoffmann_2022"], seed=3, points=120, noise=0.002)
    broken = loss.copy()
    broken[7] *= 3
    fit = fit_scaling_law(n, d, loss, resamples=100)
    moved = fit_scaling_law(n, d, broken, resamples=1).law
    for parameter in PARAMETERS:
        low, high = fit.intervals[parameter]
        assert low < getattr(moved, parameter) < high


def test_small_grid_determines_a_law_in_every_resample():
    law = LAWS["hoffmann_2022"]
    n, d = (grid.ravel() for grid in np.meshgrid(np.geomspace(1e7, 1e9, 4), np.geomspace(1e8, 1e10, 3)))
    noise = np.exp(0.002 * np.random.default_rng(0).standard_normal(12))
    fit = fit_scaling_law(n, d, law.loss(n, d) * noise, resamples=200)
    assert all(resampled.alpha > 0 and resampled.beta > 0 for resampled in fit.resampled)
    low, high = fit.interval(lambda resampled: float(resampled.loss(4e9, 4e10)))
    assert low < law.loss(4e9, 4e10) < high


def test_intervals_are_deterministic_per_seed():
    data = runs(LAWS["hoffmann_2022"], seed=4, points=40)
    first, again = (fit_scaling_law(*data, resamples=20) for _ in range(2))
    assert first.intervals == again.intervals
    assert fit_scaling_law(*data, resamples=20, seed=1).intervals != first.intervals


@pytest.mark.parametrize(
    ("n", "d", "loss", "message"),
    [
        ([1e6] * 5, [1e9] * 5, [2.0] * 5, "5 points"),
        ([1e6, 2e6] * 4, np.geomspace(1e8, 1e9, 8), np.linspace(3, 2, 8), "different values of n"),
        (np.geomspace(1e6, 1e7, 8), np.geomspace(1e8, 1e9, 8), [3, 2, 2, 2, 2, 2, -1, 2], "loss"),
        (np.geomspace(1e6, 1e7, 8), [1e8, np.nan, *range(1, 7)], [2.0] * 8, "of d"),
    ],
)
def test_undetermined_law_is_rejected(n, d, loss, message):
    with pytest.raises(SoloError, match=message):
        fit_scaling_law(n, d, loss)


def test_mixture_fit_recovers_the_worth_of_a_vision_token():
    law = LAWS["hoffmann_2022"]
    n, d, _ = runs(law, seed=5, points=60)
    share = np.random.default_rng(0).choice([0, 0.2, 0.5, 0.7], 60)
    text, vision = d * (1 - share), d * share
    fit = fit_mixture_law(n, text, vision, law.loss(n, text + 0.3 * vision), resamples=5)
    assert fit.law.g == pytest.approx(0.3, rel=1e-3)
    assert fit.law.plain.beta == pytest.approx(0.28, rel=2e-3)
    assert fit.law.loss(1e9, 1e10, 1e10) == pytest.approx(law.loss(1e9, 1.3e10), rel=1e-5)


def test_mixture_fit_rejects_a_constant_vision_share():
    n, d, loss = runs(LAWS["hoffmann_2022"], seed=6, points=20)
    with pytest.raises(SoloError, match="same share"):
        fit_mixture_law(n, 0.4 * d, 0.6 * d, loss)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", LAWS)
def test_95_percent_intervals_cover_the_true_values(name):
    found = coverage(LAWS[name], draws=100, noise=0.01)
    assert min(found["covered"].values()) >= 90


def _parameters(law: ScalingLaw) -> list[float]:
    return [np.log(law.A), np.log(law.B), np.log(law.E), law.alpha, law.beta]
