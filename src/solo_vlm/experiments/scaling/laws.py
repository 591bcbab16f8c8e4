"""Scaling laws: loss as a function of parameters and tokens, and the compute-optimal split of a budget.

The law is L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, "Training Compute-Optimal Large
Language Models", approach 3).

The mixture law distinguishes text from vision tokens: L(N, T, V) = E + A / N^alpha + B / (T + g V)^beta,
where a vision token is worth g text tokens for the measured loss. One kind of data substitutes for another
as in Hernandez et al. 2021 ("Scaling Laws for Transfer": effective data transferred). The bimodal law of
Aghajanyan et al. 2023 ("Scaling Laws for Generative Mixed-Modal Language Models") needs runs and losses of
each modality alone, and separate terms in T and V diverge for runs without vision tokens. This form takes
one loss and any share of vision tokens, at the cost of one parameter; g = 1 is the plain law. It cannot
express that too much of one kind hurts.
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

from solo_vlm.experiments.scaling.fitting import (
    Array,
    Curve,
    best_minimum,
    bootstrap_minima,
    huber_sum,
    interval,
)
from solo_vlm.utils.errors import SoloError

RESAMPLES = 2000
FLOPS_PER_PARAMETER_AND_TOKEN = 6  # Kaplan et al. 2020; C = 6 N D

# Hoffmann et al. 2022, appendix D.3: log A, log B, log E, alpha, beta.
_GRID = (range(0, 30, 5), range(0, 30, 5), (-1, -0.5, 0, 0.5, 1), (0, 0.5, 1, 1.5, 2), (0, 0.5, 1, 1.5, 2))
_INITIAL_G = (0.03, 0.1, 0.3, 1.0, 3.0)

Interval = tuple[float, float]
COEFFICIENTS = ("E", "A", "B", "alpha", "beta", "a", "b")
_PARAMETERS = 5
_MIXTURE_PARAMETERS = 6
_NEGLIGIBLE = 0.01  # share of E in the lowest loss
_MAX_LOG = 700.0  # exp of more overflows a float


@dataclass(frozen=True)
class Optimum:
    """Compute-optimal model size n and tokens d of a budget of FLOPs, and the predicted loss."""

    flops: float
    n: float
    d: float
    loss: float


@dataclass(frozen=True)
class ScalingLaw:
    """L(N, D) = E + A / N^alpha + B / D^beta, in nats per token.

    Attributes:
        E: Irreducible loss.
        A: Coefficient of the parameter term.
        B: Coefficient of the data term.
        alpha: Exponent of parameters.
        beta: Exponent of tokens.
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    @property
    def a(self) -> float:
        """Exponent of the optimal model size: N ~ C^a."""
        return self.beta / (self.alpha + self.beta)

    @property
    def b(self) -> float:
        """Exponent of the optimal number of tokens: D ~ C^b."""
        return self.alpha / (self.alpha + self.beta)

    def loss(self, n: ArrayLike, d: ArrayLike) -> Any:
        """Return the loss of a model of `n` parameters after `d` tokens; arrays broadcast."""
        with np.errstate(over="ignore"):  # a term with an extreme exponent vanishes
            return self.E + self.A / np.asarray(n) ** self.alpha + self.B / np.asarray(d) ** self.beta

    def optimum(self, flops: float) -> Optimum:
        """Minimize the loss under C = 6 N D: N = G (C/6)^a, D = (C/6)^b / G (Hoffmann et al. 2022, eq. 4).

        The result is NaN if alpha or beta is not positive, as the loss then has no minimum.
        """
        if min(self.alpha, self.beta) <= 0:
            return Optimum(flops, math.nan, math.nan, math.nan)
        g = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        budget = flops / FLOPS_PER_PARAMETER_AND_TOKEN
        n, d = g * budget**self.a, budget**self.b / g
        return Optimum(flops, n, d, float(self.loss(n, d)))


