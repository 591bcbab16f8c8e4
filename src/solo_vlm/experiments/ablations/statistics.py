"""Means over seeds, and differences that are paired by seed, with Student's 95% intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

CONFIDENCE = 0.95
_DECIMALS = 12  # 0.55 - 0.5 and 0.61 - 0.56 are then the same


class Estimate(NamedTuple):
    """A mean over seeds.

    Attributes:
        mean: of the seeds' values.
        low: of its 95% interval.
        high: of its 95% interval.
        p_value: two-sided, that the true mean is zero; None where all values are the same.
    """

    mean: float
    low: float
    high: float
    p_value: float | None


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of independent values, with its interval by Student's t distribution.

    Of a variant's values less those of the base under the same seeds, this is the paired t-test.

    Args:
        values: one a seed, at least two. Where all are the same the interval has no width, which says more
            about how coarse the metric is than about the truth.
    """
    from scipy.stats import ttest_1samp

    mean = float(np.mean(values))
    if np.ptp(np.round(values, _DECIMALS)) == 0:
        return Estimate(mean, mean, mean, None)
    test: Any = ttest_1samp(values, 0.0)
    low, high = test.confidence_interval(CONFIDENCE)
    return Estimate(mean, float(low), float(high), float(test.pvalue))


def standard_errors(seeds: int) -> float:
    """How many standard errors an interval reaches to either side of the mean."""
    from scipy.stats import t

    return float(t.ppf((1 + CONFIDENCE) / 2, seeds - 1))
