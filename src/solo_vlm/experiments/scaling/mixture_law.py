"""A scaling law that tells text from vision tokens: how much text is a vision token worth?

L(N, T, V) = E + A / N^alpha + B / (T + g V)^beta, where g is the worth of a vision token in text tokens, for
the loss that was measured. Data of one kind stand in for another as in Hernandez et al. 2021 ("Scaling Laws
for Transfer": effective data transferred).

Why not the bimodal law of Aghajanyan et al. 2023 ("Scaling Laws for Generative Mixed-Modal Language Models")?
It adds what two modalities gain from and lose to each other to the mean of their unimodal laws, and so needs
runs on each modality alone and the loss of each. Nor can terms in T and V of their own be fitted where some
runs have no vision tokens: V^-beta is then infinite. The form here takes one loss and any share of vision
tokens, 0 among them, and costs one parameter; with g = 1 it is the plain law. What it cannot express is that
too much of one kind hurts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from solo_vlm.experiments.scaling.huber import Array, best_minimum, interval, resampled_minima
from solo_vlm.experiments.scaling.laws import (
    FIGURES,
    RESAMPLES,
    Coordinates,
    Interval,
    ScalingLaw,
    check_points,
    fit_scaling_law,
)
from solo_vlm.utils.errors import SoloError

_WORTHS = (0.03, 0.1, 0.3, 1.0, 3.0)  # to start from
_PARAMETERS = 6


@dataclass(frozen=True)
class MixtureLaw:
    """L(N, T, V) = E + A / N^alpha + B / (T + g V)^beta.

    Attributes:
        plain: the law in effective tokens T + g V.
        g: text tokens that a vision token is worth.
    """

    plain: ScalingLaw
    g: float

    def loss(self, n: ArrayLike, d_text: ArrayLike, d_vision: ArrayLike) -> Any:
        """Loss of a model of `n` parameters after so many tokens of each kind."""
        return self.plain.loss(n, np.asarray(d_text) + self.g * np.asarray(d_vision))


@dataclass(frozen=True)
class MixtureFit:
    """A law of mixtures fitted to points; as `laws.ScalingFit`."""

    law: MixtureLaw
    resampled: Sequence[MixtureLaw]
    n_points: int
    objective: float

    def interval(self, figure: Callable[[MixtureLaw], float]) -> Interval:
        """95% interval of whatever a law gives."""
        return interval([figure(law) for law in self.resampled], self.n_points, _PARAMETERS)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        intervals = {name: self.interval(attrgetter(f"plain.{name}")) for name in FIGURES}
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
    """Fit L(N, T, V) = E + A / N^alpha + B / (T + g V)^beta, in the way of `fit_scaling_law`.

    The starts are plain laws, each fitted with g held at one of a few values.

    Args:
        n: (points,) parameters.
        d_text: (points,) text tokens.
        d_vision: (points,) vision tokens; may be 0.
        loss: (points,) nats a token.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        SoloError: the points do not determine a law, as where all have one share of vision tokens.
    """
    n, d_text, d_vision, loss = (np.asarray(values, float) for values in (n, d_text, d_vision, loss))
    check_points(loss, {"n": n, "d_text": d_text}, _PARAMETERS)
    if not (np.isfinite(d_vision) & (d_vision >= 0)).all():
        raise SoloError("a value of d_vision is not a number of tokens")
    if np.ptp(d_vision / (d_text + d_vision)) < 0.01:
        raise SoloError(
            "no law of mixtures: all points have the same share of vision tokens, which does not tell what "
            "such a token is worth; vary the share"
        )
    log_n, observed = np.log(n), np.log(loss)
    coordinates = Coordinates(log_n.mean(), np.log(d_text + d_vision).mean())

    def curve(parameters: Array) -> tuple[Array, Array]:
        """The plain law in effective tokens; the last parameter is log g."""
        *plain, log_g = parameters
        from_vision = np.exp(log_g) * d_vision
        effective = d_text + from_vision
        predicted, slopes = coordinates.predict(np.array(plain), log_n, np.log(effective))
        beta, d_share = plain[4], slopes[1]
        return predicted, np.concatenate([slopes, [-beta * d_share * from_vision / effective]])

    def to_law(parameters: Array) -> MixtureLaw:
        return MixtureLaw(coordinates.to_law(parameters[:5]), float(np.exp(parameters[5])))

    starts = []
    for g in _WORTHS:
        plain = fit_scaling_law(n, d_text + g * d_vision, loss, resamples=1).law
        log_a, log_b, log_e = np.log([plain.A, plain.B, plain.E])
        start = coordinates.of(log_a, log_b, log_e, plain.alpha, plain.beta)
        starts.append(np.append(start, np.log(g)))
    best = best_minimum(curve, starts, observed)
    resampled = resampled_minima(curve, [best.parameters], observed, resamples, seed)
    return MixtureFit(to_law(best.parameters), [to_law(p) for p in resampled], len(loss), best.value)
