"""Scaling laws: loss as a function of parameters and tokens, and what is optimal for a budget.

L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, "Training Compute-Optimal Large Language
Models", approach 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, product
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from solo_vlm.experiments.scaling.huber import (
    Array,
    Curve,
    best_minimum,
    huber_sum,
    interval,
    resampled_minima,
)
from solo_vlm.utils.errors import SoloError

RESAMPLES = 2000
FLOPS_PER_PARAMETER_AND_TOKEN = 6  # Kaplan et al. 2020; C = 6 N D

# Hoffmann et al. 2022, appendix D.3: log A, log B, log E, alpha, beta.
_GRID = (range(0, 30, 5), range(0, 30, 5), (-1, -0.5, 0, 0.5, 1), (0, 0.5, 1, 1.5, 2), (0, 0.5, 1, 1.5, 2))

Interval = tuple[float, float]
FIGURES = ("E", "A", "B", "alpha", "beta", "a", "b")
_PARAMETERS = 5
_NEGLIGIBLE = 0.01  # share of E in the lowest loss
_LARGEST = 700.0  # whose exponential is a float


@dataclass(frozen=True)
class Optimum:
    """What to train with a budget.

    Attributes:
        flops: the budget C.
        n: parameters.
        d: tokens.
        loss: expected.
    """

    flops: float
    n: float
    d: float
    loss: float


@dataclass(frozen=True)
class ScalingLaw:
    """L(N, D) = E + A / N^alpha + B / D^beta, in nats a token.

    Attributes:
        E: loss of an infinite model on infinite data.
        A: weight of the term of parameters.
        B: of that of tokens.
        alpha: exponent of parameters.
        beta: of tokens.
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    @property
    def a(self) -> float:
        """Exponent of the optimal size: N ~ C^a."""
        return self.beta / (self.alpha + self.beta)

    @property
    def b(self) -> float:
        """Exponent of the optimal tokens: D ~ C^b."""
        return self.alpha / (self.alpha + self.beta)

    def loss(self, n: ArrayLike, d: ArrayLike) -> Any:
        """Loss of a model of `n` parameters after `d` tokens; arrays give an array."""
        with np.errstate(over="ignore"):  # a term with an exponent out of all bounds is nothing
            return self.E + self.A / np.asarray(n) ** self.alpha + self.B / np.asarray(d) ** self.beta

    def optimum(self, flops: float) -> Optimum:
        """The least loss under C = 6 N D: N = G (C/6)^a, D = (C/6)^b / G (Hoffmann et al. 2022, eq. 4).

        Not a number where alpha or beta is not positive: more would then be worse.
        """
        if min(self.alpha, self.beta) <= 0:
            return Optimum(flops, math.nan, math.nan, math.nan)
        g = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        budget = flops / FLOPS_PER_PARAMETER_AND_TOKEN
        n, d = g * budget**self.a, budget**self.b / g
        return Optimum(flops, n, d, float(self.loss(n, d)))


@dataclass(frozen=True)
class ScalingFit:
    """A law fitted to points, and how far chance may have moved it.

    Attributes:
        law: the best fit.
        resampled: fits to resampled data (see `fit_scaling_law`).
        n_points: number of points.
        objective: sum of the points' Huber losses.
        residual: root of the mean squared residual of log losses, about the relative error of a prediction.
    """

    law: ScalingLaw
    resampled: Sequence[ScalingLaw]
    n_points: int
    objective: float
    residual: float

    def interval(self, figure: Callable[[ScalingLaw], float]) -> Interval:
        """95% interval of whatever a law gives (see `huber.interval`)."""
        return interval([figure(law) for law in self.resampled], self.n_points, _PARAMETERS)

    @property
    def intervals(self) -> dict[str, Interval]:
        """95% intervals of E, A, B, alpha, beta, a and b."""
        return {name: self.interval(attrgetter(name)) for name in FIGURES}

    def as_dict(self, budgets: Sequence[float] = ()) -> dict[str, Any]:
        """Plain values, for JSON, with the optimum of each budget in FLOPs."""
        return {
            **asdict(self.law),
            "a": self.law.a,
            "b": self.law.b,
            "intervals": self.intervals,
            "n_points": self.n_points,
            "objective": self.objective,
            "residual": self.residual,
            "resamples": len(self.resampled),
            "optima": [self._optimum(flops) for flops in budgets],
        }

    def _optimum(self, flops: float) -> dict[str, Any]:
        optima = [law.optimum(flops) for law in self.resampled]
        spread = {
            name: interval([getattr(optimum, name) for optimum in optima], self.n_points, _PARAMETERS)
            for name in ("n", "d", "loss")
        }
        return {**asdict(self.law.optimum(flops)), "intervals": spread}