@dataclass(frozen=True)
class ScalingFit:
    """Fitted law with its bootstrap distribution.

    Attributes:
        resampled: Fits to resampled data (see `fit_scaling_law`).
        objective: Sum of the Huber losses.
        residual: Root mean square of the log residuals, about the relative error of a prediction.
    """

    law: ScalingLaw
    resampled: Sequence[ScalingLaw]
    n_points: int
    objective: float
    residual: float

    def interval(self, quantity: Callable[[ScalingLaw], float]) -> Interval:
        """Return the 95% interval of any quantity of the law (see `fitting.interval`)."""
        return interval([quantity(law) for law in self.resampled], self.n_points, _PARAMETERS)

    @property
    def intervals(self) -> dict[str, Interval]:
        """95% intervals of E, A, B, alpha, beta, a and b."""
        return {name: self.interval(attrgetter(name)) for name in COEFFICIENTS}

    def as_dict(self, budgets: Sequence[float] = ()) -> dict[str, Any]:
        """Return plain values, for JSON, with the optimum of each budget in FLOPs."""
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
    """Fit L(N, D) = E + A / N^alpha + B / D^beta to points (points,), with losses in nats per token.

    As in approach 3 of Hoffmann et al. 2022, L-BFGS minimizes the Huber loss (delta 1e-3) of log residuals
    over (log A, log B, log E, alpha, beta) from their grid of starts; of the 36 starts that share E, alpha
    and beta only the best is run. Losses are summed, not averaged (Besiroglu et al. 2024). The intervals come
    from a bootstrap (see `fitting.bootstrap_minima`).

    Raises:
        SoloError: The points do not determine a law.
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
        # The objective is flat in a negligible E: a second start lets resamples find a larger one.
        half = np.log(loss.min() / 2)
        starts.append(np.concatenate([best.parameters[:2], [half], best.parameters[3:]]))
    resampled = bootstrap_minima(curve, starts, observed, resamples, seed)
    residuals = curve(best.parameters)[0] - observed
    return ScalingFit(
        law=coordinates.to_law(best.parameters),
        resampled=[coordinates.to_law(parameters) for parameters in resampled],
        n_points=len(loss),
        objective=best.value,
        residual=float(np.sqrt(np.mean(residuals**2))),
    )


def check_points(loss: Array, inputs: Mapping[str, Array], parameters: int = _PARAMETERS) -> None:
    """Check that the points can determine a law."""
    if len(loss) <= parameters:
        raise SoloError(f"{len(loss)} points are too few: a law with {parameters} parameters needs more")
    for name, values in inputs.items():
        if len(values) != len(loss):
            raise SoloError(f"{len(values)} values of {name} for {len(loss)} losses")
        if not (np.isfinite(values) & (values > 0)).all():
            raise SoloError(f"a value of {name} is not a positive number")
        if len(np.unique(values)) < 3:
            raise SoloError(f"a law needs at least three different values of {name}")
    if not (np.isfinite(loss) & (loss > 0)).all():
        raise SoloError("a loss is not a positive number")


@dataclass(frozen=True)
class Coordinates:
    """Parameters of the law as optimized by L-BFGS: (log A', log B', log E, alpha, beta).

    A' and B' are the two terms at the center of the points. At N = 1 and D = 1, as in the law itself, they
    would correlate with alpha and beta so strongly that L-BFGS takes many times as many steps.

    Attributes:
        log_n: Mean of the log parameters.
        log_d: Mean of the log tokens.
    """

    log_n: float
    log_d: float

    def predict(self, parameters: Array, log_n: Array, log_d: Array) -> tuple[Array, Array]:
        """Return log losses (points,), and their derivatives with respect to the parameters (5, points)."""
        a, b, e, alpha, beta = parameters
        x, y = log_n - self.log_n, log_d - self.log_d
        terms = np.stack([a - alpha * x, b - beta * y, np.full_like(x, e)])  # (3, points)
        top = terms.max(0)
        powers = np.exp(terms - top)
        total = powers.sum(0)
        shares = powers / total
        return top + np.log(total), np.concatenate([shares, [-x * shares[0], -y * shares[1]]])

    def to_law(self, parameters: Array) -> ScalingLaw:
        """Convert parameters (5,) to a law."""
        a, b, e, alpha, beta = map(float, parameters)
        logs = np.array([e, a + alpha * self.log_n, b + beta * self.log_d])
        # A resample may leave a term undetermined; its coefficient must not overflow.
        e, a, b = map(float, np.exp(np.minimum(logs, _MAX_LOG)))
        return ScalingLaw(e, a, b, alpha, beta)

    def from_logs(self, log_a: float, log_b: float, log_e: float, alpha: float, beta: float) -> Array:
        """Convert the coefficients of a law to parameters (5,)."""
        return np.array([log_a - alpha * self.log_n, log_b - beta * self.log_d, log_e, alpha, beta])


def _starts(coordinates: Coordinates, curve: Curve, observed: Array) -> Iterator[Array]:
    """Yield the best A and B for each E, alpha and beta of the grid."""
    grid = sorted(product(*_GRID), key=lambda start: start[2:])
    for _, starts in groupby(grid, key=lambda start: start[2:]):
        candidates = [coordinates.from_logs(*start) for start in starts]
        yield min(candidates, key=lambda start: huber_sum(curve, start, observed))


@dataclass(frozen=True)
class MixtureLaw:
    """L(N, T, V) = E + A / N^alpha + B / (T + g V)^beta: the plain law in effective tokens T + g V.

    Attributes:
        g: Number of text tokens that one vision token is worth.
    """

    plain: ScalingLaw
    g: float

    def loss(self, n: ArrayLike, d_text: ArrayLike, d_vision: ArrayLike) -> Any:
        """Return the loss of a model of `n` parameters after the given tokens of each kind."""
        return self.plain.loss(n, np.asarray(d_text) + self.g * np.asarray(d_vision))


@dataclass(frozen=True)
class MixtureFit:
    """Fitted mixture law; attributes as in `ScalingFit`."""

    law: MixtureLaw
    resampled: Sequence[MixtureLaw]
    n_points: int
    objective: float

    def interval(self, quantity: Callable[[MixtureLaw], float]) -> Interval:
        """Return the 95% interval of any quantity of the law."""
        return interval([quantity(law) for law in self.resampled], self.n_points, _MIXTURE_PARAMETERS)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        intervals = {name: self.interval(attrgetter(f"plain.{name}")) for name in COEFFICIENTS}
        return {
            **asdict(self.law.plain),
            "g": self.law.g,
            "a": self.law.plain.a,
            "b": self.law.plain.b,
            "intervals": {**intervals, "g": self.interval(attrgetter("g"))},
            "n_points": self.n_points,
            "objective": self.objective,
        }


def fit_mixture_law(
    n: ArrayLike,
    d_text: ArrayLike,
    d_vision: ArrayLike,
    loss: ArrayLike,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> MixtureFit:
    """Fit L(N, T, V) = E + A / N^alpha + B / (T + g V)^beta with the method of `fit_scaling_law`.

    The starts are plain laws, each fitted with g fixed at one of a few values. Vision tokens may be 0.

    Raises:
        SoloError: The points do not determine a law, for instance if all have the same share of vision
            tokens.
    """
    n, d_text, d_vision, loss = (np.asarray(values, float) for values in (n, d_text, d_vision, loss))
    check_points(loss, {"n": n, "d_text": d_text}, _MIXTURE_PARAMETERS)
    if not (np.isfinite(d_vision) & (d_vision >= 0)).all():
        raise SoloError("a value of d_vision is not a number of tokens")
    if np.ptp(d_vision / (d_text + d_vision)) < 0.01:
        raise SoloError(
            "no mixture law: all points have the same share of vision tokens, which does not determine the "
            "worth of a vision token; vary the share"
        )
    log_n, observed = np.log(n), np.log(loss)
    coordinates = Coordinates(log_n.mean(), np.log(d_text + d_vision).mean())

    def curve(parameters: Array) -> tuple[Array, Array]:
        """Evaluate the plain law in effective tokens; the last parameter is log g."""
        *plain, log_g = parameters
        from_vision = np.exp(log_g) * d_vision
        effective = d_text + from_vision
        predicted, slopes = coordinates.predict(np.array(plain), log_n, np.log(effective))
        beta, d_share = plain[4], slopes[1]
        return predicted, np.concatenate([slopes, [-beta * d_share * from_vision / effective]])

    def to_law(parameters: Array) -> MixtureLaw:
        return MixtureLaw(coordinates.to_law(parameters[:5]), float(np.exp(parameters[5])))

    starts = []
    for g in _INITIAL_G:
        plain = fit_scaling_law(n, d_text + g * d_vision, loss, resamples=1).law
        log_a, log_b, log_e = np.log([plain.A, plain.B, plain.E])
        start = coordinates.from_logs(log_a, log_b, log_e, plain.alpha, plain.beta)
        starts.append(np.append(start, np.log(g)))
    best = best_minimum(curve, starts, observed)
    resampled = bootstrap_minima(curve, [best.parameters], observed, resamples, seed)
    return MixtureFit(to_law(best.parameters), [to_law(p) for p in resampled], len(loss), best.value)
