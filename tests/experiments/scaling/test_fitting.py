"""The objective of fits and the width of bootstrap intervals."""

from __future__ import annotations

import numpy as np
import pytest
from scaling_fit import LAWS, runs
from scipy.optimize import approx_fprime

from solo_vlm.experiments.scaling.fitting import interval, objective
from solo_vlm.experiments.scaling.laws import Coordinates


def test_gradient_matches_the_objective():
    n, d, loss = runs(LAWS["hoffmann_2022"], seed=2, points=30)
    log_n, log_d = np.log(n), np.log(d)
    coordinates = Coordinates(log_n.mean(), log_d.mean())

    def value_and_gradient(parameters):
        return objective(lambda p: coordinates.predict(p, log_n, log_d), parameters, np.log(loss))

    at = np.array([-1.0, -1.5, 0.4, 0.3, 0.4])
    numeric = approx_fprime(at, lambda parameters: value_and_gradient(parameters)[0], 1e-7)
    assert value_and_gradient(at)[1] == pytest.approx(numeric, rel=1e-4)


def test_intervals_of_few_points_are_wider_than_percentiles():
    values = np.random.default_rng(0).standard_normal(20_000)
    assert interval(values, 10_000, 5) == pytest.approx((-1.96, 1.96), abs=0.05)
    # With 12 points and 5 parameters: Student's 2.36 at 7 degrees of freedom, times sqrt(12 / 7).
    assert interval(values, 12, 5) == pytest.approx((-3.10, 3.10), abs=0.25)