def fit_scaling_law(
    n: ArrayLike, d: ArrayLike, loss: ArrayLike, resamples: int = RESAMPLES, seed: int = 0
) -> ScalingFit:
    """Fit L(N, D) = E + A / N^alpha + B / D^beta.

    As approach 3 of Hoffmann et al. 2022: the Huber loss (delta 1e-3) of log residuals is minimised by
    L-BFGS over (log A, log B, log E, alpha, beta), from their grid of starts; of the 36 starts that share E,
    alpha and beta the best one is run. Losses are summed, not averaged (Besiroglu et al. 2024). The
    intervals come from a bootstrap (see `huber.resampled_minima`).

    Args:
        n: (points,) parameters.
        d: (points,) tokens.
        loss: (points,) nats a token.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        SoloError: the points do not determine a law.
    """
    n, d, loss = (np.asarray(values, float) for values in (n, d, loss))
    check_points(loss, {"n": n, "d": d})
    log_n, log_d, observed = np.log(n), np.log(d), np.log(loss)
    coordinates = Coordinates(log_n.mean(), log_d.mean())

    def curve(parameters: Array) -> tuple[Array, Array]:
        return coordinates.predict(parameters, log_n, log_d)

    best = best_minimum(curve, _starts(coordinates, curve, observed), observed)
    starts = [best.parameters]
    if np.exp(best.parameters[2]) < _NEGLIGIBLE * loss.min():
        # The objective hardly depends on an E next to nothing: resamples that have one are led to it.
        half = np.log(loss.min() / 2)
        starts.append(np.concatenate([best.parameters[:2], [half], best.parameters[3:]]))
    resampled = resampled_minima(curve, starts, observed, resamples, seed)
    residuals = curve(best.parameters)[0] - observed
    return ScalingFit(
        law=coordinates.to_law(best.parameters),
        resampled=[coordinates.to_law(parameters) for parameters in resampled],
        n_points=len(loss),
        objective=best.value,
        residual=float(np.sqrt(np.mean(residuals**2))),
    )


def check_points(loss: Array, inputs: Mapping[str, Array], parameters: int = _PARAMETERS) -> None:
    """Make sure that a law can be fitted.

    Raises:
        SoloError: too few points for the law, or fewer than three different values of an input.
    """
    if len(loss) <= parameters:
        raise SoloError(f"{len(loss)} points: a law of {parameters} parameters needs more points than that")
    for name, values in inputs.items():
        if len(values) != len(loss):
            raise SoloError(f"{len(values)} values of {name} for {len(loss)} losses")
        if not (np.isfinite(values) & (values > 0)).all():
            raise SoloError(f"a value of {name} is not a positive number")
        if len(np.unique(values)) < 3:
            raise SoloError(f"the law needs at least three different values of {name}")
    if not (np.isfinite(loss) & (loss > 0)).all():
        raise SoloError("a loss is not a positive number")


@dataclass(frozen=True)
class Coordinates:
    """The law's parameters as L-BFGS sees them: (log A', log B', log E, alpha, beta).

    A' and B' are the terms themselves at the middle of the points, not at one parameter and one token, where
    they would hang together with alpha and beta so much that L-BFGS takes many times as many steps.

    Attributes:
        log_n: middle of log parameters.
        log_d: middle of log tokens.
    """

    log_n: float
    log_d: float

    def predict(self, parameters: Array, log_n: Array, log_d: Array) -> tuple[Array, Array]:
        """Log losses (points,), and their derivatives by the parameters (5, points)."""
        a, b, e, alpha, beta = parameters
        x, y = log_n - self.log_n, log_d - self.log_d
        terms = np.stack([a - alpha * x, b - beta * y, np.full_like(x, e)])  # (3, points)
        top = terms.max(0)
        powers = np.exp(terms - top)
        total = powers.sum(0)
        shares = powers / total
        return top + np.log(total), np.concatenate([shares, [-x * shares[0], -y * shares[1]]])

    def to_law(self, parameters: Array) -> ScalingLaw:
        """The law of parameters."""
        a, b, e, alpha, beta = map(float, parameters)
        logs = np.array([e, a + alpha * self.log_n, b + beta * self.log_d])
        # A resample may hardly determine a term; its weight stays a number.
        e, a, b = map(float, np.exp(np.minimum(logs, _LARGEST)))
        return ScalingLaw(e, a, b, alpha, beta)

    def of(self, log_a: float, log_b: float, log_e: float, alpha: float, beta: float) -> Array:
        """The parameters (5,) of a law."""
        return np.array([log_a - alpha * self.log_n, log_b - beta * self.log_d, log_e, alpha, beta])


def _starts(coordinates: Coordinates, curve: Curve, observed: Array) -> Iterator[Array]:
    """Of each E, alpha and beta of the grid the best A and B."""
    grid = sorted(product(*_GRID), key=lambda start: start[2:])
    for _, starts in groupby(grid, key=lambda start: start[2:]):
        candidates = [coordinates.of(*start) for start in starts]
        yield min(candidates, key=lambda start: huber_sum(curve, start, observed))
