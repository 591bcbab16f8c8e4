"""Curve fitting to log losses by Huber loss with L-BFGS, and bootstrap confidence intervals.

`scipy.stats.bootstrap` resamples with replacement, which often leaves too few distinct points to determine a
law; `scipy.optimize.least_squares(loss="huber")` does not take the fractional weights that avoid this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import huber
from scipy.stats import norm
from scipy.stats import t as student
from threadpoolctl import threadpool_limits

Array = NDArray[np.float64]
# Parameters (p,) -> predicted log losses (points,), and their derivatives (p, points).
Curve = Callable[[Array], tuple[Array, Array]]

DELTA = 1e-3
_SCALE = 1e4  # L-BFGS-B stops at absolute gradients, so the objective must not be tiny near the minimum
_OPTIONS = {"maxiter": 1000, "ftol": 1e-13, "gtol": 1e-8}
_SINGULAR = 1e-12  # curvatures below this share of the largest are noise


class Minimum(NamedTuple):
    """Parameters (p,), and the sum of Huber losses there."""

    parameters: Array
    value: float


def best_minimum(curve: Curve, starts: Iterable[Array], observed: Array) -> Minimum:
    """Return the lowest of the minima that L-BFGS reaches from all starts.

    The objective is the sum of Huber losses (delta 1e-3), not their mean: with the mean, L-BFGS stops too
    early, which explains the inaccurate published coefficients of Hoffmann et al. 2022 (Besiroglu et al.
    2024, "Chinchilla Scaling: A replication attempt").

    Args:
        starts: Initial parameters, (p,) each.
        observed: Log losses, (points,).
    """
    with _single_threaded_blas():
        return _lowest(curve, starts, observed)


def huber_sum(curve: Curve, parameters: Array, observed: Array) -> float:
    """Return the value of the objective."""
    return float(huber(DELTA, curve(parameters)[0] - observed).sum())


def bootstrap_minima(
    curve: Curve, starts: Sequence[Array], observed: Array, resamples: int, seed: int
) -> Array:
    """Return the minima under random weights of the points, (resamples, p).

    The weights follow the flat Dirichlet distribution (Rubin 1981, "The Bayesian Bootstrap"; Xu et al. 2020,
    "Applications of the Fractional-Random-Weight Bootstrap"). Every point keeps some weight; resampling with
    replacement drops points, so a small grid of sizes often does not determine a law.

    Args:
        starts: Initial parameters, (p,) each, starting with the best fit. Each resample keeps its lowest
            minimum.
        observed: Log losses, (points,).
    """
    predicted, slopes = curve(starts[0])
    axes = _whitening_axes(slopes @ slopes.T) * max(float(np.abs(observed - predicted).mean()), DELTA)
    drawn = np.random.default_rng(seed).dirichlet(np.ones(len(observed)), size=resamples) * len(observed)
    with _single_threaded_blas():
        return np.array([_lowest(curve, starts, observed, weights, axes).parameters for weights in drawn])


def interval(resampled: Sequence[float], n_points: int, n_parameters: int) -> tuple[float, float]:
    """Return the 95% interval from resampled values: percentiles that widen for few points.

    This is the expanded percentile interval of Hesterberg 2015, "What Teachers Should Know About the
    Bootstrap": tails of Student's t distribution, widened by the degrees of freedom used by the fit. At 250
    points it is the ordinary percentile interval; at 12 it spans nearly all resampled values.
    """
    free = n_points - n_parameters
    tail = 100 * norm.cdf((n_points / free) ** 0.5 * student.ppf(0.025, free))
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return float(low), float(high)


def _lowest(
    curve: Curve,
    starts: Iterable[Array],
    observed: Array,
    weights: Array | None = None,
    axes: Array | None = None,
) -> Minimum:
    found = (_descend(curve, start, observed, weights, axes) for start in starts)
    return min(found, key=lambda minimum: minimum.value)


def _single_threaded_blas() -> threadpool_limits:
    """Limit BLAS to one thread: synchronization costs more than these small matrices gain."""
    return threadpool_limits(1, user_api="blas")


def _descend(
    curve: Curve, start: Array, observed: Array, weights: Array | None = None, axes: Array | None = None
) -> Minimum:
    """Run L-BFGS from one start, in the coordinates of the columns of `axes` (p, p)."""
    axes = np.eye(len(start)) if axes is None else axes

    def scaled(steps: Array) -> tuple[float, Array]:
        value, gradient = objective(curve, start + axes @ steps, observed, weights)
        return _SCALE * value, _SCALE * (gradient @ axes)

    found = minimize(scaled, np.zeros(len(start)), jac=True, method="L-BFGS-B", options=_OPTIONS)
    return Minimum(start + axes @ found.x, found.fun / _SCALE)


def objective(
    curve: Curve, parameters: Array, observed: Array, weights: Array | None = None
) -> tuple[float, Array]:
    """Return the weighted sum of Huber losses, and its gradient (p,)."""
    predicted, slopes = curve(parameters)
    residuals = predicted - observed
    clipped = np.clip(residuals, -DELTA, DELTA)
    weighted = clipped if weights is None else clipped * weights
    return float(weighted @ (residuals - clipped / 2)), slopes @ weighted


def _whitening_axes(curvature: Array) -> Array:
    """Return A with A A' = inverse curvature (p, p): along its columns the minimum is equally curved."""
    values, vectors = np.linalg.eigh(curvature)
    return np.asarray(vectors / np.sqrt(np.maximum(values, _SINGULAR * values[-1])))
