"""Curves fitted to log losses by Huber loss with L-BFGS, and what chance the data leave."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.stats import norm
from scipy.stats import t as student
from threadpoolctl import threadpool_limits

Array = NDArray[np.float64]
# Parameters (p,) -> predicted log losses (points,), and their derivatives (p, points).
Curve = Callable[[Array], tuple[Array, Array]]

DELTA = 1e-3
_SCALE = 1e4  # L-BFGS-B stops at absolute gradients: the objective must not be tiny where it matters
_OPTIONS = {"maxiter": 1000, "ftol": 1e-13, "gtol": 1e-8}
_SINGULAR = 1e-12  # curvatures below this share of the largest are noise


class Minimum(NamedTuple):
    """Parameters (p,), and the sum of Huber losses there."""

    parameters: Array
    value: float


def best_minimum(curve: Curve, starts: Iterable[Array], observed: Array) -> Minimum:
    """The lowest of the minima that L-BFGS reaches from all starts.

    The objective is the SUM of the points' Huber losses (delta 1e-3). With their mean L-BFGS stops too early,
    which is how the published coefficients of Hoffmann et al. 2022 came to be off (Besiroglu et al. 2024,
    "Chinchilla Scaling: A replication attempt").

    Args:
        curve: to fit.
        starts: (p,) each.
        observed: (points,) log losses.
    """
    with _one_thread():
        return _lowest(curve, starts, observed)


def huber_sum(curve: Curve, parameters: Array, observed: Array) -> float:
    """The objective alone."""
    return _objective(curve, parameters, observed, None)[0]


def resampled_minima(
    curve: Curve, starts: Sequence[Array], observed: Array, resamples: int, seed: int
) -> Array:
    """Minima under random weights of the points, (resamples, p): the bootstrap with fractional weights.

    Weights come from the flat Dirichlet distribution (Rubin 1981, "The Bayesian Bootstrap"; Xu et al. 2020,
    "Applications of the Fractional-Random-Weight Bootstrap"). No point ever drops out, as points do where
    they are drawn with replacement: few points, or a grid of few sizes, then often determine no law.

    Args:
        curve: as fitted.
        starts: (p,) each; the first is the best fit. Every resample takes the lowest minimum from these.
        observed: (points,) log losses.
        resamples: their number.
        seed: of the weights.
    """
    predicted, slopes = curve(starts[0])
    axes = _axes(slopes @ slopes.T) * max(float(np.abs(observed - predicted).mean()), DELTA)
    drawn = np.random.default_rng(seed).dirichlet(np.ones(len(observed)), size=resamples) * len(observed)
    with _one_thread():
        return np.array([_lowest(curve, starts, observed, weights, axes).parameters for weights in drawn])


def interval(resampled: Sequence[float], n_points: int, n_parameters: int) -> tuple[float, float]:
    """95% interval: percentiles of resampled values, further out the fewer points there are.

    The tails are those of Student's distribution, widened by the degrees of freedom that the fit has used:
    the expanded percentile interval of Hesterberg 2015, "What Teachers Should Know About the Bootstrap".
    With 250 points it is the ordinary percentile interval, with 12 it takes nearly all resampled values.
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


def _one_thread() -> threadpool_limits:
    """BLAS on one thread: several only wait for each other over matrices as small as these."""
    return threadpool_limits(1, user_api="blas")


def _descend(
    curve: Curve,
    start: Array,
    observed: Array,
    weights: Array | None = None,
    axes: Array | None = None,
) -> Minimum:
    """L-BFGS from one start, along the columns of `axes` (p, p)."""
    axes = np.eye(len(start)) if axes is None else axes

    def scaled(steps: Array) -> tuple[float, Array]:
        value, gradient = _objective(curve, start + axes @ steps, observed, weights)
        return _SCALE * value, _SCALE * (gradient @ axes)

    found = minimize(scaled, np.zeros(len(start)), jac=True, method="L-BFGS-B", options=_OPTIONS)
    return Minimum(start + axes @ found.x, found.fun / _SCALE)


def _objective(
    curve: Curve, parameters: Array, observed: Array, weights: Array | None
) -> tuple[float, Array]:
    """Sum of Huber losses, and its gradient (p,)."""
    predicted, slopes = curve(parameters)
    residuals = predicted - observed
    clipped = np.clip(residuals, -DELTA, DELTA)
    weighted = clipped if weights is None else clipped * weights
    return float(weighted @ (residuals - clipped / 2)), slopes @ weighted


def _axes(curvature: Array) -> Array:
    """Columns along which a minimum is equally curved: A with A A' = the inverse of the curvature (p, p)."""
    values, vectors = np.linalg.eigh(curvature)
    return np.asarray(vectors / np.sqrt(np.maximum(values, _SINGULAR * values[-1])))
