"""IsoFLOP profiles: the model size of lowest loss at each budget, and its growth with the budget.

Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models", approach 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from solo_vlm.experiments.scaling.fitting import Array, interval
from solo_vlm.experiments.scaling.laws import FLOPS_PER_PARAMETER_AND_TOKEN, RESAMPLES, Interval
from solo_vlm.utils.errors import SoloError

_SAME_BUDGET = 0.02  # in log FLOPs; budgets are rounded to whole steps
_MIN_SIZES = 4  # per budget; a parabola has three coefficients


@dataclass(frozen=True)
class Profile:
    """All runs of one budget.

    Attributes:
        flops: Budget C.
        n: Parameters, (runs,).
        loss: Nats per token, (runs,).
        parabola: Coefficients of loss = p0 x^2 + p1 x + p2 with x = log N.
    """

    flops: float
    n: Array
    loss: Array
    parabola: Array

    @property
    def n_optimal(self) -> float:
        """Parameters at the minimum of the parabola."""
        return float(np.exp(-self.parabola[1] / (2 * self.parabola[0])))

    @property
    def d_optimal(self) -> float:
        """Tokens at the minimum of the parabola, C / (6 N)."""
        return self.flops / (FLOPS_PER_PARAMETER_AND_TOKEN * self.n_optimal)

    @property
    def has_minimum(self) -> bool:
        """Whether the parabola has its minimum within the range of sizes."""
        return bool(self.parabola[0] > 0 and self.n.min() <= self.n_optimal <= self.n.max())


@dataclass(frozen=True)
class IsoFlopFit:
    """Power laws N ~ C^a and D ~ C^b through the minima of the profiles.

    Attributes:
        profiles: All profiles, ordered by budget.
        a: Exponent of parameters.
        b: Exponent of tokens; b = 1 - a, as D = C / (6 N).
        intervals: 95% intervals of a and b.
    """

    profiles: Sequence[Profile]
    a: float
    b: float
    intervals: dict[str, Interval]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
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

    A parabola approximates the law only near the minimum: sizes far from it bias the exponents. The intervals
    come from random weights of the runs of every budget (as in `fitting.bootstrap_minima`).

    Args:
        flops: Budgets, (points,); values within 2% of each other count as one budget.

    Raises:
        SoloError: Fewer than two budgets have their minimum within at least four sizes.
    """
    flops, n, loss = (np.asarray(values, float) for values in (flops, n, loss))
    profiles = [
        _profile(float(np.exp(np.log(flops[runs]).mean())), n[runs], loss[runs])
        for runs in _budgets(flops)
        if len(np.unique(n[runs])) >= _MIN_SIZES
    ]
    used = [profile for profile in profiles if profile.has_minimum]
    if len(used) < 2:
        raise SoloError(
            f"no IsoFLOP profiles: {len(used)} budgets have a minimum within at least {_MIN_SIZES} sizes, "
            "and a power law needs two; run sizes on both sides of the minimum with the same FLOPs"
        )
    generator = np.random.default_rng(seed)
    resampled = [
        _exponent([_profile(p.flops, p.n, p.loss, generator.dirichlet(np.ones(len(p.n)))) for p in used])
        for _ in range(resamples)
    ]
    known = [exponent for exponent in resampled if exponent is not None]
    low, high = interval(known, sum(len(profile.n) for profile in used), 3 * len(used))
    a = _exponent(used)
    assert a is not None
    return IsoFlopFit(profiles, a, 1 - a, {"a": (low, high), "b": (1 - high, 1 - low)})


def _budgets(flops: Array) -> list[NDArray[np.intp]]:
    """Return the indices of the points of each budget."""
    order = np.argsort(flops)
    borders = np.flatnonzero(np.diff(np.log(flops[order])) > _SAME_BUDGET) + 1
    return np.split(order, borders)


def _profile(flops: float, n: Array, loss: Array, weights: Array | None = None) -> Profile:
    root = None if weights is None else np.sqrt(weights)
    return Profile(flops, n, loss, np.polyfit(np.log(n), loss, 2, w=root))


def _exponent(profiles: Sequence[Profile]) -> float | None:
    """Return the slope of log N over log C, or None if a parabola has no minimum."""
    if any(profile.parabola[0] <= 0 for profile in profiles):
        return None
    budgets, sizes = ([getattr(profile, name) for profile in profiles] for name in ("flops", "n_optimal"))
    return float(np.polyfit(np.log(budgets), np.log(sizes), 1)[0])
