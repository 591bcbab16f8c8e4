"""IsoFLOP profiles: at each budget the size of least loss, and how it grows with the budget.

Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models", approach 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from solo_vlm.experiments.scaling.huber import Array, interval
from solo_vlm.experiments.scaling.laws import FLOPS_PER_PARAMETER_AND_TOKEN, RESAMPLES, Interval
from solo_vlm.utils.errors import SoloError

_SAME_BUDGET = 0.02  # in log FLOPs: runs take whole steps
_LEAST = 4  # sizes of a budget: a parabola takes three


@dataclass(frozen=True)
class Profile:
    """The runs of one budget.

    Attributes:
        flops: the budget C.
        n: (runs,) parameters.
        loss: (runs,) nats a token.
        parabola: loss = p0 x^2 + p1 x + p2 with x = log N.
    """

    flops: float
    n: Array
    loss: Array
    parabola: Array

    @property
    def n_optimal(self) -> float:
        """Parameters at the lowest point of the parabola."""
        return float(np.exp(-self.parabola[1] / (2 * self.parabola[0])))

    @property
    def d_optimal(self) -> float:
        """Tokens there, C / (6 N)."""
        return self.flops / (FLOPS_PER_PARAMETER_AND_TOKEN * self.n_optimal)

    @property
    def has_minimum(self) -> bool:
        """Whether the parabola opens upwards and is lowest among the sizes that were run."""
        return bool(self.parabola[0] > 0 and self.n.min() <= self.n_optimal <= self.n.max())


@dataclass(frozen=True)
class IsoFlopFit:
    """N ~ C^a and D ~ C^b through the minima of the profiles.

    Attributes:
        profiles: all, by budget.
        a: exponent of parameters.
        b: of tokens; b = 1 - a, as D = C / (6 N).
        intervals: 95% of both.
    """

    profiles: Sequence[Profile]
    a: float
    b: float
    intervals: dict[str, Interval]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "a": self.a,
            "b": self.b,
            "intervals": self.intervals,
            "profiles": [
                {
                    "flops": profile.flops,
                    "n_points": len(profile.n),
                    "has_minimum": profile.has_minimum,
                    "n_optimal": profile.n_optimal if profile.has_minimum else None,
                    "d_optimal": profile.d_optimal if profile.has_minimum else None,
                }
                for profile in self.profiles
            ],
        }


def fit_isoflop(
    flops: ArrayLike, n: ArrayLike, loss: ArrayLike, resamples: int = RESAMPLES, seed: int = 0
) -> IsoFlopFit:
    """Fit a parabola in log N to the losses of each budget, and a power law to the minima.

    A parabola is only near the minimum a good likeness of the law: sizes far from it bias the exponents. For
    the intervals, the runs of every budget are weighted at random (as in `huber.resampled_minima`).

    Args:
        flops: (points,) budgets; those within 2% of each other are one.
        n: (points,) parameters.
        loss: (points,) nats a token.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        SoloError: fewer than two budgets have their minimum among at least four sizes.
    """
    flops, n, loss = (np.asarray(values, float) for values in (flops, n, loss))
    profiles = [
        _profile(float(np.exp(np.log(flops[runs]).mean())), n[runs], loss[runs])
        for runs in _budgets(flops)
        if len(np.unique(n[runs])) >= _LEAST
    ]
    used = [profile for profile in profiles if profile.has_minimum]
    if len(used) < 2:
        raise SoloError(
            f"no IsoFLOP profiles: {len(used)} budgets have their minimum among at least {_LEAST} sizes, "
            "and a power law needs two: give sizes on both sides of the minimum the same FLOPs"
        )
    generator = np.random.default_rng(seed)
    resampled = [_exponent([_reweighted(profile, generator) for profile in used]) for _ in range(resamples)]
    known = [exponent for exponent in resampled if exponent is not None]
    low, high = interval(known, sum(len(profile.n) for profile in used), 3 * len(used))
    a = _exponent(used)
    assert a is not None
    return IsoFlopFit(profiles, a, 1 - a, {"a": (low, high), "b": (1 - high, 1 - low)})


def _budgets(flops: Array) -> list[NDArray[np.intp]]:
    """The points of each budget."""
    order = np.argsort(flops)
    borders = np.flatnonzero(np.diff(np.log(flops[order])) > _SAME_BUDGET) + 1
    return np.split(order, borders)


def _profile(flops: float, n: Array, loss: Array, weights: Array | None = None) -> Profile:
    root = None if weights is None else np.sqrt(weights)
    return Profile(flops, n, loss, np.polyfit(np.log(n), loss, 2, w=root))


def _reweighted(profile: Profile, generator: np.random.Generator) -> Profile:
    weights = generator.dirichlet(np.ones(len(profile.n)))
    return _profile(profile.flops, profile.n, profile.loss, weights)


def _exponent(profiles: Sequence[Profile]) -> float | None:
    """Slope of log N over log C; none where a parabola has no lowest point."""
    if any(profile.parabola[0] <= 0 for profile in profiles):
        return None
    budgets, sizes = ([getattr(profile, name) for profile in profiles] for name in ("flops", "n_optimal"))
    return float(np.polyfit(np.log(budgets), np.log(sizes), 1)[0])
