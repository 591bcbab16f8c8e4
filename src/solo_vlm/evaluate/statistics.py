"""Sampling error: 95% intervals of scores and of differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from solo_vlm.evaluate.score import Unit

_RESAMPLES = 10_000
_SEED = 0


def score_of(units: Sequence[Unit]) -> float:
    """The sum, over strata, of the mean of each stratum's units."""
    return float(sum(np.mean(values) for values in _strata(units)))


def proportion_interval(units: Sequence[Unit]) -> tuple[float, float]:
    """Wilson's 95% interval of an accuracy in per cent; each unit's value is 0 or 100."""
    from scipy.stats import binomtest

    right = sum(unit.value > 0 for unit in units)
    interval = binomtest(right, len(units)).proportion_ci(method="wilson")
    return 100 * float(interval.low), 100 * float(interval.high)


def bootstrap_interval(units: Sequence[Unit]) -> tuple[float, float]:
    """A 95% interval of a sum of means: percentiles of 10,000 resamples of the units within their strata.

    Where all units of all strata are alike, as in a perfect run, it has no width.
    """
    return _percentiles(bootstrap(units))


def paired_difference(
    units: Sequence[Unit], others: Sequence[Unit]
) -> tuple[float, tuple[float, float], float]:
    """The second score less the first on the same units, its 95% interval, and a p-value: paired bootstrap.

    Args:
        units: of the first run.
        others: of the second run, with the same ids in the same order.

    Returns:
        The difference; its interval; the two-sided p-value that there is none: twice the share of resampled
        differences on the other side of zero (Efron and Tibshirani 1993, section 15.4), never below 2/10,001.
    """
    differences = [
        Unit(unit.id, other.value - unit.value, unit.stratum)
        for unit, other in zip(units, others, strict=True)
    ]
    resampled = bootstrap(differences).round(9)  # sums of strata that cancel out are zero
    tails = [np.sum(resampled <= 0), np.sum(resampled >= 0)]
    p_value = min(1.0, 2 * (min(tails) + 1) / (_RESAMPLES + 1))
    return score_of(differences), _percentiles(resampled), float(p_value)


def bootstrap(units: Sequence[Unit]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The score of 10,000 resamples of the units, drawn with replacement within their strata; seeded.

    Units of one value are alike, so a resample is a multinomial draw of how many there are of each value.
    """
    rng = np.random.default_rng(_SEED)
    scores = np.zeros(_RESAMPLES)
    for values in _strata(units):
        distinct, counts = np.unique(values, return_counts=True)
        draws = rng.multinomial(len(values), counts / len(values), size=_RESAMPLES)  # (resamples, distinct)
        scores += draws @ distinct / len(values)
    return scores


def _strata(units: Sequence[Unit]) -> list[list[float]]:
    strata: dict[str, list[float]] = {}
    for unit in units:
        strata.setdefault(unit.stratum, []).append(unit.value)
    return list(strata.values())


def _percentiles(scores: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[float, float]:
    low, high = np.percentile(scores, [2.5, 97.5])
    return float(low), float(high)
